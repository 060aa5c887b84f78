"""What XLA has not, or not as exactly on every platform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
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


@jax.custom_jvp
def times(weight: Array, x: Array) -> Array:
    """The product, 0 where the weight is 0, even if `x` is infinite.

    The derivative in the weight of what is infinite is 0: it may be left out afterwards, and a
    cotangent of 0 would make NaN of another.
    """
    return weight * jnp.where((weight == 0) & jnp.isinf(x), 0, x)


@functools.partial(times.defjvp, symbolic_zeros=True)
def _times_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    (weight, x), (of_weight, of_x) = primals, tangents
    terms = []
    if not isinstance(of_weight, SymbolicZero):
        terms.append(of_weight * jnp.where(jnp.isinf(x), 0, x))
    if not isinstance(of_x, SymbolicZero):
        terms.append(weight * of_x)
    return times(weight, x), functools.reduce(jnp.add, terms)


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
