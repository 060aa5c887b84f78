"""Softmax attention by cuDNN, as `jax.nn` calls it, where it can keep our promises."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._configured import Configured
from jaxsoftmax._scores import check_mask, known_number, with_ndim
from jaxsoftmax.attention import _arguments
from jaxsoftmax.mappings import softmax

# What it reads, as we and `jax.nn` call it.
_TAKEN = "query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths"


def by_cudnn(
    given: Mapping[str, Any],
    normalizer: Any,
    *,
    scale: Any,
    window: tuple[int | None, int | None],
    others: Mapping[str, Any],
) -> Array:
    """Attention, (B, T, N, V), of the arrays by name.

    Args:
      given: the arrays.
      normalizer: makes weights of scores.
      scale: multiplies the products; None: the usual.
      window: how far queries see before and after their own position; None: without limit.
      others: options that it does not know, by name; None or False where they are not used.
    """
    query, key, value, sizes = _arguments.check_inputs(
        *(given.get(name) for name in ("query", "key", "value"))
    )
    _check(given, normalizer, others, query.dtype, sizes)
    if scale is not None and known_number(scale) is None:
        _arguments.refuse("cudnn", "a scale that is an array")
    lengths = {}
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in given:
            lengths[name] = _arguments.check_lengths(name, given[name], sizes)
    if "query_seq_lengths" in lengths:
        query = _arguments.without_padding(query, lengths["query_seq_lengths"], 0)
    if "key_value_seq_lengths" in lengths:
        of_keys = lengths["key_value_seq_lengths"]
        key, value = (_arguments.without_padding(x, of_keys, 0) for x in (key, value))
    masks = {}
    if "mask" in given:
        masks["mask"] = check_mask(given["mask"], sizes.scores, "mask")
    bias = None
    if "bias" in given:
        bias = _arguments.check_bias(given["bias"], sizes).astype(query.dtype)
        masks["bias"] = bias > -jnp.inf
        bias = jnp.maximum(bias, float(jnp.finfo(bias.dtype).min))
    before, after = window
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=masks.get("mask"),
        scale=scale,
        is_causal=after == 0,
        local_window_size=_window(before, after, sizes),
        implementation="cudnn",
        query_seq_lengths=_flat(lengths.get("query_seq_lengths")),
        key_value_seq_lengths=_flat(lengths.get("key_value_seq_lengths")),
    )
    # It gives something to queries that see nothing.
    return jnp.where(_seen(masks, lengths, window, sizes), out, jnp.zeros((), out.dtype))


def _check(
    given: Mapping[str, Any], normalizer: Any, others: Mapping[str, Any], dtype: Any, sizes: Any
) -> None:
    is_plain = isinstance(normalizer, Configured) and normalizer.function is softmax
    if not is_plain or normalizer.options or normalizer.arrays:
        _arguments.refuse("cudnn", f"the normalizer {_arguments.function_name(normalizer)}")
    for name in (*(name for name, x in others.items() if x), *({*given} - {*_TAKEN})):
        _arguments.refuse("cudnn", name)
    if dtype not in (jnp.bfloat16, jnp.float16):
        _arguments.refuse("cudnn", f"the dtype {dtype}")
    if sizes.features != sizes.value_features:
        _arguments.refuse("cudnn", "values of other features than keys")


def _flat(x: Array | None) -> Array | None:
    return None if x is None else jnp.ravel(x)


def _window(before: int | None, after: int | None, sizes: Any) -> tuple[int, int] | None:
    if before is None and after in (None, 0):
        return None
    far = max(sizes.queries, sizes.keys)
    return far if before is None else before, far if after is None else after


def _seen(
    masks: Mapping[str, Array],
    lengths: Mapping[str, Array],
    window: tuple[int | None, int | None],
    sizes: Any,
) -> Array:
    """Which queries see a key, (B, T, N, 1) or less."""
    query = jnp.arange(sizes.queries, dtype=jnp.int32)[None, None, :, None]
    key = jnp.arange(sizes.keys, dtype=jnp.int32)[None, None, None]
    before, after = window
    seen = jnp.ones((1, 1, sizes.queries, sizes.keys), bool)
    if before is not None:
        seen = seen & (key >= query - before)
    if after is not None:
        seen = seen & (key <= query + after)
    if "query_seq_lengths" in lengths:
        seen = seen & (query < lengths["query_seq_lengths"])
    if "key_value_seq_lengths" in lengths:
        seen = seen & (key < lengths["key_value_seq_lengths"])
    for mask in masks.values():
        seen = seen & with_ndim(mask, 4)
    return jnp.swapaxes(jnp.any(seen, -1, keepdims=True), 1, 2)
