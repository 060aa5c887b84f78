"""Softmax attention whose queries and keys are spread over the same devices.

Keys and values go round the devices in a ring. Each device has its queries attend to what has just
arrived, which gives an output and a log-sum-exp; those of all parts make those of the whole. For
the reverse rule keys go round once more, and their gradients with them. What is kept is what came
in, the output, and one number per row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._differentiation import custom_vjp, hoist
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import Options, prepare, wide, wide_zeros
from jaxsoftmax.attention._arguments import Sizes
from jaxsoftmax.attention._bands import Reach
from jaxsoftmax.attention._block import is_smooth
from jaxsoftmax.attention._operands import KEY_AXIS, ROW_AXIS
from jaxsoftmax.attention._prepared import Rules
from jaxsoftmax.mappings import logsumexp


class Moving(NamedTuple):
    """What goes round: keys and values, and numbers of segments."""

    smooth: list[Array]
    rest: Sequence[Array | None]


class Staying(NamedTuple):
    """What stays: queries, a bias, what functions close over; masks, lengths, random keys."""

    smooth: list[Array]
    rest: Sequence[Array | None]
    sink: Array | None


# The first key, what is here of what goes round, what stays: an output and a number per row.
Part = Callable[[Array, Moving, Staying], tuple[Array, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """All that is known while tracing.

    Attributes:
      names: the mesh axes of the ring.
      queries: how many queries a device has.
      keys: how many keys a device has.
      reach: how far queries see; what none can reach is left out.
      attend: makes the output and the log-sum-exp of one part.
      mix: takes the log-sum-exp of the whole as well, (B, N, T, 1), and gives the part's share of
        the output, and of the weights, which are 1 in all.
    """

    names: tuple[str, ...]
    queries: int
    keys: int
    reach: Reach
    attend: Part
    mix: Callable[[Array, Moving, Staying, Array], tuple[Array, ...]]

    @property
    def size(self) -> int:
        """How many devices there are."""
        return lax.axis_size(self.names)

    def first_key(self, step: Array | int) -> Array:
        """The position of the first key that is here after so many steps."""
        return (lax.axis_index(self.names) - step) % self.size * self.keys

    def is_seen(self, first_key: Array) -> Array:
        """Whether a query of this device can see a key of the part that begins there."""
        first_query = lax.axis_index(self.names) * self.queries
        seen = jnp.array(True)
        if self.reach.after is not None:
            seen &= first_key <= first_query + self.queries - 1 + self.reach.after
        if self.reach.before is not None:
            seen &= first_key + self.keys - 1 >= first_query - self.reach.before
        return seen

    def next(self, x: Any) -> Any:
        """`x` of the device before this one."""
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.names, pairs), x)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def attend(ring: Ring, moving: Moving, fixed: Staying) -> tuple[Array, Array]:
    """The output (B, N, T, V), and the log-sum-exp of each row of scores and sink, (B, N, T)."""

    def merged(step: Array | int, moving: Moving, state: tuple[Array, Array]) -> Any:
        def with_part() -> tuple[Array, Array]:
            out, log_sum = state
            part, log_sum_of_part = ring.attend(first_key, moving, fixed)
            total = jnp.logaddexp(log_sum, log_sum_of_part)
            finite = jnp.where(total == -jnp.inf, 0, total)
            before, now = (jnp.exp(x - finite)[..., None] for x in (log_sum, log_sum_of_part))
            return (before * out + now * part).astype(out.dtype), total

        first_key = ring.first_key(step)
        return lax.cond(ring.is_seen(first_key), with_part, lambda: state)

    def go_on(state: Any, step: Array) -> tuple[Any, None]:
        moving, state = state
        arriving = ring.next(moving)  # on its way while this part is used
        return (arriving, merged(step, moving, state)), None

    steps = ring.size - 1
    state = moving, _start(ring, moving, fixed)
    moving, state = lax.scan(go_on, state, jnp.arange(steps, dtype=jnp.int32))[0]
    return merged(steps, moving, state)


def _start(ring: Ring, moving: Moving, fixed: Staying) -> tuple[Array, Array]:
    shapes = jax.eval_shape(ring.attend, ring.first_key(0), moving, fixed)
    out, log_sum = (vary_like(jnp.zeros(x.shape, x.dtype), fixed.smooth[0]) for x in shapes)
    if fixed.sink is None:
        return out, log_sum - jnp.inf
    return out, log_sum + fixed.sink[..., 0]


def _attend_fwd(ring: Ring, moving: Moving, fixed: Staying) -> tuple[tuple[Array, Array], Any]:
    out, log_sum = attend(ring, moving, fixed)
    return (out, log_sum), (moving, fixed, out, log_sum)


def _attend_bwd(ring: Ring, residuals: Any, ct: tuple[Array, Array]) -> tuple[Moving, Staying]:
    moving, fixed, out, log_sum = residuals
    ct_out, ct_log_sum = ct
    # What each weight is worth beside its share of the output: all weights sum to 1.
    worth = ct_log_sum - jnp.sum(ct_out * out, -1)
    given = log_sum[..., None]

    ct_moving, ct_fixed = linear_pair(
        functools.partial(_pulled, ring),
        functools.partial(_pushed, ring),
        (moving, fixed, given),
        (ct_out, worth),
    )
    ct_sink = None
    if fixed.sink is not None:
        finite = jnp.where(log_sum == -jnp.inf, 0, log_sum)
        of_rows = jnp.exp(fixed.sink[..., 0] - finite) * worth
        ct_sink = jnp.sum(of_rows, (0, 2))[None, :, None, None]
    nothing = [None] * len(moving.rest), [None] * len(fixed.rest)
    ct_moving, ct_fixed = (
        [ct.astype(x.dtype) for ct, x in zip(cts, part.smooth, strict=True)]
        for cts, part in ((ct_moving, moving), (ct_fixed, fixed))
    )
    return Moving(ct_moving, nothing[0]), Staying(ct_fixed, nothing[1], ct_sink)


attend.defvjp(_attend_fwd, _attend_bwd)


# The pullback and its transpose are loops of their own. Were one transposed by JAX, the keys of all
# devices would be kept, one part for each step.
Point = tuple[Moving, Staying, Array]


def _pulled(ring: Ring, point: Point, cts: tuple[Array, Array]) -> Any:
    """The cotangents of what goes round and of what stays, given those of `Ring.mix`."""
    moving, fixed, given = point

    @jax.checkpoint
    def go_on(state: Any, step: Array) -> tuple[Any, None]:
        moving, ct_moving, ct_fixed = state
        arriving = ring.next(moving)
        ct_moving = ring.next(ct_moving)  # both on their way while this part is used
        first_key = ring.first_key(step)

        def pulled() -> Any:
            mix = _mix(ring, first_key, moving, fixed, given)
            return jax.vjp(mix, moving.smooth, fixed.smooth)[1](cts)

        def nothing() -> Any:
            return jax.tree.map(jnp.zeros_like, (moving.smooth, fixed.smooth))

        of_moving, of_fixed = lax.cond(ring.is_seen(first_key), pulled, nothing)
        return (arriving, _sum(ct_moving, of_moving), _sum(ct_fixed, of_fixed)), None

    zeros = jax.tree.map(wide_zeros, (moving.smooth, fixed.smooth))
    state, _ = lax.scan(go_on, (moving, *zeros), jnp.arange(ring.size, dtype=jnp.int32))
    _, ct_moving, ct_fixed = state
    return ring.next(ct_moving), ct_fixed


def _pushed(ring: Ring, point: Point, tangents: Any) -> tuple[Array, ...]:
    """The tangents of `Ring.mix`, summed over all parts: the transpose of `_pulled`."""
    moving, fixed, given = point
    of_moving, of_fixed = tangents

    @jax.checkpoint
    def go_on(state: Any, step: Array) -> tuple[Any, None]:
        moving, of_moving, totals = state
        arriving = ring.next((moving, of_moving))
        first_key = ring.first_key(step)

        def pushed() -> tuple[Array, ...]:
            points, tangents = (moving.smooth, fixed.smooth), (of_moving, of_fixed)
            like = jax.tree.map(lambda t, x: t.astype(x.dtype), tangents, points)
            parts = jax.jvp(_mix(ring, first_key, moving, fixed, given), points, like)[1]
            return tuple(map(jnp.add, totals, parts))

        return (*arriving, lax.cond(ring.is_seen(first_key), pushed, lambda: totals)), None

    shapes = jax.eval_shape(ring.mix, ring.first_key(0), moving, fixed, given)
    totals = tuple(vary_like(jnp.zeros(x.shape, x.dtype), fixed.smooth[0]) for x in shapes)
    state = moving, of_moving, totals
    return lax.scan(go_on, state, jnp.arange(ring.size, dtype=jnp.int32))[0][2]


def _mix(
    ring: Ring, first_key: Array, moving: Moving, fixed: Staying, given: Array
) -> Callable[..., tuple[Array, ...]]:
    """`Ring.mix` as a function of what has derivatives."""

    def mix(of_moving: list[Array], of_fixed: list[Array]) -> tuple[Array, ...]:
        here, there = moving._replace(smooth=of_moving), fixed._replace(smooth=of_fixed)
        return tuple(ring.mix(first_key, here, there, given))

    return mix


def _sum(totals: list[Array], parts: list[Array]) -> list[Array]:
    return [total + part.astype(total.dtype) for total, part in zip(totals, parts, strict=True)]


def in_ring(
    names: tuple[str, ...],
    in_blocks: Callable[[Rules, dict[str, Array], Sizes], tuple[Array, ...]],
    rules: Rules,
    operands: dict[str, Array],
    sizes: Sizes,
) -> tuple[Array, Array]:
    """Attention of queries to the keys of all devices: outputs, and log-sum-exps.

    Args:
      names: the mesh axes that queries and keys are spread over.
      in_blocks: attention to the keys that are here.
      rules: what makes weights of scores, by softmax.
      operands: what blocks are cut from; a bias or a mask has all the keys.
      sizes: the sizes of what is on this device.
    """
    query = operands["query"]
    sink = vary_like(operands["sink"], query) if "sink" in operands else None
    operands = {name: x for name, x in operands.items() if name != "sink"}

    # Outside of the rule, so that JAX sums their cotangents over devices.
    def vary(x: Any) -> Any:
        return vary_like(x, query) if isinstance(x, jax.Array) else x

    names_of_arrays = ("normalizer", "scale", "soft_cap")
    arrays = {name: jax.tree.map(vary, getattr(rules, name)) for name in names_of_arrays}
    going = {name: operands[name] for name in ("key", "value", "key_segments") if name in operands}
    staying = {name: x for name, x in operands.items() if name not in going}
    functions = _of_one_part(in_blocks, dataclasses.replace(rules, **arrays), sizes)
    rows = query[..., :1].astype(wide(query.dtype))
    opened, moving, fixed, can_skip = _hoisted(functions, going, staying, rows)
    can_skip = can_skip and "query_offset" not in staying
    reach = Reach(rules.before, rules.after).of_rows_from(rules.offset) if can_skip else Reach()
    ring = Ring(names, query.shape[ROW_AXIS], operands["key"].shape[KEY_AXIS], reach, *opened)
    return attend(ring, moving, fixed._replace(sink=sink))


def _of_one_part(
    in_blocks: Callable[[Rules, dict[str, Array], Sizes], tuple[Array, ...]],
    rules: Rules,
    sizes: Sizes,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What is done with the keys that are here: `Ring.attend` and `Ring.mix`, of named arrays."""
    softmax: Any = rules.normalizer
    temperature = dict(softmax.options) | softmax.arrays

    def here(first_key: Array, moving: dict[str, Array], fixed: dict[str, Array]) -> Any:
        part = moving | fixed
        for name in ("bias", "mask"):
            if name in part and part[name].shape[KEY_AXIS] != 1:
                part[name] = lax.dynamic_slice_in_dim(part[name], first_key, sizes.keys, KEY_AXIS)
        first = (*rules.first[:3], first_key)
        return dataclasses.replace(rules, first=first, kv_names=()), part

    def attend_part(first_key: Array, moving: Any, fixed: Any) -> Any:
        own, part = here(first_key, moving, fixed)
        own = dataclasses.replace(own, row_value=softmax.of(logsumexp))
        return in_blocks(own, part, sizes)

    def mix_part(first_key: Array, moving: Any, fixed: Any, log_sum: Array) -> Any:
        own, part = here(first_key, moving, fixed)
        weights = functools.partial(_weights, temperature)
        own = dataclasses.replace(own, normalizer=weights, row_value=_row_sum(weights), guard=False)
        return in_blocks(own, part | {"log_sum": log_sum}, sizes)

    return attend_part, mix_part


