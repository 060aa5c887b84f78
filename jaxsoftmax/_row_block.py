"""A block of rows in a kernel: one more kind of rows.

What is written in terms of `Rows` runs in a kernel as it is. Entries lie along the lanes, as in
memory. Row values are turned: each has a lane, so that a step of a search works on 128 rows in one
register, and a sum over a row ends with a sum of registers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax._implementations import refuse
from jaxsoftmax._reductions import Entries, ExactSums, Rows, Terms, iterate, with_first

F32 = jnp.float32
LANES = 128
# At most: how many row values beside parameters are in all lanes, how many terms a pass adds up;
# and how many of the largest entries of each lane are kept.
PLACES = 4, 4, 2
# How many rows are gone through at once, and how many times 128 entries of these without a loop.
_AT_ONCE = 32
_UNROLLED = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An entry of each row, made where it is asked for: none is kept.

    Attributes:
      function: of entries and row values.
      entries: other such, or what lies in VMEM, (rows, entries).
      row_values: the row values, (1, rows).
    """

    function: Callable[..., Any]
    entries: Sequence[Any]
    row_values: Sequence[Array] = ()
    dtype: Any = F32

    def values(self) -> dict[int, Array]:
        """All row values that it takes, once each."""
        found = {id(x): x for x in self.row_values}
        for entry in self.entries:
            found |= entry.values() if isinstance(entry, Entry) else {}
        return found

    def at(self, place: "Place") -> Any:
        """What it is somewhere."""
        entries = [e.at(place) if isinstance(e, Entry) else e[place.where] for e in self.entries]
        return self.function(*entries, *(place.values[id(x)] for x in self.row_values))


@dataclasses.dataclass(frozen=True)
class Place:
    """128 entries of some rows.

    Attributes:
      where: rows and lanes.
      values: row values of these rows, each in all lanes.
    """

    where: tuple[Any, Any]
    values: dict[int, Array]


@dataclasses.dataclass(frozen=True)
class Few:
    """Some entries of each row, (entries, rows)."""

    ref: Any
    dtype: Any = F32


