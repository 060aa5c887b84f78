"""Functions of scores, made of what Mosaic GPU knows; it lacks some that `jax.numpy` has."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax import _jax
from jaxsoftmax._elementary import expm1, log1p


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without what is unknown, as far as that is possible."""
    return _jax.replaced(function, _KNOWN_AS)


def is_known(function: Callable[..., Any], *args: Any) -> bool:
    """Whether it can be made of what is known."""
    return _jax.primitives(plain(function), *args) <= _KNOWN


def exp(x: Array, **_: Any) -> Array:
    """As a power of 2: the `exp` of Mosaic GPU handles small results apart, even approximately."""
    return jnp.exp2(x * math.log2(math.e))


def _sqrt(x: Array, **_: Any) -> Array:
    is_fixed = (x == 0) | (x == jnp.inf)
    return jnp.where(is_fixed, x, x * lax.rsqrt(jnp.where(is_fixed, 1, x)))


def _power(x: Array, y: Array, **_: Any) -> Array:
    """Of what is not negative: the logarithm of anything else is NaN."""
    power = exp(y * jnp.log(jnp.where(x == 0, 1, x)))
    at_zero = jnp.where(y > 0, 0.0, jnp.where(y == 0, 1.0, jnp.inf))
    return jnp.where(x == 0, at_zero, power).astype(x.dtype)


_KNOWN_AS: dict[str, Callable[..., Any]] = {
    "exp": exp,
    "sqrt": _sqrt,
    "pow": _power,
    "expm1": lambda x, **_: expm1(x),
    "log1p": lambda x, **_: log1p(x),
    "is_finite": lambda x, **_: jnp.abs(x) < jnp.inf,
    "logistic": lambda x, **_: 1 / (1 + exp(-x)),
    "square": lambda x, **_: x * x,
    "one_minus_square": lambda x, **_: 1 - x * x,
    "copy": lambda x, **_: x,
    "add_any": lambda x, y, **_: x + y,
}
_NAMES = """
    abs add and atan2 broadcast_in_dim clamp convert_element_type cos div eq erf exp exp2 ge gt
    integer_pow le log lt max min mul ne neg not or rem reshard round rsqrt select_n sign sin sub
    tanh xor
"""
_KNOWN = frozenset(_NAMES.split())