def _hoisted(
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    going: dict[str, Array],
    staying: dict[str, Array],
    rows: Array,
) -> tuple[list[Callable[..., Any]], Moving, Staying, bool]:
    """The functions with all that they close over given to the rule, which must not hide any of it.

    Args:
      functions: those of one part.
      going: the arrays that go round.
      staying: those that do not.
      rows: one number per row.

    Returns:
      The functions, what goes round, what stays, and whether parts may be left out.
    """
    first = vary_like(jnp.zeros((), jnp.int32), rows)
    attend_part, mix_part = functions
    parts = [
        hoist(attend_part, first, going, staying),
        hoist(mix_part, first, going, staying, rows),
    ]
    of_going, of_staying = _split(going), _split(staying)
    smooth, rest = [*of_staying[0].values()], [*of_staying[1].values()]
    names = [list(arrays) for arrays in (*of_going, *of_staying)]
    opened, can_skip = [], True
    for pure, own_smooth, own_rest in parts:
        # Where what is common to all devices has a gradient, it is summed at every step by all.
        can_skip &= all(vary_like(x, rows) is x for x in own_smooth)
        places = [
            slice(len(x), len(x) + len(y)) for x, y in ((smooth, own_smooth), (rest, own_rest))
        ]
        smooth, rest = smooth + own_smooth, rest + own_rest
        opened.append(functools.partial(_opened, pure, places, names))
    moving = Moving([*of_going[0].values()], [*of_going[1].values()])
    return opened, moving, Staying(smooth, rest, None), can_skip


