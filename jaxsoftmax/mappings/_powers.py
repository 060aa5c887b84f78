"""Exponentials and logarithms that are powers, and become themselves as `beta` tends to 0."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import expm1, log1p
from jaxsoftmax._reductions import sum_to, vary_like


def power(u: Array, beta: Array) -> Array:
    """`[1 + beta u]_+ ** (1 / beta)`."""
    outside = beta * u <= -1
    return jnp.where(outside, 0, jnp.exp(log1p_over(beta, jnp.where(outside, 0, u))))


# Below this, quotients by beta have nothing left to say, and at 0 they would be NaN.
NO_BETA = 1e-30


def log1p_over(beta: Array, x: Array) -> Array:
    """`log(1 + beta x) / beta`, which is `x` where beta is 0."""
    none = beta < NO_BETA
    return jnp.where(none, x, log1p(beta * x) / jnp.where(none, 1, beta))


def negentropy(p: Array, alpha: Array) -> Array:
    """`(p ** alpha - p) / (alpha (alpha - 1))`, which is `p log p` at 1; smooth in `alpha`."""
    beta = alpha - 1
    inside = p * expm1_over(beta, safe_log(p)) / alpha
    # 0 at 0, with the derivatives there; one that is infinite is taken as 0.
    slope = jnp.where(beta > 0, -1 / (alpha * jnp.where(beta > 0, beta, 1)), 0)
    at_zero = slope * p + jnp.where(beta == 1, p * p / 2, 0)
    return jnp.where(p > 0, inside, at_zero)


def expm1_over(beta: Array, x: Array) -> Array:
    """`(exp(beta x) - 1) / beta`, which is `x` where beta is 0."""
    return _expm1_quotient(vary_like(beta, x), x)


@custom_vjp
def _expm1_quotient(beta: Array, x: Array) -> Array:
    none = jnp.abs(beta) < NO_BETA
    return jnp.where(none, x, jnp.expm1(beta * x) / jnp.where(none, 1, beta))


def _expm1_quotient_fwd(beta: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    return _expm1_quotient(beta, x), (beta, x)


def _expm1_quotient_bwd(residuals: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    beta, x = residuals
    y = beta * x
    # With `e = exp(y)`, `e phi(y)` is `((1 - y) e - 1) / y ** 2`. Far below 0, `e phi(y)` is 0
    # times a number that is too large; in the other form nothing cancels there.
    far = jnp.where(y < -1, y, -1)
    low = ((1 - far) * jnp.exp(far) - 1) / (far * far)
    slope = jnp.where(y < -1, low, jnp.exp(y) * phi(jnp.where(y < -1, -1, y)))
    return sum_to(-ct * x * x * slope, beta.shape), ct * jnp.exp(y)


_expm1_quotient.defvjp(_expm1_quotient_fwd, _expm1_quotient_bwd)


def phi(y: Array) -> Array:
    """`(1 - y - exp(-y)) / y ** 2`, short of overflow."""
    near = jnp.abs(y) < 0.1
    # The Taylor series, where the difference would cancel.
    series = jnp.zeros_like(y)
    for k in range(9, 1, -1):
        series = 1 / math.factorial(k) - y * series
    far = jnp.where(near, 1, y)
    quotient = (-expm1(-far) - far) / (far * far)
    return jnp.where(near, -series, jnp.maximum(quotient, -(jnp.finfo(y.dtype).max ** 0.5)))


def safe_log(p: Array) -> Array:
    return jnp.log(jnp.where(p > 0, p, 1))
