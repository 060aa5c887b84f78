"""How rows are split into chunks."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._reductions import is_known
from jaxsoftmax._sharding import parts_in_all, parts_of


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How rows are split into equal chunks; the last ones may be filled up.

    Attributes:
      shape: the axes of the rows.
      count: how many chunks.
      size: rows per chunk.
    """

    shape: tuple[int, ...]
    count: int
    size: int

    @staticmethod
    def of(shape: tuple[int, ...], size: int, together: int = 1) -> "Chunks":
        """Chunks of at most so many rows; as many as groups of at most `together` of them need."""
        rows = math.prod(shape)
        if not is_known(rows):
            return Chunks(shape, -(-rows // size), size)
        count = max(1, math.ceil(rows / size))
        groups = math.ceil(count / together)
        count = groups * math.ceil(count / groups)
        return Chunks(shape, count, max(1, math.ceil(rows / count)))

    def split(self, x: Array) -> Array:
        """Rows to chunks of rows, (count, size, ...); what is filled up is 0."""
        rows = x.reshape(math.prod(self.shape), *x.shape[len(self.shape) :])
        missing = self.count * self.size - rows.shape[0]
        if not is_known(missing) or missing:
            rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(self.count, self.size, *rows.shape[1:])

    def join(self, x: Array) -> Array:
        """Chunks of rows to rows."""
        return x.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)

    def grouped(self, x: Array, together: int) -> Array:
        """Chunks to larger ones, each of so many."""
        # In two steps, for either splits or merges an axis that `vmap` may have spread.
        return _merged(x.reshape(-1, together, *x.shape[1:]), 1)

    def apart(self, x: Array, together: int) -> Array:
        """The chunks of groups."""
        return _merged(x.reshape(x.shape[0], together, -1, *x.shape[2:]), 0)


@dataclasses.dataclass(frozen=True)
class SharedChunks:
    """The same for rows that XLA shares among devices: each chunk has some of every device.

    Attributes:
      axis: the axis that is split.
      count: how many chunks; the index of a row along the axis, modulo the count, tells which.
      size: rows per chunk on each device.
    """

    axis: int
    count: int
    size: int

    @staticmethod
    def of(hidden: Array, size: int) -> "SharedChunks":
        *shape, _ = hidden.shape
        axis = shape.index(max(shape))
        parts = parts_of(hidden, axis)
        most = max(shape[axis] // parts, 1)
        rows = math.ceil(math.prod(shape) / parts_in_all(hidden))
        wanted = math.ceil(rows / size)
        count = next(n for n in range(min(wanted, most), most + 1) if most % n == 0)
        return SharedChunks(axis, count, math.ceil(rows / count))

    def split(self, x: Array) -> Array:
        """Rows to chunks of rows, (count, ...)."""
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        return jnp.moveaxis(x.reshape(*before, -1, self.count, *after), self.axis + 1, 0)

    def join(self, x: Array) -> Array:
        """Chunks of rows to rows."""
        return _merged(jnp.moveaxis(x, 0, self.axis + 1), self.axis)

    def grouped(self, x: Array, together: int) -> Array:
        """Chunks to larger ones, each of so many: their rows take turns, on the device they are."""
        x = x.reshape(-1, together, *x.shape[1:])
        return _merged(jnp.moveaxis(x, 1, self.axis + 2), self.axis + 1)

    def apart(self, x: Array, together: int) -> Array:
        """The chunks of groups."""
        axis = self.axis + 1
        x = x.reshape(*x.shape[:axis], -1, together, *x.shape[axis + 1 :])
        return _merged(jnp.moveaxis(x, axis + 1, 1), 0)


def _merged(x: Array, axis: int) -> Array:
    """With an axis and the next as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def chunks_of_rows(hidden: Array, size: int | None, num_classes: int) -> Chunks | SharedChunks:
    """The chunks, of so many rows on each device, or as many as suit so many classes."""
    together = 1
    if size is None:
        size = chunk_size_for(num_classes) if is_known(math.prod(hidden.shape)) else _FEWEST
        together = most_in_one(size, num_classes)
    devices = parts_in_all(hidden)
    if devices == 1 or hidden.ndim == 1 or hidden.size == 0:
        return Chunks.of(hidden.shape[:-1], size, together)
    return SharedChunks.of(hidden, size)


def chunk_size_for(num_classes: int) -> int:
    """How many rows a chunk should have."""
    if not is_known(num_classes):
        return _FEWEST
    return max(_FEWEST, _SCORES // max(num_classes, 1))


def in_one(count: int, size: int, num_classes: int) -> int:
    """How many of `count` equal chunks an accelerator should take as one; they divide the count.

    Args:
      count: how many chunks there are.
      size: rows per chunk.
      num_classes: how many scores a row has.
    """
    if not (is_known(count) and is_known(num_classes)):
        return 1
    most = most_in_one(size, num_classes)
    return next(n for n in range(min(most, count), 0, -1) if count % n == 0)


def most_in_one(size: int, num_classes: int) -> int:
    """How many chunks of so many rows an accelerator should take as one at most."""
    if not is_known(num_classes):
        return 1
    rows = max(_FEWEST_OF_ACCELERATOR, _SCORES_OF_ACCELERATOR // max(num_classes, 1))
    return max(1, rows // size)


# So many rows keep the matrix products busy; where there are few classes, more still fit.
_FEWEST = 256
# How many scores a chunk has that is large enough for any CPU.
_SCORES = 2**23
# Each chunk rewrites the gradient of all weights. An accelerator takes as long for that as for the
# product that is added if a chunk has about 1,000 rows, whatever width and classes are. As compiled
# for 8,192 rows and 32,768 classes of width 1,024 in bfloat16, with 256, 1,024 and 2,048 rows a
# chunk: 5.6, 2.6 and 2.6 ms on an H100, 24.4, 15.6 and 14.2 on a v5e, at a tenth, a quarter and two
# fifths of the memory of all scores.
_FEWEST_OF_ACCELERATOR = 2**10
_SCORES_OF_ACCELERATOR = 2**25
