"""What XLA for TPU does better in another way."""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array

# As compiled for v5e: 64 MB of scores stay in VMEM. Under a causal mask 4 bands would save a third
# of the time, and take three times as long to compile.
ATTENTION = {
    "forward": 2**24,
    "backward": 2**24,
    "group": 2**24,
    "rows": (64, 1024),
    "bands": 2,
}


def add_product(
    general: Callable[..., Array], total: Array, hidden: Array, ct_scores: Array
) -> Array:
    """`general`, given a copy of a chunk's rows in half precision, which stays in VMEM.

    Where the chunk is a part of a larger array, each block of the product would read it once more.
    As compiled for v5e, a last layer's gradient takes 16.1 ms without, 15.6 with. In float32 it
    would take 1 % longer.
    """
    is_half = hidden.dtype.itemsize == 2
    return general(total, lax.optimization_barrier(hidden) if is_half else hidden, ct_scores)
