"""The linear layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import check_real, output_dtype, wide


class Layer(NamedTuple):
    """What goes into it, and what it holds."""

    hidden: Array
    weight: Array
    bias: Array | None


def as_layer(hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> Layer:
    """The linear layer, checked, and brought to one dtype."""
    hidden, weight = jnp.asarray(hidden), jnp.asarray(weight)
    check_real("hidden", hidden)
    check_real("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (D, V), got shape {weight.shape}.")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"hidden must have shape (..., {weight.shape[0]}), to go with weight of shape "
            f"{weight.shape}, got shape {hidden.shape}."
        )
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(output_dtype(hidden), output_dtype(weight))
    if dtype == jnp.float16:  # too narrow for the gradients of scores
        dtype = jnp.dtype(jnp.float32)
    hidden, weight = hidden.astype(dtype), weight.astype(dtype)
    if bias is None:
        return Layer(hidden, weight, None)
    bias = jnp.asarray(bias)
    check_real("bias", bias)
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must have shape {weight.shape[1:]}, got shape {bias.shape}.")
    return Layer(hidden, weight, bias.astype(wide(dtype)))


def varying_alike(layer: Layer, *of_rows: Array) -> Layer:
    """The layer, seen as varying over all mesh axes that one of its arrays or `of_rows` does."""
    hidden = layer.hidden
    for x in (layer.weight, *of_rows):
        hidden = vary_like(hidden, x)
    weight = vary_like(layer.weight, hidden)
    return Layer(hidden, weight, None if layer.bias is None else vary_like(layer.bias, weight))
