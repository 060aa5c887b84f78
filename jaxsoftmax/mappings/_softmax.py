"""Softmax: its exponentials, none of which overflows, and its form."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._implementations import Implementation
from jaxsoftmax._public import public
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import Axis, Options, as_returned, prepare
from jaxsoftmax._threshold import Solved, has_form


@has_form(lambda rows, scores: (SOFTMAX, ()))
@public
def softmax(
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
    segment_ids: Integer[ArrayLike, " length"] | None = None,
    num_segments: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*shape"]:
    r"""The exponentials of the scores, divided by their sum: every probability is positive.

    .. math:: p_i = \frac{e^{x_i / t}}{\sum_j e^{x_j / t}}

    It maximizes :math:`\langle p, x/t \rangle + H(p)` over the simplex, with Shannon's entropy
    :math:`H`. Jacobian in `x/t`: :math:`\mathrm{diag}(p) - p p^\top`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one more score in each row, added after the division by the temperature. Its share is
        dropped. A number or one value per row. With a sink of 0 it is softmax-one.
      segment_ids: integers, as many as `axis` is long. Scores with the same number form one row.
        Ids out of range take no part.
      num_segments: how many segments there are; needed if `segment_ids` is traced.
      implementation: what computes it: None or "xla", or "pallas", which is a kernel on a TPU and
        XLA elsewhere. It was compiled for TPUs and has not run on one.

    Returns:
      Probabilities of the shape and dtype of `x`. Tiny ones are accurate, too.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> jsm.softmax(jnp.array([0.0, 1.0, 2.0]))
      Array([0.09 , 0.245, 0.665], dtype=float32)
      >>> jsm.softmax(jnp.array([0.0, 1.0, 2.0]), temperature=0.5)
      Array([0.016, 0.117, 0.867], dtype=float32)
      >>> jsm.softmax(jnp.zeros(3), sink=0.0)
      Array([0.25, 0.25, 0.25], dtype=float32)
      >>> jsm.softmax(jnp.zeros(5), segment_ids=jnp.array([0, 0, 1, 1, 1]), num_segments=2)
      Array([0.5  , 0.5  , 0.333, 0.333, 0.333], dtype=float32)

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
      Sinks: Miller, 2023: Attention is off by one; Xiao et al., 2023 (arXiv:2309.17453).
    """
    options = Options(where, temperature, sink, segment_ids, num_segments, implementation)
    rows, scores = prepare(x, axis, options)
    return as_returned(_threshold.apply(SOFTMAX, rows, scores)[0], x, where)


@dataclasses.dataclass(frozen=True, eq=False)
class _Softmax(Solved):
    only_scales = True

    def probabilities(self, rows: Rows, scores: Entries, *params: Array) -> Entries:
        """The exponentials over their sum.

        Of arithmetic alone XLA for CPU, too, makes one pass, and of a select or a clamp it does
        not. So scores of +inf are bounded by a minimum, which also rounds scores that are products;
        XLA for CPU loses a NaN that comes first in it. And the maximum is bounded by minus a
        maximum: XLA makes a clamp of a minimum that a maximum follows.
        """
        largest = jnp.finfo(scores[0].dtype).max
        top = -jnp.maximum(-rows.max(scores), -largest)
        shift = _tops.pivot(rows, scores, top)
        weights = rows.map(lambda z, t, s: jnp.exp(jnp.minimum(t, z) - s), [scores], [top, shift])
        return _threshold.normalized(rows, weights)

    def before_sum(self, rows: Rows, scores: Entries) -> tuple[Array, Array]:
        """What `solve` returns, but with 1 for what weights are multiplied by."""
        largest = float(jnp.finfo(scores[0].dtype).max)
        top = rows.max(rows.map(_as_number, [scores]), least=-largest)
        return top, jnp.ones_like(top)

    def solve(self, rows: Rows, scores: Entries, *params: Array) -> tuple[Array, ...]:
        """The maximum, and what exponentials below it are multiplied by."""
        top, _ = self.before_sum(rows, scores)
        return top, _threshold.inverse_of(rows.sum(rows.map(_exp_below, [scores], [top])))

    def at(self, score: Array, *row: Array) -> Array:
        """The probability of a score."""
        top, by = row
        return _exp_below(score, top) * by


def _exp_below(score: Array, top: Array) -> Array:
    return jnp.exp(_as_number(score) - top)


def _as_number(score: Array) -> Array:
    """The score, and the largest number in place of +inf."""
    return jnp.minimum(score, jnp.finfo(score.dtype).max)


SOFTMAX = _Softmax(jnp.exp, jnp.log, slope=lambda p: p)
