"""The gradients of attention on a Hopper GPU, in two kernels: those of queries, and of keys.

Wide keys and values have one each. Each makes the weights of a tile anew. So nothing is added up in
main memory, and results do not depend on which program comes first.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax.attention._kernels import _hopper
from jaxsoftmax.attention._kernels._backward import of_group, of_numbers, pairs_of, summed
from jaxsoftmax.attention._kernels._forms import gaps, shares, terms_of_numbers, with_slope
from jaxsoftmax.attention._kernels._hopper import BLOCK, RowsInRegisters
from jaxsoftmax.attention._kernels._hopper_arrays import OverScores, is_of_pairs, is_own
from jaxsoftmax.attention._kernels._hopper_forward import head_of_group, laid, operands
from jaxsoftmax.attention._kernels._operands import Arrays
from jaxsoftmax.attention._kernels._scores import Scores, scores
from jaxsoftmax.attention._kernels._tiles import (
    F32,
    Call,
    Place,
    Refs,
    keys_seen,
    least,
    queries_seeing,
)

State = tuple[Array, ...]
# How many features keys and values may have for one kernel to have registers for the sums of both.
_AT_ONCE = 320


def backward(
    call: Call, arrays: Arrays, kept: Arrays, ct: Array, wanted: Sequence[str]
) -> dict[str, Array]:
    """As `Kernels` asks."""
    sizes = call.sizes
    ct = laid(ct, (0, 2, 1, 3), call.queries, sizes.value_features)
    delta = jnp.transpose(jnp.sum(ct * kept["mean"], 3), (0, 2, 1))[:, :, None]
    params = [arrays[f"param {i}"] for i in range(call.params)]
    rows = [kept["rows"][:, :, i, None] for i in range(kept["rows"].shape[2])]
    rows = [delta, *with_slope(call.form, rows, params)]
    own = {"ct": ct.astype(arrays["query"].dtype), "rows": jnp.concatenate(rows, 2)}
    names, bias = summed(wanted), "bias" in wanted
    of_queries = _of_queries(call, operands(call, arrays) | own, names, bias)
    ins, of_keys = operands(call, arrays, by_keys=True) | own, {}
    is_one = sizes.features + sizes.value_features <= _AT_ONCE
    for which in [("key", "value")] if is_one else [("key",), ("value",)]:
        of_keys |= _of_keys(call, ins, which, bias and "key" in which)

    def turned(x: Array, length: int, width: int, order: tuple[int, ...]) -> Array:
        return jnp.transpose(x[:, :length, :, :width], order)

    width = arrays["query"].shape[3]
    cts = {"query": turned(of_queries["query"], sizes.queries, width, (0, 2, 1, 3))}
    for name in ("key", "value"):
        width = arrays[name].shape[2]
        cts[name] = of_group(call, turned(of_keys[name], sizes.keys, width, (0, 2, 3, 1)))
    if "bias" in of_queries:
        cts["bias"] = of_queries["bias"][:, :, : sizes.queries, : sizes.keys]
    elif "sum" in of_queries:
        cts["bias"] = of_queries["sum"][:, :, : sizes.queries, None]
    elif "sum" in of_keys:
        cts["bias"] = of_keys["sum"][:, :, None, : sizes.keys]
    if names:
        pairs = pairs_of(names, of_queries["sums"][..., : sizes.queries])
        rows, delta = (x[..., : sizes.queries] for x in (kept["rows"], delta))
        cts |= of_numbers(call, arrays, rows, delta, pairs)
    return cts


def _of_queries(call: Call, ins: Arrays, names: Sequence[str], bias: bool) -> dict[str, Array]:
    """The cotangents of queries, (B, T, N, H), and sums for those of numbers, (B, N, sums, T).

    And that of a bias: "bias", (B, N, T, S), or "sum", over the keys, (B, N, T).
    """
    sizes, query = call.sizes, ins["query"]
    outs: dict[str, Any] = {"query": (query.shape, query.dtype)}
    if names:
        outs["sums"] = (sizes.batch, sizes.heads, 2 * len(names), call.queries), F32
    if bias:
        outs |= _sum_of_bias(call, ins["bias"], call.queries)
    scratch = {
        "query": _hopper.tiles(call, sizes.features, query.dtype),
        "ct": _hopper.tiles(call, sizes.value_features, query.dtype),
        "row": _hopper.row(),
        "barrier": _hopper.barrier(),
    }
    if bias and is_of_pairs(ins["bias"]):
        outs["bias"] = (sizes.batch, sizes.heads, call.queries, call.keys), F32
        scratch["bias"] = _hopper.columns(call)
    kernel = functools.partial(_kernel_of_queries, call, tuple(names))
    return _hopper.run(kernel, call, call.blocks_of(sizes.queries), ins, outs, scratch)


def _sum_of_bias(call: Call, bias: Array, length: int) -> dict[str, Any]:
    """What a kernel adds up for a bias that has numbers of its programs' own rows."""
    shape = call.sizes.batch, call.sizes.heads, length
    return {"sum": (shape, F32)} if is_own(bias) else {}


