"""What XLA has not, or not as exactly on every platform."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """`x + y`, rounded, and what rounding took from it (Knuth)."""
    total = x + y
    virtual = total - x
    return total, (x - (total - virtual)) + (y - virtual)


def log1p(x: Array) -> Array:
    """`log(1 + x)` for `x > -1`, within 1.5 ulp: in float64, XLA for CPU is off by up to 120."""
    total, rest = two_sum(x, jnp.ones_like(x))
    return jnp.log(total) + rest * (1 / total)


def times(weight: Array, x: Array) -> Array:
    """The product, 0 where the weight is 0, even if `x` is infinite.

    The weight of what is infinite has derivative 0: a cotangent of 0 would make NaN of another.
    """
    infinite = jnp.isinf(x)
    at_infinity = lax.stop_gradient(weight) * jnp.where(weight == 0, 0, x)
    return jnp.where(infinite, at_infinity, weight * jnp.where(infinite, 0, x))


def expm1(x: Array) -> Array:
    """`exp(x) - 1` without loss where `x` is small (Kahan), for kernels: Mosaic has no expm1."""
    y = jnp.exp(x)
    below = jnp.where((y == 1) | (y == 0), 2, y)
    near = (below - 1) * (x / jnp.log(below))
    return jnp.where(y == 1, x, jnp.where((y == 0) | (y == jnp.inf), y - 1, near))


def sqrt(x: Array) -> Array:
    """The square root, 0 of what is not positive, with derivative 0 there."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def nan_unless(known: Array, x: Array) -> Array:
    """`x`, NaN where it is not known to be right.

    NaN is made where it is needed only, or `jax.debug_nans` would find it in valid calls.
    """
    return x + (jnp.sqrt(jnp.where(known, 1, -1).astype(x.dtype)) - 1)
