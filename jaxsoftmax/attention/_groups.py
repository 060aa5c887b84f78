"""Attention to a few heads after the other, where that keeps their scores near the cores."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax.attention._operands import Operand

Place = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Groups:
    """Into how many equal parts the batch and the heads are cut, axes 0 and 1 of all operands.

    Attributes:
      batch: for the batch.
      heads: for the heads.
    """

    batch: int = 1
    heads: int = 1

    def each(
        self,
        function: Callable[..., tuple[tuple[Array, ...], Any]],
        operands: Sequence[Operand],
        arrays: Sequence[Array],
        state: Any = None,
        ahead: Callable[..., Any] | None = None,
    ) -> tuple[tuple[Array, ...], Any]:
        """Outputs and state of `function(place, arrays of the group, state)`, group by group.

        Outputs begin with the axes of batch and heads, and are joined along them.

        Args:
          function: what is computed for each group.
          operands: how groups are cut from each array.
          arrays: the arrays.
          state: what is handed on from group to group.
          ahead: `ahead(place, arrays of the group)` is computed one group ahead, and comes as the
            last argument of `function`.
        """
        pairs = list(zip(operands, arrays, strict=True))
        if self == Groups():
            return function((0, 0), arrays, state)
        last = self.batch * self.heads - 1

        def group(i: Array | int) -> tuple[Place, list[Array]]:
            place = i // self.heads, i % self.heads
            return place, [self.cut(operand, x, place) for operand, x in pairs]

        def step(carry: Any, i: Array) -> Any:
            state, own = carry
            outs, state = function(*group(i), state, *own)
            if ahead is not None:
                own = (ahead(*group(jnp.minimum(i + 1, last))),)
            return (state, own), outs

        first = () if ahead is None else (ahead(*group(0)),)
        (state, _), outs = lax.scan(step, (state, first), jnp.arange(last + 1, dtype=jnp.int32))
        return jax.tree.map(self._joined, outs), state

    def cut(self, operand: Operand, x: Array, place: Place) -> Array:
        """The part of an array that a group sees."""
        for axis in self._cut_axes(operand, x):
            size = x.shape[axis] // self._counts[axis]
            x = lax.dynamic_slice_in_dim(x, place[axis] * size, size, axis)
        return x

    def add(self, operand: Operand, total: Array, part: Array, place: Place) -> Array:
        """`total` with `part` added where `cut` took it from."""
        starts = [jnp.zeros((), jnp.int32)] * total.ndim
        for axis in self._cut_axes(operand, total):
            starts[axis] = place[axis] * part.shape[axis]
        if part.shape == total.shape:
            return total + part.astype(total.dtype)
        part = lax.dynamic_slice(total, starts, part.shape) + part.astype(total.dtype)
        return lax.dynamic_update_slice(total, part, starts)

    def are_apart(self, operand: Operand, x: Array) -> bool:
        """Whether no two groups see the same of an array."""
        cut = self._cut_axes(operand, x)
        return all(axis in cut or count == 1 for axis, count in enumerate(self._counts))

    @property
    def _counts(self) -> tuple[int, int]:
        return self.batch, self.heads

    def _cut_axes(self, operand: Operand, x: Array) -> list[int]:
        if not operand.grouped:
            return []
        return [axis for axis, n in enumerate(self._counts) if n != 1 and x.shape[axis] != 1]

    def _joined(self, x: Array) -> Array:
        _, batch, heads, *rest = x.shape
        x = x.reshape(self.batch, self.heads, batch, heads, *rest)
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(self.batch * batch, self.heads * heads, *rest)
