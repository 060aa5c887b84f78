"""What every mapping does with its arguments before it begins: check, convert, mask, temper.

Errors are raised here, while tracing, with one sentence that names the argument, what came and
what was wanted.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._implementations import check_implementation
from jaxsoftmax._public import COLD, Fixed, Positive, is_array, is_int, known_number
from jaxsoftmax._reductions import Entries, Rows, sum_to, vary_like
from jaxsoftmax._sharding import share_like

Axis = int | str | tuple[int | str, ...] | None


Temperature = ArrayLike | Positive | Fixed


def as_array(x: Any, name: str) -> Array:
    """An array; refuses lists, strings, ..."""
    if not is_array(x):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    return jnp.asarray(x)


def as_scores(x: ArrayLike, name: str = "x") -> Array:
    """The scores in the dtype that they are computed in: float32 for half precision."""
    x = as_array(x, name)
    check_real(name, x)
    return x.astype(wide(output_dtype(x)))


def wide(dtype: Any) -> Any:
    """What is computed in: float32 for half precision."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wide_zeros(x: Array) -> Array:
    """Where cotangents of `x` are summed, block by block."""
    return vary_like(jnp.zeros(x.shape, wide(x.dtype)), x)


def output_dtype(x: ArrayLike) -> Any:
    """The dtype of the answer: that of `x`, or the default float if `x` holds integers."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def split_axis(axis: Axis, ndim: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`axis` as ascending array axes from 0 to `ndim - 1`, and mesh axis names."""
    if axis is None:
        return tuple(range(ndim)), ()
    members = axis if isinstance(axis, tuple) else (axis,)
    names = tuple(a for a in members if isinstance(a, str))
    positions = [a for a in members if not isinstance(a, str)]
    for a in positions:
        if not is_int(a):
            kinds = "an int, a mesh axis name, a tuple of these or None"
            raise TypeError(f"axis must be {kinds}, got {axis!r}.")
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for an array of {ndim} dimensions.")
    axes = tuple(sorted(int(a) % ndim for a in positions))
    if len(set(axes)) + len(set(names)) < len(members):
        raise ValueError(f"axis must not name an axis twice, got {axis!r}.")
    return axes, names


