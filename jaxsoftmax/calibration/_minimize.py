"""Minimization of a smooth function of a few numbers or many."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._elementary import nan_unless


def minimize(
    objective: Callable[[Any], Array], start: Any, tolerance: float, *, memory: int
) -> tuple[Any, Array]:
    """A local minimum and its value, by L-BFGS with optax's line search.

    It ends where the gradient is small, or a few steps in a row neither halve it nor gain more
    than rounding takes. If the gradient is NaN, so is the value.

    Args:
      objective: what to minimize, of a pytree.
      start: where to begin. The first step is the gradient itself, of length 1 at most, so
        variables are best scaled to a curvature near 1.
      tolerance: the norm of the gradient to end at.
      memory: how many steps to learn the curvature from.
    """
    import optax  # half of the time that importing the package would take

    solver = optax.lbfgs(memory_size=memory)

    def step(carry: tuple) -> tuple:
        params, value, grad, state, stalled, count = carry
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        before = params, value, grad
        # The line search has left both where it ended.
        params = optax.apply_updates(params, updates)
        value, grad = (optax.tree.get(state, name) for name in ("value", "grad"))
        # On a plateau it compares what rounding has left, for thousands of evaluations.
        noise = jnp.finfo(value.dtype).eps * jnp.abs(value)
        falls = before[1] - value > noise
        falls |= optax.tree.norm(grad) < optax.tree.norm(before[2]) / 2
        # One that found nothing ends anywhere.
        rises = value - before[1] > noise
        keep = functools.partial(jnp.where, rises)
        params, value, grad = jax.tree.map(keep, before, (params, value, grad))
        stalled = jnp.where(falls & ~rises, 0, stalled + 1)
        return params, value, grad, state, stalled, count + 1

    def go_on(carry: tuple) -> Array:
        _, _, grad, _, stalled, count = carry
        return (stalled < _PATIENCE) & (optax.tree.norm(grad) > tolerance) & (count < _MAX_STEPS)

    value, grad = jax.value_and_grad(objective)(start)
    none = jnp.zeros((), jnp.int32)
    # Without jit these run one by one, and optax divides 0 by 0 before it looks away. With float32
    # among 64 bits, it adds integers of both kinds.
    with jax.debug_nans(False), jax.numpy_dtype_promotion("standard"):
        init = start, value, grad, solver.init(start), none, none
        params, value, grad, *_ = lax.while_loop(go_on, step, init)
    return params, nan_unless(~jnp.isnan(optax.tree.norm(grad)), value)


def precise(dtype: Any) -> float:
    """The norm of a gradient that rounding lets through."""
    return float(jnp.finfo(dtype).eps) ** 0.75


_MAX_STEPS = 200
# How many steps in a row may gain nothing: in float32 some do on the way.
_PATIENCE = 3
