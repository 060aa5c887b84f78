"""Stick-breaking: each score takes its part of what those before it left."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._platforms import chosen
from jaxsoftmax._public import FLAG, public
from jaxsoftmax._reductions import Entries, Rows, is_known
from jaxsoftmax._scores import (
    Axis,
    Options,
    Temperature,
    as_returned,
    as_scores,
    as_stored,
    is_cold,
    prepare,
    split_axis,
    with_ndim,
)
from jaxsoftmax._sharding import parts_of
from jaxsoftmax.mappings._hardmax import HARDMAX


@public(reverse=FLAG)
def stick_breaking(
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    reverse: bool = True,
) -> Float[Array, "*shape"]:
    r"""Breaks a stick of length 1 piece by piece: a score says how much of the rest to take.

    .. math:: p_i = \sigma(x_i / t) \prod_{j \text{ before } i} (1 - \sigma(x_j / t))

    A row sums to at most 1: nothing gets what the last entry leaves. The order of the entries
    matters, so attention needs no other information about positions. Jacobian in `x/t`, with
    :math:`s = \sigma(x / t)`: :math:`p_i (1 - s_i)` on the diagonal, :math:`-p_i s_j` for the `j`
    that break before `i`, and 0 elsewhere.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis along which the stick is broken: one array axis, or a tuple of it and mesh axis
        names. The parts of the devices then follow each other in the order of the devices.
      where: which entries take part; a boolean mask that broadcasts to `x`. Other entries, and
        scores of -inf, take nothing from the stick. A score of +inf takes all that is left.
      temperature: divides the scores; a number or one value per row, not negative. 0 means
        `hardmax`. This is not the limit: at small temperatures, the first positive score gets
        everything.
      reverse: whether the last entry breaks first. In causal attention this is the nearest key.

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
    options = Options(where, temperature)
    rows, scores = prepare(x, _in_order(axis, as_scores(x).ndim), options)
    rows = as_stored(rows, x, options)
    return as_returned(_breaks_or_hardmax(rows, scores, temperature, reverse), x, where)


def _in_order(axis: Axis, ndim: int) -> Axis:
    axes, names = split_axis(axis, ndim)
    if len(axes) != 1:
        raise ValueError(f"axis must be one array axis, got {axis!r}.")
    return (*axes, *names)


def _breaks_or_hardmax(
    rows: Rows, scores: Entries, temperature: Temperature, reverse: bool
) -> Array:
    # No scores break a stick into equal parts for ties. So temperature 0 is another function here,
    # not other scores; it is computed only where the temperature may be 0.
    pieces = _pieces(reverse, rows, scores[0])
    cold = is_cold(rows, scores[0], temperature)
    if cold is False:
        return pieces
    return jnp.where(cold, _threshold.apply(HARDMAX, rows, scores)[0], pieces)


def _pieces_of_any(reverse: bool, rows: Rows, scores: Array) -> Array:
    def pieces(entries: Entries) -> Entries:
        (scores,) = entries
        left = jnp.exp(_sum_before(rows, _log_rest(scores), reverse))
        p = jax.nn.sigmoid(scores) * left
        total = rows.sum((p,))
        return (jnp.where(jnp.isnan(total), total, p),)

    (p,) = rows.in_blocks(pieces, (scores,))
    return p


def _log_rest(scores: Array) -> Array:
    """The logarithm of the share that a piece leaves, bounded where that is too small for a float.

    Sums of it are finite, so that their products with 0 are 0.
    """
    return jnp.maximum(jnp.minimum(-scores, 0) - jnp.log1p(jnp.exp(-jnp.abs(scores))), -1e4)


_pieces = custom_vjp(_pieces_of_any, nondiff_argnums=(0,))


def _pieces_fwd(reverse: bool, rows: Rows, scores: Array) -> tuple[Array, Any]:
    p = _pieces(reverse, rows, scores)
    return p, (rows, p, scores)


def _pieces_bwd(reverse: bool, residuals: Any, ct: Array) -> tuple[None, Array]:
    rows, p, scores = residuals
    ct_log_p = ct * p
    after = _sum_before(rows, ct_log_p, not reverse)
    return None, ct_log_p * jax.nn.sigmoid(-scores) - after * jax.nn.sigmoid(scores)


_pieces.defvjp(_pieces_fwd, _pieces_bwd)


def _sum_before(rows: Rows, x: Array, reverse: bool) -> Array:
    """The sum of what comes before each entry, or after it. Linear."""
    (axis,) = rows.axes
    parts = parts_of(x, axis)
    if parts > 1:
        before = _sum_before_in_parts(x, axis, parts, reverse)
    else:
        before = _sum_before_here(x, axis, reverse)
    if not rows.names:
        return before
    total = jnp.sum(x, axis)
    index = lax.axis_index(rows.names)
    devices = jnp.arange(lax.axis_size(rows.names), dtype=jnp.int32)
    here = (devices < index if reverse else devices > index).reshape(-1, *(1,) * total.ndim)
    # Each device tells those that come after it, in one sum of a number per row and device.
    sums = lax.psum(jnp.where(here, total[None], 0), rows.names)
    return before + jnp.expand_dims(lax.dynamic_index_in_dim(sums, index, 0, False), axis)


def _sum_before_in_parts(x: Array, axis: int, parts: int, reverse: bool) -> Array:
    """The sum of what comes before, where XLA shares rows: no sum runs from part to part."""
    split = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    here = _sum_before_here(split, axis + 1, reverse)
    total = jnp.expand_dims(jnp.sum(split, axis + 1), axis + 1)
    first, second = (lax.broadcasted_iota(jnp.int32, (parts, parts), i) for i in (0, 1))
    before = (first > second if reverse else first < second).reshape(
        parts, parts, *(1,) * (x.ndim - axis - 1)
    )
    sums = jnp.sum(jnp.where(with_ndim(before, split.ndim), total, 0), axis)
    return (here + jnp.expand_dims(sums, axis + 1)).reshape(x.shape)


def _sum_before_here(x: Array, axis: int, reverse: bool) -> Array:
    one_by_one = functools.partial(_sum_by_scan, axis, reverse)
    if not is_known(x.shape[axis]):
        return one_by_one(x)
    return chosen("sum_before", one_by_one, x, axis=axis, reverse=reverse)


def _sum_by_scan(axis: int, reverse: bool, x: Array) -> Array:
    # Shifted rather than subtracted, for accuracy.
    shift = (-1, 1, 0) if reverse else (1, -1, 0)
    padding = [shift if i == axis else (0, 0, 0) for i in range(x.ndim)]
    shifted = lax.pad(x, jnp.zeros((), x.dtype), padding)
    return lax.cumsum(shifted, axis, reverse=reverse)
