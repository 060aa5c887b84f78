"""The logarithm of softmax, and that of its denominator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import log1p
from jaxsoftmax._implementations import Implementation, platforms
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._platforms import chosen
from jaxsoftmax._public import public
from jaxsoftmax._reductions import Entries, Rows, indicator
from jaxsoftmax._row_choice import batched_in_kernels, by_implementation
from jaxsoftmax._scores import Axis, Options, as_stored, divided_by_zero, output_dtype, prepare


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
    implementation: Implementation | None = None,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `softmax`. It is accurate even if one score dominates.

    .. math:: \log p_i = x_i / t - \log \sum_j e^{x_j / t}

    Jacobian in `x/t`: :math:`I - 1 p^\top`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`. The others get -inf.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one more score in each row, added after the division by the temperature. Its share is
        dropped. A number or one value per row.
      segment_ids: integers, as many as `axis` is long. Scores with the same number form one row.
        Ids out of range take no part.
      num_segments: how many segments there are; needed if `segment_ids` is traced.
      implementation: what computes it: None or "xla", or "pallas", which is a kernel on a TPU and
        XLA elsewhere. It was compiled for TPUs and has not run on one.

    Returns:
      Log-probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number.

    Example:
      The probability of the first class is 1 - 2.9e-20, which float32 rounds to 1. Its logarithm
      is not rounded to 0.

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> log_p = jsm.log_softmax(jnp.array([45.0, 0.0]))
      >>> print(f"{log_p[0]:.4e}")
      -2.8625e-20

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
    """
    options = Options(where, temperature, sink, segment_ids, num_segments, implementation)
    rows, scores = prepare(x, axis, options)
    rows = as_stored(rows, x, options)
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
    r"""The logarithm of the sum of the exponentials: a smooth maximum.

    .. math:: \log \sum_i e^{x_i / t}

    The gradient in `x/t` is `softmax(x, temperature=t)`. The result is not multiplied by the
    temperature: the smooth maximum at temperature `t` is `t * logsumexp(x, temperature=t)`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one more score in each row, added after the division by the temperature. It counts
        in the sum. A number or one value per row.
      segment_ids: integers, as many as `axis` is long. Scores with the same number form one row.
        Ids out of range take no part.
      num_segments: how many segments there are; needed if `segment_ids` is traced.

    Returns:
      One value per row, in the dtype of `x`. It is -inf for a row in which no entry takes part.
      With segments, `axis` has the length `num_segments`.

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
    rows = as_stored(rows, x, options)
    return rows.flatten(log_sum(rows, scores)).astype(output_dtype(x))


class Logs(NamedTuple):
    """What log-softmax is made of: each score less the maximum, less a logarithm.

    Attributes:
      scores: the scores.
      top: the maximum, finite in a row in which nothing takes part.
      log: the logarithm of the sum of the exponentials of the scores less the maximum.
    """

    scores: Entries
    top: Array
    log: Array


def log_probabilities(rows: Rows, scores: Entries) -> Entries:
    """Log-softmax of prepared scores."""
    if platforms(rows.implementation, "rows"):
        return _in_kernels(rows, scores)
    return _log(rows, _logs(rows, lax.stop_gradient(scores))._replace(scores=scores))


def _logs(rows: Rows, scores: Entries) -> Logs:
    total = total_of(rows, scores)
    return Logs(scores, total.top, total.log)


def _less_log(rows: Rows, logs: Logs) -> Entries:
    def log_p(score: Array, top: Array, log: Array) -> Array:
        return _tops.gap(score, top) - log

    return rows.map(log_p, [rows.rounded(logs.scores)], [logs.top, logs.log])


@custom_vjp
def _log(rows: Rows, logs: Logs) -> Entries:
    """The logarithms of the probabilities, with the derivative of log-softmax in the scores.

    What is the same for a row counts as a constant: its part is in the rule.
    """
    return _less_log(rows, logs)


def _log_fwd(rows: Rows, logs: Logs) -> tuple[Entries, Any]:
    return _log(rows, logs), (rows, logs)


def _log_bwd(point: tuple[Rows, Logs], ct: Entries) -> tuple[None, Logs]:
    of_scores = _pulled_by(point, ct)
    _, logs = point
    return None, Logs(of_scores, jnp.zeros_like(logs.top), jnp.zeros_like(logs.log))


_log.defvjp(_log_fwd, _log_bwd)


def _pulled_by(point: tuple[Rows, Logs], ct: Entries) -> Entries:
    """The cotangents of scores, given those of the logarithms of probabilities."""
    fast, slow = (functools.partial(_threshold.of_shares, p) for p in (_by_platform, _pulled_back))
    return linear_pair(fast, _pushed_forward, point, ct, reference=slow)


def _by_platform(point: tuple[Rows, Logs], ct: Entries) -> Entries:
    rows, logs = point
    general = functools.partial(_pulled_back_at_once, rows)
    return chosen("log_pulled_back", general, logs, ct, rows=rows, logs_of=_logs)


def _pulled_back_at_once(rows: Rows, logs: Logs, ct: Entries) -> Entries:
    """What `_pulled_back` returns, by one pass for the sums, which needs no exponentials.

    What dominates its row has the maximum, and the shares of all others add up to `1 - 1 / sum`.
    """

    def terms(score: Array, ct: Array, top: Array) -> tuple[Array, Array]:
        gap = _tops.gap(score, top)
        ct = jnp.where(gap > -jnp.inf, ct, 0)
        return ct, jnp.where(gap < 0, ct, 0)

    def pulled(score: Array, ct: Array, top: Array, log: Array, total: Array, left: Array) -> Array:
        gap = _tops.gap(score, top)
        dominates = (gap >= 0) & (log < _HALF)
        of_score = jnp.where(dominates, -left, ct - jnp.exp(gap - log) * total)
        return jnp.where(gap == -jnp.inf, 0, of_score)

    total, others = rows.sums(terms, [rows.rounded(logs.scores), ct], [logs.top])
    left = others + jnp.expm1(-logs.log) * total
    values = [logs.top, logs.log, total, left]
    return rows.map(pulled, [rows.rounded(logs.scores), ct], values)


# Of a row in which the maximum has more than half.
_HALF = math.log(2)


def _pulled_back(point: tuple[Rows, Logs], ct: Entries) -> Entries:
    """`ct - p sum(ct)`, of which the entry that dominates is minus the sum of the others."""
    rows, log_p, p = _probabilities(point)
    dominates = _tops.dominating(rows, p)
    ct = rows.map(lambda c, lp: jnp.where(lp == -jnp.inf, 0, c), [ct, log_p])
    others = rows.map(lambda c, p, d, s: (1 - d) * (c - p * s), [ct, p, dominates], [rows.sum(ct)])
    return rows.map(lambda c, d, s: c - d * s, [others, dominates], [rows.sum(others)])


def _pushed_forward(point: tuple[Rows, Logs], tangents: Entries) -> Entries:
    """`dz - sum(p dz)`, 0 where no score takes part."""
    rows, log_p, p = _probabilities(point)
    relative = _tops.relative_to_dominating(rows, p, tangents)
    mean = rows.sum(rows.map(jnp.multiply, [p, relative]))
    return rows.map(
        lambda dz, lp, m: jnp.where(lp == -jnp.inf, 0, dz - m), [relative, log_p], [mean]
    )


def _probabilities(point: tuple[Rows, Logs]) -> tuple[Rows, Entries, Entries]:
    rows, logs = point
    log_p = _log(rows, logs)
    return rows, log_p, rows.map(jnp.exp, [log_p])


@custom_vjp
def _log_in_kernels(rows: Rows, scores: Entries) -> Entries:
    """Log-softmax of prepared scores, by kernels."""
    return by_implementation(lambda rows, z: _less_log(rows, _logs(rows, z)), rows, scores)


def _log_in_kernels_fwd(rows: Rows, scores: Entries) -> tuple[Entries, Any]:
    log_p = _in_kernels(rows, scores)
    of_top = rows.max(lax.stop_gradient(log_p))
    log = jnp.where(of_top == -jnp.inf, 0, -of_top)
    return log_p, (rows, Logs(scores, _tops.top_of(rows, lax.stop_gradient(scores)), log))


def _log_in_kernels_bwd(point: tuple[Rows, Logs], ct: Entries) -> tuple[None, Entries]:
    return None, _pulled_by(point, ct)


_log_in_kernels.defvjp(_log_in_kernels_fwd, _log_in_kernels_bwd)
_in_kernels = batched_in_kernels(_log_in_kernels, 0)


@custom_vjp
def log_sum(rows: Rows, scores: Entries) -> Array:
    """Log-sum-exp of prepared scores, one value per row."""
    return _log_sum_and_shares(rows, scores)[0]


def _log_sum_fwd(rows: Rows, scores: Entries) -> tuple[Array, Any]:
    log, p = _log_sum_and_shares(rows, scores)
    return log, (rows, p)


def _log_sum_bwd(residuals: Any, ct: Array) -> tuple[None, Entries]:
    rows, p = residuals
    ct_scores = rows.map(jnp.multiply, [p], [rows.summed_cotangent(ct)])
    return None, rows.shared_cotangents(ct_scores)


log_sum.defvjp(_log_sum_fwd, _log_sum_bwd)


@custom_vjp
def _log_sum_and_shares(rows: Rows, scores: Entries) -> tuple[Array, Entries]:
    """Log-sum-exp, and its gradient, which is softmax."""
    total = total_at_once(rows, scores)

    def share(score: Array, top: Array, log: Array) -> Array:
        return jnp.exp(_tops.gap(score, top) - log)

    p = rows.map(share, [rows.rounded(scores)], [total.top, total.log])
    return jnp.where(total.sum == 0, -jnp.inf, total.top + total.log), p


def _log_sum_and_shares_fwd(rows: Rows, scores: Entries) -> tuple[tuple[Array, Entries], Any]:
    log, p = _log_sum_and_shares(rows, scores)
    return (log, p), (rows, p)


def _log_sum_and_shares_bwd(residuals: Any, ct: tuple[Array, Entries]) -> tuple[None, Entries]:
    rows, p = residuals
    ct_log, ct_p = rows.summed_cotangent(ct[0]), rows.summed_cotangents(ct[1])
    of_p = _threshold.softmax_jacobian((rows, p), ct_p)
    ct_scores = rows.map(lambda p, c, ct_log: c + p * ct_log, [p, of_p], [ct_log])
    return None, rows.shared_cotangents(ct_scores)


_log_sum_and_shares.defvjp(_log_sum_and_shares_fwd, _log_sum_and_shares_bwd)


class Total(NamedTuple):
    """The sum of exponentials of each row, as row values.

    Attributes:
      top: the maximum, finite in a row in which nothing takes part.
      sum: the sum of the exponentials of the scores less the maximum; 0 in such a row.
      log: its logarithm; 0 in such a row.
    """

    top: Array
    sum: Array
    log: Array


def total_of(rows: Rows, scores: Entries) -> Total:
    """The sum of exponentials, of which the maxima count 1 each and are kept apart.

    Where one score dominates, all the digits of the answer are in the sum of the others.
    """

    def relative_to(score: Array, top: Array, pivot: Array) -> tuple[Array, Array]:
        at_top = _tops.gap(score, top) == 0
        weight = jnp.where(at_top, 0, jnp.exp(score - pivot))
        return weight, indicator(at_top, weight.dtype)

    def terms(score: Array, top: Array) -> tuple[Array, Array]:
        return relative_to(score, top, top)

    # A second use of the scores: four kernels more on a GPU.
    def exactly(sums: Callable[..., Any], top: Array) -> tuple[Array, Array]:
        pivot = _tops.pivot(rows, scores, top)
        others, tops = sums(relative_to, (top, pivot))
        return others * jnp.exp(_tops.gap(pivot, top)), tops

    top = _tops.top_of(rows, scores)
    others, tops = rows.sums(terms, [rows.rounded(scores)], [top], exactly)
    total = tops + others
    # 1 is taken from what is there: a row in which nothing takes part has neither.
    return Total(top, total, log1p(others + (tops - jnp.minimum(total, 1))))


def total_at_once(rows: Rows, scores: Entries) -> Total:
    """What `total_of` returns, in one pass where a platform takes maximum and sum together.

    Log-softmax does without: a GPU makes one kernel of its three passes.
    """

    def at_once(scores: Entries) -> Total:
        top, others = rows.top_and_others(scores)
        none = top == -jnp.inf
        total, log = (jnp.where(none, 0, x) for x in (1 + others, log1p(others)))
        return Total(jnp.where(none, jnp.finfo(top.dtype).min, top), total, log)

    in_two = functools.partial(total_of, rows)
    if not rows.can_be_joined(scores[0]):
        return in_two(scores)
    return chosen("log_total", at_once, scores, in_two=in_two)
