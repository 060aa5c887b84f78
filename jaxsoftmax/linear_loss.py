"""Losses of a linear layer with many outputs, without ever holding all of its scores.

The rows are taken a chunk at a time: its scores are computed, turned into losses, and dropped.
Where the losses are summed, all that their gradients lack is the one cotangent of the sum, and so
the gradients are formed in the same pass: three matrix products in all, as with all the scores.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoftmax._differentiation import custom_vjp, hoist
from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import check_mask, check_real, known_number, output_dtype, public
from jaxsoftmax.losses import cross_entropy


@public
def linear_cross_entropy(
    hidden: Float[ArrayLike, "*rows D"],
    weight: Float[ArrayLike, "D V"],
    labels: Int[ArrayLike, "*rows"],
    *,
    bias: Float[ArrayLike, " V"] | None = None,
    loss: Callable[..., Array] = cross_entropy,
    reduction: Literal["mean", "sum", "none"] = "mean",
    where: Bool[ArrayLike, "*#rows"] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> Float[Array, ""] | Float[Array, "*rows"]:
    r"""The loss of `hidden @ weight + bias`, without ever holding all of these scores.

    .. math:: \frac{1}{N} \sum_n \mathrm{loss}(c \tanh((h_n W + b) / c), y_n)

    Placeholder.
    """
    layer = _as_layer(hidden, weight, bias)
    labels = _as_labels(labels, layer.hidden.shape[:-1])
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    keep = jnp.ones(labels.shape, bool) if where is None else check_mask(where, labels.shape)
    keep = jnp.broadcast_to(keep, labels.shape)
    length = layer.weight.shape[1] * (lax.axis_size(vocab_axis_name) if vocab_axis_name else 1)
    checkify.debug_check(
        jnp.all(((labels >= 0) & (labels < length)) | ~keep),
        f"labels must be classes from 0 to {length - 1}, got one out of range.",
    )

    hidden = jnp.where(keep[..., None], layer.hidden, 0)
    chunks = _Chunks.of(labels.size, _chunk_size(chunk_size, layer))
    hidden = chunks.split(hidden.reshape(-1, hidden.shape[-1]))
    labels_of_chunks = chunks.split(jnp.where(keep, labels, 0).reshape(-1))
    keep_of_chunks = chunks.split(keep.reshape(-1))

    def losses_of(scores: Array, labels: Array) -> Array:
        if logits_soft_cap is not None:
            scores = _soft_cap(scores, logits_soft_cap)
        axis = {} if vocab_axis_name is None else {"axis": (-1, vocab_axis_name)}
        return _check_losses(loss(scores, labels, **axis), labels, scores.dtype)

    wide = _wide(layer.weight.dtype)
    scores = vary_like(jnp.zeros((chunks.size, layer.weight.shape[1]), wide), hidden)
    pure, params, rest = hoist(losses_of, scores, labels_of_chunks[0])
    names = () if vocab_axis_name is None else (vocab_axis_name,)
    params = [vary_like(x, hidden, but=names) for x in params]
    operands = _Operands(hidden, layer.weight, layer.bias, params)
    rows = _Rows(labels_of_chunks, keep_of_chunks, rest)
    if reduction == "none":
        return chunks.join(_each(pure, operands, rows)).reshape(labels.shape)
    total = _total(pure, operands, rows)
    if reduction == "sum":
        return total
    count = jnp.sum(keep.astype(total.dtype))
    return total / jnp.maximum(count, 1)


class _Layer(NamedTuple):
    hidden: Array
    weight: Array
    bias: Array | None


def _as_layer(hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> _Layer:
    """The linear layer, checked, and brought to one dtype and to the same devices."""
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
    hidden, weight = hidden.astype(dtype), weight.astype(dtype)
    hidden = vary_like(hidden, weight)
    weight = vary_like(weight, hidden)
    if bias is None:
        return _Layer(hidden, weight, None)
    bias = jnp.asarray(bias)
    check_real("bias", bias)
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must have shape {weight.shape[1:]}, got shape {bias.shape}.")
    return _Layer(hidden, weight, vary_like(bias.astype(_wide(dtype)), weight))


def _as_labels(labels: ArrayLike, wanted: tuple[int, ...]) -> Array:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}.")
    if labels.shape != wanted:
        raise ValueError(
            f"labels must have the shape of hidden without its last axis, {wanted}, got shape "
            f"{labels.shape}."
        )
    return labels


def _soft_cap(scores: Array, cap: Any) -> Array:
    known = known_number(cap)
    if known is not None and not known > 0:
        raise ValueError(f"logits_soft_cap must be positive, got {known}.")
    cap = jnp.asarray(cap if known is None else known).astype(scores.dtype)
    return cap * jnp.tanh(scores / cap)


def _check_losses(losses: Any, labels: Array, dtype: Any) -> Array:
    if jnp.shape(losses) != labels.shape:
        raise ValueError(
            f"loss must give one value per row, shape {labels.shape}, got shape "
            f"{jnp.shape(losses)}."
        )
    return losses.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How rows are split into equal chunks; the last ones may be filled up.

    Attributes:
      rows: how many rows there are.
      count: how many chunks.
      size: rows per chunk.
    """

    rows: int
    count: int
    size: int

    @staticmethod
    def of(rows: int, size: int) -> "_Chunks":
        count = max(1, math.ceil(rows / size))
        return _Chunks(rows, count, max(1, math.ceil(rows / count)))

    def split(self, x: Array) -> Array:
        """Rows to chunks of rows; what is filled up is 0."""
        missing = self.count * self.size - self.rows
        if missing:
            x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(self.count, self.size, *x.shape[1:])

    def join(self, x: Array) -> Array:
        """Chunks of rows to rows."""
        return x.reshape(-1, *x.shape[2:])[: self.rows]


