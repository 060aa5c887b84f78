"""The arrays of a call as kernels read them: filled up, turned, and cut into blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxsoftmax._reductions import type_like
from jaxsoftmax.attention._kernels._tiles import Call

Arrays = Mapping[str, Array]
Index = Callable[[Any, Any, Any], tuple[Any, ...]]

# Arrays over queries and keys, (B, N, T, S) or 1 in places; and numbers, (B, N, 1, 1) or less.
OVER_SCORES = "bias", "mask", "query_segments", "key_segments"
NUMBERS = "query_lengths", "key_lengths", "query_offset", "sink"
VMEM = 64 * 2**20


def spec(shape: Sequence[int], index: Index) -> pl.BlockSpec:
    """A block of an array, given where it lies for a batch entry, a head and a block."""
    return pl.BlockSpec(tuple(shape), index)


SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def numbers(call: Call, arrays: Arrays) -> dict[str, tuple[pl.BlockSpec, Array]]:
    """What there is of numbers, as (B, N) or less."""
    names = [*NUMBERS, "temperature", *(f"param {i}" for i in range(call.params))]
    found = {name: arrays[name].reshape(arrays[name].shape[:2]) for name in names if name in arrays}
    if "temperature" in found:
        found["temperature"] = 1 / found["temperature"]
    return {name: (SCALARS, x) for name, x in found.items()}


def flags(call: Call, seen: Array) -> tuple[pl.BlockSpec, Array]:
    """Which tiles of queries take anything of a block of keys, (B, N, tiles, 1, tiles)."""
    seen = lengthened(seen, 3, call.queries)
    *shape, queries = seen.shape
    any_seen = jnp.any(seen.reshape(*shape, 1, queries // call.block, call.block) != 0, -1)
    block = pl.BlockSpec(
        (1, 1, 1, *any_seen.shape[3:]), lambda b, n, j: (b, n, j, 0, 0), memory_space=pltpu.SMEM
    )
    return block, any_seen.astype(jnp.int32)


def over_scores(call: Call, arrays: Arrays) -> dict[str, Array]:
    """What there is of arrays over scores, as (B, N, S, T), filled up."""
    found = {}
    for name in OVER_SCORES:
        if name in arrays:
            x = loadable(name, jnp.swapaxes(arrays[name], 2, 3))
            found[name] = filled(filled(x, 2, call.keys), 3, call.queries)
    return found


def loadable(name: str, x: Array) -> Array:
    """An array over scores in a dtype that kernels load."""
    if "segments" in name:
        return x.astype(jnp.int32)
    if name == "mask":
        return x.astype(jnp.int8)
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def filled(x: Array, axis: int, size: int) -> Array:
    """With zeros up to a size, but for an axis that broadcasts."""
    if x.shape[axis] in (1, size) and not (x.shape[axis] == 1 and size == 1):
        return x
    return lengthened(x, axis, size)


def lengthened(x: Array, axis: int, size: int) -> Array:
    """With zeros up to a size."""
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if x.shape[axis] < size else x


def block_of(x: Array, axis: int, size: int) -> pl.BlockSpec:
    """Blocks along one of the last two axes of an array over scores, all of the other."""
    shape = [1, 1, *x.shape[2:]]
    cut = x.shape[axis] > 1
    if cut:
        shape[axis] = size

    def index(b: Any, n: Any, i: Any) -> tuple[Any, ...]:
        place = [b if x.shape[0] > 1 else 0, n if x.shape[1] > 1 else 0, 0, 0]
        if cut:
            place[axis] = i
        return tuple(place)

    return spec(shape, index)


def of_group(call: Call, shape: Sequence[int]) -> pl.BlockSpec:
    """All that the head of the keys has for a head of the queries."""
    per_group = call.sizes.heads // call.sizes.key_heads
    return spec((1, 1, *shape), lambda b, n, i: (b, head_of(n, per_group), 0, 0))


def part_of_group(call: Call, width: int) -> pl.BlockSpec:
    """A block of its keys or values, (keys, width)."""
    per_group = call.sizes.heads // call.sizes.key_heads
    shape = 1, 1, call.block, width
    return spec(shape, lambda b, n, j: (b, head_of(n, per_group), j, 0))


def head_of(n: Any, per_group: int) -> Any:
    return n if per_group == 1 else lax.div(n, jnp.asarray(per_group, n.dtype))


def run(
    kernel: Callable[..., None],
    call: Call,
    blocks: int,
    ins: dict[str, tuple[pl.BlockSpec, Array]],
    outs: dict[str, tuple[pl.BlockSpec, tuple[int, ...], Any]],
    scratch: dict[str, Any],
) -> dict[str, Array]:
    """Runs `kernel(ins, outs, scratch)` for all batch entries, heads and blocks."""
    _, query = ins["query"]
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    )
    return pl.pallas_call(
        lambda ins, outs, *scratch_refs: kernel(
            ins, outs, dict(zip(scratch, scratch_refs, strict=True))
        ),
        grid=(call.sizes.batch, call.sizes.heads, blocks),
        in_specs=[{name: block for name, (block, _) in ins.items()}],
        out_specs={name: block for name, (block, _, _) in outs.items()},
        out_shape={
            name: type_like(shape, dtype, query) for name, (_, shape, dtype) in outs.items()
        },
        scratch_shapes=list(scratch.values()),
        interpret=call.interpret,
        compiler_params=params,
    )({name: x for name, (_, x) in ins.items()})


def scratch(*shape: int) -> Any:
    """Room in VMEM for float32."""
    return pltpu.VMEM(shape, jnp.float32)


def turned(x: Array) -> Array:
    """The last two axes, swapped."""
    return jnp.swapaxes(x, 2, 3)
