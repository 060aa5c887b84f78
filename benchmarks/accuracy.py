"""Accuracy: errors of float32 in units in the last place, against the answer in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxsoftmax as jsm
from benchmarks.charts import Growth
from benchmarks.command import Topic, main
from benchmarks.measuring import Result

Mapping = Callable[[jax.Array], jax.Array]

SCALES = (1, 10, 30, 100)
LENGTHS = (10, 1000, 1013, 100_000)
# So many numbers are compared.
NUMBERS = 1_000_000
# The last: XLA for CPU takes a softmax of as many rows in one pass.
SHAPES = (*((NUMBERS // length, length) for length in LENGTHS), (4096, 1024))
LEADS = (20, 45, 80)
PAIRS: dict[str, tuple[Mapping, Mapping]] = {
    "softmax": (jsm.softmax, jax.nn.softmax),
    "log_softmax": (jsm.log_softmax, jax.nn.log_softmax),
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """The worst errors of ours and of `jax.nn`'s on the same rows.

    Attributes:
      function: the name of both.
      operation: what is varied.
      size: in words.
      x: what is varied.
      rows: makes rows of scores.
      tells: whether the first number is told, and not just its error.
    """

    function: str
    operation: str
    size: str
    x: float
    rows: Callable[[], np.ndarray]
    tells: bool = False

    def measure(self, quick: bool) -> list[Result]:
        """One result of each."""
        rows = self.rows()
        exact = EXACT[self.function](rows.astype(np.float64))
        answers = [np.array(jax.jit(f)(rows)) for f in PAIRS[self.function]]
        ours, theirs = ({"error": worst_error(answer, exact)} for answer in answers)
        theirs["ours_error"] = ours["error"] / theirs["error"]
        if self.tells:
            for found, answer in ((ours, answers[0]), (theirs, answers[1])):
                found["result"] = f"gives {answer[0, 0]:.6g}, exactly {exact[0, 0]:.6g}"
        name = f"jsm.{self.function}"
        return [self._result(f"jax.nn.{self.function}", theirs, name), self._result(name, ours)]

    def _result(self, name: str, quantities: dict[str, Any], ours: str = "") -> Result:
        return Result(self.operation, self.size, self.x, name, ours, quantities=quantities)


def exact_log_softmax(rows: np.ndarray) -> np.ndarray:
    """Log-softmax in float64; no digits are lost where one entry dominates."""
    gaps = rows - rows.max(1, keepdims=True)
    top = np.arange(rows.shape[1]) == gaps.argmax(1)[:, None]
    return gaps - np.log1p(np.sum(np.exp(gaps), 1, where=~top, keepdims=True))


def exact_softmax(rows: np.ndarray) -> np.ndarray:
    """Softmax in float64."""
    return np.exp(exact_log_softmax(rows))


EXACT = {"softmax": exact_softmax, "log_softmax": exact_log_softmax}


def worst_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units in the last place of float32.

    XLA flushes to zero what is below the smallest normal number, terms of sums too: no unit is
    smaller than that number.
    """
    info = np.finfo(np.float32)
    unit = np.ldexp(1.0, np.frexp(exact)[1] - 1 - info.nmant)
    return float(np.max(np.abs(actual - exact) / np.maximum(unit, info.tiny)))


def normal_rows(count: int, length: int, scale: int) -> np.ndarray:
    """Rows of normally distributed scores."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(count, length)) * scale).astype(np.float32)


def leading_rows(lead: int) -> np.ndarray:
    """One class is far ahead of another, so that its probability is nearly 1."""
    return np.array([[lead, 0]], np.float32)


def operation(function: str, count: int, length: int) -> str:
    """What is done on normally distributed scores."""
    return f"{function}, float32, normal scores, {count} rows of {length}"


LEADING = "log_softmax, float32, two classes"


def steps(quick: bool) -> list[Errors]:
    """All comparisons."""
    shapes, scales, leads = (SHAPES[:1], (1,), (20,)) if quick else (SHAPES, SCALES, LEADS)
    by_scale = [
        Errors(
            name,
            operation(name, *shape),
            f"scale {scale}",
            scale,
            functools.partial(normal_rows, *shape, scale),
        )
        for name in PAIRS
        for shape in shapes
        for scale in scales
    ]
    by_lead = [
        Errors(
            "log_softmax",
            LEADING,
            f"one ahead by {lead}",
            lead,
            functools.partial(leading_rows, lead),
            tells=True,
        )
        for lead in leads
    ]
    return by_scale + by_lead


NOTES = """
- In float32, softmax adds up rows of 256 entries and more in parts, which loses fewer digits. It
  does not do so in two cases where it would take half as long again: if the length has no divisor
  from 8 to 64, and if there are 4096 rows or more, which XLA handles in one pass.
- If nearly all probabilities are 0 or near 1, both are right to 3 ulp, and either may be better.
"""

TOPIC = Topic(
    "accuracy",
    "Accuracy",
    """
This page shows the largest errors in units in the last place (ulp) of float32. The rows are
normally distributed scores, or the scores of two classes, of which one is ahead. XLA replaces
numbers below the smallest normal one by 0; this does not count as an error. The exact answer is
computed in float64, whose own error is below a millionth of an ulp of float32. (The tests compare
with 50 digits of `mpmath`.)
""",
    steps,
    tuple(
        Growth(
            f"{name} of rows of 1000 normal scores",
            operation(name, NUMBERS // 1000, 1000),
            "error",
            "scale of the scores",
            "worst error, ulp",
        )
        for name in PAIRS
    ),
    NOTES,
)

if __name__ == "__main__":
    main([TOPIC])
