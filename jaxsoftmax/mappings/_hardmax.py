"""What mappings are at temperature 0, most of them as a limit."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._public import public
from jaxsoftmax._reductions import Entries, Rows, indicator
from jaxsoftmax._scores import Axis, Options, as_returned, prepare
from jaxsoftmax._threshold import Solved, has_form


@has_form(lambda rows, scores: (HARDMAX, ()))
@public
def hardmax(
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
) -> Float[Array, "*shape"]:
    r"""All probability on the largest score: what temperature 0 makes of other mappings.

    .. math:: p_i = [x_i = \max_j x_j] / n, \quad n \text{ the number of such entries}

    It maximizes :math:`\langle p, x \rangle` over the simplex. Its Jacobian is 0.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.

    Returns:
      Probabilities of the shape and dtype of `x`; ties share.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is out of range or `where` does not broadcast.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.hardmax(jnp.array([3.0, 1.0, 3.0]))
      Array([0.5, 0. , 0.5], dtype=float32)

    References:
      Blondel, Martins & Niculae, 2020: Learning with Fenchel-Young losses (arXiv:1901.02324).
    """
    rows, scores = prepare(x, axis, Options(where))
    return as_returned(_threshold.apply(HARDMAX, rows, scores)[0], x, where)


@dataclasses.dataclass(frozen=True, eq=False)
class _Hardmax(Solved):
    def solve(self, rows: Rows, scores: Entries, *params: Array) -> tuple[Array, ...]:
        """The maximum, and the share of each entry there."""
        top = _tops.top_of(rows, scores)
        return top, _threshold.inverse_of(rows.sum(rows.map(_at_top, [scores], [top])))

    def at(self, score: Array, *row: Array) -> Array:
        """The probability of a score."""
        top, by = row
        return _at_top(score, top) * by


def _at_top(score: Array, top: Array) -> Array:
    gap = _tops.gap(score, top)
    return jnp.where(jnp.isnan(gap), gap, indicator(gap == 0, gap.dtype))


HARDMAX = _Hardmax(lambda u: indicator(u >= 0, u.dtype), jnp.zeros_like, slope=jnp.zeros_like)
