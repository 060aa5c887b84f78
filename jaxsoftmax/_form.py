"""A form: the equations of one mapping, entry by entry.

A mapping is in threshold form if `p_i = g(z_i - tau)` for an increasing function `g`, where `tau`
is the one number per row for which the row sums to 1. A form is `g`, its inverse and its slope. It
knows no axis, no mask, no platform and no loop: whoever solves for `tau`, over arrays, over devices
or inside of a kernel, calls the functions below on what it holds.

Scores come as gaps, their distance from the largest of their row, which is 0 there. `tau`, too, is
relative to the largest score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxsoftmax._elementary import nan_unless

State = tuple[Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """The equations of a mapping `p_i = g(z_i - tau)`, for `threshold_mapping`.

    All are elementwise functions in `jax.numpy`, whose results `threshold_mapping` casts to the
    dtype of their first argument. `params` are the mapping's own parameters, such as the `alpha` of
    `entmax`, under the names that `weight` gives them.

    Args:
      weight: `(u, *params) -> p`, the function `g`: increasing, never negative.
      score: `(p, *params) -> u`, its inverse for `p` above 0.
      slope: `(p, *params) -> s`, the derivative of `g` where its value is `p`. None: JAX finds it.
      partials: `(p, *params) -> (dp/dparam, ...)`, the derivatives in the parameters at fixed `u`,
        a tuple, also of one. None: JAX finds them.
      tau: a finite number, a threshold that is the same for all rows, such as 0, so that nothing is
        solved for and rows have any sum. None: rows sum to 1.

    Example:
      The function of sparsemax, and what it makes of scores:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> form = jsm.Form(weight=lambda u: jnp.maximum(u, 0), score=lambda p: p)
      >>> jsm.threshold_mapping(form)(jnp.array([1.0, 0.5, -1.0]))
      Array([0.75, 0.25, 0.  ], dtype=float32)

    References:
      Blondel, Martins & Niculae, 2020: Learning with Fenchel-Young losses (arXiv:1901.02324).
    """

    weight: Callable[..., Array]
    score: Callable[..., Array]
    slope: Callable[..., Array] | None = None
    partials: Callable[..., tuple[Array, ...]] | None = None
    tau: ArrayLike | None = None

    # Whether the slopes of a row sum to 1 as its probabilities do: those of softmax, which are
    # its probabilities. There a threshold is but a factor, and normalizing is all it takes.
    only_scales = False

    def totals(self, *params: Array) -> tuple[Array, ...]:
        """The derivatives of a row's total in the parameters, if it is not just 1."""
        del params
        return ()

    def slopes(self, p: Array, *params: Array) -> Array:
        """The slopes as a function of the probabilities."""
        if self.slope is not None:
            return self.slope(p, *params)
        inside = jnp.where(p > 0, p, 1)
        u = self.score(inside, *params)
        _, slope = jax.jvp(lambda u: self.weight(u, *params), [u], [jnp.ones_like(u)])
        return jnp.where(p > 0, slope, 0)

    def moved_by_params(self, p: Array, *params: Array) -> tuple[Array, ...]:
        """The derivatives of the probabilities in the parameters, at fixed `tau`."""
        if self.partials is not None:
            return self.partials(p, *params)
        inside = jnp.where(p > 0, p, 1)
        u = self.score(inside, *params)
        found = []
        for i, param in enumerate(params):

            def of_param(x: Array, i: int = i) -> Array:
                return self.weight(u, *params[:i], x, *params[i + 1 :])

            _, partial = jax.jvp(of_param, [param], [jnp.ones_like(param)])
            found.append(jnp.where(p > 0, partial, 0))
        return tuple(found)

    def of_row(self, tau: Array, *params: Array) -> Array:
        """What entries take of `tau`, computed once a row."""
        del params
        return tau

    def weigh(self, gap: Array, tau: Array, *params: Array) -> Array:
        """The weight of an entry, given its gap and `of_row(tau)`."""
        return self.weight(gap - tau, *params)

    def terms(self, gap: Array, tau: Array, *params: Array) -> tuple[Array, ...]:
        """What one pass over a row adds up: weights, slopes, and what else `update` takes."""
        weight = self.weigh(gap, tau, *params)
        return weight, self.slopes(weight, *params)

    def start(self, length: Array, *params: Array) -> State:
        """The first state of a search, row values, of which the first is `tau`.

        Args:
          length: how many entries a row has, or more.
          *params: the parameters.
        """
        one = jnp.ones_like(length)
        # At least, the largest entry has all; at most, all entries have as much as it has.
        low, high = -self.score(one, *params), -self.score(1 / length, *params)
        # No entry can have all: NaN rather than a wrong number.
        low = nan_unless(jnp.isfinite(low), low)
        return low, low, jnp.maximum(low, high), jnp.full_like(low, jnp.inf), jnp.zeros_like(low)

    def update(self, sums: State, state: State, *params: Array) -> tuple[State, Array]:
        """One step of the search, given the sums of `terms`, and which rows it moves.

        Newton's method for `score(total) = score(1)`. Of one entry alone that is linear in `tau`;
        of all, if `g` is a power, it is the norm of the entries, which is convex: from a total of
        more than 1 the steps increase `tau` and never overshoot. For any other `g` a bracket is
        kept, and halved where a step leaves it, or from pass `_PATIENCE` on.
        """
        total, slope, *_ = sums
        tau, low, high, last, passes = state
        low = jnp.where(total >= 1, jnp.maximum(tau, low), low)
        high = jnp.where(total <= 1, jnp.minimum(tau, high), high)
        step = self._step(total, slope, *params)
        new = tau + step
        inside = (new >= low) & (new <= high) & (step != 0) & (passes < _PATIENCE)
        new = jnp.where(inside, new, low + (high - low) / 2)
        off = jnp.abs(total - 1)
        eps = float(jnp.finfo(off.dtype).eps)
        # Where a sum is as near to 1 as its rounding allows, it comes no nearer. Beyond a kink of
        # `g`, a step may not come nearer either, but it is a long one.
        short = jnp.abs(new - tau) <= _FEW * eps * jnp.maximum(jnp.abs(tau), jnp.abs(low))
        rounds = (off > last / 2) & (off < eps**0.5) & short
        narrow = high - low <= eps * jnp.abs(tau)
        moved = (off > tolerance(tau)) & ~rounds & ~narrow & (new != tau) & (total > 0)
        return (jnp.where(moved, new, tau), low, high, off, passes + 1), moved

    def _step(self, total: Array, slope: Array, *params: Array) -> Array:
        of_total = self.slopes(total, *params) / jnp.where(slope == 0, 1, slope)
        step = (self.score(total, *params) - self.score(jnp.ones_like(total), *params)) * of_total
        # A total that no one entry can have.
        plain = (total - 1) / jnp.where(slope == 0, 1, slope)
        return jnp.where(jnp.isfinite(step), step, plain)


def tolerance(x: Array) -> float:
    """How near to its total a row is brought; normalizing does the rest."""
    return 4 * float(jnp.finfo(x.dtype).eps)


# More passes than these Newton's method takes only where it creeps.
_PATIENCE = 16
# How many units of rounding of `tau` a step has that is but rounding.
_FEW = 4
