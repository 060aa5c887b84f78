"""What was passed: checked, and brought into the layouts that blocks are cut from."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxsoftmax._public import is_int, is_public, shown
from jaxsoftmax._scores import (
    as_counts,
    as_int,
    at_least_int32,
    broadcasts,
    check_integers,
    check_key,
    check_real,
    has_parameter,
    with_ndim,
)
from jaxsoftmax.attention._operands import KEYS, ROWS, SCORES, WHOLE

# How blocks are cut from each array. All are in the layout of the scores, (B, N, T, S), but for
# the features: the last axis of queries, the last but one of keys and values.
LAYOUT = {
    "query": ROWS,
    "key": KEYS,
    "value": KEYS,
    "bias": SCORES,
    "mask": SCORES,
    "query_lengths": WHOLE,
    "key_lengths": WHOLE,
    "query_offset": WHOLE,
    "query_segments": ROWS,
    "key_segments": KEYS,
    "threshold": ROWS,
    "sink": WHOLE,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the axes, by the letters that the documentation gives them."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    features: int
    value_features: int

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """The shape of the scores."""
        return self.batch, self.heads, self.queries, self.keys


def check_inputs(
    *inputs: ArrayLike | None,
) -> tuple[Array, Array, Array, Sizes]:
    """Queries, keys and values with a batch axis, and their sizes."""
    query, key, value = _with_batch(dict(zip(("query", "key", "value"), inputs, strict=True)))
    batch, queries, heads, features = query.shape
    _, keys, key_heads, _ = key.shape
    sizes = Sizes(batch, queries, keys, heads, key_heads, features, value.shape[3])
    if key.shape != (batch, keys, key_heads, features) or features == 0:
        raise ValueError(
            "query and key must have the shapes (B, T, N, H) and (B, S, K, H), H not 0, got "
            f"{query.shape} and {key.shape}."
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have the shape of key {key.shape} except for the last axis, got "
            f"{value.shape}."
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"query must have a multiple of the heads of key, {key_heads}, got {heads} heads."
        )
    return query, key, value, sizes


def _with_batch(arrays: dict[str, ArrayLike | None]) -> list[Array]:
    found: dict[str, Array] = {}
    for name, given in arrays.items():
        if given is None:
            raise TypeError(f"{name} must be an array, got None.")
        found[name] = x = jnp.asarray(given)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a float dtype, got {x.dtype}.")
        if x.dtype != found["query"].dtype:
            raise TypeError(
                f"{name} must have the dtype of query, {found['query'].dtype}, got {x.dtype}."
            )
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must have the axes (batch, length, heads, features) or the last three "
                f"of them, got shape {x.shape}."
            )
    return [with_ndim(x, 4) for x in found.values()]


def check_bias(bias: ArrayLike, sizes: Sizes) -> Array:
    """A bias for the scores."""
    bias = jnp.asarray(bias)
    check_real("bias", bias)
    if not broadcasts(bias.shape, sizes.scores):
        raise ValueError(
            f"bias must broadcast to shape {sizes.scores}, batch, heads, queries and keys, got "
            f"shape {bias.shape}."
        )
    return with_ndim(bias, 4)


def check_lengths(name: str, lengths: ArrayLike, sizes: Sizes) -> Array:
    """The lengths of sequences, (B, 1, 1, 1)."""
    lengths = jnp.asarray(lengths)
    check_integers(name, lengths)
    if lengths.shape != (sizes.batch,):
        raise ValueError(
            f"{name} must have one length per batch, shape {(sizes.batch,)}, got shape "
            f"{lengths.shape}."
        )
    return as_counts(lengths).reshape(-1, 1, 1, 1)


def unpadded(
    given: Mapping[str, ArrayLike],
    arrays: tuple[Array, Array, Array],
    sizes: Sizes,
    first: tuple[ArrayLike, ArrayLike] = (0, 0),
) -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
    """Queries, keys and values with 0 for padding, and what lengths there are, by operand.

    Args:
      given: the arguments.
      arrays: queries, keys and values.
      sizes: their sizes.
      first: the positions of the first query and key.
    """
    (query, key, value), lengths = arrays, {}
    if "query_seq_lengths" in given:
        own = check_lengths("query_seq_lengths", given["query_seq_lengths"], sizes)
        query = without_padding(query, own, first[0])
        lengths["query_lengths"] = own
    if "key_value_seq_lengths" in given:
        own = check_lengths("key_value_seq_lengths", given["key_value_seq_lengths"], sizes)
        key, value = (without_padding(x, own, first[1]) for x in (key, value))
        lengths["key_lengths"] = own
    return (query, key, value), lengths


def check_offset(offset: ArrayLike, sizes: Sizes) -> Array:
    """The positions of the first queries, (B, 1, 1, 1)."""
    offset = jnp.asarray(offset)
    check_integers("query_offset", offset)
    if offset.shape not in ((), (sizes.batch,)):
        raise ValueError(
            f"query_offset must be an integer or one per batch, shape {(sizes.batch,)}, got shape "
            f"{offset.shape}."
        )
    offset = at_least_int32(offset)
    least = max(-_FAR, int(jnp.iinfo(offset.dtype).min))
    offset = jnp.clip(offset, least, _FAR).astype(jnp.int32)
    return jnp.broadcast_to(offset, (sizes.batch,)).reshape(-1, 1, 1, 1)


def known_offset(offset: ArrayLike | None) -> int | None:
    """The position of the first query, if it is one that is known while tracing."""
    known = as_int(offset)
    if known is not None and abs(known) > _FAR:
        raise ValueError(f"query_offset must be from -2**29 to 2**29, got {known}.")
    return known


# Further than any key is; and what an offset, a window and a length add up to is an int32.
_FAR = 2**29


def check_segments(
    query_ids: ArrayLike | None, key_ids: ArrayLike | None, sizes: Sizes
) -> tuple[Array, Array]:
    """The segments of queries and keys, (B, 1, T, 1) and (B, 1, 1, S)."""
    if query_ids is None or key_ids is None:
        missing = "query_segment_ids" if query_ids is None else "key_value_segment_ids"
        raise ValueError(f"query_segment_ids goes with key_value_segment_ids, got no {missing}.")
    query_ids = _segments("query_segment_ids", query_ids, sizes.batch, sizes.queries)
    key_ids = _segments("key_value_segment_ids", key_ids, sizes.batch, sizes.keys)
    if query_ids.dtype != key_ids.dtype:
        raise TypeError(
            f"key_value_segment_ids must have the dtype of query_segment_ids, {query_ids.dtype}, "
            f"got {key_ids.dtype}."
        )
    return query_ids[:, None, :, None], key_ids[:, None, None, :]


def _segments(name: str, ids: ArrayLike, batch: int, length: int) -> Array:
    ids = jnp.asarray(ids)
    check_integers(name, ids)
    if ids.ndim == 0 or not broadcasts(ids.shape, (batch, length)) or ids.shape[-1] != length:
        raise ValueError(
            f"{name} must have shape {(batch, length)}, batch and length, got shape {ids.shape}."
        )
    return with_ndim(ids, 2)


def check_window(
    window: int | tuple[int, int] | None, is_causal: bool
) -> tuple[int | None, int | None]:
    """How far queries see before and after their own position."""
    if window is None:
        return None, 0 if is_causal else None
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(is_int(n) and n >= 0 for n in pair):
        raise ValueError(
            "local_window_size must be one or two ints, before and after, not negative, got "
            f"{shown(window)}."
        )
    before, after = (min(int(n), _FAR) for n in pair)
    return before, 0 if is_causal else after


def check_dropout(rate: float, key: Array | None) -> Array | None:
    """The key for dropout, if there is any."""
    if not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be a number from 0 to less than 1, got {shown(rate)}.")
    if rate == 0:
        return None
    if key is None:
        raise ValueError(f"dropout_key must be given for a dropout_rate of {rate}, got None.")
    key = check_key(key, "dropout_key")
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def check_number(name: str, value: ArrayLike, dtype: Any) -> Array:
    """An array without axes."""
    value = jnp.asarray(value)
    check_real(name, value)
    if value.shape != ():
        raise ValueError(f"{name} must be a number, got an array of shape {value.shape}.")
    return value.astype(dtype)


def check_sink(sink: ArrayLike, normalizer: Callable, heads: int, dtype: Any) -> Array:
    """One virtual score per head, (1, N, 1, 1)."""
    if not takes(normalizer, "sink"):
        raise ValueError(
            f"sink needs a normalizer with an argument sink, got {function_name(normalizer)}."
        )
    sink = jnp.asarray(sink)
    check_real("sink", sink)
    if not broadcasts(sink.shape, (heads,)):
        raise ValueError(f"sink must have one value per head, {heads}, got shape {sink.shape}.")
    return jnp.broadcast_to(sink.astype(dtype).reshape(-1), (heads,)).reshape(1, heads, 1, 1)


def takes(function: Callable, name: str) -> bool:
    """Whether a function takes an argument of this name."""
    try:
        signature = inspect.signature(getattr(function, "function", function))
    except (TypeError, ValueError):  # a callable that cannot tell
        return True
    return has_parameter(signature, name)


def check_draws_nothing(normalizer: Callable[..., Any]) -> None:
    """Refuses a key: blocks would share what is drawn, and gradients be of what is drawn anew."""
    partial = functools.partial(normalizer)
    arrays = [x for x in (*partial.args, *partial.keywords.values()) if isinstance(x, jax.Array)]
    has_key = any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays)
    if has_key or (is_public(partial.func) and "key" in inspect.signature(partial.func).parameters):
        raise ValueError(
            "normalizer must make the same weights in every block, got "
            f"{function_name(partial.func)} with a key: for noise in the scores, give it as a bias."
        )


def function_name(function: Callable) -> str:
    """What error messages call a function."""
    for inner in ("func", "function"):  # of a partial, or of one of ours with its options
        function = getattr(function, inner, function)
    return getattr(function, "__name__", repr(function))


def check_callables(**functions: Any) -> None:
    """Refuses what cannot be called."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}.")


def without_padding(x: Array, lengths: Array, first: ArrayLike) -> Array:
    """(B, L, ...) with 0 from each sequence's length on, whatever was there.

    Args:
      x: what may be padding.
      lengths: the lengths of the sequences, (B, 1, 1, 1).
      first: the position of the first entry.
    """
    positions = jnp.arange(x.shape[1], dtype=jnp.int32) + first
    inside = positions[None, :, None, None] < lengths
    return jnp.where(inside, x, jnp.zeros((), x.dtype))
