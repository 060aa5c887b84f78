"""What functions close over, made arguments: a rule must not hide any of it from derivatives."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import core
from jaxtyping import Array

from jaxsoftmax import _jax


class Closed:
    """The tracers that some functions close over, each of them once.

    Attributes:
      arrays: the tracers.
    """

    def __init__(self) -> None:
        self.arrays: list[Any] = []

    def opened(self, fun: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        """`fun`, for arguments like these, as a function `(arrays, *args)` that closes over none.

        `arrays` may be longer: what functions opened later close over comes at its end.
        """
        pure, consts, _ = _jax.hoist(fun, *args)
        places = {i: self._place(x) for i, x in enumerate(consts) if isinstance(x, core.Tracer)}
        constants = [None if i in places else x for i, x in enumerate(consts)]

        def of_arrays(arrays: Sequence[Any], *args: Any) -> Any:
            given = [arrays[places[i]] if i in places else x for i, x in enumerate(constants)]
            return pure(given, *args)

        return of_arrays

    def _place(self, x: Any) -> int:
        for i, known in enumerate(self.arrays):
            if known is x:
                return i
        self.arrays.append(x)
        return len(self.arrays) - 1


def is_smooth(x: Array) -> bool:
    """Whether `x` can have a derivative."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def closed_over(
    fun: Callable, *examples: Sequence[Any]
) -> tuple[list[Callable], list[Any], list[Any]]:
    """`fun` as functions `(smooth, rest, *args)`, and the tracers that it closes over.

    For a rule that gives gradients to what a user's function closes over: `smooth` are those that
    have one, `rest` are integers, keys, and the like.

    Args:
      fun: the function.
      *examples: arguments; there is a function for arguments like each of them.
    """
    closed = Closed()
    opened = [closed.opened(fun, *args) for args in examples]
    kinds = [is_smooth(x) for x in closed.arrays]

    def of_kinds(opened: Callable, smooth: Sequence[Any], rest: Sequence[Any], *args: Any) -> Any:
        given = {True: iter(smooth), False: iter(rest)}
        return opened([next(given[kind]) for kind in kinds], *args)

    smooth, rest = (
        [x for x, kind in zip(closed.arrays, kinds, strict=True) if kind is wanted]
        for wanted in (True, False)
    )
    return [functools.partial(of_kinds, one) for one in opened], smooth, rest