def _chunk_size(wanted: int | None, layer: _Layer) -> int:
    if wanted is None:
        return 128
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {wanted!r}.")
    return wanted


class _Operands(NamedTuple):
    """What has a gradient: hidden in chunks, and what all chunks share."""

    hidden: Array
    weight: Array
    bias: Array | None
    params: list[Array]


class _Rows(NamedTuple):
    """What has none."""

    labels: Array
    keep: Array
    rest: list[Array]


Losses = Callable[..., Array]  # (params, rest, scores, labels) -> one loss per row


def _scores(operands: _Operands, hidden: Array) -> Array:
    scores = _dot(hidden, operands.weight, ((1,), (0,)))
    return scores if operands.bias is None else scores + operands.bias[None]


def _dot(x: Array, y: Array, contracted: tuple[Sequence[int], Sequence[int]]) -> Array:
    return lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=_wide(x.dtype))


def _wide(dtype: Any) -> Any:
    """The dtype that sums are taken in: float32 for half precision."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _losses(losses: Losses, operands: _Operands, rows: _Rows) -> Array:
    def step(_: None, chunk: tuple[Array, Array, Array]) -> tuple[None, Array]:
        hidden, labels, keep = chunk
        values = losses(operands.params, rows.rest, _scores(operands, hidden), labels)
        return None, jnp.where(keep, values, 0)

    return lax.scan(jax.checkpoint(step), None, (operands.hidden, rows.labels, rows.keep))[1]


def _gradients(
    losses: Losses, operands: _Operands, rows: _Rows, ct: Array
) -> tuple[Array, _Operands]:
    """The losses, and their gradients under the cotangents `ct`, in one pass."""
    _, *shared = operands

    @jax.checkpoint
    def of_chunk(shared: Any, hidden: Array, labels: Array, keep: Array, ct: Array) -> Any:
        operands = _Operands(hidden, *shared)

        def of_scores(scores: Array, params: list[Array]) -> Array:
            return jnp.where(keep, losses(params, rows.rest, scores, labels), 0)

        values, pull_back = jax.vjp(of_scores, _scores(operands, hidden), operands.params)
        ct_scores, ct_params = pull_back(ct)
        ct_bias = None if operands.bias is None else jnp.sum(ct_scores, 0)
        ct_scores = ct_scores.astype(hidden.dtype)
        ct_weight = _dot(hidden, ct_scores, ((0,), (0,)))
        ct_hidden = _dot(ct_scores, operands.weight, ((1,), (1,)))
        return values, ct_hidden, [ct_weight, ct_bias, ct_params]

    def step(total: Any, chunk: Any) -> Any:
        values, ct_hidden, ct_shared = of_chunk(shared, *chunk)
        return jax.tree.map(jnp.add, total, ct_shared), (values, ct_hidden)

    start = jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, _wide(x.dtype)), x), shared)
    chunks = operands.hidden, rows.labels, rows.keep, ct
    total, (values, ct_hidden) = lax.scan(step, start, chunks)
    return values, _Operands(ct_hidden, *total)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _total(losses: Losses, operands: _Operands, rows: _Rows) -> Array:
    return jnp.sum(_losses(losses, operands, rows))


def _total_fwd(losses: Losses, operands: _Operands, rows: _Rows) -> tuple[Array, Any]:
    ones = jnp.ones(rows.labels.shape, _wide(operands.weight.dtype))
    values, gradients = _gradients(losses, operands, rows, ones)
    return jnp.sum(values), (gradients, jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), operands))


def _total_bwd(losses: Losses, residuals: Any, ct: Array) -> tuple[_Operands, None]:
    gradients, like = residuals
    return jax.tree.map(lambda g, x: (ct * g).astype(x.dtype), gradients, like), None


_total.defvjp(_total_fwd, _total_bwd)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _each(losses: Losses, operands: _Operands, rows: _Rows) -> Array:
    return _losses(losses, operands, rows)


def _each_fwd(losses: Losses, operands: _Operands, rows: _Rows) -> tuple[Array, Any]:
    return _each(losses, operands, rows), (operands, rows)


def _each_bwd(losses: Losses, residuals: Any, ct: Array) -> tuple[_Operands, None]:
    operands, rows = residuals
    _, gradients = _gradients(losses, operands, rows, ct)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands), None


_each.defvjp(_each_fwd, _each_bwd)
