"""What kernels for a Hopper GPU are made of: tiles in registers, products, memory and pipelines.

A program is one warpgroup. A product takes its second factor, and its first one as a rule, from
shared memory, which a pipeline fills while the tiles before are at work.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxsoftmax import _jax
from jaxsoftmax._reductions import vary_like
from jaxsoftmax.attention._kernels._plain import plain
from jaxsoftmax.attention._kernels._tiles import F32, Call, Range

# How many queries and keys a tile has: what one product of a warpgroup is wide.
BLOCK = 64
# How many tiles are on their way or at work.
STAGES = 2
# Rows of more features come a part of a tile at a time, so that shared memory holds them.
NARROW = 128
TILE = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class RowsInRegisters:
    """Rows of scores in the registers of a warpgroup, and numbers of rows beside them.

    Attributes:
      key_axis: the axis along which keys lie.
      count: how many rows a tile has.
      interpret: whether there are no registers, and so no places in them.
    """

    key_axis: int
    count: int
    interpret: bool

    def full(self, value: Any) -> Array:
        """A row value of one number."""
        return self.settled(jnp.full((self.count,), value, F32))

    def sum(self, tile: Array) -> Array:
        """The sum over keys."""
        return jnp.sum(tile, self.key_axis)

    def max(self, tile: Array) -> Array:
        """The maximum over keys."""
        return jnp.max(tile, self.key_axis)

    def spread(self, row: Array, like: Array) -> Array:
        """A row value at each of its scores."""
        if like.ndim == 1:
            return row
        return lax.broadcast_in_dim(row, like.shape, [1 - self.key_axis])

    @property
    def layout(self) -> Any:
        """Where row values lie: beside the scores that they belong to."""
        return TILE.reduce(self.key_axis)

    def settled(self, x: Array) -> Array:
        """The same where tiles or row values lie."""
        if self.interpret:
            return x
        return plgpu.layout_cast(x, self.layout if x.ndim == 1 else TILE)

    def plain(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function without what Mosaic GPU does not know."""
        return plain(function)

    def read(self, refs: Sequence[Any]) -> list[Array]:
        """Row values in shared memory, to be kept until `release`."""
        return [loaded(ref, self.layout, self.interpret) for ref in refs]


def loaded(ref: Any, layout: Any, interpret: bool, optimized: bool = True) -> Array:
    """What lies in memory: in shared memory, to be kept there until `release`, if `optimized`."""
    return ref[...] if interpret else _jax.load(ref, layout, optimized)


def product(x: Any, y: Any, interpret: bool) -> Array:
    """`x @ y.T` of tiles in shared memory."""
    if interpret:
        return _dot(x[...], y[...], 1)

    def compute(out: Any) -> Array:
        plgpu.wgmma(out, x, _jax.transposed(y))
        return out[...]

    return pl.run_scoped(compute, plgpu.WGMMAAccumulatorRef((x.shape[0], y.shape[0]), F32))


def add_product(out: Array, x: Array, y: Any, interpret: bool) -> Array:
    """`out + x @ y` of tiles in registers and shared memory."""
    x = narrow(x, y.dtype)
    if interpret:
        return out + _dot(x, y[...], 0)
    start: Any = plgpu.WGMMAAccumulatorRef.init(out)
    found: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, x, y))(start)
    return found


def _dot(x: Array, y: Array, axis: int) -> Array:
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=F32)


def narrow(x: Array, dtype: Any) -> Array:
    """The factor of a product, finite where it is."""
    if dtype == jnp.float16:
        most = float(jnp.finfo(dtype).max)
        x = jnp.minimum(jnp.maximum(x, -most), most)
    return x.astype(dtype)


def _transforms(part: int, width: int, dtype: Any) -> tuple[Any, ...]:
    """How a product of so many rows wants numbers to lie."""
    size = jnp.dtype(dtype).itemsize
    return _swizzled(min(2 * part, width * size), size)


def _transforms_of_columns(part: int, dtype: Any) -> tuple[Any, ...]:
    """How tiles, of which a part has so many columns, lie so that `loaded` meets no conflicts."""
    size = jnp.dtype(dtype).itemsize
    return _swizzled(min(128, part * size), size)


