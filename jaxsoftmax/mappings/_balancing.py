"""Rows and columns of matrices, brought to their sums in turn: Sinkhorn's iterations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import known_number
from jaxsoftmax._reductions import Rows, indicator, vary_like
from jaxsoftmax._scores import (
    Axis,
    Options,
    Temperature,
    as_array,
    broadcasts,
    check_per_row,
    check_real,
    is_cold,
    output_dtype,
    prepare,
    split_axis,
)
from jaxsoftmax._sharding import share_like
from jaxsoftmax.mappings._log_softmax import log_sum

OneOrMore = int | str | tuple[int | str, ...]
Axes = tuple[OneOrMore, OneOrMore]


class _Sums(NamedTuple):
    """What rows and columns are to sum to, as row values of each; 0 where nothing takes part.

    Attributes:
      rows: those of the rows.
      columns: those of the columns, of the same total.
      scores: the scores, -inf where a sum is 0.
      totals: both totals, as they were given.
      agree: whether they are the same, but for rounding.
    """

    rows: Array
    columns: Array
    scores: Array
    totals: tuple[Array, Array]
    agree: Array


def wanted_sums(
    rows: Rows,
    columns: Rows,
    scores: Array,
    row_sums: ArrayLike | None,
    column_sums: ArrayLike | None,
) -> _Sums:
    a = _given_sums("row_sums", row_sums, rows, scores)
    b = _given_sums("column_sums", column_sums, columns, scores)
    for sums in (a, b):
        scores = scores if sums is None else jnp.where(sums == 0, -jnp.inf, scores)
    part = (indicator(scores != -jnp.inf, scores.dtype),)
    in_rows, in_columns = rows.max(part, 0), columns.max(part, 0)
    a = None if a is None else jnp.where(in_rows == 0, 0, a)
    b = None if b is None else jnp.where(in_columns == 0, 0, b)
    if a is None:
        a = in_rows if b is None else _shared(rows.sum((b,)), columns, in_rows)
    if b is None:
        b = _shared(columns.sum((a,)), rows, in_columns)
    totals = columns.sum((a,)), rows.sum((b,))
    of_rows, of_columns = totals
    slack = _slack(x for x in (row_sums, column_sums) if x is not None)
    agree = ~(jnp.abs(of_rows - of_columns) > slack * jnp.maximum(of_rows, of_columns))
    b = b * (of_rows / jnp.where(of_columns == 0, 1, of_columns))
    return _Sums(nan_unless(agree, a), b, scores, totals, agree)


def _given_sums(name: str, value: ArrayLike | None, rows: Rows, scores: Array) -> Array | None:
    """A number per row, in the dtype of the scores; NaN where it is no sum."""
    if value is None:
        return None
    value = as_array(value, name)
    check_real(name, value)
    shape = rows.flat_shape(scores)
    if not broadcasts(value.shape, shape):
        what = name.split("_")[0]
        raise ValueError(
            f"{name} must broadcast to one value per {what}, shape {shape}, got shape "
            f"{value.shape}."
        )
    value = jnp.expand_dims(jnp.broadcast_to(value.astype(scores.dtype), shape), rows.axes)
    value = share_like(vary_like(value, scores, but=rows.names), scores)
    return nan_unless(is_sum(value), value)


def is_sum(value: Array) -> Array:
    return (value >= 0) & (value < jnp.inf)


def _shared(total: Array, rows: Rows, part: Array) -> Array:
    """The total, in equal parts for those that take part; `rows` gathers them."""
    return part * (total / jnp.maximum(rows.sum((part,)), 1))


def _slack(sums: Iterable[ArrayLike]) -> float:
    """How far totals may differ: what rounding may take from each sum."""
    return max((float(jnp.finfo(output_dtype(x)).eps) for x in sums), default=0.0) + 1e-5


def relative(found: Array, wanted: Array) -> Array:
    return jnp.abs(found - wanted) / jnp.where(wanted == 0, 1, wanted)


class _Logs(NamedTuple):
    """Where the iterations of each matrix are.

    Attributes:
      rows: the logarithms of the sums of the rows, before these were normalized.
      columns: those of the columns.
      ended: whether there are no more.
    """

    rows: Array
    columns: Array
    ended: Array


def scaled(
    x: ArrayLike,
    axes: Axes,
    where: ArrayLike | None,
    temperature: Temperature,
    num_iterations: int,
    row_sums: ArrayLike | None,
    column_sums: ArrayLike | None,
    tol: ArrayLike | None,
) -> tuple[Rows, Array, Array]:
    """The rows, scores whose softmax is the answer but for the sums of the rows, and these."""
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}.")
    if known_number(temperature) == 0:
        raise ValueError("temperature must be positive, got 0, which has no limit in sinkhorn.")
    both, rows, columns = rows_and_columns(axes, jnp.ndim(x))
    whole, (scores,) = prepare(x, both, Options(where, temperature))
    sums = wanted_sums(rows, columns, scores, row_sums, column_sums)
    cold = is_cold(whole, scores, temperature)
    scores = nan_unless(jnp.logical_not(cold), _below_top(rows, sums.scores))
    log_a, log_b = log_of(sums.rows), log_of(sums.columns)

    def iterate(logs: _Logs) -> _Logs:
        of_rows = _log_sum_near(rows, scores + (log_b - logs.columns), logs.rows)
        of_columns = _log_sum_near(columns, scores + (log_a - of_rows), logs.columns)
        if tol is None:
            return _Logs(of_rows, of_columns, logs.ended)
        # A column sums to what it should times this, now that rows are normalized.
        off = jnp.abs(jnp.expm1(lax.stop_gradient(of_columns - logs.columns)))
        ended = logs.ended | (rows.max((off,), 0) <= check_per_row("tol", tol, scores, whole))
        return _Logs(
            jnp.where(ended, logs.rows, of_rows),
            jnp.where(ended, logs.columns, of_columns),
            ended,
        )

    def step(logs: _Logs, _: None) -> tuple[_Logs, None]:
        if tol is None:
            return iterate(logs), None
        return lax.cond(jnp.all(logs.ended), lambda logs: logs, iterate, logs), None

    of_rows = _finite_log_sum(rows, scores)
    of_columns = _finite_log_sum(columns, scores + (log_a - of_rows))
    ended = jnp.zeros(whole.shape(scores), bool)
    ended = vary_like(share_like(ended, scores), scores, but=whole.names)
    logs = _Logs(of_rows, of_columns, ended)
    logs, _ = lax.scan(jax.checkpoint(step, prevent_cse=False), logs, length=num_iterations - 1)
    return rows, scores + (log_b - logs.columns), sums.rows


def rows_and_columns(axes: Axes, ndim: int) -> tuple[Axis, Rows, Rows]:
    if not isinstance(axes, tuple) or len(axes) != 2:
        raise ValueError(f"axes must be two axes, got {axes!r}.")
    both: Axis = tuple(a for axis in axes for a in (axis if isinstance(axis, tuple) else (axis,)))
    split_axis(both, ndim)
    return both, Rows(*split_axis(axes[1], ndim)), Rows(*split_axis(axes[0], ndim))


def _below_top(rows: Rows, scores: Array) -> Array:
    """The scores less their row's maximum, which changes no result. +inf leaves nothing else."""
    top = rows.max((lax.stop_gradient(scores),))
    moved = scores - jnp.where(jnp.abs(top) == jnp.inf, 0, top)
    below = (top == jnp.inf) & (scores < jnp.inf)
    return jnp.where(below, -jnp.inf, jnp.where(scores == jnp.inf, 0, moved))


