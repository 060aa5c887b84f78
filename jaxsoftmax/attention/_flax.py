"""Our attention in the calling convention of Flax."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from jaxsoftmax._scores import as_array, broadcasts
from jaxsoftmax.attention._attention import dot_product_attention
from jaxsoftmax.attention._options import AxisName


def attention_fn(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Real[ArrayLike, "*#B #N #T #S"] | None = None,
    mask: Shaped[ArrayLike, "*#B #N #T #S"] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    **options: Any,
) -> Float[Array, "*B T N V"]:
    r"""`dot_product_attention` as `flax.nnx.MultiHeadAttention` and `flax.linen` call theirs.

    Pass it as `attention_fn`; a `functools.partial` of it sets options. It needs no Flax itself.

    .. math:: \mathrm{normalizer}(Q K^\top / \sqrt H + \mathrm{bias}) V

    Args:
      query: queries, with any number of batch axes.
      key: keys.
      value: values.
      bias: added to the scores.
      mask: what takes part; booleans, or numbers that are 0 where nothing does.
      broadcast_dropout: accepted and not used: each weight is dropped on its own.
      dropout_rng: a key, needed if anything is dropped.
      dropout_rate: the share of weights that are dropped.
      deterministic: if true, nothing is dropped.
      dtype: what queries, keys and values are converted to; None: what they have in common.
      precision: None; for another, compile and call within `jax.default_matmul_precision`.
      module: None, or the module that the weights are to be sown in, as "attention_weights", of the
        shape (*batch, N, T, S). They are computed for that alone, as the output for values of a
        unit matrix: for small inputs.
      is_causal: whether no query sees keys after its own position. To decode with a cache, Flax
        passes a mask instead; without that, pass `query_offset`.
      options: all other options of `dot_product_attention`. What is of each sequence, such as
        lengths and segments, has the batch axes of `query`, or these as one axis.

    Returns:
      The attention outputs, in the layout of `query`.

    Raises:
      ValueError: if batch axes differ, `precision` is given, or for what `dot_product_attention`
        refuses.
      TypeError: for what `dot_product_attention` refuses.

    Example:
      >>> import functools
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> from flax import nnx
      >>> sparse = functools.partial(jsm.attention_fn, normalizer=jsm.entmax15)
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2, in_features=8, decode=False, attention_fn=sparse, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jnp.ones((3, 5, 8))).shape
      (3, 5, 8)

    References:
      The attention of Flax: https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/attention.html
    """
    if precision is not None:
        raise ValueError(
            f"precision must be None, got {precision!r}: use jax.default_matmul_precision."
        )
    query, key, value = as_array(query, "query"), as_array(key, "key"), as_array(value, "value")
    if dtype is None:
        dtype = jnp.result_type(query, key, value)
    batch = query.shape[:-3]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3 or x.shape[:-3] != batch:
            raise ValueError(
                f"{name} must have the axes (*batch, length, heads, features), with the batch of "
                f"query, {batch}, got shape {x.shape}."
            )
    query, key, value = (lax.collapse(x.astype(dtype), 0, -3) for x in (query, key, value))
    attend = functools.partial(
        dot_product_attention,
        query,
        key,
        bias=None if bias is None else _one_batch_axis("bias", jnp.asarray(bias), batch),
        mask=None if mask is None else _one_batch_axis("mask", jnp.asarray(mask) != 0, batch),
        is_causal=is_causal,
        **_with_one_batch_axis(options, batch),
    )
    dropout = {} if deterministic else {"dropout_rate": dropout_rate, "dropout_key": dropout_rng}
    out = attend(value=value, **dropout)
    if module is not None:
        units = _units(key.shape[1], options.get("kv_axis_name"), dtype)[:, None]
        weights = attend(value=jnp.broadcast_to(units, (*key.shape[:3], units.shape[-1])))
        weights = weights[0] if isinstance(weights, tuple) else weights
        weights = jnp.moveaxis(weights, 2, 1)
        _sow(module, weights.reshape(*batch, *weights.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)


def _units(length: int, axis_name: AxisName | None, dtype: Any) -> Array:
    """A unit vector for each key of this device, among those of all devices."""
    if axis_name is None:
        return jnp.eye(length, dtype=dtype)
    places = lax.axis_index(axis_name) * length + jnp.arange(length, dtype=jnp.int32)
    return jax.nn.one_hot(places, lax.axis_size(axis_name) * length, dtype=dtype)


def _sow(module: Any, weights: Array) -> None:
    """Leaves the weights in a module of `flax.nnx` or `flax.linen`, as their own attention does."""
    from flax import linen, nnx

    collection: Any = "intermediates" if isinstance(module, linen.Module) else nnx.Intermediate
    module.sow(collection, "attention_weights", weights)


# How many axes options of each sequence have beside those of the batch.
_OF_EACH = {
    "query_seq_lengths": 0,
    "key_value_seq_lengths": 0,
    "query_offset": 0,
    "query_segment_ids": 1,
    "key_value_segment_ids": 1,
}


def _with_one_batch_axis(options: dict[str, Any], batch: tuple[int, ...]) -> dict[str, Any]:
    """The options, in which arrays that have the batch axes have one instead."""
    n = len(batch)

    def flat(name: str, x: Any) -> Any:
        if name not in _OF_EACH or not hasattr(x, "reshape"):
            return x
        if x.ndim != n + _OF_EACH[name] or x.shape[:n] != batch:
            return x
        return lax.collapse(x, 0, n)

    return {name: flat(name, x) for name, x in options.items()}


def _one_batch_axis(name: str, x: Array, batch: tuple[int, ...]) -> Array:
    """What broadcasts to (*batch, N, T, S), with one batch axis at most."""
    if x.ndim <= 3 or len(batch) < 2:
        return x
    if not broadcasts(x.shape[:-3], batch):
        raise ValueError(
            f"{name} must broadcast to (*batch, heads, queries, keys) with the batch of query, "
            f"{batch}, got shape {x.shape}."
        )
    return lax.collapse(jnp.broadcast_to(x, (*batch, *x.shape[-3:])), 0, -3)