def in_given_order(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The array axes of `axis`, as they were given."""
    if axis is None:
        return tuple(range(ndim))
    members = axis if isinstance(axis, tuple) else (axis,)
    return tuple(int(a) % ndim for a in members if not isinstance(a, str))


def mesh_names(argument: str, names: Any) -> tuple[str, ...]:
    """The mesh axes that an argument names, if there are such around."""
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    for name in names:
        if not isinstance(name, str):
            kinds = "the name of a mesh axis, a tuple of such or None"
            raise TypeError(f"{argument} must be {kinds}, got {name!r}.")
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"{argument} must name mesh axes of a shard_map around the call, got {name!r}."
            ) from None
    return names


def one_axis(axis: Axis, ndim: int) -> int:
    """`axis`, where it has to be one array axis."""
    axes, names = split_axis(axis, ndim)
    if len(axes) != 1 or names:
        raise ValueError(f"axis must be one array axis, got {axis!r}.")
    return axes[0]


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be said about rows beside their axis; see the public functions."""

    where: ArrayLike | None = None
    temperature: Temperature = 1.0
    sink: ArrayLike | None = None
    segment_ids: ArrayLike | None = None
    num_segments: int | None = None
    implementation: str | None = None


def prepare(
    x: ArrayLike,
    axis: Axis,
    options: Options,
    at_zero: Callable[[Array], Array] = jnp.zeros_like,
    name: str = "x",
) -> tuple[Rows, Entries]:
    """The rows and their scores, in which all that takes no part is -inf.

    Args:
      x: the scores as they came.
      axis: the normalized axes.
      options: masks, temperature, sink and segments.
      at_zero: the scores of a row's maxima at temperature 0, given the maximum. All others: -inf.
      name: what error messages call `x`.
    """
    scores = as_scores(x, name)
    rows = _rows(scores, axis, options)
    if options.where is not None:
        # Before the division: what is excluded, be it NaN, must not reach any derivative.
        scores = jnp.where(check_mask(options.where, scores.shape), scores, -jnp.inf)
    if rows.segment_ids is not None:
        known = (rows.segment_ids >= 0) & (rows.segment_ids < rows.num_segments)
        shape = [-1 if i in rows.axes else 1 for i in range(scores.ndim)]
        scores = jnp.where(known.reshape(shape), scores, -jnp.inf)
    # A sink is not divided by the temperature: beside it, the maxima grow beyond bounds.
    at_zero = at_zero if options.sink is None else divided_by_zero
    scores = temper(rows, scores, options.temperature, at_zero)
    if options.sink is None:
        return rows, (scores,)
    sink = check_per_row("sink", options.sink, scores, rows)
    return rows, (scores, share_like(jnp.broadcast_to(sink, rows.shape(scores)), scores))


def as_stored(rows: Rows, x: ArrayLike, options: Options) -> Rows:
    """The rows, told the dtype in memory if `prepare` only converted it from half precision."""
    dtype = output_dtype(x)
    is_half = dtype in (jnp.float16, jnp.bfloat16)  # of fewer bits, some have no -inf
    is_plain = known_number(options.temperature) == 1 and options.sink is None
    return dataclasses.replace(rows, stored=dtype) if is_half and is_plain else rows


def _rows(scores: Array, axis: Axis, options: Options) -> Rows:
    axes, names = split_axis(axis, scores.ndim)
    mesh_names("axis", names)
    implementation = check_implementation(options.implementation)
    if options.segment_ids is None:
        if options.num_segments is not None:
            raise ValueError("num_segments goes with segment_ids, got no segment_ids.")
        return Rows(axes, names, implementation=implementation)
    if len(axes) != 1 or names:
        raise ValueError(f"axis must be one array axis if segment_ids are given, got {axis!r}.")
    ids = jnp.asarray(options.segment_ids)
    check_integers("segment_ids", ids)
    if ids.shape != (scores.shape[axes[0]],):
        raise ValueError(
            f"segment_ids must have shape {(scores.shape[axes[0]],)}, the length of the axis, got "
            f"shape {ids.shape}."
        )
    ids = at_least_int32(ids)
    if options.num_segments is None:
        raise ValueError("num_segments must be given if segment_ids is traced, got None.")
    if ids.size > 0 or options.num_segments != 0:
        check_size("num_segments", options.num_segments)
    return Rows(axes, (), ids, options.num_segments, implementation)


def check_mask(where: ArrayLike, shape: tuple[int, ...], name: str = "where") -> Array:
    """The mask, if it is one for arrays of `shape`."""
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean, got dtype {where.dtype}.")
    if not broadcasts(where.shape, shape):
        raise ValueError(f"{name} must broadcast to shape {shape}, got shape {where.shape}.")
    return with_ndim(where, len(shape))


def as_returned(found: Array, x: ArrayLike, where: ArrayLike | None) -> Array:
    """A result in the dtype of the scores.

    What `where` excludes passes no cotangent on: that of a sum that leaves it out may be NaN.
    """
    if where is not None:
        found = jnp.where(check_mask(where, found.shape), found, 0)
    return found.astype(output_dtype(x))


def temper(
    rows: Rows,
    scores: Array,
    temperature: Temperature,
    at_zero: Callable[[Array], Array] = jnp.zeros_like,
) -> Array:
    """The scores divided by the temperature; see `prepare` for what 0 does."""
    cold = is_cold(rows, scores, temperature)
    if cold is True:
        return _coldest(rows, scores, at_zero)
    if isinstance(temperature, Positive):
        return _divide(scores, jnp.full((1,) * scores.ndim, temperature.value, scores.dtype))
    if cold is False:
        return scores
    divisor = check_per_row("temperature", temperature, scores, rows)
    divisor = jnp.where(cold, 1, nan_unless(~(divisor < 0), divisor))
    ((divisor, cold),) = rows.map(lambda _, *values: values, [(scores,)], [divisor, cold])
    return jnp.where(cold, _coldest(rows, scores, at_zero), _divide(scores, divisor))


def is_cold(rows: Rows, scores: Array, temperature: Temperature) -> bool | Array:
    """Whether the temperature is 0; row values if that is not known while tracing."""
    known = known_number(temperature)
    if known is not None:
        return known == 0
    if isinstance(temperature, Positive):
        return False
    return jnp.abs(check_per_row("temperature", temperature, scores, rows)) < COLD


def check_size(name: str, size: Any) -> int | None:
    """A number of rows, if it is given."""
    if size is not None and not (is_int(size) and size > 0):
        raise ValueError(f"{name} must be a positive integer or None, got {size!r}.")
    return as_int(size)


def as_int(n: Any) -> int | None:
    """A whole number that is known while tracing; None for all else."""
    return int(n) if is_int(n) else None


def has_parameter(signature: inspect.Signature, name: str) -> bool:
    """Whether a function can be given an argument of this name."""
    parameters = signature.parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_per_row(name: str, value: ArrayLike | Fixed, scores: Array, rows: Rows) -> Array:
    """A parameter that has one value per row, or fewer, in the dtype of the scores."""
    value = jnp.asarray(value.value if isinstance(value, Fixed) else value)
    check_real(name, value)
    shape = rows.shape(scores)
    if not broadcasts(value.shape, shape):
        raise ValueError(
            f"{name} must broadcast to one value per row, shape {shape}, got shape {value.shape}."
        )
    value = with_ndim(value, scores.ndim).astype(scores.dtype)
    return share_like(vary_like(value, scores, but=rows.names), scores)


def check_real(name: str, x: Array) -> None:
    """Refuses complex numbers, booleans, keys, ..."""
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got dtype {x.dtype}.")


def check_integers(name: str, x: Array) -> None:
    """Refuses what does not count."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got dtype {x.dtype}.")


def at_least_int32(x: Array) -> Array:
    """Integers that can be compared with any size: those of fewer bits would wrap around."""
    few = jnp.iinfo(x.dtype).bits < 32
    # Without x64, there may still be arrays that were made with it.
    return x.astype(jnp.int32 if few else jax.dtypes.canonicalize_dtype(x.dtype))


def as_counts(x: Array) -> Array:
    """Integers as int32, those below 0 as 0: no array is longer than an int32 can say."""
    return jnp.clip(at_least_int32(x), 0, 2**31 - 1).astype(jnp.int32)


def check_soft_cap(cap: Any) -> float | None:
    """The soft cap, if it is known while tracing."""
    known = known_number(cap)
    if known is not None and not known > 0:
        raise ValueError(f"logits_soft_cap must be positive, got {known}.")
    if cap is not None and known is None and (shape := jnp.shape(cap)):
        raise ValueError(f"logits_soft_cap must be a number, got an array of shape {shape}.")
    return known


def soft_cap(scores: Array, cap: ArrayLike) -> Array:
    """The scores, bounded smoothly; as they are where the bound is infinite.

    One of -inf excludes, and is not to be capped. Nor is NaN, that it may be masked: then not even
    its derivative counts.
    """
    cap = jnp.asarray(cap).astype(scores.dtype)
    cap = nan_unless(cap > 0, cap)
    finite = jnp.where(cap == jnp.inf, 1, cap)
    is_number = scores > -jnp.inf
    capped = finite * jnp.tanh(jnp.where(is_number, scores, 0) / finite)
    return jnp.where((cap == jnp.inf) | ~is_number, scores, capped)


def check_key(key: Any, name: str = "key") -> Array:
    """The key, if it is a single one of `jax.random`."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    # Keys of the old style are bare words.
    words = isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32
    if not typed and not words:
        got = f"dtype {key.dtype}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"{name} must be a key of jax.random.key, got {got}.")
    if key.ndim != (0 if typed else 1):
        raise ValueError(f"{name} must be a single key, got keys of shape {key.shape}.")
    return cast(Array, key)


def with_ndim(x: Array, ndim: int) -> Array:
    """`x` with axes of size 1 before its own."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether arrays of `shape` broadcast to the shape `to`."""
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def divided_by_zero(top: Array) -> Array:
    """The limit of `top / t` as `t` falls to 0."""
    return jnp.where(top == 0, 0, jnp.where(top == 0, 1, top) * jnp.inf)


def _coldest(rows: Rows, scores: Array, at_zero: Callable[[Array], Array]) -> Array:
    """The scores in the limit of temperature 0: constant, and -inf below the maximum."""

    def cold(score: Array, top: Array, at_top: Array) -> Array:
        return jnp.where(jnp.isnan(score), score, jnp.where(score == top, at_top, -jnp.inf))

    entries = (lax.stop_gradient(scores),)
    top = rows.max(entries)
    at_top = jnp.where(top == -jnp.inf, top, at_zero(top))
    return rows.map(cold, [entries], [top, at_top])[0]


def _divide(scores: Array, divisor: Array) -> Array:
    """`scores / divisor`, whose gradient in the divisor ignores infinite scores."""
    # An infinite divisor would make NaN of -inf, and so would one whose reciprocal underflows.
    divisor = jnp.minimum(divisor, jnp.finfo(divisor.dtype).max / 8)
    return _quotient(scores, vary_like(divisor, scores))


@custom_vjp
def _quotient(scores: Array, divisor: Array) -> Array:
    return scores / divisor


def _quotient_fwd(scores: Array, divisor: Array) -> tuple[Array, tuple[Array, Array]]:
    quotient = _quotient(scores, divisor)
    return quotient, (quotient, divisor)


def _quotient_bwd(residuals: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    quotient, divisor = residuals
    ct_scores = ct / divisor
    finite = jnp.where(jnp.isfinite(quotient), quotient, 0)
    return ct_scores, -sum_to(ct_scores * finite, divisor.shape)


_quotient.defvjp(_quotient_fwd, _quotient_bwd)
