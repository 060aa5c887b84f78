"""Functions whose calls may be compiled once and for all, since they hold no state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import numpy as np
from jaxtyping import Array

from jaxsoftmax._public import Kind, is_public, kinds_of, public
from jaxsoftmax.losses import cross_entropy

P = ParamSpec("P")
R = TypeVar("R")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("function", "options"),
)
@dataclasses.dataclass(frozen=True)
class Configured:
    """A partial of one of our functions as a pytree, whose leaves are the arrays in it."""

    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...]
    arrays: dict[str, Array]

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Calls the function."""
        return self.function(*args, **dict(self.options), **self.arrays, **kwargs)

    def with_arrays(self, arrays: dict[str, Array]) -> "Configured":
        """The same function with other arrays of the same names."""
        return dataclasses.replace(self, arrays=arrays)

    def of(self, function: Callable[..., Array]) -> "Configured":
        """Another function with the same options."""
        return dataclasses.replace(self, function=function)


def arrays_in(function: Any) -> dict[str, Array]:
    """The arrays that one of our functions holds, by name; none of any other function."""
    return function.arrays if isinstance(function, Configured) else {}


def configured(function: Callable[..., Any]) -> Configured | None:
    """The function as a pytree, if it is one of ours or a partial of one; None otherwise.

    Of other functions nothing is known: what they close over may be another thing at each call.
    """
    partial = functools.partial(function)
    if not is_public(partial.func) or partial.args:
        return None
    keywords = {
        # Traced, lest each be compiled for, but for those with a form of their own.
        name: np.asarray(x) if _is_traced(partial.func, name, x) else x
        for name, x in partial.keywords.items()
    }
    arrays: dict[str, Any] = {name: x for name, x in keywords.items() if _is_array(x)}
    options = tuple(item for item in keywords.items() if item[0] not in arrays)
    try:
        hash(options)
    except TypeError:
        return None
    return Configured(partial.func, options, arrays)


def _is_traced(function: Callable[..., Any], name: str, x: Any) -> bool:
    kind = kinds_of(function).get(name)
    return kind is not None and kind.is_traced(x)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def public_with_loss(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Does what `public` does for a function that takes a loss, by keyword."""

    def decorated(fun: Callable[P, R]) -> Callable[P, R]:
        of_ours = public(fun, **kinds)

        @functools.wraps(fun)
        def checked(*args: Any, loss: Any = cross_entropy, **kwargs: Any) -> Any:
            if not callable(loss):
                raise TypeError(f"loss must be a function, got {type(loss).__name__}.")
            ours = configured(loss)
            if ours is not None:
                return of_ours(*args, loss=ours, **kwargs)  # pyright: ignore[reportCallIssue]
            # Compiled for this call alone: what the loss uses may be something else at the next.
            return public(functools.partial(fun, loss=loss), **kinds)(*args, **kwargs)

        return cast(Callable[P, R], checked)

    return decorated
