"""Dropout whose choices depend on nothing but the key and the four indices of a weight."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


def scale(rate: float, key: Array, places: Sequence[Array], offset: ArrayLike = 0) -> Array:
    """What to multiply weights by: 0 for the share `rate` of them, `1 / (1 - rate)` for the rest.

    How a sequence is cut into blocks, or spread over devices, does not change the choices: each
    row draws two random numbers, and each weight hashes them with the position of its key.

    Args:
      rate: the share, from 0 to 1, not 1.
      key: a key of `jax.random`.
      places: the indices of batch, head, query and key, one vector each.
      offset: what is added to those of queries, a number or (B, 1, 1, 1).
    """
    batch, heads, queries, keys = places
    queries = queries[None] + jnp.broadcast_to(offset, (batch.size, 1, 1, 1))[:, 0, 0]
    seeds = _row_seeds(key, batch, heads, queries)
    keys = keys.astype(jnp.uint32)[None, None, None, :]
    bits = _mixed(_mixed(keys ^ seeds[..., :1]) + seeds[..., 1:])
    dropped = bits < jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(dropped, 0.0, 1 / (1 - rate))


def _row_seeds(key: Array, batch: Array, heads: Array, queries: Array) -> Array:
    """Two random numbers for each row, (B, N, rows, 2), of which queries are (B, rows)."""

    def seed(*indices: Array) -> Array:
        own = key
        for index in indices:
            own = jax.random.fold_in(own, index)
        return jax.random.bits(own, (2,), jnp.uint32)

    over_queries = jax.vmap(seed, (None, None, 0))
    over_heads = jax.vmap(over_queries, (None, 0, None))
    return jax.vmap(over_heads, (0, None, 0))(batch, heads, queries)


def _mixed(x: Array) -> Array:
    """A bijection of 32-bit words in which every bit depends on all (Wellons' "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
