"""Mappings: time, temporary memory and time to compile, by shape and by length of the rows."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax as jsm
from benchmarks import limits
from benchmarks.charts import Growth, Ratios
from benchmarks.command import Topic, main
from benchmarks.measuring import Comparison, Entry, Missing
from benchmarks.peers import torch_peer
from benchmarks.transforms import forward, value_and_pullback

Mapping = Callable[[jax.Array], jax.Array]

FORWARD = "forward, float32"
PULLBACK = "value and vjp, float32"
HALF = "forward, bfloat16"
HALVED = "softmax", "log_softmax", "sparsemax", "entmax15"
FAMILY = "the whole family, forward, float32"
FIRST_AXIS = "along the first axis, forward, float32"
GROWTH = "by length, forward, float32"

# Ours, and where `jax.nn` has the same.
SAME: dict[str, tuple[Mapping, Mapping | None]] = {
    "softmax": (jsm.softmax, jax.nn.softmax),
    "log_softmax": (jsm.log_softmax, jax.nn.log_softmax),
    "sparsemax": (jsm.sparsemax, None),
    "entmax15": (jsm.entmax15, None),
    "entmax(1.3)": (functools.partial(jsm.entmax, alpha=1.3), None),
}
OTHERS: dict[str, tuple[Mapping, Mapping | None]] = {
    "logsumexp": (jsm.logsumexp, functools.partial(jax.nn.logsumexp, axis=-1)),
    "hardmax": (jsm.hardmax, None),
    "softpick": (jsm.softpick, None),
    "normmax(2)": (jsm.normmax, None),
    "normmax(1.5)": (functools.partial(jsm.normmax, alpha=1.5), None),
    "budget_sparsemax(2)": (functools.partial(jsm.budget_sparsemax, budget=2.0), None),
    "stick_breaking": (jsm.stick_breaking, None),
    "sinkhorn": (jsm.sinkhorn, None),
}
SOFTMAX = "jax.nn.softmax"
# deep-spin's function, ours that does the same, and options of theirs.
TORCH: dict[str, tuple[str, str, dict[str, float]]] = {
    "sparsemax": ("sparsemax", "jsm.sparsemax", {}),
    "entmax15": ("entmax15", "jsm.entmax15", {}),
    "entmax": ("entmax_bisect", "jsm.entmax(1.3)", {"alpha": 1.3}),
    "normmax": ("normmax_bisect", "jsm.normmax(2)", {"alpha": 2.0}),
    "budget": ("budget_bisect", "jsm.budget_sparsemax(2)", {"budget": 2.0}),
}
LENGTH_LABEL = "length of the rows (2^20 numbers in all)"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      shapes: of scores.
      lengths: those of rows that grow.
      numbers: how many scores these have in all.
      same, others: the mappings.
    """

    shapes: Sequence[tuple[int, int]] = ((4096, 1024), (256, 32768), (16384, 64))
    lengths: Sequence[int] = (16, 128, 1024, 8192, 65536)
    numbers: int = 2**20
    same: Sequence[str] = tuple(SAME)
    others: Sequence[str] = ("entmax(1.3)", *OTHERS)


TINY = Sizes(((8, 64),), (8,), 64, ("softmax", "entmax15"), ("logsumexp", "sinkhorn"))


def ours_and_jax(names: Iterable[str], what: Callable = forward) -> dict[str, Entry | Missing]:
    """Ours by name, and those of `jax.nn` that do the same; its softmax first of all."""
    entries: dict[str, Entry | Missing] = {SOFTMAX: Entry(what(jax.nn.softmax), "jsm.softmax")}
    for name in names:
        ours, theirs = (SAME | OTHERS)[name]
        if theirs is not None:
            entries[f"jax.nn.{name}"] = Entry(what(theirs), f"jsm.{name}")
        entries[f"jsm.{name}"] = Entry(what(ours))
    return entries


def along_the_first_axis(mapping: Mapping) -> Callable:
    """The values, of rows whose entries are far from each other in memory."""
    return forward(functools.partial(mapping, axis=0))


def by_sort() -> dict[str, Entry | Missing]:
    """Sparsemax as most libraries for JAX have it."""
    sparsemax = jax.vmap(optax.projections.projection_simplex)
    return {"optax projection_simplex": Entry(forward(sparsemax), "jsm.sparsemax")}


def log_softmax_by_hand(x: jax.Array) -> jax.Array:
    """As exact as ours where one entry dominates, in the fewest lines of `jax.numpy`.

    The 1 of the largest entry is not added to the others, which are far smaller there.
    """
    gap = x - jnp.max(x, -1, keepdims=True)
    ties = jnp.sum(gap == 0, -1, keepdims=True, dtype=x.dtype)
    others = jnp.sum(jnp.where(gap == 0, 0, jnp.exp(gap)), -1, keepdims=True) + (ties - 1)
    return gap - jnp.log1p(others)


