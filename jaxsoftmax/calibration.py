"""Whether what is predicted with probability 0.8 comes true 8 times in 10, and how to mend it."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

from jaxsoftmax._scores import as_scores, check_mask, check_real
from jaxsoftmax.losses import cross_entropy

# How far the fitted temperature may be from the spread of the logits, either way.
_MAX_RATIO = 1000.0
_MAX_STEPS = 100


@functools.partial(jax.jit, static_argnames="loss")
def fit_temperature(
    logits: Float[ArrayLike, "*rows classes"],
    labels: Num[ArrayLike, "*rows"] | Float[ArrayLike, "*rows classes"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    loss: Callable[[Array, Array], Array] = cross_entropy,
) -> Float[Array, ""]:
    r"""The temperature that makes held-out labels most likely.

    .. math:: \arg\min_t \sum_n L(z_n / t, y_n)

    Found by L-BFGS with a line search, on the logarithm of the temperature. It is sought between
    1/1000 and 1000 times the spread of the logits (the root mean square of their distance from
    their row's mean), and stays finite where there is no optimum inside: it goes down, as far as
    the loss still falls, if every example is classified rightly, and up if the logits mislead.
    Where there is nothing to fit, as with constant logits or no rows, it is 1.

    Args:
      logits: scores of held-out examples, as they go into the mapping.
      labels: their integer classes, or distributions over the classes.
      where: the rows that count, for instance to leave out padding; default all.
      loss: one value per row from `(logits, labels)`; the partner of the mapping in use.

    Returns:
      The temperature `t`, a scalar, for `softmax(logits / t)`.

    Raises:
      TypeError: if `logits` is not real, `where` not boolean, or `labels` not numbers.
      ValueError: if shapes do not fit.

    Example:
      Of these predictions, made with probability 0.98, a quarter is wrong:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> logits = jnp.tile(jnp.array([4.0, 0.0]), (4, 1))
      >>> t = jsm.calibration.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
      >>> print(jsm.softmax(logits[0], temperature=t))
      [0.75 0.25]

    References:
      Guo, Pleiss, Sun & Weinberger, 2017: On calibration of modern neural networks
      (arXiv:1706.04599).
    """
    scores = as_scores(logits, "logits")
    if scores.ndim == 0:
        raise ValueError("logits must have an axis of classes, got a scalar.")
    counted = jnp.ones(scores.shape[:-1], bool)
    if where is not None:
        counted = counted & check_mask(where, scores.shape[:-1])
    scores = jnp.where(counted[..., None], scores, 0)
    finite = jnp.isfinite(scores)
    centre = scores.mean(-1, keepdims=True, where=finite)
    num_entries = jnp.maximum(jnp.sum(finite & counted[..., None]), 1)
    spread = jnp.sqrt(jnp.sum(jnp.where(finite, scores - centre, 0) ** 2) / num_entries)
    scale = jnp.where(spread > 0, spread, 1)
    num_rows = jnp.maximum(jnp.sum(counted), 1).astype(scores.dtype)

    def objective(log_ratio: Array) -> Array:
        ratio = jnp.exp(jnp.clip(log_ratio, -jnp.log(_MAX_RATIO), jnp.log(_MAX_RATIO)))
        # Infinite scores stay what they are, and out of the derivative.
        tempered = jnp.where(finite, jnp.where(finite, scores, 0) / (scale * ratio), scores)
        losses = loss(tempered, jnp.asarray(labels))
        return jnp.sum(jnp.where(counted, losses, 0)) / num_rows

    log_ratio = _minimize(objective, jnp.zeros((), scores.dtype))
    ratio = jnp.clip(jnp.exp(log_ratio), 1 / _MAX_RATIO, _MAX_RATIO)
    return jnp.where(spread > 0, scale * ratio, 1)


def _minimize(objective: Callable[[Array], Array], start: Array) -> Array:
    """A local minimum, by L-BFGS with optax's line search."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)
    tolerance = float(jnp.finfo(start.dtype).eps) ** 0.75

    def step(carry: tuple) -> tuple:
        params, state, _, count = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad), count + 1

    def go_on(carry: tuple) -> Array:
        _, _, slope, count = carry
        return (slope > tolerance) & (count < _MAX_STEPS)

    init = start, solver.init(start), jnp.full_like(start, jnp.inf), jnp.zeros((), jnp.int32)
    return lax.while_loop(go_on, step, init)[0]


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


