"""Choosing some of the scores: masks to be given to a mapping as `where`.

Masks compose, since each takes another one as `where`. Other libraries divide by the temperature
first, then cut by top-k, top-p and min-p, in this order, and so does

    where = top_k_mask(x, 50)
    where = top_p_mask(x, 0.9, where=where, temperature=t)
    where = min_p_mask(x, 0.05, where=where, temperature=t)
    token = sample(key, x, where=where, temperature=t)
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Integer, Real

from jaxsoftmax import _sharding, _tops
from jaxsoftmax._public import INTEGER, is_int, public
from jaxsoftmax._reductions import Rows, is_known
from jaxsoftmax._scores import (
    Axis,
    Options,
    Temperature,
    as_array,
    as_counts,
    check_integers,
    check_mask,
    check_per_row,
    check_real,
    one_axis,
    prepare,
)


def top_k_mask(
    x: Real[ArrayLike, "*shape"],
    k: int | Integer[ArrayLike, "*#shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
) -> Bool[Array, "*shape"]:
    r"""The `k` largest scores: exactly `k`, whatever the ties.

    .. math:: \#\{ j : x_j > x_i \} + \#\{ j < i : x_j = x_i \} < k

    There is no temperature, since it does not change the order of scores.

    Args:
      x: scores of any shape and real dtype. -inf is a score like any other: where fewer than `k`
        are above it, the first ones of -inf fill up. NaN counts as +inf.
      k: how many to keep: an integer, or an array of integers, one per row, which may be traced.
        Shorter rows are kept whole. A number that is known while tracing takes less time.
      axis: one array axis.
      where: what may be kept; a boolean mask that broadcasts to `x`.

    Returns:
      Booleans of the shape of `x`. Of equal scores the first are kept.

    Raises:
      TypeError: if `x` is not real, `k` holds no integers or `where` is not boolean.
      ValueError: if `k` is a negative number or does not broadcast to one value per row, `axis` is
        not one array axis in range, or `where` does not broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.array([1.0, 3.0, 1.0, 2.0, 1.0])
      >>> jsm.top_k_mask(x, 3)
      Array([ True,  True, False,  True, False], dtype=bool)
      >>> jsm.top_k_mask(jnp.stack([x, x]), jnp.array([[1], [2]]))
      Array([[False,  True, False, False, False],
             [False,  True, False,  True, False]], dtype=bool)
      >>> jsm.sparsemax(x, where=jsm.top_k_mask(x, 2), temperature=2)
      Array([0.  , 0.75, 0.  , 0.25, 0.  ], dtype=float32)

    References:
      Fan, Lewis & Dauphin, 2018: Hierarchical neural story generation (arXiv:1805.04833).
    """
    if is_int(k):
        number = int(cast(int, k))
        if number < 0:
            raise ValueError(f"k must not be negative, got {number}.")
        return _top_k_mask(x, number, axis, where)
    if not hasattr(k, "dtype"):
        raise TypeError(f"k must be an integer or an array of integers, got {type(k).__name__}.")
    return _top_of_each(x, k, axis, where)


def _of_whole_rows(mask: Callable[..., Array]) -> Callable[..., Array]:
    """A mask by the order of a row, of which a device may have a part.

    Those that an explicit mesh has spread are gathered, and the mask is spread as they were.
    """

    @functools.wraps(mask)
    def of_whole_rows(
        x: ArrayLike, value: Any, axis: Axis, where: ArrayLike | None = None, **options: Any
    ) -> Array:
        scores = as_array(x, "x")
        along = one_axis(axis, scores.ndim) - scores.ndim
        whole = _sharding.gathered(scores, along)
        if where is not None and jnp.ndim(where) >= -along:
            where = _sharding.gathered(jnp.asarray(where), along)
        return _sharding.share_like(mask(whole, value, axis, where, **options), scores)

    return of_whole_rows


@public(k=INTEGER)
@_of_whole_rows
def _top_k_mask(x: ArrayLike, k: int, axis: Axis, where: ArrayLike | None = None) -> Array:
    scores, takes_part, axis = _as_rows(x, axis, where)
    length = scores.shape[-1]
    if is_known(length) and (k == 0 or k >= length):
        return jnp.moveaxis(takes_part & (k > 0), -1, axis)
    # A length that is a symbol may be less than k.
    descending = lax.top_k(scores, k)[0] if is_known(length) else _descending(scores)
    count = jnp.full((1,) * scores.ndim, k, jnp.int32)
    return jnp.moveaxis(_first(scores, takes_part, descending, count), -1, axis)


@public
@_of_whole_rows
def _top_of_each(
    x: ArrayLike, count: ArrayLike, axis: Axis, where: ArrayLike | None = None
) -> Array:
    scores, takes_part, axis = _as_rows(x, axis, where)
    count = jnp.asarray(count)
    check_integers("k", count)
    shape = (*scores.shape[:axis], 1, *scores.shape[axis:-1])
    try:
        count = jnp.broadcast_to(count, shape)
    except ValueError:
        raise ValueError(
            f"k must broadcast to one value per row, shape {shape}, got shape {count.shape}."
        ) from None
    count = jnp.moveaxis(as_counts(count), axis, -1)
    if is_known(scores.shape[-1]) and scores.shape[-1] == 0:
        return jnp.moveaxis(takes_part, -1, axis)
    return jnp.moveaxis(_first(scores, takes_part, _descending(scores), count), -1, axis)


def top_p_mask(
    x: Real[ArrayLike, "*shape"],
    p: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    min_tokens_to_keep: int = 1,
) -> Bool[Array, "*shape"]:
    r"""The nucleus: the smallest set of most probable entries that has probability `p` or more.

    .. math:: \sum_{j \text{ before } i} \mathrm{softmax}(x / t)_j < p

    in the order from the largest score to the smallest.

    Args:
      x: scores of any shape and real dtype. -inf is never kept. NaN counts as +inf.
      p: the probability to reach; a number from 0 to 1 or one value per row. 1 keeps every entry
        that is not -inf; of a row with +inf, all that are +inf.
      axis: one array axis.
      where: which entries take part, such as another mask. The probabilities are computed among
        these.
      temperature: divides the scores. Use the same one as for sampling. A number or one value per
        row, not negative.
      min_tokens_to_keep: the smallest number of entries to keep, among those that are not -inf.

    Returns:
      Booleans of the shape of `x`, of which at least one per row is True unless nothing in the row
      is above -inf. Of equal scores the first are kept.

    Raises:
      TypeError: if `x` or `p` is not real, `where` not boolean or `min_tokens_to_keep` not an
        integer.
      ValueError: if `p` is a number out of range or does not broadcast to one value per row, `axis`
        is not one array axis in range, shapes do not fit, or `temperature` or `min_tokens_to_keep`
        is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3]))
      >>> jsm.top_p_mask(x, 0.75)
      Array([False,  True, False,  True], dtype=bool)
      >>> jsm.top_p_mask(x, 0.85)
      Array([ True,  True, False,  True], dtype=bool)
      >>> jsm.top_p_mask(x, 0.85, temperature=0.5)
      Array([False,  True, False,  True], dtype=bool)

    References:
      Holtzman, Buys, Du, Forbes & Choi, 2020: The curious case of neural text degeneration
      (arXiv:1904.09751).
    """
    _check_fraction(p)
    mask = _top_p_mask(x, p, axis, where, temperature=temperature)
    return _with_at_least(min_tokens_to_keep, mask, x, axis, where)


@public
@_of_whole_rows
def _top_p_mask(
    x: ArrayLike,
    p: ArrayLike,
    axis: Axis,
    where: ArrayLike | None = None,
    *,
    temperature: Temperature = 1.0,
) -> Array:
    x = as_array(x, "x")
    rows = Rows((one_axis(axis, x.ndim),))
    (axis,) = rows.axes
    _, (scores,) = prepare(_nan_on_top(x), axis, Options(where, temperature))
    reach = check_per_row("p", p, scores, rows)
    if scores.shape[axis] == 0:
        return jnp.zeros(scores.shape, bool)
    scores = jnp.moveaxis(lax.stop_gradient(scores), axis, -1)
    reach = jnp.moveaxis(reach, axis, -1)
    descending = _descending(scores)
    (gaps,), _ = _tops.below_top(Rows((scores.ndim - 1,)), (descending,))
    # Weights are not normalized: that would round equal ones, whose sum is an exact count.
    so_far = jnp.cumsum(jnp.exp(gaps), -1)
    enough = reach * so_far[..., -1:]
    # The first entry that reaches it is kept, and all before it.
    short = jnp.sum(so_far < enough, -1, keepdims=True, dtype=jnp.int32)
    # What has underflowed still has some probability.
    all_of_it = jnp.sum(gaps > -jnp.inf, -1, keepdims=True, dtype=jnp.int32)
    count = jnp.where(reach < 1, jnp.minimum(short + 1, all_of_it), all_of_it)
    return jnp.moveaxis(_first(scores, scores > -jnp.inf, descending, count), -1, axis)


def min_p_mask(
    x: Real[ArrayLike, "*shape"],
    p: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    min_tokens_to_keep: int = 1,
) -> Bool[Array, "*shape"]:
    r"""The entries at least `p` times as probable as the most probable one.

    .. math:: (x_i - \max_j x_j) / t \ge \log p

    The probabilities are those of `softmax(x / t)`.

    Args:
      x: scores of any shape and real dtype. -inf is never kept. NaN counts as +inf.
      p: the fraction of the largest probability; a number from 0 to 1 or one value per row. 0 keeps
        every entry with a probability above 0.
      axis: the axes to compare over: array axes, mesh axis names, both in a tuple, or None for all
        array axes.
      where: which entries take part, such as another mask.
      temperature: divides the scores. Use the same one as for sampling. A number or one value per
        row, not negative.
      min_tokens_to_keep: the smallest number of entries to keep, among those that are not -inf. If
        it is more than 1, `axis` must be one array axis.

    Returns:
      Booleans of the shape of `x`. The largest scores are always kept, unless -inf.

    Raises:
      TypeError: if `x` or `p` is not real, `where` not boolean or `min_tokens_to_keep` not an
        integer.
      ValueError: if `p` is a number out of range or does not broadcast to one value per row, an
        axis is out of range, shapes do not fit, or `temperature` or `min_tokens_to_keep` is a
        negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.min_p_mask(jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3])), 0.25)
      Array([False,  True, False,  True], dtype=bool)

    References:
      Nguyen, Baker, Neo, Roush, Kirsch & Shwartz-Ziv, 2024: Turning up the heat
      (arXiv:2407.01082).
    """
    _check_fraction(p)
    mask = _min_p_mask(x, p, axis, where, temperature=temperature)
    return _with_at_least(min_tokens_to_keep, mask, x, axis, where)


@public
def _min_p_mask(
    x: ArrayLike,
    p: ArrayLike,
    axis: Axis,
    where: ArrayLike | None = None,
    *,
    temperature: Temperature = 1.0,
) -> Array:
    rows, scores = prepare(_nan_on_top(as_array(x, "x")), axis, Options(where, temperature))
    scores = (lax.stop_gradient(scores[0]),)
    least = jnp.log(check_per_row("p", p, scores[0], rows))
    gaps, _ = _tops.below_top(rows, scores)

    def keep(gap: Array, least: Array) -> Array:
        return ((gap >= least) | (gap == 0)) & (gap > -jnp.inf)

    return rows.map(keep, [gaps], [least])[0]


def _with_at_least(
    number: int, mask: Array, x: ArrayLike, axis: Axis, where: ArrayLike | None
) -> Array:
    """The mask, or so many of the largest scores where it has fewer."""
    if not is_int(number):
        raise TypeError(f"min_tokens_to_keep must be an integer, got {type(number).__name__}.")
    if number < 0:
        raise ValueError(f"min_tokens_to_keep must not be negative, got {number}.")
    if number <= 1:
        return mask
    possible = jnp.asarray(x) != -jnp.inf
    return mask | (top_k_mask(x, number, axis, where) & possible)


def _check_fraction(p: ArrayLike) -> None:
    if isinstance(p, numbers.Real) and not 0 <= float(p) <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p}.")


def _nan_on_top(scores: Array) -> Array:
    """Scores without NaN. It becomes the largest and is kept, for mappings to be NaN of it."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return lax.stop_gradient(jnp.where(jnp.isnan(scores), jnp.inf, scores))


