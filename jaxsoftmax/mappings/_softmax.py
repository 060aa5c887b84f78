"""Softmax, its logarithm, and the logarithm of its denominator."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax import _threshold
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import exp, log, two_sum
from jaxsoftmax._reductions import (
    EXACT,
    Entries,
    Rows,
    add_exactly,
    indicator,
    is_known,
    of_stored,
    on_local_cpu_or_else,
)
from jaxsoftmax._scores import (
    Axis,
    Options,
    divided_by_zero,
    known_number,
    output_dtype,
    prepare,
    public,
)
from jaxsoftmax._threshold import Form, has_form


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
) -> Float[Array, "*shape"]:
    r"""The exponentials of the scores, normalized: positive, dense probabilities.

    .. math:: p_i = \frac{e^{x_i / t}}{\sum_j e^{x_j / t}}

    It maximizes :math:`\langle p, x/t \rangle + H(p)` over the simplex, with Shannon's entropy
    :math:`H`. Jacobian in `x/t`: :math:`\mathrm{diag}(p) - p p^\top`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: what takes part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one virtual score, joined to each row after the division by the temperature, whose
        share is dropped; a number or one value per row. 0 makes `softmax` softmax-one.
      segment_ids: integers, the length of `axis`: scores of the same number are one row. Ids out
        of range take no part.
      num_segments: how many segments there are; needed where `segment_ids` is traced.

    Returns:
      Probabilities of the shape and dtype of `x`. They are accurate also where they are tiny.

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
    options = Options(where, temperature, sink, segment_ids, num_segments)
    rows, scores = prepare(x, axis, options)
    dtype = output_dtype(x)
    is_plain = known_number(temperature) == 1 and sink is None
    if jnp.finfo(dtype).bits == 16 and is_plain and not rows.are_shared(scores[0]):
        # The scores are still those that came, and lose nothing.
        return _softmax_in_half_precision(rows, (scores[0].astype(dtype),))[0]
    return _threshold.apply(SOFTMAX, rows, scores)[0].astype(dtype)