def _swizzled(width: int, size: int) -> tuple[Any, ...]:
    """Rows in stretches of so many bytes, which are swizzled; a number has `size`."""
    kinds: Any = plgpu  # by its types, jax 0.12 has these as abstract classes, which they are not
    return kinds.TilingTransform((8, width // size)), kinds.SwizzleTransform(width)


def tiles(call: Call, width: int, dtype: Any) -> Any:
    """Shared memory for as many rows as a tile has."""
    return plgpu.SMEM((BLOCK, width), dtype, transforms=_transforms(call.part, width, dtype))


def stretch(call: Call, dtype: Any, *widths: int) -> Any:
    """Shared memory for as many of so many features as a part of a tile has columns."""
    return tiles(call, min(call.part, *widths), dtype)


def columns(call: Call) -> Any:
    """Shared memory for a part of a tile of scores."""
    return plgpu.SMEM((BLOCK, call.part), F32, transforms=_transforms_of_columns(call.part, F32))


def loop(start: Any, stop: Any, part: int, body: Callable[[Any], None]) -> None:
    """`body(first)` for all parts of the tiles from `start` to before `stop`."""

    def step(i: Any, carry: int) -> int:
        body(i * part)
        return carry

    parts = BLOCK // part
    lax.fori_loop(jnp.int32(start * parts), jnp.int32(stop * parts), step, 0)


def pipeline(
    body: Callable[..., Any],
    over: Range,
    part: int,
    rows: Sequence[Any],
    columns: Sequence[Any],
    carry: Any,
) -> Any:
    """`carry = body(first, is_cut, parts, carry)` for all parts of all tiles of a range.

    Args:
      body: is given where a part begins, and what each array has for it.
      over: which tiles.
      part: how many of their rows or columns a part has.
      rows: arrays over (rows, width) or rows alone.
      columns: arrays over (block, columns); parts of all come in this order.
      carry: what the loop carries.
    """
    size = part if any(ref.shape[-1] > NARROW for ref in rows if len(ref.shape) > 1) else BLOCK
    copies = BLOCK // size
    first = jnp.asarray(over.first * copies, jnp.int32)
    is_whole = is_same(over.first, over.inner) and is_same(over.outer, over.last)
    # A product waits until it has read all; `loaded` does not.
    is_loaded = bool(columns) or any(len(ref.shape) == 1 for ref in rows)

    def spec(ref: Any) -> Any:
        if len(ref.shape) == 1:
            return plgpu.BlockSpec((size,), lambda j: (j + first,))
        shape = size, ref.shape[1]
        transforms = _transforms(part, shape[1], ref.dtype)
        return plgpu.BlockSpec(shape, lambda j: (j + first, 0), transforms=transforms)

    def spec_of_columns(ref: Any) -> Any:
        transforms = _transforms_of_columns(part, ref.dtype)
        return plgpu.BlockSpec((BLOCK, size), lambda j: (0, j + first), transforms=transforms)

    def step(index: Any, *parts_and_carry: Any) -> Any:
        *tiles, carry = parts_and_carry
        copy = index[0] + first
        is_cut = False
        if not is_whole:
            is_cut = (copy < over.inner * copies) | (copy >= over.outer * copies)
        for start in range(0, size, part):
            at = pl.ds(start, part)
            parts = [ref.at[at] for ref in tiles[: len(rows)]]
            parts += [ref.at[:, at] for ref in tiles[len(rows) :]]
            carry = body(copy * size + start, is_cut, parts, carry)
        if is_loaded:
            release()
        return carry

    return plgpu.emit_pipeline(
        step,
        grid=((over.last - over.first) * copies,),
        in_specs=[*map(spec, rows), *map(spec_of_columns, columns)],
        max_concurrent_steps=STAGES,
        init_carry=carry,
    )(*rows, *columns)


def is_same(x: Any, y: Any) -> bool:
    """Whether two ends of a range are known to be the same."""
    return x is y or (isinstance(x, int) and isinstance(y, int) and x == y)


def release() -> None:
    """Lets copies overwrite what was `loaded`."""
    plgpu.commit_smem()


def fetch(source: Any, target: Any, barrier: Any) -> None:
    """Waits for a copy to shared memory."""
    plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def store(x: Array, through: Any, target: Any) -> None:
    """Writes by way of shared memory, as many columns at a time as it has.

    Waits until it is free again.
    """
    length, width = x.shape[-1], through.shape[-1]
    for start in range(0, length, width):
        stop = start + width
        through[...] = x[..., start:stop].astype(through.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(through, target.at[..., pl.ds(start, width)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=stop < length)


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """A kernel and what it is launched with.

    Attributes:
      kernel: `kernel(ins, outs, scratch)`, of references by name.
      call: what is known.
      blocks: how many programs there are of each head and batch entry.
      names: those of the arrays that it reads; their first axis is the batch, or 1.
      outs: the shapes and dtypes of those that it writes.
      scratch: its memory.
    """

    kernel: Callable[..., None]
    call: Call
    blocks: int
    names: tuple[str, ...]
    outs: Mapping[str, tuple[tuple[int, ...], Any]]
    scratch: Mapping[str, Any]

    def __call__(self, ins: Sequence[Array]) -> list[Array]:
        """What it writes."""
        return _jax.call(self._launch, _no_tangents, self._launch_batch, list(ins))

    def _launch(self, *ins: Array) -> list[Array]:
        like = ins[self.names.index("query")]
        types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.outs.values()]
        how: dict[str, Any] = {"interpret": _jax.interpreter()} if self.call.interpret else {}
        kernel = plgpu.kernel(
            self._body,
            out_type=types,
            grid=(self.blocks, self.call.sizes.heads, self.call.sizes.batch),
            grid_names=("blocks", "heads", "batch"),
            scratch_types=[*self.scratch.values()],
            compiler_params=plgpu.CompilerParams(
                # A search ends where sums are as near to 1 as rounding allows; softmax has none.
                approx_math=self.call.form.only_scales,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            **how,
        )
        # Pipelines count in the integers that JAX has by default, which no kernel has of 64 bits.
        with jax.enable_x64(False):
            found = jax.jit(kernel)(*ins)
        return [vary_like(x, like) for x in found]

    def _body(self, *refs: Any) -> None:
        groups, at = [], 0
        for names in (self.names, self.outs, self.scratch):
            groups.append(dict(zip(names, refs[at : at + len(names)], strict=True)))
            at += len(names)
        self.kernel(*groups)

    def _launch_batch(
        self, size: int, is_batched: Sequence[bool], ins: Sequence[Array]
    ) -> list[Array]:
        """The same for one more axis, in front: a part of the batch."""
        sizes = self.call.sizes
        sizes = dataclasses.replace(sizes, batch=size * sizes.batch)

        def folded(x: Array, is_batched: bool) -> Array:
            if not is_batched and x.shape[0] == 1 < self.call.sizes.batch:
                return x
            x = x if is_batched else x[None]
            x = jnp.broadcast_to(x, (size, self.call.sizes.batch, *x.shape[2:]))
            return x.reshape(-1, *x.shape[2:])

        outs = {n: ((size * shape[0], *shape[1:]), t) for n, (shape, t) in self.outs.items()}
        launch = dataclasses.replace(
            self, call=dataclasses.replace(self.call, sizes=sizes), outs=outs
        )
        found = launch(list(map(folded, ins, is_batched)))
        return [x.reshape(size, -1, *x.shape[1:]) for x in found]


def _no_tangents(*_: Any) -> Any:
    """Refuses, which is right: `Attention` has a rule, and differentiates by XLA, not a kernel."""
    raise TypeError("kernels have no forward mode; what calls them has a rule")


def run(
    kernel: Callable[..., None],
    call: Call,
    blocks: int,
    ins: Mapping[str, Array],
    outs: Mapping[str, tuple[tuple[int, ...], Any]],
    scratch: Mapping[str, Any],
) -> dict[str, Array]:
    """Runs `kernel(ins, outs, scratch)` for all blocks, heads and batch entries."""
    launch = Launch(kernel, call, blocks, tuple(ins), outs, scratch)
    return dict(zip(outs, launch(list(ins.values())), strict=True))


def row() -> Any:
    """Shared memory for a number of each row of a tile."""
    return plgpu.SMEM((BLOCK,), F32)


def barrier() -> Any:
    """What `fetch` waits at."""
    return plgpu.Barrier()


def index(name: str) -> Any:
    """Where a program is along an axis of the grid."""
    return lax.axis_index(name)
