"""Fenchel-Young losses of the entmax family: the regularizer, its mapping and one rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import sqrt, times
from jaxsoftmax._form import Form
from jaxsoftmax._public import ALPHA, Fixed, known_number, public
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import Axis, Options
from jaxsoftmax.losses._cross_entropy import cross_entropy
from jaxsoftmax.losses._targets import (
    as_distribution,
    not_negative,
    one_per_row,
    prepare_scores,
    without_rounding,
)
from jaxsoftmax.mappings import _entmax, _powers, _softmax


@public
def sparsemax_loss(
    scores: Real[ArrayLike, "*shape"],
    targets: Integer[ArrayLike, "*rows"] | Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The Fenchel-Young loss of `sparsemax`. It is 0 as soon as the margin is 1.

    .. math:: L(x, y) = \frac12 \|y - x/t\|^2 - \frac12 \|p - x/t\|^2,
              \quad p = \mathrm{sparsemax}(x / t)

    The margin is by how much the score of the target exceeds all others. The gradient in `x/t` is
    `p - y`.

    Args:
      scores: scores of any shape and real dtype.
      targets: either integer classes, of the shape of `scores` without `axis`, or distributions
        over the classes, of the shape of `scores`. One-hot integers are distributions. Sizes of 1
        broadcast.
      axis: the axis of the classes. It may be several axes, or None for all: the classes are then
        counted along the axes in the order given, fastest along the last.
      where: which classes take part; a boolean mask that broadcasts to `scores`. It has the shape
        (K,) for K classes along the last axis, or there is a mask for each row. To leave out whole
        rows, write `jnp.mean(loss, where=rows)` afterwards.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, in the dtype of `scores`, or float32 for half precision. It is never
      negative if the targets sum to 1. For other targets, it is the value of the formula, and the
      gradient is `p - y`. A target that `where` excludes gives inf. A target out of range gives NaN
      and gradient 0, and an error under `jax.experimental.checkify`.

    Raises:
      TypeError: if `scores` is not real, or `targets` are not integers or real numbers.
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


@public(alpha=ALPHA)
def entmax_loss(
    scores: Real[ArrayLike, "*shape"],
    targets: Integer[ArrayLike, "*rows"] | Float[ArrayLike, "*shape"],
    alpha: ArrayLike = 1.5,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The Fenchel-Young loss of `entmax`. It is 0 as soon as the margin is `1 / (alpha - 1)`.

    .. math:: L(x, y) = \langle p - y, x/t \rangle
              + \frac{\sum_i y_i^\alpha - \sum_i p_i^\alpha}{\alpha (\alpha - 1)},
              \quad p = \mathrm{entmax}(x / t)

    The gradient in `x/t` is `p - y`. At `alpha` 1, it is the Kullback-Leibler divergence of `p`
    from the target: if the target is a class, that is `cross_entropy`. At 2, it is
    `sparsemax_loss`.

    Args:
      scores: scores of any shape and real dtype.
      targets: either integer classes, of the shape of `scores` without `axis`, or distributions
        over the classes, of the shape of `scores`. One-hot integers are distributions. Sizes of 1
        broadcast.
      alpha: the shape, at least 1; a number or one value per row, differentiable.
      axis: the axis of the classes. It may be several axes, or None for all: the classes are then
        counted along the axes in the order given, fastest along the last.
      where: which classes take part; a boolean mask that broadcasts to `scores`. It has the shape
        (K,) for K classes along the last axis, or there is a mask for each row. To leave out whole
        rows, write `jnp.mean(loss, where=rows)` afterwards.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, in the dtype of `scores`, or float32 for half precision. It is never
      negative if the targets sum to 1. For other targets, it is the value of the formula, and the
      gradient is `p - y`. A target that `where` excludes gives inf. A target out of range gives NaN
      and gradient 0, and an error under `jax.experimental.checkify`. It has the errors of `entmax`,
      which are large at an `alpha` above 7, or 15 in float64.

    Raises:
      TypeError: if `scores` is not real, or `targets` are not integers or real numbers.
      ValueError: if shapes do not fit, `alpha` is a number below 1 or infinite, or `temperature` is
        a negative number.

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
    are_classes = jnp.issubdtype(jnp.asarray(targets).dtype, jnp.integer)
    if known == 1 and are_classes and jnp.ndim(targets) < jnp.ndim(scores):
        return cross_entropy(scores, targets, axis, where, temperature=temperature)
    if known in _TSALLIS:
        return _loss(_TSALLIS[known], scores, targets, axis, where, temperature)
    return _loss(_ANY_TSALLIS, scores, targets, axis, where, temperature, alpha)


@dataclasses.dataclass(frozen=True)
class _Regularizer:
    """A mapping and what it is regularized by, `Omega(p) = sum(omega(p_i) + slope p_i)`.

    Attributes:
      form: that of the mapping.
      omega: what is added up; a function of an entry and of the parameters.
      slope: a function of the parameters. Where sums agree nothing comes of it, be it large.
    """

    form: Form
    omega: Callable[..., Array]
    slope: Callable[..., ArrayLike] = lambda *params: 0.0

    def change(
        self, rows: Rows, p: Entries, target: Entries, shift: Array | None, *params: Array
    ) -> Array:
        """`Omega(target) - Omega(p)`, where `shift` is by how much the sum of `p` is larger."""
        change = rows.sum(rows.map(self.change_of_entry, [p, target], params))
        return self.shifted(change, shift, *params)

    def change_of_entry(self, p: Array, target: Array, *params: Array) -> Array:
        """The part of an entry, without what its slope adds."""
        return self.omega(target, *params) - self.omega(p, *params)

    def shifted(self, change: Array, shift: Array | None, *params: Array) -> Array:
        """The change of the entries, with what their slope adds."""
        return change if shift is None else change - shift * self.slope(*params)


def _slope_of_power(alpha: Array) -> Array:
    """By how much `p ** alpha / (alpha (alpha - 1))` is steeper than `negentropy`."""
    scale = alpha * (alpha - 1)
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)


_GINI = _Regularizer(_entmax.SPARSEMAX, lambda p: p * p / 2)
_TSALLIS = {
    1.0: _Regularizer(_softmax.SOFTMAX, lambda p: p * jnp.log(jnp.where(p > 0, p, 1))),
    1.5: _Regularizer(_entmax.ENTMAX15, lambda p: p * sqrt(p) / 0.75),
    2.0: _GINI,
}
_ANY_TSALLIS = _Regularizer(_entmax.ENTMAX, _powers.negentropy, _slope_of_power)


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def _fenchel_young(
    regularizer: _Regularizer,
    of_classes: bool,
    rows: Rows,
    scores: Entries,
    target: Entries,
    p: Entries,
    *params: Array,
) -> Array:
    """The loss, where `p` is what the regularizer maps the scores to."""
    # Where `p` and the target have the same sum, any shift of the scores will do; the maximum at 0
    # keeps the digits.
    gaps, top = _tops.below_top(rows, scores)
    linear, excess, change = _sums(regularizer, rows, gaps, p, target, *params)
    if of_classes:
        return not_negative(linear + change, jnp.inf)
    shift = without_rounding(excess, 1)
    loss = linear + regularizer.shifted(change, shift, *params) + times(shift, top)
    return not_negative(loss, jnp.where(shift == 0, jnp.inf, 0))


def _fenchel_young_fwd(
    regularizer: _Regularizer,
    of_classes: bool,
    rows: Rows,
    scores: Entries,
    target: Entries,
    p: Entries,
    *params: Array,
) -> tuple[Array, Any]:
    loss = _fenchel_young(regularizer, of_classes, rows, scores, target, p, *params)
    return loss, (rows, scores, p, target, params)


def _sums(
    regularizer: _Regularizer,
    rows: Rows,
    gaps: Entries,
    p: Entries,
    target: Entries,
    *params: Array,
) -> tuple[Array, ...]:
    """Of `(p - target) gap`, of `p - target`, and of how the regularizer changes."""

    def terms(gap: Array, p: Array, target: Array, *params: Array) -> tuple[Array, ...]:
        excess = p - target
        linear = excess * jnp.where(excess == 0, 0, gap)
        return linear, excess, regularizer.change_of_entry(p, target, *params)

    if not params:
        return rows.sums(terms, [gaps, p, target])
    # Powers make a loop too long for compilers to vectorize, if it has other sums, too.
    return tuple(map(rows.sum, zip(*rows.map(terms, [gaps, p, target], params), strict=True)))


def _shift(rows: Rows, p: Entries, target: Entries) -> Array:
    """The sum of `p`, 1 or 0, less that of the target."""
    p = jax.lax.stop_gradient(p)  # Near alpha 1, what rounding leaves of 0 is multiplied.
    return without_rounding(rows.sum(rows.map(jnp.subtract, [p, target])), 1)


def _fenchel_young_bwd(
    regularizer: _Regularizer, of_classes: bool, residuals: Any, ct: Array
) -> tuple[Any, ...]:
    rows, scores, p, target, params = residuals

    def change(target: Entries, *params: Array) -> Array:
        shift = None if of_classes else _shift(rows, p, target)
        return regularizer.change(rows, p, target, shift, *params)

    # The derivative in `p` vanishes, since `p` is the maximum: no second solve.
    _, pull_back = jax.vjp(change, target, *params)
    ct_target, *ct_params = pull_back(ct)
    ct = rows.summed_cotangent(ct)

    def less_score(ct_target: Array, score: Array, ct: Array) -> Array:
        finite = jnp.where(jnp.abs(score) == jnp.inf, 0, score)
        return jnp.where(score == -jnp.inf, 0, ct_target - ct * finite)

    ct_target = rows.map(less_score, [ct_target, scores], [ct])
    ct_scores = rows.map(lambda p, y, ct: ct * (p - y), [p, target], [ct])
    return None, ct_scores, ct_target, None, *ct_params


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
    rows, z = prepare_scores(scores, axis, Options(where, temperature))
    target, classes = as_distribution(rows, z, targets, axis)
    params = () if alpha is None else (_entmax.as_alpha(rows, z, alpha),)
    p = _threshold.apply(regularizer.form, rows, z, *params)
    loss = _fenchel_young(regularizer, classes is not None, rows, z, target, p, *params)
    return one_per_row(rows, loss, classes, scores)
