"""Losses: one value per row of scores, each the natural partner of a mapping.

A mapping that maximizes `<p, z> - Omega(p)` has the Fenchel-Young loss

    L(z, y) = Omega*(z) + Omega(y) - <y, z> = (<p, z> - Omega(p)) - (<y, z> - Omega(y)),

which is 0 exactly where the mapping gives the target, positive elsewhere, convex in the scores,
and has the gradient `p - y`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Num

from jaxsoftmax import _threshold, mappings
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import Rows, indicator
from jaxsoftmax._scores import Axis, check_real, output_dtype, prepare, public
from jaxsoftmax._threshold import Form


@public
def cross_entropy(
    scores: Float[ArrayLike, "*shape"],
    targets: Num[ArrayLike, "*rows"] | Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The negative log-likelihood of the targets under `softmax`.

    .. math:: L(x, y) = -\sum_i y_i \log p_i, \quad p = \mathrm{softmax}(x / t)

    For a class `y` this is :math:`-\log p_y`, exact also where the class is nearly certain. The
    gradient in `x/t` is `p - y` (`p * sum(y) - y` for targets that do not sum to 1).

    Args:
      scores: scores of any shape and real dtype.
      targets: integer classes, of the shape of `scores` without `axis`, or a distribution over
        the classes, of the shape of `scores`.
      axis: the axis of the classes; several, or None for all, need a distribution as target.
      where: the classes that take part; a boolean mask that broadcasts to `scores`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, in the dtype of `scores`. A class out of range gives NaN, one that `where`
      excludes inf.

    Raises:
      TypeError: if `scores` is not real, or `targets` neither integers nor real numbers.
      ValueError: if shapes do not fit, or `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> scores = jnp.array([[2.0, 0.0], [0.0, 70.0]])
      >>> print(jsm.cross_entropy(scores, jnp.array([0, 1])))
      [1.2692800e-01 3.9754496e-31]

    References:
      Good, 1952: Rational decisions; Blondel, Martins & Niculae, 2020 (arXiv:1901.02324).
    """
    rows, z = prepare(scores, axis, where, temperature, name="scores")
    target, known = _as_distribution(rows, z, targets)
    log_p = mappings.log_probabilities(rows, z)
    surprise = -jnp.where((log_p == -jnp.inf) & (target == 0), 0, log_p)
    return _one_per_row(rows, rows.sum(target * surprise), known, scores)


