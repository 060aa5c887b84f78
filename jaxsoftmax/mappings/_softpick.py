"""Softpick: softmax less what a score of 0 would get."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _tops
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._public import public
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import Axis, Options, as_returned, prepare


@public
def softpick(
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""A softmax that may give 0 to every entry: only positive scores get a share.

    .. math:: p_i = \frac{\max(e^{x_i / t} - 1, 0)}{\sum_j |e^{x_j / t} - 1|}

    A negative score gets 0, but it makes the shares of the others smaller: a row sums to at most 1.
    A row of zeros gets 0. Jacobian in `x/t`: :math:`\mathrm{diag}(\max(s, 0)) - p s^\top`, with
    :math:`s_i = \mathrm{sign}(x_i) e^{x_i / t} / \sum_j |e^{x_j / t} - 1|`. The function has a kink
    at a score of 0; the slope there is taken as 0.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`. The others are not in
        the denominator either, and nor are scores of -inf.
      temperature: divides the scores; a number or one value per row, not negative. At 0 it is
        `hardmax`. If no score is positive, that is not the limit: at small temperatures, such a
        row gets 0.

    Returns:
      Non-negative numbers of the shape and dtype of `x`. Each row sums to at most 1.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if an axis is out of range, shapes do not fit, or `temperature` is a negative
        number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> jsm.softpick(jnp.array([2.0, 1.0, -1.0]))
      Array([0.731, 0.197, 0.   ], dtype=float32)
      >>> jsm.softpick(jnp.array([0.0, -1.0]))
      Array([0., 0.], dtype=float32)

    References:
      Zuhri, Fuadi & Aji, 2025: Softpick (arXiv:2504.20966).
    """
    options = Options(where, temperature)
    rows, scores = prepare(x, axis, options, at_zero=lambda top: jnp.full_like(top, jnp.inf))
    p, _ = _shares_and_slopes(rows, scores)
    return as_returned(p[0], x, where)


@custom_vjp
def _shares_and_slopes(rows: Rows, scores: Entries) -> tuple[Entries, Entries]:
    """The shares `p` and, from the same denominator, the signed exponentials `s`.

    With `D = sum(s dz)` they change by `dp = max(s, 0) dz - p D` and `ds = s dz - s D`, and so have
    all derivatives between them.
    """
    scores = rows.map(_as_finite, [scores])
    pivot = jnp.maximum(_tops.pivot(rows, scores, rows.max(scores)), 0)

    def excess(score: Array, pivot: Array) -> Array:
        # (exp(score) - 1) exp(-pivot); far from 0 nothing cancels.
        near = jnp.expm1(jnp.minimum(score, 1)) * jnp.exp(-pivot)
        far = jnp.exp(score - pivot) - jnp.exp(-pivot)
        return jnp.where(score == -jnp.inf, 0, jnp.where(score < 1, near, far))

    excesses = rows.map(excess, [scores], [pivot])
    total = rows.sum(rows.map(jnp.abs, [excesses]))
    total = jnp.where(total == 0, 1, total)

    def share(excess: Array, total: Array) -> Array:
        return jnp.maximum(excess, 0) / total

    def slope(score: Array, excess: Array, pivot: Array, total: Array) -> Array:
        return jnp.sign(excess) * jnp.exp(score - pivot) / total

    return (
        rows.map(share, [excesses], [total]),
        rows.map(slope, [scores, excesses], [pivot, total]),
    )


def _as_finite(score: Array) -> Array:
    """+inf as the largest number, and that as the next: infinite scores have the row to themselves.

    Not by a minimum, which may lose NaN: XLA for CPU does, in some shapes.
    """
    largest = jnp.finfo(score.dtype).max
    finite = jnp.where(score == largest, jnp.nextafter(largest, jnp.zeros_like(largest)), score)
    return jnp.where(score == jnp.inf, largest, finite)


def _fwd(rows: Rows, scores: Entries) -> tuple[tuple[Entries, Entries], Any]:
    p, slopes = _shares_and_slopes(rows, scores)
    return (p, slopes), (rows, p, slopes)


def _bwd(residuals: Any, cts: tuple[Entries, Entries]) -> tuple[None, Entries]:
    rows, p, slopes = residuals

    def weighed(p: Array, slope: Array, ct_p: Array, ct_slope: Array) -> Array:
        return ct_p * p + ct_slope * slope

    def pull_back(slope: Array, ct_p: Array, ct_slope: Array, total: Array) -> Array:
        return ct_p * jnp.where(slope > 0, slope, 0) + slope * (ct_slope - total)

    total = rows.sum(rows.map(weighed, [p, slopes, *cts]))
    return None, rows.map(pull_back, [slopes, *cts], [total])


_shares_and_slopes.defvjp(_fwd, _bwd)
