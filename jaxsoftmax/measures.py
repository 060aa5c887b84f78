"""How spread out probabilities are: one number per row."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import ALPHA, Fixed, known_number, public
from jaxsoftmax._reductions import Rows, indicator
from jaxsoftmax._scores import Axis, as_scores, check_per_row, output_dtype, split_axis
from jaxsoftmax.mappings._powers import negentropy


@public
def shannon_entropy(p: Real[ArrayLike, "*shape"], axis: Axis = -1) -> Float[Array, "*rows"]:
    r"""The entropy that `softmax` trades against the scores, in nats.

    .. math:: H(p) = -\sum_i p_i \log p_i, \quad 0 \log 0 = 0

    The gradient is :math:`-1 - \log p_i`. At `p = 0`, where it is infinite, it is taken as 0, so
    that entries without probability stay out of it.

    Args:
      p: probabilities, or non-negative numbers, of any shape.
      axis: the axes of a distribution: array axes, mesh axis names, both in a tuple, or None for
        all array axes.

    Returns:
      One value per row, in the dtype of `p`. A negative `p` gives NaN.

    Raises:
      TypeError: if `p` is not real.
      ValueError: if an axis is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> print(jsm.shannon_entropy(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])))
      [0.693 0.   ]

    References:
      Shannon, 1948: A mathematical theory of communication.
    """
    rows, values = _rows_of(p, axis)
    terms = values * -jnp.log(jnp.where(values == 0, 1, values))
    return rows.flatten(rows.sum((terms,))).astype(output_dtype(p))


@public(alpha=ALPHA)
def tsallis_entropy(
    p: Real[ArrayLike, "*shape"], alpha: ArrayLike, axis: Axis = -1
) -> Float[Array, "*rows"]:
    r"""The entropy that `entmax` trades against the scores: Shannon's at `alpha` 1, Gini's at 2.

    .. math:: H_\alpha(p) = \frac{1}{\alpha (\alpha - 1)} \sum_i (p_i - p_i^\alpha)

    It is smooth in `alpha`, also at 1. The gradient in `p` is :math:`(1 - \alpha p_i^{\alpha - 1})
    / (\alpha (\alpha - 1))`. At `p = 0` and `alpha` of at most 1, where it is infinite, it is taken
    as 0.

    Args:
      p: probabilities, or non-negative numbers, of any shape.
      alpha: the shape, positive; a number or one value per row, differentiable.
      axis: the axes of a distribution: array axes, mesh axis names, both in a tuple, or None for
        all array axes.

    Returns:
      One value per row, in the dtype of `p`. A negative `p` gives NaN.

    Raises:
      TypeError: if `p` is not real.
      ValueError: if an axis is out of range, `alpha` does not broadcast to one value per row, or
        is a number that is not positive and finite. A traced `alpha` that is not positive gives
        NaN.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> p = jnp.array([0.5, 0.25, 0.25])
      >>> for alpha in (1.0, 1.5, 2.0):
      ...     print(f"{jsm.tsallis_entropy(p, alpha):.4f}")
      1.0397
      0.5286
      0.3125
      >>> print(f"{jax.grad(jsm.tsallis_entropy, argnums=1)(p, 1.0):.4f}")
      -1.6403

    References:
      Tsallis, 1988: Possible generalization of Boltzmann-Gibbs statistics.
    """
    rows, values = _rows_of(p, axis)
    shape = _as_shape(rows, values, alpha)

    def term(p: Array, alpha: Array) -> Array:
        return nan_unless(p >= 0, -negentropy(p, alpha))

    terms = rows.map(term, [(values,)], [shape])
    return rows.flatten(rows.sum(terms)).astype(output_dtype(p))


@public
def support_size(p: Real[ArrayLike, "*shape"], axis: Axis = -1) -> Int[Array, "*rows"]:
    r"""How many entries have a probability above 0.

    .. math:: \#\{i : p_i > 0\}

    Args:
      p: probabilities, or any real numbers, of any shape.
      axis: the axes of a distribution: array axes, mesh axis names, both in a tuple, or None for
        all array axes.

    Returns:
      One int32 per row. NaN does not count.

    Raises:
      TypeError: if `p` is not real.
      ValueError: if an axis is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> p = jsm.sparsemax(jnp.array([[1.0, 0.5, -1.0], [3.0, 0.0, 0.0]]))
      >>> print(jsm.support_size(p))
      [2 1]

    References:
      Martins & Astudillo, 2016: From softmax to sparsemax (arXiv:1602.02068).
    """
    rows, values = _rows_of(p, axis)
    count = rows.sum((indicator(values > 0, jnp.int32),))
    return rows.flatten(count).astype(jnp.int32)


def _rows_of(p: ArrayLike, axis: Axis) -> tuple[Rows, Array]:
    values = as_scores(p, "p")
    return Rows(*split_axis(axis, values.ndim)), values


def _as_shape(rows: Rows, values: Array, alpha: ArrayLike | Fixed) -> Array:
    known = known_number(alpha)
    if known is not None and not 0 < known < jnp.inf:
        raise ValueError(f"alpha must be positive and finite, got {known}.")
    shape = check_per_row("alpha", alpha, values, rows)
    return nan_unless(shape > 0, shape)