@public
def log_softmax(
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
    segment_ids: Integer[ArrayLike, " length"] | None = None,
    num_segments: int | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `softmax`, exact also where one score dominates.

    .. math:: \log p_i = x_i / t - \log \sum_j e^{x_j / t}

    Jacobian in `x/t`: :math:`I - 1 p^\top`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: what takes part; a boolean mask that broadcasts to `x`. The rest gets -inf.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one virtual score, joined to each row after the division by the temperature, whose
        share is dropped; a number or one value per row. 0 makes `softmax` softmax-one.
      segment_ids: integers, the length of `axis`: scores of the same number are one row. Ids out
        of range take no part.
      num_segments: how many segments there are; needed where `segment_ids` is traced.

    Returns:
      Log-probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number.

    Example:
      The probability of the first class is 1 - 2.9e-20, and its logarithm says so.

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> log_p = jsm.log_softmax(jnp.array([45.0, 0.0]))
      >>> print(f"{log_p[0]:.4e}")
      -2.8625e-20

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
    """
    options = Options(where, temperature, sink, segment_ids, num_segments)
    rows, scores = prepare(x, axis, options)
    return log_probabilities(rows, scores)[0].astype(output_dtype(x))


@public
def logsumexp(
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
    segment_ids: Integer[ArrayLike, " length"] | None = None,
    num_segments: int | None = None,
) -> Float[Array, "*rows"]:
    r"""The logarithm of the sum of exponentials, the smooth maximum behind `softmax`.

    .. math:: \log \sum_i e^{x_i / t}

    The gradient in `x/t` is `softmax(x, temperature=t)`. Nothing is multiplied back: the smooth
    maximum at temperature `t` is `t * logsumexp(x, temperature=t)`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: what takes part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one virtual score, joined to each row after the division by the temperature, whose
        share is dropped; a number or one value per row. 0 makes `softmax` softmax-one.
      segment_ids: integers, the length of `axis`: scores of the same number are one row. Ids out
        of range take no part.
      num_segments: how many segments there are; needed where `segment_ids` is traced.

    Returns:
      One value per row, in the dtype of `x`; -inf for a row in which nothing takes part. With
      segments, `axis` has the length `num_segments`.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.logsumexp(jnp.array([1000.0, 1000.0])).round(2)
      Array(1000.69, dtype=float32)

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
    """
    options = Options(where, temperature, sink, segment_ids, num_segments)
    rows, scores = prepare(x, axis, options, at_zero=divided_by_zero)
    return rows.flatten(log_sum(rows, scores)).astype(output_dtype(x))


def pivot(rows: Rows, scores: Entries) -> Array:
    """What to subtract from scores before `exp`, such that the differences are exact.

    A rounding error in `score - top` is an error of the same size in the logarithm of the
    probability: 64 ulp where the difference is 80. Here it is a whole number, so near to the
    maximum that no sum overflows and so far from it that next to no score that matters falls
    below it. The difference of a score above it is exact.
    """
    finfo = jnp.finfo(scores[0].dtype)
    room = math.floor(math.log(float(finfo.max)) - 2 - math.log(max(rows.length(scores), 1)))
    top = rows.max(scores)
    # Where whole numbers get sparse, a maximum less the room would be rounded to far below that.
    room = jnp.floor(jnp.minimum(_LARGE * room / jnp.maximum(top, 1), room))
    below = jnp.floor(top) - room
    return jnp.maximum(jnp.maximum(below, jnp.minimum(jnp.ceil(top), 0)), finfo.min)


_LARGE = 2.0**20


def as_finite(score: Array) -> Array:
    """+inf as the largest number, and that as the next: infinite scores have the row to themselves.

    Not by a minimum, which may lose NaN: XLA for CPU does, in some shapes. (Nor is what is selected
    left unrounded, as `of_stored` says of products.)
    """
    largest = jnp.finfo(score.dtype).max
    finite = jnp.where(score == largest, jnp.nextafter(largest, jnp.zeros_like(largest)), score)
    return jnp.where(score == jnp.inf, largest, finite)


def _softmax_probabilities(rows: Rows, scores: Entries) -> Entries:
    without = functools.partial(_shares_of_exp, rows)
    return _unless_infinite(rows, without, functools.partial(_with_infinities, rows), scores)


def _shares_of_exp(rows: Rows, scores: Entries) -> tuple[Entries, Array]:
    """The exponentials over their sum, and the sum."""
    shift = pivot(rows, scores)
    weights = rows.map(lambda z, s: jnp.exp(z - s), [scores], [shift])
    total = _total(rows, weights)
    return _threshold.normalized(rows, weights, total), total


def _with_infinities(rows: Rows, scores: Entries) -> Entries:
    return _shares_of_exp(rows, rows.map(as_finite, [scores]))[0]


def _total(rows: Rows, weights: Entries) -> Array:
    if jnp.finfo(weights[0].dtype).bits == 32:
        return rows.sum_in_parts(weights)
    # XLA for CPU adds float64 one by one, with an error that grows with the row.
    return rows.exact_sum(weights)


def _unless_infinite(
    rows: Rows,
    without: Callable[[Entries], tuple[Entries, Array]],
    with_infinities: Callable[[Entries], Entries],
    scores: Entries,
) -> Entries:
    """The first function's probabilities, or the second's if those are not numbers.

    To look at each score for +inf takes XLA for CPU half as long again, and so it is told from the
    result, which is NaN in such a row.

    Args:
      rows: the rows of `scores`.
      without: gives probabilities and the sums of weights, if no score is +inf.
      with_infinities: gives probabilities.
      scores: the scores.
    """

    def attempt(scores: Entries) -> tuple[Entries, Array]:
        p, total = without(scores)
        return p, jnp.any(jnp.isnan(rows.witness(p, total)))

    def at_once(scores: Entries) -> Entries:
        p, failed = of_stored(attempt, scores)

        def again(_: Any) -> tuple[Array, Entries]:
            return jnp.zeros_like(failed), with_infinities(scores)

        # At most one turn: a `cond` would go both ways under `vmap`.
        return lax.while_loop(lambda state: state[0], again, (failed, p))[1]

    size = scores[0].size
    is_small = is_known(size) and size < _SMALL
    if is_small or rows.are_shared(scores[0]):  # devices had better agree on one sum
        return with_infinities(scores)
    return on_local_cpu_or_else(at_once, with_infinities, scores)


# As measured: below, a second look takes less time than to decide on one.
_SMALL = 2**16


def _start(rows: Rows, scores: Entries) -> tuple[Array, Array]:
    largest = float(jnp.finfo(scores[0].dtype).max)
    top = rows.max(rows.map(_as_number, [scores]), least=-largest)
    return top, jnp.ones_like(top)


def _solve(rows: Rows, scores: Entries) -> tuple[Array, Array]:
    top, _ = _start(rows, scores)
    return top, _threshold.inverse_of(rows.sum(rows.map(_exp_below, [scores], [top])))


def _weight(score: Array, top: Array, by: Array) -> Array:
    return _exp_below(score, top) * by


def _exp_below(score: Array, top: Array) -> Array:
    return jnp.exp(_as_number(score) - top)


def _as_number(score: Array) -> Array:
    """The score, and the largest number in place of +inf."""
    return jnp.minimum(score, jnp.finfo(score.dtype).max)


class _Softmax(Form):
    def probabilities(self, rows: Rows, scores: Entries, *params: Array) -> Entries:
        return _softmax_probabilities(rows, scores)


SOFTMAX = _Softmax(
    _solve,
    _weight,
    slope=lambda p: p,
    slopes_sum_to_one=True,
    start=_start,
    origin=lambda top, by: top - jnp.log(by),
)


@custom_vjp
def _softmax_in_half_precision(rows: Rows, scores: Entries) -> Entries:
    """Softmax of scores in half precision, rounded once.

    Their differences are exact in float32, or nearly so, and so nothing keeps XLA from fusing all
    of it: no float32 array is written.
    """

    def without(scores: Entries) -> tuple[Entries, Array]:
        top = jnp.maximum(rows.max(scores), jnp.finfo(scores[0].dtype).min)
        weights = rows.map(lambda z, t: jnp.exp(_widened(z) - _widened(t)), [scores], [top])
        total = rows.sum(weights)
        p = _threshold.normalized(rows, weights, total)
        return rows.map(lambda p, z: p.astype(z.dtype), [p, scores]), total

    def with_infinities(scores: Entries) -> Entries:
        p = _with_infinities(rows, rows.map(_widened, [scores]))
        return rows.map(lambda p, z: p.astype(z.dtype), [p, scores])

    return _unless_infinite(rows, without, with_infinities, scores)


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32)


def _half_fwd(rows: Rows, scores: Entries) -> tuple[Entries, Any]:
    # The probabilities are computed once more: to keep them in float32 would take twice the memory.
    return _softmax_in_half_precision(rows, scores), (rows, scores)


def _half_bwd(residuals: Any, ct: Entries) -> tuple[None, Entries]:
    rows, scores = residuals
    p = _softmax_of_widened(rows, scores)
    _, ct_scores = _threshold.apply_bwd(SOFTMAX, (rows, p, ()), rows.map(_widened, [ct]))
    return None, rows.map(lambda dz, c: dz.astype(c.dtype), [ct_scores, ct])


def _softmax_of_widened(rows: Rows, scores: Entries) -> Entries:
    return _threshold.apply(SOFTMAX, rows, rows.map(_widened, [scores]))


_softmax_in_half_precision.defvjp(_half_fwd, _half_bwd)


@custom_vjp
def log_probabilities(rows: Rows, scores: Entries) -> Entries:
    """Log-softmax of prepared scores."""
    top, log_sum = top_and_log_sum(rows, scores)

    def log_p(score: Array, top: Array, log_sum: Array) -> Array:
        gap, lost = exact_gap(score, top)
        absent = (gap == -jnp.inf) & ~jnp.isnan(log_sum)
        return jnp.where(absent, gap, gap + (lost - log_sum))

    return rows.map(log_p, [scores], [top, log_sum])


def _log_fwd(rows: Rows, scores: Entries) -> tuple[Entries, Any]:
    log_p = log_probabilities(rows, scores)
    return log_p, (rows, log_p)


def _log_bwd(residuals: Any, ct: Entries) -> tuple[None, Entries]:
    rows, log_p = residuals
    ct = rows.map(lambda c, lp: jnp.where(lp == -jnp.inf, 0, c), [ct, log_p])
    return None, rows.map(lambda c, lp, s: c - jnp.exp(lp) * s, [ct, log_p], [rows.sum(ct)])


log_probabilities.defvjp(_log_fwd, _log_bwd)


@custom_vjp
def log_sum(rows: Rows, scores: Entries) -> Array:
    """Log-sum-exp of prepared scores, one value per row."""
    top, log_sum_of_gaps = top_and_log_sum(rows, scores)
    return top + log_sum_of_gaps


def _log_sum_fwd(rows: Rows, scores: Entries) -> tuple[Array, Any]:
    return log_sum(rows, scores), (rows, _threshold.apply(SOFTMAX, rows, scores))


def _log_sum_bwd(residuals: Any, ct: Array) -> tuple[None, Entries]:
    rows, p = residuals
    return None, rows.map(jnp.multiply, [p], [ct])


log_sum.defvjp(_log_sum_fwd, _log_sum_bwd)


def exact_gap(score: Array, top: Array) -> tuple[Array, Array]:
    """The score less the maximum, and what rounding took from that."""
    _, lost = two_sum(score, -top)
    gap = _threshold.gap(score, top)
    return gap, jnp.where(jnp.isfinite(lost) & (gap < 0), lost, 0)


def top_and_log_sum(rows: Rows, scores: Entries) -> tuple[Array, Array]:
    """The maximum, and the log-sum-exp of the scores less the maximum, to the last digits.

    The maxima count 1 each and are kept apart: where one score dominates, all the digits of the
    answer are in the sum of the others.
    """

    # Gaps are computed where they are used, thrice: to hold them in memory would take longer.
    def terms(score: Array, top: Array) -> tuple[Array, Array]:
        at_top = score == top
        below = jnp.where(at_top, 0, exp(*two_sum(score, -top), lift=LIFT))
        return below, indicator(at_top, below.dtype)

    top = _threshold.top_of(rows, scores)
    below, lost, tops = rows.sums(terms, [scores], [top], EXACT)
    return top, log_of_lifted(tops, below, lost)


def log_of_lifted(first: Array, others: Array, lost: Array) -> Array:
    """The logarithm of `first` and a sum that was lifted, with what rounding took from that."""
    others, lost = (x * 2.0**-LIFT for x in (others, lost))
    return log(*add_exactly((first, lost), (others, jnp.zeros_like(others))))


# Of exponentials that are added exactly: what rounding takes from e^-80 is too small for float32.
LIFT = 64
