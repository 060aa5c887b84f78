"""Softmax attention by cuDNN, as `jax.nn` calls it, where it can keep our promises."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._configured import Configured
from jaxsoftmax._implementations import refuse
from jaxsoftmax._scores import check_mask, known_number
from jaxsoftmax.attention import _arguments
from jaxsoftmax.attention._prepared import Rules, visible
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
        refuse("cudnn", "a scale that is an array")
    (query, key, value), lengths = _arguments.unpadded(given, (query, key, value), sizes)
    mask, bias = given.get("mask"), given.get("bias")
    seen = dict(lengths)
    if mask is not None:
        seen["mask"] = mask = check_mask(mask, sizes.scores, "mask")
    if bias is not None:
        bias = _arguments.check_bias(bias, sizes).astype(query.dtype)
        seen["mask"] = (bias > -jnp.inf) & seen.get("mask", True)
        bias = jnp.maximum(bias, float(jnp.finfo(bias.dtype).min))
    before, after = window
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=after == 0,
        local_window_size=_window(before, after, sizes),
        implementation="cudnn",
        query_seq_lengths=_flat(lengths.get("query_lengths")),
        key_value_seq_lengths=_flat(lengths.get("key_lengths")),
    )
    # It gives something to queries that see nothing.
    rules = Rules(normalizer, None, before=before, after=after)
    places = [jnp.arange(n, dtype=jnp.int32) for n in sizes.scores]
    sees = jnp.any(visible(rules, seen, places), -1, keepdims=True)
    return jnp.where(jnp.swapaxes(sees, 1, 2), out, jnp.zeros((), out.dtype))


def _check(
    given: Mapping[str, Any], normalizer: Any, others: Mapping[str, Any], dtype: Any, sizes: Any
) -> None:
    is_plain = isinstance(normalizer, Configured) and normalizer.function is softmax
    if not is_plain or normalizer.options or normalizer.arrays:
        refuse("cudnn", f"the normalizer {_arguments.function_name(normalizer)}")
    for name in (*(name for name, x in others.items() if x), *({*given} - {*_TAKEN})):
        refuse("cudnn", name)
    if dtype not in (jnp.bfloat16, jnp.float16):
        refuse("cudnn", f"the dtype {dtype}")
    if sizes.features != sizes.value_features:
        refuse("cudnn", "values of other features than keys")


def _flat(x: Array | None) -> Array | None:
    return None if x is None else jnp.ravel(x)


def _window(before: int | None, after: int | None, sizes: Any) -> tuple[int, int] | None:
    if before is None and after in (None, 0):
        return None
    far = max(sizes.queries, sizes.keys)
    return far if before is None else before, far if after is None else after
