"""Sinkhorn's scaling of a matrix of scores."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import core, lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import AXIS, INTEGER, known_number, public
from jaxsoftmax._reductions import Rows, indicator, vary_like
from jaxsoftmax._scores import (
    Axis,
    Options,
    Temperature,
    as_array,
    as_scores,
    broadcasts,
    check_mask,
    check_per_row,
    check_real,
    is_cold,
    output_dtype,
    prepare,
    split_axis,
)
from jaxsoftmax._sharding import share_like
from jaxsoftmax.mappings._softmax import SOFTMAX, log_probabilities, log_sum

P = ParamSpec("P")
R = TypeVar("R")

_OneOrMore = int | str | tuple[int | str, ...]
_Axes = tuple[_OneOrMore, _OneOrMore]


def _tells(fun: Callable[P, R]) -> Callable[P, R]:
    """A public function that tells what is wrong with its sums or its tolerance, if it can see it.

    Sums that are traced make NaN.
    """

    @functools.wraps(fun)
    def answer(*args: Any, **kwargs: Any) -> Any:
        tol = kwargs.get("tol")
        if isinstance(tol, numbers.Real) and not float(tol) >= 0:
            raise ValueError(f"tol must not be negative or NaN, got {tol}.")
        result = cast(Callable, fun)(*args, **kwargs)
        given = {name: kwargs.get(name) for name in ("row_sums", "column_sums")}
        known = not isinstance(result, core.Tracer)
        if known and any(x is not None for x in given.values()) and bool(jnp.isnan(result).any()):
            _refuse_wrong_sums(*args, **kwargs)
        return result

    return cast(Callable[P, R], answer)


def _refuse_wrong_sums(
    x: ArrayLike,
    axes: _Axes = (-2, -1),
    where: ArrayLike | None = None,
    *,
    row_sums: ArrayLike | None = None,
    column_sums: ArrayLike | None = None,
    **others: Any,
) -> None:
    del others
    for name, sums in (("row_sums", row_sums), ("column_sums", column_sums)):
        values = jnp.ravel(jnp.asarray(0 if sums is None else sums))
        wrong = values[~_is_sum(values)]
        if wrong.size > 0:
            raise ValueError(f"{name} must be finite and not negative, got {wrong[0]}.")
    both, rows, columns = _rows_and_columns(axes, jnp.ndim(x))
    _, (scores,) = prepare(x, both, Options(where))
    given = _sums(rows, columns, scores, row_sums, column_sums)
    of_rows, of_columns = (jnp.ravel(total) for total in given.totals)
    wrong = ~_are_equal(of_rows, of_columns)
    if wrong.any():
        raise ValueError(
            f"row_sums and column_sums must have the same total, got {of_rows[wrong][0]} and "
            f"{of_columns[wrong][0]}."
        )


@_tells
@public(axes=AXIS, num_iterations=INTEGER)
def sinkhorn(
    x: Real[ArrayLike, "*shape"],
    axes: _Axes = (-2, -1),
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    num_iterations: int = 20,
    row_sums: ArrayLike | None = None,
    column_sums: ArrayLike | None = None,
    tol: ArrayLike | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax over rows and columns at once: both have sums that are given.

    .. math:: p_{ij} = e^{x_{ij} / t + f_i + g_j}, \quad \sum_j p_{ij} = a_i,
              \quad \sum_i p_{ij} = b_j

    It maximizes :math:`\langle p, x/t \rangle + H(p)` over such matrices, with Shannon's entropy
    :math:`H`: a soft assignment, and transport with entropic regularization `t`. Rows sum to 1 and
    columns share that evenly, unless `row_sums` (`a`) or `column_sums` (`b`) say otherwise.

    Columns and rows are normalized in turn, as logarithms, and rows come last. So the sums of rows
    are exact, and those of columns as good as the iterations make them: at low temperatures that
    takes hundreds. `sinkhorn_residual` tells how far they are, and `tol` ends the iterations when
    they are near enough.

    The derivative is that of the iterations themselves. So it is exact for the returned matrix, for
    any number of them, in every mode and to any order. It keeps potentials of each iteration, and
    no matrices.

    Args:
      x: scores of any shape and real dtype.
      axes: the axis of the rows and the axis of the columns. A row sums over the second one. Each
        is an array axis, a mesh axis name, or a tuple of these.
      where: which entries take part; a boolean mask that broadcasts to `x`. Rows and columns
        without any entry that takes part are 0 and do not count.
      temperature: divides the scores; a positive number, or one value per matrix. If it is traced,
        0 gives NaN, since the limit is not a `hardmax`.
      num_iterations: how often columns are normalized at most, at least 1.
      row_sums: what rows sum to, not negative; it broadcasts to the shape of `p.sum(axes[1])`. A
        row of sum 0 takes no part. None: all the same, 1 unless `column_sums` are given.
      column_sums: what columns sum to, likewise; it broadcasts to the shape of `p.sum(axes[0])`.
        Their total is that of the rows; the difference that rounding makes goes to the columns.
        None: all the same.
      tol: the iterations of a matrix end when no sum is further from what it should be, relative to
        that; a number, or one value per matrix. How many there are then depends on the data. None:
        there are always `num_iterations`.

    Returns:
      Non-negative numbers of the shape and dtype of `x`. Entries of +inf leave nothing to others in
      their row. NaN where traced sums are negative, or their totals differ.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `num_iterations` not an integer.
      ValueError: if `axes` are not two different axes in range, shapes do not fit, `temperature`
        is a number that is not positive, `num_iterations` is below 1, `tol` is a negative number,
        a sum that is not traced is negative, or the totals of such sums differ.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> x = jnp.log(jnp.array([[4.0, 1.0], [1.0, 1.0]]))
      >>> print(jsm.sinkhorn(x))
      [[0.667 0.333]
       [0.333 0.667]]
      >>> p = jsm.sinkhorn(x, row_sums=jnp.array([0.5, 0.5]), column_sums=jnp.array([0.9, 0.1]))
      >>> print(p)
      [[0.478 0.022]
       [0.422 0.078]]

    References:
      Sinkhorn, 1964; Cuturi, 2013: Sinkhorn distances (arXiv:1306.0895).
      Mena, Belanger, Linderman & Snoek, 2018 (arXiv:1802.08665).
    """
    rows, scores, a = _scaled(
        x, axes, where, temperature, num_iterations, row_sums, column_sums, tol
    )
    return (a * _threshold.apply(SOFTMAX, rows, (scores,))[0]).astype(output_dtype(x))


