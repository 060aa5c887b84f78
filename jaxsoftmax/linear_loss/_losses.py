"""The losses of the rows of one device, or their sum, chunk by chunk."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._closed import closed_over
from jaxsoftmax._configured import arrays_in
from jaxsoftmax._elementary import nan_unless, times
from jaxsoftmax._reductions import is_known, untracked, vary_like
from jaxsoftmax._scores import soft_cap, wide
from jaxsoftmax.linear_loss._chunks import chunks_of_rows, in_one
from jaxsoftmax.linear_loss._layer import Layer, varying_alike
from jaxsoftmax.linear_loss._rule import Group, Labelled, Operands, each, total


@dataclasses.dataclass(frozen=True)
class How:
    """What becomes of scores.

    Attributes:
      loss: the function that makes losses of them.
      soft_cap: bounds them, None: without bounds.
      names: the mesh axes that the classes are spread over.
      chunk_size: rows per chunk, None: as sizes suggest.
      in_sum: whether the losses are summed.
    """

    loss: Callable[..., Array]
    soft_cap: Any
    names: tuple[str, ...]
    chunk_size: int | None
    in_sum: bool

    def losses(self, scores: Array, labels: Array) -> Array:
        """One loss per row."""
        if self.soft_cap is not None:
            scores = soft_cap(scores, self.soft_cap)
        axis = {"axis": (-1, *self.names)} if self.names else {}
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            return _check_losses(self.loss(scores, labels, **axis), scores)
        # A loss of one's own might take -1 for the last class.
        known = (labels >= 0) & (labels < number_of_classes(scores, self.names))
        losses = self.loss(scores, jnp.where(known, labels, 0), **axis)
        losses = jnp.where(known, _check_losses(losses, scores), 0)
        return nan_unless(known, losses)


def summed_or_each(
    how: How, layer: Layer, labels: Array, keep: Array, weights: Array | None
) -> Array:
    """The sum of all losses, or each of them, as `how` wants it; weighted, if there are weights."""
    if weights is None:
        weights = jnp.ones(keep.shape, wide(layer.hidden.dtype))
    layer = varying_alike(layer, labels, keep, weights)
    chunks = chunks_of_rows(layer.hidden, how.chunk_size, layer.weight.shape[1])
    if not is_known(chunks.count) or chunks.count > 1:
        _refuse_what_is_of_rows(how.loss)
    hidden, labels, keep, weights = map(chunks.split, (layer.hidden, labels, keep, weights))
    together = 1
    if how.chunk_size is None:
        together = in_one(chunks.count, chunks.size, layer.weight.shape[1])
    losses_of = how.losses
    for _ in keep.shape[2:]:  # chunks that XLA shares among devices keep all axes of rows
        losses_of = jax.vmap(losses_of)

    def chunk_of(together: int) -> tuple[Array, Array]:
        of_labels, of_rows = (chunks.grouped(x[:together], together)[0] for x in (labels, keep))
        shape = (*of_rows.shape, layer.weight.shape[1])
        return vary_like(jnp.zeros(shape, wide(hidden.dtype)), hidden), of_labels

    counts = [1] if together == 1 else [1, together]
    (pure, *joined), params, rest = closed_over(losses_of, *map(chunk_of, counts))
    group = Group(chunks, together, joined[0]) if joined else None
    operands = Operands(hidden, layer.weight, layer.bias, params)
    rows = Labelled(labels, keep, rest)
    if not how.in_sum:
        return chunks.join(times(weights, each(pure, group, operands, rows)))
    # What the loss closes over may be shared by devices that have different rows. Its gradient is
    # then summed over them, and so the cotangents, which may differ, have to be met before that.
    if all(vary_like(x, hidden, but=how.names) is x for x in params):
        weights = vary_like(weights, hidden, but=how.names)
        losses = total(pure, group, operands, rows, weights)
        # Its rule was made of the same cotangent on all devices, so they are to have the same.
        names = untracked(how.names)
        return lax.pmean(losses, names) if names else losses
    return jnp.sum(times(weights, each(pure, group, operands, rows)))


def _refuse_what_is_of_rows(loss: Any) -> None:
    """Raises for an array in a partial of one of our losses that has an axis of rows."""
    for name, x in arrays_in(loss).items():
        if x.ndim > 1 and x.shape[-2] != 1:
            raise ValueError(
                f"loss must hold nothing per row, since it is called on chunks of rows, got {name} "
                f"of shape {x.shape}."
            )


def number_of_classes(scores: Array, names: Sequence[str]) -> int:
    """How many there are on all devices, given the scores of one or its weights."""
    return scores.shape[-1] * math.prod(lax.axis_size(name) for name in names)


def _check_losses(losses: Any, scores: Array) -> Array:
    wanted = scores.shape[:-1]
    if jnp.shape(losses) != wanted:
        raise ValueError(
            f"loss must return one value per row, shape {wanted}, got shape {jnp.shape(losses)}."
        )
    return losses.astype(scores.dtype)