@functools.partial(jax.jit, static_argnames=("num_bins", "binning"))
def reliability_curve(
    probs: Float[ArrayLike, "n classes"],
    labels: Int[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> ReliabilityCurve:
    """How often predictions come true, by how confident they were.

    The confidence of a prediction is its largest probability. The interval of the accuracy is
    Wilson's, at 95 %.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin.

    Returns:
      A `ReliabilityCurve` of arrays to plot.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit, or for another `binning` or fewer than one bin.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
      >>> labels = jnp.array([0, 1, 1, 0])
      >>> curve = jsm.calibration.reliability_curve(probs, labels, num_bins=2)
      >>> print(curve.confidence, curve.accuracy, curve.count)
      [ nan 0.75] [ nan 0.75] [0. 4.]

    References:
      Niculescu-Mizil & Caruana, 2005: Predicting good probabilities with supervised learning;
      Wilson, 1927: Probable inference, the law of succession, and statistical inference.
    """
    confidence, correct = _predictions(probs, labels)
    bins = _bin_of(confidence, num_bins, binning)
    return _curve(confidence, correct, bins, num_bins)


@functools.partial(jax.jit, static_argnames=("num_bins", "binning", "norm"))
def expected_calibration_error(
    probs: Float[ArrayLike, "n classes"],
    labels: Int[ArrayLike, " n"],
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
    norm: float = 1,
) -> Float[Array, ""]:
    r"""The distance between confidence and accuracy, over bins weighted by their count.

    .. math:: \Big( \sum_b \frac{n_b}{n} |a_b - c_b|^r \Big)^{1/r}

    with the accuracy `a` and mean confidence `c` of each bin; for `r = inf` the largest distance.

    Args:
      probs: predicted probabilities.
      labels: integer classes.
      num_bins: how many bins.
      binning: "width" cuts [0, 1] into equal parts, closed on the right; "mass" puts equally many
        predictions into each bin.
      norm: the exponent `r`: 1, 2 or inf.

    Returns:
      A scalar between 0 and 1.

    Raises:
      TypeError: if `probs` is not real or `labels` holds no integers.
      ValueError: if shapes do not fit, or for another `binning` or `norm` or fewer than one bin.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
      >>> labels = jnp.array([0, 1, 1, 1])
      >>> jsm.calibration.expected_calibration_error(probs, labels, num_bins=1)
      Array(0.25, dtype=float32)

    References:
      Naeini, Cooper & Hauskrecht, 2015: Obtaining well calibrated probabilities using Bayesian
      binning; Guo et al., 2017 (arXiv:1706.04599).
    """
    if norm not in (1, 2, jnp.inf):
        raise ValueError(f"norm must be 1, 2 or inf, got {norm}.")
    curve = reliability_curve(probs, labels, num_bins=num_bins, binning=binning)
    gap = jnp.where(curve.count > 0, jnp.abs(curve.accuracy - curve.confidence), 0)
    if norm == jnp.inf:
        return jnp.max(gap)
    return jnp.sum(curve.count / jnp.sum(curve.count) * gap**norm) ** (1 / norm)


def _predictions(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """The confidence of each prediction, and 1 where it is right."""
    probs, labels = as_scores(probs, "probs"), jnp.asarray(labels)
    if probs.ndim != 2 or probs.shape[1] == 0:
        raise ValueError(f"probs must have shape (n, classes), got shape {probs.shape}.")
    check_real("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer classes, got dtype {labels.dtype}.")
    if labels.shape != probs.shape[:1]:
        raise ValueError(
            f"labels must have shape {probs.shape[:1]}, one per row of probs, got shape "
            f"{labels.shape}."
        )
    return probs.max(1), (probs.argmax(1) == labels).astype(probs.dtype)


def _bin_of(confidence: Array, num_bins: int, binning: str) -> Array:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    if binning == "width":
        bins = jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1
        return jnp.clip(bins, 0, num_bins - 1)
    if binning == "mass":
        rank = jnp.argsort(jnp.argsort(confidence))
        return rank * num_bins // max(confidence.size, 1)
    raise ValueError(f'binning must be "width" or "mass", got {binning!r}.')


def _curve(confidence: Array, correct: Array, bins: Array, num_bins: int) -> ReliabilityCurve:
    per_prediction = jnp.stack([jnp.ones_like(confidence), confidence, correct])
    count, confidences, hits = jax.vmap(
        lambda x: jax.ops.segment_sum(x, bins, num_segments=num_bins)
    )(per_prediction)
    occupied = jnp.where(count > 0, count, jnp.nan)
    accuracy = hits / occupied
    lower, upper = _wilson_interval(accuracy, occupied)
    return ReliabilityCurve(confidences / occupied, accuracy, count, lower, upper)


def _wilson_interval(share: Array, count: Array) -> tuple[Array, Array]:
    quantile = 1.959964  # of the standard normal at 97.5 %
    shrink = 1 + quantile**2 / count
    centre = (share + quantile**2 / (2 * count)) / shrink
    radius = quantile / shrink * jnp.sqrt(share * (1 - share) / count + (quantile / count / 2) ** 2)
    return jnp.maximum(centre - radius, 0), jnp.minimum(centre + radius, 1)
