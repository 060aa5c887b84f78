"""The loss of a linear layer: what is asked for, and what it may be asked of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._configured import public_with_loss
from jaxsoftmax._public import INTEGER_OR_NONE, NUMBER, STATIC
from jaxsoftmax._scores import (
    at_least_int32,
    broadcasts,
    check_integers,
    check_mask,
    check_real,
    check_size,
    check_soft_cap,
    mesh_names,
    wide,
    with_ndim,
)
from jaxsoftmax._sharding import placed_like
from jaxsoftmax.linear_loss._layer import as_layer
from jaxsoftmax.linear_loss._losses import How, number_of_classes, summed_or_each
from jaxsoftmax.linear_loss._mesh import on_explicit_mesh, sharding_of
from jaxsoftmax.losses import cross_entropy
from jaxsoftmax.losses._targets import check_known, without_ignored


@public_with_loss(
    reduction=STATIC,
    logits_soft_cap=NUMBER,
    chunk_size=STATIC,
    vocab_axis_name=STATIC,
    ignore_index=INTEGER_OR_NONE,
)
def linear_cross_entropy(
    hidden: Real[ArrayLike, "*rows D"],
    weight: Real[ArrayLike, "D V"],
    labels: Integer[ArrayLike, "*rows"] | Float[ArrayLike, "*rows V"],
    *,
    bias: Real[ArrayLike, " V"] | None = None,
    loss: Callable[..., Array] = cross_entropy,
    reduction: Literal["mean", "sum", "none"] = "mean",
    where: Bool[ArrayLike, "*#rows"] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | tuple[str, ...] | None = None,
    weights: Real[ArrayLike, "*#rows"] | None = None,
    ignore_index: int | None = None,
) -> Float[Array, ""] | Float[Array, "*rows"]:
    r"""The loss of the scores `hidden @ weight + bias`, computed without holding them all.

    .. math:: \frac{1}{N} \sum_{n=1}^N \mathrm{loss}(h_n W + b, y_n)

    Only one chunk of rows is in memory at a time. The loss and its derivatives of every order are
    the same, up to rounding, as those from all the scores at once. For the reductions "mean" and
    "sum", the gradient is computed in the forward pass and costs three matrix products, as it does
    with all the scores. For "none", the scores are computed once more.

    Args:
      hidden: the inputs of the last layer, of shape (..., D).
      weight: the weights of that layer, of shape (D, V) for V classes.
      labels: either integer classes, of the shape (...), or distributions over the classes: floats
        of the shape (..., V). Distributions are constants: they get no gradient.
      bias: added to the scores, of shape (V,).
      loss: a function `loss(scores, labels)` of scores (rows, V) and integers (rows,) that returns
        one value per row. Examples are `sparsemax_loss`, or `cross_entropy` and `entmax_loss` with
        options set by `functools.partial`. It is called on chunks of rows, so nothing that it holds
        is per row, and with classes alone: for rows that do not count there is `ignore_index`.
        Arrays that it closes over, such as a learned `alpha`, get gradients. Outside of `jax.jit`,
        each call with a loss of your own compiles again, since it may close over other arrays.
      reduction: "mean" and "sum" are over the rows that count; "none" returns the loss of each row.
      where: which rows count; a boolean mask that broadcasts to `labels`. The loss and the gradient
        of other rows are 0, even if they contain NaN.
      logits_soft_cap: a positive number `c`. Scores become `c * tanh(scores / c)`; those of -inf,
        as from a bias, stay.
      chunk_size: rows per chunk, on each device. None chooses it from the sizes. A larger chunk
        needs more memory and may take less time.
      vocab_axis_name: inside `shard_map`, the mesh axis over which the classes are sharded, or a
        tuple of several. Then `weight` and `bias` hold this device's classes, `labels` are numbered
        across all devices, and the loss is called with `axis=(-1, vocab_axis_name)`. The devices
        exchange a few numbers per row and the gradient of `hidden`. Outside of `shard_map`, leave
        it out: rows and classes of arrays on a mesh stay where they are.
      weights: how much each row counts; numbers that broadcast to (...), with gradients. The mean
        is the weighted sum over the sum of the weights.
      ignore_index: a class whose rows do not count. It may be out of range.

    Returns:
      A scalar, or for "none" losses of the shape (...). It is 0 if no row counts. The dtype
      is that of the operands, or float32 if they are in half precision; the scores and all sums
      over rows are then float32, too. A label out of range gives NaN with gradient 0, and an error
      under `jax.experimental.checkify`.

    Raises:
      TypeError: if `labels` are not integers or floats, `where` is not boolean, `loss` is not a
        function, or the other arguments are not real.
      ValueError: if shapes do not fit, including that of the result of `loss`; if `reduction` is
        unknown; if `chunk_size` or `logits_soft_cap` is not positive; or if `ignore_index` is used
        with distributions.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> hidden, weight = jnp.eye(3), jnp.array([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
      >>> labels = jnp.array([0, 1, 2])
      >>> print(f"{jsm.linear_cross_entropy(hidden, weight, labels):.4f}")
      0.9427
      >>> sparse = functools.partial(jsm.entmax_loss, alpha=1.5)
      >>> print(jsm.linear_cross_entropy(hidden, weight, labels, loss=sparse, reduction="none"))
      [0.    0.126 1.126]
      >>> print(jax.grad(jsm.linear_cross_entropy)(hidden, weight, labels).shape)
      (3, 3)

    References:
      Hsu et al., 2024: Liger Kernel (arXiv:2410.10989); Wijmans et al., 2024: Cut your losses in
      large-vocabulary language models (arXiv:2411.09009).
    """
    layer = as_layer(hidden, weight, bias)
    shape, num_classes = layer.hidden.shape[:-1], layer.weight.shape[1]
    *of_rows, _ = jax.typeof(layer.hidden).sharding.spec
    ignored, labels = without_ignored(labels, ignore_index)
    labels = placed_like(_as_labels(labels, shape, num_classes), of_rows)
    are_classes = jnp.issubdtype(labels.dtype, jnp.integer)
    if ignore_index is not None and not are_classes:
        raise ValueError("ignore_index goes with classes, got distributions as labels.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    known_cap = check_soft_cap(logits_soft_cap)
    names = mesh_names("vocab_axis_name", vocab_axis_name)
    keep = jnp.broadcast_to(True if where is None else check_mask(where, shape), shape)
    keep = placed_like(keep, of_rows)
    keep = keep if ignored is None else keep & ~placed_like(ignored, of_rows)
    if are_classes:
        length = number_of_classes(layer.weight, names)
        known = (labels >= 0) & (labels < length) | ~keep
        labels = check_known("labels", jnp.where(keep, labels, 0), known, length)
    else:
        labels = lax.stop_gradient(labels)
    how = How(
        loss=loss,
        soft_cap=logits_soft_cap if known_cap is None else known_cap,
        names=names,
        chunk_size=check_size("chunk_size", chunk_size),
        in_sum=reduction != "none",
    )
    # Zeros instead of what does not count, be it NaN.
    hidden = jnp.where(keep[..., None], layer.hidden, 0)
    losses = on_explicit_mesh if sharding_of(layer) is not None else summed_or_each
    weights = None if weights is None else _as_weights(weights, keep, wide(hidden.dtype))
    if reduction == "mean":
        weights = _of_mean(weights, keep, wide(hidden.dtype))
    return losses(how, layer._replace(hidden=hidden), labels, keep, weights)


def _of_mean(weights: Array | None, keep: Array, dtype: Any) -> Array:
    """Weights that add up to 1: gradients made with the losses are then those of the mean."""
    weights = keep.astype(dtype) if weights is None else weights
    total = jnp.sum(weights)
    return weights / jnp.where(total == 0, 1, total)


def _as_weights(weights: ArrayLike, keep: Array, dtype: Any) -> Array:
    """The weights of the rows, 0 for those that do not count."""
    weights = jnp.asarray(weights)
    check_real("weights", weights)
    if not broadcasts(weights.shape, keep.shape):
        raise ValueError(
            f"weights must broadcast to one value per row, shape {keep.shape}, got shape "
            f"{weights.shape}."
        )
    weights = placed_like(with_ndim(weights, keep.ndim), jax.typeof(keep).sharding.spec)
    return jnp.where(keep, weights.astype(dtype), 0)


def _as_labels(labels: ArrayLike, wanted: tuple[int, ...], num_classes: int) -> Array:
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == len(wanted) + 1:
        if labels.shape != (*wanted, num_classes):
            raise ValueError(
                f"labels must have the shape {(*wanted, num_classes)}, rows and classes, if they "
                f"are distributions, got shape {labels.shape}."
            )
        return labels
    check_integers("labels", labels)
    if labels.shape != wanted:
        raise ValueError(
            f"labels must have the shape of hidden without its last axis, {wanted}, got shape "
            f"{labels.shape}."
        )
    return at_least_int32(labels)
