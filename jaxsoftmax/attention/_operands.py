"""How blocks are cut from arrays, and how what they give is put together again."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._reductions import vary_like
from jaxsoftmax.attention._bands import Band

# The axes of the scores, (B, N, T, S), along which blocks are cut.
ROW_AXIS, KEY_AXIS = 2, 3


@dataclasses.dataclass(frozen=True)
class Operand:
    """Whether blocks are cut along an axis; where its size is 1, all see the same.

    Attributes:
      rows: along the query rows.
      keys: along the keys.
      grouped: whether its first axes are the batch and the heads.
    """

    rows: bool = False
    keys: bool = False
    grouped: bool = True

    def has_rows(self, x: Array) -> bool:
        """Whether each block sees rows of its own."""
        return self.rows and x.shape[ROW_AXIS] != 1

    def has_keys(self, x: Array) -> bool:
        """Whether blocks may see different keys."""
        return self.keys and x.shape[KEY_AXIS] != 1

    def cut(self, x: Array, band: Band, first_row: int | Array) -> Array:
        """The part that a block sees."""
        if band.stride > 1 and self.has_rows(x):
            return _cut_rows(x, band, first_row)
        starts, sizes = self._window(x, band, first_row)
        return x if sizes == x.shape else lax.dynamic_slice(x, starts, sizes)

    def add(self, total: Array, part: Array, band: Band, first_row: int | Array) -> Array:
        """`total` with `part` added where `cut` took it from, along the keys."""
        part = part.astype(total.dtype)
        if part.shape == total.shape:
            return total + part
        starts, sizes = self._window(total, band, first_row)
        part = lax.dynamic_slice(total, starts, sizes) + part
        return lax.dynamic_update_slice(total, part, starts)

    def spread(self, part: Array, x: Array, band: Band, first_row: int | Array) -> Array:
        """`part` with 0 for all keys that the block does not see."""
        if not self.has_keys(x) or part.shape[KEY_AXIS] == x.shape[KEY_AXIS]:
            return part
        shape = (*part.shape[:KEY_AXIS], x.shape[KEY_AXIS])
        zeros = vary_like(jnp.zeros(shape, part.dtype), part)
        return lax.dynamic_update_slice(zeros, part, _indices(0, 0, 0, band.key_start(first_row)))

    def _window(
        self, x: Array, band: Band, first_row: int | Array
    ) -> tuple[list[Array], tuple[int, ...]]:
        starts: list[int | Array] = [0] * x.ndim
        sizes = list(x.shape)
        if self.has_rows(x):
            starts[ROW_AXIS], sizes[ROW_AXIS] = first_row, band.rows
        if self.has_keys(x):
            starts[KEY_AXIS], sizes[KEY_AXIS] = band.key_start(first_row), band.keys
        return _indices(*starts), tuple(sizes)


def _cut_rows(x: Array, band: Band, first_row: int | Array) -> Array:
    """The rows of a block of an interleaved band, with all keys."""
    split = x.reshape(*x.shape[:ROW_AXIS], band.rows, band.stride, *x.shape[ROW_AXIS + 1 :])
    return lax.dynamic_index_in_dim(split, first_row, ROW_AXIS + 1, keepdims=False)


def _indices(*starts: int | Array) -> list[Array]:
    """Indices of one dtype, as a slice wants them."""
    return [jnp.asarray(start, jnp.int32) for start in starts]


WHOLE = Operand()
# What functions close over: what its axes are is not known.
UNKNOWN = Operand(grouped=False)
ROWS = Operand(rows=True)
KEYS = Operand(keys=True)
SCORES = Operand(rows=True, keys=True)


def stack(x: Array, band: Band) -> Array:
    """The rows of a band, block by block: (blocks, B, N, rows, ...)."""
    x = lax.slice_in_dim(x, band.start, band.start + band.blocks * band.rows, axis=ROW_AXIS)
    block_axis, sizes = _block_axis(band)
    x = x.reshape(*x.shape[:ROW_AXIS], *sizes, *x.shape[ROW_AXIS + 1 :])
    return jnp.moveaxis(x, block_axis, 0)


def unstack(x: Array, band: Band) -> Array:
    """(blocks, B, N, rows, ...) with the rows of all blocks in one axis."""
    x = jnp.moveaxis(x, 0, _block_axis(band)[0])
    return x.reshape(*x.shape[:ROW_AXIS], band.blocks * band.rows, *x.shape[ROW_AXIS + 2 :])


def _block_axis(band: Band) -> tuple[int, tuple[int, int]]:
    """Which axis tells the block where rows are split, and the sizes of the two."""
    if band.stride == 1:
        return ROW_AXIS, (band.blocks, band.rows)
    return ROW_AXIS + 1, (band.rows, band.blocks)


def join(bands: Sequence[Array]) -> Array:
    """The rows of all bands, which come in order."""
    return bands[0] if len(bands) == 1 else jnp.concatenate(bands, ROW_AXIS)
