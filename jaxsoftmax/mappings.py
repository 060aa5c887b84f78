"""Mappings from scores to probabilities.

All are `mapping(x, axis=-1, where=None, ...)` and keep these promises: the dtype that came goes
out, half precision being computed in float32 and rounded once; what `where` excludes and what is
-inf has probability exactly 0 and gradient exactly 0; entries of +inf share their row; a row in
which nothing takes part is all 0; NaN among what takes part makes its row NaN; temperature 0 is
`hardmax`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxsoftmax import _threshold
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import Rows, indicator
from jaxsoftmax._scores import Axis, output_dtype, prepare, public
from jaxsoftmax._threshold import Form


@public
def softmax(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""The exponentials of the scores, normalized: positive, dense probabilities.

    .. math:: p_i = \frac{e^{x_i / t}}{\sum_j e^{x_j / t}}

    It maximizes :math:`\langle p, x/t \rangle + H(p)` over the simplex, with Shannon's entropy
    :math:`H`. Jacobian in `x/t`: :math:`\mathrm{diag}(p) - p p^\top`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis or axes to normalize over, all of them for None.
      where: what takes part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      Probabilities of the shape and dtype of `x`. They are accurate also where they are tiny.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is out of range, `where` or `temperature` does not broadcast, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.softmax(jnp.array([0.0, 1.0, 2.0])).round(3)
      Array([0.09 , 0.245, 0.665], dtype=float32)
      >>> jsm.softmax(jnp.array([0.0, 1.0, 2.0]), temperature=0.5).round(3)
      Array([0.016, 0.117, 0.867], dtype=float32)

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
    """
    rows, scores = prepare(x, axis, where, temperature)
    return _threshold.apply(SOFTMAX, rows, scores).astype(output_dtype(x))


