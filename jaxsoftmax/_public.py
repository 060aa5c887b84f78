"""What a public function does before it is traced.

Only the caller's Python values can tell some things: that a temperature is exactly 0, or that an
axis is no integer. Each function declares what its options are, as `public(k=INTEGER)`.
"""

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import jax
import numpy as np
from jax import core
from jaxtyping import ArrayLike

P = ParamSpec("P")
R = TypeVar("R")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Positive:
    """A number that was seen to be positive before it was traced."""

    value: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A number that is known while tracing."""

    value: float


class Kind(NamedTuple):
    """A kind of options.

    Attributes:
      look: `(name, value) -> value` as the function is to get it; may refuse it.
      is_static: whether it is known while tracing, and compiled for.
      is_parameter: whether numbers of this kind have derivatives.
      is_traced: whether a number, in a partial, becomes an array, lest each be compiled for.
    """

    look: Callable[[str, Any], Any]
    is_static: bool = False
    is_parameter: bool = False
    is_traced: Callable[[Any], bool] = lambda value: False


def _static(name: str, value: Any, kinds: str = "known while tracing") -> Any:
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"{name} must be {kinds}, got {_kind_of(value)}.") from None
    return value


def _kind_of(value: Any) -> str:
    """What came, in words."""
    if isinstance(value, core.Tracer):
        return "an array that is traced (with jax.jit, name it in static_argnames)"
    for item in value if isinstance(value, tuple) else ():
        if not isinstance(item, Hashable):
            return f"a tuple with {_kind_of(item)}"
    return type(value).__name__


def shown(value: Any) -> str:
    """A value that was refused, in words if it is traced."""
    values = value if isinstance(value, tuple | list) else (value,)
    traced = [x for x in values if isinstance(x, core.Tracer)]
    return _kind_of(traced[0]) if traced else repr(value)


def _sequence(name: str, value: Any, kinds: str = "known while tracing") -> Any:
    return _static(name, tuple(value) if isinstance(value, list) else value, kinds)


def _axis(name: str, value: Any) -> Any:
    return _sequence(name, value, "an int, a mesh axis name, a tuple of these or None")


def _integer(name: str, value: Any) -> int:
    if not is_int(value):
        raise TypeError(f"{name} must be an integer, got {_kind_of(value)}.")
    return int(value)


def _integer_or_none(name: str, value: Any) -> int | None:
    return None if value is None else _integer(name, value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_kind_of(value)}.")
    return bool(value)


def _number(_: str, value: Any) -> Any:
    return Fixed(float(value)) if isinstance(value, numbers.Real) else value


def _temperature(name: str, value: Any) -> Any:
    if not isinstance(value, numbers.Real):
        return value
    value = float(value)
    if not value >= 0:
        raise ValueError(f"{name} must not be negative or NaN, got {value}.")
    # 0 and 1 are known while tracing; other numbers are traced, lest each be compiled for.
    if value < COLD:
        return Fixed(0.0)
    return Fixed(value) if value == 1 else Positive(value)


# Below this a temperature is taken as 0: quotients would overflow, and differ no more.
COLD = 1e-30


def _alpha(_: str, value: Any) -> Any:
    if not isinstance(value, numbers.Real):
        return value
    value = float(value)
    # Some have a form of their own; most others are refused while tracing.
    return value if 1 < value < math.inf and value not in (1.5, 2) else Fixed(value)


STATIC = Kind(_static, is_static=True)
AXIS = Kind(_axis, is_static=True)
SHAPE = Kind(_sequence, is_static=True)
INTEGER = Kind(_integer, is_static=True)
INTEGER_OR_NONE = Kind(_integer_or_none, is_static=True)
FLAG = Kind(_flag, is_static=True)
NUMBER = Kind(_number)
TEMPERATURE = Kind(_temperature)
ALPHA = Kind(_alpha, is_parameter=True, is_traced=lambda x: isinstance(_alpha("", x), float))
# How much there is to spend it on is known only of a whole row, of which attention sees parts.
BUDGET = Kind(
    _number, is_parameter=True, is_traced=lambda x: isinstance(x, numbers.Real) and float(x) >= 0
)
PARAMETER = Kind(
    lambda _, value: value, is_parameter=True, is_traced=lambda x: isinstance(x, float)
)

# What all functions that have these call them.
_EVERYWHERE = {
    "axis": AXIS,
    "temperature": TEMPERATURE,
    "num_segments": STATIC,
    "implementation": STATIC,
}


@overload
def public(fun: Callable[P, R], /, **kinds: Kind) -> Callable[P, R]: ...
@overload
def public(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def public(fun: Callable[..., Any] | None = None, /, **kinds: Kind) -> Any:
    """Jits a public function, after a look at what only the caller's Python values can tell.

    Args:
      fun: the function; None: a decorator is returned.
      **kinds: what its options are, by name. All others are arrays.
    """
    if fun is None:
        return functools.partial(public, **kinds)
    name, parameters = getattr(fun, "__name__", "the function"), inspect.signature(fun).parameters
    kinds |= {option: kind for option, kind in _EVERYWHERE.items() if option in parameters}
    positions = {option: i for i, option in enumerate(parameters)}
    static = [option for option, kind in kinds.items() if kind.is_static]
    required = [option for option, p in parameters.items() if p.default is not None]
    jitted = jax.jit(fun, static_argnames=static)

    @functools.wraps(fun)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for option, kind in kinds.items():
            if option in kwargs:
                kwargs[option] = kind.look(option, kwargs[option])
            elif positions[option] < len(args):
                i = positions[option]
                args = (*args[:i], kind.look(option, args[i]), *args[i + 1 :])
        if kwargs.get("segment_ids") is not None and kwargs.get("num_segments") is None:
            kwargs["num_segments"] = _count_segments(kwargs["segment_ids"])
        args = tuple(map(within_range, args))
        kwargs = {option: within_range(value) for option, value in kwargs.items()}
        try:
            return jitted(*args, **kwargs)
        except (TypeError, ValueError):
            if unknown := [option for option in kwargs if option not in positions]:
                raise TypeError(
                    f"{name} takes the arguments {', '.join(positions)}, got {unknown[0]}."
                ) from None
            given = {**dict(zip(positions, args, strict=False)), **kwargs}
            refuse_what_is_no_array(given, required, static)
            raise

    vars(checked).update(public=checked, kinds=kinds)
    return checked


def within_range(x: Any) -> Any:
    """What came, no integer of which JAX makes another one: without x64 it drops their upper bits.

    What is out of range stays out of range.
    """
    if not isinstance(x, np.ndarray | np.generic) or x.dtype.kind not in "iu":
        return x
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if dtype == x.dtype:
        return x
    known = np.iinfo(str(dtype))
    return np.clip(x, int(known.min), int(known.max)).astype(dtype)


def is_public(fun: Callable[..., Any]) -> bool:
    """Whether `public` made the function, and so it holds no state."""
    # Whoever wraps it has what it has, by `functools.wraps`, but is another function.
    return getattr(fun, "public", None) is fun


def kinds_of(fun: Callable[..., Any]) -> Mapping[str, Kind]:
    """What the options of a public function are."""
    return getattr(fun, "kinds", {}) if is_public(fun) else {}


def looked_at(fun: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the body of a public function gets them."""
    kinds = kinds_of(fun)
    return {
        name: kinds[name].look(name, value) if name in kinds else value
        for name, value in arguments.items()
    }


