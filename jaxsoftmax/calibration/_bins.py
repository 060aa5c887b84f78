"""Predictions in bins, and what becomes of them there: the reliability curve."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Integer, PRNGKeyArray, Real

from jaxsoftmax._scores import check_key, public
from jaxsoftmax.calibration._predictions import confidences

Binning = Literal["width", "mass"]


class ReliabilityCurve(NamedTuple):
    """What a reliability diagram shows, one entry per bin; NaN where a bin is empty.

    Attributes:
      confidence: the mean confidence of the predictions in the bin.
      accuracy: the share of them that is right.
      count: how many there are.
      lower: the lower end of the 95 % interval of the accuracy.
      upper: its upper end.
    """

    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]
    count: Float[Array, " bins"]  # pyright: ignore[reportIncompatibleMethodOverride]
    lower: Float[Array, " bins"]
    upper: Float[Array, " bins"]


@public
def reliability_curve(
    probs: Real[ArrayLike, "n classes"],
    labels: Integer[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    key: PRNGKeyArray | None = None,
    num_resamples: int = 1000,
) -> ReliabilityCurve:
    """How often predictions come true, by how confident they were.

    The confidence of a prediction is its largest probability. The interval of the accuracy, at
    95 %, is that of the bootstrap if there is a key: the range of the accuracies, less 2.5 % at
    either end, that one gets from drawing as many predictions with replacement, the bins being
    kept. Without a key it is Wilson's, which does not shrink to a point where all of a bin is right
    or all is wrong, and so serves small bins better.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin, of which equal ones share one.
      key: a key of `jax.random.key`, to bootstrap.
      num_resamples: how often the bootstrap draws.

    Returns:
      A `ReliabilityCurve` of arrays to plot, all NaN but for the count if a row holds NaN or a
      number outside of [0, 1] (but for rounding), or has a class out of range.

    Raises:
      TypeError: if `probs` is not real, `labels` holds no integers or `key` is no key.
      ValueError: if shapes do not fit, for an unknown `binning`, or fewer than one bin or resample.

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
    confidence, correct = confidences(probs, labels)
    binned = into_bins(confidence, correct, num_bins, binning)
    if key is None:
        lower, upper = _wilson_interval(binned)
    else:
        lower, upper = _bootstrap_interval(check_key(key), binned, num_resamples)
    value, share = (jnp.where(binned.count > 0, x, jnp.nan) for x in (binned.value, binned.share))
    return ReliabilityCurve(value, share, binned.count, lower, upper)


class Binned(NamedTuple):
    """Predictions of one event each, gathered in bins.

    Attributes:
      count: how many there are.
      value: the mean of what was predicted, 0 where a bin is empty.
      share: the share of what came true, 0 where a bin is empty.
      bins: which bin each prediction is in.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    value: Array
    share: Array
    bins: Array

    @property
    def weight(self) -> Array:
        """The share of all predictions that is in each bin."""
        return self.count / self.bins.size

    @property
    def gap(self) -> Array:
        """How far what was predicted is from what came true; 0 where a bin is empty."""
        return jnp.abs(self.share - self.value)


def into_bins(value: Array, outcome: Array, num_bins: int, binning: str) -> Binned:
    """Gathers predictions `value` of events with outcomes 0 and 1."""
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    if binning not in _BINNINGS:
        raise ValueError(f'binning must be "width" or "mass", got {binning!r}.')
    bins = _BINNINGS[binning](value, num_bins)
    count, values, hits = jax.vmap(lambda x: sum_in_bins(x, bins, num_bins))(
        jnp.stack([jnp.ones_like(value), value, outcome])
    )
    held = jnp.maximum(count, 1)
    return Binned(count, values / held, hits / held, bins)


def _by_width(value: Array, num_bins: int) -> Array:
    bins = jnp.ceil(value * num_bins)
    # NaN is in the last bin, lest the conversion put it anywhere.
    bins = jnp.where(jnp.isnan(value), num_bins, bins).astype(jnp.int32) - 1
    return jnp.clip(bins, 0, num_bins - 1)


def _by_mass(value: Array, num_bins: int) -> Array:
    """Bins that are equally full, as far as ties allow: equal values go where the first goes."""
    ascending = jnp.sort(lax.stop_gradient(value))
    # Without the product of two large numbers.
    whole, rest = divmod(value.size, num_bins)
    before = [b * whole + -(-b * rest // num_bins) for b in range(1, num_bins)]
    # A value is in bin b or above if so many are smaller: if the last of these is.
    last = [ascending[max(n - 1, 0)] for n in before if value.size]
    return jnp.searchsorted(jnp.asarray(last, value.dtype), value).astype(jnp.int32)


_BINNINGS: dict[str, Callable[[Array, int], Array]] = {"width": _by_width, "mass": _by_mass}


def sum_in_bins(x: Array, bins: Array, num_bins: int) -> Array:
    """The sum of `x` in each bin, in pairs of partial sums, for many small numbers lose digits."""
    groups = -(-x.size // _GROUP)
    ids = jnp.arange(x.size, dtype=jnp.int32) // _GROUP * num_bins + bins
    sums = jax.ops.segment_sum(x, ids, groups * num_bins).reshape(groups, num_bins)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = jnp.concatenate([sums[:half] + sums[half : 2 * half], sums[2 * half :]])
    return jnp.sum(sums, 0)


_GROUP = 64


def _wilson_interval(binned: Binned) -> tuple[Array, Array]:
    share, count = binned.share, jnp.where(binned.count > 0, binned.count, jnp.nan)
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
    total = jnp.full(num_resamples, binned.bins.size, cells.dtype)
    drawn = jax.random.multinomial(key, total, cells, dtype=cells.dtype)
    rights, wrongs = jnp.split(drawn, 2, axis=1)
    counts = rights + wrongs
    accuracy = jnp.where(counts > 0, rights / counts, jnp.nan)
    ends = jnp.nanquantile(accuracy, jnp.asarray([0.025, 0.975], cells.dtype), axis=0)
    return ends[0], ends[1]
