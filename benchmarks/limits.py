"""What the machine can do at best.

No function that has to move the same bytes should be faster than a copy of them, and none that has
to multiply as much should be faster than one large matrix product.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.measuring import Entry

_PRODUCT = 1024

# Read and write as many bytes as the first argument has, or all of them. (XLA would not copy.)
copy = {"a copy": Entry(lambda first, *_: jnp.negative(first), is_limit=True)}
copies = {"a copy": Entry(lambda *args: jax.tree.map(jnp.negative, args), is_limit=True)}


def products(flops: float, dtype: str = "float32") -> dict[str, Entry]:
    """As many floating-point operations, at the speed of a large matrix product."""
    multiply = jax.jit(jnp.matmul)
    entry = Entry(
        lambda *_: multiply(*_factors(dtype)),
        jit=False,
        times=flops / (2 * _PRODUCT**3),
        is_limit=True,
    )
    return {"the matrix products": entry}


@functools.cache
def _factors(dtype: str) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    shape = _PRODUCT, _PRODUCT
    return jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], shape, dtype)
