"""Predictions in bins, and what becomes of them there: the reliability curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, PRNGKeyArray, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import INTEGER, STATIC
from jaxsoftmax._reductions import is_known
from jaxsoftmax._scores import check_key
from jaxsoftmax.calibration._predictions import Events, as_predictions, measure

Binning = Literal["width", "mass"]


class ReliabilityCurve(NamedTuple):
    """What a reliability diagram shows, one entry per bin; NaN where a bin is empty.

    Attributes:
      confidence: the mean confidence of the predictions in the bin.
      accuracy: the share of these predictions that is right.
      count: how many predictions there are, or the sum of their weights if there are weights.
      lower: the lower end of the 95 % interval of the accuracy.
      upper: the upper end of that interval.
    """

    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]
    count: Float[Array, " bins"]  # pyright: ignore[reportIncompatibleMethodOverride]
    lower: Float[Array, " bins"]
    upper: Float[Array, " bins"]


@measure(num_bins=INTEGER, binning=STATIC, num_resamples=INTEGER)
def reliability_curve(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    num_bins: int = 15,
    binning: Binning = "width",
    key: PRNGKeyArray | None = None,
    num_resamples: int = 1000,
) -> ReliabilityCurve:
    """How often predictions are right, by how confident they were.

    The confidence of a prediction is its largest probability. The accuracy has a 95 % interval.
    With a key, it comes from the bootstrap: as many predictions are drawn with replacement, with
    the same bins, and 2.5 % of the accuracies are cut off at either end. Without a key, it is
    Wilson's interval. That one does not shrink to a point if all predictions of a bin are right or
    all are wrong, so it is better for small bins.

    Args:
      probs: predicted probabilities. A single column, or (n,) with labels (n,), means one event per
        row: class 1 of two, or that a prediction is right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin; equal predictions share a bin.
      key: a key of `jax.random.key`, to bootstrap.
      num_resamples: how often the bootstrap draws.

    Returns:
      A `ReliabilityCurve` of arrays to plot. All but the count are NaN if a row contains NaN or a
      number outside of [0, 1] (up to rounding), or has a class out of range.

    Raises:
      TypeError: if `probs` is not real, `labels` are not integers or `key` is not a key.
      ValueError: if shapes do not fit, for an unknown `binning`, or fewer than one bin or resample.
        Outside of `jit`, also if a row that counts has numbers that are not probabilities (up to
        rounding), a label that is not a class, or a negative weight. While tracing, the result is
        then NaN.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=2, suppress=True)
      >>> probs = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
      >>> labels = jnp.array([0, 1, 1, 0])
      >>> curve = jsm.calibration.reliability_curve(probs, labels, num_bins=2)
      >>> print(curve.confidence, curve.accuracy, curve.count)
      [ nan 0.75] [ nan 0.75] [0. 4.]
      >>> print(curve.lower, curve.upper)
      [nan 0.3] [ nan 0.95]
      >>> again = jsm.calibration.reliability_curve(
      ...     probs, labels, num_bins=2, key=jax.random.key(0)
      ... )
      >>> print(again.lower, again.upper)
      [ nan 0.25] [nan  1.]

    References:
      Niculescu-Mizil & Caruana, 2005: Predicting good probabilities with supervised learning;
      Wilson, 1927: Probable inference, the law of succession, and statistical inference; Efron,
      1979: Bootstrap methods.
    """
    if key is not None and weights is not None:
        raise ValueError("key must be None if there are weights, since the bootstrap draws counts.")
    predictions = as_predictions(probs, labels, where, weights)
    binned = into_bins(predictions.confidences(), num_bins, binning)
    if key is None:
        lower, upper = _wilson_interval(binned)
    else:
        lower, upper = _bootstrap_interval(check_key(key), binned, num_resamples)
    value, share = (nan_unless(binned.count > 0, x) for x in (binned.value, binned.share))
    return ReliabilityCurve(value, share, binned.count * predictions.unit, lower, upper)


class Binned(NamedTuple):
    """Predictions of one event each, gathered in bins.

    Attributes:
      count: how many there are, or what they weigh.
      value: the mean of what was predicted, 0 where a bin is empty.
      share: the share of what came true, 0 where a bin is empty.
      bins: which bin each prediction is in.
      weights: the weight of each prediction.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    value: Array
    share: Array
    bins: Array
    weights: Array

    @property
    def weight(self) -> Array:
        """The share of all predictions that is in each bin."""
        return self.count / jnp.sum(self.count)

    @property
    def gap(self) -> Array:
        """How far what was predicted is from what came true; 0 where a bin is empty."""
        return jnp.abs(self.share - self.value)

    @property
    def size(self) -> Array:
        """How many predictions of equal weight tell as much of the share as those in each bin."""
        squares = sum_in_bins(self.weights**2, self.bins, self.count.size)
        return self.count**2 / jnp.where(squares > 0, squares, 1)


