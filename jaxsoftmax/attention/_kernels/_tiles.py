"""Which tiles a kernel goes through, and how rows of scores lie in them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax._form import Form
from jaxsoftmax.attention._arguments import Sizes
from jaxsoftmax.attention._kernels._forms import LEAST as LEAST

F32 = jnp.float32
# Scores of +inf count as this, so that differences tell which they are.
MOST = float(np.nextafter(np.float32(-LEAST), np.float32(0)))
# From here on a row has seen nothing.
NOTHING = LEAST / 2
Refs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call while tracing.

    Attributes:
      form: the mapping.
      sizes: those of the arrays, before anything is filled up.
      block: how many queries and keys a tile has, 0: as many as suit the kernels.
      before: how far a query sees before its own position, None: without limit.
      after: the same, after its own position.
      offset: the position of the first query.
      scale: multiplies the products of queries and keys.
      soft_cap: bounds the scores, None: without bounds.
      score_mod: changes a score, given its indices.
      mask_mod: tells whether a score takes part, given its indices.
      params: how many parameters the form has.
      whole: whether the scores of all keys stay in VMEM, or are made anew for each pass.
      interpret: whether the kernels are interpreted, where there is no such device.
      part: how many columns of a tile are at work at once, where registers are few.
    """

    form: Form
    sizes: Sizes
    block: int
    before: int | None = None
    after: int | None = None
    offset: int = 0
    scale: float = 1.0
    soft_cap: float | None = None
    score_mod: Callable[..., Array] | None = None
    mask_mod: Callable[..., Array] | None = None
    params: int = 0
    whole: bool = True
    interpret: bool = False
    part: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether queries can take the scale without rounding: a power of 2."""
        return math.frexp(abs(self.scale))[0] == 0.5

    @property
    def factor(self) -> float:
        """What products are multiplied by."""
        return 1.0 if self.is_exact else self.scale

    def scaled(self, query: Array) -> Array:
        """The queries that products are made of."""
        return query * jnp.asarray(self.scale, query.dtype) if self.is_exact else query

    @property
    def queries(self) -> int:
        """How many queries there are in whole blocks."""
        return self.blocks_of(self.sizes.queries) * self.block

    @property
    def keys(self) -> int:
        """How many keys there are in whole blocks."""
        return self.blocks_of(self.sizes.keys) * self.block

    def blocks_of(self, n: int) -> int:
        """How many blocks hold `n` rows."""
        return -(-n // self.block)


class Rows(Protocol):
    """How rows lie in tiles of scores; row values have one number a row."""

    @property
    def key_axis(self) -> int:
        """The axis of a tile along which keys lie."""
        ...

    def full(self, value: Any) -> Array:
        """A row value of one number."""
        ...

    def sum(self, tile: Array) -> Array:
        """The sum over keys, a row value."""
        ...

    def max(self, tile: Array) -> Array:
        """The maximum over keys, a row value."""
        ...

    def spread(self, row: Array, like: Array) -> Array:
        """A row value that broadcasts to what is like."""
        ...

    def settled(self, x: Array) -> Array:
        """The same where all of its kind lie, so that a loop can carry it."""
        ...

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of forms or users, made of what the compiler knows."""
        ...


@dataclasses.dataclass(frozen=True)
class RowsInLanes:
    """Those of a TPU: keys down the sublanes, queries across the lanes.

    So a number per query is one row of lanes, and a sum over keys adds up registers.

    Attributes:
      block: how many rows there are.
    """

    block: int
    key_axis: int = 0

    def full(self, value: Any) -> Array:
        """A row value of one number."""
        return jnp.full((1, self.block), value, F32)

    def sum(self, tile: Array) -> Array:
        """The sum over keys."""
        return sum_of(tile)

    def max(self, tile: Array) -> Array:
        """The maximum over keys."""
        return max_of(tile)

    def spread(self, row: Array, like: Array) -> Array:
        """The same: it broadcasts by itself."""
        del like
        return row

    def settled(self, x: Array) -> Array:
        """The same: the compiler finds a place."""
        return x

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same."""
        return function


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program of the grid works, and what it can read."""

    call: Call
    refs: Refs
    batch: Any
    head: Any
    rows: Rows

    def number(self, name: str) -> Any:
        """A number of the batch entry and head, from scalar memory."""
        ref = self.refs[name]
        batches, heads = ref.shape
        return ref[self.batch if batches > 1 else 0, self.head if heads > 1 else 0]

    @property
    def params(self) -> tuple[Array, ...]:
        """The parameters of the form, a row value each."""
        numbers = (self.number(f"param {i}") for i in range(self.call.params))
        return tuple(map(self.rows.full, numbers))

    @property
    def offset(self) -> Any:
        """The position of the first query."""
        return self.number("query_offset") if "query_offset" in self.refs else self.call.offset

    @property
    def keys(self) -> Any:
        """How many keys take part."""
        return self._length("key_lengths", self.call.sizes.keys)

    @property
    def queries(self) -> Any:
        """How many queries take part."""
        return self._length("query_lengths", self.call.sizes.queries)

    def _length(self, name: str, size: int) -> Any:
        return least(self.number(name), size) if name in self.refs else size


