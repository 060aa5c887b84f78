"""Which query rows are taken together, and which keys they can reach; all of it static."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Band:
    """Consecutive blocks of query rows, each of which sees a stretch of keys of one length.

    Attributes:
      start: the first row.
      rows: how many rows a block has.
      blocks: how many blocks there are.
      keys: how many keys a block sees.
      first_key: the first of them; of the band's first block, if they slide.
      slide: how far a block's keys lie behind its first row, or None if all blocks see the same.
      total_keys: how many keys there are.
      stride: how far the rows of a block lie apart: 1, or as many as there are blocks.
    """

    start: int
    rows: int
    blocks: int
    keys: int
    first_key: int
    slide: int | None
    total_keys: int
    stride: int = 1

    def first_row(self, block: int | Array) -> int | Array:
        """The first row of a block."""
        return self.start + block * (self.rows if self.stride == 1 else 1)

    def row(self, first_row: int | Array, i: Array) -> Array:
        """The row that is number `i` of the block that begins at `first_row`."""
        return first_row + i * self.stride

    def key_start(self, first_row: int | Array) -> int | Array:
        """The first key of the block that begins at `first_row`."""
        if self.slide is None:
            return self.first_key
        start = jnp.asarray(first_row - self.slide, jnp.int32)
        return jnp.clip(start, 0, self.total_keys - self.keys)


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far before and after its own position a query sees; None: everything."""

    before: int | None = None
    after: int | None = None

    def of_rows_from(self, position: int) -> "Reach":
        """The same, as rows count that begin at a position."""
        before = None if self.before is None else self.before - position
        after = None if self.after is None else self.after + position
        return Reach(before, after)

    def keys(self, start: int, stop: int, total: int) -> tuple[int, int]:
        """The stretch of keys that rows from `start` to `stop` can see, never empty."""
        low = 0 if self.before is None else max(start - self.before, 0)
        high = total if self.after is None else min(max(stop + self.after, 0), total)
        low = min(low, total - 1)
        return low, max(high, low + 1)


def bands(queries: int, keys: int, rows: int, reach: Reach, most: int) -> tuple[Band, ...]:
    """Covers all query rows, from the first to the last, by `most` bands and one for the rest."""
    whole = queries // rows
    per_band = whole if reach == Reach() else math.ceil(whole / most)
    starts = range(0, whole, max(per_band, 1))
    parts = [_band(i * rows, rows, min(per_band, whole - i), keys, reach) for i in starts]
    if rest := queries % rows:
        parts.append(_band(queries - rest, rest, 1, keys, reach))
    return tuple(_merged(parts))


def interleaved(queries: int, keys: int, rows: int, parts: int) -> Band:
    """One band for arrays that XLA shares among devices: no block is one device's alone.

    Keys stay where they are, so all blocks see all of them.

    Args:
      queries: how many query rows there are.
      keys: how many keys.
      rows: how many rows a block should have, at most.
      parts: into how many equal parts the rows may have been split.
    """
    most = queries // parts
    blocks = min(math.ceil(queries / rows), most)
    while most % blocks:
        blocks += 1
    return Band(0, queries // blocks, blocks, keys, 0, None, keys, stride=blocks)


def _band(start: int, rows: int, blocks: int, total: int, reach: Reach) -> Band:
    low, high = reach.keys(start, start + rows * blocks, total)
    if reach.before is not None and reach.after is not None:
        window = min(reach.before + rows + reach.after, total)
        if window < high - low:
            return Band(start, rows, blocks, window, low, reach.before, total)
    return Band(start, rows, blocks, high - low, low, None, total)


def _merged(parts: Sequence[Band]) -> list[Band]:
    """Neighbours that see stretches of one length are one band: there is less to compile."""
    merged: list[Band] = []
    for band in parts:
        last = merged[-1] if merged else None
        if last is not None and _alike(last, band):
            merged[-1] = dataclasses.replace(last, blocks=last.blocks + band.blocks)
        else:
            merged.append(band)
    return merged


def _alike(first: Band, second: Band) -> bool:
    if (first.rows, first.keys, first.slide) != (second.rows, second.keys, second.slide):
        return False
    return first.slide is not None or first.first_key == second.first_key
