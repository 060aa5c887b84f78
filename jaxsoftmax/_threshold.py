"""Mappings in threshold form: one solver and one reverse rule for the whole family.

A mapping is in threshold form if `p_i = g(z_i - tau)` for a growing function `g`, where `tau` is
the one number per row for which the row sums to its total. Differentiating the total gives
`dtau = sum(s dz) / sum(s)` with the slopes `s_i = g'(z_i - tau)`, and so the Jacobian

    J = diag(s) - s s^T / sum(s),

which is symmetric. The slopes are all that the rule has to know of a mapping.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import Rows, indicator


@dataclasses.dataclass(frozen=True)
class Form:
    """What is particular to one mapping.

    Attributes:
      name: for error messages and jaxprs.
      probabilities: `(rows, scores) -> p`; never differentiated.
      slope: `p -> s`, the slopes as a function of the probabilities.
    """

    name: str
    probabilities: Callable[[Rows, Array], Array]
    slope: Callable[[Array], Array]


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def apply(form: Form, rows: Rows, scores: Array) -> Array:
    """The probabilities that `form` gives to `scores`, with the rule of the family."""
    return form.probabilities(rows, scores)


def _apply_fwd(form: Form, rows: Rows, scores: Array) -> tuple[Array, tuple[Rows, Array]]:
    p = apply(form, rows, scores)
    return p, (rows, p)


def _apply_bwd(form: Form, residuals: tuple[Rows, Array], ct: Array) -> tuple[None, Array]:
    rows, p = residuals
    return None, pull_back(rows, form.slope(p), ct)


apply.defvjp(_apply_fwd, _apply_bwd)


def pull_back(rows: Rows, slope: Array, ct: Array) -> Array:
    """`J^T ct` for `J = diag(s) - s s^T / sum(s)`; rows without slope have none."""
    total = rows.sum(slope)
    mean = rows.sum(slope * ct) / jnp.where(total == 0, 1, total)
    return slope * (ct - rows.spread(mean))


def below_top(rows: Rows, scores: Array) -> tuple[Array, Array]:
    """The scores less their row's maximum, and that maximum.

    Exactly 0 at the maximum, be it infinite; -inf throughout a row in which nothing takes part.
    """
    top = rows.max(scores)
    top = jnp.where(top == -jnp.inf, jnp.finfo(scores.dtype).min, top)
    spread = rows.spread(top)
    return jnp.where(scores == spread, 0, scores - spread), top


def solve_norm(rows: Rows, gaps: Array, q: int) -> Array:
    """The probabilities `[gaps - tau]_+ ** q` that sum to 1, for entmax of alpha = 1 + 1/q.

    Newton's method on the q-norm, `||[gaps - tau]_+||_q = 1`. The norm is convex in tau, so from
    any point where it is at least 1, such as tau = -1, the steps grow tau and never overshoot.
    The entries leave the support and do not come back: there is nothing to bracket.

    Args:
      rows: the rows of `gaps`.
      gaps: the scores times `alpha - 1`, less their row's maximum; at most 0.
      q: the power, 1 for sparsemax or 2 for entmax15.
    """
    tolerance = 4 * jnp.finfo(gaps.dtype).eps

    def norm_and_slope(tau: Array) -> tuple[Array, Array]:
        inside = jnp.maximum(gaps - rows.spread(tau), 0)
        if q == 1:
            return rows.sums(inside, indicator(inside > 0, gaps.dtype))
        squares, norm1 = rows.sums(inside * inside, inside)
        norm2 = jnp.sqrt(squares)
        return norm2, norm1 / jnp.where(norm2 == 0, 1, norm2)

    def go_on(state: tuple[Array, Array, Array]) -> Array:
        _, moved, passes = state
        return jnp.any(moved) & (passes < _MAX_PASSES)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tau, _, passes = state
        norm, slope = norm_and_slope(tau)
        grown = tau + (norm - 1) / jnp.where(slope == 0, 1, slope)
        moved = (norm > 1 + tolerance) & (grown > tau)
        return jnp.where(moved, grown, tau), moved, passes + 1

    tau = jnp.full_like(rows.max(gaps), -1)  # one below the maximum, which is 0
    state = tau, jnp.ones_like(tau, bool), jnp.zeros((), jnp.int32)
    tau, _, _ = lax.while_loop(go_on, step, state)
    return _normalized(rows, jnp.maximum(gaps - rows.spread(tau), 0) ** q)


# Far beyond what any row takes: at worst about log2 of its length, for nearly equal scores.
_MAX_PASSES = 64


def _normalized(rows: Rows, weights: Array) -> Array:
    """The weights over their sum, 0 in rows without weight."""
    total = rows.sum(weights)
    return weights * rows.spread(1 / jnp.where(total == 0, 1, total))