@public
def sparsemax_loss(
    scores: Float[ArrayLike, "*shape"],
    targets: Num[ArrayLike, "*rows"] | Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The Fenchel-Young loss of `sparsemax`: 0 as soon as the margin is 1.

    .. math:: L(x, y) = \frac12 \|y - x/t\|^2 - \frac12 \|p - x/t\|^2,
              \quad p = \mathrm{sparsemax}(x / t)

    The gradient in `x/t` is `p - y`.

    Args:
      scores: scores of any shape and real dtype.
      targets: integer classes, of the shape of `scores` without `axis`, or a distribution over
        the classes, of the shape of `scores`.
      axis: the axis of the classes; several, or None for all, need a distribution as target.
      where: the classes that take part; a boolean mask that broadcasts to `scores`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, never negative, in the dtype of `scores`. A class out of range gives NaN,
      one that `where` excludes inf.

    Raises:
      TypeError: if `scores` is not real, or `targets` neither integers nor real numbers.
      ValueError: if shapes do not fit, or `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.sparsemax_loss(jnp.array([[2.0, 0.0], [0.5, 0.0]]), jnp.array([0, 0]))
      Array([0.    , 0.0625], dtype=float32)

    References:
      Martins & Astudillo, 2016 (arXiv:1602.02068); Blondel, Martins & Niculae, 2020
      (arXiv:1901.02324).
    """
    return _loss(_GINI, scores, targets, axis, where, temperature)


@functools.partial(public, static_argnames=("alpha", "axis"))
def entmax_loss(
    scores: Float[ArrayLike, "*shape"],
    targets: Num[ArrayLike, "*rows"] | Float[ArrayLike, "*shape"],
    alpha: float = 1.5,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The Fenchel-Young loss of entmax, here for `entmax15`: 0 as soon as the margin is 2.

    .. math:: L(x, y) = \langle p - y, x/t \rangle
              + \frac{\sum_i y_i^\alpha - \sum_i p_i^\alpha}{\alpha (\alpha - 1)},
              \quad p = \mathrm{entmax}(x / t)

    The gradient in `x/t` is `p - y`.

    Args:
      scores: scores of any shape and real dtype.
      targets: integer classes, of the shape of `scores` without `axis`, or a distribution over
        the classes, of the shape of `scores`.
      alpha: 1.5.
      axis: the axis of the classes; several, or None for all, need a distribution as target.
      where: the classes that take part; a boolean mask that broadcasts to `scores`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, never negative, in the dtype of `scores`. A class out of range gives NaN,
      one that `where` excludes inf.

    Raises:
      TypeError: if `scores` is not real, or `targets` neither integers nor real numbers.
      ValueError: if shapes do not fit, `alpha` is not 1.5, or `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.entmax_loss(jnp.array([[3.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0])).round(4)
      Array([0.    , 0.1155], dtype=float32)

    References:
      Peters, Niculae & Martins, 2019 (arXiv:1905.05702); Blondel, Martins & Niculae, 2020
      (arXiv:1901.02324).
    """
    if alpha != 1.5:
        raise ValueError(f"alpha must be 1.5, got {alpha}.")
    return _loss(_TSALLIS15, scores, targets, axis, where, temperature)


@dataclasses.dataclass(frozen=True)
class _Regularizer:
    """A mapping and what it is regularized by: `Omega(p) = sum(omega(p_i))`, up to a constant."""

    form: Form
    omega: Callable[[Array], Array]


_GINI = _Regularizer(mappings.SPARSEMAX, lambda p: p * p / 2)
_TSALLIS15 = _Regularizer(mappings.ENTMAX15, lambda p: p * mappings.sqrt(p) / 0.75)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _fenchel_young(regularizer: _Regularizer, rows: Rows, scores: Array, target: Array) -> Array:
    p = _threshold.apply(regularizer.form, rows, scores)
    return _divergence(regularizer, rows, scores, p, target)


def _divergence(
    regularizer: _Regularizer, rows: Rows, scores: Array, p: Array, target: Array
) -> Array:
    # `p` and the target have the same sum, so any shift of the scores will do; the maximum at 0
    # keeps the digits.
    gaps, _ = _threshold.below_top(rows, scores)
    excess = p - target
    linear = excess * jnp.where(excess == 0, 0, gaps)
    total = rows.sum(linear + (regularizer.omega(target) - regularizer.omega(p)))
    return jnp.maximum(total, 0)


def _fenchel_young_fwd(regularizer: _Regularizer, rows: Rows, scores: Array, target: Array):
    p = _threshold.apply(regularizer.form, rows, scores)
    gaps, _ = _threshold.below_top(rows, scores)
    return _divergence(regularizer, rows, scores, p, target), (rows, p, target, gaps)


def _fenchel_young_bwd(regularizer: _Regularizer, residuals: tuple, ct: Array):
    rows, p, target, gaps = residuals
    ct = rows.spread(ct)
    _, pull_back_omega = jax.vjp(regularizer.omega, target)
    (ct_omega,) = pull_back_omega(jnp.broadcast_to(ct, target.shape))
    ct_target = ct_omega - ct * jnp.where(gaps == -jnp.inf, 0, gaps)
    return None, ct * (p - target), ct_target


_fenchel_young.defvjp(_fenchel_young_fwd, _fenchel_young_bwd)


def _loss(
    regularizer: _Regularizer,
    scores: ArrayLike,
    targets: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    temperature: ArrayLike,
) -> Array:
    rows, z = prepare(scores, axis, where, temperature, name="scores")
    target, known = _as_distribution(rows, z, targets)
    return _one_per_row(rows, _fenchel_young(regularizer, rows, z, target), known, scores)


def _as_distribution(rows: Rows, scores: Array, targets: ArrayLike) -> tuple[Array, Array | None]:
    """The targets as a distribution, and for classes whether each is one of those there are."""
    targets = jnp.asarray(targets)
    check_real("targets", targets)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        if targets.shape != scores.shape:
            raise ValueError(
                f"targets must have the shape of scores {scores.shape} if they are distributions, "
                f"got shape {targets.shape}."
            )
        return targets.astype(scores.dtype), None
    if len(rows.axes) != 1:
        raise ValueError(
            f"targets must be distributions over {len(rows.axes)} axes, got integers, which name "
            "a class along one axis."
        )
    (axis,) = rows.axes
    wanted = scores.shape[:axis] + scores.shape[axis + 1 :]
    if targets.shape != wanted:
        raise ValueError(
            f"targets must have the shape of scores without axis {axis}, {wanted}, if they are "
            f"classes, got shape {targets.shape}."
        )
    classes = lax.broadcasted_iota(targets.dtype, scores.shape, axis)
    target = indicator(classes == jnp.expand_dims(targets, axis), scores.dtype)
    return target, rows.sum(target) > 0


def _one_per_row(rows: Rows, loss: Array, known: Array | None, scores: ArrayLike) -> Array:
    if known is not None:
        loss = jnp.where(known, loss, jnp.nan)
    return rows.flatten(loss).astype(output_dtype(scores))
