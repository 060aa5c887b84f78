"""Attention block by block, with one reverse rule that serves every kind of derivative.

Nothing is kept for the reverse rule but what came in: each block is computed once more.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxsoftmax import _jax
from jaxsoftmax._differentiation import custom_vjp, linear_pair
from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import wide_zeros
from jaxsoftmax.attention._bands import Band
from jaxsoftmax.attention._block import Block, is_smooth, pull_back, push_forward
from jaxsoftmax.attention._operands import WHOLE, Operand, join, stack, unstack


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All that is known while tracing.

    Attributes:
      forward: the bands, and what is to be computed for each block of them.
      backward: the same for the reverse rule, whose blocks may be smaller.
      operands: how blocks are cut from each array.
    """

    forward: tuple[tuple[Band, Block], ...]
    backward: tuple[tuple[Band, Block], ...]
    operands: tuple[Operand, ...]


def attend_in_blocks(
    block_of: Callable[[Band], Block],
    forward: Sequence[Band],
    backward: Sequence[Band],
    operands: Sequence[Operand],
    arrays: Sequence[Array],
) -> tuple[Array, ...]:
    """The outputs of all blocks, joined along axis 2, the rows.

    Args:
      block_of: gives what is to be computed for each block of a band. It may close over arrays,
        tracers among them: derivatives flow there too.
      forward: the blocks.
      backward: the blocks of the reverse rule.
      operands: how parts are cut from each array.
      arrays: the arrays.
    """
    traced = {}
    for band in (*forward, *backward):
        if band not in traced:
            pairs = zip(operands, arrays, strict=True)
            parts = [operand.cut(x, band, band.start) for operand, x in pairs]
            first_row = jnp.asarray(band.start, jnp.int32)
            pure, consts, _ = _jax.hoist(block_of(band), first_row, *parts)
            traced[band] = pure, consts
    # What the blocks close over becomes an operand: a reverse rule must not hide any of it.
    pool = {id(const): const for _, consts in traced.values() for const in consts}
    places = {key: len(arrays) + i for i, key in enumerate(pool)}
    blocks = {
        band: _opened(pure, len(arrays), [places[id(const)] for const in consts])
        for band, (pure, consts) in traced.items()
    }
    plan = Plan(
        tuple((band, blocks[band]) for band in forward),
        tuple((band, blocks[band]) for band in backward),
        (*operands, *(WHOLE for _ in pool)),
    )
    return _attend(plan, *arrays, *(jnp.asarray(const) for const in pool.values()))


def _opened(pure: Callable[..., Any], count: int, places: Sequence[int]) -> Block:
    """The same block, whose constants are among its arguments, at `places`."""

    def block(first_row: Array, *parts: Array) -> tuple[Array, ...]:
        return tuple(pure([parts[i] for i in places], first_row, *parts[:count]))

    return block