@public
def log_softmax(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""The logarithm of `softmax`, exact also where one score dominates.

    .. math:: \log p_i = x_i / t - \log \sum_j e^{x_j / t}

    Jacobian in `x/t`: :math:`I - 1 p^\top`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis or axes to normalize over, all of them for None.
      where: what takes part; a boolean mask that broadcasts to `x`. The rest gets -inf.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      Log-probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is out of range, `where` or `temperature` does not broadcast, or
        `temperature` is a negative number.

    Example:
      The probability of the first class is 1 - 2e-20, and its logarithm says so.

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> print(jsm.log_softmax(jnp.array([45.0, 0.0])))
      [-2.8625187e-20 -4.5000000e+01]

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
    """
    rows, scores = prepare(x, axis, where, temperature)
    return log_probabilities(rows, scores).astype(output_dtype(x))


@public
def logsumexp(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The logarithm of the sum of exponentials, the smooth maximum behind `softmax`.

    .. math:: \log \sum_i e^{x_i / t}

    The gradient in `x/t` is `softmax(x, temperature=t)`. Nothing is multiplied back: at
    temperature `t` the maximum is approached by `t * logsumexp(x, temperature=t)`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis or axes to sum over, all of them for None.
      where: what takes part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      One value per row, in the dtype of `x`; -inf for a row in which nothing takes part.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is out of range, `where` or `temperature` does not broadcast, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.logsumexp(jnp.array([1000.0, 1000.0]))
      Array(1000.6931, dtype=float32)

    References:
      Blanchard, Higham & Higham, 2021: Accurately computing the log-sum-exp and softmax functions.
    """
    rows, scores = prepare(x, axis, where, temperature, at_zero=_divided_by_zero)
    return rows.flatten(log_sum(rows, scores)).astype(output_dtype(x))


@public
def sparsemax(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""The point of the simplex nearest to the scores: few, exact non-zero probabilities.

    .. math:: p_i = \max(x_i / t - \tau, 0), \quad \tau \text{ such that } \sum_i p_i = 1

    It maximizes :math:`\langle p, x/t \rangle - \frac{1}{2} \|p\|^2` over the simplex. Jacobian in
    `x/t`: :math:`\mathrm{diag}(s) - s s^\top / \sum s`, with `s` the indicator of the support.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis or axes to normalize over, all of them for None.
      where: what takes part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      Probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is out of range, `where` or `temperature` does not broadcast, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.sparsemax(jnp.array([1.0, 0.5, -1.0]))
      Array([0.75, 0.25, 0.  ], dtype=float32)

    References:
      Martins & Astudillo, 2016: From softmax to sparsemax (arXiv:1602.02068). Solved without a
      sort: Michelot, 1986; Condat, 2016.
    """
    rows, scores = prepare(x, axis, where, temperature)
    return _threshold.apply(SPARSEMAX, rows, scores).astype(output_dtype(x))


@public
def entmax15(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""Half-way between softmax and sparsemax: sparse, with smooth edges.

    .. math:: p_i = \max(x_i / 2t - \tau, 0)^2, \quad \tau \text{ such that } \sum_i p_i = 1

    It maximizes :math:`\langle p, x/t \rangle - \frac{4}{3} \sum_i p_i^{3/2}` over the simplex, and
    is alpha-entmax at alpha = 1.5. Jacobian in `x/t`:
    :math:`\mathrm{diag}(s) - s s^\top / \sum s`, with :math:`s = \sqrt{p}`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis or axes to normalize over, all of them for None.
      where: what takes part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      Probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if `axis` is out of range, `where` or `temperature` does not broadcast, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.entmax15(jnp.array([2.0, 1.0, -1.0])).round(3)
      Array([0.831, 0.169, 0.   ], dtype=float32)

    References:
      Peters, Niculae & Martins, 2019: Sparse sequence-to-sequence models (arXiv:1905.05702).
    """
    rows, scores = prepare(x, axis, where, temperature)
    return _threshold.apply(ENTMAX15, rows, scores).astype(output_dtype(x))


@public
def hardmax(
    x: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
) -> Float[Array, "*shape"]:
    r"""All probability on the largest score: the limit of every mapping at temperature 0.

    .. math:: p_i = [x_i = \max_j x_j] / n, \quad n \text{ the number of such entries}

    It maximizes :math:`\langle p, x \rangle` over the simplex. Its Jacobian is 0.

    Args:
      x: scores of any shape and real dtype.
      axis: the axis or axes to normalize over, all of them for None.
      where: what takes part; a boolean mask that broadcasts to `x`.

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
    rows, scores = prepare(x, axis, where, 1.0)
    return _threshold.apply(HARDMAX, rows, scores).astype(output_dtype(x))


@custom_vjp
def log_probabilities(rows: Rows, scores: Array) -> Array:
    """Log-softmax of prepared scores."""
    gaps, lost, top = _exact_gaps(rows, scores)
    log_p = gaps + (lost - rows.spread(_log_sum_of_gaps(rows, gaps, lost)))
    return jnp.where(gaps == -jnp.inf, -jnp.inf, log_p)


def _log_fwd(rows: Rows, scores: Array) -> tuple[Array, tuple[Rows, Array]]:
    log_p = log_probabilities(rows, scores)
    return log_p, (rows, log_p)


def _log_bwd(residuals: tuple[Rows, Array], ct: Array) -> tuple[None, Array]:
    rows, log_p = residuals
    ct = jnp.where(log_p == -jnp.inf, 0, ct)
    return None, ct - jnp.exp(log_p) * rows.spread(rows.sum(ct))


log_probabilities.defvjp(_log_fwd, _log_bwd)


@custom_vjp
def log_sum(rows: Rows, scores: Array) -> Array:
    """Log-sum-exp of prepared scores, one value per row."""
    gaps, lost, top = _exact_gaps(rows, scores)
    return top + _log_sum_of_gaps(rows, gaps, lost)


def _log_sum_fwd(rows: Rows, scores: Array) -> tuple[Array, tuple[Rows, Array]]:
    return log_sum(rows, scores), (rows, _threshold.apply(SOFTMAX, rows, scores))


def _log_sum_bwd(residuals: tuple[Rows, Array], ct: Array) -> tuple[None, Array]:
    rows, p = residuals
    return None, p * rows.spread(ct)


log_sum.defvjp(_log_sum_fwd, _log_sum_bwd)


def _exact_gaps(rows: Rows, scores: Array) -> tuple[Array, Array, Array]:
    """The scores less their maximum, what rounding took from that (Knuth's two-sum), and it."""
    gaps, top = _threshold.below_top(rows, scores)
    high = gaps - scores
    lost = (scores - (gaps - high)) - (rows.spread(top) + high)
    return gaps, jnp.where(jnp.isfinite(lost) & (gaps < 0), lost, 0), top


def _log_sum_of_gaps(rows: Rows, gaps: Array, lost: Array) -> Array:
    # The maxima count 1 each and are kept apart: where one score dominates, all the digits of the
    # answer are in the sum of the others.
    below = gaps < 0
    weights = jnp.exp(gaps)
    rest = jnp.where(below, weights + weights * lost, 0)
    rest, tops = rows.sums(rest, indicator(~below, gaps.dtype))
    return jnp.log1p(rest + (tops - 1))


def _divided_by_zero(top: Array) -> Array:
    return jnp.where(top == 0, 0, top * jnp.inf)


def _softmax_probabilities(rows: Rows, scores: Array) -> Array:
    # A rounding error in `score - top` is an error of the same size in the logarithm of the
    # probability: 64 ulp where the difference is 80. A whole number is subtracted instead, so
    # near to the maximum that no sum overflows and so far from it that next to no score that
    # matters falls below it: such a difference is exact.
    finfo = jnp.finfo(scores.dtype)
    room = math.floor(math.log(float(finfo.max)) - 2 - math.log(max(rows.length(scores), 1)))
    top = rows.max(scores)
    whole = jnp.maximum(jnp.floor(top) - room, 0) + jnp.minimum(jnp.ceil(top), 0)
    pivot = jnp.where(jnp.abs(top) > 2.0**20, top, whole)  # beyond, whole numbers get sparse
    pivot = jnp.clip(pivot, finfo.min, finfo.max)
    # The clipped maximum of a row with +inf is that of its scores, clipped alike.
    weights = jnp.exp(jnp.minimum(scores, finfo.max) - rows.spread(pivot))
    return weights * rows.spread(1 / jnp.maximum(rows.sum(weights), finfo.tiny))


def _sparsemax_probabilities(rows: Rows, scores: Array) -> Array:
    gaps, _ = _threshold.below_top(rows, scores)
    return _threshold.solve_norm(rows, gaps, 1)


def _entmax15_probabilities(rows: Rows, scores: Array) -> Array:
    gaps, _ = _threshold.below_top(rows, scores)
    return _threshold.solve_norm(rows, gaps / 2, 2)


def _hardmax_probabilities(rows: Rows, scores: Array) -> Array:
    gaps, _ = _threshold.below_top(rows, scores)
    at_top = jnp.where(jnp.isnan(gaps), gaps, indicator(gaps == 0, gaps.dtype))
    return at_top / rows.spread(jnp.maximum(rows.sum(at_top), 1))


def _support(p: Array) -> Array:
    return indicator(p > 0, p.dtype)


def sqrt(p: Array) -> Array:
    """The square root, with derivative 0 at 0."""
    positive = p > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, p, 1)), 0)


SOFTMAX = Form("softmax", _softmax_probabilities, slope=lambda p: p)
ENTMAX15 = Form("entmax15", _entmax15_probabilities, slope=sqrt)
SPARSEMAX = Form("sparsemax", _sparsemax_probabilities, slope=_support)
HARDMAX = Form("hardmax", _hardmax_probabilities, slope=jnp.zeros_like)