def _as_rows(x: ArrayLike, axis: Axis, where: ArrayLike | None) -> tuple[Array, Array, int]:
    """The scores, lowest where they take no part, and what takes part, both with `axis` last."""
    scores = jnp.asarray(x)
    check_real("x", scores)
    axis = one_axis(axis, scores.ndim)
    scores = _nan_on_top(scores)
    takes_part = jnp.ones(scores.shape, bool)
    if where is not None:
        takes_part = jnp.broadcast_to(check_mask(where, scores.shape), scores.shape)
        is_float = jnp.issubdtype(scores.dtype, jnp.floating)
        lowest = -jnp.inf if is_float else jnp.iinfo(scores.dtype).min
        scores = jnp.where(takes_part, scores, jnp.asarray(lowest, scores.dtype))
    return jnp.moveaxis(scores, axis, -1), jnp.moveaxis(takes_part, axis, -1), axis


def _descending(scores: Array) -> Array:
    return jnp.flip(jnp.sort(scores, -1), -1)


def _first(scores: Array, takes_part: Array, descending: Array, count: Array) -> Array:
    """The `count` largest scores along the last axis of what takes part, in which they are highest.

    `descending` are the scores in order, or so many of them.
    """
    count = jnp.minimum(count, jnp.sum(takes_part, -1, keepdims=True, dtype=jnp.int32))
    at = jnp.broadcast_to(jnp.maximum(count - 1, 0), (*scores.shape[:-1], 1))
    least = jnp.take_along_axis(descending, at, -1)
    above = takes_part & (scores > least)
    tied = takes_part & (scores == least)
    left = count - jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, -1, dtype=jnp.int32) <= left))
