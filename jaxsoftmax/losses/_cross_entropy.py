"""Cross-entropy: how surprising the targets are under softmax."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless, times
from jaxsoftmax._public import INTEGER_OR_NONE, NUMBER, known_number, public
from jaxsoftmax._reductions import Entries, Rows, indicator
from jaxsoftmax._scores import (
    Axis,
    Options,
    as_stored,
    check_per_row,
    check_real,
    divided_by_zero,
    in_given_order,
    is_cold,
    prepare,
)
from jaxsoftmax.losses._targets import (
    Classes,
    as_target,
    one_per_row,
    prepare_scores,
    without_ignored,
)
from jaxsoftmax.mappings import _log_softmax


@public(label_smoothing=NUMBER, z_loss=NUMBER, ignore_index=INTEGER_OR_NONE)
def cross_entropy(
    scores: Real[ArrayLike, "*shape"],
    targets: Integer[ArrayLike, "*rows"] | Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: Real[ArrayLike, "*classes"] | None = None,
    ignore_index: int | None = None,
) -> Float[Array, "*rows"]:
    r"""The negative log-likelihood of the targets under `softmax`.

    .. math:: L(x, y) = -\sum_i \tilde y_i \log p_i + c \left(\log \sum_i e^{x_i / t}\right)^2,
              \quad p = \mathrm{softmax}(x / t), \quad \tilde y_i = (1 - s) y_i + s / K

    Here `s` is the label smoothing, `K` is how many classes take part, and `c` is the coefficient
    of the z-loss. By default `s` and `c` are 0, so that the loss of a class `y` is
    :math:`-\log p_y`. Class weights multiply :math:`\tilde y_i`. The gradient in `x/t` is `p - y`,
    or `p * sum(y) - y` for targets that do not sum to 1. The loss and the gradient are accurate
    even if the class is nearly certain.

    Args:
      scores: scores of any shape and real dtype.
      targets: either integer classes, of the shape of `scores` without `axis`, or distributions
        over the classes, of the shape of `scores`. One-hot integers are distributions. Sizes of 1
        broadcast.
      axis: the axis of the classes. It may be several axes, or None for all: the classes are then
        counted along the axes in the order given, fastest along the last.
        They may include names of mesh axes: the classes are then counted across the devices, which
        come first, wherever the names stand.
      where: which classes take part; a boolean mask that broadcasts to `scores`. It has the shape
        (K,) for K classes along the last axis, or there is a mask for each row. To leave out whole
        rows, write `jnp.mean(loss, where=rows)` afterwards.
      temperature: divides the scores; a number or one value per row, not negative.
      label_smoothing: the share of the target that is spread evenly over the classes that take
        part. Classes with a score of -inf take no part. A number or one value per row, from 0 to 1.
      z_loss: the coefficient of the square of `logsumexp`. This term keeps the scores from
        drifting. A number or one value per row, not negative.
      class_weights: how much each class counts; not negative, of the shape (K,) for K classes, or
        of the sizes of `axis`. For a mean as in PyTorch, divide the sum of the losses by the sum of
        `class_weights[targets]`.
      ignore_index: a class whose rows have loss 0 and gradient 0, whatever their scores are, if
        their temperatures are not NaN or negative. It may be out of range.

    Returns:
      One value per row, in the dtype of `scores`, or float32 for half precision. A target that
      `where` excludes gives inf; as part of a distribution it adds nothing to the gradient. A
      target out of range gives NaN and gradient 0, and an error under `jax.experimental.checkify`.
      (In the gradient of a `scan`, checkify loses all errors.)

    Raises:
      TypeError: if `scores` is not real, or `targets` are not integers or real numbers.
      ValueError: if shapes do not fit, `temperature` or `z_loss` is a negative number,
        `label_smoothing` is a number outside of [0, 1], or `ignore_index` is used with
        distributions.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> scores = jnp.array([[2.0, 0.0], [0.0, 70.0]])
      >>> for loss in jsm.cross_entropy(scores, jnp.array([0, 1])):
      ...     print(f"{loss:.4g}")
      0.1269
      3.975e-31
      >>> for loss in jsm.cross_entropy(scores, jnp.array([0, 1]), label_smoothing=0.1):
      ...     print(f"{loss:.4g}")
      0.2269
      3.5

    References:
      Good, 1952: Rational decisions; Blondel, Martins & Niculae, 2020 (arXiv:1901.02324). Label
      smoothing: Szegedy et al., 2016 (arXiv:1512.00567). z-loss: Chowdhery et al., 2022
      (arXiv:2204.02311).
    """
    smoothing, drift = known_number(label_smoothing), known_number(z_loss)
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {smoothing}.")
    if drift is not None and not 0 <= drift < jnp.inf:
        raise ValueError(f"z_loss must be finite and not negative, got {drift}.")
    options = Options(where, temperature)
    rows, z = prepare_scores(scores, axis, options)
    rows = as_stored(rows, scores, options)
    ignored, targets = without_ignored(targets, ignore_index)
    target = as_target(rows, z, targets, axis)
    if ignore_index is not None and not isinstance(target, Classes):
        raise ValueError("ignore_index goes with classes, got distributions as targets.")
    if ignored is not None:
        ignored = jnp.broadcast_to(ignored, rows.flat_shape(z[0]))

    def kept(z: Entries) -> Entries:
        if ignored is None:
            return z
        # What is ignored may be NaN, which a product with 0 would keep.
        return rows.map(lambda z, i: jnp.where(i, 0, z), [z], [jnp.expand_dims(ignored, rows.axes)])

    z = kept(z)
    weights = None if class_weights is None else _as_weights(rows, z, class_weights, axis)
    loss = _weighted_surprise(rows, z, target, weights)

    def in_limit(options: Options) -> Entries:
        """The scores; at temperature 0, all that is left of `z` is which are the largest."""
        if is_cold(rows, z[0], temperature) is False:
            return z
        return kept(prepare(scores, axis, options, at_zero=divided_by_zero)[1])

    if smoothing != 0:
        share = check_per_row("label_smoothing", label_smoothing, z[0], rows)
        if smoothing is None:
            share = nan_unless((share >= 0) & (share <= 1), share)
        uniform = _uniform(rows, in_limit(Options(where)))
        uniform = _weighted_surprise(rows, z, uniform, weights)
        loss = times(1 - share, loss) + times(share, uniform)
    if drift != 0:
        strength = check_per_row("z_loss", z_loss, z[0], rows)
        if drift is None:
            strength = nan_unless((strength >= 0) & (strength < jnp.inf), strength)
        loss += times(strength, _squared_log_sum(rows, in_limit(options)))
    loss = one_per_row(rows, loss, target, scores)
    return loss if ignored is None else jnp.where(ignored, 0, loss)


def _as_weights(rows: Rows, scores: Entries, weights: ArrayLike, axis: Axis) -> Entries:
    """One weight per class, as entries."""
    weights, shape = jnp.asarray(weights), scores[0].shape
    check_real("class_weights", weights)
    order = in_given_order(axis, len(shape))
    wanted = tuple(shape[i] for i in order)
    if weights.shape not in (wanted, (math.prod(wanted),)):
        shapes = " or ".join(map(str, dict.fromkeys((wanted, (math.prod(wanted),)))))
        raise ValueError(
            f"class_weights must have one value per class, shape {shapes}, got shape "
            f"{weights.shape}."
        )
    weights = nan_unless(weights >= 0, weights.astype(scores[0].dtype))
    weights = jnp.transpose(weights.reshape(wanted), [order.index(i) for i in rows.axes])
    weights = weights.reshape([n if i in rows.axes else 1 for i, n in enumerate(shape)])
    return (jnp.broadcast_to(weights, shape),)


def _weighted_surprise(
    rows: Rows, scores: Entries, target: Classes | Entries, weights: Entries | None
) -> Array:
    """The surprise at the target, each class of which counts as much as its weight."""
    if weights is None:
        return _surprise(rows, scores, target)
    if isinstance(target, Classes):
        return times(target.pick(rows, weights[0]), _surprise(rows, scores, target))
    return _surprise(rows, scores, rows.map(jnp.multiply, [target, weights]))


def _surprise(rows: Rows, scores: Entries, target: Classes | Entries) -> Array:
    if isinstance(target, Classes):
        return _surprise_of_class(rows, scores, target)

    log_p = _log_softmax.log_probabilities(rows, scores)
    return rows.sum(rows.map(lambda y, log_p: times(y, -log_p), [target, log_p]))


def _uniform(rows: Rows, scores: Entries) -> Entries:
    """The same share for every class that takes part."""
    present = rows.map(lambda z: indicator(z != -jnp.inf, z.dtype), [scores])
    count = rows.sum(present)
    return rows.map(jnp.divide, [present], [jnp.where(count == 0, 1, count)])


def _squared_log_sum(rows: Rows, scores: Entries) -> Array:
    log_sum = _log_softmax.log_sum(rows, scores)
    # A row in which nothing takes part cannot drift.
    return jnp.square(jnp.where(log_sum == -jnp.inf, 0, log_sum))


@custom_vjp
def _surprise_of_class(rows: Rows, scores: Entries, classes: Classes) -> Array:
    """`-log p` of the classes."""
    return _surprise_and_excess(rows, scores, classes)[0]


def _surprise_of_class_fwd(rows: Rows, scores: Entries, classes: Classes) -> tuple[Array, Any]:
    surprise, excess = _surprise_and_excess(rows, scores, classes)
    return surprise, (rows, excess)


def _surprise_of_class_bwd(residuals: Any, ct: Array) -> tuple[None, Entries, None]:
    rows, excess = residuals
    return None, rows.map(jnp.multiply, [excess], [rows.summed_cotangent(ct)]), None


_surprise_of_class.defvjp(_surprise_of_class_fwd, _surprise_of_class_bwd)


@custom_vjp
def _surprise_and_excess(rows: Rows, scores: Entries, classes: Classes) -> tuple[Array, Entries]:
    """`-log p` of the classes, and `p - y`, without a digit lost where `p` is nearly `y`.

    It is the log-sum-exp of the gaps to the largest score, less the gap of the class. Where the
    class is the largest, that gap is 0 and the sum has kept its digits; elsewhere nothing cancels.
    """
    own = classes.pick(rows, rows.rounded(scores)[0])
    hits = (classes.hits(rows, scores[0]),)
    total = _log_softmax.total_at_once(rows, scores)
    own_gap = _tops.gap(own, total.top)
    absent = (own_gap == -jnp.inf) & ~jnp.isnan(total.log)
    surprise = jnp.where(absent, jnp.inf, total.log - own_gap)

    def excess(score: Array, hit: Array, top: Array, log: Array, own: Array) -> Array:
        return jnp.where(hit, own, jnp.exp(_tops.gap(score, top) - log))

    # What takes no part has no gradient, not even as the target.
    own_excess = jnp.where(own == -jnp.inf, 0, jnp.expm1(-surprise))
    values = lax.optimization_barrier((total.top, total.log, own_excess))
    return surprise, rows.map(excess, [rows.rounded(scores), hits], values)


def _surprise_and_excess_fwd(
    rows: Rows, scores: Entries, classes: Classes
) -> tuple[tuple[Array, Entries], Any]:
    surprise, excess = _surprise_and_excess(rows, scores, classes)
    return (surprise, excess), (rows, classes, surprise, excess)


def _surprise_and_excess_bwd(
    residuals: Any, ct: tuple[Array, Entries]
) -> tuple[None, Entries, None]:
    rows, classes, surprise, excess = residuals
    ct_surprise, ct_excess = rows.summed_cotangent(ct[0]), ct[1]
    hits = (classes.hits(rows, excess[0]),)
    p = rows.map(
        lambda excess, hit, own: jnp.where(hit, own, excess), [excess, hits], [jnp.exp(-surprise)]
    )
    of_p = _threshold.softmax_jacobian((rows, p), ct_excess)
    ct_scores = rows.map(lambda c, excess, ct: c + ct * excess, [of_p, excess], [ct_surprise])
    return None, ct_scores, None


_surprise_and_excess.defvjp(_surprise_and_excess_fwd, _surprise_and_excess_bwd)