def into_bins(events: Events, num_bins: int, binning: str) -> Binned:
    """Gathers predictions of events with outcomes 0 and 1."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    if binning not in _BINNINGS:
        raise ValueError(f'binning must be "width" or "mass", got {binning!r}.')
    value, outcome, weights = events.value, events.outcome, events.weights
    bins = _BINNINGS[binning](value, weights, num_bins)
    count, values, hits = jax.vmap(lambda x: sum_in_bins(x, bins, num_bins))(
        jnp.stack([weights, weights * value, weights * outcome])
    )
    held = jnp.where(count == 0, 1, count)
    return Binned(count, values / held, hits / held, bins, weights)


def _by_width(value: Array, weights: Array, num_bins: int) -> Array:
    del weights
    bins = jnp.ceil(value * num_bins)
    # The product may be rounded across an edge. XLA would divide by a constant inexactly.
    count = lax.optimization_barrier(jnp.full((), num_bins, value.dtype))
    bins = jnp.where(value <= (bins - 1) / count, bins - 1, bins)
    bins = jnp.where(value > bins / count, bins + 1, bins)
    # NaN is in the last bin, lest the conversion put it anywhere.
    bins = jnp.where(jnp.isnan(value), num_bins, bins).astype(jnp.int32) - 1
    return jnp.clip(bins, 0, num_bins - 1)


def _by_mass(value: Array, weights: Array, num_bins: int) -> Array:
    """Bins that are equally full, as far as ties allow: equal values go where the first goes."""
    if value.size == 0:
        return jnp.zeros(0, jnp.int32)
    # By weight too, lest sums depend on how those that tie are ordered.
    ascending, weights = lax.sort(lax.stop_gradient((value, weights)), num_keys=2)
    so_far = jnp.cumsum(weights)
    before = jnp.concatenate([jnp.zeros_like(so_far[:1]), so_far[:-1]])
    edges = jnp.arange(1, num_bins, dtype=value.dtype) * so_far[-1] / num_bins
    # What reaches an edge but for rounding reaches it.
    edges = edges * (1 - 32 * jnp.finfo(value.dtype).eps)
    # A value is in bin b or above if what is smaller weighs enough: if the last of it is.
    last = jnp.maximum(jnp.searchsorted(before, edges) - 1, 0)
    return jnp.searchsorted(ascending[last], value).astype(jnp.int32)


_BINNINGS: dict[str, Callable[[Array, Array, int], Array]] = {"width": _by_width, "mass": _by_mass}


def sum_in_bins(x: Array, bins: Array, num_bins: int) -> Array:
    """The sum of `x` in each bin, in pairs of partial sums, for many small numbers lose digits."""
    groups = -(-x.size // _GROUP)
    ids = jnp.arange(x.size, dtype=jnp.int32) // _GROUP * num_bins + bins
    sums = jax.ops.segment_sum(x, ids, groups * num_bins).reshape(groups, num_bins)
    while is_known(groups) and len(sums) > 1:
        half = len(sums) // 2
        sums = jnp.concatenate([sums[:half] + sums[half : 2 * half], sums[2 * half :]])
    return jnp.sum(sums, 0)


_GROUP = 64


def _wilson_interval(binned: Binned) -> tuple[Array, Array]:
    share, count = binned.share, nan_unless(binned.count > 0, binned.size)
    quantile = 1.959964  # of the standard normal at 97.5 %
    shrink = 1 + quantile**2 / count
    centre = (share + quantile**2 / (2 * count)) / shrink
    radius = quantile / shrink * jnp.sqrt(share * (1 - share) / count + (quantile / count / 2) ** 2)
    return jnp.maximum(centre - radius, 0), jnp.minimum(centre + radius, 1)


def _bootstrap_interval(key: Array, binned: Binned, num_resamples: int) -> tuple[Array, Array]:
    """Resampled predictions differ in how many of them are in which bin, right or wrong.

    These numbers have a multinomial distribution, and are all that the accuracies depend on.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    right = binned.share * binned.weight
    cells = jnp.concatenate([right, binned.weight - right])
    # Not by `shape`: until jax 0.12 that is the shape of all, since then that of the batch.
    cells = jnp.broadcast_to(cells, (num_resamples, cells.size))
    total = jnp.full(num_resamples, jnp.sum(binned.count))
    drawn = jax.random.multinomial(key, total, cells, dtype=cells.dtype)
    rights, wrongs = jnp.split(drawn, 2, axis=1)
    counts = rights + wrongs
    accuracy = nan_unless(counts > 0, rights / jnp.maximum(counts, 1))
    ends = jnp.nanquantile(accuracy, jnp.asarray([0.025, 0.975], cells.dtype), axis=0)
    return ends[0], ends[1]
