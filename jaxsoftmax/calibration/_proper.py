"""Proper scores: what is best on average is to say what one believes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Real

from jaxsoftmax._scores import public
from jaxsoftmax.calibration._bins import Binning, into_bins
from jaxsoftmax.calibration._predictions import as_predictions, came_true, of_each_class


@public
def negative_log_likelihood(
    probs: Real[ArrayLike, "n classes"], labels: Integer[ArrayLike, " n"]
) -> Float[Array, ""]:
    r"""The mean surprise at what came true, in nats.

    .. math:: -\frac1n \sum_i \log p_{i y_i}

    Args:
      probs: predicted probabilities. (For scores, `cross_entropy` is more exact.)
      labels: integer classes.

    Returns:
      A scalar, not negative; infinite if a class came true that had probability 0. NaN if a row
      holds NaN or a number outside of [0, 1] (but for rounding), or has a class out of range, or
      there are no rows.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.5, 0.5], [0.25, 0.75]])
      >>> print(f"{jsm.calibration.negative_log_likelihood(probs, jnp.array([0, 0])):.4f}")
      1.0397

    References:
      Good, 1952: Rational decisions.
    """
    probs, labels = as_predictions(probs, labels)
    true = jnp.take_along_axis(probs, labels[:, None], 1, mode="clip")[:, 0]
    # Rounding may have gone below 0.
    return jnp.mean(-jnp.log(jnp.where(true < 0, 0, true)))


@public
def brier_score(
    probs: Real[ArrayLike, "n classes"], labels: Integer[ArrayLike, " n"]
) -> Float[Array, ""]:
    r"""The mean squared distance of the probabilities from what came true.

    .. math:: \frac1n \sum_i \sum_k (p_{ik} - [y_i = k])^2

    Args:
      probs: predicted probabilities.
      labels: integer classes.

    Returns:
      A scalar between 0 and 2 (twice what is usual for two classes, both of which are counted
      here). NaN if a row holds NaN or a number outside of [0, 1] (but for rounding), or has a
      class out of range, or there are no rows.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.5, 0.5], [0.25, 0.75]])
      >>> jsm.calibration.brier_score(probs, jnp.array([0, 1]))
      Array(0.3125, dtype=float32)

    References:
      Brier, 1950: Verification of forecasts expressed in terms of probability.
    """
    probs, labels = as_predictions(probs, labels)
    return jnp.mean(jnp.sum((probs - came_true(labels, probs.shape[1], probs.dtype)) ** 2, 1))


class BrierDecomposition(NamedTuple):
    """The parts of `reliability - resolution + uncertainty + within_bins`, the Brier score.

    Attributes:
      reliability: how far predictions are from what comes true; 0 is best.
      resolution: how far what comes true differs from bin to bin; the more, the better.
      uncertainty: how far what comes true varies at all, whatever is predicted.
      within_bins: what the bins hide, since predictions vary within them; it vanishes as the bins
        get narrow.
    """

    reliability: Float[Array, ""]
    resolution: Float[Array, ""]
    uncertainty: Float[Array, ""]
    within_bins: Float[Array, ""]


@public
def brier_decomposition(
    probs: Real[ArrayLike, "n classes"],
    labels: Integer[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Binning = "width",
) -> BrierDecomposition:
    r"""What the Brier score is made of.

    .. math:: \underbrace{\sum_b \tfrac{n_b}{n} (p_b - a_b)^2}_\text{reliability}
              - \underbrace{\sum_b \tfrac{n_b}{n} (a_b - a)^2}_\text{resolution}
              + \underbrace{a (1 - a)}_\text{uncertainty}
              + \underbrace{\tfrac1n \sum_i \big[ (p_i - p_b)^2
                - 2 (p_i - p_b)(y_i - a_b) \big]}_\text{within bins}

    summed over the classes, with the mean `p_b` of a class's probabilities in bin `b`, the shares
    `a_b` in the bin and `a` overall in which it comes true, and 1 or 0 in `y`.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins each class has.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin, of which equal ones share one.

    Returns:
      A `BrierDecomposition`; `reliability - resolution + uncertainty + within_bins` is
      `brier_score`. NaN if a row holds NaN or a number outside of [0, 1] (but for rounding),
      or has a class out of range, or there are no rows.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit, or for an unknown `binning` or fewer than one bin.

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

    def of_class(p: Array, y: Array) -> BrierDecomposition:
        binned = into_bins(p, y, num_bins, binning)
        overall = jnp.where(jnp.any(jnp.isnan(p)), jnp.nan, jnp.mean(y))
        away = binned.share - overall
        beside = p - binned.value[binned.bins]
        return BrierDecomposition(
            reliability=jnp.sum(binned.weight * binned.gap**2),
            resolution=jnp.sum(binned.weight * away**2),
            uncertainty=overall * (1 - overall),
            within_bins=jnp.mean(beside * (beside - 2 * (y - binned.share[binned.bins]))),
        )

    parts = of_each_class(of_class, probs, labels)
    return BrierDecomposition(*(jnp.sum(part) for part in parts))
