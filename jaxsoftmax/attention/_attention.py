"""Attention with any normalizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoftmax._reductions import vary_like
from jaxsoftmax.attention import _arguments, _pure
from jaxsoftmax.attention._arguments import LAYOUT, Sizes
from jaxsoftmax.attention._block import Block, Rules, attend, score_dtype
from jaxsoftmax.attention._blocks import attend_in_blocks
from jaxsoftmax.attention._plan import Band, Reach, bands, block_rows
from jaxsoftmax.attention._pure import Configured
from jaxsoftmax.mappings import logsumexp, softmax

Normalizer = Callable[..., Array]
ScoreMod = Callable[[Array, Array, Array, Array, Array], Array]
MaskMod = Callable[[Array, Array, Array, Array], Array]


def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Float[ArrayLike, "*#B #N #T #S"] | None = None,
    mask: Bool[ArrayLike, "*#B #N #T #S"] | None = None,
    *,
    normalizer: Normalizer = softmax,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, " B"] | None = None,
    key_value_seq_lengths: Int[ArrayLike, " B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: Int[ArrayLike, "*B T"] | None = None,
    key_value_segment_ids: Int[ArrayLike, "*B S"] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sink: Float[ArrayLike, "#N"] | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    kv_axis_name: str | None = None,
    block_size: int | None = None,
    return_residual: bool = False,
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    r"""DOC."""
    for name, function in {
        "normalizer": normalizer,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
    }.items():
        _arguments.check_callable(name, function)
    before, after = _arguments.check_window(local_window_size)
    static = _Static(
        score_mod=score_mod,
        mask_mod=mask_mod,
        before=before,
        after=0 if is_causal else after,
        scale=_arguments.known_number(scale),
        soft_cap=_arguments.known_number(logits_soft_cap),
        dropout_rate=dropout_rate,
        kv_axis_name=kv_axis_name,
        block_size=_arguments.check_block_size(block_size),
        return_residual=bool(return_residual),
    )
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "query_segment_ids": query_segment_ids,
        "key_value_segment_ids": key_value_segment_ids,
        "sink": sink,
        "dropout_key": _arguments.check_dropout(dropout_rate, dropout_key),
        "scale": None if static.scale is not None else scale,
        "soft_cap": None if static.soft_cap is not None else logits_soft_cap,
    }
    ours = _pure.configured(normalizer)
    if ours is not None and score_mod is None and mask_mod is None:
        return _compiled(static, ours, arrays)
    # Compiled for this call alone: what the functions close over may be other arrays at the next.
    return jax.jit(functools.partial(_attention, static, ours or normalizer))(arrays)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known while tracing."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    before: int | None
    after: int | None
    scale: float | None
    soft_cap: float | None
    dropout_rate: float
    kv_axis_name: str | None
    block_size: int | None
    return_residual: bool


def _attention(
    static: _Static, normalizer: Normalizer, arrays: dict[str, Any]
) -> Array | tuple[Array, Array]:
    given = {name: x for name, x in arrays.items() if x is not None}
    operands, sizes = _operands(static, given)
    dtype = score_dtype(operands["query"].dtype)
    rules = _rules(static, normalizer, given, sizes, dtype)
    if operands["query"].dtype == dtype:
        # Queries are fewer than scores. In half precision they would be rounded.
        operands["query"] = operands["query"] * rules.scale
        rules = dataclasses.replace(rules, scale=None)
    if 0 in (*sizes.scores, sizes.value_features):
        outs = _nothing(sizes, rules, dtype)
    else:
        outs = _in_blocks(static.block_size, rules, operands, sizes)
    if static.kv_axis_name is not None:
        outs = (lax.psum(outs[0], static.kv_axis_name), *outs[1:])
    shape = jnp.shape(given["query"])[:-1]
    # (B, N, T, ...) to the layout of the query, which may lack a batch.
    out = jnp.moveaxis(outs[0], 1, 2).reshape(*shape, -1).astype(operands["query"].dtype)
    if rules.log_sum is None:
        return out
    return out, jnp.moveaxis(outs[1], 1, 2).reshape(shape)


# The normalizer is a pytree here, of which only the arrays are traced.
_compiled = jax.jit(_attention, static_argnums=0)


def _operands(static: _Static, given: dict[str, Any]) -> tuple[dict[str, Array], Sizes]:
    """What blocks are cut from, in the layouts of `LAYOUT`."""
    query, key, value, sizes = _arguments.check_inputs(given["query"], given["key"], given["value"])
    operands: dict[str, Array] = {}
    if "query_seq_lengths" in given:
        lengths = _arguments.check_lengths("query_seq_lengths", given["query_seq_lengths"], sizes)
        query = _arguments.without_padding(query, lengths)
        operands["query_lengths"] = lengths
    if "key_value_seq_lengths" in given:
        lengths = _arguments.check_lengths(
            "key_value_seq_lengths", given["key_value_seq_lengths"], sizes
        )
        key = _arguments.without_padding(key, lengths, static.kv_axis_name)
        value = _arguments.without_padding(value, lengths, static.kv_axis_name)
        operands["key_lengths"] = lengths
    if "query_segment_ids" in given or "key_value_segment_ids" in given:
        operands["query_segments"], operands["key_segments"] = _arguments.check_segments(
            given.get("query_segment_ids"), given.get("key_value_segment_ids"), sizes
        )
    if "bias" in given:
        operands["bias"] = _arguments.check_bias(given["bias"], sizes)
    if "mask" in given:
        operands["mask"] = _arguments.check_attention_mask(given["mask"], sizes)
    operands["query"] = jnp.transpose(query, (0, 2, 1, 3))
    operands["key"] = jnp.transpose(key, (0, 2, 3, 1))
    operands["value"] = jnp.transpose(value, (0, 2, 3, 1))
    # Outside of the reverse rule, so that JAX sums their cotangents over devices.
    return {name: vary_like(x, key) for name, x in operands.items()}, sizes


def _rules(
    static: _Static, normalizer: Normalizer, given: dict[str, Any], sizes: Sizes, dtype: Any
) -> Rules:
    scale = static.scale
    if scale is None:
        scale = sizes.features**-0.5
        if "scale" in given:
            scale = _arguments.check_number("scale", given["scale"], dtype)
    soft_cap = static.soft_cap
    if "soft_cap" in given:
        soft_cap = _arguments.check_number("logits_soft_cap", given["soft_cap"], dtype)
    sink = given.get("sink")
    if sink is not None:
        sink = _arguments.check_sink(sink, normalizer, sizes.heads, dtype)
    return Rules(
        normalizer=normalizer,
        log_sum=_log_sum(normalizer) if static.return_residual else None,
        score_mod=static.score_mod,
        mask_mod=static.mask_mod,
        before=static.before,
        after=static.after,
        scale=scale,
        soft_cap=soft_cap,
        sink=sink,
        dropout_rate=static.dropout_rate,
        dropout_key=given.get("dropout_key"),
        kv_axis_name=static.kv_axis_name,
        guard=not isinstance(normalizer, Configured),
    )


def _log_sum(normalizer: Normalizer) -> Configured:
    if not (isinstance(normalizer, Configured) and normalizer.function is softmax):
        raise ValueError(
            "return_residual goes with the normalizer softmax, got "
            f"{_arguments.function_name(normalizer)}."
        )
    return normalizer.of(logsumexp)


def _nothing(sizes: Sizes, rules: Rules, dtype: Any) -> tuple[Array, ...]:
    """What queries without keys get."""
    shape = sizes.batch, sizes.heads, sizes.queries
    out = jnp.zeros((*shape, sizes.value_features), dtype)
    return (out,) if rules.log_sum is None else (out, jnp.full(shape, -jnp.inf, dtype))


def _in_blocks(
    block_size: int | None, rules: Rules, operands: dict[str, Array], sizes: Sizes
) -> tuple[Array, ...]:
    rows = block_size or block_rows(sizes.queries, sizes.batch * sizes.heads * sizes.keys)
    # Where the positions of the keys are not known while tracing, no key is out of reach.
    reach = Reach(rules.before, rules.after) if rules.kv_axis_name is None else Reach()
    names = tuple(operands)

    def block_of(band: Band) -> Block:
        def block(first_row: Array, *parts: Array) -> tuple[Array, ...]:
            return attend(rules, band, first_row, dict(zip(names, parts, strict=True)))

        return block

    return attend_in_blocks(
        block_of,
        bands(sizes.queries, sizes.keys, min(rows, sizes.queries), reach),
        [LAYOUT[name] for name in names],
        list(operands.values()),
    )
