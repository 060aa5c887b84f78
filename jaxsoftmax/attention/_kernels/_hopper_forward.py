"""The output of attention on a Hopper GPU, and what its reverse rule needs of each row.

A program has a block of queries. Scores are made anew for each pass over the keys.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax.attention._kernels import _hopper, _operands
from jaxsoftmax.attention._kernels._forms import row_values
from jaxsoftmax.attention._kernels._hopper import BLOCK, RowsInRegisters
from jaxsoftmax.attention._kernels._hopper_arrays import OverScores, over_scores
from jaxsoftmax.attention._kernels._operands import Arrays
from jaxsoftmax.attention._kernels._plain import exp
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
    keys_seen,
)

# Keys fall into this many classes, of each of which the two largest scores start the search: as
# many as there are registers for.
CLASSES = 32
# Some features of the values, what is found of them by name, and what is kept of rows.
Found = Iterator[tuple[Any, dict[str, Array], State]]


def forward(call: Call, arrays: Arrays, keep: bool) -> tuple[Array, dict[str, Array]]:
    """As `Kernels` asks.

    Kept are of each row "rows", numbers, (B, N, R, T), and "mean", (B, T, N, V), both in whole
    blocks, and this with all features that values are given.
    """
    sizes = call.sizes
    ins = operands(call, arrays)
    query, width = ins["query"], sizes.value_features
    shape = sizes.batch, call.queries, sizes.heads, width
    outs: dict[str, Any] = {"out": (shape, F32)}
    if keep:
        numbers = row_values(call.form)
        outs["rows"] = (sizes.batch, sizes.heads, numbers, call.queries), F32
        if not call.form.only_scales:
            outs["mean"] = shape, F32
    scratch = {
        "query": _hopper.tiles(call, sizes.features, query.dtype),
        "out": _hopper.stretch(call, F32, width),
        "row": _hopper.row(),
        "barrier": _hopper.barrier(),
    }
    kernel = functools.partial(_kernel, call)
    found = _hopper.run(kernel, call, call.blocks_of(sizes.queries), ins, outs, scratch)
    out = found.pop("out")
    given = jnp.swapaxes(out, 1, 2)[:, :, : sizes.queries, : arrays["value"].shape[2]]
    return given, {"mean": out, **found} if keep else {}


def operands(call: Call, arrays: Arrays, by_keys: bool = False) -> dict[str, Array]:
    """Queries, keys and values, and all other arrays.

    Those over scores are for programs of queries or of keys.
    """
    features, values = call.sizes.features, call.sizes.value_features
    return {
        "query": laid(call.scaled(arrays["query"]), (0, 2, 1, 3), call.queries, features),
        "key": laid(arrays["key"], (0, 3, 1, 2), call.keys, features),
        "value": laid(arrays["value"], (0, 3, 1, 2), call.keys, values),
        **{name: x for name, (_, x) in _operands.numbers(call, arrays).items()},
        **over_scores(call, arrays, by_keys),
    }


def laid(x: Array, order: tuple[int, ...], length: int, width: int) -> Array:
    """An array turned to (B, length, heads, width), in whole blocks and in all features.

    Features that are 0 change neither scores nor sums.
    """
    return _operands.lengthened(_operands.lengthened(jnp.transpose(x, order), 1, length), 3, width)


def _kernel(call: Call, ins: Refs, outs: Refs, scratch: Refs) -> None:
    rows = RowsInRegisters(1, BLOCK, call.interpret)
    place = Place(call, ins, _hopper.index("batch"), _hopper.index("heads"), rows)
    # Later blocks see more if they are causal: those come first.
    block = call.blocks_of(call.sizes.queries) - 1 - _hopper.index("blocks")
    at = pl.ds(block * BLOCK, BLOCK)
    _hopper.fetch(
        ins["query"].at[place.batch, at, place.head], scratch["query"], scratch["barrier"]
    )
    keys = Keys(place, scratch["query"], block)
    sink = None
    if "sink" in ins:
        sink = jnp.minimum(rows.full(place.number("sink")), MOST)
    attend = _online if call.form.only_scales else _searching
    kept: State = ()
    for of, found, kept in attend(keys, sink):
        unseeing = kept[0] >= NOWHERE
        for name, x in found.items():
            if name in outs:
                x = jnp.where(rows.spread(unseeing, x), 0, x)
                _hopper.store(x, scratch["out"], outs[name].at[place.batch, at, place.head, of])
    if "rows" in outs:
        for i, row in enumerate(kept):
            target = outs["rows"].at[place.batch, place.head, i, at]
            _hopper.store(row, scratch["row"], target)


def head_of_group(place: Place) -> Any:
    """The head of the keys that a head of the queries has."""
    sizes = place.call.sizes
    return _operands.head_of(place.head, sizes.heads // sizes.key_heads)


@dataclasses.dataclass
class Keys:
    """The keys that a block of queries sees, tile by tile.

    Attributes:
      place: where the program works.
      query: the queries, in shared memory.
      block: which block of queries.
    """

    place: Place
    query: Any
    block: Any

    def __post_init__(self) -> None:
        self.arrays = OverScores(self.place, self.block)
        self.range: Range = self.arrays.within(keys_seen(self.place, self.block))
        refs, group = self.place.refs, head_of_group(self.place)
        self.key, self.value = (
            refs[name].at[self.place.batch, :, group] for name in ("key", "value")
        )

    def loop(self, body: Callable[..., Any], carry: Any) -> Any:
        """`carry = body(first, scores, carry)`: one pass."""
        return self._pass(lambda first, _, x, carry: body(first, x, carry), [self.key], carry)

    def loop_with_values(self, of: Any, body: Callable[..., Any], carry: Any) -> Any:
        """`carry = body(values, scores, carry)`, with some features of the values: one pass."""

        def step(_: Any, parts: Any, x: Array, carry: Any) -> Any:
            return body(parts[1], x, carry)

        return self._pass(step, [self.key, self.value.at[:, of]], carry)

    def _pass(self, body: Callable[..., Any], refs: list[Any], carry: Any) -> Any:
        """`carry = body(first, parts, scores, carry)`, with parts of the keys and of other refs."""

        def step(first: Any, is_cut: Any, parts: Any, read: Any, carry: Any) -> Any:
            return body(first, parts, self._make(first, is_cut, parts[0], read), carry)

        return self.arrays.pipeline(step, self.range, refs, carry)

    def _make(self, first: Any, is_cut: Any, key: Any, read: Any) -> Array:
        call = self.place.call
        products = _hopper.product(self.query, key, call.interpret)
        x = scores(self.place, first, self.block * BLOCK, read, is_cut, products).scores
        return x if call.form.only_scales else jnp.minimum(x, MOST)

    def unseeing(self, top: Array) -> Array:
        """Which queries get nothing, given the maximum of their scores."""
        nothing, refs = top < NOTHING, self.place.refs
        if "query_lengths" not in refs:
            return nothing
        rows = self.place.rows
        index = rows.settled(lax.broadcasted_iota(jnp.int32, (BLOCK,), 0))
        return nothing | (self.block * BLOCK + index >= self.place.queries)

    def stretches(self, most: int) -> list[Any]:
        """The features of the values, so many at a time."""
        width = self.place.call.sizes.value_features
        return [pl.ds(start, min(most, width - start)) for start in range(0, width, most)]

    def zeros(self, of: Any) -> Array:
        """What sums of some features of the values begin with."""
        return self.place.rows.settled(jnp.zeros((BLOCK, of.size), F32))

    def added(self, out: Array, weights: Array, value: Any) -> Array:
        """A sum of values, given the weights of one more tile."""
        return _hopper.add_product(out, weights, value, self.place.call.interpret)


def _online(keys: Keys, sink: Array | None) -> Found:
    """Softmax: what was added up is scaled down as the maximum rises."""
    rows = keys.place.rows
    top = rows.full(LEAST) if sink is None else sink
    total = rows.full(0.0 if sink is None else 1.0)

    def body(value: Any, x: Array, carry: State) -> State:
        acc, top, total = carry
        new = jnp.minimum(jnp.maximum(top, rows.max(x)), MOST)
        weights = exp(jnp.minimum(x - rows.spread(new, x), 0))
        old = exp(top - new)
        acc = keys.added(acc * rows.spread(old, acc), weights, value)
        return acc, new, total * old + rows.sum(weights)

    (of,) = keys.stretches(keys.place.call.sizes.value_features)
    acc, top, total = keys.loop_with_values(of, body, (keys.zeros(of), top, total))
    total = jnp.where(total > 0, total, 1)
    log_total = jnp.log(total)
    origin = jnp.where(keys.unseeing(top), NOWHERE, top + log_total)
    of_infinite = jnp.where(top == MOST, -log_total, 0)
    yield of, {"out": acc * rows.spread(1 / total, acc)}, (origin, of_infinite)


def _searching(keys: Keys, sink: Array | None) -> Found:
    """Any other form: a threshold is found, and then all is added up at once.

    That is two sums of values, which only as many features leave registers for.
    """
    place, rows = keys.place, keys.place.rows
    few = _largest(keys)
    top = rows.max(few[0])
    top = top if sink is None else jnp.maximum(top, sink)
    unseeing = keys.unseeing(top)
    seen_top = rows.settled(jnp.where(unseeing, 0, top))
    search = Search(place.call.form, place.params, seen_top, unseeing, sink, rows)
    state = search.solve(lambda: few, keys.loop, place.call.sizes.keys)
    for of in keys.stretches(_hopper.NARROW):
        yield of, *_mix(keys, search, state, of)


def _largest(keys: Keys) -> tuple[Array, Array]:
    """The largest scores of each class of keys, and the second largest: one pass."""

    def body(_: Any, x: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        one, two = carry
        for start in range(0, x.shape[1], CLASSES):
            own = x[:, start : start + CLASSES]
            two = jnp.maximum(two, jnp.minimum(one, own))
            one = jnp.maximum(one, own)
        return one, two

    none = keys.place.rows.settled(jnp.full((BLOCK, CLASSES), LEAST, F32))
    return keys.loop(body, (none, none))


def _mix(keys: Keys, search: Search, state: State, of: Any) -> tuple[dict[str, Array], State]:
    """The output and the mean of values by slopes, of some features, and what is kept of rows."""

    def body(value: Any, x: Array, carry: Any) -> Any:
        out, of_slopes, sums = carry
        terms = search.terms(x, state)
        out, of_slopes = keys.added(out, terms[0], value), keys.added(of_slopes, terms[1], value)
        return out, of_slopes, search.added(sums, terms[:2])

    carry = keys.zeros(of), keys.zeros(of), search.zeros(2)
    out, of_slopes, sums = keys.loop_with_values(of, body, carry)
    sums = search.with_sink(sums, state)
    mean = search.mean(sums, of_slopes)
    return {"out": search.output(sums, out, mean), "mean": mean}, search.kept(sums, state)
