"""Attention block by block, with one reverse rule that serves every kind of derivative.

Nothing is kept for the reverse rule but what came in: each block is computed once more.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import vary_like
from jaxsoftmax.attention._block import Block, is_smooth, pull_back, score_dtype
from jaxsoftmax.attention._plan import Band


@dataclasses.dataclass(frozen=True)
class Operand:
    """How blocks are cut from an array.

    Attributes:
      row_axis: the axis of the query rows, None if all blocks see the same.
      key_axis: the axis of the keys, None if all blocks see the same.
    """

    row_axis: int | None = None
    key_axis: int | None = None

    def cut(self, x: Array, band: Band, first_row: int | Array) -> Array:
        """The part of `x` that a block sees."""
        starts, sizes = self._window(x, band, first_row)
        if sizes == x.shape:
            return x
        return lax.dynamic_slice(x, starts, sizes)

    def add(self, total: Array, part: Array, band: Band, first_row: int | Array) -> Array:
        """`total` with `part` added where `cut` took it from: the transpose of `cut`."""
        starts, sizes = self._window(total, band, first_row)
        part = part.astype(total.dtype)
        if sizes == total.shape:
            return total + part
        # Rows belong to one block only. To read first would make XLA copy the whole.
        if not self._is_cut(total, self.row_axis):
            part = lax.dynamic_slice(total, starts, sizes) + part
        return lax.dynamic_update_slice(total, part, starts)

    @staticmethod
    def _is_cut(x: Array, axis: int | None) -> bool:
        return axis is not None and x.shape[axis] != 1

    def _window(
        self, x: Array, band: Band, first_row: int | Array
    ) -> tuple[list[int | Array], tuple[int, ...]]:
        starts: list[int | Array] = [0] * x.ndim
        sizes = list(x.shape)
        if self.row_axis is not None and self._is_cut(x, self.row_axis):
            starts[self.row_axis], sizes[self.row_axis] = first_row, band.rows
        if self.key_axis is not None and self._is_cut(x, self.key_axis):
            starts[self.key_axis], sizes[self.key_axis] = band.key_start(first_row), band.keys
        return starts, tuple(sizes)


_ROWS = Operand(row_axis=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All that is known while tracing.

    Attributes:
      steps: the bands, and what is to be computed for each block of them.
      operands: how blocks are cut from each array.
    """

    steps: tuple[tuple[Band, Block], ...]
    operands: tuple[Operand, ...]

    def cut(self, arrays: Sequence[Array], band: Band, first_row: int | Array) -> list[Array]:
        """The parts that a block sees."""
        pairs = zip(self.operands, arrays, strict=True)
        return [operand.cut(x, band, first_row) for operand, x in pairs]


def attend_in_blocks(
    block_of: Callable[[Band], Block],
    bands: Sequence[Band],
    operands: Sequence[Operand],
    arrays: Sequence[Array],
) -> tuple[Array, ...]:
    """The outputs of all blocks, joined along axis 2, the rows.

    Args:
      block_of: gives what is to be computed for each block of a band. It may close over arrays,
        tracers among them: derivatives flow there too.
      bands: the blocks.
      operands: how parts are cut from each array.
      arrays: the arrays.
    """
    plan = Plan(tuple((band, block_of(band)) for band in bands), tuple(operands))
    plan, closed_over = _hoist(plan, arrays)
    return _attend(plan, *arrays, *closed_over)


def _hoist(plan: Plan, arrays: Sequence[Array]) -> tuple[Plan, list[Array]]:
    """Makes operands of what the blocks close over: a reverse rule must not hide any of it."""
    pool: dict[int, Array] = {}
    steps = []
    for band, block in plan.steps:
        first_row = jnp.asarray(band.start, jnp.int32)
        closed = jax.make_jaxpr(block)(first_row, *plan.cut(arrays, band, band.start))
        pool |= {id(const): const for const in closed.consts}
        steps.append((band, closed))
    order = {key: len(arrays) + i for i, key in enumerate(pool)}
    opened = tuple(
        (band, _open(closed, len(arrays), [order[id(const)] for const in closed.consts]))
        for band, closed in steps
    )
    operands = (*plan.operands, *(Operand() for _ in pool))
    return Plan(opened, operands), [jnp.asarray(const) for const in pool.values()]


def _open(closed: ClosedJaxpr, count: int, where: Sequence[int]) -> Block:
    """The same block, whose constants come last among its arguments."""

    def block(first_row: Array, *parts: Array) -> tuple[Array, ...]:
        consts = [parts[i] for i in where]
        return tuple(jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(first_row, *parts[:count]))

    return block


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, *arrays: Array) -> tuple[Array, ...]:
    return _joined([_forward(plan, band, block, arrays) for band, block in plan.steps])


def _forward(plan: Plan, band: Band, block: Block, arrays: Sequence[Array]) -> tuple[Array, ...]:
    def of_block(i: Array | int) -> tuple[Array, ...]:
        first_row = band.first_row(i)
        return block(jnp.asarray(first_row, jnp.int32), *plan.cut(arrays, band, first_row))

    if band.blocks == 1:
        return of_block(0)
    _, outs = lax.scan(lambda _, i: (None, of_block(i)), None, _steps(band))
    return tuple(_unstacked(out) for out in outs)


def _unstacked(x: Array) -> Array:
    """(blocks, B, N, rows, ...) as (B, N, blocks * rows, ...)."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _joined(parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    return tuple(x[0] if len(x) == 1 else jnp.concatenate(x, 2) for x in zip(*parts, strict=True))


def _steps(band: Band) -> Array:
    return jnp.arange(band.blocks, dtype=jnp.int32)


def _attend_fwd(plan: Plan, *arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return _attend(plan, *arrays), arrays


def _attend_bwd(
    plan: Plan, arrays: tuple[Array, ...], ct: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    smooth = [i for i, x in enumerate(arrays) if is_smooth(x)]
    totals = [_zeros(arrays[i]) for i in smooth]
    for band, block in plan.steps:

        def step(totals: list[Array], i: Array | int, band: Band = band, block: Block = block):
            first_row = band.first_row(i)
            parts = plan.cut(arrays, band, first_row)
            ct_block = tuple(_ROWS.cut(x, band, first_row) for x in ct)
            # Recomputed rather than kept, if this is itself differentiated.
            pull = jax.checkpoint(functools.partial(pull_back, block))
            cotangents = pull(jnp.asarray(first_row, jnp.int32), parts, ct_block)
            added = zip(smooth, totals, cotangents, strict=True)
            return [
                plan.operands[i].add(total, part, band, first_row) for i, total, part in added
            ], None

        if band.blocks == 1:
            totals, _ = step(totals, 0)
        else:
            totals, _ = lax.scan(step, totals, _steps(band))
    result: list[Array | None] = [None] * len(arrays)
    for i, total in zip(smooth, totals, strict=True):
        result[i] = total.astype(arrays[i].dtype)
    return tuple(result)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _zeros(x: Array) -> Array:
    """Where the cotangent of `x` is gathered: in float32 at least."""
    return vary_like(jnp.zeros(x.shape, score_dtype(x.dtype)), x)