def log_of(sums: Array) -> Array:
    """The logarithm, 0 of 0, whose scores are -inf."""
    return jnp.log(jnp.where(sums == 0, 1, sums))


def _finite_log_sum(rows: Rows, scores: Array) -> Array:
    """Log-sum-exp, 0 where nothing takes part."""
    total = log_sum(rows, (scores,))
    return jnp.where(total == -jnp.inf, 0, total)


@custom_vjp
def _log_sum_near(rows: Rows, scores: Array, guess: Array) -> Array:
    """The same in one pass, without a maximum: by a guess that is near enough.

    The last answer is. If all rows sum to 1, a column sums to at most their number, and is divided
    by no more: a row keeps a sum of one over that. So no sum overflows, and none is lost.
    """
    total = rows.sum((jnp.exp(scores - guess),))
    return jnp.where(total == 0, 0, guess + jnp.log(jnp.where(total == 0, 1, total)))


def _log_sum_near_fwd(rows: Rows, scores: Array, guess: Array) -> tuple[Array, Any]:
    total = _log_sum_near(rows, scores, guess)
    return total, (rows, scores, total)


def _log_sum_near_bwd(residuals: Any, ct: Array) -> tuple[None, Array, None]:
    rows, scores, total = residuals
    return None, rows.summed_cotangent(ct) * jnp.exp(scores - total), None


_log_sum_near.defvjp(_log_sum_near_fwd, _log_sum_near_bwd)
