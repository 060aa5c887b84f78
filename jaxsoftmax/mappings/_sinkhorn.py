"""Sinkhorn's scaling of a matrix of scores."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax.numpy as jnp
from jax import core, lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold
from jaxsoftmax._public import AXIS, INTEGER, public
from jaxsoftmax._reductions import Rows
from jaxsoftmax._scores import (
    Options,
    as_returned,
    as_scores,
    check_mask,
    output_dtype,
    prepare,
    split_axis,
)
from jaxsoftmax.mappings._balancing import (
    Axes,
    is_sum,
    log_of,
    relative,
    rows_and_columns,
    scaled,
    wanted_sums,
)
from jaxsoftmax.mappings._log_softmax import log_probabilities
from jaxsoftmax.mappings._softmax import SOFTMAX

P = ParamSpec("P")
R = TypeVar("R")


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
            scores, *options = inspect.signature(fun).bind(*args, **kwargs).arguments.items()
            _refuse_wrong_sums(scores[1], **dict(options))
        return result

    return cast(Callable[P, R], answer)


def _refuse_wrong_sums(
    x: ArrayLike,
    axes: Axes = (-2, -1),
    where: ArrayLike | None = None,
    *,
    row_sums: ArrayLike | None = None,
    column_sums: ArrayLike | None = None,
    **others: Any,
) -> None:
    del others
    for name, sums in (("row_sums", row_sums), ("column_sums", column_sums)):
        values = jnp.ravel(jnp.asarray(0 if sums is None else sums))
        wrong = values[~is_sum(values)]
        if wrong.size > 0:
            raise ValueError(f"{name} must be finite and not negative, got {wrong[0]}.")
    both, rows, columns = rows_and_columns(axes, jnp.ndim(x))
    _, (scores,) = prepare(x, both, Options(where))
    given = wanted_sums(rows, columns, scores, row_sums, column_sums)
    of_rows, of_columns = (jnp.ravel(total) for total in given.totals)
    wrong = ~jnp.ravel(given.agree)
    if wrong.any():
        raise ValueError(
            f"row_sums and column_sums must have the same total, got {of_rows[wrong][0]} and "
            f"{of_columns[wrong][0]}."
        )


@_tells
@public(axes=AXIS, num_iterations=INTEGER)
def sinkhorn(
    x: Real[ArrayLike, "*shape"],
    axes: Axes = (-2, -1),
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

    Rows are normalized first, then columns and rows in turn, as logarithms. So the sums of rows
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
        None: all the same. In float32, a sum must not be smaller than 1e-30 of the total, unless it
        is 0.
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
    rows, scores, a = scaled(
        x, axes, where, temperature, num_iterations, row_sums, column_sums, tol
    )
    return as_returned(a * _threshold.apply(SOFTMAX, rows, (scores,))[0], x, where)


@_tells
@public(axes=AXIS, num_iterations=INTEGER)
def log_sinkhorn(
    x: Real[ArrayLike, "*shape"],
    axes: Axes = (-2, -1),
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
    rows, scores, a = scaled(
        x, axes, where, temperature, num_iterations, row_sums, column_sums, tol
    )
    return (log_of(a) + log_probabilities(rows, (scores,))[0]).astype(output_dtype(x))


@_tells
@public(axes=AXIS)
def sinkhorn_residual(
    p: Real[ArrayLike, "*shape"],
    axes: Axes = (-2, -1),
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
    both, rows, columns = rows_and_columns(axes, jnp.ndim(p))
    entries = as_scores(p, "p")
    # As scores: where there is none, nothing takes part.
    part = True if where is None else check_mask(where, entries.shape)
    scores = jnp.where(part, jnp.zeros_like(entries), -jnp.inf)
    given = wanted_sums(rows, columns, scores, row_sums, column_sums)
    entries = (jnp.where(part, entries, 0),)
    off_rows = _largest(columns, relative(rows.sum(entries), given.rows))
    off_columns = _largest(rows, relative(columns.sum(entries), given.columns))
    whole = Rows(*split_axis(both, entries[0].ndim))
    return whole.flatten(jnp.maximum(off_rows, off_columns))


def _largest(rows: Rows, x: Array) -> Array:
    """The largest number of each row, 0 at least. JAX has no derivative of that over devices."""
    top = rows.max((lax.stop_gradient(x),), 0)
    count, total = (rows.sum((jnp.where(x == top, y, 0),)) for y in (jnp.ones_like(x), x))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), top)