def by_hand(what: Callable = forward) -> dict[str, Entry | Missing]:
    """What exactness takes if XLA is left to it."""
    return {"exact log_softmax in jax.numpy": Entry(what(log_softmax_by_hand), "jsm.log_softmax")}


def by_torch(*names: str) -> dict[str, Entry | Missing]:
    """Mappings of deep-spin's entmax."""
    return {
        f"torch {function}": torch_peer(
            ("entmax", "torch"), functools.partial(_torch_mapping, function, options), ours
        )
        for function, ours, options in (TORCH[name] for name in names)
    }


def _torch_mapping(name: str, options: dict[str, float], entmax: Any, torch: Any) -> Callable:
    def mapping(x: Any, *_: Any) -> Any:
        with torch.no_grad():
            return getattr(entmax, name)(x, dim=-1, **options)

    return mapping


def arguments(shape: tuple[int, int], dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    """Scores, and cotangents of their probabilities."""
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], shape, dtype)


def comparison(
    operation: str,
    shape: tuple[int, int],
    entries: dict[str, Entry | Missing],
    dtype: str = "float32",
    limit: dict[str, Entry] = limits.copy,
) -> Comparison:
    """A comparison on rows of one shape, beside the copy that each has to make at least."""
    args = functools.partial(arguments, shape, dtype)
    size = f"{shape[0]} × {shape[1]}"
    return Comparison(operation, size, shape[1], entries | limit, args)


def steps(quick: bool) -> list[Comparison]:
    """All comparisons."""
    sizes = TINY if quick else Sizes()
    forward_entries = (
        ours_and_jax(sizes.same) | by_hand() | by_sort() | by_torch("sparsemax", "entmax15")
    )
    pullback_entries = ours_and_jax(sizes.same, value_and_pullback) | by_hand(value_and_pullback)
    half_entries = ours_and_jax(name for name in sizes.same if name in HALVED)
    family_entries = ours_and_jax(sizes.others) | by_torch("entmax", "normmax", "budget")
    first_axis_entries = ours_and_jax(
        ("softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15"), along_the_first_axis
    )
    growth_entries = (
        ours_and_jax(["softmax", "sparsemax", "entmax15"])
        | by_sort()
        | by_torch("sparsemax", "entmax15")
    )
    return [
        *(comparison(FORWARD, shape, forward_entries) for shape in sizes.shapes),
        *(
            comparison(PULLBACK, shape, pullback_entries, limit=limits.copies)
            for shape in sizes.shapes
        ),
        *(comparison(HALF, shape, half_entries, "bfloat16") for shape in sizes.shapes),
        comparison(FAMILY, sizes.shapes[0], family_entries),
        comparison(FIRST_AXIS, sizes.shapes[0], first_axis_entries),
        *(
            comparison(GROWTH, (sizes.numbers // length, length), growth_entries)
            for length in sizes.lengths
        ),
    ]


NOTES = """
- `log_softmax` and `logsumexp` on CPUs: ours are right to about 4 ulp even if one class dominates,
  where those of `jax.nn` lose every digit ([accuracy](accuracy.md)). For that, the exponentials
  below the maximum are summed separately, of scores less a whole number, which rounds nothing. The
  shortest program that is as exact where one class dominates, "exact log_softmax in jax.numpy",
  shows what that takes if XLA is left to it.
- `softmax`: the differences to the maximum are exact, and infinite scores share a row.
- In bfloat16, `jax.nn` computes with 8 bits, and its error is up to 56 ulp. Ours computes in
  float32 and rounds once.
- The temporary memory is a copy of the scores: in float32, or folded so that XLA on a CPU can sum
  several at a time.
- Compiling takes longer because there is more to compile: a loop that solves for the threshold, or
  an exact sum. You pay for it once per shape. Of some lengths, XLA for CPU hands all of a function
  of `jax.nn` to a library, and compiles nothing. The copy is one kernel that it compiles itself;
  `log_softmax` consists of ten.
"""

TOPIC = Topic(
    "mappings",
    "Mappings",
    """
Each mapping runs along the last axis of scores; in one group, along the first. The mappings are
compared with `jax.nn`, with a sparsemax that sorts (`optax.projections.projection_simplex`, under
`vmap`), and with deep-spin's entmax on PyTorch, by its exact algorithm where it has one. The column
`relative` compares with the first function of each group, `jax.nn.softmax`. The limit is a copy: it
reads the scores and writes as many numbers. For a vjp, the limit is two copies.
""",
    steps,
    (
        Growth("Time by length of the rows", GROWTH, "time", LENGTH_LABEL, "ms"),
        Ratios(
            "Forward, float32",
            "{name}",
            "{size}",
            ("ours_time",),
            "time of jaxsoftmax relative to it (less is better)",
            (FORWARD,),
        ),
        Ratios(
            "Value and vjp, and bfloat16",
            "{operation}: {name}",
            "{size}",
            ("ours_time",),
            "time of jaxsoftmax relative to it (less is better)",
            (PULLBACK, HALF),
        ),
    ),
    NOTES,
)

if __name__ == "__main__":
    main([TOPIC])
