"""Proper scores: what is best on average is to say what one believes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import INTEGER, STATIC
from jaxsoftmax.calibration._bins import Binning, into_bins
from jaxsoftmax.calibration._predictions import Events, as_predictions, measure


@measure(reduction=STATIC)
def negative_log_likelihood(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Array, "*rows"]:
    r"""The mean negative logarithm of the probability of the label, in nats.

    .. math:: -\frac1n \sum_i \log p_{i y_i}

    Args:
      probs: predicted probabilities. (For scores, `cross_entropy` is more exact.) A single column,
        or (n,) with labels (n,), means one event per row: class 1 of two, for instance.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      reduction: "mean" averages over the rows that count; "none" returns one value per row,
        not multiplied by its weight, and 0 for rows that do not count.

    Returns:
      A scalar, or one number per row, not negative. It is infinite if a label had probability 0.
      NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit. Outside of `jit`, also if a row that counts has numbers that
        are not probabilities (up to rounding), a label that is not a class, or a negative weight.
        While tracing, the result is then NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.5, 0.5], [0.25, 0.75]])
      >>> print(f"{jsm.calibration.negative_log_likelihood(probs, jnp.array([0, 0])):.4f}")
      1.0397

    References:
      Good, 1952: Rational decisions.
    """
    predictions = as_predictions(probs, labels, where, weights)
    probs, came = predictions.probs, predictions.came_true()
    if predictions.of_events:
        true = jnp.where(came > 0, probs, 1 - probs)[:, 0]
    else:  # no lookup: on an explicit mesh there is no one place to look it up
        true = jnp.sum(jnp.where(came > 0, probs, 0), 1)
        true = nan_unless(jnp.any(came > 0, 1), true)
    return predictions.reduce(-jnp.log(true), reduction)


@measure(reduction=STATIC)
def brier_score(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Array, "*rows"]:
    r"""The mean squared distance between the probabilities and the labels.

    .. math:: \frac1n \sum_i \sum_k (p_{ik} - [y_i = k])^2

    Args:
      probs: predicted probabilities. A single column, or (n,) with labels (n,), means one event per
        row: class 1 of two, or that a prediction is right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      reduction: "mean" averages over the rows that count; "none" returns one value per row,
        not multiplied by its weight, and 0 for rows that do not count.

    Returns:
      A scalar, or one number per row, between 0 and 2. The squares of all columns are summed. So
      for two classes it is twice the usual score, and for a single column it is the usual score.
      NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit. Outside of `jit`, also if a row that counts has numbers that
        are not probabilities (up to rounding), a label that is not a class, or a negative weight.
        While tracing, the result is then NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.5, 0.5], [0.25, 0.75]])
      >>> jsm.calibration.brier_score(probs, jnp.array([0, 1]))
      Array(0.3125, dtype=float32)

    References:
      Brier, 1950: Verification of forecasts expressed in terms of probability.
    """
    predictions = as_predictions(probs, labels, where, weights)
    squares = jnp.sum((predictions.probs - predictions.came_true()) ** 2, 1)
    return predictions.reduce(squares, reduction)


class BrierDecomposition(NamedTuple):
    """The parts of `reliability - resolution + uncertainty + within_bins`, the Brier score.

    Attributes:
      reliability: how far the predictions are from the observed frequencies; 0 is best.
      resolution: how much the observed frequencies differ between bins; more is better.
      uncertainty: how much the labels vary, independently of the predictions.
      within_bins: what the bins hide, since predictions vary within a bin. It vanishes as the bins
        become narrow.
    """

    reliability: Float[Array, ""]
    resolution: Float[Array, ""]
    uncertainty: Float[Array, ""]
    within_bins: Float[Array, ""]


@measure(num_bins=INTEGER, binning=STATIC)
def brier_decomposition(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    num_bins: int = 15,
    binning: Binning = "width",
) -> BrierDecomposition:
    r"""The parts of the Brier score.

    .. math:: \underbrace{\sum_b \tfrac{n_b}{n} (p_b - a_b)^2}_\text{reliability}
              - \underbrace{\sum_b \tfrac{n_b}{n} (a_b - a)^2}_\text{resolution}
              + \underbrace{a (1 - a)}_\text{uncertainty}
              + \underbrace{\tfrac1n \sum_i \big[ (p_i - p_b)^2
                - 2 (p_i - p_b)(y_i - a_b) \big]}_\text{within bins}

    summed over the classes, with the mean `p_b` of a class's probabilities in bin `b`, the shares
    `a_b` in the bin and `a` overall in which it comes true, and 1 or 0 in `y`.

    Args:
      probs: predicted probabilities. A single column, or (n,) with labels (n,), means one event per
        row: class 1 of two, or that a prediction is right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      num_bins: how many bins each class has.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin; equal predictions share a bin.

    Returns:
      A `BrierDecomposition`; `reliability - resolution + uncertainty + within_bins` is
      `brier_score`. NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or fewer than one bin. Outside
        of `jit`, also if a row that counts has numbers that are not probabilities (up to rounding),
        a label that is not a class, or a negative weight. While tracing, the result is then NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]])
      >>> parts = jsm.calibration.brier_decomposition(probs, jnp.array([0, 0, 1, 0]))
      >>> for name, part in parts._asdict().items():
      ...     print(f"{name}: {part:.3f}")
      reliability: 0.125
      resolution: 0.125
      uncertainty: 0.375
      within_bins: 0.000

    References:
      Murphy, 1973: A new vector partition of the probability score; Stephenson, Coelho & Jolliffe,
      2008: Two extra components in the Brier score decomposition.
    """
    predictions = as_predictions(probs, labels, where, weights)

    def of_class(events: Events) -> BrierDecomposition:
        binned = into_bins(events, num_bins, binning)
        overall = predictions.mean(events.outcome)
        away = binned.share - overall
        beside = events.value - binned.value[binned.bins]
        beyond = events.outcome - binned.share[binned.bins]
        return BrierDecomposition(
            reliability=jnp.sum(binned.weight * binned.gap**2),
            resolution=jnp.sum(binned.weight * away**2),
            uncertainty=overall * (1 - overall),
            within_bins=predictions.mean(beside * (beside - 2 * beyond)),
        )

    parts = predictions.of_each_class(of_class)
    return BrierDecomposition(*(jnp.sum(part) for part in parts))
