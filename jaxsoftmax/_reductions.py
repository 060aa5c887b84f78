"""What a row is, and how numbers are gathered along it.

Every mapping normalizes over rows, and `Rows` is the only thing that knows what a row is made of:
array axes, mesh axes, the segments of one axis, a sink. A mapping sees two kinds of values:

* *entries*, a tuple of arrays that hold one number per member of a row: one of the shape of the
  scores, and a second one for the sink if there is one;
* *row values*, one array with one number per row.

`sum` and `max` lead from entries to row values, `map` leads back: it applies a function to entries
and row values together. A mapping written in these terms runs on every kind of row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._jax import varying
from jaxsoftmax._platforms import chosen, constants
from jaxsoftmax._sharding import explicit, first_explicit, parts_of, share_like

Entries = tuple[Array, ...]
Terms = Callable[..., Sequence[Array]]
Pair = tuple[Sequence[Array], Sequence[Array]]  # the terms of sums and of maxima, or these
ExactSums = Callable[..., Sequence[Array]]
T = TypeVar("T")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("segment_ids",),
    meta_fields=("axes", "names", "num_segments", "implementation", "stored"),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows along array axes, mesh axes, or the segments of one array axis.

    A row value, and so a sink, is the same on all devices, and so is its tangent. Where JAX knows
    that, in `shard_map`, its cotangent is the same as well. Under `vmap`, and without `check_vma`,
    JAX does not know: each device has a share of the cotangent, and JAX sums the shares, as it does
    for its own `psum`. Reverse rules compute with whole cotangents: they sum the shares of what
    they get, and share out what they return.

    Attributes:
      axes: the normalized array axes, not negative, ascending. Row values keep them, with size 1
        or `num_segments`.
      names: the normalized mesh axes.
      segment_ids: which row each position along the axis belongs to.
      num_segments: how many rows there are along the axis.
      implementation: what is to compute what is made of them; None: what was measured to be best.
      stored: the dtype of half precision that the scores have in memory, if nothing was computed
        with them; else None.
    """

    axes: tuple[int, ...]
    names: tuple[str, ...] = ()
    segment_ids: Array | None = None
    num_segments: int = 0
    implementation: str | None = None
    stored: Any = None

    def sum(self, entries: Entries) -> Array:
        """The sum of each row. Linear, and so can be used in reverse rules."""
        first, *sink = entries
        if self.segment_ids is None:
            local = self._local_sum(first)
        else:
            local = self._per_segment("add", 0, first)
        total = lax.psum(local, self.names) if self.names else local
        return total + sink[0] if sink else total

    def sums(
        self,
        function: Terms,
        entries: Sequence[Entries],
        row_values: Sequence[Array] = (),
        exactly: ExactSums | None = None,
    ) -> tuple[Array, ...]:
        """The sums of all that `function` gives, in one pass; for solvers, not reverse rules.

        Args:
          function: `(*entries, *row_values) -> terms`, entry by entry, as for `map`.
          entries: the entries that it takes.
          row_values: the row values that it takes.
          exactly: `(sums, *row_values)`: the same with smaller rounding errors, by
            `sums(terms, row_values)`. Not all platforms compute that without another pass.
        """
        sums, _ = self._joint(lambda *args: (function(*args), ()), entries, row_values, exactly)
        return tuple(sums)

    def sums_and_maxima(
        self,
        function: Callable[..., Pair],
        entries: Sequence[Entries],
        row_values: Sequence[Array] = (),
    ) -> Pair:
        """The sums of the first and the maxima of the second that `function` gives; see `sums`."""
        return self._joint(function, entries, row_values)

    def _joint(
        self,
        function: Callable[..., Pair],
        entries: Sequence[Entries],
        row_values: Sequence[Array],
        exactly: ExactSums | None = None,
    ) -> Pair:
        if self.segment_ids is not None:
            sums, maxima = zip(*self.map(function, entries, row_values), strict=True)
            sums, maxima = (zip(*terms, strict=True) for terms in (sums, maxima))
            return tuple(map(self.sum, sums)), tuple(map(self.max, maxima))
        first, *sinks = zip(*entries, strict=True)
        sums, maxima = chosen(
            "joint",
            functools.partial(self._one_by_one, function),
            first,
            tuple(row_values),
            axes=self.axes,
            terms=function,
            exactly=exactly,
        )
        if self.names:
            sums, maxima = lax.psum(sums, self.names), lax.pmax(maxima, self.names)
        for sink in sinks:
            more, others = function(*sink, *row_values)
            sums, maxima = map(jnp.add, sums, more), map(jnp.maximum, maxima, others)
        return tuple(sums), tuple(maxima)

    def _one_by_one(
        self, function: Callable[..., Pair], entries: Sequence[Array], row_values: Sequence[Array]
    ) -> Pair:
        sums, maxima = function(*entries, *row_values)
        return tuple(map(self._local_sum, sums)), tuple(map(self._local_max, maxima))

    def max(self, entries: Entries, least: float = -jnp.inf) -> Array:
        """The largest entry of each row, `least` where there is none that is larger."""
        first, *sink = entries
        if self.segment_ids is None:
            local = self._local_max(first, least)
        else:
            local = self._per_segment("max", least, first)
        top = lax.pmax(local, self.names) if self.names else local
        return jnp.maximum(top, sink[0]) if sink else top

    def top_and_others(self, entries: Entries) -> tuple[Array, Array]:
        """The largest entry, and the sum of `exp(entry - top)` of all others; not for rules.

        In one pass. No digit is lost where one entry dominates, because its 1 is never added. In a
        row without entries they are -inf and -1.
        """
        first, *sink = entries
        starts = jnp.full((), -jnp.inf, first.dtype), jnp.full((), -1, first.dtype)
        found = lax.reduce((first, jnp.zeros_like(first)), starts, _join_exps, self.axes)
        top, others = (jnp.expand_dims(x, self.axes) for x in found)
        if self.names:
            top_of_all = lax.pmax(top, self.names)
            weight = jnp.where(top == top_of_all, others, (1 + others) * _exp_gap(top, top_of_all))
            ties = indicator(top == top_of_all, top.dtype)
            others, ties = lax.psum((weight, ties), self.names)
            top, others = top_of_all, others + (ties - 1)
        for z in sink:
            top, others = _join_exps((top, others), (z, jnp.zeros_like(z)))
        return top, others

    def length_in_memory(self, x: Array) -> int:
        """How many entries of a row are side by side, if all of them are; 0 if not, or unknown."""
        is_whole = self.axes == (x.ndim - 1,) and self.segment_ids is None
        if not is_whole or not is_known(x.shape[-1]) or self.are_shared(x):
            return 0
        return x.shape[-1]

    def summed_cotangent(self, ct: Array) -> Array:
        """The whole cotangent of row values that a function returned."""
        names = untracked(self.names)
        return lax.psum(ct, names) if names else ct

    def shared_cotangent(self, ct: Array) -> Array:
        """A device's share of the cotangent of row values that a function took, given the whole."""
        names = untracked(self.names)
        return ct / lax.axis_size(names) if names else ct

    def summed_cotangents(self, ct: Entries) -> Entries:
        """Those of entries, of which only the sink's are shares."""
        first, *sink = ct
        return first, *map(self.summed_cotangent, sink)

    def shared_cotangents(self, ct: Entries) -> Entries:
        """Those of entries, of which only the sink's become shares."""
        first, *sink = ct
        return first, *map(self.shared_cotangent, sink)

    def map(
        self,
        function: Callable[..., T],
        entries: Sequence[Entries],
        row_values: Sequence[Array] = (),
    ) -> tuple[T, ...]:
        """`function` of entries and row values, entry by entry."""
        first, *sinks = zip(*entries, strict=True)
        spread = [self._spread(values, first[0]) for values in row_values]
        result = (function(*first, *spread),)
        return (*result, *(function(*sink, *row_values) for sink in sinks))

    def rounded(self, scores: Entries) -> Entries:
        """The scores as they are in memory, where a compiler makes them anew at each use."""
        return chosen("rounded", lambda scores: scores, scores, stored=self.stored)

    def search(
        self, scores: Entries, step: Callable[[Entries, Any], tuple[Any, Array]], start: Any
    ) -> Any:
        """Repeats `state, moved = step(scores, state)` while any row moves.

        Args:
          scores: the scores.
          step: a step on some scores. What it finds of them comes last in a state.
          start: the first state. A search may begin with another first row value, that of some
            entries; what else the state holds, such as bounds, stays.
        """
        step_on = functools.partial(functools.partial, step)
        if self.length_in_memory(scores[0]) >= min(constants("MANY").values(), default=math.inf):

            def search_first(scores: Entries, start: Any) -> Array:
                return jax.tree.leaves(iterate(step_on(scores), start))[0]

            first, *_ = jax.tree.leaves(start)
            first = chosen("first_tau", lambda *_: first, scores, start, search=search_first)
            start = with_first(start, first)
        return iterate(step_on(scores), start)

    def in_blocks(
        self, function: Callable[..., Entries], entries: Entries, *row_values: Array
    ) -> Entries:
        """`function(entries, *row_values)`, which goes through rows again and again; not for rules.

        Of as many rows at a time as suit a platform.

        Args:
          function: what gives entries, those of a row from that row alone.
          entries: what it takes of each member.
          *row_values: what it takes of each row.
        """
        first = entries[0]
        least = min(constants("LARGE").values(), default=math.inf)
        is_large = all(map(is_known, first.shape)) and first.size >= least
        is_whole = first.ndim > 1 and self.length_in_memory(first) > 0
        is_spread = first_explicit((*entries, *row_values)) is not None
        if not is_large or not is_whole or is_spread:
            return function(entries, *row_values)
        return chosen("blocks", function, entries, *row_values, stored=self.stored)

    def are_shared(self, scores: Array) -> bool:
        """Whether devices may have to tell each other about a row, as far as types tell."""
        return bool(self.names) or any(parts_of(scores, axis) > 1 for axis in self.axes)

    def can_be_joined(self, scores: Array) -> bool:
        """Whether `top_and_others` can take them: no segments, no row that XLA has spread."""
        return self.segment_ids is None and all(parts_of(scores, axis) == 1 for axis in self.axes)

    def flatten(self, values: Array) -> Array:
        """Row values as they are returned to the caller: without the normalized axes."""
        return jnp.squeeze(values, self.axes) if self.segment_ids is None else values

    def length(self, entries: Entries) -> int:
        """The number of entries in a row, or more."""
        local = math.prod(entries[0].shape[axis] for axis in self.axes)
        if not is_known(local):
            local = _MOST
        return local * math.prod(lax.axis_size(name) for name in self.names) + len(entries) - 1

    def shape(self, scores: Array) -> tuple[int, ...]:
        """The shape of row values, given that of the scores."""
        size = 1 if self.segment_ids is None else self.num_segments
        return tuple(size if i in self.axes else n for i, n in enumerate(scores.shape))

    def flat_shape(self, scores: Array) -> tuple[int, ...]:
        """The shape of row values as the caller has them, but for segments: without the axes."""
        return tuple(n for i, n in enumerate(scores.shape) if i not in self.axes)

    def _spread(self, values: Array, like: Array) -> Array:
        """Row values in a shape that broadcasts against entries such as `like`."""
        if self.segment_ids is None or values.shape[self.axes[0]] == 1:
            return values
        rows, like = (jnp.moveaxis(x, self.axes[0], 0) for x in (values, like))
        # Ids out of range belong to no row; what they get is masked.
        spread = rows.at[self.segment_ids].get(mode="clip", out_sharding=explicit(like))
        return jnp.moveaxis(spread, 0, self.axes[0])

    def _per_segment(self, method: str, start: float, x: Array) -> Array:
        """All entries of a row added, or the largest, along the axis of segments."""
        x = jnp.moveaxis(x, self.axes[0], 0)
        rows = jnp.full((self.num_segments, *x.shape[1:]), start, x.dtype)
        rows = share_like(vary_like(rows, x), x)
        sharding = None if explicit(x) is None else jax.typeof(rows).sharding
        update = getattr(rows.at[self.segment_ids], method)
        rows = update(x, mode="drop", wrap_negative_indices=False, out_sharding=sharding)
        return jnp.moveaxis(rows, 0, self.axes[0])

    def _local_sum(self, x: Array) -> Array:
        return jnp.sum(x, self.axes, keepdims=True)

    def _local_max(self, x: Array, least: float = -jnp.inf) -> Array:
        return jnp.max(x, self.axes, keepdims=True, initial=least)


