"""Attention with any normalizer."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._implementations import check_implementation
from jaxsoftmax._public import FLAG, known_number
from jaxsoftmax._scores import check_size, check_soft_cap
from jaxsoftmax.attention import _arguments
from jaxsoftmax.attention._call import Static, call
from jaxsoftmax.attention._options import (
    AxisName,
    Implementation,
    MaskMod,
    Normalizer,
    Options,
    ScoreMod,
)
from jaxsoftmax.attention._shared import Places
from jaxsoftmax.mappings import softmax

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
        function of your own, which gets the scores of excluded keys, too: a causal mask or a window
        saves it no time.
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
        cap and before the masks. What a bias of -inf excludes stays excluded.
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
        normalizers that have a threshold: softmax, sparsemax, entmax15, entmax and those of a
        `Form`. For all but softmax, keys go round once more for each pass of the search for it.
      query_offset: the position of the first query, in the count of the keys, from -2^29 to 2^29;
        None: 0. Causal masks and windows go by positions, as do the indices of queries that
        `score_mod` and `mask_mod` get. An int for all, which saves what is out of reach but is
        compiled for; or integers, (B,), which may be traced: the length of the cache before it, to
        decode; S - T, or `key_value_seq_lengths - T`, to have the last query see the last key.
      implementation: what computes it. None and "xla" are the blocks described above, on every
        platform. "pallas" are kernels on a TPU and on a Hopper GPU, and blocks elsewhere; they take
        softmax and what has a form (sparsemax, entmax15, entmax, a `threshold_mapping`), and a
        `score_mod` and `mask_mod` that close over no arrays. Those of a TPU take bfloat16 and
        float32; those of a GPU bfloat16 and float16, and heads of up to 256 features: what they
        do not take is left to blocks there. They were compiled for both and checked in an
        interpreter, but have not run on either. Their gradients are kernels, too; all other
        derivatives are those of blocks. "cudnn" is softmax in 16 bits as `jax.nn` has it, on a GPU
        with cuDNN, to be differentiated once, in reverse mode.

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
    _arguments.check_callables(normalizer=normalizer, score_mod=score_mod, mask_mod=mask_mod)
    offset = _arguments.known_offset(query_offset)
    static = Static(
        score_mod=score_mod,
        mask_mod=mask_mod,
        window=_arguments.check_window(local_window_size, FLAG.look("is_causal", is_causal)),
        scale=known_number(scale),
        soft_cap=check_soft_cap(logits_soft_cap),
        dropout_rate=dropout_rate,
        places=Places.named(query_axis_name, kv_axis_name),
        block_size=check_size("block_size", block_size),
        offset=offset or 0,
        implementation=check_implementation(implementation, "cudnn"),
        return_residual=FLAG.look("return_residual", return_residual),
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
        "query_offset": query_offset if offset is None else None,
        "dropout_key": _arguments.check_dropout(dropout_rate, dropout_key),
        "scale": None if static.scale is not None else scale,
        "soft_cap": None if static.soft_cap is not None else logits_soft_cap,
    }
    return call(static, normalizer, arrays)
