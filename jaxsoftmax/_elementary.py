"""The exponential, within 1.1 ulp, and the logarithm, within 0.8 ulp, of a sum of two parts.

The second part is too small for the first to hold: a log-softmax that is to have all its digits
cannot do without. Besides, XLA for CPU is off by up to 1.6 ulp in `log` and by 2.5 in `log1p`.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# How far the series go, by the bytes of a float.
_EXP_TERMS = {4: 7, 8: 13}
_LOG_TERMS = {4: 4, 8: 10}
# log(2) in two parts. The first is so short that its product with an exponent is exact.
_LOG_2 = {
    4: (0.693145751953125, 1.4286068203094173e-06),
    8: (0.693147180559663, 2.8235290563031577e-13),
}


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """`x + y`, rounded, and what rounding took from it (Knuth)."""
    total = x + y
    virtual = total - x
    return total, (x - (total - virtual)) + (y - virtual)


def exp(x: Array, rest: Array, lift: int = 0) -> Array:
    """The exponential of `x + rest`, times `2 ** lift`; 0 if that is not a normal number.

    `x` is at most 0, and `rest` small.
    """
    high, low = _LOG_2[x.dtype.itemsize]
    exponent = lax.round(x * (1 / math.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    # exp(x + rest) = 2 ** exponent exp(r), and |r| < 0.35.
    r = (x - exponent * high) - (exponent * low - rest)
    tail = jnp.zeros_like(x)
    for n in range(_EXP_TERMS[x.dtype.itemsize], 1, -1):
        tail = tail * r + 1 / math.factorial(n)
    p = 1 + (r + tail * (r * r))
    least = math.log(jnp.finfo(x.dtype).tiny) - lift * math.log(2)
    return jnp.where(x < least, 0, p * _power_of_2(exponent + lift))


def _power_of_2(exponent: Array) -> Array:
    finfo = jnp.finfo(exponent.dtype)
    integer = jnp.int32 if finfo.bits == 32 else jnp.int64
    # With this added, a whole number is the last bits of a float.
    bits = lax.bitcast_convert_type(exponent + 1.5 * 2.0**finfo.nmant, integer)
    return lax.bitcast_convert_type((bits + (finfo.maxexp - 1)) << finfo.nmant, exponent.dtype)


def log1p(x: Array) -> Array:
    """`log(1 + x)` for `x > -1`, within 1.5 ulp: in float64, XLA for CPU is off by up to 120."""
    total, rest = two_sum(x, jnp.ones_like(x))
    return jnp.log(total) + rest * (1 / total)


def log(x: Array, rest: Array) -> Array:
    """`log(x + rest)` for `x >= 1`, or 0, where `rest` is what rounding took from `x`."""
    finfo = jnp.finfo(x.dtype)
    integer = jnp.int32 if finfo.bits == 32 else jnp.int64
    # x = 2 ** exponent (1 + f), with 1 + f from the root of 1/2 to that of 2.
    low_end = lax.bitcast_convert_type(jnp.asarray(math.sqrt(0.5), x.dtype), integer)
    bits = lax.bitcast_convert_type(x, integer)
    exponent = (bits - low_end) >> finfo.nmant
    f = lax.bitcast_convert_type(bits - (exponent << finfo.nmant), x.dtype) - 1
    # log(1 + f) = f - (h - s (h + tail)): what is rounded is small beside f.
    s = f / (2 + f)
    square = s * s
    tail = jnp.zeros_like(x)
    for n in range(_LOG_TERMS[x.dtype.itemsize], 0, -1):
        tail = square * (2 / (2 * n + 1) + tail)
    half = f * f / 2
    high, low = _LOG_2[x.dtype.itemsize]
    exponent = exponent.astype(x.dtype)
    long, short = exponent * high, exponent * low
    total = long + f
    error = (long - total) + f
    result = total + (error + ((rest / x + short) - (half - s * (half + tail))))
    return jnp.where(x == 0, -jnp.inf, jnp.where(x < jnp.inf, result, x))


def sqrt(x: Array) -> Array:
    """The square root, 0 of what is not positive, with derivative 0 there."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def nan_unless(known: Array, x: Array) -> Array:
    """`x`, NaN where it is not known to be right.

    NaN is made where it is needed only, or `jax.debug_nans` would find it in valid calls.
    """
    return x + (jnp.sqrt(jnp.where(known, 1, -1).astype(x.dtype)) - 1)
