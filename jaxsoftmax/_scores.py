"""What every mapping does with its arguments before it begins: check, convert, mask, temper.

Errors are raised here, while tracing, with one sentence that names the argument, what came and
what was wanted.
"""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._reductions import Rows

P = ParamSpec("P")
R = TypeVar("R")

Axis = int | tuple[int, ...] | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Positive:
    """A number that was seen to be positive before it was traced."""

    value: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Zero:
    """A number that was seen to be zero before it was traced."""


Temperature = ArrayLike | Positive | Zero


def public(fun: Callable[P, R], static_argnames: tuple[str, ...] = ("axis",)) -> Callable[P, R]:
    """Jits a public function, after a look at what only the caller's Python values can tell."""
    jitted = jax.jit(fun, static_argnames=static_argnames)
    axis_position = list(inspect.signature(fun).parameters).index("axis")

    @functools.wraps(fun)
    def checked(*args: Any, **kwargs: Any) -> Any:
        temperature = kwargs.get("temperature")
        if isinstance(temperature, numbers.Real):
            kwargs["temperature"] = _look_at_temperature(float(temperature))
            if kwargs["temperature"] is None:
                del kwargs["temperature"]
        if isinstance(kwargs.get("axis"), list):
            kwargs["axis"] = tuple(kwargs["axis"])
        elif len(args) > axis_position and isinstance(args[axis_position], list):
            args = (*args[:axis_position], tuple(args[axis_position]), *args[axis_position + 1 :])
        return jitted(*args, **kwargs)

    return cast(Callable[P, R], checked)


def _look_at_temperature(value: float) -> Positive | Zero | None:
    """None stands for 1, which changes nothing."""
    if not value >= 0:
        raise ValueError(f"temperature must not be negative or NaN, got {value}.")
    if value == 0:
        return Zero()
    return None if value == 1 else Positive(value)


def as_scores(x: ArrayLike, name: str = "x") -> Array:
    """The scores in the dtype that they are computed in: float32 for half precision."""
    x = jnp.asarray(x)
    check_real(name, x)
    return x.astype(jnp.promote_types(output_dtype(x), jnp.float32))


def output_dtype(x: ArrayLike) -> Any:
    """The dtype of the answer: that of `x`, or the default float if `x` holds integers."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def rows_of(x: Array, axis: Axis) -> Rows:
    """The rows of `x` along `axis`."""
    return Rows(canonical_axes(axis, x.ndim))


def canonical_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """`axis` as ascending axes from 0 to `ndim - 1`."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if isinstance(a, bool) or not isinstance(a, int | np.integer):
            raise TypeError(f"axis must be an int, a tuple of ints or None, got {axis!r}.")
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for an array of {ndim} dimensions.")
    canonical = tuple(sorted(int(a) % ndim for a in axes))
    if len(set(canonical)) < len(canonical):
        raise ValueError(f"axis must not name an axis twice, got {axis!r}.")
    return canonical


def prepare(
    x: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    temperature: Temperature,
    at_zero: Callable[[Array], Array] = jnp.zeros_like,
    name: str = "x",
) -> tuple[Rows, Array]:
    """The rows and their scores, in which all that takes no part is -inf.

    Args:
      x: the scores as they came.
      axis: the normalized axes.
      where: what takes part.
      temperature: divides the scores.
      at_zero: the scores of a row's maxima at temperature 0, given the maximum. All others: -inf.
      name: what error messages call `x`.
    """
    scores = as_scores(x, name)
    rows = rows_of(scores, axis)
    if where is not None:
        where = check_mask(where, scores.shape)
        # Before the division: what is excluded, be it NaN, must not reach any derivative.
        scores = jnp.where(where, scores, -jnp.inf)
    return rows, _temper(rows, scores, temperature, at_zero)


def check_mask(where: ArrayLike, shape: tuple[int, ...]) -> Array:
    """The mask, if it is one for arrays of `shape`."""
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got dtype {where.dtype}.")
    if not _broadcasts(where.shape, shape):
        raise ValueError(f"where must broadcast to shape {shape}, got shape {where.shape}.")
    return _with_ndim(where, len(shape))


def _temper(
    rows: Rows, scores: Array, temperature: Temperature, at_zero: Callable[[Array], Array]
) -> Array:
    if isinstance(temperature, Zero):
        return _coldest(rows, scores, at_zero)
    if isinstance(temperature, Positive):
        return divide(scores, jnp.asarray(temperature.value, scores.dtype))
    if isinstance(temperature, int | float):  # the default, untouched
        return scores
    divisor = check_per_row("temperature", temperature, scores, rows)
    is_zero = divisor == 0
    warm = divide(scores, jnp.where(is_zero, 1, divisor))
    return jnp.where(is_zero, _coldest(rows, scores, at_zero), warm)


def check_per_row(name: str, value: ArrayLike, scores: Array, rows: Rows) -> Array:
    """A parameter that has one value per row, or fewer, in the dtype of the scores."""
    value = jnp.asarray(value)
    check_real(name, value)
    shape = tuple(1 if i in rows.axes else n for i, n in enumerate(scores.shape))
    if not _broadcasts(value.shape, shape):
        raise ValueError(
            f"{name} must broadcast to one value per row, shape {shape}, got shape {value.shape}."
        )
    return _with_ndim(value, scores.ndim).astype(scores.dtype)


def check_real(name: str, x: Array) -> None:
    """Refuses complex numbers, booleans, keys, ..."""
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got dtype {x.dtype}.")


def _with_ndim(x: Array, ndim: int) -> Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _coldest(rows: Rows, scores: Array, at_zero: Callable[[Array], Array]) -> Array:
    """The scores in the limit of temperature 0: constant, and -inf below the maximum."""
    scores = lax.stop_gradient(scores)
    top = rows.max(scores)
    at_top = jnp.where(top == -jnp.inf, top, at_zero(top))
    cold = jnp.where(scores == rows.spread(top), rows.spread(at_top), -jnp.inf)
    return jnp.where(rows.spread(jnp.isnan(top)), jnp.nan, cold)


@custom_vjp
def divide(scores: Array, divisor: Array) -> Array:
    """`scores / divisor`, whose gradient in the divisor ignores infinite scores."""
    return scores / divisor


def _divide_fwd(scores: Array, divisor: Array) -> tuple[Array, tuple[Array, Array]]:
    quotient = divide(scores, divisor)
    return quotient, (quotient, divisor)


def _divide_bwd(residuals: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    quotient, divisor = residuals
    ct_scores = ct / divisor
    finite = jnp.where(jnp.isfinite(quotient), quotient, 0)
    return ct_scores, -_sum_to(ct_scores * finite, divisor.shape)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums `x` down to `shape`: the transpose of broadcasting."""
    if shape == ():
        return jnp.sum(x)
    return jnp.sum(x, tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


divide.defvjp(_divide_fwd, _divide_bwd)