def _split(arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Those that have derivatives, and the rest."""
    smooth = {name: x for name, x in arrays.items() if is_smooth(x)}
    return smooth, {name: x for name, x in arrays.items() if name not in smooth}


def _opened(
    pure: Callable[..., Any],
    places: list[slice],
    names: list[list[str]],
    first_key: Array,
    moving: Moving,
    fixed: Staying,
    *more: Array,
) -> Any:
    """Calls `pure` with arrays by their names, and with what it closed over."""
    lists = moving.smooth, moving.rest, fixed.smooth, fixed.rest
    named = [dict(zip(of, x, strict=False)) for of, x in zip(names, lists, strict=True)]
    first_key = vary_like(first_key, fixed.smooth[0])
    own_smooth, own_rest = fixed.smooth[places[0]], fixed.rest[places[1]]
    return pure(own_smooth, own_rest, first_key, named[0] | named[1], named[2] | named[3], *more)


def _weights(
    options: dict[str, Any], scores: Array, axis: int, where: Array, log_sum: Array
) -> Array:
    """The weights of softmax, given the log-sum-exp of the whole rows."""
    _, (scores,) = prepare(scores, axis, Options(where, **options))
    # A row in which nothing takes part has no weight.
    return jnp.exp(scores - jnp.where(log_sum == -jnp.inf, 0, log_sum))


def _row_sum(weights: Callable[..., Array]) -> Callable[..., Array]:
    return lambda scores, **options: jnp.sum(weights(scores, **options), -1)
