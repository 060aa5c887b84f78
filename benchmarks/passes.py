"""How many passes over the scores a search for thresholds takes: `python -m benchmarks.passes`.

Counted, not timed: a pass is one call of a search's step on all scores. All rows of an array move
together, so the count is that of the slowest of them.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

import jaxsoftmax as jsm
from jaxsoftmax import _reductions
from jaxsoftmax._platforms import _cpu

# Rows and their lengths; the standard deviation of normal scores.
SHAPES, SPREADS = ((4096, 64), (4096, 1024), (256, 32768)), (0.3, 1.0, 10.0)
MAPPINGS = {
    "sparsemax": jsm.sparsemax,
    "entmax15": jsm.entmax15,
    "entmax(1.3)": functools.partial(jsm.entmax, alpha=1.3),
}


def passes(mapping: Callable[..., Any], scores: jax.Array, starts: bool) -> int:
    """Those that a CPU takes.

    Args:
      mapping: the mapping.
      scores: the scores, normalized along the last axis.
      starts: whether long rows start at the threshold of a few of their scores.
    """
    with _counted(starts) as seen:
        jax.clear_caches()
        jax.block_until_ready(jax.jit(mapping)(scores))
        jax.effects_barrier()
    return sum(size == scores.shape[-1] for size in seen)


@contextmanager
def _counted(starts: bool) -> Iterator[list[int]]:
    """Notes down how many scores of a row each step of a search takes."""
    seen: list[int] = []
    search, many = _reductions.Rows.search, _cpu.MANY

    def counting(rows: Any, scores: Any, step: Callable[..., Any], start: Any) -> Any:
        def noted(some: Any, state: Any) -> Any:
            jax.debug.callback(functools.partial(seen.append, some[0].shape[-1]))
            return step(some, state)

        return search(rows, scores, noted, start)

    try:
        _reductions.Rows.search = counting  # type: ignore[method-assign]
        _cpu.MANY = many if starts else max(length for _, length in SHAPES) + 1
        yield seen
    finally:
        _reductions.Rows.search, _cpu.MANY = search, many  # type: ignore[method-assign]


def main() -> None:
    """Prints a table: from the lowest threshold, and where long rows start at that of a few."""
    print("| length of a row | standard deviation |", " | ".join(MAPPINGS), "|")
    print("|--:|--:|", "|".join(["--:"] * len(MAPPINGS)), "|")
    for (rows, length), spread in ((shape, spread) for shape in SHAPES for spread in SPREADS):
        scores = spread * jax.random.normal(jax.random.key(0), (rows, length))
        found = []
        for mapping in MAPPINGS.values():
            before, after = (passes(mapping, scores, starts) for starts in (False, True))
            found.append(f"{before}" if before == after else f"{before}, {after}")
        print(f"| {length:,} | {spread:g} |", " | ".join(found), "|", flush=True)


if __name__ == "__main__":
    main()
