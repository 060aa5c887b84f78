"""Normmax: sparse like entmax, but even on the support where alpha is large."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless, sqrt
from jaxsoftmax._form import Form
from jaxsoftmax._public import ALPHA, known_number, public
from jaxsoftmax._reductions import Entries, Rows, sum_to
from jaxsoftmax._scores import Axis, Options, as_returned, as_stored, check_per_row, prepare
from jaxsoftmax.mappings._entmax import ENTMAX


@public(alpha=ALPHA)
def normmax(
    x: Real[ArrayLike, "*shape"],
    alpha: ArrayLike = 2.0,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""Sparse probabilities that become even on their support as `alpha` grows.

    .. math:: p_i = w_i / \textstyle\sum_j w_j,
              \quad w_i = [x_i / t - \tau]_+^{1 / (\alpha - 1)},
              \quad \tau \text{ such that } \|w\|_\alpha = 1

    It maximizes :math:`\langle p, x/t \rangle - \|p\|_\alpha` over the simplex. Jacobian in `x/t`:
    :math:`(I - p 1^\top) \mathrm{diag}(d) (I - 1 p^\top)`, with :math:`d_i = w_i^{2 - \alpha}
    \|p\|_\alpha / (\alpha - 1)` on the support.

    Args:
      x: scores of any shape and real dtype.
      alpha: the order of the norm, above 1; a number or one value per row, differentiable.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative.

    Returns:
      Probabilities of the shape and dtype of `x`. Above an `alpha` of 2 they rise steeply at the
      edge of the support, where the last digit of a score decides. So in float32 an entry that is
      barely above 0 may have an error of 4e-4 at 3, 5e-3 at 4 and 2e-2 at 6, and several of them
      together a larger one.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if an axis is out of range, shapes do not fit, `temperature` is a negative number,
        or `alpha` is a number that is not above 1. If `alpha` is traced, such a value gives NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.array([1.0, 0.6, -1.0])
      >>> for alpha in (1.3, 2.0, 8.0):
      ...     print(jsm.normmax(x, alpha).round(3))
      [0.85200006 0.148      0.        ]
      [0.647      0.35300002 0.        ]
      [0.528      0.47200003 0.        ]

    References:
      Blondel, Martins & Niculae, 2020: Learning with Fenchel-Young losses (arXiv:1901.02324).
      Santos, Niculae, McNamee & Martins, 2024: Sparse and structured Hopfield networks
      (arXiv:2402.13725).
    """
    options = Options(where, temperature)
    rows, scores = prepare(x, axis, options)
    rows = as_stored(rows, x, options)
    known = known_number(alpha)
    if known is not None and not 1 < known < jnp.inf:
        raise ValueError(f"alpha must be above 1 and finite, got {known}.")
    order = check_per_row("alpha", alpha, scores[0], rows)
    is_two = known == 2
    return as_returned(_apply(is_two, rows, scores, order)[0], x, where)


_SQUARES = Form(lambda u: jnp.maximum(u, 0) ** 2, sqrt, lambda p: 2 * sqrt(p))


def _probabilities(is_two: bool, rows: Rows, scores: Entries, alpha: Array) -> Entries:
    """Entmax of another order, to the power `1 / alpha`.

    Let `q = alpha / (alpha - 1)` and `u = [scores - tau]_+`. The norm of `w` is 1 where the sum of
    `u ** q` is 1, and that makes `u ** q` the entmax of order `1 + 1 / q` of the scores times `q`;
    `w = u ** (q - 1)` is `(u ** q) ** (1 / alpha)`.
    """
    if is_two:
        squares = _threshold.probabilities(_SQUARES, rows, scores)
        return _threshold.normalized(rows, rows.map(jnp.sqrt, [squares]))
    gaps, _ = _tops.below_top(rows, scores)
    rows = dataclasses.replace(rows, stored=None)
    alpha = nan_unless(alpha > 1, alpha)
    q = alpha / (alpha - 1)
    powers = _threshold.probabilities(ENTMAX, rows, rows.map(jnp.multiply, [gaps], [q]), 1 + 1 / q)
    return _threshold.normalized(rows, rows.map(jnp.power, [powers], [1 / alpha]))


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _apply(is_two: bool, rows: Rows, scores: Entries, alpha: Array) -> Entries:
    return rows.in_blocks(functools.partial(_probabilities, is_two, rows), scores, alpha)


def _apply_fwd(is_two: bool, rows: Rows, scores: Entries, alpha: Array) -> tuple[Entries, Any]:
    p = _apply(is_two, rows, scores, alpha)
    return p, (rows, p, alpha)


def _apply_bwd(is_two: bool, residuals: Any, ct: Entries) -> tuple[Any, ...]:
    """The transposed Jacobians, from the probabilities alone.

    With `v = ct - sum(p ct)` and the slopes `d`, both `(I - p 1^T) diag(d) v` and, for `alpha`,
    `sum(partial v)`. There `u = w ** (alpha - 1)` has `tau` move by `-sum(p u log w) / alpha`, and
    `p` by `-p log w / (alpha - 1)` at fixed `u`.
    """
    del is_two
    rows, p, alpha = residuals
    norm = _norm(rows, p, alpha)

    def pieces(p: Array, norm: Array, alpha: Array) -> tuple[Array, Array, Array]:
        log_w = jnp.log(jnp.where(p > 0, p, norm) / norm)
        # Short of overflow.
        largest = jnp.finfo(p.dtype).max ** 0.5
        slope = jnp.minimum(jnp.exp((2 - alpha) * log_w), largest) * norm / (alpha - 1)
        p_log_w = p * log_w
        drift = p_log_w * jnp.exp((alpha - 1) * log_w) / alpha
        return jnp.where(p > 0, slope, 0), p_log_w / (alpha - 1), drift

    slope, spread, drift = zip(*rows.map(pieces, [p], [norm, alpha]), strict=True)
    mean = rows.sum(rows.map(jnp.multiply, [p, ct]))
    moved = rows.map(lambda s, c, m: s * (c - m), [slope, ct], [mean])
    back = rows.sum(moved)
    ct_scores = rows.map(lambda h, p, b: h - p * b, [moved, p], [back])
    at_fixed_tau = rows.sum(rows.map(lambda s, c, m: s * (c - m), [spread, ct], [mean]))
    ct_alpha = rows.sum(drift) * back - at_fixed_tau
    return None, ct_scores, sum_to(rows.shared_cotangent(ct_alpha), alpha.shape)


_apply.defvjp(_apply_fwd, _apply_bwd)


def _norm(rows: Rows, p: Entries, alpha: Array) -> Array:
    """The norm of the probabilities, 1 in rows without any."""
    # Whatever is divided by is multiplied back: a constant, to avoid underflow.
    top = rows.max(rows.map(lambda p: jnp.asarray(lax.stop_gradient(p)), [p]))
    top = jnp.where(top == 0, 1, top)

    def power(p: Array, top: Array, alpha: Array) -> Array:
        positive = p > 0
        log_p = jnp.log(jnp.where(positive, p / top, 1))
        return jnp.where(positive, jnp.exp(alpha * log_p), 0)

    total = rows.sum(rows.map(power, [p], [top, alpha]))
    return top * jnp.where(total == 0, 1, total) ** (1 / alpha)
