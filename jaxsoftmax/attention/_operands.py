"""How blocks are cut from arrays, and how cotangents of the parts are put together again."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._reductions import vary_like
from jaxsoftmax.attention._plan import Band


@dataclasses.dataclass(frozen=True)
class Operand:
    """The axes along which blocks are cut from an array; where its size is 1, all see the same.

    Attributes:
      row_axis: the axis of the query rows.
      key_axis: the axis of the keys.
    """

    row_axis: int | None = None
    key_axis: int | None = None

    def has_rows(self, x: Array) -> bool:
        """Whether each block sees rows of its own."""
        return self.row_axis is not None and x.shape[self.row_axis] != 1

    def has_keys(self, x: Array) -> bool:
        """Whether blocks may see different keys."""
        return self.key_axis is not None and x.shape[self.key_axis] != 1

    def cut(self, x: Array, band: Band, first_row: int | Array) -> Array:
        """The part that a block sees."""
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
        if not self.has_keys(x):
            return part
        shape = list(part.shape)
        shape[self.key_axis] = x.shape[self.key_axis]
        starts = [0] * part.ndim
        starts[self.key_axis] = band.key_start(first_row)
        zeros = vary_like(jnp.zeros(shape, part.dtype), part)
        return lax.dynamic_update_slice(zeros, part, starts)

    def stack(self, x: Array, band: Band) -> Array:
        """The rows of a band as (blocks, ..., rows, ...)."""
        axis = self.row_axis
        x = lax.slice_in_dim(x, band.start, band.start + band.blocks * band.rows, axis=axis)
        x = x.reshape(*x.shape[:axis], band.blocks, band.rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def unstack(self, x: Array) -> Array:
        """What blocks gave, (blocks, ..., rows, ...), with the rows of all in their axis."""
        axis = self.row_axis
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def join(self, bands: Sequence[Array]) -> Array:
        """The rows of all bands, which come in order."""
        return bands[0] if len(bands) == 1 else jnp.concatenate(bands, self.row_axis)

    def _window(
        self, x: Array, band: Band, first_row: int | Array
    ) -> tuple[list[int | Array], tuple[int, ...]]:
        starts: list[int | Array] = [0] * x.ndim
        sizes = list(x.shape)
        if self.has_rows(x):
            starts[self.row_axis], sizes[self.row_axis] = first_row, band.rows
        if self.has_keys(x):
            starts[self.key_axis], sizes[self.key_axis] = band.key_start(first_row), band.keys
        return starts, tuple(sizes)


WHOLE = Operand()
ROWS = Operand(row_axis=2)
KEYS = Operand(key_axis=3)
SCORES = Operand(row_axis=2, key_axis=3)
