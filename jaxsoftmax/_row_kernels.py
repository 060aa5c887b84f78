"""Rows by kernels for TPUs: read once from memory, gone through in VMEM, and written once."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxsoftmax._implementations import refuse
from jaxsoftmax._reductions import Entries, Rows, is_known, type_like
from jaxsoftmax._row_block import F32, LANES, PLACES, Block
from jaxsoftmax._sharding import explicit

# What a kernel may take of VMEM, and what its blocks may: the rest is the compiler's.
VMEM = 64 * 2**20
_ROOM = VMEM * 3 // 4
# How many rows make a block, if so many fit. Compiled for v5e: twice as many take no fewer
# instructions a row.
_ROWS = 256
# A register has so many lines.
_LINES = 8

Function = Callable[..., Entries]


def in_kernels(
    function: Function, rows: Rows, scores: Entries, *params: Array, interpret: bool
) -> Entries:
    """`function(rows, scores, *params)` of float32, block by block of rows.

    Args:
      function: gives entries, in terms of `Rows` alone.
      rows: rows of array axes.
      scores: the scores.
      *params: row values, or fewer.
      interpret: whether the kernel is interpreted, where there is no TPU.
    """
    x, *sink = scores
    _check(rows, x)
    last = range(x.ndim - len(rows.axes), x.ndim)
    moved = jnp.moveaxis(x, rows.axes, last)
    length = math.prod(moved.shape[i] for i in last)
    flat = moved.reshape(-1, length)
    count = flat.shape[0]
    size = _block_size(count, length, len(params))
    numbers = [
        _lined_up(jnp.broadcast_to(values, rows.shape(x)).reshape(count), size)
        for values in (*sink, *params)
    ]
    kernel = functools.partial(_kernel, function, length, len(sink), len(params))
    found, *of_sink = _call(kernel, flat, numbers, size, len(sink), len(params), interpret)
    found = jnp.moveaxis(found.reshape(moved.shape), last, rows.axes)
    return found, *(z.reshape(-1)[:count].reshape(rows.shape(x)) for z in of_sink)


def _check(rows: Rows, x: Array) -> None:
    no_kernel = functools.partial(refuse, "pallas")
    if rows.segment_ids is not None:
        no_kernel("segment_ids")
    if rows.names:
        no_kernel(f"the mesh axes {', '.join(rows.names)}")
    if x.dtype != F32:
        no_kernel(f"the dtype {x.dtype}")
    if not all(map(is_known, x.shape)):
        no_kernel("a size that is a symbol")
    if explicit(x) is not None:
        no_kernel("scores that are spread over an explicit mesh")


def _block_size(count: int, length: int, params: int) -> int:
    """How many rows make a block: what moves in or out has two places in VMEM."""
    size = _ROWS
    while size > _LINES and (size >= 2 * count or _room(size, length, params) > _ROOM):
        size //= 2
    if _room(size, length, params) > _ROOM:
        refuse("pallas", f"rows of {length} entries, which do not fit into VMEM")
    return size


def _room(size: int, length: int, params: int) -> int:
    """Bytes of all that a block has in VMEM."""
    return 4 * size * (5 * _in_registers(length) + (sum(PLACES) + params) * LANES)


def _in_registers(length: int) -> int:
    return -(-length // LANES) * LANES


def _lined_up(values: Array, size: int) -> Array:
    """Row values, (blocks, rows); the last block is filled up with what is there."""
    return jnp.pad(values, (0, -len(values) % size), mode="edge").reshape(-1, size)


def _call(
    kernel: Callable[..., None],
    x: Array,
    numbers: Sequence[Array],
    size: int,
    sinks: int,
    params: int,
    interpret: bool,
) -> Sequence[Array]:
    """Runs the kernel for all blocks of the rows of `x`."""
    count, length = x.shape
    blocks = -(-count // size)

    def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i: (i, *[0] * (len(shape) - 1)))

    # Whole registers of row values: Mosaic brings no others into all lanes.
    filled = [*numbers, *[numbers[0]] * (-len(numbers) % _LINES)] if numbers else []
    arrays = [x, *([jnp.stack(filled, 1)] if filled else [])]
    of_entries = spec((size, _in_registers(length)))
    spread, parts, few = PLACES
    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        in_specs=[of_entries, *(spec((1, *y.shape[1:])) for y in arrays[1:])],
        out_specs=[of_entries, *[spec((1, 1, size))] * sinks],
        out_shape=[type_like(shape, F32, x) for shape in (x.shape, *[(blocks, 1, size)] * sinks)],
        scratch_shapes=[
            pltpu.VMEM((size, _in_registers(length)), F32),
            pltpu.VMEM((spread + params, size, LANES), F32),
            pltpu.VMEM((parts, size, LANES), F32),
            pltpu.VMEM((few, LANES, size), F32),
        ],
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=VMEM,
            # Casts, masks and divisions happen as blocks come in.
            allow_input_fusion=[True, *[False] * (len(arrays) - 1)],
        ),
    )(*arrays)


def _kernel(function: Function, length: int, sinks: int, params: int, *refs: Any) -> None:
    (ref, *others), scratch = refs[:-4], refs[-4:]
    *numbers, out = others[: len(others) - sinks]
    held, spread, parts, few = scratch
    block = Block(count=length, held=held, spread=spread, parts=parts, few=few)
    row_values = [_line(numbers[0][0], i) for i in range(sinks + params)]
    for param in row_values[sinks:]:
        block.keep(param)
    scores: Any = (block.hold(ref), *row_values[:sinks])
    found: Any = function(block, scores, *row_values[sinks:])
    block.write(found[0], out)
    for z, z_ref in zip(found[1:], others[len(others) - sinks :], strict=True):
        z_ref[0] = z


def _line(x: Array, i: int) -> Array:
    """A line of `x`, as a sum: Mosaic lays out a line that is read as no other row value."""
    at = lax.broadcasted_iota(jnp.int32, x.shape, 0) == i
    return jnp.sum(jnp.where(at, x, 0), 0, keepdims=True)
