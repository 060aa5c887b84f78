"""Attention whose queries and keys are spread over the same devices.

Keys and values go round the devices in a ring. Each device has its queries attend to what has just
arrived. For softmax that gives an output and a log-sum-exp, and those of all parts make those of
the whole. For other forms keys go round a few times more, until the thresholds of whole rows are
found; given those, outputs of parts add up.

For the reverse rule keys go round once more, and their gradients with them. What is kept is what
came in, the output, and the threshold of each row: given a threshold, parts know nothing of each
other but the mean of the rule of the family, which is one number per row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax import _threshold
from jaxsoftmax._closed import is_smooth
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._jax import varying
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._reductions import iterate, vary_like
from jaxsoftmax._scores import wide, wide_zeros
from jaxsoftmax.attention._bands import Reach
from jaxsoftmax.attention._blocks import Wanted, instantiated

# What goes round, keys, values and their segments, and what stays, by name.
Arrays = dict[str, Any]


class Search(NamedTuple):
    """The search for the thresholds of whole rows, of sums over all parts.

    Attributes:
      top: `(staying, first key, moving)`: the largest score of each row, (B, N, T, 1).
      sums: `(staying, first key, moving, threshold)`: what a pass adds up.
      start: `(staying)`: the first state.
      update: `(staying, sums, state)`: the next state, and which rows move.
    """

    top: Callable[..., Array]
    sums: Callable[..., tuple[Array, ...]]
    start: Callable[[Arrays], Any]
    update: Callable[..., Any]


class Parts(NamedTuple):
    """What is done with the keys that are here.

    Attributes:
      mix: `(staying, first key, moving, threshold)`, of the thresholds of whole rows: the part's
        share of the output, (B, N, T, V), and of the sum of the weights, (B, N, T).
      stream: `(staying, first key, moving)`: the output, the largest score, and the logarithm of
        the sum of exponentials relative to that, if those of all parts make those of the whole.
      search: how thresholds are found, if they have to be.
      total: `(staying, first key, moving, threshold)`: the part's share of the sum of the weights
        alone, for keys without their values, where weights of the whole sum to 1.
    """

    mix: Callable[..., tuple[Array, Array]]
    stream: Callable[..., tuple[Array, Array, Array]] | None = None
    search: Search | None = None
    total: Callable[..., Array] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """All that is known while tracing.

    Attributes:
      names: the mesh axes of the ring.
      queries: how many queries a device has.
      keys: how many keys a device has.
      reach: how far queries see; what none can reach is left out.
      parts: what is done with the keys that are here.
    """

    names: tuple[str, ...]
    queries: int
    keys: int
    reach: Reach
    parts: Parts

    @property
    def size(self) -> int:
        """How many devices there are."""
        return lax.axis_size(self.names)

    def first_key(self, step: Array | int) -> Array:
        """The position of the first key that is here after so many steps."""
        return (lax.axis_index(self.names) - step) % self.size * self.keys

    def is_seen(self, first_key: Array) -> Array:
        """Whether a query of this device can see a key of the part that begins there."""
        own = lax.axis_index(self.names)
        first_query = own * self.queries
        seen = jnp.array(True)
        if self.reach.after is not None:
            seen &= first_key <= first_query + self.queries - 1 + self.reach.after
        if self.reach.before is not None:
            seen &= first_key + self.keys - 1 >= first_query - self.reach.before
        return seen | (first_key == own * self.keys)  # which has the sink

    def next(self, x: Any) -> Any:
        """`x` of the device before this one."""
        pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.names, pairs), x)

    def round(self, visit: Callable[[Array, Any, Any], Any], moving: Any, state: Any) -> Any:
        """`state = visit(first key, what is here, state)` of each part that is seen."""

        def visited(step: Array | int, moving: Any, state: Any) -> Any:
            first_key = self.first_key(step)
            return lax.cond(
                self.is_seen(first_key), lambda: visit(first_key, moving, state), lambda: state
            )

        def go_on(carry: Any, step: Array) -> tuple[Any, None]:
            moving, state = carry
            arriving = self.next(moving)  # on its way while this part is used
            return (arriving, visited(step, moving, state)), None

        steps = self.size - 1
        carry = moving, state
        moving, state = lax.scan(go_on, carry, jnp.arange(steps, dtype=jnp.int32))[0]
        return visited(steps, moving, state)

    def sum(self, part: Callable[..., Any], moving: Any, staying: Arrays) -> Any:
        """The sum of `part(first key, what is here)`, an array or some, over all parts."""
        zeros = zeros_of(staying, part, self.first_key(0), moving)

        def visit(first_key: Array, moving: Any, totals: Any) -> Any:
            return jax.tree.map(jnp.add, totals, part(first_key, moving))

        return self.round(visit, moving, zeros)


def zeros_of(staying: Arrays, function: Callable[..., Any], *args: Any) -> Any:
    """Zeros as what the function returns, which vary over devices as queries do."""

    def zeros(like: Any) -> Array:
        return vary_like(jnp.zeros(like.shape, like.dtype), staying["query"])

    return jax.tree.map(zeros, jax.eval_shape(function, *args))


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def attend(ring: Ring, moving: Arrays, staying: Arrays) -> tuple[Array, Array]:
    """The output, (B, N, T, V), and the threshold of each row, (B, N, T, 3).

    A threshold is what `_threshold.solve` returns: the number that is subtracted from scores, `tau`
    relative to that, and a factor. Derivatives are those in `tau`; to them, the other two are
    constants. Those of softmax are the largest score, a log-sum-exp relative to it, and 1.
    """
    mix, stream, search, _ = ring.parts
    if stream is not None:
        return _streamed(ring, stream, moving, staying)
    if search is not None:
        threshold = _searched(ring, search, moving, staying)
    else:
        query = staying["query"]
        threshold = vary_like(jnp.zeros((*query.shape[:-1], 3), wide(query.dtype)), query)

    def output(first_key: Array, moving: Arrays) -> Array:
        return mix(staying, first_key, moving, threshold)[0]

    return ring.sum(output, moving, staying), threshold


def _streamed(
    ring: Ring, stream: Callable[..., Any], moving: Arrays, staying: Arrays
) -> tuple[Array, Array]:
    def visit(first_key: Array, moving: Arrays, state: tuple[Array, Array, Array]) -> Any:
        parts = state, stream(staying, first_key, moving)
        top = jnp.maximum(state[1], parts[1][1])
        # The same infinity is no distance.
        logs = [log + jnp.where(own == top, 0, own - top) for _, own, log in parts]
        total = jnp.logaddexp(*logs)
        finite = jnp.where(total == -jnp.inf, 0, total)
        before, now = (jnp.exp(log - finite)[..., None] for log in logs)
        return (before * state[0] + now * parts[1][0]).astype(state[0].dtype), top, total

    out, top, log = zeros_of(staying, stream, staying, ring.first_key(0), moving)
    start = out, top + jnp.finfo(top.dtype).min, log - jnp.inf
    out, top, log = ring.round(visit, moving, start)
    # Made of `log`: under `vmap` on an explicit mesh, JAX can stack only what is all mapped.
    one = jnp.where(log == log, 1, log)
    return out, jnp.stack([top, log, one], -1)


def _searched(ring: Ring, search: Search, moving: Arrays, staying: Arrays) -> Array:
    """The thresholds of whole rows, by the search that any form has."""
    keys = {name: x for name, x in moving.items() if name != "value"}
    zeros = zeros_of(staying, search.top, staying, ring.first_key(0), keys)
    least = zeros + jnp.finfo(zeros.dtype).min

    def larger(first_key: Array, keys: Arrays, top: Array) -> Array:
        return jnp.maximum(top, search.top(staying, first_key, keys))

    top = ring.round(larger, keys, least)

    def step(state: Any) -> tuple[Any, Array]:
        (tau, *others), _ = state

        def sums(first_key: Array, keys: Arrays) -> tuple[Array, ...]:
            return search.sums(staying, first_key, keys, _joined(top, tau, jnp.ones_like(tau)))

        found = ring.sum(sums, keys, staying)
        state, moved = search.update(staying, found, (tau, *others))
        # All devices go on until no row of any of them moves, for they wait for each other.
        names = {*ring.names, *varying(jax.typeof(moved))}
        moving_rows = vary_like(jnp.any(moved).astype(jnp.int32), lax.axis_index(ring.names))
        return (state, found[0]), lax.pmax(moving_rows, tuple(sorted(names))) > 0

    start = jax.tree.map(lambda x: vary_like(x, top), search.start(staying))
    (tau, *_), total = iterate(step, (start, jnp.zeros_like(top)))
    return _joined(top, tau, _threshold.inverse_of(total))


def _joined(*row_values: Array) -> Array:
    return jnp.concatenate(row_values, -1)


def _attend_fwd(ring: Ring, *primals: Any) -> tuple[tuple[Array, Array], Any]:
    moving, staying = ({name: x.value for name, x in own.items()} for own in primals)
    _, of_staying = primals
    wanted = (n for n, x in staying.items() if of_staying[n].perturbed and is_smooth(x))
    found = attend(ring, moving, staying)
    return found, (Wanted(tuple(wanted)), moving, staying, *found)


def _attend_bwd(ring: Ring, residuals: Any, ct: tuple[Array, Array]) -> tuple[Arrays, Arrays]:
    wanted, moving, staying, out, threshold = residuals
    ct_out, ct_threshold = (instantiated(x, out) for x in ct)
    # Where a row sees nothing, there is nothing that `tau` would be subtracted from.
    threshold = jnp.where(threshold == -jnp.inf, 0, threshold)
    of_out, total = _sums_of_slopes(ring, moving, staying, out, threshold)
    total = jnp.where(total == 0, 1, total)
    if {"query"}.issuperset(wanted.which):
        weighted = jnp.sum(ct_out * of_out, -1)
    else:  # sums over scores of a row, such as that of a scale
        weighted = _sums_of_cotangents(ring, moving, staying, threshold, ct_out)
    # What each weight is worth beside its share of the output: all weights sum to 1.
    worth = (ct_threshold[..., 1] - weighted) / total
    cts = linear_pair(
        functools.partial(_pulled, ring),
        functools.partial(_pushed, ring),
        (moving, staying, threshold, of_out, total),
        (ct_out, worth),
    )
    ct_moving, ct_staying = (
        {name: found[name].astype(x.dtype) if name in found else None for name, x in own.items()}
        for found, own in zip(cts, (moving, staying), strict=True)
    )
    return ct_moving, ct_staying


def _sums_of_slopes(
    ring: Ring, moving: Arrays, staying: Arrays, out: Array, threshold: Array
) -> tuple[Array, Array]:
    """The sums over all keys of `s v` and of `s`: what is mixed falls by so much as `tau` grows."""
    if ring.parts.stream is not None:  # the slopes of softmax are its weights
        return out, jnp.ones(out.shape[:-1], out.dtype)
    if ring.parts.search is None:
        return jnp.zeros_like(out), jnp.ones(out.shape[:-1], out.dtype)
    falls = _in_tau(threshold, jnp.full_like(threshold[..., 1], -1))

    @jax.checkpoint
    def slopes(first_key: Array, moving: Arrays) -> tuple[Array, Array]:
        mix = functools.partial(ring.parts.mix, staying, first_key, moving)
        return jax.jvp(mix, (threshold,), (falls,))[1]

    return ring.sum(slopes, moving, staying)


def _sums_of_cotangents(
    ring: Ring, moving: Arrays, staying: Arrays, threshold: Array, ct_out: Array
) -> Array:
    """The sums over all keys of `s ct`, by slopes that are not rounded as those that are mixed."""

    @jax.checkpoint
    def weighted(first_key: Array, moving: Arrays) -> Array:
        mix = functools.partial(ring.parts.mix, staying, first_key, moving)
        cts = ct_out, jnp.zeros_like(threshold[..., 1])
        return -jax.vjp(mix, threshold)[1](cts)[0][..., 1]

    return ring.sum(weighted, moving, staying)


def _in_tau(threshold: Array, tangent: Array) -> Array:
    """The tangent of a threshold of which only `tau` moves."""
    return jnp.zeros_like(threshold).at[..., 1].set(tangent)


attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


# The pullback and its transpose are loops of their own. Were one transposed by JAX, the keys of all
# devices would be kept, one part for each step.
Point = tuple[Arrays, Arrays, Array, Array, Array]


def _pulled(ring: Ring, point: Point, cts: tuple[Array, Array]) -> tuple[Arrays, Arrays]:
    """The cotangents of what goes round and of what stays, given those of `Parts.mix`."""
    moving, staying, threshold, _, _ = point

    @jax.checkpoint
    def go_on(state: Any, step: Array) -> tuple[Any, None]:
        moving, ct_moving, ct_staying = state
        arriving = ring.next(moving)
        ct_moving = ring.next(ct_moving)  # both on their way while this part is used
        first_key = ring.first_key(step)

        def pulled() -> tuple[Arrays, Arrays]:
            mix = _of_smooth(ring.parts.mix, first_key, moving, staying)
            given = functools.partial(mix, threshold)
            return jax.vjp(given, _smooth(moving), _smooth(staying))[1](cts)

        def nothing() -> tuple[Arrays, Arrays]:
            return jax.tree.map(jnp.zeros_like, (_smooth(moving), _smooth(staying)))

        of_moving, of_staying = lax.cond(ring.is_seen(first_key), pulled, nothing)
        return (arriving, _add(ct_moving, of_moving), _add(ct_staying, of_staying)), None

    zeros = jax.tree.map(wide_zeros, (_smooth(moving), _smooth(staying)))
    state, _ = lax.scan(go_on, (moving, *zeros), jnp.arange(ring.size, dtype=jnp.int32))
    _, ct_moving, ct_staying = state
    return ring.next(ct_moving), ct_staying


def _pushed(ring: Ring, point: Point, tangents: tuple[Arrays, Arrays]) -> tuple[Array, Array]:
    """The tangents of `Parts.mix`, summed over all parts: the transpose of `_pulled`.

    What all scores of a row have in common changes no weight, but it can be large, and products
    round. So `tau` moves with the mean, and what that takes away is added to the sums.
    """
    moving, staying, threshold, of_out, total = point
    of_moving, of_staying = tangents

    def pushed(part: Callable[..., Any], of_threshold: Array, names: set[str]) -> Any:
        @jax.checkpoint
        def of_part(first_key: Array, here: tuple[Arrays, Arrays]) -> Any:
            moving, of_moving = here
            points = threshold, _smooth(moving), _smooth(staying)
            tangents = of_threshold, of_moving, of_staying
            like = jax.tree.map(lambda t, x: t.astype(x.dtype), tangents, points)
            return jax.jvp(_of_smooth(part, first_key, moving, staying), points, like)[1]

        going = tuple({k: v for k, v in x.items() if k in names} for x in (moving, of_moving))
        return ring.sum(of_part, going, staying)

    still = jnp.zeros_like(threshold)
    if ring.parts.total is None:
        return pushed(ring.parts.mix, still, {*moving})
    mean = pushed(ring.parts.total, still, {*moving} - {"value"}) / total
    out, rest = pushed(ring.parts.mix, _in_tau(threshold, mean), {*moving})
    return out + mean[..., None] * of_out, rest + mean * total


def _of_smooth(
    part: Callable[..., Any], first_key: Array, moving: Arrays, staying: Arrays
) -> Callable[..., Any]:
    """A function of `Parts` as one of the threshold and of what has derivatives."""

    def of_smooth(threshold: Array, of_moving: Arrays, of_staying: Arrays) -> Any:
        here, there = moving | of_moving, staying | of_staying
        return part(there, first_key, here, threshold)

    return of_smooth


def _smooth(arrays: Arrays) -> Arrays:
    return {name: x for name, x in arrays.items() if is_smooth(x)}


def _add(totals: Arrays, parts: Arrays) -> Arrays:
    return jax.tree.map(lambda total, part: total + part.astype(total.dtype), totals, parts)