def _of_keys(call: Call, ins: Arrays, names: Sequence[str], bias: bool) -> dict[str, Array]:
    """The cotangents of keys, values or both, by name, (B, S, N, ...) of each head.

    And that of a bias, if it is the same for all queries: "sum", over these, (B, N, S).
    """
    sizes, dtype = call.sizes, ins["query"].dtype
    widths = {"key": sizes.features, "value": sizes.value_features}
    # Weights take keys alone.
    read = widths if "key" in names else ("key",)
    # What several heads add up to is not rounded before.
    of_head = dtype if sizes.heads == sizes.key_heads else F32
    shape = sizes.batch, call.keys, sizes.heads
    outs: dict[str, Any] = {name: ((*shape, widths[name]), of_head) for name in names}
    scratch = {name: _hopper.tiles(call, widths[name], dtype) for name in read}
    scratch["barrier"] = _hopper.barrier()
    if bias:
        outs |= _sum_of_bias(call, ins["bias"], call.keys)
        scratch["row"] = _hopper.row()
    if of_head != dtype or "key" not in names:
        scratch["out"] = _hopper.stretch(call, of_head, *(widths[name] for name in names))
    kernel = functools.partial(_kernel_of_keys, call)
    return _hopper.run(kernel, call, call.blocks_of(sizes.keys), ins, outs, scratch)


def _place(call: Call, ins: Refs, rows: RowsInRegisters) -> Place:
    return Place(call, ins, _hopper.index("batch"), _hopper.index("heads"), rows)


def _kernel_of_queries(
    call: Call, names: Sequence[str], ins: Refs, outs: Refs, scratch: Refs
) -> None:
    rows = RowsInRegisters(1, BLOCK, call.interpret)
    place = _place(call, ins, rows)
    batch, head = place.batch, place.head
    block = call.blocks_of(call.sizes.queries) - 1 - _hopper.index("blocks")
    at = pl.ds(block * BLOCK, BLOCK)
    for name in ("query", "ct"):
        _hopper.fetch(ins[name].at[batch, at, head], scratch[name], scratch["barrier"])
    of_rows = []
    for i in range(ins["rows"].shape[2]):
        _hopper.fetch(ins["rows"].at[batch, head, i, at], scratch["row"], scratch["barrier"])
        of_rows += rows.read([scratch["row"]])
        _hopper.release()

    def body(keys: Any, is_cut: Any, parts: Any, read: Any, carry: Any) -> Any:
        key, value = parts
        acc, sums, of_bias = carry
        products = _hopper.product(scratch["query"], key, call.interpret)
        of_values = _hopper.product(scratch["ct"], value, call.interpret)
        first = keys, block * BLOCK
        weights = _weights(place, first, is_cut, read, products, of_rows)
        worth, ct_scores = weights.pull_back(of_values)
        if names:
            sums = _added(place, names, sums, weights.made, worth)
        if "bias" in outs:
            store_tile(keys, ct_scores)
        of_bias = tuple(x + jnp.sum(ct_scores, 1) for x in of_bias)
        return _hopper.add_product(acc, ct_scores, key, call.interpret), sums, of_bias

    def store_tile(keys: Any, x: Array) -> None:
        target = outs["bias"].at[batch, head, at, pl.ds(keys, call.part)]
        _hopper.store(x, scratch["bias"], target)

    group = head_of_group(place)
    carry = (
        rows.settled(jnp.zeros((BLOCK, call.sizes.features), F32)),
        (rows.full(0.0),) * (2 * len(names)),
        (rows.full(0.0),) * ("sum" in outs),
    )
    refs = [ins[name].at[batch, :, group] for name in ("key", "value")]
    arrays = OverScores(place, block)
    over = arrays.within(keys_seen(place, block))
    if "bias" in outs:
        zeros = rows.settled(jnp.zeros((BLOCK, call.part), F32))
        blocks = call.blocks_of(call.sizes.keys)
        for start, stop in ((0, least(over.first, blocks)), (over.last, blocks)):
            _hopper.loop(start, stop, call.part, lambda keys: store_tile(keys, zeros))
    acc, sums, of_bias = arrays.pipeline(body, over, refs, carry)
    by = call.scale if call.is_exact else call.factor
    _hopper.store(acc * by, scratch["query"], outs["query"].at[batch, at, head])
    for i, x in enumerate(sums):
        _hopper.store(x, scratch["row"], outs["sums"].at[batch, head, i, at])
    for x in of_bias:
        _hopper.store(x, scratch["row"], outs["sum"].at[batch, head, at])


