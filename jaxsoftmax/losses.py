"""Losses: one value per row of scores, each the natural partner of a mapping.

A mapping that maximizes `<p, z> - Omega(p)` has the Fenchel-Young loss

    L(z, y) = Omega*(z) + Omega(y) - <y, z> = (<p, z> - Omega(p)) - (<y, z> - Omega(y)),

which is 0 exactly where the mapping gives the target, positive elsewhere, convex in the scores,
and has the gradient `p - y`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Num

from jaxsoftmax import _threshold
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import Entries, Rows, indicator, vary_like
from jaxsoftmax._scores import (
    Axis,
    Fixed,
    Options,
    check_real,
    known_number,
    output_dtype,
    prepare,
    public,
)
from jaxsoftmax._threshold import Form
from jaxsoftmax.mappings import _entmax, _softmax


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
      >>> for loss in jsm.cross_entropy(scores, jnp.array([0, 1])):
      ...     print(f"{loss:.4g}")
      0.1269
      3.975e-31

    References:
      Good, 1952: Rational decisions; Blondel, Martins & Niculae, 2020 (arXiv:1901.02324).
    """
    rows, z = prepare(scores, axis, Options(where, temperature), name="scores")
    target, known = _as_distribution(rows, z, targets)

    def surprise(target: Array, log_p: Array) -> Array:
        return target * -jnp.where((log_p == -jnp.inf) & (target == 0), 0, log_p)

    log_p = _softmax.log_probabilities(rows, z)
    return _one_per_row(rows, rows.sum(rows.map(surprise, [target, log_p])), known, scores)


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


