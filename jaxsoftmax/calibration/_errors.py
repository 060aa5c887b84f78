"""Calibration errors over bins."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import FLAG, INTEGER, STATIC
from jaxsoftmax.calibration._bins import Binned, Binning, into_bins
from jaxsoftmax.calibration._predictions import Events, as_predictions, measure


@measure(num_bins=INTEGER, binning=STATIC, norm=STATIC, debiased=FLAG)
def expected_calibration_error(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    debiased: bool = False,
) -> Float[Array, ""]:
    r"""The distance between confidence and accuracy, over bins weighted by their count.

    .. math:: \Big( \sum_b \frac{n_b}{n} |a_b - c_b|^r \Big)^{1/r}

    with the accuracy `a` and mean confidence `c` of each bin; for `r = inf` the largest distance.

    Even for perfectly calibrated predictions this is not 0, since the accuracy of a few predictions
    depends on chance. `debiased` subtracts what chance adds to the squares:

    .. math:: \Big[ \sum_b \frac{n_b}{n} \Big( (a_b - c_b)^2 - \frac{a_b (1 - a_b)}{n_b - 1} \Big)
              \Big]_+^{1/2}

    over the bins with more than one prediction. For norms other than 2, the data do not tell the
    bias, so there is no such estimator. With weights, `n_b` is here the number of predictions of
    equal weight that would tell as much, :math:`(\sum w)^2 / \sum w^2`.

    Args:
      probs: predicted probabilities. A single column, or (n,) with labels (n,), means one event per
        row: class 1 of two, or that a prediction is right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin; equal predictions share a bin.
      norm: the exponent `r`, a number from 1 to inf.
      debiased: whether to use the debiased estimator; needs `norm=2`.

    Returns:
      A scalar between 0 and 1. NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or `norm` or fewer than one bin,
        or `debiased` with another `norm` than 2. Outside of `jit`, also if a row that counts has
        numbers that are not probabilities (up to rounding), a label that is not a class, or a
        negative weight. While tracing, the result is then NaN.

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
    events = as_predictions(probs, labels, where, weights).confidences()
    return distance.finish(distance.of_bins(into_bins(events, num_bins, binning)))


def maximum_calibration_error(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    num_bins: int = 15,
    binning: Binning = "width",
) -> Float[Array, ""]:
    r"""The largest distance between confidence and accuracy in any bin.

    .. math:: \max_b |a_b - c_b|

    with the accuracy `a` and mean confidence `c` of each bin; `expected_calibration_error` with
    `norm=inf`.

    Args:
      probs: predicted probabilities. A single column, or (n,) with labels (n,), means one event per
        row: class 1 of two, or that a prediction is right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin, so that a bin of few cannot decide the result; equal predictions
        share a bin.

    Returns:
      A scalar between 0 and 1. NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or fewer than one bin. Outside
        of `jit`, also if a row that counts has numbers that are not probabilities (up to rounding),
        a label that is not a class, or a negative weight. While tracing, the result is then NaN.

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
        probs, labels, where, weights=weights, num_bins=num_bins, binning=binning, norm=jnp.inf
    )


@measure(num_bins=INTEGER, binning=STATIC, norm=STATIC, debiased=FLAG)
def classwise_calibration_error(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    debiased: bool = False,
) -> Float[Array, ""]:
    r"""The calibration error over the probabilities of all classes, not only of the largest.

    .. math:: \Big( \frac1k \sum_{j=1}^k \sum_b \frac{n_{jb}}{n} |a_{jb} - p_{jb}|^r \Big)^{1/r}

    with the mean `p` of the probabilities of class `j` in its bin `b` and the share `a` in which
    the class came true; for `r = inf` the largest distance.

    Args:
      probs: predicted probabilities. A single column, or (n,) with labels (n,), means one event per
        row: class 1 of two, or that a prediction is right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      num_bins: how many bins each class has.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin; equal predictions share a bin.
      norm: the exponent `r`, a number from 1 to inf.
      debiased: whether to use the debiased estimator; needs `norm=2`. See
        `expected_calibration_error`.

    Returns:
      A scalar between 0 and 1. NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or `norm` or fewer than one bin,
        or `debiased` with another `norm` than 2. Outside of `jit`, also if a row that counts has
        numbers that are not probabilities (up to rounding), a label that is not a class, or a
        negative weight. While tracing, the result is then NaN.

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

    def of_class(events: Events) -> Array:
        return distance.of_bins(into_bins(events, num_bins, binning))

    predictions = as_predictions(probs, labels, where, weights)
    return distance.finish(distance.over_classes(predictions.of_each_class(of_class)))


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
    if not isinstance(norm, numbers.Real) or not norm >= 1:
        raise ValueError(f"norm must be a number from 1 to inf, got {norm!r}.")
    if debiased and norm != 2:
        raise ValueError(
            f"debiased needs norm 2, the only norm whose bias is known, got norm {norm}."
        )
    if norm == jnp.inf:
        return _Distance(_largest_gap, _nan_max, lambda largest: largest)
    of_bins = _debiased_square if debiased else functools.partial(_mean_power, norm=float(norm))
    return _Distance(of_bins, jnp.mean, functools.partial(_root, norm=float(norm)))


def _mean_power(binned: Binned, norm: float) -> Array:
    return jnp.sum(binned.weight * binned.gap**norm)


def _largest_gap(binned: Binned) -> Array:
    return _nan_max(binned.gap + 0 * jnp.sum(binned.weight))  # NaN without rows


def _debiased_square(binned: Binned) -> Array:
    size = binned.size
    several = size > 1
    variance = binned.share * (1 - binned.share) / jnp.where(several, size - 1, 1)
    squares = jnp.where(several, binned.weight * (binned.gap**2 - variance), 0)
    return jnp.sum(squares + 0 * binned.weight)  # NaN without rows


def _nan_max(x: Array) -> Array:
    """The maximum; NaN if there is one, which a maximum may lose."""
    return nan_unless(~jnp.any(jnp.isnan(x)), jnp.max(x))


def _root(x: Array, norm: float) -> Array:
    """The root of a mean of powers, 0 of what is not positive, with derivative 0 there."""
    positive = ~(x <= 0)  # or NaN
    return jnp.where(positive, jnp.where(positive, x, 1) ** (1 / norm), 0)