def refuse_what_is_no_array(
    arguments: Mapping[str, Any], required: Sequence[str] = (), static: Sequence[str] = ()
) -> None:
    """Strings and the like get no further than jit, which says so in its own words."""
    for name, value in arguments.items():
        is_missing = value is None and name in required
        if name not in static and (is_missing or not all(map(is_array, jax.tree.leaves(value)))):
            if isinstance(value, np.ndarray):
                raise TypeError(f"{name} must be numbers, got dtype {value.dtype}.") from None
            raise TypeError(f"{name} must be an array, got {type(value).__name__}.") from None


def known_number(value: Any) -> float | None:
    """The number that a parameter is, if it is known while tracing."""
    if isinstance(value, Fixed):
        return value.value
    return float(value) if isinstance(value, numbers.Real) else None


def is_int(n: Any) -> bool:
    """Whether `n` is a whole number that is known while tracing."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def is_array(x: Any) -> bool:
    """Whether `x` is what `jax.jit` takes for an array."""
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind not in "OSUmM"  # objects, strings, times
    return hasattr(x, "dtype") or isinstance(x, complex | float | int)


def _count_segments(segment_ids: ArrayLike) -> int:
    if isinstance(segment_ids, core.Tracer):
        raise ValueError("num_segments must be given if segment_ids is traced, got None.")
    ids = np.asarray(segment_ids)
    if ids.dtype.kind not in "iu":
        return 1  # which is refused later
    largest = int(ids.max()) if ids.size else -1
    return max(largest + 1, min(ids.size, 1))  # one, if all are out of range
