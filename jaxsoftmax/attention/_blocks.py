"""Attention block by block, with one reverse rule that serves every kind of derivative.

What is kept for the reverse rule is what came in, the output, and the thresholds of the rows.
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

from jaxsoftmax._closed import Closed, is_smooth
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import wide_zeros
from jaxsoftmax.attention._bands import Band
from jaxsoftmax.attention._block import Again, Block
from jaxsoftmax.attention._groups import Groups
from jaxsoftmax.attention._operands import ROWS, UNKNOWN, Operand, join, stack, unstack
from jaxsoftmax.attention._plan import Cuts, Plan, first_of, first_parts, group_start
from jaxsoftmax.attention._prepared import First, Prepared

Prepare = Callable[..., Prepared]


def attend_in_blocks(
    prepare_of: Callable[[Band], Prepare],
    default: Cuts,
    cuts: dict[str, Cuts],
    operands: Sequence[Operand],
    arrays: Sequence[Array],
    places: tuple[int, int, int],
) -> tuple[Array, ...]:
    """The outputs of all blocks, joined along axis 2, the rows.

    Args:
      prepare_of: gives what makes scores for each block of a band. It may close over arrays,
        tracers among them: derivatives flow there too.
      default: how attention is cut.
      cuts: how it is cut on platforms that have a way of their own.
      operands: how parts are cut from each array.
      arrays: the arrays.
      places: which of them are the queries, the keys, and the values.
    """
    closed, opened = Closed(), {}
    for cut in (default, *cuts.values()):
        group = [cut.groups.cut(op, x, (0, 0)) for op, x in zip(operands, arrays, strict=True)]
        for band in (*cut.forward, *cut.backward):
            if (cut.groups, band) not in opened:
                parts = first_parts(operands, group, band)
                first = first_of((0, 0), band.start)
                opened[cut.groups, band] = closed.opened(prepare_of(band), first, *parts)
    # What the blocks close over becomes an operand.
    prepare = functools.partial(_with_closed, len(arrays))
    blocks = {key: Block(functools.partial(prepare, of), *places) for key, of in opened.items()}
    plan = Plan(default, cuts, blocks, (*operands, *(UNKNOWN for _ in closed.arrays)))
    return _attend(plan, *arrays, *closed.arrays)


def _with_closed(count: int, opened: Prepare, first: First, *parts: Array) -> Prepared:
    """Calls what was opened, given its own parts and then what was closed over."""
    return opened(parts[count:], first, *parts[:count])


def _over_blocks(
    operands: Sequence[Operand],
    band: Band,
    function: Callable[..., Any],
    arrays: Sequence[Array],
    state: Any = None,
    of_rows: Any = (),
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
        jax.tree.map(lambda x: stack(x, band), of_rows),
    )
    if band.blocks > 1:
        return lax.scan(step, state, xs)
    state, out = step(state, jax.tree.map(lambda x: x[0], xs))
    return state, jax.tree.map(lambda x: x[None], out)


def _of_rows(outs: Sequence[Any], bands: Sequence[Band]) -> Any:
    """What blocks return for their rows, of all bands."""
    unstacked = [
        jax.tree.map(lambda x, band=band: unstack(x, band), out)
        for out, band in zip(outs, bands, strict=True)
    ]
    return jax.tree.map(lambda *parts: join(parts), *unstacked)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, *arrays: Array) -> tuple[Array, ...]:
    return _forward(plan, arrays)[0]


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _attend_and_keep(plan: Plan, *arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The outputs, and the thresholds, which have no derivatives of their own."""
    return _forward(plan, arrays)


