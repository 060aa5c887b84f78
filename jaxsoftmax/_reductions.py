"""What a row is, and how numbers are gathered along it.

Every mapping normalizes over rows, and `Rows` is the only thing that knows what a row is made of.
A mapping sees two kinds of arrays: *entries*, of the shape of the scores, and *row values*, one
number per row. `sum` and `max` lead from entries to row values, `spread` leads back. Written in
these terms a mapping needs no change when a new kind of row arrives.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("axes",))
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that run along array axes.

    Attributes:
      axes: the normalized axes, not negative, ascending. Row values keep them with size 1.
    """

    axes: tuple[int, ...]

    def sum(self, entries: Array) -> Array:
        """The sum of each row. Linear, and so can be used in reverse rules."""
        return jnp.sum(entries, self.axes, keepdims=True)

    def sums(self, first: Array, second: Array) -> tuple[Array, Array]:
        """The sums of two arrays in one pass; for solvers, not for reverse rules."""
        return lax.platform_dependent(first, second, cpu=self._sums_on_cpu, default=self._two_sums)

    def max(self, entries: Array) -> Array:
        """The largest entry of each row, -inf in rows without entries."""
        return jnp.max(entries, self.axes, keepdims=True, initial=-jnp.inf)

    def spread(self, values: Array) -> Array:
        """Row values in a shape that broadcasts against entries."""
        return values

    def flatten(self, values: Array) -> Array:
        """Row values without the normalized axes, as losses return them."""
        return jnp.squeeze(values, self.axes)

    def length(self, entries: Array) -> int:
        """The number of entries in a row."""
        return math.prod(entries.shape[axis] for axis in self.axes)

    def _two_sums(self, first: Array, second: Array) -> tuple[Array, Array]:
        return self.sum(first), self.sum(second)

    def _sums_on_cpu(self, first: Array, second: Array) -> tuple[Array, Array]:
        # XLA for CPU reduces the minor axis one number at a time. Folded into (lanes-high, lanes),
        # the same reduction runs over a middle axis, and LLVM vectorizes across the lanes.
        minor = first.ndim - 1
        if minor not in self.axes or (lanes := _lanes(first.shape[minor])) == 1:
            return _joint_sums((first, second), self.axes)
        whole = first.shape[minor] // lanes * lanes
        folded = [x[..., :whole].reshape(*x.shape[:-1], -1, lanes) for x in (first, second)]
        per_lane = _joint_sums(folded, self.axes)
        sums = [jnp.squeeze(x, minor) for x in _joint_sums(per_lane, (minor + 1,))]
        if whole < first.shape[minor]:
            rest = _joint_sums([x[..., whole:] for x in (first, second)], self.axes)
            sums = [x + y for x, y in zip(sums, rest, strict=True)]
        return sums[0], sums[1]


def indicator(condition: Array, dtype: Any) -> Array:
    """1 where the condition holds and 0 elsewhere, to be counted by `Rows.sum`."""
    return jnp.where(condition, jnp.ones((), dtype), jnp.zeros((), dtype))


def _lanes(length: int) -> int:
    """How many partial sums to keep, as measured on rows of 10 to 100,000."""
    if length >= 512:
        return 64
    return 16 if length >= 32 else 1


def _joint_sums(operands: Sequence[Array], axes: tuple[int, ...]) -> tuple[Array, Array]:
    def add(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
        return x[0] + y[0], x[1] + y[1]

    first, second = operands
    zeros = jnp.zeros((), first.dtype), jnp.zeros((), second.dtype)
    sums = lax.reduce((first, second), zeros, add, axes)
    return jnp.expand_dims(sums[0], axes), jnp.expand_dims(sums[1], axes)
