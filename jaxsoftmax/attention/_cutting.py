"""How the arrays of attention are cut into groups, bands and blocks, on each platform."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._configured import Configured
from jaxsoftmax._reductions import is_known
from jaxsoftmax._scores import with_ndim
from jaxsoftmax._sharding import parts_in_all, parts_of
from jaxsoftmax.attention._arguments import LAYOUT, Sizes
from jaxsoftmax.attention._bands import Band, Reach, bands, interleaved
from jaxsoftmax.attention._blocks import Prepare, attend_in_blocks
from jaxsoftmax.attention._groups import Groups
from jaxsoftmax.attention._operands import ROW_AXIS, ROWS, UNKNOWN, WHOLE, Operand
from jaxsoftmax.attention._plan import Cuts
from jaxsoftmax.attention._prepared import OF_NORMALIZER, First, Prepared, Rules, prepare
from jaxsoftmax.attention._tiling import TILING, TILINGS, Tiling

# What `cut_and_attend` is of an unknown size of blocks.
InBlocks = Callable[[Rules, dict[str, Array], Sizes], tuple[Array, ...]]


def cut_and_attend(
    block_size: int | None, rules: Rules, operands: dict[str, Array], sizes: Sizes
) -> tuple[Array, ...]:
    """The outputs of operands, cut as suits the platform that the program is lowered for."""
    normalizer = rules.normalizer
    if isinstance(normalizer, Configured):
        own = {OF_NORMALIZER + name: _aligned(x) for name, x in normalizer.arrays.items()}
        operands = operands | own
        rules = dataclasses.replace(rules, normalizer=normalizer.with_arrays({}))
    names = tuple(operands)

    def prepare_of(band: Band) -> Prepare:
        def prepared(first: First, *parts: Array) -> Prepared:
            return prepare(rules, band, first, dict(zip(names, parts, strict=True)))

        return prepared

    # Where positions are not known while tracing, no key is out of reach.
    unknown = "query_offset" in operands
    reaching = dataclasses.replace(rules, before=None, after=None) if unknown else rules
    if parts_in_all(operands["query"]) > 1:
        cuts_of = functools.partial(_shared_cuts, block_size, operands["query"], sizes)
    else:
        cuts_of = functools.partial(_cuts, block_size, reaching, operands["query"], sizes)
    default, cuts = cuts_of(TILING), {name: cuts_of(own) for name, own in TILINGS.items()}
    layout = [LAYOUT.get(name) or _layout_of_normalizer(operands[name], sizes) for name in names]
    arrays = list(operands.values())
    query, key, value = map(names.index, ("query", "key", "value"))
    return attend_in_blocks(prepare_of, default, cuts, layout, arrays, (query, key, value))


def _cuts(block_size: int | None, rules: Rules, query: Array, sizes: Sizes, tiling: Tiling) -> Cuts:
    """How attention is cut where it is one device's own."""
    # Of functions that are not ours it is not known which of their arrays belong to a head, nor
    # whether they use how many keys there are.
    ours = isinstance(rules.normalizer, Configured)
    known = all(map(is_known, (*rules.first[2:], sizes.queries, sizes.keys)))
    reach = Reach()
    if ours and known:
        reach = Reach(rules.before, rules.after).of_rows_from(rules.offset)
    groups, together = Groups(), sizes.batch * sizes.heads
    forward, backward = tiling.forward, tiling.backward
    if ours and not rules.kv_names:
        per_head = sizes.heads // sizes.key_heads
        rows = block_size or (sizes.queries if reach == Reach() else math.ceil(sizes.queries / 2))
        row_size = per_head * sizes.keys
        batch, heads = tiling.group_sizes(sizes.batch, sizes.key_heads, row_size, rows)
        groups = Groups(sizes.batch // batch, sizes.key_heads // heads)
        together = batch * heads * per_head
        if groups != Groups() and tiling.group is not None:
            forward = tiling.group

    def bands_of(scores: int) -> tuple[Band, ...]:
        queries = _rows_of_band(sizes, reach, tiling)
        rows = block_size or tiling.block_rows(queries, together * sizes.keys, scores)
        if not is_known(sizes.queries):
            return (Band(0, sizes.queries, 1, sizes.keys, 0, None, sizes.keys),)
        return bands(sizes.queries, sizes.keys, min(rows, sizes.queries), reach, tiling.bands)

    return Cuts(groups, bands_of(forward), bands_of(backward), tiling.again(query.dtype))


def _rows_of_band(sizes: Sizes, reach: Reach, tiling: Tiling) -> int:
    """How many rows see one stretch of keys."""
    return sizes.queries if reach == Reach() else math.ceil(sizes.queries / tiling.bands)


def _shared_cuts(block_size: int | None, query: Array, sizes: Sizes, tiling: Tiling) -> Cuts:
    """How attention is cut where XLA shares it among devices: no block is one device's alone."""
    devices = parts_in_all(query)
    row_size = sizes.batch * sizes.heads * sizes.keys // devices

    def band_of(scores: int) -> Band:
        rows = block_size or tiling.block_rows(sizes.queries, row_size, scores)
        parts = parts_of(query, ROW_AXIS)
        return interleaved(sizes.queries, sizes.keys, rows * devices, parts)

    again = tiling.again(query.dtype)
    return Cuts(Groups(), (band_of(tiling.forward),), (band_of(tiling.backward),), again)


def _aligned(x: Any) -> Any:
    """An array of a normalizer with the axes of the scores, if it may have one of queries."""
    x = jnp.asarray(x)
    return with_ndim(x, 4) if x.ndim in (2, 3) else x


def _layout_of_normalizer(x: Array, sizes: Sizes) -> Operand:
    if x.ndim != 4:
        return UNKNOWN
    return ROWS if x.shape[ROW_AXIS:] == (sizes.queries, 1) else WHOLE