def _over_blocks(
    operands: Sequence[Operand],
    band: Band,
    function: Callable[..., Any],
    arrays: Sequence[Array],
    state: Any = None,
    of_rows: Sequence[Array] = (),
) -> Any:
    """Scans `state, out = function(state, first_row, parts, parts of of_rows)` over a band.

    `parts()` cuts them when it is called: within `jax.checkpoint`, so that they are not kept.

    What has rows but no keys is handed out by the scan; so derivatives are gathered by it, too.
    """
    pairs = list(zip(operands, arrays, strict=True))
    handed = [i for i, (op, x) in enumerate(pairs) if op.has_rows(x) and not op.has_keys(x)]

    def step(state: Any, xs: Any) -> Any:
        block, own, of_rows = xs
        first_row = band.first_row(block)
        own = dict(zip(handed, own, strict=True))

        def parts() -> list[Array]:
            return [
                own[i] if i in own else operand.cut(x, band, first_row)
                for i, (operand, x) in enumerate(pairs)
            ]

        return function(state, first_row, parts, of_rows)

    xs = (
        jnp.arange(band.blocks, dtype=jnp.int32),
        [stack(pairs[i][1], band) for i in handed],
        [stack(x, band) for x in of_rows],
    )
    if band.blocks > 1:
        return lax.scan(step, state, xs)
    state, out = step(state, jax.tree.map(lambda x: x[0], xs))
    return state, jax.tree.map(lambda x: x[None], out)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, *arrays: Array) -> tuple[Array, ...]:
    bands = []
    for band, block in plan.forward:

        def output(state: None, first_row: Array, parts: Any, _: Any, block: Block = block) -> Any:
            return state, block(first_row, *parts())

        _, outs = _over_blocks(plan.operands, band, output, arrays)
        bands.append([unstack(out, band) for out in outs])
    return tuple(join(outs) for outs in zip(*bands, strict=True))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which arrays get a cotangent. A bias of constants is none, which saves its (T, S) numbers."""

    places: tuple[int, ...]


def _attend_fwd(plan: Plan, *primals: Any) -> tuple[tuple[Array, ...], Any]:
    arrays = tuple(primal.value for primal in primals)
    wanted = (i for i, x in enumerate(arrays) if primals[i].perturbed and is_smooth(x))
    return _attend(plan, *arrays), (Wanted(tuple(wanted)), arrays)


def _attend_bwd(plan: Plan, residuals: Any, ct: tuple[Any, ...]) -> tuple[Array | None, ...]:
    wanted, arrays = residuals
    ct = tuple(_instantiated(x, arrays[0]) for x in ct)
    found = linear_pair(
        functools.partial(_pulled, plan, wanted),
        functools.partial(_pushed, plan, wanted),
        arrays,
        ct,
    )
    cts: list[Array | None] = [None] * len(arrays)
    for i, x in zip(wanted.places, found, strict=True):
        cts[i] = x.astype(arrays[i].dtype)
    return tuple(cts)


# The pullback and its transpose are loops of their own. Were one transposed by JAX, what is summed
# up over the blocks would be kept for each of them.


def _pulled(
    plan: Plan, wanted: Wanted, arrays: Sequence[Array], ct: tuple[Array, ...]
) -> list[Array]:
    """The cotangents of the arrays that are wanted."""
    smooth = wanted.places
    # Blocks have rows of their own, or else they add to one sum.
    own = [i for i in smooth if plan.operands[i].has_rows(arrays[i])]
    shared = [i for i in smooth if i not in own]
    sums = {i: wide_zeros(arrays[i]) for i in shared}
    rows: list[dict[int, Array]] = []
    for band, block in plan.backward:
        pull = functools.partial(pull_back, block, smooth)

        def cotangents(
            sums: Any, first_row: Array, parts: Any, ct: Any, band: Band = band, pull: Any = pull
        ) -> Any:
            # Computed once more rather than kept, where this is itself differentiated.
            found = jax.checkpoint(lambda *args: pull(args[0], parts(), args[1:]))(first_row, *ct)
            found = dict(zip(smooth, found, strict=True))
            sums = {i: plan.operands[i].add(sums[i], found[i], band, first_row) for i in shared}
            spread = {i: plan.operands[i].spread(found[i], arrays[i], band, first_row) for i in own}
            return sums, spread

        sums, of_rows = _over_blocks(plan.operands, band, cotangents, arrays, sums, ct)
        rows.append({i: unstack(of_rows[i], band) for i in own})
    gathered = sums | {i: join([band[i] for band in rows]) for i in own}
    return [gathered[i] for i in smooth]


def _pushed(
    plan: Plan, wanted: Wanted, arrays: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Array, ...]:
    """The tangents of the outputs: the transpose of `_pulled`."""
    smooth = wanted.places
    like = [t.astype(arrays[i].dtype) for i, t in zip(smooth, tangents, strict=True)]
    operands = *plan.operands, *(plan.operands[i] for i in smooth)
    bands = []
    for band, block in plan.backward:

        def pushed(
            state: None, first_row: Array, parts: Any, _: Any, block: Block = block
        ) -> tuple[None, Any]:
            def along(first_row: Array) -> Any:
                given = parts()
                return push_forward(
                    block, smooth, first_row, given[: len(arrays)], given[-len(like) :]
                )

            return state, jax.checkpoint(along)(first_row)

        _, outs = _over_blocks(operands, band, pushed, (*arrays, *like))
        bands.append([unstack(out, band) for out in outs])
    return tuple(join(outs) for outs in zip(*bands, strict=True))


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _instantiated(ct: Any, like: Array) -> Array:
    """A cotangent as an array, be it known to be 0."""
    if not isinstance(ct, SymbolicZero):
        return ct
    aval: Any = ct.aval
    return vary_like(jnp.zeros(aval.shape, aval.dtype), like)