class Seen(NamedTuple):
    """What a first pass finds.

    Attributes:
      entry: of what.
      few: the largest and the second largest of each lane.
      third: the largest of those that are third in their lane, a row value.
      nan: 0, NaN in rows that hold one.
    """

    entry: Entry
    few: tuple[Few, Few]
    third: Array
    nan: Array


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Block(Rows):
    """A block of rows in VMEM.

    Attributes:
      count: how many entries each row has in memory.
      held: room for the entries, (rows, entries).
      spread: room for row values in all lanes, (values, rows, lanes).
      parts: room for what the lanes of rows gather, (terms, rows, lanes).
      few: room for the two largest entries of each lane, (2, lanes, rows).
      kept: the row values that stay in all lanes, in the order of their places.
      seen: what first passes found.
    """

    axes: tuple[int, ...] = (0,)
    count: int
    held: Any
    spread: Any
    parts: Any
    few: Any
    kept: list[Array] = dataclasses.field(default_factory=list)
    seen: list[Seen] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """How many rows there are."""
        return self.held.shape[0]

    def length(self, entries: Entries) -> int:
        return self.count + len(entries) - 1

    def rounded(self, scores: Entries) -> Entries:
        return scores

    def map(self, function: Any, entries: Any, row_values: Sequence[Array] = ()) -> Any:
        first, *sinks = zip(*entries, strict=True)
        made = Entry(function, first, tuple(row_values))
        return (made, *(function(*sink, *row_values) for sink in sinks))

    def sum(self, entries: Any) -> Array:
        return self.sums(lambda x: (x,), [entries])[0]

    def sums(
        self,
        function: Terms,
        entries: Any,
        row_values: Sequence[Array] = (),
        exactly: ExactSums | None = None,
    ) -> tuple[Array, ...]:
        members = zip(*entries, strict=True)
        found = [self._sums_of(function, member, tuple(row_values)) for member in members]
        found.append([self.seen[-1].nan] * len(found[0]))
        return tuple(functools.reduce(jnp.add, terms) for terms in zip(*found, strict=True))

    def _sums_of(
        self, function: Terms, member: Sequence[Any], row_values: tuple[Array, ...]
    ) -> Sequence[Array]:
        if isinstance(member[0], Few):
            some = [few.ref[...] for few in member]
            # Mosaic does not broadcast what a comparison gives.
            terms = function(*some, *(jnp.broadcast_to(x, some[0].shape) for x in row_values))
            return [jnp.sum(x, 0, keepdims=True) for x in terms]
        if not isinstance(member[0], Entry):  # a sink
            return function(*member, *row_values)
        types = [jax.ShapeDtypeStruct((1, 1), F32)] * (len(member) + len(row_values))
        number = len(jax.eval_shape(function, *types))
        terms = Entry(function, member, row_values)

        def add(place: Place, sums: Any) -> Any:
            return tuple(map(jnp.add, sums, terms.at(place)))

        parts = self._gather(terms, add, [0.0] * number)
        return [jnp.sum(x, 0, keepdims=True) for x in parts]

    def max(self, entries: Any, least: float = -math.inf) -> Array:
        first, *sink = entries
        seen = self._look_at(first)
        top = jnp.maximum(jnp.max(seen.few[0].ref[...], 0, keepdims=True), least)
        top = functools.reduce(jnp.maximum, sink, top) + seen.nan
        self.keep(top)
        return top

    def search(self, scores: Any, step: Callable[..., tuple[Any, Array]], start: Any) -> Any:
        """Begins with the two largest entries of each lane.

        These are all that take part if the third is below the edge of the support.
        """
        first, *sink = scores
        seen = self._look_at(first)
        # Constants have a layout of their own, which that of what a loop returns is not.
        start = jax.tree.map(lambda x: x + seen.nan, start)
        found = iterate(functools.partial(step, (*seen.few, *sink)), start)
        *_, hidden = jax.tree.leaves(step((seen.third,), found)[0])

        def search_all() -> Any:
            tau, *_ = jax.tree.leaves(found)
            return iterate(functools.partial(step, scores), with_first(start, tau))

        return lax.cond(jnp.any(hidden > 0), search_all, lambda: found)

    def in_blocks(self, function: Callable[..., Any], entries: Any, *row_values: Array) -> Any:
        return function(entries, *row_values)

    def hold(self, ref: Any) -> Entry:
        """The entries of `ref`, which is read once, as a whole: so XLA can make it on the way."""
        self.held[...] = ref[...]
        whole, left = divmod(self.count, LANES)
        if left:  # beyond the last entry may be anything
            last = slice(None), slice(whole * LANES, (whole + 1) * LANES)
            lane = lax.broadcasted_iota(jnp.int32, (self.size, LANES), 1)
            self.held[last] = jnp.where(lane < left, self.held[last], -jnp.inf)
        entry = Entry(lambda x: x, (self.held,))
        self._see(entry)
        return entry

    def write(self, entry: Entry, out: Any) -> None:
        """Writes all entries."""

        def step(place: Place, carry: None) -> None:
            out[place.where] = entry.at(place)

        self._over_rows(entry, lambda along, _: along(step, None))

    def keep(self, x: Array) -> None:
        """Brings a row value into all lanes, for all passes to come."""
        self._bring(len(self.kept), x)
        self.kept.append(x)

    def _bring(self, place: int, x: Array) -> None:
        if place >= self.spread.shape[0]:
            refuse("pallas", f"what takes {place + 1} values of each row")
        self.spread[place] = jnp.broadcast_to(x, (LANES, self.size)).T

    def _look_at(self, entry: Entry) -> Seen:
        if self.seen[-1].entry is not entry:
            self._see(entry)
        return self.seen[-1]

    def _see(self, entry: Entry) -> None:
        """The first pass."""

        def step(place: Place, carry: Any) -> Any:
            one, two, three, nan = carry
            x = entry.at(place)
            three = jnp.maximum(three, jnp.minimum(two, x))
            two = jnp.maximum(two, jnp.minimum(one, x))
            # Not every compiler's maximum keeps a NaN.
            return jnp.maximum(one, x), two, three, jnp.where(jnp.isnan(x), x, nan)

        one, two, three, nan = self._gather(entry, step, [-math.inf] * 3 + [0.0])
        self.few[0], self.few[1] = one, two
        few = Few(self.few.at[0]), Few(self.few.at[1])
        third, nan = jnp.max(three, 0, keepdims=True), jnp.sum(nan, 0, keepdims=True)
        self.seen.append(Seen(entry, few, third, nan))

    def _gather(
        self, entry: Entry, step: Callable[[Place, Any], Any], starts: Sequence[float]
    ) -> tuple[Array, ...]:
        """What `carry = step(place, carry)` gathers in each lane, turned: (lanes, rows)."""
        if len(starts) > self.parts.shape[0]:
            refuse("pallas", f"what adds up {len(starts)} terms")

        def body(along: Callable[..., Any], rows: Any) -> None:
            carry = tuple(jnp.full((self._at_once, LANES), start, F32) for start in starts)
            for i, part in enumerate(along(step, carry)):
                self.parts[i, rows] = part

        self._over_rows(entry, body)
        return tuple(self.parts[i].T for i in range(len(starts)))

    @property
    def _at_once(self) -> int:
        return min(_AT_ONCE, self.size)

    def _over_rows(self, entry: Entry, body: Callable[..., None]) -> None:
        """`body(along, rows)` for some rows at a time.

        There `carry = along(step, carry)` takes `carry = step(place, carry)` along the lanes.
        """
        where = {id(x): i for i, x in enumerate(self.kept)}
        row_values = entry.values()
        for key, x in row_values.items():
            if key not in where:
                where[key] = len(where)
                self._bring(where[key], x)

        def step(i: Any, carry: None) -> None:
            first = pl.multiple_of(i * np.int32(self._at_once), self._at_once)
            rows = pl.ds(first, self._at_once)
            values = {key: self.spread[where[key], rows] for key in row_values}
            body(functools.partial(self._along, rows, values), rows)

        lax.fori_loop(np.int32(0), np.int32(self.size // self._at_once), step, None)

    def _along(
        self, rows: Any, values: dict[int, Array], step: Callable[..., Any], carry: Any
    ) -> Any:
        number = self.held.shape[1] // LANES
        turns = number // _UNROLLED if number > 2 * _UNROLLED else 0

        def place(first: Any) -> Place:
            return Place((rows, pl.ds(first, LANES)), values)

        def turn(i: Any, carry: Any) -> Any:
            for j in range(_UNROLLED):
                at = (i * np.int32(_UNROLLED) + np.int32(j)) * np.int32(LANES)
                carry = step(place(pl.multiple_of(at, LANES)), carry)
            return carry

        if turns:
            carry = lax.fori_loop(np.int32(0), np.int32(turns), turn, carry)
        for j in range(turns * _UNROLLED, number):
            carry = step(place(j * LANES), carry)
        return carry
