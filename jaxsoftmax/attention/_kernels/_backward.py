"""The gradients of attention, in one pass over the tiles: weights are made once for all of them.

A program has a block of keys and all queries. It adds up what its keys and values get, and adds to
what queries get, which stays in VMEM from one block of keys to the next.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxsoftmax.attention._kernels import _operands
from jaxsoftmax.attention._kernels._forms import gaps, shares, terms_of_numbers, with_slope
from jaxsoftmax.attention._kernels._operands import Arrays, turned
from jaxsoftmax.attention._kernels._scores import scores
from jaxsoftmax.attention._kernels._tiles import (
    F32,
    MOST,
    Call,
    Place,
    Refs,
    RowsInLanes,
    product,
    queries_seeing,
    slice_of,
    sum_of,
)

State = tuple[Array, ...]


def backward(
    call: Call, arrays: Arrays, kept: Arrays, ct: Array, wanted: Sequence[str]
) -> dict[str, Array]:
    """As `Kernels` asks."""
    rows = kept["rows"]
    delta = jnp.sum(turned(ct) * kept["mean"], 2, keepdims=True)
    sums = summed(wanted)
    of_rows = {"rows": jnp.concatenate([delta, rows], 2), "ct": ct}
    if "seen" in kept:
        of_rows["seen"] = kept["seen"]
    found = _run(call, arrays, of_rows, sums, "bias" in wanted)
    sizes = call.sizes
    cts = {
        "query": turned(found["query"][..., : sizes.queries]),
        "key": of_group(call, turned(found["key"][:, :, : sizes.keys])),
        "value": of_group(call, turned(found["value"][:, :, : sizes.keys])),
    }
    if "bias" in found:
        cts["bias"] = turned(found["bias"][:, :, : sizes.keys, : sizes.queries])
    if sums:
        pairs = pairs_of(sums, found["sums"][..., : sizes.queries])
        cts |= of_numbers(call, arrays, rows, delta, pairs)
    return cts


def summed(wanted: Sequence[str]) -> list[str]:
    """The numbers that get a cotangent by a sum over scores, and "slopes" if there are any."""
    names = [name for name in wanted if name == "temperature" or name.startswith("param")]
    return ["slopes", *names] if names or "sink" in wanted else []


def pairs_of(names: Sequence[str], sums: Array) -> dict[str, State]:
    """By name, what was added up, (B, N, T, 1) each, of (B, N, sums, T)."""
    parts = [sums[:, :, i, :, None] for i in range(sums.shape[2])]
    return dict(zip(names, zip(parts[::2], parts[1::2], strict=True), strict=True))


def of_group(call: Call, x: Array) -> Array:
    """(B, N, ...) summed over the heads that share keys, (B, K, ...)."""
    batch, heads, *rest = x.shape
    groups = call.sizes.key_heads
    return x if heads == groups else jnp.sum(x.reshape(batch, groups, -1, *rest), 2)


def of_numbers(
    call: Call, arrays: Arrays, rows: Array, delta: Array, sums: Mapping[str, State]
) -> dict[str, Array]:
    """The cotangents of numbers, one for each query.

    Cotangents of the scores and the sink sum to 0. But `delta` is a mean by weights that were
    rounded for a product; what the sum is off tells by how much, and each cotangent is mended.

    Args:
      call: what is known.
      arrays: by name.
      rows: what is kept of rows.
      delta: what the mean of the values is worth.
      sums: by name, what keys add up to, and what they would if each were worth 1.
    """
    kept = [rows[:, :, i, :, None] for i in range(rows.shape[2])]
    params = tuple(arrays[f"param {i}"] for i in range(call.params))
    sums, worth = dict(sums), -jnp.swapaxes(delta, 2, 3)
    off, slopes = sums.pop("slopes")
    share = slope = jnp.zeros_like(off)
    if "sink" in arrays:  # its value is 0, and so what it is worth is `-delta`
        of_rows = with_slope(call.form, kept, params)
        share, slope = shares(call.form, gaps(call.form, arrays["sink"], kept), of_rows, params)
    all_slopes = slopes + slope
    shift = (off + slope * worth) / jnp.where(all_slopes == 0, 1, all_slopes)
    worth = worth - shift
    found = {name: of_keys - shift * of_one for name, (of_keys, of_one) in sums.items()}
    found["sink"] = slope * worth
    for i, partial in enumerate(call.form.moved_by_params(share, *params)):
        if (name := f"param {i}") in found:
            found[name] = found[name] + partial * worth
    if "temperature" in found:
        # Of gaps, which are near 0 where anything is; it divides the scores of keys alone.
        origin = jnp.where(kept[0] >= MOST, 0, kept[0])
        of_keys = found["temperature"] - origin * slope * worth
        found["temperature"] = -of_keys / arrays["temperature"]
    return found


def _run(
    call: Call, arrays: Arrays, of_rows: Arrays, sums: Sequence[str], bias: bool
) -> dict[str, Array]:
    sizes, block = call.sizes, call.block
    query = _operands.lengthened(call.scaled(arrays["query"]), 2, call.queries)
    key = _operands.lengthened(turned(arrays["key"]), 2, call.keys)
    value = _operands.lengthened(turned(arrays["value"]), 2, call.keys)
    ct = _operands.lengthened(of_rows["ct"].astype(query.dtype), 2, call.queries)

    def whole(x: Array) -> tuple[Any, Array]:
        return _operands.spec((1, 1, *x.shape[2:]), lambda b, n, j: (b, n, 0, 0)), x

    per_group = sizes.heads // sizes.key_heads
    turned_key = _operands.spec(
        (1, 1, sizes.features, block), lambda b, n, j: (b, _operands.head_of(n, per_group), 0, j)
    )
    ins = {
        "query": whole(query),
        "turned query": whole(turned(query)),
        "ct": whole(ct),
        "turned ct": whole(turned(ct)),
        "rows": whole(_operands.lengthened(of_rows["rows"], 3, call.queries)),
        "key": (_operands.part_of_group(call, sizes.features), key),
        "turned key": (turned_key, turned(key)),
        "value": (_operands.part_of_group(call, sizes.value_features), value),
        **{
            name: (_operands.block_of(x, 2, block), x)
            for name, x in _operands.over_scores(call, arrays).items()
        },
        **_operands.numbers(call, arrays),
    }
    if "seen" in of_rows:
        ins["holds"] = _operands.flags(call, of_rows["seen"])
    outs = _outs(call, query.dtype, 2 * len(sums), bias)
    scratch = {
        "query": _operands.scratch(sizes.features, call.queries),
        "key": _operands.scratch(block, sizes.features),
        "value": _operands.scratch(block, sizes.value_features),
    }
    kernel = functools.partial(_kernel, call, tuple(sums))
    return _operands.run(kernel, call, call.blocks_of(sizes.keys), ins, outs, scratch)


def _outs(call: Call, dtype: Any, sums: int, bias: bool) -> dict[str, Any]:
    sizes = call.sizes

    def whole(rows: int, dtype: Any) -> Any:
        block = _operands.spec((1, 1, rows, call.queries), lambda b, n, j: (b, n, 0, 0))
        return block, (sizes.batch, sizes.heads, rows, call.queries), dtype

    def part(width: int, dtype: Any) -> Any:
        block = _operands.spec((1, 1, call.block, width), lambda b, n, j: (b, n, j, 0))
        return block, (sizes.batch, sizes.heads, call.keys, width), dtype

    # What several heads add up to is not rounded before.
    of_keys = dtype if sizes.heads == sizes.key_heads else F32
    outs = {
        "query": whole(sizes.features, dtype),
        "key": part(sizes.features, of_keys),
        "value": part(sizes.value_features, of_keys),
    }
    if sums:
        outs["sums"] = whole(sums, F32)
    if bias:
        outs["bias"] = part(call.queries, F32)
    return outs


def _kernel(call: Call, sums: Sequence[str], ins: Refs, outs: Refs, scratch: Refs) -> None:
    keys = pl.program_id(2)
    place = Place(call, ins, pl.program_id(0), pl.program_id(1), RowsInLanes(call.block))

    @pl.when(keys == 0)
    def _() -> None:
        scratch["query"][...] = jnp.zeros_like(scratch["query"])
        if sums:
            outs["sums"][...] = jnp.zeros_like(outs["sums"])

    scratch["key"][...] = jnp.zeros_like(scratch["key"])
    scratch["value"][...] = jnp.zeros_like(scratch["value"])
    if "bias" in outs:
        outs["bias"][...] = jnp.zeros_like(outs["bias"])

    def body(queries: Any, is_cut: bool, carry: int) -> int:
        add = functools.partial(_tile, place, sums, outs, scratch, keys, queries, is_cut)
        if "holds" in ins:
            pl.when(ins["holds"][0, 0, 0, 0, queries] > 0)(add)
        else:
            add()
        return carry

    queries_seeing(place, keys).loop(body, 0)
    outs["key"][0, 0] = (scratch["key"][...] * call.factor).astype(outs["key"].dtype)
    outs["value"][0, 0] = scratch["value"][...].astype(outs["value"].dtype)

    @pl.when(keys == pl.num_programs(2) - 1)
    def _() -> None:
        by = call.scale if call.is_exact else call.factor
        outs["query"][0, 0] = (scratch["query"][...] * by).astype(outs["query"].dtype)


def _tile(
    place: Place,
    sums: Sequence[str],
    outs: Refs,
    scratch: Refs,
    keys: Any,
    queries: Any,
    is_cut: bool,
) -> None:
    """Adds what one tile is worth."""
    call, refs, at = place.call, place.refs, slice_of(queries, place.call.block)

    def read(name: str) -> Array:
        ref = refs[name]
        return ref[0, 0, :, at] if ref.shape[3] > 1 else ref[0, 0]

    products = product(refs["key"][0, 0], refs["turned query"][0, 0, :, at])
    first = keys * call.block, queries * call.block
    made = scores(place, *first, read, is_cut, products)
    delta, *kept = (refs["rows"][0, 0, i : i + 1, at] for i in range(refs["rows"].shape[2]))
    gap, params = gaps(call.form, made.scores, kept), place.params
    share, slope = shares(call.form, gap, with_slope(call.form, kept, params), params)
    ct = refs["ct"][0, 0, at, :]
    worth = product(refs["value"][0, 0], refs["turned ct"][0, 0, :, at]) - delta
    scratch["value"][...] += product(share.astype(ct.dtype), ct)
    if sums:
        _add_sums(place, sums, outs["sums"].at[0, 0, :, at], (gap, share, slope, worth))
    ct_scores = made.pull_back(slope * worth)
    if "bias" in outs:
        outs["bias"][0, 0, :, at] = ct_scores
    query = refs["query"][0, 0, at, :]
    ct_scores = ct_scores.astype(query.dtype)
    scratch["key"][...] += product(ct_scores, query)
    scratch["query"][:, at] += product(refs["turned key"][0, 0], ct_scores)


def _add_sums(place: Place, sums: Sequence[str], out: Any, made: State) -> None:
    """Adds what keys are worth by slopes and for each number, and what if each were worth 1."""
    *of_weights, worth = made
    terms = terms_of_numbers(place.call.form, sums, of_weights, place.params)
    for i, term in enumerate(terms):
        out[2 * i : 2 * i + 1] += sum_of(term * worth)
        out[2 * i + 1 : 2 * i + 2] += sum_of(term)
