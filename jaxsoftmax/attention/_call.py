"""One call of attention, on each device: from arrays and options to blocks, kernels or a ring."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._configured import Configured, configured
from jaxsoftmax._implementations import (
    KERNELS,
    NoKernelError,
    is_interpreted,
    platforms,
    refuse,
)
from jaxsoftmax._public import is_public, refuse_what_is_no_array, within_range
from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import check_mask, wide
from jaxsoftmax.attention import _arguments, _shared
from jaxsoftmax.attention._arguments import Sizes
from jaxsoftmax.attention._cudnn import by_cudnn
from jaxsoftmax.attention._cutting import InBlocks, cut_and_attend
from jaxsoftmax.attention._options import (
    MaskMod,
    Normalizer,
    ScoreMod,
)
from jaxsoftmax.attention._prepared import Rules
from jaxsoftmax.attention._ring_parts import has_thresholds, in_ring
from jaxsoftmax.attention._shared import Places
from jaxsoftmax.mappings import logsumexp, softmax


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known of a call while tracing."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    window: tuple[int | None, int | None]
    scale: float | None
    soft_cap: float | None
    dropout_rate: float
    places: Places
    block_size: int | None
    offset: int
    implementation: str | None
    return_residual: bool

    def keys_go_round(self, normalizer: Normalizer, sizes: Sizes) -> bool:
        """Whether keys go round to the queries."""
        common = set(self.places.queries) & set(self.places.keys)
        if not common:
            return False
        if self.places.queries != self.places.keys:
            raise ValueError(
                "query_axis_name must be kv_axis_name or name other mesh axes, got "
                f"{self.places.queries} and {self.places.keys}."
            )
        if not has_thresholds(normalizer, jnp.zeros((*sizes.scores[:3], 1))):
            raise ValueError(
                "query_axis_name must name other mesh axes than kv_axis_name but for a normalizer "
                "with one threshold per row (softmax, sparsemax, entmax15, entmax, that of a Form, "
                "with its slope if it has a tau; at a temperature other than 0), got "
                f"{self.places.queries} and {_arguments.function_name(normalizer)}."
            )
        return True


def attend(
    static: Static, normalizer: Normalizer, arrays: dict[str, Any]
) -> Array | tuple[Array, Array]:
    """Attention as the public function returns it."""
    given = {name: x for name, x in arrays.items() if x is not None}
    shared = _shared.plan(given, static.places, normalizer)
    if shared is None:
        return _here(static, normalizer, given)

    is_ours = isinstance(normalizer, Configured)
    places = shared.places if is_ours else static.places

    def here(normalizer: Normalizer, mods: Any, given: dict[str, Any]) -> Any:
        of_scores, of_masks = mods
        there = dataclasses.replace(static, places=places, score_mod=of_scores, mask_mod=of_masks)
        return _here(there, normalizer, given)

    mods = static.score_mod, static.mask_mod
    run = _shared.on_each_device if is_ours else _shared.as_a_whole
    return run(here, shared, normalizer, mods, given)


def _here(
    static: Static, normalizer: Normalizer, given: dict[str, Any]
) -> Array | tuple[Array, Array]:
    """Attention on one device, of what it has of the arrays."""
    if static.implementation == "cudnn":
        return _by_cudnn(static, normalizer, given)
    operands, sizes = _operands(static, normalizer, given)
    dtype = wide(operands["query"].dtype)
    rules = _rules(static, normalizer, given, sizes, dtype)
    if rules.scale is not None and operands["query"].dtype == dtype:
        # Queries are fewer than scores. In half precision they would be rounded.
        operands["query"] = operands["query"] * rules.scale
        rules = dataclasses.replace(rules, scale=None)
    in_blocks = functools.partial(cut_and_attend, static.block_size)
    if 0 in sizes.scores or (sizes.value_features == 0 and rules.row_value is None):
        outs = _nothing(sizes, rules, operands.get("sink"), dtype)
    elif static.keys_go_round(normalizer, sizes):
        if static.implementation in KERNELS:
            refuse("pallas", "a kv_axis_name that is query_axis_name")
        outs = in_ring(static.places.keys, in_blocks, rules, operands, sizes)
    else:
        outs = _by(static.implementation, in_blocks, static.block_size, rules, operands, sizes)
        if static.places.keys:
            outs = (lax.psum(outs[0], static.places.keys), *outs[1:])
    shape = jnp.shape(given["query"])[:-1]
    # (B, N, T, ...) to the layout of the query, which may lack a batch.
    out = (
        jnp.moveaxis(outs[0], 1, 2)
        .reshape(*shape, sizes.value_features)
        .astype(operands["query"].dtype)
    )
    if rules.row_value is None:
        return out
    return out, jnp.moveaxis(outs[1], 1, 2).reshape(shape)


def _by(
    implementation: str | None,
    in_blocks: InBlocks,
    block_size: int | None,
    rules: Rules,
    operands: dict[str, Array],
    sizes: Sizes,
) -> tuple[Array, ...]:
    """The outputs, by what is named or else by what was measured to be the best."""
    of_kernels = platforms(implementation, "attention")
    if not of_kernels:
        return in_blocks(rules, operands, sizes)
    # Pallas is imported by those who use it.
    from jaxsoftmax.attention._kernels import by_kernels

    interpret = is_interpreted(implementation)
    try:
        return by_kernels(of_kernels, interpret, block_size, in_blocks, rules, operands, sizes)
    except NoKernelError:
        if implementation is None:
            return in_blocks(rules, operands, sizes)
        raise


def _by_cudnn(static: Static, normalizer: Normalizer, given: dict[str, Any]) -> Array:
    names = ("score_mod", "mask_mod", "dropout_rate", "return_residual", "block_size")
    others = {name: getattr(static, name) for name in names}
    others["kv_axis_name or query_axis_name"] = static.places.keys + static.places.queries
    others["logits_soft_cap"] = static.soft_cap
    others["query_offset"] = static.offset
    arrays = {name: x for name, x in given.items() if name != "scale"}
    out = by_cudnn(
        arrays,
        normalizer,
        scale=given.get("scale", static.scale),
        window=static.window,
        others=others,
    )
    return out.reshape(*jnp.shape(given["query"])[:-1], -1)


# The normalizer is a pytree here, of which only the arrays are traced.
_attend_compiled = jax.jit(attend, static_argnums=0)


def call(static: Static, normalizer: Normalizer, arrays: dict[str, Any]) -> Any:
    """`attend`, compiled once and for all where no function holds a state."""
    if not callable(normalizer):
        raise TypeError(f"normalizer must be a function, got {type(normalizer).__name__}.")
    if missing := [x for x in ("axis", "where") if not _arguments.takes(normalizer, x)]:
        raise TypeError(
            "normalizer must be called as f(scores, axis=axis, where=mask), got "
            f"{_arguments.function_name(normalizer)}, which does not take {missing[0]}."
        )
    _arguments.check_draws_nothing(normalizer)
    is_partial = isinstance(normalizer, functools.partial)
    if is_partial and normalizer.args and is_public(normalizer.func):
        raise TypeError(
            "normalizer must hold its options by name, for scores come first, got "
            f"{normalizer.args[0]!r} by position."
        )
    ours = configured(normalizer)
    if ours is not None:
        _check_options({*dict(ours.options), *ours.arrays}, arrays, static.places)
    if ours is not None and static.score_mod is None and static.mask_mod is None:
        compiled = functools.partial(_attend_compiled, static, ours)
    else:  # for this call alone: what the functions close over may be other arrays at the next
        compiled = jax.jit(functools.partial(attend, static, ours or normalizer))
    arrays = {name: within_range(x) for name, x in arrays.items()}
    try:
        return compiled(arrays)
    except TypeError:
        refuse_what_is_no_array(arrays)
        raise


def _check_options(own: set[str], arrays: dict[str, Any], places: Places) -> None:
    """Refuses what a normalizer says of rows that attention makes."""
    if of_rows := sorted(own & {"axis", "where", "segment_ids", "num_segments"}):
        raise ValueError(
            "normalizer must leave axis, masks and segments to attention, got a partial with "
            f"{of_rows[0]}."
        )
    if "sink" in own and (arrays.get("sink") is not None or places.are_a_ring):
        where = "once" if arrays.get("sink") is not None else "as an argument in a ring"
        raise ValueError(f"sink must be given {where}, got one in the normalizer.")


def _operands(
    static: Static, normalizer: Normalizer, given: dict[str, Any]
) -> tuple[dict[str, Array], Sizes]:
    """What blocks are cut from, in the layouts of `LAYOUT`."""
    query, key, value, sizes = _arguments.check_inputs(
        *(given.get(name) for name in ("query", "key", "value"))
    )
    operands: dict[str, Array] = {"query": query}
    _, _, first_query, first_key = _first(static.places, sizes)
    (query, key, value), lengths = _arguments.unpadded(
        given, (query, key, value), sizes, (first_query, first_key)
    )
    operands |= lengths
    if "query_offset" in given:
        operands["query_offset"] = _arguments.check_offset(given["query_offset"], sizes)
    if "query_segment_ids" in given or "key_value_segment_ids" in given:
        operands["query_segments"], operands["key_segments"] = _arguments.check_segments(
            given.get("query_segment_ids"), given.get("key_value_segment_ids"), sizes
        )
    of_scores = sizes
    if static.places.are_a_ring:  # then they have the keys of all devices
        of_scores = dataclasses.replace(sizes, keys=sizes.keys * lax.axis_size(static.places.keys))
    if "bias" in given:
        operands["bias"] = _arguments.check_bias(given["bias"], of_scores)
    if "mask" in given:
        operands["mask"] = check_mask(given["mask"], of_scores.scores, "mask")
    operands["query"] = jnp.transpose(query, (0, 2, 1, 3))
    operands["key"] = jnp.transpose(key, (0, 2, 3, 1))
    operands["value"] = jnp.transpose(value, (0, 2, 3, 1))
    # Outside of the reverse rule, so that JAX sums their cotangents over devices.
    for other in (key, query):
        operands = {name: vary_like(x, other) for name, x in operands.items()}
    if "sink" in given:
        dtype = wide(query.dtype)
        operands["sink"] = _arguments.check_sink(given["sink"], normalizer, sizes.heads, dtype)
    return operands, sizes


def _first(places: Places, sizes: Sizes) -> tuple[Any, ...]:
    """The positions of the first batch, head, query and key of this device."""
    pairs = zip(dataclasses.astuple(places), sizes.scores, strict=True)
    return tuple(lax.axis_index(names) * size if names else 0 for names, size in pairs)


def _rules(
    static: Static, normalizer: Normalizer, given: dict[str, Any], sizes: Sizes, dtype: Any
) -> Rules:
    scale = static.scale
    if scale is None:
        scale = sizes.features**-0.5
        if "scale" in given:
            scale = _arguments.check_number("scale", given["scale"], dtype)
    soft_cap = static.soft_cap
    if "soft_cap" in given:
        soft_cap = _arguments.check_number("logits_soft_cap", given["soft_cap"], dtype)
    batch, head, query, key = _first(static.places, sizes)
    return Rules(
        normalizer=normalizer,
        row_value=_log_sum(normalizer) if static.return_residual else None,
        score_mod=static.score_mod,
        mask_mod=static.mask_mod,
        before=static.window[0],
        after=static.window[1],
        scale=scale,
        soft_cap=soft_cap,
        dropout_rate=static.dropout_rate,
        dropout_key=given.get("dropout_key"),
        kv_names=static.places.keys,
        offset=static.offset,
        first=(batch, head, query + static.offset, key),
        guard=not isinstance(normalizer, Configured),
    )


def _log_sum(normalizer: Normalizer) -> Configured:
    if not (isinstance(normalizer, Configured) and normalizer.function is softmax):
        raise ValueError(
            "return_residual needs the normalizer softmax, got "
            f"{_arguments.function_name(normalizer)}."
        )
    return normalizer.of(logsumexp)


def _nothing(sizes: Sizes, rules: Rules, sink: Array | None, dtype: Any) -> tuple[Array, ...]:
    """What queries without keys get."""
    shape = sizes.batch, sizes.heads, sizes.queries
    out = jnp.zeros((*shape, sizes.value_features), dtype)
    if rules.row_value is None:
        return (out,)
    masked = jnp.zeros((*shape, 1), dtype)  # one key that nobody sees, beside what a sink adds
    options = {} if sink is None else {"sink": sink}
    row_values = rules.row_value(masked, where=jnp.zeros(masked.shape, bool), **options)
    return out, *jax.tree.leaves(row_values)
