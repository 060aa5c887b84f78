"""Stick-breaking: each score takes its part of what those before it left."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoftmax import _threshold
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import (
    Axis,
    Options,
    Temperature,
    as_scores,
    is_cold,
    one_axis,
    output_dtype,
    prepare,
    public,
)
from jaxsoftmax.mappings._hardmax import HARDMAX


@public
def stick_breaking(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    reverse: bool = True,
) -> Float[Array, "*shape"]:
    r"""Breaks a stick of length 1 piece by piece: a score says how much of the rest to take.

    .. math:: p_i = \sigma(x_i / t) \prod_{j \text{ before } i} (1 - \sigma(x_j / t))

    A row sums to at most 1: what the last one leaves is nobody's. The order is part of the meaning,
    so that attention needs no other notion of position. Jacobian in `x/t`, with
    :math:`s = \sigma(x / t)`: :math:`p_i (1 - s_i)` on the diagonal, :math:`-p_i s_j` for the `j`
    that break before `i`, and 0 elsewhere.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis along which the stick is broken: one array axis.
      where: what takes part; a boolean mask that broadcasts to `x`. The rest breaks nothing, and so
        it is with scores of -inf. A score of +inf takes all that is left.
      temperature: divides the scores; a number or one value per row, not negative. 0 makes it
        `hardmax`.
      reverse: whether the last breaks first, which in causal attention is the nearest key.

    Returns:
      Non-negative numbers of the shape and dtype of `x`, at most 1 in sum.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is not one array axis in range, shapes do not fit, or `temperature` is a
        negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.stick_breaking(jnp.zeros(3))
      Array([0.125, 0.25 , 0.5  ], dtype=float32)
      >>> jsm.stick_breaking(jnp.zeros(3), reverse=False)
      Array([0.5  , 0.25 , 0.125], dtype=float32)

    References:
      Tan, Yang, Courville, Panda & Shen, 2024: Scaling stick-breaking attention
      (arXiv:2410.17980).
    """
    axis = one_axis(axis, as_scores(x).ndim)
    rows, scores = prepare(x, axis, Options(where, temperature))
    return _breaks_or_hardmax(rows, scores, temperature, reverse).astype(output_dtype(x))


def _breaks_or_hardmax(
    rows: Rows, scores: Entries, temperature: Temperature, reverse: bool
) -> Array:
    # No scores make sticks break into equal parts wherever there are ties: at temperature 0 it is
    # another function, taken where it may be needed.
    pieces = _pieces(rows.axes[0], reverse, scores[0])
    cold = is_cold(rows, scores[0], temperature)
    if cold is False:
        return pieces
    return jnp.where(cold, _threshold.apply(HARDMAX, rows, scores)[0], pieces)


def _pieces_of_any(axis: int, reverse: bool, scores: Array) -> Array:
    left = _sum_before(jax.nn.log_sigmoid(-scores), axis, reverse)
    p = jnp.exp(jax.nn.log_sigmoid(scores) + left)
    total = jnp.sum(p, axis, keepdims=True)
    return jnp.where(jnp.isnan(total), total, p)


_pieces = custom_vjp(_pieces_of_any, nondiff_argnums=(0, 1))


def _pieces_fwd(axis: int, reverse: bool, scores: Array) -> tuple[Array, Any]:
    p = _pieces(axis, reverse, scores)
    return p, (p, scores)


def _pieces_bwd(axis: int, reverse: bool, residuals: Any, ct: Array) -> tuple[Array]:
    p, scores = residuals
    ct_log_p = ct * p
    after = _sum_before(ct_log_p, axis, not reverse)
    return (ct_log_p * jax.nn.sigmoid(-scores) - after * jax.nn.sigmoid(scores),)


_pieces.defvjp(_pieces_fwd, _pieces_bwd)


def _sum_before(x: Array, axis: int, reverse: bool) -> Array:
    """The sum of what comes before each entry, or after it. Linear."""
    # Shifted rather than subtracted, for -inf and for accuracy.
    shift = (-1, 1, 0) if reverse else (1, -1, 0)
    padding = [shift if i == axis else (0, 0, 0) for i in range(x.ndim)]
    shifted = lax.pad(x, jnp.zeros((), x.dtype), padding)
    return lax.cumsum(shifted, axis, reverse=reverse)
