"""An elementary function that XLA for CPU computes less exactly than a log-softmax needs."""

import jax.numpy as jnp
from jaxtyping import Array

_LOG_TERMS = {4: 9, 8: 18}


def log1p(x: Array) -> Array:
    """`log(1 + x)` for `x >= 0`; `jnp.log1p` is off by 2.5 ulp around 0.5.

    Below 1 it is `x - (h - s (h + t))` with `h = x ** 2 / 2`, `s = x / (2 + x)` and the tail `t` of
    the series `2 artanh(s) = 2 s + s t`.
    """
    near = jnp.where(x < 1, x, 0)
    s = near / (2 + near)
    square = s * s
    tail = jnp.zeros_like(x)
    for n in range(_LOG_TERMS[x.dtype.itemsize], 0, -1):
        tail = square * (2 / (2 * n + 1) + tail)
    half = near * near / 2
    return jnp.where((x >= 0) & (x < 1), near - (half - s * (half + tail)), jnp.log1p(x))
