"""The matrix products of attention, in the order of axes that their derivatives are fast in.

Queries (rows, features), keys (features, length) and scores (rows, length) make one trilinear form,
`sum(query[r, h] * key[h, s] * scores[r, s])`, summed over all three indices. Its derivative in one
of them is a product of the other two, whose own derivatives are again such products: the three
functions here are all that attention needs, to any order. Values take the place of keys, outputs
that of queries.

They say themselves how they are transposed, because JAX's own transpose of a product puts the
cotangent first and so turns the scores round, the largest of all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax import _jax
from jaxsoftmax._platforms import chosen
from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import wide


def grouped(x: Array, key_heads: int) -> Array:
    """(B, N, rows, ...) with the heads that share keys as rows of one product."""
    batch, heads, rows, *rest = x.shape
    if heads == key_heads:
        return x
    # In two steps, here and below: either splits or merges an axis beside one that is spread.
    x = x.reshape(batch, key_heads, heads // key_heads, rows, *rest)
    return x.reshape(batch, key_heads, heads // key_heads * rows, *rest)


def apart(x: Array, heads: int) -> Array:
    """What `grouped` returns as it was: (B, N, rows, ...)."""
    batch, key_heads, rows, *rest = x.shape
    if heads == key_heads:
        return x
    rows = rows // (heads // key_heads)
    x = x.reshape(batch, key_heads, heads // key_heads, rows, *rest)
    return x.reshape(batch, heads, rows, *rest)


def scores(query: Array, key: Array) -> Array:
    """(..., rows, features), (..., features, length) -> (..., rows, length)."""
    return _of_alike(_SCORES, query, key)


def rows(scores: Array, key: Array) -> Array:
    """(..., rows, length), (..., features, length) -> (..., rows, features)."""
    return _of_alike(_ROWS, scores, key)


def columns(query: Array, scores: Array) -> Array:
    """(..., rows, features), (..., rows, length) -> (..., features, length)."""
    return _of_alike(_COLUMNS, query, scores)


def scores_less(query: Array, key: Array, row_values: Array) -> Array:
    """`scores(query, key)` less a number per row, (..., rows, 1), for keys `with_ones`.

    The number is one more feature of the query, in as many parts as their dtype needs to hold it:
    what is made of the product needs no other array, and so no kernel of its own on a GPU.
    """
    parts, rest = [], -row_values
    for _ in range(_PARTS):
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(query.dtype))
        rest = rest - part
    missing = key.shape[-2] - query.shape[-1] - _PARTS
    missing = jnp.zeros((*query.shape[:-1], missing), query.dtype)
    return scores(jnp.concatenate([query, *parts, vary_like(missing, query)], -1), key)


def with_ones(key: Array) -> Array:
    """Keys with some features more that are 1."""
    count = max(_BYTES // key.dtype.itemsize, _PARTS)
    ones = jnp.ones((*key.shape[:-2], count, key.shape[-1]), key.dtype)
    return jnp.concatenate([key, vary_like(ones, key)], -2)


# A GPU multiplies matrices fast whose rows are multiples of so many bytes.
_BYTES = 16
# Of 8 bits each, as bfloat16 has them: as many as float32 has.
_PARTS = 3


def _of_alike(axes: str, first: Array, second: Array) -> Array:
    first = vary_like(first, second)
    return _product(axes, False, first, vary_like(second, first))


def _product(axes: str, is_swapped: bool, first: Array, second: Array) -> Array:
    """The product as a linear function of its second factor, or of its first if it is swapped.

    Derivatives in the other factor are those of the product that is linear in that.
    """
    point, arg = (second, first) if is_swapped else (first, second)
    dtype = arg.dtype

    def ordered(points: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
        (point,), (arg,) = points, args
        return (arg, point) if is_swapped else (point, arg)

    def evaluate(points: Sequence[Any], args: Sequence[Any]) -> list[Array]:
        return [_evaluate(axes, *ordered(points, args))]

    def transpose(points: Sequence[Any], cts: Sequence[Any]) -> list[Any]:
        (ct,) = cts
        derivative = _DERIVATIVES[axes][0 if is_swapped else 1]
        return [None if ct is None else derivative(ct, points[0]).astype(dtype)]

    def other(points: Sequence[Any], args: Sequence[Any]) -> list[Array]:
        return [_product(axes, not is_swapped, *ordered(points, args))]

    _, _, out = _jax.hoist(functools.partial(_evaluate, axes), first, second)
    return _jax.linear(evaluate, transpose, [point], [arg], out, reference=other)[0]


def _evaluate(axes: str, first: Array, second: Array) -> Array:
    widest = max(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    product = functools.partial(jnp.einsum, axes, preferred_element_type=wide(widest))
    if axes == _COLUMNS and widest == jnp.bfloat16:
        return chosen("columns", product, first, second)
    return product(first, second)


_SCORES, _ROWS, _COLUMNS = "...rh,...hs->...rs", "...rs,...hs->...rh", "...rh,...rs->...hs"


def _narrow(product: Callable[..., Array]) -> Callable[..., Array]:
    """A product of a cotangent in the dtype of the other factor.

    Factors in half precision are multiplied at twice the rate; they are summed in float32. But the
    cotangents of scores are often less than the least number of float16.
    """

    def narrow(ct: Array, other: Array) -> Array:
        other = other.astype(ct.dtype) if other.dtype == jnp.float16 else other
        return product(ct.astype(other.dtype), other)

    return narrow


# Of a cotangent and the other factor.
_DERIVATIVES = {
    _SCORES: (_narrow(rows), _narrow(lambda ct, query: columns(query, ct))),
    _ROWS: (_narrow(scores), _narrow(columns)),
    _COLUMNS: (
        _narrow(lambda ct, weights: rows(weights, ct)),
        _narrow(lambda ct, query: scores(query, ct)),
    ),
}