@public
def entmax_loss(
    scores: Float[ArrayLike, "*shape"],
    targets: Num[ArrayLike, "*rows"] | Float[ArrayLike, "*shape"],
    alpha: ArrayLike = 1.5,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The Fenchel-Young loss of `entmax`: 0 as soon as the margin is `1 / (alpha - 1)`.

    .. math:: L(x, y) = \langle p - y, x/t \rangle
              + \frac{\sum_i y_i^\alpha - \sum_i p_i^\alpha}{\alpha (\alpha - 1)},
              \quad p = \mathrm{entmax}(x / t)

    The gradient in `x/t` is `p - y`. At `alpha` 1 it is the Kullback-Leibler divergence of `p` from
    the target, which for a class is `cross_entropy`; at 2 it is `sparsemax_loss`.

    Args:
      scores: scores of any shape and real dtype.
      targets: integer classes, of the shape of `scores` without `axis`, or a distribution over
        the classes, of the shape of `scores`.
      alpha: the shape, at least 1; a number or one value per row, differentiable.
      axis: the axis of the classes; several, or None for all, need a distribution as target.
      where: the classes that take part; a boolean mask that broadcasts to `scores`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, never negative, in the dtype of `scores`. A class out of range gives NaN,
      one that `where` excludes inf.

    Raises:
      TypeError: if `scores` is not real, or `targets` neither integers nor real numbers.
      ValueError: if shapes do not fit, `alpha` is a number below 1, or `temperature` a negative
        one.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> jsm.entmax_loss(jnp.array([[3.0, 0.0], [1.0, 0.0]]), jnp.array([0, 0]))
      Array([0.   , 0.062], dtype=float32)

    References:
      Peters, Niculae & Martins, 2019 (arXiv:1905.05702); Blondel, Martins & Niculae, 2020
      (arXiv:1901.02324).
    """
    known = known_number(alpha)
    if known in _TSALLIS:
        return _loss(_TSALLIS[known], scores, targets, axis, where, temperature)
    return _loss(_ANY_TSALLIS, scores, targets, axis, where, temperature, alpha)


@dataclasses.dataclass(frozen=True)
class _Regularizer:
    """A mapping and what it is regularized by, `Omega(p) = sum(omega(p_i))` up to a constant."""

    form: Form
    omega: Callable[..., Array]

    def change(self, p: Array, target: Array, *params: Array) -> Array:
        """`omega(target) - omega(p)`, entry by entry."""
        return self.omega(target, *params) - self.omega(p, *params)


_GINI = _Regularizer(_entmax.SPARSEMAX, lambda p: p * p / 2)
_TSALLIS = {
    1.0: _Regularizer(_softmax.SOFTMAX, lambda p: p * jnp.log(jnp.where(p > 0, p, 1))),
    1.5: _Regularizer(_entmax.ENTMAX15, lambda p: p * _entmax.sqrt(p) / 0.75),
    2.0: _GINI,
}
_ANY_TSALLIS = _Regularizer(_entmax.ENTMAX, _entmax.negentropy)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _fenchel_young(
    regularizer: _Regularizer, rows: Rows, scores: Entries, target: Entries, *params: Array
) -> Array:
    return _fenchel_young_fwd(regularizer, rows, scores, target, *params)[0]


def _fenchel_young_fwd(
    regularizer: _Regularizer, rows: Rows, scores: Entries, target: Entries, *params: Array
) -> tuple[Array, Any]:
    p = _threshold.apply(regularizer.form, rows, scores, *params)
    # `p` and the target have the same sum, so any shift of the scores will do; the maximum at 0
    # keeps the digits.
    gaps, _ = _threshold.below_top(rows, scores)

    def term(gap: Array, p: Array, target: Array, *params: Array) -> Array:
        excess = p - target
        linear = excess * jnp.where(excess == 0, 0, gap)
        return linear + regularizer.change(p, target, *params)

    loss = jnp.maximum(rows.sum(rows.map(term, [gaps, p, target], params)), 0)
    return loss, (rows, gaps, p, target, params)


def _fenchel_young_bwd(regularizer: _Regularizer, residuals: Any, ct: Array) -> tuple[Any, ...]:
    rows, gaps, p, target, params = residuals

    def change(target: Entries, *params: Array) -> Array:
        return rows.sum(rows.map(regularizer.change, [p, target], params))

    # The derivative in `p` vanishes, since `p` is the maximum: no second solve.
    _, pull_back = jax.vjp(change, target, *params)
    ct_target, *ct_params = pull_back(ct)
    ct_target = rows.map(
        lambda c, gap, ct: c - ct * jnp.where(gap == -jnp.inf, 0, gap), [ct_target, gaps], [ct]
    )
    ct_scores = rows.map(lambda p, y, ct: ct * (p - y), [p, target], [ct])
    return None, ct_scores, ct_target, *ct_params


_fenchel_young.defvjp(_fenchel_young_fwd, _fenchel_young_bwd)


def _loss(
    regularizer: _Regularizer,
    scores: ArrayLike,
    targets: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    temperature: ArrayLike,
    alpha: ArrayLike | Fixed | None = None,
) -> Array:
    rows, z = prepare(scores, axis, Options(where, temperature), name="scores")
    target, known = _as_distribution(rows, z, targets)
    params = () if alpha is None else (_entmax.as_alpha(rows, z, alpha),)
    loss = _fenchel_young(regularizer, rows, z, target, *params)
    return _one_per_row(rows, loss, known, scores)


def _as_distribution(
    rows: Rows, entries: Entries, targets: ArrayLike
) -> tuple[Entries, Array | None]:
    """The targets as a distribution, and for classes whether each is one of those there are."""
    (scores,) = entries
    targets = jnp.asarray(targets)
    check_real("targets", targets)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        if targets.shape != scores.shape:
            raise ValueError(
                f"targets must have the shape of scores {scores.shape} if they are distributions, "
                f"got shape {targets.shape}."
            )
        return (vary_like(targets.astype(scores.dtype), scores),), None
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
    classes = lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    if rows.names:  # each device has its stretch of the classes
        classes += lax.axis_index(rows.names) * scores.shape[axis]
    wanted_class = jnp.expand_dims(targets, axis)
    number = wanted_class.astype(jnp.int32)
    # What the conversion changes was out of range, and must not become a neighbour.
    hits = (classes == number) & (number.astype(targets.dtype) == wanted_class)
    target = (vary_like(indicator(hits, scores.dtype), scores),)
    return target, rows.sum(target) > 0


def _one_per_row(rows: Rows, loss: Array, known: Array | None, scores: ArrayLike) -> Array:
    if known is not None:
        loss = jnp.where(known, loss, jnp.nan)
    return rows.flatten(loss).astype(output_dtype(scores))
