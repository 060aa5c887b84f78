"""Which mapping with which scaling is best here, and which others may be as good."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsoftmax._demo.evaluation import Judgement, Result

LEVEL = 0.95
_RESAMPLES = 4000


class Estimate(NamedTuple):
    """A mean over the test digits, with its bootstrap interval."""

    mean: float
    low: float
    high: float


class Candidate(NamedTuple):
    """One model with one scaling.

    Attributes:
      result: The model.
      scaling: The name of the scaling, as in `Result.judgements`.
      brier: Its Brier score.
      excess: By how much its Brier score is larger than the smallest one.
    """

    result: Result
    scaling: str
    brier: Estimate
    excess: Estimate

    @property
    def judgement(self) -> Judgement:
        """What it is worth on the test digits."""
        return self.result.judgements[self.scaling]

    @property
    def may_be_as_good(self) -> bool:
        """Whether other test digits might show no difference from the best."""
        return self.excess.low <= 0


def rank(results: list[Result], *, seed: int = 0) -> list[Candidate]:
    """Ranks each model with each scaling by its Brier score on the test digits.

    Args:
      results: The models.
      seed: Decides which digits are drawn.

    Returns:
      The candidates, the best first. All are compared on the same digits, also in each resample: so
      the interval of a difference is narrower than those of the two scores.
    """
    names = [(result, scaling) for result in results for scaling in result.judgements]
    squares = np.stack([result.judgements[scaling].squares for result, scaling in names])
    best = np.argmin(squares.mean(1))
    count = squares.shape[1]
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    briers = _estimates(squares, times)
    excesses = _estimates(squares - squares[best], times)
    candidates = [
        Candidate(*name, brier, excess)
        for name, brier, excess in zip(names, briers, excesses, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: candidate.excess.mean)


def _estimates(
    values: Float[np.ndarray, "candidates digits"], times: Float[np.ndarray, "resamples digits"]
) -> list[Estimate]:
    """The mean of each row, with its interval over resamples, in which a digit counts `times`."""
    means = times @ values.T / values.shape[1]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return [Estimate(*map(float, each)) for each in zip(values.mean(1), low, high, strict=True)]