def _kernel_of_keys(call: Call, ins: Refs, outs: Refs, scratch: Refs) -> None:
    """Keys down, so that weights can be the first factor of the products that are added up."""
    rows = RowsInRegisters(0, call.part, call.interpret)
    place = _place(call, ins, rows)
    batch, head, group = place.batch, place.head, head_of_group(place)
    keys = _hopper.index("blocks")
    at = pl.ds(keys * BLOCK, BLOCK)
    for name in ("key", "value"):
        if name in scratch:
            _hopper.fetch(ins[name].at[batch, at, group], scratch[name], scratch["barrier"])

    def body(queries: Any, is_cut: Any, parts: Any, read: Any, carry: Any) -> Any:
        (query, ct, *of_rows), sums = parts, dict(carry)
        products, of_values = _hopper.product(scratch["key"], query, call.interpret), None
        if "key" in sums:
            of_values = _hopper.product(scratch["value"], ct, call.interpret)
        of_rows, first = rows.read(of_rows), (keys * BLOCK, queries)
        weights = _weights(place, first, is_cut, read, products, of_rows)
        if "value" in sums:
            share = weights.made[1]
            sums["value"] = _hopper.add_product(sums["value"], share, ct, call.interpret)
        if of_values is not None:
            _, ct_scores = weights.pull_back(of_values)
            sums["key"] = _hopper.add_product(sums["key"], ct_scores, query, call.interpret)
            if "sum" in sums:
                sums["sum"] += jnp.sum(ct_scores, 1)
        return sums

    zeros = {
        name: rows.settled(jnp.zeros((BLOCK, outs[name].shape[3]), F32))
        for name in ("key", "value")
        if name in outs
    }
    if "sum" in outs:
        zeros["sum"] = RowsInRegisters(1, BLOCK, call.interpret).full(0.0)
    refs = [ins[name].at[batch, :, head] for name in ("query", "ct")]
    refs += [ins["rows"].at[batch, head, i] for i in range(ins["rows"].shape[2])]
    arrays = OverScores(place, keys)
    over = arrays.within(queries_seeing(place, keys))
    sums = arrays.pipeline(body, over, refs, zeros)
    if "sum" in sums:
        _hopper.store(sums.pop("sum"), scratch["row"], outs["sum"].at[batch, head, at])
    for name, x in sums.items():
        x = x * call.factor if name == "key" else x
        through = scratch["out"] if "out" in scratch else scratch[name]
        _hopper.store(x, through, outs[name].at[batch, at, head])


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The weights of a tile.

    Attributes:
      made: gaps, weights and slopes.
      scores: what they are made of.
      delta: what the output is worth, at each score.
    """

    made: State
    scores: Scores
    delta: Array

    def pull_back(self, of_values: Array) -> State:
        """What each is worth, and the cotangent of the products of queries and keys.

        Given are those of cotangents and values.
        """
        worth = of_values - self.delta
        return worth, self.scores.pull_back(self.made[2] * worth)


def _weights(
    place: Place,
    first: tuple[Any, Any],
    is_cut: Any,
    read: Any,
    products: Array,
    of_rows: Sequence[Array],
) -> _Weights:
    """The weights of a tile.

    Args:
      place: where the program works.
      first: the first key and the first query.
      is_cut: whether positions may exclude some of it.
      read: gives the part of an array over scores that belongs to the tile, by name.
      products: those of queries and keys.
      of_rows: what the output is worth, and what is kept of rows.
    """
    call, rows = place.call, place.rows
    made = scores(place, *first, read, is_cut, products)
    delta, *kept = (rows.spread(row, made.scores) for row in of_rows)
    params = [rows.spread(param, made.scores) for param in place.params]
    gap = gaps(call.form, made.scores, kept)
    share, slope = rows.plain(functools.partial(shares, call.form))(gap, kept, params)
    return _Weights((gap, share, slope), made, delta)


def _added(
    place: Place, names: Sequence[str], sums: State, made: Sequence[Array], worth: Array
) -> State:
    """The sums for the cotangents of numbers, given one more tile."""
    rows = place.rows
    params = [rows.spread(param, worth) for param in place.params]
    of_names = functools.partial(terms_of_numbers, place.call.form, names)
    terms = rows.plain(of_names)(made, params)
    new = (rows.sum(x) for term in terms for x in (term * worth, term))
    return tuple(x + y for x, y in zip(sums, new, strict=True))
