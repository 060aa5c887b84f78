"""Alpha-entmax for `alpha` of 1 and above, with entmax15 and sparsemax, two members of it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax import _threshold
from jaxsoftmax._elementary import expm1, nan_unless, sqrt
from jaxsoftmax._form import Form, State, tolerance
from jaxsoftmax._implementations import Implementation
from jaxsoftmax._public import ALPHA, Fixed, known_number, public
from jaxsoftmax._reductions import Entries, Rows, indicator
from jaxsoftmax._scores import Axis, Options, as_returned, check_per_row, prepare
from jaxsoftmax._threshold import has_form
from jaxsoftmax.mappings._powers import NO_BETA, expm1_over, log1p_over, phi, power, safe_log
from jaxsoftmax.mappings._softmax import SOFTMAX


@has_form(lambda rows, scores, alpha=1.5: _with_alpha(rows, scores, alpha))
@public(alpha=ALPHA)
def entmax(
    x: Real[ArrayLike, "*shape"],
    alpha: ArrayLike = 1.5,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    sink: ArrayLike | None = None,
    segment_ids: Integer[ArrayLike, " length"] | None = None,
    num_segments: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*shape"]:
    r"""Softmax at `alpha` 1, sparsemax at 2, and everything between and beyond.

    .. math:: p_i = [1 + (\alpha - 1)(x_i / t - \tau)]_+^{1 / (\alpha - 1)},
              \quad \tau \text{ such that } \sum_i p_i = 1

    It maximizes :math:`\langle p, x/t \rangle + \frac{1}{\alpha (\alpha - 1)} \sum_i (p_i -
    p_i^\alpha)` over the simplex. Jacobian in `x/t`: :math:`\mathrm{diag}(s) - s s^\top / \sum s`,
    with :math:`s_i = p_i^{2 - \alpha}` on the support. It is smooth in `alpha`, also at 1.

    Args:
      x: scores of any shape and real dtype.
      alpha: the shape, at least 1; a number or one value per row, differentiable.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one more score in each row, added after the division by the temperature. Its share is
        dropped. A number or one value per row.
      segment_ids: integers, as many as `axis` is long. Scores with the same number form one row.
        Ids out of range take no part.
      num_segments: how many segments there are; needed if `segment_ids` is traced.
      implementation: what computes it: None or "xla", or "pallas", which is a kernel on a TPU and
        XLA elsewhere. It was compiled for TPUs and has not run on one.

    Returns:
      Probabilities of the shape and dtype of `x`. Above an `alpha` of 2 they rise steeply at the
      edge of the support, so an entry that is barely above 0 may have an error: of 3e-4 at 3 and
      4e-3 at 4 in float32, of 1e-11 and 5e-6 in float64, and of about `eps ** (1 / (alpha - 1))`
      beyond, which is 0.17 at 10 in float32 and 0.15 at 20 in float64.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number, or `alpha` is a number below 1 or infinite. If `alpha`
        is traced, a value below 1 gives NaN.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> x = jnp.array([1.0, 0.5, -1.0])
      >>> for alpha in (1.0, 1.3, 2.0):
      ...     print(jsm.entmax(x, alpha))
      [0.574 0.348 0.078]
      [0.643 0.344 0.014]
      [0.75 0.25 0.  ]
      >>> print(jax.jacfwd(jsm.entmax, argnums=1)(x, 1.0))
      [ 0.219 -0.007 -0.212]

    References:
      Peters, Niculae & Martins, 2019: Sparse sequence-to-sequence models (arXiv:1905.05702).
      Gradient in alpha: Correia, Niculae & Martins, 2019 (arXiv:1909.00015).
    """
    options = Options(where, temperature, sink, segment_ids, num_segments, implementation)
    rows, scores = prepare(x, axis, options)
    form, params = _with_alpha(rows, scores, alpha)
    return as_returned(_threshold.apply(form, rows, scores, *params)[0], x, where)


@has_form(lambda rows, scores: (ENTMAX15, ()))
@public
def entmax15(
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
    r"""Half-way between softmax and sparsemax: sparse, with smooth edges.

    .. math:: p_i = \max(x_i / 2t - \tau, 0)^2, \quad \tau \text{ such that } \sum_i p_i = 1

    It maximizes :math:`\langle p, x/t \rangle - \frac{4}{3} \sum_i p_i^{3/2}` over the simplex: it
    is `entmax` at alpha = 1.5, only faster. Jacobian in `x/t`:
    :math:`\mathrm{diag}(s) - s s^\top / \sum s`, with :math:`s = \sqrt{p}`.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one more score in each row, added after the division by the temperature. Its share is
        dropped. A number or one value per row.
      segment_ids: integers, as many as `axis` is long. Scores with the same number form one row.
        Ids out of range take no part.
      num_segments: how many segments there are; needed if `segment_ids` is traced.
      implementation: what computes it: None or "xla", or "pallas", which is a kernel on a TPU and
        XLA elsewhere. It was compiled for TPUs and has not run on one.

    Returns:
      Probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> jsm.entmax15(jnp.array([2.0, 1.0, -1.0]))
      Array([0.831, 0.169, 0.   ], dtype=float32)

    References:
      Peters, Niculae & Martins, 2019: Sparse sequence-to-sequence models (arXiv:1905.05702).
    """
    options = Options(where, temperature, sink, segment_ids, num_segments, implementation)
    rows, scores = prepare(x, axis, options)
    return as_returned(_threshold.apply(ENTMAX15, rows, scores)[0], x, where)


@has_form(lambda rows, scores: (SPARSEMAX, ()))
@public
def sparsemax(
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
    r"""The point of the simplex nearest to the scores: few, exact non-zero probabilities.

    .. math:: p_i = \max(x_i / t - \tau, 0), \quad \tau \text{ such that } \sum_i p_i = 1

    It maximizes :math:`\langle p, x/t \rangle - \frac{1}{2} \|p\|^2` over the simplex: it is
    `entmax` at alpha = 2, only faster. Jacobian in `x/t`:
    :math:`\mathrm{diag}(s) - s s^\top / \sum s`, with `s` the indicator of the support.

    Args:
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.
      sink: one more score in each row, added after the division by the temperature. Its share is
        dropped. A number or one value per row.
      segment_ids: integers, as many as `axis` is long. Scores with the same number form one row.
        Ids out of range take no part.
      num_segments: how many segments there are; needed if `segment_ids` is traced.
      implementation: what computes it: None or "xla", or "pallas", which is a kernel on a TPU and
        XLA elsewhere. It was compiled for TPUs and has not run on one.

    Returns:
      Probabilities of the shape and dtype of `x`.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `segment_ids` not integers.
      ValueError: if an axis is out of range, shapes do not fit, `num_segments` is missing, or
        `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jsm.sparsemax(jnp.array([1.0, 0.5, -1.0]))
      Array([0.75, 0.25, 0.  ], dtype=float32)

    References:
      Martins & Astudillo, 2016: From softmax to sparsemax (arXiv:1602.02068). Solved without a
      sort: Michelot, 1986; Condat, 2016.
    """
    options = Options(where, temperature, sink, segment_ids, num_segments, implementation)
    rows, scores = prepare(x, axis, options)
    return as_returned(_threshold.apply(SPARSEMAX, rows, scores)[0], x, where)


def _with_alpha(
    rows: Rows, scores: Entries, alpha: ArrayLike | Fixed
) -> tuple[Form, tuple[Array, ...]]:
    """The fastest form that `alpha` allows, and its parameters."""
    known = known_number(alpha)
    if known in _FIXED_FORMS:
        return _FIXED_FORMS[known], ()
    return ENTMAX, (as_alpha(rows, scores, alpha),)


def as_alpha(rows: Rows, scores: Entries, alpha: ArrayLike | Fixed) -> Array:
    """`alpha` as one value per row, or fewer."""
    known = known_number(alpha)
    if known is not None and not 1 <= known < jnp.inf:
        raise ValueError(f"alpha must be at least 1 and finite, got {known}.")
    per_row = check_per_row("alpha", alpha, scores[0], rows)
    return nan_unless(per_row >= 1, per_row)


@dataclasses.dataclass(frozen=True, eq=False)
class _Entmax(Form):
    """Entmax of any `alpha`, with `beta = alpha - 1` and gaps, scores less the row's maximum.

    `p = [1 + beta (gap - theta)]_+ ** (1 / beta)`, which tends to `exp(gap - theta)` as `beta`
    tends to 0. The search is not for `theta` but for `peak`, the logarithm of the probability at
    the maximum, because `1 - beta theta`, which is `m = exp(beta peak)`, loses its digits where `m`
    is small. Every probability is `exp(peak) w` with `w = [1 + beta gap / m]_+ ** (1 / beta)`. So
    what `Form` calls `tau` is `peak`, and what entries take of it is `1 / m`.
    """

    def of_row(self, tau: Array, *params: Array) -> Array:
        """`1 / m`."""
        (alpha,) = params
        return 1 / jnp.maximum(jnp.exp((alpha - 1) * tau), jnp.finfo(tau.dtype).tiny)

    def weigh(self, gap: Array, tau: Array, *params: Array) -> Array:
        """`w`, the weight relative to that of the maximum; `tau` is `1 / m`."""
        (alpha,) = params
        return power(gap * tau, alpha - 1)

    def terms(self, gap: Array, tau: Array, *params: Array) -> tuple[Array, ...]:
        """`w`, and what is proportional to the first two derivatives of `p` in `m`."""
        (alpha,) = params
        u, beta = gap * tau, alpha - 1
        w = power(u, beta)
        inverse = jnp.where(w > 0, 1 / (beta * u + 1), 0)
        return w, w * inverse, w * inverse * inverse

    def start(self, length: Array, *params: Array) -> State:
        """The maximum has at least what it has if all share evenly, and at most all."""
        del params
        peak = jnp.zeros_like(length)
        low = peak - jnp.log(length) - 1
        return peak, low, peak, -2 * low

    def update(self, sums: State, state: State, *params: Array) -> tuple[State, Array]:
        """A step of Halley's method on a norm, written so that it has a limit at `beta = 0`.

        The norm is `S ** beta`, where `S` is the sum of `p`. Taken as `(S ** beta - 1) / beta`, it
        tends to `log S` as `beta` tends to 0, and one step lands on logsumexp. For `alpha > 1.5`
        the second derivative is infinite where an entry enters the support; there the step is
        Newton's. For `alpha > 2` the slope is infinite there, too, and the norm is not convex. A
        bracket is kept, and halved if a step leaves it or, for `alpha > 2`, exceeds half the last.
        """
        (alpha,) = params
        beta = alpha - 1
        total, slope, curve = sums
        peak, low, high, last = state
        log_total = peak + jnp.log(total)
        # Not `expm1_over`: nothing differentiates this, and kernels have no rules.
        none = beta < NO_BETA
        excess = jnp.where(none, log_total, expm1(beta * log_total) / jnp.where(none, 1, beta))
        excess *= total / (1 + beta * excess)
        # Of the norm: its value less 1, times the second derivative, over the first one squared.
        bend = (1 - beta) * excess * (curve / (slope * slope) - 1 / total)
        bend = jnp.where(beta <= 0.5, jnp.clip(bend, -1, 1), 0)
        new = peak + log1p_over(beta, -excess / (slope * (1 - bend / 2)))
        low = jnp.where(log_total < 0, peak, low)
        high = jnp.where(log_total >= 0, peak, high)
        # A shorter step would be lost in the rounding of the peak or of the scale.
        least = jnp.finfo(peak.dtype).eps * jnp.maximum(-peak, 1 / jnp.maximum(beta, 1))
        shortest = peak + jnp.where(log_total < 0, least, -least)
        new = jnp.where(jnp.abs(new - peak) < least, shortest, new)
        slow = (beta > 1) & (jnp.abs(new - peak) > last / 2)
        new = jnp.where((new > low) & (new < high) & ~slow, new, low + (high - low) / 2)
        off = jnp.abs(log_total) > tolerance(peak) * jnp.maximum(2, -peak)
        between = (new > low) & (new < high) & (high - low > least / 2)
        moved = off & between & (total > 0)  # no weight, no way to a sum of 1
        new = jnp.where(jnp.isnan(log_total), log_total, jnp.where(moved, new, peak))
        return (new, low, high, jnp.abs(new - peak)), moved


def _tsallis_weight(u: Array, alpha: Array) -> Array:
    """`[1 + beta u]_+ ** (1 / beta)`."""
    return power(u, alpha - 1)


def _tsallis_score(p: Array, alpha: Array) -> Array:
    """`(p ** beta - 1) / beta`."""
    return expm1_over(alpha - 1, safe_log(p))


def _entmax_slope(p: Array, alpha: Array) -> Array:
    """`p ** (2 - alpha)` on the support, short of overflow."""
    slope = jnp.exp((2 - alpha) * safe_log(p))
    return jnp.where(p > 0, jnp.minimum(slope, jnp.finfo(p.dtype).max ** 0.5), 0)


def _entmax_partials(p: Array, alpha: Array) -> tuple[Array]:
    """`dp / dalpha` at fixed tau.

    With `h = log p`, `u = (exp(beta h) - 1) / beta` and `y = beta h` it is
    `p (1 - y - exp(-y)) / beta ** 2 = p h ** 2 phi(y)`.
    """
    h = safe_log(p)
    return (jnp.where(p > 0, p * h * h * phi((alpha - 1) * h), 0),)


@dataclasses.dataclass(frozen=True, eq=False)
class _Entmax15(Form):
    def terms(self, gap: Array, tau: Array, *params: Array) -> tuple[Array, ...]:
        """The weight and its slope, the square root of the weight: this way none is taken."""
        root = jnp.maximum((gap - tau) / 2, 0)
        return root * root, root


ENTMAX = _Entmax(
    weight=_tsallis_weight, score=_tsallis_score, slope=_entmax_slope, partials=_entmax_partials
)
ENTMAX15 = _Entmax15(
    weight=lambda u: jnp.maximum(u / 2, 0) ** 2, score=lambda p: 2 * sqrt(p), slope=sqrt
)
SPARSEMAX = Form(
    weight=lambda u: jnp.maximum(u, 0),
    score=lambda p: p,
    slope=lambda p: indicator(p > 0, p.dtype),
)
_FIXED_FORMS = {1.0: SOFTMAX, 1.5: ENTMAX15, 2.0: SPARSEMAX}
