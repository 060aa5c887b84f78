"""What may compute a function: names, where each was measured, and what none of them knows."""

from typing import Any, Literal, NoReturn

Implementation = Literal["xla", "pallas"]

# The implementations that are kernels, and of which platform those are interpreted, if they are:
# that is for tests.
KERNELS: dict[str, str | None] = {
    "pallas": None,
    "pallas, interpreted": "tpu",
    "pallas for CUDA, interpreted": "cuda",
}
Computed = Literal["attention", "rows"]

# The platforms that have kernels.
_PLATFORMS: dict[Computed, tuple[str, ...]] = {"attention": ("tpu", "cuda"), "rows": ("tpu",)}
# The platforms on which an implementation was measured to be right, and faster than XLA's: None
# chooses it there, for what it knows. No kernel has run on a device yet.
MEASURED: dict[tuple[str, Computed], str] = {}


class NoKernelError(ValueError):
    """What an implementation does not know."""


def platforms(implementation: str | None, of: Computed) -> tuple[str, ...]:
    """Those whose kernels are to be used, if they are named, or were measured where nothing is."""
    if implementation is None:
        return tuple(p for p in _PLATFORMS[of] if MEASURED.get((p, of)) == "pallas")
    if implementation not in KERNELS:
        return ()
    interpreted = KERNELS[implementation]
    return _PLATFORMS[of] if interpreted is None else (interpreted,)


def is_interpreted(implementation: str | None) -> bool:
    """Whether an implementation is kernels that are interpreted."""
    return KERNELS.get(implementation or "") is not None


def check_implementation(name: Any, *others: str) -> str | None:
    """The name of an implementation.

    Args:
      name: what was given.
      *others: what there is beside XLA and Pallas.
    """
    names = ["'xla'", "'pallas'", *map(repr, others)]
    if name not in (None, "xla", *others, *KERNELS):
        listed = f"{', '.join(['None', *names[:-1]])} or {names[-1]}"
        raise ValueError(f"implementation must be {listed}, got {name!r}.")
    return name


def refuse(implementation: str, what: str) -> NoReturn:
    """Names what an implementation does not know."""
    raise NoKernelError(
        f"implementation {implementation!r} has no kernel for {what}: use 'xla' or None."
    )