def iterate(step: Callable[[Any], tuple[Any, Array]], start: Any) -> Any:
    """Repeats `state, moved = step(state)` while any row moves, within bounds.

    The state, or what comes first in it, is a row value.
    """

    def body(carry: tuple[Any, Array]) -> tuple[Any, Array]:
        state, passes = carry
        state, moved = step(state)
        # Not a choice: under `vmap` on an explicit mesh, jax 0.10.0 has none between such numbers.
        at_rest = jnp.all(~moved).astype(passes.dtype)
        return state, jnp.maximum(passes + 1, at_rest * _MAX_PASSES)

    passes = vary_like(no_passes(), jax.tree.leaves(start)[0])
    return lax.while_loop(lambda carry: carry[1] < _MAX_PASSES, body, (start, passes))[0]


def no_passes() -> Array:
    """0 on the mesh around, as `vmap` of a loop needs: what is made as a number is on none."""
    return jnp.squeeze(jnp.zeros(1, jnp.int32))


# More than bisection in every other pass needs to pin down a float64.
_MAX_PASSES = 160


def with_first(state: Any, first: Array) -> Any:
    """The state of a search with another first row value."""
    _, *others = jax.tree.leaves(state)
    return jax.tree.unflatten(jax.tree.structure(state), [first, *others])