def least(x: Any, y: Any) -> Any:
    """The lesser of two integers, which may be known."""
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def most(x: Any, y: Any) -> Any:
    """The greater of two integers, which may be known."""
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.maximum(x, y)


def _quotient(x: Any, y: int) -> Any:
    # `//` of what is traced asks which device there is.
    return x // y if isinstance(x, int) else lax.div(x, jnp.asarray(y, x.dtype))


def _int32(x: Any) -> Any:
    # With x64 enabled, counters would be of a type that no kernel has.
    return np.int32(x) if isinstance(x, int) else x.astype(jnp.int32)


def _if(condition: Any, x: Any) -> Any:
    return jnp.where(condition, _int32(x), np.int32(0))


@dataclasses.dataclass(frozen=True)
class Range:
    """Which tiles of a row or column of tiles are seen: from `first` to before `last`.

    Between `inner` and `outer` no tile is cut by positions.
    """

    first: Any
    inner: Any
    outer: Any
    last: Any

    def loop(self, body: Callable[..., Any], carry: Any) -> Any:
        """`carry = body(tile, is_cut, carry)` for all of them."""
        for start, stop, is_cut in (
            (self.first, self.inner, True),
            (self.inner, self.outer, False),
            (self.outer, self.last, True),
        ):
            if not (isinstance(start, int) and isinstance(stop, int) and start >= stop):

                def step(i: Any, carry: Any, is_cut: bool = is_cut) -> Any:
                    return body(i, is_cut, carry)

                carry = lax.fori_loop(_int32(start), _int32(stop), step, carry)
        return carry


def _range(seen: tuple[Any, Any], by_all: tuple[Any, Any], end: Any, block: int) -> Range:
    """Of the places that any and all of the other axis see, between 0 and `end`."""
    low, high = most(seen[0], 0), most(least(seen[1], end), 0)
    first, last = _quotient(low, block), _quotient(high + (block - 1), block)
    last = most(last, first)
    inner = _quotient(most(by_all[0], 0) + (block - 1), block)
    if not (isinstance(inner, int) and inner == 0):
        inner = least(most(inner, first), last)
    if (
        isinstance(end, int)
        and end % block == 0
        and isinstance(by_all[1], int)
        and by_all[1] >= end
    ):
        return Range(first, inner, last, last)
    outer = _quotient(most(least(by_all[1], end), 0), block)
    return Range(first, inner, least(most(outer, inner), last), last)


# Beyond all positions, and yet twice it is an int32.
_FAR = 2**30


def keys_seen(place: Place, block: Any) -> Range:
    """The tiles of keys that a block of queries sees."""
    call, size = place.call, place.call.block
    start = block * size + place.offset
    stop = start + size - 1
    before, after = call.before, call.after
    low = (0, 0) if before is None else (start - before, stop - before)
    high = (_FAR, _FAR) if after is None else (stop + after + 1, start + after + 1)
    end = place.keys
    if "query_lengths" in place.refs:
        end = _if(block * size < place.queries, end)
    return _range((low[0], high[0]), (low[1], high[1]), end, size)


def queries_seeing(place: Place, block: Any) -> Range:
    """The tiles of queries that see some of a block of keys."""
    call, size = place.call, place.call.block
    start, offset, keys = block * size, place.offset, place.keys
    stop = start + size - 1
    before, after = call.before, call.after
    low = (0, 0) if after is None else (start - after - offset, stop - after - offset)
    high = (_FAR, _FAR)
    if before is not None:
        high = (stop + before + 1 - offset, start + before + 1 - offset)
    queries = place.queries
    inner = high[1]
    if not (isinstance(keys, int) and keys == call.keys):
        queries = _if(start < keys, queries)
        inner = _if(stop < keys, inner)
    # A block of queries that are few is whole: what fills it up has no cotangent.
    end = queries if "query_lengths" in place.refs else _filled(queries, call)
    return _range((low[0], high[0]), (low[1], inner), end, size)


def _filled(queries: Any, call: Call) -> Any:
    return call.queries if isinstance(queries, int) else _if(queries > 0, call.queries)


def slice_of(tile: Any, size: int) -> Any:
    """Where a tile lies along an axis."""
    return pl.ds(pl.multiple_of(tile * size, size), size)


def product(x: Array, y: Array) -> Array:
    """A matrix product, summed in float32 and exact for factors in it."""
    precision = lax.Precision.HIGHEST if x.dtype == F32 else None
    numbers = (((1,), (0,)), ((), ()))
    return lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=F32)


def sum_of(x: Array) -> Array:
    """The sum over keys, a row value."""
    return jnp.sum(x, 0, keepdims=True)


def max_of(x: Array) -> Array:
    """The maximum over keys, a row value."""
    return jnp.max(x, 0, keepdims=True)