@_tells
@public(axes=AXIS, num_iterations=INTEGER)
def log_sinkhorn(
    x: Real[ArrayLike, "*shape"],
    axes: _Axes = (-2, -1),
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    num_iterations: int = 20,
    row_sums: ArrayLike | None = None,
    column_sums: ArrayLike | None = None,
    tol: ArrayLike | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `sinkhorn`, exact also where a probability is too small for a float.

    .. math:: \log p_{ij} = x_{ij} / t + f_i + g_j

    Args:
      x: scores of any shape and real dtype.
      axes: the axis of the rows and the axis of the columns, as in `sinkhorn`.
      where: which entries take part; a boolean mask that broadcasts to `x`. The rest gets -inf.
      temperature: divides the scores; a positive number, or one value per matrix.
      num_iterations: how often columns are normalized at most, at least 1.
      row_sums: what rows sum to, as in `sinkhorn`.
      column_sums: what columns sum to, as in `sinkhorn`.
      tol: when the iterations end before `num_iterations`, as in `sinkhorn`.

    Returns:
      Logarithms of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `num_iterations` not an integer.
      ValueError: if `axes` are not two different axes in range, shapes do not fit, `temperature`
        is a number that is not positive, `num_iterations` is below 1, `tol` is a negative number,
        a sum that is not traced is negative, or the totals of such sums differ.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> print(jsm.log_sinkhorn(jnp.array([[400.0, 0.0], [0.0, 400.0]])))
      [[   0. -400.]
       [-400.    0.]]

    References:
      Cuturi, 2013: Sinkhorn distances (arXiv:1306.0895).
    """
    rows, scores, a = _scaled(
        x, axes, where, temperature, num_iterations, row_sums, column_sums, tol
    )
    return (_log(a) + log_probabilities(rows, (scores,))[0]).astype(output_dtype(x))


@_tells
@public(axes=AXIS)
def sinkhorn_residual(
    p: Real[ArrayLike, "*shape"],
    axes: _Axes = (-2, -1),
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    row_sums: ArrayLike | None = None,
    column_sums: ArrayLike | None = None,
) -> Float[Array, "*matrices"]:
    r"""How far the sums of a matrix are from what they should be, relative to that.

    .. math:: \max_{ij} \left\{ \left| \textstyle\sum_j p_{ij} / a_i - 1 \right|,
              \left| \textstyle\sum_i p_{ij} / b_j - 1 \right| \right\}

    Args:
      p: what `sinkhorn` returned.
      axes: the axis of the rows and the axis of the columns, as in `sinkhorn`.
      where: which entries take part. Unlike `sinkhorn`, it cannot know of scores of -inf: rows and
        columns of nothing else are to be excluded here.
      row_sums: what rows should sum to, as in `sinkhorn`.
      column_sums: what columns should sum to, as in `sinkhorn`.

    Returns:
      One value per matrix, float32 for half precision; 0 where nothing takes part.

    Raises:
      TypeError: if `p` is not real or `where` not boolean.
      ValueError: if `axes` are not two different axes in range, shapes do not fit, a sum that is
        not traced is negative, or the totals of such sums differ.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.array([[5.0, 0.0], [4.0, 2.0]])
      >>> p = jsm.sinkhorn(x, num_iterations=1)
      >>> print(f"{jsm.sinkhorn_residual(p):.1e}")
      2.4e-01
      >>> p = jsm.sinkhorn(x, num_iterations=100, tol=1e-3)
      >>> print(f"{jsm.sinkhorn_residual(p):.1e}")
      9.8e-04

    References:
      Altschuler, Weed & Rigollet, 2017 (arXiv:1705.09634).
    """
    both, rows, columns = _rows_and_columns(axes, jnp.ndim(p))
    entries = as_scores(p, "p")
    # As scores: where there is none, nothing takes part.
    part = True if where is None else check_mask(where, entries.shape)
    scores = jnp.where(part, jnp.zeros_like(entries), -jnp.inf)
    given = _sums(rows, columns, scores, row_sums, column_sums)
    entries = (jnp.where(part, entries, 0),)
    off_rows = columns.max((_relative(rows.sum(entries), given.rows),), 0)
    off_columns = rows.max((_relative(columns.sum(entries), given.columns),), 0)
    whole = Rows(*split_axis(both, entries[0].ndim))
    return whole.flatten(jnp.maximum(off_rows, off_columns))


class _Sums(NamedTuple):
    """What rows and columns are to sum to, as row values of each; 0 where nothing takes part.

    Attributes:
      rows: those of the rows.
      columns: those of the columns, of the same total.
      scores: the scores, -inf where a sum is 0.
      totals: both totals, as they were given.
    """

    rows: Array
    columns: Array
    scores: Array
    totals: tuple[Array, Array]


def _sums(
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
    known = _are_equal(*totals)
    of_rows, of_columns = totals
    b = b * (of_rows / jnp.where(of_columns == 0, 1, of_columns))
    return _Sums(nan_unless(known, a), b, scores, totals)


def _given_sums(name: str, value: ArrayLike | None, rows: Rows, scores: Array) -> Array | None:
    """A number per row, in the dtype of the scores; NaN where it is no sum."""
    if value is None:
        return None
    value = as_array(value, name)
    check_real(name, value)
    shape = tuple(n for i, n in enumerate(scores.shape) if i not in rows.axes)
    if not broadcasts(value.shape, shape):
        what = name.split("_")[0]
        raise ValueError(
            f"{name} must broadcast to one value per {what}, shape {shape}, got shape "
            f"{value.shape}."
        )
    value = jnp.expand_dims(jnp.broadcast_to(value.astype(scores.dtype), shape), rows.axes)
    value = share_like(vary_like(value, scores, but=rows.names), scores)
    return nan_unless(_is_sum(value), value)


def _is_sum(value: Array) -> Array:
    return (value >= 0) & (value < jnp.inf)


def _shared(total: Array, rows: Rows, part: Array) -> Array:
    """The total, in equal parts for those that take part; `rows` gathers them."""
    return part * (total / jnp.maximum(rows.sum((part,)), 1))


def _are_equal(x: Array, y: Array) -> Array:
    return ~(jnp.abs(x - y) > _SLACK * jnp.maximum(x, y))


# How far totals may differ: what rounding to bfloat16 may take from each sum.
_SLACK = 2.0**-8


def _relative(found: Array, wanted: Array) -> Array:
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


def _scaled(
    x: ArrayLike,
    axes: _Axes,
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
    both, rows, columns = _rows_and_columns(axes, jnp.ndim(x))
    whole, (scores,) = prepare(x, both, Options(where, temperature))
    sums = _sums(rows, columns, scores, row_sums, column_sums)
    cold = is_cold(whole, scores, temperature)
    scores = nan_unless(jnp.logical_not(cold), _below_top(rows, sums.scores))
    log_a, log_b = _log(sums.rows), _log(sums.columns)

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


def _rows_and_columns(axes: _Axes, ndim: int) -> tuple[Axis, Rows, Rows]:
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


def _log(sums: Array) -> Array:
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
