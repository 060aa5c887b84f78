"""Calibration errors over bins."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Real

from jaxsoftmax._elementary import sqrt
from jaxsoftmax._scores import public
from jaxsoftmax.calibration._bins import Binned, Binning, into_bins
from jaxsoftmax.calibration._predictions import confidences, of_each_class


@public
def expected_calibration_error(
    probs: Real[ArrayLike, "n classes"],
    labels: Integer[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    debiased: bool = False,
) -> Float[Array, ""]:
    r"""The distance between confidence and accuracy, over bins weighted by their count.

    .. math:: \Big( \sum_b \frac{n_b}{n} |a_b - c_b|^r \Big)^{1/r}

    with the accuracy `a` and mean confidence `c` of each bin; for `r = inf` the largest distance.

    Even of perfectly calibrated predictions this is not 0, since the accuracies of few are left to
    chance. `debiased` takes off what chance does to the squares:

    .. math:: \Big[ \sum_b \frac{n_b}{n} \Big( (a_b - c_b)^2 - \frac{a_b (1 - a_b)}{n_b - 1} \Big)
              \Big]_+^{1/2}

    over the bins with more than one prediction.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin, of which equal ones share one.
      norm: the exponent `r`: 1, 2 or inf.
      debiased: whether to use the debiased estimator, which is for `norm` 2.

    Returns:
      A scalar between 0 and 1. NaN if a row holds NaN or a number outside of [0, 1] (but for
      rounding), or has a class out of range, or there are no rows.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or `norm` or fewer than one bin,
        or `debiased` with another `norm` than 2.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
      >>> labels = jnp.array([0, 1, 1, 1])
      >>> jsm.calibration.expected_calibration_error(probs, labels, num_bins=1)
      Array(0.25, dtype=float32)

    References:
      Naeini, Cooper & Hauskrecht, 2015: Obtaining well calibrated probabilities using Bayesian
      binning; Guo et al., 2017 (arXiv:1706.04599). Debiased: Kumar, Liang & Ma, 2019: Verified
      uncertainty calibration (arXiv:1909.10155).
    """
    distance = _distance(norm, debiased)
    return distance.finish(
        distance.of_bins(into_bins(*confidences(probs, labels), num_bins, binning))
    )


def maximum_calibration_error(
    probs: Real[ArrayLike, "n classes"],
    labels: Integer[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Binning = "width",
) -> Float[Array, ""]:
    r"""The largest distance between confidence and accuracy in any bin.

    .. math:: \max_b |a_b - c_b|

    with the accuracy `a` and mean confidence `c` of each bin; `expected_calibration_error` with
    `norm=inf`.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin, of which equal ones share one; that keeps a bin of few from
        deciding.

    Returns:
      A scalar between 0 and 1. NaN if a row holds NaN or a number outside of [0, 1] (but for
      rounding), or has a class out of range, or there are no rows.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or fewer than one bin.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.25, 0.75], [0.25, 0.75]])
      >>> labels = jnp.array([0, 1, 1, 0])
      >>> jsm.calibration.maximum_calibration_error(probs, labels, num_bins=4)
      Array(0.25, dtype=float32)

    References:
      Naeini, Cooper & Hauskrecht, 2015: Obtaining well calibrated probabilities using Bayesian
      binning.
    """
    return expected_calibration_error(
        probs, labels, num_bins=num_bins, binning=binning, norm=jnp.inf
    )


@public
def classwise_calibration_error(
    probs: Real[ArrayLike, "n classes"],
    labels: Integer[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    debiased: bool = False,
) -> Float[Array, ""]:
    r"""The calibration error of each class's probability, all of them and not just the largest.

    .. math:: \Big( \frac1k \sum_{j=1}^k \sum_b \frac{n_{jb}}{n} |a_{jb} - p_{jb}|^r \Big)^{1/r}

    with the mean `p` of the probabilities of class `j` in its bin `b` and the share `a` in which
    the class came true; for `r = inf` the largest distance.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins each class has.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin, of which equal ones share one.
      norm: the exponent `r`: 1, 2 or inf.
      debiased: whether to use the debiased estimator, which is for `norm` 2; see
        `expected_calibration_error`.

    Returns:
      A scalar between 0 and 1. NaN if a row holds NaN or a number outside of [0, 1] (but for
      rounding), or has a class out of range, or there are no rows.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or `norm` or fewer than one bin,
        or `debiased` with another `norm` than 2.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
      >>> error = jsm.calibration.classwise_calibration_error(probs, jnp.array([0, 1]), num_bins=1)
      >>> print(f"{error:.4f}")  # of class 0: 0; of class 1: 0.125; of class 2: 0.125
      0.0833

    References:
      Kull et al., 2019 (arXiv:1910.12656); Nixon et al., 2019: Measuring calibration in deep
      learning (arXiv:1904.01685); Kumar, Liang & Ma, 2019 (arXiv:1909.10155).
    """
    distance = _distance(norm, debiased)

    def of_class(p: Array, y: Array) -> Array:
        return distance.of_bins(into_bins(p, y, num_bins, binning))

    return distance.finish(distance.over_classes(of_each_class(of_class, probs, labels)))


class _Distance(NamedTuple):
    """A way to sum up the gaps of the bins.

    Attributes:
      of_bins: of the bins of one class, or of confidences.
      over_classes: joins those of all classes.
      finish: makes the answer of it.
    """

    of_bins: Callable[[Binned], Array]
    over_classes: Callable[[Array], Array]
    finish: Callable[[Array], Array]


def _distance(norm: float, debiased: bool) -> _Distance:
    if norm not in (1, 2, jnp.inf):
        raise ValueError(f"norm must be 1, 2 or inf, got {norm}.")
    if debiased and norm != 2:
        raise ValueError(f"debiased must go with norm 2, got norm {norm}.")
    return _DEBIASED if debiased else _DISTANCES[norm]


def _mean_gap(binned: Binned) -> Array:
    return jnp.sum(binned.weight * binned.gap)


def _mean_square(binned: Binned) -> Array:
    return jnp.sum(binned.weight * binned.gap**2)


def _largest_gap(binned: Binned) -> Array:
    return _nan_max(binned.gap + 0 * jnp.sum(binned.weight))  # NaN without rows


def _debiased_square(binned: Binned) -> Array:
    several = binned.count > 1
    variance = binned.share * (1 - binned.share) / jnp.where(several, binned.count - 1, 1)
    return jnp.sum(jnp.where(several, binned.weight * (binned.gap**2 - variance), 0))


def _nan_max(x: Array) -> Array:
    """The maximum; NaN if there is one, which a maximum may lose."""
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, jnp.max(x))


def _root(x: Array) -> Array:
    return jnp.where(jnp.isnan(x), x, sqrt(x))


def _itself(x: Array) -> Array:
    return x


_DISTANCES = {
    1: _Distance(_mean_gap, jnp.mean, _itself),
    2: _Distance(_mean_square, jnp.mean, _root),
    jnp.inf: _Distance(_largest_gap, _nan_max, _itself),
}
_DEBIASED = _Distance(_debiased_square, jnp.mean, _root)
