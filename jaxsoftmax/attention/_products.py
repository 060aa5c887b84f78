"""The matrix products of attention, in the order of axes that their derivatives are fast in.

Queries (rows, features), keys (features, length) and scores (rows, length) make one trilinear form,
`sum(query[r, h] * key[h, s] * scores[r, s])`, summed over all three indices. Its derivative in one
of them is a product of the other two, whose own derivatives are again such products: the three
functions here are all that attention needs, to any order. Values take the place of keys, outputs
that of queries.

They are a primitive because JAX's own transpose of a product puts the cotangent first and so turns
the scores round, the largest of all. A custom rule would not do: rules are not transposed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import wide


def scores(query: Array, key: Array) -> Array:
    """(..., rows, features), (..., features, length) -> (..., rows, length)."""
    return _bind(_SCORES, query, key)


def rows(scores: Array, key: Array) -> Array:
    """(..., rows, length), (..., features, length) -> (..., rows, features)."""
    return _bind(_ROWS, scores, key)


def columns(query: Array, scores: Array) -> Array:
    """(..., rows, features), (..., rows, length) -> (..., features, length)."""
    return _bind(_COLUMNS, query, scores)


_product = Primitive("attention_product")


def _bind(axes: str, first: Array, second: Array) -> Array:
    first = vary_like(first, second)
    second = vary_like(second, first)
    (out,) = jax.make_jaxpr(functools.partial(_evaluate, axes=axes, out=None))(
        first, second
    ).out_avals
    return _product.bind(first, second, axes=axes, out=out)


def _evaluate(first: Array, second: Array, *, axes: str, out: Any) -> Array:
    widest = max(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(axes, first, second, preferred_element_type=wide(widest))


def _batch(args: Sequence[Any], dims: Sequence[Any], *, axes: str, out: Any) -> tuple[Array, int]:
    (size,) = {x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None}
    in_front = [batching.bdim_at_front(x, d, size) for x, d in zip(args, dims, strict=True)]
    return _bind(axes, *in_front), 0


def _transpose_first(ct: Array, first: Any, second: Array, *, axes: str, out: Any) -> Array:
    return _DERIVATIVES[axes][0](ct, second).astype(first.aval.dtype)


def _transpose_second(ct: Array, first: Array, second: Any, *, axes: str, out: Any) -> Array:
    return _DERIVATIVES[axes][1](ct, first).astype(second.aval.dtype)


_SCORES, _ROWS, _COLUMNS = "...rh,...hs->...rs", "...rs,...hs->...rh", "...rh,...rs->...hs"
# Of a cotangent and the other factor.
_DERIVATIVES = {
    _SCORES: (rows, lambda ct, query: columns(query, ct)),
    _ROWS: (scores, columns),
    _COLUMNS: (lambda ct, weights: rows(weights, ct), lambda ct, query: scores(query, ct)),
}
_product.def_impl(_evaluate)
_product.def_abstract_eval(lambda *_, axes, out: out)
mlir.register_lowering(_product, mlir.lower_fun(_evaluate, multiple_results=False))
batching.primitive_batchers[_product] = _batch
ad.defbilinear(_product, _transpose_first, _transpose_second)