def _forward(plan: Plan, arrays: Sequence[Array]) -> Any:
    def forward(cuts: Cuts, *arrays: Array) -> Any:
        again = plan.again(cuts, cuts.forward, arrays)

        def of_group(place: Any, arrays: Sequence[Array], state: Any) -> Any:
            start, found = group_start(arrays, place), []
            ones = plan.ones(cuts, again, arrays)
            for band, how in zip(cuts.forward, again, strict=True):
                block = plan.blocks[cuts.groups, band]

                def output(
                    state: None,
                    first_row: Any,
                    parts: Any,
                    _: Any,
                    band: Band = band,
                    block: Block = block,
                    how: Again | None = how,
                ) -> Any:
                    first = first_of(start, first_row)
                    cut = ones.cut(how, band, first_row)
                    return state, block.attend_and_keep(cut, first, parts())

                found.append(_over_blocks(plan.operands, band, output, arrays)[1])
            return _of_rows(found, cuts.forward), state

        return cuts.groups.each(of_group, plan.operands, arrays)[0]

    return plan.on_each_platform(forward, *arrays)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which arrays get a cotangent. A bias of constants is none, which saves its (T, S) numbers."""

    which: tuple[Any, ...]


def _attend_fwd(plan: Plan, *primals: Any) -> tuple[Any, Any]:
    arrays = tuple(primal.value for primal in primals)
    wanted = (i for i, x in enumerate(arrays) if primals[i].perturbed and is_smooth(x))
    outs, thresholds = _attend_and_keep(plan, *arrays)
    return outs, (Wanted(tuple(wanted)), arrays, (outs[0], thresholds))


def _attend_and_keep_fwd(plan: Plan, *primals: Any) -> tuple[Any, Any]:
    outs, residuals = _attend_fwd(plan, *primals)
    *_, (_, thresholds) = residuals
    return (outs, thresholds), residuals


def _attend_and_keep_bwd(plan: Plan, residuals: Any, ct: Any) -> tuple[Array | None, ...]:
    return _attend_bwd(plan, residuals, ct[0])


def _attend_bwd(plan: Plan, residuals: Any, ct: Any) -> tuple[Array | None, ...]:
    wanted, arrays, kept = residuals
    ct = tuple(instantiated(x, arrays[0]) for x in ct)
    pulled = functools.partial(_pulled, plan, wanted.which)
    found = linear_pair(
        functools.partial(pulled, from_kept=True),
        functools.partial(_pushed, plan, wanted.which),
        (arrays, kept),
        ct,
        reference=functools.partial(pulled, from_kept=False),
    )
    cts: list[Array | None] = [None] * len(arrays)
    for i, x in zip(wanted.which, found, strict=True):
        cts[i] = x
    return tuple(cts)


# The pullback and its transpose are loops of their own. Were one transposed by JAX, what is summed
# up over the blocks would be kept for each of them.


def _pulled(
    plan: Plan, wanted: Sequence[int], point: Any, ct: tuple[Array, ...], from_kept: bool
) -> list[Array]:
    """The cotangents of the arrays that are wanted.

    Args:
      plan: the plan.
      wanted: which arrays those are.
      point: the arrays, and what was kept.
      ct: the cotangents of the outputs.
      from_kept: whether they are made of what was kept; else derivatives can be taken of them.
    """

    def pulled(cuts: Cuts, arrays: Sequence[Array], kept: Any, ct: Any) -> list[Array]:
        groups, bands = cuts.groups, cuts.backward
        pull = _pull_from_kept if from_kept else _pull_back
        again = plan.again(cuts, bands, arrays) if from_kept else [None for _ in bands]
        # Groups have parts of their own, or else they add to one sum; and so have blocks.
        apart = [i for i in wanted if groups.are_apart(plan.operands[i], arrays[i])]
        totals = {i: wide_zeros(arrays[i]) for i in wanted if i not in apart}
        tree = jax.tree.structure((kept, ct))
        of_rows = jax.tree.leaves((kept, ct))

        def split(parts: Sequence[Array]) -> tuple[Sequence[Array], Any]:
            return parts[: len(arrays)], jax.tree.unflatten(tree, parts[len(arrays) :])

        def of_group(
            place: Any, parts: Sequence[Array], totals: Any, weights: Sequence[Any] | None = None
        ) -> Any:
            pairs = zip(again, weights or [None for _ in bands], strict=True)
            hows = [how and dataclasses.replace(how, weights=own) for how, own in pairs]
            found = _pulled_of_group(plan, cuts, wanted, pull, hows, place, *split(parts))
            for i in totals:
                totals[i] = groups.add(plan.operands[i], totals[i], found[i], place)
            return tuple(found[i] for i in apart), totals

        def weights(place: Any, parts: Sequence[Array]) -> list[Array | None]:
            own, ((_, threshold), _) = split(parts)
            ones, found = plan.ones(cuts, again, own), []
            for band, how in zip(bands, again, strict=True):
                block, first_row = plan.blocks[groups, band], band.start
                first = first_of(group_start(own, place), first_row)
                of_rows = [ROWS.cut(x, band, first_row) for x in threshold]
                cut, seen = ones.cut(how, band, first_row), first_parts(plan.operands, own, band)
                found.append(block.weights_again(cut, first, seen, of_rows))
            return found

        # A step of the loop reads weights that another has made: see `TILING`.
        are_held = groups != Groups() and all(band.blocks == 1 for band in bands)
        ahead = weights if are_held and None not in again else None
        operands = *plan.operands, *(Operand() for _ in of_rows)
        outs, totals = groups.each(of_group, operands, (*arrays, *of_rows), totals, ahead)
        totals |= dict(zip(apart, outs, strict=True))
        # Platforms differ in what they sum up, and so in its dtype.
        return [totals[i].astype(arrays[i].dtype) for i in wanted]

    return plan.on_each_platform(pulled, *point, ct)


def _pull_back(
    again: None, block: Block, wanted: Any, first: Any, parts: Any, kept: Any, ct: Any
) -> Any:
    return block.pull_back(wanted, first, parts, ct)


def _pull_from_kept(
    again: Again | None, block: Block, wanted: Any, first: Any, parts: Any, kept: Any, ct: Any
) -> Any:
    out, thresholds = kept
    return block.pull_back_from(again, wanted, first, parts, out, thresholds, ct)


def _pulled_of_group(
    plan: Plan,
    cuts: Cuts,
    wanted: Sequence[int],
    pull: Callable[..., list[Array]],
    again: Sequence[Again | None],
    place: Any,
    arrays: Sequence[Array],
    of_rows: Any,
) -> dict[int, Array]:
    own = [i for i in wanted if plan.operands[i].has_rows(arrays[i])]
    sums = {i: wide_zeros(arrays[i]) for i in wanted if i not in own}
    rows, ones = [], plan.ones(cuts, again, arrays)
    for band, how in zip(cuts.backward, again, strict=True):
        block = plan.blocks[cuts.groups, band]

        def cotangents(
            sums: Any,
            first_row: Array,
            parts: Any,
            of_rows: Any,
            band: Band = band,
            block: Any = block,
            how: Again | None = how,
        ) -> Any:
            # Computed once more rather than kept, where this is itself differentiated.
            @jax.checkpoint
            def pulled(first_row: Array, kept: Any, ct: Any) -> Any:
                first = first_of(group_start(arrays, place), first_row)
                cut = ones.cut(how, band, first_row)
                return pull(cut, block, wanted, first, parts(), kept, ct)

            found = dict(zip(wanted, pulled(first_row, *of_rows), strict=True))
            sums = {i: plan.operands[i].add(sums[i], found[i], band, first_row) for i in sums}
            spread = [plan.operands[i].spread(found[i], arrays[i], band, first_row) for i in own]
            return sums, spread

        sums, out = _over_blocks(plan.operands, band, cotangents, arrays, sums, of_rows)
        rows.append(out)
    return sums | dict(zip(own, _of_rows(rows, cuts.backward), strict=True))


def _pushed(
    plan: Plan, wanted: Sequence[int], point: Any, tangents: Sequence[Array]
) -> tuple[Array, ...]:
    """The tangents of the outputs: the transpose of `_pulled`."""
    arrays, _ = point
    like = [t.astype(arrays[i].dtype) for i, t in zip(wanted, tangents, strict=True)]
    operands = *plan.operands, *(plan.operands[i] for i in wanted)

    def pushed(cuts: Cuts, *arrays: Array) -> Any:
        def of_group(place: Any, arrays: Sequence[Array], state: Any) -> Any:
            found = []
            for band in cuts.backward:
                block = plan.blocks[cuts.groups, band]

                def push(
                    state: None, first_row: Any, parts: Any, _: Any, block: Block = block
                ) -> Any:
                    @jax.checkpoint
                    def along(first_row: Array) -> Any:
                        first = first_of(group_start(arrays, place), first_row)
                        given = parts()
                        own, tangents = given[: -len(wanted)], given[-len(wanted) :]
                        return block.push_forward(wanted, first, own, tangents)

                    return state, along(first_row)

                found.append(_over_blocks(operands, band, push, arrays)[1])
            return _of_rows(found, cuts.backward), state

        return cuts.groups.each(of_group, operands, arrays)[0]

    return plan.on_each_platform(pushed, *arrays, *like)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_and_keep.defvjp(_attend_and_keep_fwd, _attend_and_keep_bwd, symbolic_zeros=True)


def instantiated(ct: Any, like: Array) -> Array:
    """A cotangent as an array, be it known to be 0."""
    if not isinstance(ct, SymbolicZero):
        return ct
    aval: Any = ct.aval
    return vary_like(jnp.zeros(aval.shape, aval.dtype), like)
