"""The output of attention, and what its reverse rule needs of each row."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax._reductions import indicator
from jaxsoftmax.attention._kernels import _operands
from jaxsoftmax.attention._kernels._forms import row_values
from jaxsoftmax.attention._kernels._operands import Arrays, turned
from jaxsoftmax.attention._kernels._scores import scores
from jaxsoftmax.attention._kernels._search import NOWHERE, Search, State
from jaxsoftmax.attention._kernels._tiles import (
    F32,
    LEAST,
    MOST,
    NOTHING,
    Call,
    Place,
    Range,
    Refs,
    RowsInLanes,
    keys_seen,
    max_of,
    product,
    slice_of,
    sum_of,
)

# Keys fall into this many classes, of each of which the two largest scores start the search.
CLASSES = 128


def forward(call: Call, arrays: Arrays, keep: bool) -> tuple[Array, dict[str, Array]]:
    """As `Kernels` asks.

    Kept are of each row "rows", numbers, (B, N, R, T), and "mean", (B, N, V, T); and "seen",
    (B, N, tiles, T), not 0 for tiles of keys of which it takes anything. Where this is missing,
    positions and lengths tell.
    """
    sizes, block = call.sizes, call.block
    query = _operands.lengthened(turned(call.scaled(arrays["query"])), 3, call.queries)
    key = _operands.lengthened(turned(arrays["key"]), 2, call.keys)
    value = _operands.lengthened(arrays["value"], 3, call.keys)

    def rows(count: int) -> tuple[Any, tuple[int, ...], Any]:
        shape = sizes.batch, sizes.heads, count, call.queries
        return _of_queries(call, count), shape, F32

    ins = {
        "query": (_of_queries(call, sizes.features), query),
        "key": (_operands.of_group(call, key.shape[2:]), key),
        "value": (_operands.of_group(call, value.shape[2:]), value),
        **{
            name: (_operands.block_of(x, 3, block), x)
            for name, x in _operands.over_scores(call, arrays).items()
        },
        **_operands.numbers(call, arrays),
    }
    features = sizes.value_features
    outs = {"out": rows(features)}
    if keep:
        outs["rows"] = rows(row_values(call.form))
        if not call.form.only_scales:
            outs["mean"] = rows(features)
        if _may_skip(call, arrays):
            outs["seen"] = rows(call.blocks_of(sizes.keys))
    blocks = call.blocks_of(sizes.queries)
    found = _operands.run(
        functools.partial(_kernel, call), call, blocks, ins, outs, _scratch(call, features)
    )
    found = {name: x[..., : sizes.queries] for name, x in found.items()}
    out = found.pop("out")
    return turned(out), {"mean": out, **found} if keep else {}


def _may_skip(call: Call, arrays: Arrays) -> bool:
    """Whether tiles may turn out to hold nothing, of which positions and lengths do not tell."""
    if not call.form.only_scales or call.mask_mod is not None:
        return True
    return "mask" in arrays or "query_segments" in arrays


def _of_queries(call: Call, rows: int) -> Any:
    return _operands.spec((1, 1, rows, call.block), lambda b, n, i: (b, n, 0, i))


def _scratch(call: Call, features: int) -> dict[str, Any]:
    found = {"out": _operands.scratch(features, call.block)}
    if not call.form.only_scales:
        found["mean"] = _operands.scratch(features, call.block)
        found["first"] = _operands.scratch(CLASSES, call.block)
        found["second"] = _operands.scratch(CLASSES, call.block)
        if call.whole:
            found["scores"] = _operands.scratch(call.keys, call.block)
    return found


def _kernel(call: Call, ins: Refs, outs: Refs, scratch: Refs) -> None:
    place = Place(call, ins, pl.program_id(0), pl.program_id(1), RowsInLanes(call.block))
    keys = Keys(place, scratch, pl.program_id(2), outs.get("seen"))
    sink = None
    if "sink" in ins:
        sink = jnp.minimum(jnp.full((1, call.block), place.number("sink"), F32), MOST)
    attend = _online if call.form.only_scales else _searching
    found = attend(keys, sink)
    unseeing = found["rows"][0] >= NOWHERE
    for i, row in enumerate(found.pop("rows")):
        if "rows" in outs:
            outs["rows"][0, 0, i : i + 1] = row
    for name in found:
        if name in outs:
            outs[name][0, 0] = jnp.where(unseeing, 0, found[name])


@dataclasses.dataclass
class Keys:
    """The keys that a block of queries sees, tile by tile.

    Attributes:
      place: where the program works.
      scratch: its memory.
      block: which block of queries.
      seen: where `see` writes, if anything is to be kept.
      made: whether the scores lie in memory already.
    """

    place: Place
    scratch: Refs
    block: Any
    seen: Any = None
    made: bool = False

    def __post_init__(self) -> None:
        if self.seen is not None:
            self.seen[...] = jnp.zeros_like(self.seen)
        self.range: Range = keys_seen(self.place, self.block)
        self.query = self.place.refs["query"][0, 0]

    def loop(self, body: Callable[..., Any], carry: Any) -> Any:
        """`carry = body(tile, scores, carry)`: one pass."""
        kept = self.scratch.get("scores")

        def step(tile: Any, is_cut: bool, carry: Any) -> Any:
            at = slice_of(tile, self.place.call.block)
            if self.made and kept is not None:
                return body(tile, kept[at, :], carry)
            x = self._make(tile, is_cut)
            if kept is not None:
                kept[at, :] = x
            return body(tile, x, carry)

        carry = self.range.loop(step, carry)
        self.made = True
        return carry

    def _make(self, tile: Any, is_cut: bool) -> Array:
        refs, at = self.place.refs, slice_of(tile, self.place.call.block)

        def read(name: str) -> Array:
            ref = refs[name]
            return ref[0, 0, at, :] if ref.shape[2] > 1 else ref[0, 0]

        products = product(refs["key"][0, 0, at, :], self.query)
        call = self.place.call
        first = tile * call.block, self.block * call.block
        x = scores(self.place, *first, read, is_cut, products).scores
        # Softmax, which reads a score once, bounds differences; that is one instruction less.
        return x if call.form.only_scales else jnp.minimum(x, MOST)

    def see(self, tile: Any, row: Array) -> None:
        """Notes which queries take anything of a tile, by what is not 0 then."""
        if self.seen is not None:
            self.seen[0, 0, pl.ds(tile, 1), :] = row

    def value(self, tile: Any) -> Array:
        """The values of a tile, (V, keys)."""
        return self.place.refs["value"][0, 0, :, slice_of(tile, self.place.call.block)]

    def is_padding(self) -> Array | None:
        """Which queries are none, a row value."""
        if "query_lengths" not in self.place.refs:
            return None
        size = self.place.call.block
        query = self.block * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        return query >= self.place.queries

    def unseeing(self, top: Array) -> Array:
        """Which queries get nothing, given the maximum of their scores."""
        padding = self.is_padding()
        return top < NOTHING if padding is None else (top < NOTHING) | padding


def _online(keys: Keys, sink: Array | None) -> dict[str, Any]:
    """Softmax: what was added up is scaled down as the maximum rises."""
    acc = keys.scratch["out"]
    acc[...] = jnp.zeros_like(acc)
    shape = 1, keys.place.call.block
    top = jnp.full(shape, LEAST, F32) if sink is None else sink
    total = jnp.full(shape, 0.0 if sink is None else 1.0, F32)

    def body(tile: Any, x: Array, carry: State) -> State:
        top, total = carry
        largest = max_of(x)
        keys.see(tile, indicator(~(largest <= NOTHING), F32))
        new = jnp.minimum(jnp.maximum(top, largest), MOST)
        weights, old = jnp.exp(jnp.minimum(x - new, 0)), jnp.exp(top - new)
        value = keys.value(tile)
        acc[...] = acc[...] * old + product(value, weights.astype(value.dtype))
        return new, total * old + sum_of(weights)

    top, total = keys.loop(body, (top, total))
    total = jnp.where(total > 0, total, 1)
    log_total = jnp.log(total)
    origin = jnp.where(keys.unseeing(top), NOWHERE, top + log_total)
    of_infinite = jnp.where(top == MOST, -log_total, 0)
    return {"out": acc[...] * (1 / total), "rows": (origin, of_infinite)}


def _searching(keys: Keys, sink: Array | None) -> dict[str, Any]:
    """Any other form: a threshold is found, and then all is added up at once."""
    few = _largest(keys)
    top = max_of(few[0][...])
    top = top if sink is None else jnp.maximum(top, sink)
    unseeing = keys.unseeing(top)
    call = keys.place.call
    seen_top = jnp.where(unseeing, 0, top)
    search = Search(call.form, keys.place.params, seen_top, unseeing, sink, keys.place.rows)
    state = search.solve(lambda: [x[...] for x in few], keys.loop, call.sizes.keys)
    return _mix(keys, search, state)


def _largest(keys: Keys) -> tuple[Any, Any]:
    """The largest scores of each class of keys, and the second largest: one pass."""
    first, second = keys.scratch["first"], keys.scratch["second"]
    first[...] = jnp.full_like(first, LEAST)
    second[...] = jnp.full_like(second, LEAST)

    def body(_: Any, x: Array, carry: int) -> int:
        one, two = first[...], second[...]
        for start in range(0, x.shape[0], CLASSES):
            own = x[start : start + CLASSES]
            two = jnp.maximum(two, jnp.minimum(one, own))
            one = jnp.maximum(one, own)
        first[...], second[...] = one, two
        return carry

    keys.loop(body, 0)
    return first, second


def _mix(keys: Keys, search: Search, state: State) -> dict[str, Any]:
    """The output, the mean of values by slopes, and what is kept of rows."""
    acc, of_slopes = keys.scratch["out"], keys.scratch["mean"]
    acc[...] = jnp.zeros_like(acc)
    of_slopes[...] = jnp.zeros_like(of_slopes)

    def body(tile: Any, x: Array, sums: State) -> State:
        terms, value = search.terms(x, state), keys.value(tile)
        acc[...] += product(value, terms[0].astype(value.dtype))
        of_slopes[...] += product(value, terms[1].astype(value.dtype))
        keys.see(tile, max_of(terms[0]))
        return search.added(sums, terms[:2])

    sums = search.with_sink(keys.loop(body, search.zeros(2)), state)
    mean = search.mean(sums, of_slopes[...])
    out = search.output(sums, acc[...], mean)
    return {"out": out, "mean": mean, "rows": search.kept(sums, state)}
