"""Arrays over scores on a Hopper GPU: what a program reads of segments, masks and biases.

A program has a block of queries or of keys, its own, and goes along the tiles of the others.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax.attention._kernels import _hopper, _operands
from jaxsoftmax.attention._kernels._hopper import BLOCK
from jaxsoftmax.attention._kernels._operands import OVER_SCORES, Arrays
from jaxsoftmax.attention._kernels._tiles import F32, Call, Place, Range, least, most


def over_scores(call: Call, arrays: Arrays, by_keys: bool = False) -> dict[str, Array]:
    """What programs of queries, or of keys, read of such arrays, in whole blocks.

    That is (b, n, own, others), where b and n may be 1; or numbers of the others, (b, n, 1,
    others), or of what is their own, (b, n, own). "ends" is what `within` reads.
    """
    found = {}
    for name in OVER_SCORES:
        if name in arrays:
            x = arrays[name]
            if x.dtype != jnp.float16:  # which a TPU does not load
                x = _operands.loadable(name, x)
            if 1 in x.shape[2:]:  # so that few numbers have as many bytes as a copy takes
                x = x.astype(F32 if name == "bias" else jnp.int32)
            if x.shape[2:] == (1, 1):  # a number is one of each key
                x = jnp.broadcast_to(x, (*x.shape[:3], call.keys))
            for axis, length in ((2, call.queries), (3, call.keys)):
                x = _operands.lengthened(x, axis, length) if x.shape[axis] > 1 else x
            x = jnp.swapaxes(x, 2, 3) if by_keys else x
            found[name] = x[..., 0] if x.shape[3] == 1 else x
    holding = _holding(arrays)
    if holding:
        found["ends"] = _ends(call, functools.reduce(operator.and_, holding), by_keys)
    return found


def is_own(x: Any) -> bool:
    """Whether it has numbers of what is a program's own."""
    return len(x.shape) == 3


def is_of_pairs(x: Any) -> bool:
    """Whether it has a number for each pair of a query and a key."""
    return len(x.shape) == 4 and x.shape[2] > 1


def _holding(arrays: Arrays) -> list[Array]:
    """Which tiles may hold anything, (b, n, tiles, tiles) or 1 in places: by segments, by masks.

    A tile may have all segments between its first and its last: they are sorted, as a rule.
    """
    found = []
    if "query_segments" in arrays:
        (first, last), (other_first, other_last) = (
            [_by_tiles(arrays[name], of_tile) for of_tile in (jnp.min, jnp.max)]
            for name in ("query_segments", "key_segments")
        )
        found.append((first <= other_last) & (other_first <= last))
    if "mask" in arrays:
        found.append(_by_tiles(arrays["mask"], jnp.any))
    return found


def _by_tiles(x: Array, of_tile: Callable[..., Array]) -> Array:
    """An array over scores with one number a tile."""
    for axis in (2, 3):
        if x.shape[axis] > 1:
            widths = [(0, -n % BLOCK if i == axis else 0) for i, n in enumerate(x.shape)]
            x = jnp.pad(x, widths, mode="edge")
            x = of_tile(x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]), axis + 1)
    return x


def _ends(call: Call, holding: Array, by_keys: bool) -> Array:
    """The first tile of each block that may hold anything, and the end: (b, n, 2, blocks)."""
    tiles = (call.blocks_of(n) for n in (call.sizes.queries, call.sizes.keys))
    holding = jnp.broadcast_to(holding, (*holding.shape[:2], *tiles))
    holding = jnp.swapaxes(holding, 2, 3) if by_keys else holding
    count = holding.shape[3]
    first = jnp.argmax(holding, 3)
    last = jnp.where(jnp.any(holding, 3), count - jnp.argmax(holding[..., ::-1], 3), 0)
    return jnp.stack([first, last], 2).astype(jnp.int32)


@dataclasses.dataclass
class OverScores:
    """The arrays over scores of a program.

    Attributes:
      place: where it works.
      block: which block is its own.
    """

    place: Place
    block: Any

    def __post_init__(self) -> None:
        own = pl.ds(self.block * BLOCK, BLOCK)
        self.numbers: dict[str, Any] = {}
        self.tiles: dict[str, Any] = {}
        self.own: dict[str, Array] = {}
        for name in OVER_SCORES:
            if name in self.place.refs:
                ref, at = self.place.refs[name], self._entry(name)
                if is_of_pairs(ref):
                    self.tiles[name] = ref.at[(*at, own)]
                elif is_own(ref):
                    self.own[name] = self._loaded(ref.at[(*at, own)], _hopper.TILE.reduce(1), False)
                else:
                    self.numbers[name] = ref.at[(*at, 0)]

    def _entry(self, name: str) -> tuple[Any, Any]:
        place, (batches, heads) = self.place, self.place.refs[name].shape[:2]
        return place.batch if batches > 1 else 0, place.head if heads > 1 else 0

    def _loaded(self, ref: Any, layout: Any, optimized: bool = True) -> Array:
        return _hopper.loaded(ref, layout, self.place.call.interpret, optimized)

    def within(self, over: Range) -> Range:
        """The tiles of a range that may hold anything, and some between them that do not."""
        if "ends" not in self.place.refs:
            return over
        at = self._entry("ends")
        first, last = (self.place.refs["ends"][(*at, i, self.block)] for i in (0, 1))
        first = least(most(first, over.first), over.last)
        last = most(least(last, over.last), first)
        inner, outer = first, last
        if not _hopper.is_same(over.inner, over.first):
            inner = least(most(over.inner, first), last)
        if not _hopper.is_same(over.outer, over.last):
            outer = least(most(over.outer, inner), last)
        return Range(first, inner, outer, last)

    def pipeline(
        self, body: Callable[..., Any], over: Range, refs: Sequence[Any], carry: Any
    ) -> Any:
        """`carry = body(first, is_cut, parts, read, carry)`, where `read` gives parts by name."""
        part = self.place.call.part

        def step(first: Any, is_cut: Any, parts: Sequence[Any], carry: Any) -> Any:
            others = dict(zip([*self.numbers, *self.tiles], parts[len(refs) :], strict=True))
            read = functools.partial(self._read, others)
            return body(first, is_cut, parts[: len(refs)], read, carry)

        rows, columns = [*refs, *self.numbers.values()], [*self.tiles.values()]
        return _hopper.pipeline(step, over, part, rows, columns, carry)

    def _read(self, parts: Mapping[str, Any], name: str) -> Array:
        shape = BLOCK, self.place.call.part
        if name in self.tiles:
            return self._loaded(parts[name], _hopper.TILE)
        if name in self.own:
            return lax.broadcast_in_dim(self.own[name], shape, [0])
        numbers = self._loaded(parts[name], _hopper.TILE.reduce(0))
        return lax.broadcast_in_dim(numbers, shape, [1])
