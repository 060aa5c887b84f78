"""Choosing some of the scores: masks to be given to a mapping as `where`."""

import numbers

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Real

from jaxsoftmax import _threshold
from jaxsoftmax._reductions import Rows
from jaxsoftmax._scores import (
    Axis,
    as_scores,
    check_per_row,
    check_real,
    one_axis,
    public,
    split_axis,
)


@public
def top_k_mask(x: Real[ArrayLike, "*shape"], k: int, axis: Axis = -1) -> Bool[Array, "*shape"]:
    r"""The `k` largest scores: exactly `k`, whatever the ties.

    .. math:: \#\{ j : x_j > x_i \} + \#\{ j < i : x_j = x_i \} < k

    Args:
      x: scores of any shape and real dtype. -inf is a score like any other: where fewer than `k`
        are above it, the first ones of -inf fill up. NaN counts as +inf.
      k: how many to keep, known while tracing. Rows that are not longer are kept whole.
      axis: one array axis.

    Returns:
      Booleans of the shape of `x`. Of equal scores the first are kept.

    Raises:
      TypeError: if `x` is not real or `k` not an integer.
      ValueError: if `k` is negative or `axis` not one array axis in range.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.array([1.0, 3.0, 1.0, 2.0, 1.0])
      >>> jsm.top_k_mask(x, 3)
      Array([ True,  True, False,  True, False], dtype=bool)
      >>> jsm.sparsemax(x, where=jsm.top_k_mask(x, 2), temperature=2)
      Array([0.  , 0.75, 0.  , 0.25, 0.  ], dtype=float32)

    References:
      Fan, Lewis & Dauphin, 2018: Hierarchical neural story generation (arXiv:1805.04833).
    """
    scores = jnp.asarray(x)
    check_real("x", scores)
    axis = one_axis(axis, scores.ndim)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}.")
    if k == 0 or k >= scores.shape[axis]:
        return jnp.full_like(scores, k > 0, bool)
    scores = _nan_on_top(jnp.moveaxis(scores, axis, -1))
    least = lax.top_k(scores, k)[0][..., -1:]
    return jnp.moveaxis(_first(scores, least, jnp.int32(k)), -1, axis)


def top_p_mask(
    x: Real[ArrayLike, "*shape"], p: ArrayLike, axis: Axis = -1
) -> Bool[Array, "*shape"]:
    r"""The nucleus: the smallest set of most probable entries that has probability `p` or more.

    .. math:: \sum_{j \text{ before } i} \mathrm{softmax}(x)_j < p

    in the order from the largest score to the smallest.

    Args:
      x: scores of any shape and real dtype. -inf is never kept. NaN counts as +inf.
      p: the probability to reach; a number from 0 to 1 or one value per row. 1 keeps all that is
        not -inf.
      axis: one array axis.

    Returns:
      Booleans of the shape of `x`, of which at least one per row is True unless all of the row is
      -inf. Of equal scores the first are kept.

    Raises:
      TypeError: if `x` or `p` is not real.
      ValueError: if `p` is a number out of range or does not broadcast to one value per row, or
        `axis` is not one array axis in range.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3]))
      >>> jsm.top_p_mask(x, 0.75)
      Array([False,  True, False,  True], dtype=bool)
      >>> jsm.top_p_mask(x, 0.85)
      Array([ True,  True, False,  True], dtype=bool)

    References:
      Holtzman, Buys, Du, Forbes & Choi, 2020: The curious case of neural text degeneration
      (arXiv:1904.09751).
    """
    _check_fraction(p)
    return _top_p_mask(x, p, axis)


@public
def _top_p_mask(x: ArrayLike, p: ArrayLike, axis: Axis) -> Array:
    scores = as_scores(x)
    axis = one_axis(axis, scores.ndim)
    reach = check_per_row("p", p, scores, Rows((axis,)))
    if scores.shape[axis] == 0:
        return jnp.zeros(scores.shape, bool)
    scores = _nan_on_top(jnp.moveaxis(scores, axis, -1))
    reach = jnp.moveaxis(reach, axis, -1)
    descending = jnp.flip(jnp.sort(scores, -1), -1)
    rows = Rows((scores.ndim - 1,))
    (gaps,), _ = _threshold.below_top(rows, (descending,))
    # Weights are not normalized: that would round equal ones, whose sum is an exact count.
    so_far = jnp.cumsum(jnp.exp(gaps), -1)
    enough = reach * so_far[..., -1:]
    # The first entry that reaches it is kept, and all before it.
    short = jnp.sum(so_far < enough, -1, keepdims=True, dtype=jnp.int32)
    # What has underflowed still has some probability.
    all_of_it = jnp.sum(gaps > -jnp.inf, -1, keepdims=True, dtype=jnp.int32)
    count = jnp.where(reach < 1, jnp.minimum(short + 1, all_of_it), all_of_it)
    least = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), -1)
    return jnp.moveaxis(_first(scores, least, count), -1, axis)


def min_p_mask(
    x: Real[ArrayLike, "*shape"], p: ArrayLike, axis: Axis = -1
) -> Bool[Array, "*shape"]:
    r"""The entries at least `p` times as probable as the most probable one.

    .. math:: x_i - \max_j x_j \ge \log p

    The probabilities are those of `softmax(x)`.

    Args:
      x: scores of any shape and real dtype. -inf is never kept. NaN counts as +inf.
      p: the fraction of the largest probability; a number from 0 to 1 or one value per row. 0
        keeps all that has any probability.
      axis: the axes to compare over: array axes, mesh axis names, both in a tuple, or None for all
        array axes.

    Returns:
      Booleans of the shape of `x`. The largest scores are always kept, unless -inf.

    Raises:
      TypeError: if `x` or `p` is not real.
      ValueError: if `p` is a number out of range or does not broadcast to one value per row, or an
        axis is out of range.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.min_p_mask(jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3])), 0.25)
      Array([False,  True, False,  True], dtype=bool)

    References:
      Nguyen, Baker, Neo, Roush, Kirsch & Shwartz-Ziv, 2024: Turning up the heat
      (arXiv:2407.01082).
    """
    _check_fraction(p)
    return _min_p_mask(x, p, axis)


@public
def _min_p_mask(x: ArrayLike, p: ArrayLike, axis: Axis) -> Array:
    scores = _nan_on_top(as_scores(x))
    rows = Rows(*split_axis(axis, scores.ndim))
    least = jnp.log(check_per_row("p", p, scores, rows))
    gaps, _ = _threshold.below_top(rows, (scores,))

    def keep(gap: Array, least: Array) -> Array:
        return (gap >= least) & (gap > -jnp.inf)

    return rows.map(keep, [gaps], [least])[0]


def _check_fraction(p: ArrayLike) -> None:
    if isinstance(p, numbers.Real) and not 0 <= float(p) <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p}.")


def _nan_on_top(scores: Array) -> Array:
    """Scores without NaN. It becomes the largest and is kept, for mappings to be NaN of it."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return lax.stop_gradient(jnp.where(jnp.isnan(scores), jnp.inf, scores))


def _first(scores: Array, least: Array, count: Array) -> Array:
    """The `count` largest scores along the last axis, given the least of them."""
    above = scores > least
    tied = scores == least
    left = count - jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, -1, dtype=jnp.int32) <= left))