def is_known(size: Any) -> bool:
    """Whether a size is a number, and not a symbol of `jax.export`."""
    return isinstance(size, int)


# How long a row is taken for whose length is a symbol.
_MOST = 2**31 - 1


def untracked(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the mesh axes around for which JAX does not know what is the same everywhere."""
    return tuple(name for name in names if name not in varying(jax.typeof(lax.axis_index(name))))


def vary_like(x: Array, other: Array, but: Sequence[str] = ()) -> Array:
    """`x`, seen by `shard_map` as varying over the mesh axes that `other` varies over.

    For what is differentiated, and outside of custom rules: the gradient's sum over devices is then
    taken by JAX and not by the rule.
    """
    missing = varying(jax.typeof(other)) - varying(jax.typeof(x)) - frozenset(but)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def type_like(shape: tuple[int, ...], dtype: Any, x: Array) -> Any:
    """The type of a result that varies over the devices that `x` does."""
    return jax.eval_shape(lambda x: vary_like(jnp.zeros(shape, dtype), x), x)


def indicator(condition: Array, dtype: Any) -> Array:
    """1 where the condition holds and 0 elsewhere, to be counted by `Rows.sum`."""
    return jnp.where(condition, jnp.ones((), dtype), jnp.zeros((), dtype))


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums `x` down to `shape`: the transpose of broadcasting to the same number of axes."""
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m)
    return jnp.sum(x, axes, keepdims=True)


def _exp_gap(x: Array, y: Array) -> Array:
    """`exp(-|x - y|)`, 1 where both are the same infinity."""
    return jnp.exp(jnp.where(x == y, 0, -jnp.abs(x - y)))


def _join_exps(first: Sequence[Array], second: Sequence[Array]) -> tuple[Array, Array]:
    """What `Rows.top_and_others` returns for two rows in one, given what it returns for each."""
    (x, of_x), (y, of_y) = first, second
    weight = _exp_gap(x, y)
    others = jnp.where(x >= y, of_x + (1 + of_y) * weight, of_y + (1 + of_x) * weight)
    return jnp.maximum(x, y), others
