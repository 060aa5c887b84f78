"""Attention with any normalizer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._configured import Configured, configured
from jaxsoftmax._public import known_number, refuse_what_is_no_array
from jaxsoftmax._reductions import is_known, vary_like
from jaxsoftmax._scores import (
    as_int,
    check_mask,
    check_size,
    check_soft_cap,
    mesh_names,
    wide,
    with_ndim,
)
from jaxsoftmax._sharding import parts_in_all, parts_of
from jaxsoftmax.attention import _arguments, _shared
from jaxsoftmax.attention._arguments import KERNELS, LAYOUT, MEASURED, NoKernelError, Sizes
from jaxsoftmax.attention._bands import Band, Reach, bands, interleaved
from jaxsoftmax.attention._blocks import Cuts, Prepare, attend_in_blocks
from jaxsoftmax.attention._cudnn import by_cudnn
from jaxsoftmax.attention._groups import Groups
from jaxsoftmax.attention._operands import ROW_AXIS, UNKNOWN, WHOLE, Operand
from jaxsoftmax.attention._options import (
    AxisName,
    Implementation,
    MaskMod,
    Normalizer,
    Options,
    ScoreMod,
)
from jaxsoftmax.attention._prepared import OF_NORMALIZER, First, Prepared, Rules, prepare
from jaxsoftmax.attention._ring import in_ring
from jaxsoftmax.attention._shared import Places
from jaxsoftmax.attention._tiling import TILING, TILINGS, Tiling
from jaxsoftmax.mappings import logsumexp, softmax

InBlocks = Callable[[Rules, dict[str, Array], Sizes], tuple[Array, ...]]
Mask = Bool[ArrayLike, "*#B #N #T #S"]
Bias = Real[ArrayLike, "*#B #N #T #S"]


@overload
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Bias | None = None,
    mask: Mask | None = None,
    *,
    return_residual: Literal[False] = False,
    **options: Unpack[Options],
) -> Float[Array, "*B T N V"]: ...
@overload
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Bias | None = None,
    mask: Mask | None = None,
    *,
    return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]: ...
@overload
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Bias | None = None,
    mask: Mask | None = None,
    *,
    return_residual: bool,
    **options: Unpack[Options],
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]: ...
def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"],
    key: Float[ArrayLike, "*B S K H"],
    value: Float[ArrayLike, "*B S K V"],
    bias: Bias | None = None,
    mask: Mask | None = None,
    *,
    normalizer: Normalizer = softmax,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integer[ArrayLike, " B"] | None = None,
    key_value_seq_lengths: Integer[ArrayLike, " B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: Integer[ArrayLike, "*B T"] | None = None,
    key_value_segment_ids: Integer[ArrayLike, "*B S"] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    sink: Real[ArrayLike, "#N"] | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    kv_axis_name: AxisName | None = None,
    block_size: int | None = None,
    return_residual: bool = False,
    query_axis_name: AxisName | None = None,
    query_offset: int | Integer[ArrayLike, " B"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B T N V"] | tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    r"""Attention with any normalizer, in memory linear in the sequence, differentiable every way.

    .. math:: \mathrm{normalizer}(\mathrm{cap}(\mathrm{scale} \cdot Q K^\top + \mathrm{bias})) V

    It has the signature and the meaning of `jax.nn.dot_product_attention`, and more options. It
    works on one block of query rows at a time: it computes, normalizes and uses their scores before
    it continues with the next block. Derivatives of every kind and order compute the scores once
    more. Keys that no query of a band of blocks can see, because of `is_causal` or
    `local_window_size`, are not computed.

    B is the batch, T the length of the queries, S that of keys and values, N the number of query
    heads, K that of key and value heads, of which N is a multiple, H the features of queries and
    keys and V those of values. In half precision, products are summed and scores normalized in
    float32. Queries that see no key get 0, with gradient 0.

    Args:
      query: queries, (B, T, N, H) or (T, N, H).
      key: keys, (B, S, K, H) or (S, K, H), in the dtype of `query`.
      value: values, (B, S, K, V) or (S, K, V), in the dtype of `query`.
      bias: added to the scores; broadcasts to (B, N, T, S). -inf excludes.
      mask: which keys a query sees; booleans that broadcast to (B, N, T, S).
      normalizer: turns scores into weights: `f(scores, axis=axis, where=mask)`, with `scores` of
        shape (B, N, rows, S) and a boolean `mask` that broadcasts to it. Any mapping of this
        package, a `functools.partial` of one (a parameter per head has shape (N, 1, 1)) or a
        function of your own.
      scale: multiplies the products of queries and keys; None: :math:`1 / \sqrt H`.
      is_causal: if true, a query sees no key after its own position. Positions of both are counted
        from the first, or as `query_offset` says.
      query_seq_lengths: how many queries are not padding, (B,). The output of the others is 0, even
        if they contain NaN.
      key_value_seq_lengths: how many keys and values are not padding, (B,). The others take no
        part, even if they contain NaN. Keys and values that other masks exclude have to be finite:
        0 times NaN is NaN.
      local_window_size: how many keys a query sees before and after its own position; an int means
        both.
      query_segment_ids: integers, (B, T), for packed sequences: a query sees keys with the same
        number.
      key_value_segment_ids: integers, (B, S); goes with `query_segment_ids`.
      logits_soft_cap: bounds the scores by `cap * tanh(scores / cap)`, the bias included.
      sink: one more score per head, (N,) or a number, whose share is dropped; for normalizers with
        an argument `sink` (softmax, sparsemax, entmax, entmax15).
      score_mod: `f(score, batch, head, q_index, kv_index) -> score`, of single numbers, after the
        cap and before the masks.
      mask_mod: `f(batch, head, q_index, kv_index) -> bool`, of single numbers: whether the query
        sees the key.
      dropout_rate: the share of the weights to drop. The others are divided by 1 minus the share.
        Whether a weight is dropped depends only on `dropout_key` and its four indices, not on
        blocks, windows or devices along `kv_axis_name`.
      dropout_key: a key of `jax.random`, needed if anything is dropped.
      kv_axis_name: the mesh axis, within `shard_map`, that keys and values are spread over, or a
        tuple of several; queries are on all their devices. Positions of keys are then global: the
        device's index times its number of keys, plus the index on the device. `bias`, `mask` and
        `key_value_segment_ids` have the device's keys, `key_value_seq_lengths` are of whole
        sequences. The normalizer is called with `axis=(-1, kv_axis_name)`; the output is the same
        on all devices. Outside of `shard_map` there is nothing to name: arrays on a mesh of
        explicit axes stay where they are, and so they do under automatic sharding (where causal
        masks save no time, since nothing tells which device has which keys).
      block_size: how many query rows make a block. None chooses it from the sizes.
      return_residual: whether to return the logarithm of the softmax's denominator as well.
      query_axis_name: the mesh axis, within `shard_map`, that queries are spread over, or a tuple
        of several. Positions of queries are then global, and `query_seq_lengths` are of whole
        sequences. If it is `kv_axis_name`, keys and values go round the devices in a ring: each
        transfer overlaps with the work on the keys before, parts that no query sees are left
        out, and `bias` and `mask` have the device's queries and the keys of all. That goes with
        the normalizer softmax.
      query_offset: the position of the first query, in the count of the keys; None: 0. Causal masks
        and windows go by positions, as do the indices of queries that `score_mod` and `mask_mod`
        get. An int for all, which saves what is out of reach but is compiled for; or integers,
        (B,), which may be traced: the length of the cache before it, to decode; S - T, or
        `key_value_seq_lengths - T`, to have the last query see the last key.
      implementation: what computes it. None and "xla" are the blocks described above, on every
        platform. "pallas" are kernels on a TPU, and blocks elsewhere; they take softmax and what
        has a form (sparsemax, entmax15, entmax, a `threshold_mapping`), in bfloat16 and float32.
        They were compiled for TPUs and checked in an interpreter, but have not run on one. Their
        gradients are kernels, too; all other derivatives are those of blocks. "cudnn" is softmax in
        16 bits as `jax.nn` has it, on a GPU with cuDNN, to be differentiated once, in reverse mode.

    Returns:
      The outputs, (B, T, N, V) or (T, N, V), in the dtype of `query`; with `return_residual` also
      the logsumexp of each row of scores and sink, (B, T, N) or (T, N), in float32 (float64 if
      queries are), -inf for queries that see no key and no sink. Unlike in `jax.nn`, it has a
      gradient.

    Raises:
      TypeError: if dtypes differ or do not fit, or a function is expected and something else is
        passed.
      ValueError: if shapes do not fit, `sink` goes to a normalizer without that argument,
        `return_residual` to one that is not softmax, an option is out of range, or no kernel of
        the named implementation supports it.

    Example:
      >>> import functools
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))  # (B, T, N, H) each
      >>> jsm.dot_product_attention(q, k, v, is_causal=True).shape
      (1, 6, 2, 4)

      Each head learns how sparse it is:

      >>> def loss(alpha):
      ...     normalizer = functools.partial(jsm.entmax, alpha=alpha[:, None, None])
      ...     return jnp.sum(jsm.dot_product_attention(q, k, v, normalizer=normalizer) ** 2)
      >>> jax.grad(loss)(jnp.array([1.2, 1.8])).shape
      (2,)

      A bias made of positions, with learned slopes, is a function and not an array:

      >>> def alibi(slopes):
      ...     score_mod = lambda score, b, n, i, j: score - slopes[n] * abs(i - j)
      ...     return jnp.sum(jsm.dot_product_attention(q, k, v, score_mod=score_mod) ** 2)
      >>> jax.grad(alibi)(jnp.array([0.5, 0.25])).shape
      (2,)

    Note:
      Outside of `jax.jit`, each call with a normalizer, `score_mod` or `mask_mod` of your own
      compiles again, since it may close over other arrays.

    References:
      Rabe & Staats, 2021: Self-attention does not need O(n^2) memory (arXiv:2112.05682); Dao, 2023:
      FlashAttention-2 (arXiv:2307.08691). Functions of scores: FlexAttention (arXiv:2412.05496).
      Learned sparsity: Correia, Niculae & Martins, 2019 (arXiv:1909.00015). The gradient of a
      tangent: Lu & Song, 2024 (arXiv:2410.11081), appendix F.
    """
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
        scale=known_number(scale),
        soft_cap=check_soft_cap(logits_soft_cap),
        dropout_rate=dropout_rate,
        places=Places(
            queries=mesh_names("query_axis_name", query_axis_name),
            keys=mesh_names("kv_axis_name", kv_axis_name),
        ),
        block_size=check_size("block_size", block_size),
        offset=as_int(query_offset) or 0,
        implementation=_arguments.check_implementation(implementation),
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
        "query_offset": None if as_int(query_offset) is not None else query_offset,
        "dropout_key": _arguments.check_dropout(dropout_rate, dropout_key),
        "scale": None if static.scale is not None else scale,
        "soft_cap": None if static.soft_cap is not None else logits_soft_cap,
    }
    ours = configured(normalizer)
    if ours is not None and score_mod is None and mask_mod is None:
        compiled = functools.partial(_compiled, static, ours)
    else:  # for this call alone: what the functions close over may be other arrays at the next
        compiled = jax.jit(functools.partial(_attention, static, ours or normalizer))
    try:
        return compiled(arrays)
    except TypeError:
        refuse_what_is_no_array(arrays)
        raise


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
    places: Places
    block_size: int | None
    offset: int
    implementation: str | None
    return_residual: bool

    def in_ring(self, normalizer: Normalizer) -> bool:
        """Whether keys go round to the queries."""
        common = set(self.places.queries) & set(self.places.keys)
        if not common:
            return False
        if self.places.queries != self.places.keys:
            raise ValueError(
                "query_axis_name must be kv_axis_name or name other mesh axes, got "
                f"{self.places.queries} and {self.places.keys}."
            )
        if not _shared.goes_in_ring(normalizer):
            raise ValueError(
                "query_axis_name must name other mesh axes than kv_axis_name but for the "
                "normalizer softmax (with no option but a temperature other than 0), got "
                f"{self.places.queries} and {_arguments.function_name(normalizer)}."
            )
        return True


def _attention(
    static: _Static, normalizer: Normalizer, arrays: dict[str, Any]
) -> Array | tuple[Array, Array]:
    given = {name: x for name, x in arrays.items() if x is not None}
    shared = _shared.plan(given, static.places, normalizer)
    if shared is None:
        return _here(static, normalizer, given)
    here = functools.partial(_here, dataclasses.replace(static, places=shared.places))
    return _shared.on_each_device(here, shared, normalizer, given)


def _here(
    static: _Static, normalizer: Normalizer, given: dict[str, Any]
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
    in_blocks = functools.partial(_in_blocks, static.block_size)
    if 0 in (*sizes.scores, sizes.value_features):
        outs = _nothing(sizes, rules, operands.get("sink"), dtype)
    elif static.in_ring(normalizer):
        if static.implementation in KERNELS:
            _arguments.refuse("pallas", "a kv_axis_name that is query_axis_name")
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
    is_chosen = implementation is None and MEASURED.get("tpu") == "pallas"
    if implementation not in KERNELS and not is_chosen:
        return in_blocks(rules, operands, sizes)
    # Pallas is imported by those who use it.
    from jaxsoftmax.attention._kernels import by_kernels

    interpret = KERNELS.get(implementation or "", False)
    try:
        return by_kernels(interpret, block_size, in_blocks, rules, operands, sizes)
    except NoKernelError:
        if is_chosen:
            return in_blocks(rules, operands, sizes)
        raise


def _by_cudnn(static: _Static, normalizer: Normalizer, given: dict[str, Any]) -> Array:
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
        window=(static.before, static.after),
        others=others,
    )
    return out.reshape(*jnp.shape(given["query"])[:-1], -1)


# The normalizer is a pytree here, of which only the arrays are traced.
_compiled = jax.jit(_attention, static_argnums=0)


def _operands(
    static: _Static, normalizer: Normalizer, given: dict[str, Any]
) -> tuple[dict[str, Array], Sizes]:
    """What blocks are cut from, in the layouts of `LAYOUT`."""
    query, key, value, sizes = _arguments.check_inputs(
        *(given.get(name) for name in ("query", "key", "value"))
    )
    operands: dict[str, Array] = {"query": query}
    _, _, first_query, first_key = _first(static.places, sizes)
    if "query_seq_lengths" in given:
        lengths = _arguments.check_lengths("query_seq_lengths", given["query_seq_lengths"], sizes)
        query = _arguments.without_padding(query, lengths, first_query)
        operands["query_lengths"] = lengths
    if "key_value_seq_lengths" in given:
        lengths = _arguments.check_lengths(
            "key_value_seq_lengths", given["key_value_seq_lengths"], sizes
        )
        key = _arguments.without_padding(key, lengths, first_key)
        value = _arguments.without_padding(value, lengths, first_key)
        operands["key_lengths"] = lengths
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
    batch, head, query, key = _first(static.places, sizes)
    return Rules(
        normalizer=normalizer,
        row_value=_log_sum(normalizer) if static.return_residual else None,
        score_mod=static.score_mod,
        mask_mod=static.mask_mod,
        before=static.before,
        after=static.after,
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
    least = -jnp.inf if sink is None else sink[..., 0]
    return out, jnp.broadcast_to(jnp.asarray(least, dtype), shape)


def _in_blocks(
    block_size: int | None, rules: Rules, operands: dict[str, Array], sizes: Sizes
) -> tuple[Array, ...]:
    normalizer = rules.normalizer
    if isinstance(normalizer, Configured):
        own = {OF_NORMALIZER + name: _aligned(x) for name, x in normalizer.arrays.items()}
        operands = operands | own
        rules = dataclasses.replace(rules, normalizer=normalizer.with_arrays({}))
    names = tuple(operands)

    def prepare_of(band: Band) -> Prepare:
        def prepared(first: First, *parts: Array) -> Prepared:
            return prepare(rules, band, first, dict(zip(names, parts, strict=True)))

        return prepared

    # Where positions are not known while tracing, no key is out of reach.
    unknown = "query_offset" in operands
    reaching = dataclasses.replace(rules, before=None, after=None) if unknown else rules
    if parts_in_all(operands["query"]) > 1:
        cuts_of = functools.partial(_shared_cuts, block_size, operands["query"], sizes)
    else:
        cuts_of = functools.partial(_cuts, block_size, reaching, operands["query"], sizes)
    default, cuts = cuts_of(TILING), {name: cuts_of(own) for name, own in TILINGS.items()}
    layout = [LAYOUT.get(name) or _layout_of_normalizer(operands[name]) for name in names]
    arrays = list(operands.values())
    return attend_in_blocks(prepare_of, default, cuts, layout, arrays, names.index("value"))


def _cuts(block_size: int | None, rules: Rules, query: Array, sizes: Sizes, tiling: Tiling) -> Cuts:
    """How attention is cut where it is one device's own."""
    known = all(map(is_known, (*rules.first[2:], sizes.queries, sizes.keys)))
    reach = Reach(rules.before, rules.after).of_rows_from(rules.offset) if known else Reach()
    groups, together = Groups(), sizes.batch * sizes.heads
    forward, backward = tiling.forward, tiling.backward
    # Of functions that are not ours it is not known which of their arrays belong to a head.
    if isinstance(rules.normalizer, Configured) and not rules.kv_names:
        per_head = sizes.heads // sizes.key_heads
        rows = block_size or _rows_of_band(sizes, reach, tiling)
        row_size = per_head * sizes.keys
        batch, heads = tiling.group_sizes(sizes.batch, sizes.key_heads, row_size, rows)
        groups = Groups(sizes.batch // batch, sizes.key_heads // heads)
        together = batch * heads * per_head
        if groups != Groups() and tiling.group is not None:
            forward = tiling.group

    def bands_of(scores: int) -> tuple[Band, ...]:
        queries = _rows_of_band(sizes, reach, tiling)
        rows = block_size or tiling.block_rows(queries, together * sizes.keys, scores)
        if not is_known(sizes.queries):
            return (Band(0, sizes.queries, 1, sizes.keys, 0, None, sizes.keys),)
        return bands(sizes.queries, sizes.keys, min(rows, sizes.queries), reach, tiling.bands)

    return Cuts(groups, bands_of(forward), bands_of(backward), tiling.again(query.dtype))


def _rows_of_band(sizes: Sizes, reach: Reach, tiling: Tiling) -> int:
    """How many rows see one stretch of keys."""
    return sizes.queries if reach == Reach() else math.ceil(sizes.queries / tiling.bands)


def _shared_cuts(block_size: int | None, query: Array, sizes: Sizes, tiling: Tiling) -> Cuts:
    """How attention is cut where XLA shares it among devices: no block is one device's alone."""
    devices = parts_in_all(query)
    row_size = sizes.batch * sizes.heads * sizes.keys // devices

    def band_of(scores: int) -> Band:
        rows = block_size or tiling.block_rows(sizes.queries, row_size, scores)
        parts = parts_of(query, ROW_AXIS)
        return interleaved(sizes.queries, sizes.keys, rows * devices, parts)

    again = tiling.again(query.dtype)
    return Cuts(Groups(), (band_of(tiling.forward),), (band_of(tiling.backward),), again)


def _aligned(x: Any) -> Any:
    """An array of a normalizer with the axes of the scores, if it has some of a head's."""
    x = jnp.asarray(x)
    return with_ndim(x, 4) if x.ndim == 3 else x


def _layout_of_normalizer(x: Array) -> Operand:
    return WHOLE if x.ndim == 4 else UNKNOWN
