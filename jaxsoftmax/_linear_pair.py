"""Linear functions whose transpose is written rather than found."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsoftmax import _jax


def linear_pair(
    fun: Callable,
    transpose: Callable,
    point: Any,
    args: Any,
    reference: Callable | None = None,
) -> Any:
    """`fun(point, args)`, linear in `args`, whose transpose is `transpose(point, cotangents)`.

    For a loop whose transpose is better written than found: JAX would keep for every step what the
    loop carries along. The functions close over no tracers.

    Args:
      fun: a function of a point and arguments.
      transpose: of the point and cotangents; differentiable in the point.
      point: what both depend on.
      args: what `fun` is linear in.
      reference: returns what `fun` does, and is differentiated in the point instead of it.
    """
    points, of_points = jax.tree.flatten(point)
    given, of_args = jax.tree.flatten(args)
    of_given = [jax.typeof(x) for x in given]
    # Traced once, also where what it holds is evaluated, differentiated and mapped.
    pure, consts, out = _jax.hoist(fun, point, args)
    of_out = pure.tree

    there = _OfLeaves(functools.partial(pure, consts), of_points, of_args, of_given)
    smooth = there if reference is None else dataclasses.replace(there, function=reference)
    back = _OfLeaves(transpose, of_points, of_out, out)

    def turned(points: Sequence[Any], cts: Sequence[Any]) -> list[Any]:
        cts = [_jax.zeros(t) if x is None else x for x, t in zip(cts, out, strict=True)]
        return _jax.linear(back, smooth, points, cts, of_given)

    found = _jax.linear(there, turned, points, given, out, reference=smooth)
    return jax.tree.unflatten(of_out, found)


@dataclasses.dataclass(frozen=True, eq=False)
class _OfLeaves:
    """A function of a point and arguments as one of lists, where None is an argument of 0."""

    function: Callable
    point: Any
    args: Any
    types: Sequence[Any]

    def __call__(self, points: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        pairs = zip(args, self.types, strict=True)
        args = [_jax.zeros(t) if x is None else x for x, t in pairs]
        point = jax.tree.unflatten(self.point, points)
        return jax.tree.leaves(self.function(point, jax.tree.unflatten(self.args, args)))
