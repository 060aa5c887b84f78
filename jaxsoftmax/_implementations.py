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
# The platforms on which an implementation of attention, or of rows, was measured to be right, and
# faster than XLA's: None chooses it there, for what it knows. No kernel has run on a device yet.
MEASURED: dict[tuple[str, Literal["attention", "rows"]], str] = {}


class NoKernelError(ValueError):
    """What an implementation does not know."""


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
