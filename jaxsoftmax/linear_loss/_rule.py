"""Losses chunk by chunk, and their reverse rules: scores are computed, used, and dropped.

Where the losses are summed, all that their gradients lack is the one cotangent of the sum, and so
the gradients are formed in the same pass: three matrix products in all, as with all the scores.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import times
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._platforms import chosen
from jaxsoftmax._reductions import is_known, vary_like
from jaxsoftmax._scores import wide, wide_zeros, with_ndim
from jaxsoftmax._sharding import first_explicit
from jaxsoftmax.linear_loss._chunks import Chunks, SharedChunks, chunk_size_for, in_one
from jaxsoftmax.losses._targets import filled_scores, filled_targets


class Operands(NamedTuple):
    """What has a gradient: hidden in chunks, and what all chunks share."""

    hidden: Array
    weight: Array
    bias: Array | None
    params: list[Array]


class Labelled(NamedTuple):
    """What has none."""

    labels: Array
    keep: Array
    rest: list[Array]


Losses = Callable[..., Array]  # (params, rest, scores, labels) -> one loss per row


class Group(NamedTuple):
    """Chunks that are one on an accelerator.

    Attributes:
      chunks: all of them.
      together: how many are one.
      losses: makes the losses of all their rows.
    """

    chunks: Chunks | SharedChunks
    together: int
    losses: Losses


def _scores(operands: Operands, keep: Array) -> Array:
    scores = _dot(operands.hidden, operands.weight, ((operands.hidden.ndim - 1,), (0,)))
    if operands.bias is not None:
        scores = scores + with_ndim(operands.bias, scores.ndim)
    return _filled_scores(scores, keep)


# Checkpointed, so that the rows that are kept are remembered, not all their entries. In a loop
# nothing else computes the same, and a barrier would make XLA for TPU hold the scores.
_filled_scores = jax.checkpoint(filled_scores, prevent_cse=False)


def _dot(x: Array, y: Array, contracted: tuple[Sequence[int], Sequence[int]]) -> Array:
    return lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=wide(x.dtype))


def _losses(losses: Losses, operands: Operands, rows: Labelled) -> Array:
    def step(_: None, chunk: tuple[Array, Array, Array]) -> tuple[None, Array]:
        hidden, labels, keep = chunk
        here = operands._replace(hidden=hidden)
        return None, _losses_of_chunk(losses, here, rows.rest, labels, keep)

    return lax.scan(jax.checkpoint(step), None, (operands.hidden, rows.labels, rows.keep))[1]


def _losses_of_chunk(
    losses: Losses, operands: Operands, rest: list[Array], labels: Array, keep: Array
) -> Array:
    scores, labels = _scores(operands, keep), filled_targets(labels, keep)
    return jnp.where(keep, losses(operands.params, rest, scores, labels), 0)


def _gradients(
    losses: Losses, operands: Operands, rows: Labelled, ct: Array, held: int = 1
) -> tuple[Array, Operands]:
    """The losses, and their gradients under the cotangents `ct`, in one pass.

    Args:
      losses: makes losses of the scores of one chunk.
      operands: what the gradients are for.
      rows: what has none.
      ct: a number for each row.
      held: of how many chunks the gradients of the scores are held, and multiplied at once.
    """
    shared = operands.weight, operands.bias, operands.params

    def of_chunk(total: Any, chunk: Any) -> tuple[Any, Array, Array]:
        hidden, labels, keep, ct = chunk
        _, bias, params = shared

        def of_scores(scores: Array, params: list[Array]) -> Array:
            return jnp.where(keep, losses(params, rows.rest, scores, labels), 0)

        scores = _scores(operands._replace(hidden=hidden), keep)
        labels = filled_targets(labels, keep)
        values, pull_back = jax.vjp(of_scores, scores, params)
        ct_scores, ct_params = pull_back(vary_like(ct, values))
        ct_bias = None if bias is None else jnp.sum(ct_scores, range(ct_scores.ndim - 1))
        total = jax.tree.map(jnp.add, total, (ct_bias, ct_params))
        return total, values, ct_scores.astype(hidden.dtype)

    def multiplied(total: Array, hidden: Array, ct_scores: Array) -> tuple[Array, Array]:
        ct_hidden = _dot(ct_scores, operands.weight, ((ct_scores.ndim - 1,), (1,)))
        return _add_product(total, hidden, ct_scores), ct_hidden

    # Checkpointed, so that what is differentiated again keeps no scores.
    @jax.checkpoint
    def step(total: Any, chunk: Any) -> Any:
        weight, rest = total
        rest, values, ct_scores = of_chunk(rest, chunk)
        weight, ct_hidden = multiplied(weight, chunk[0], ct_scores)
        return (weight, rest), (values, ct_hidden)

    @jax.checkpoint
    def step_of_many(total: Any, chunks: Any) -> Any:
        weight, rest, all_held = total

        def hold(total: Any, chunk: Any) -> Any:
            rest, all_held = total
            i, *chunk = chunk
            rest, values, ct_scores = of_chunk(rest, chunk)
            return (rest, lax.dynamic_update_index_in_dim(all_held, ct_scores, i, 0)), values

        indices = jnp.arange(held)
        (rest, all_held), values = lax.scan(hold, (rest, all_held), (indices, *chunks))
        weight, ct_hidden = multiplied(weight, chunks[0], all_held)
        return (weight, rest, all_held), (values, ct_hidden)

    weight, *rest = jax.tree.map(wide_zeros, shared)
    chunks = operands.hidden, rows.labels, rows.keep, ct
    if held == 1:
        (weight, rest), found = lax.scan(step, (weight, tuple(rest)), chunks)
    else:
        chunks = jax.tree.map(lambda x: x.reshape(-1, held, *x.shape[1:]), chunks)
        shape = (*chunks[0].shape[1:-1], operands.weight.shape[1])
        space = vary_like(lax.empty(shape, operands.hidden.dtype), weight)
        (weight, rest, _), found = lax.scan(step_of_many, (weight, tuple(rest), space), chunks)
        found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    values, ct_hidden = found
    return values, Operands(ct_hidden, weight, *rest)


def _add_product(total: Array, hidden: Array, ct_scores: Array) -> Array:
    """`total + hidden.T @ ct_scores`."""
    # Of rows that XLA shares among devices, or of classes whose number is a symbol.
    if hidden.ndim > 2 or not is_known(total.size):
        return _add_whole_product(total, hidden, ct_scores)
    return chosen("add_product", _add_whole_product, total, hidden, ct_scores)


def _add_whole_product(total: Array, hidden: Array, ct_scores: Array) -> Array:
    of_rows = range(hidden.ndim - 1)
    return total + _dot(hidden, ct_scores, (of_rows, of_rows))


def _by_platform(
    function: Callable[..., Any],
    losses: Losses,
    group: Group | None,
    operands: Operands,
    rows: Labelled,
    *of_rows: Array,
) -> Any:
    """`function(losses, operands, rows, *of_rows)`, with larger chunks on accelerators.

    Args:
      function: `_losses` or `_gradients`.
      losses: makes losses of the scores of one chunk.
      group: the chunks that are one there, if some are.
      operands: as `function` takes them.
      rows: the same.
      of_rows: numbers for each row.
    """
    if group is None:
        return function(losses, operands, rows, *of_rows)
    grouped = functools.partial(group.chunks.grouped, together=group.together)
    apart = functools.partial(group.chunks.apart, together=group.together)

    def in_groups(operands: Operands, rows: Labelled, *of_rows: Array, **how: int) -> Any:
        found = function(
            group.losses,
            operands._replace(hidden=grouped(operands.hidden)),
            Labelled(grouped(rows.labels), grouped(rows.keep), rows.rest),
            *map(grouped, of_rows),
            **how,
        )
        if not isinstance(found, tuple):
            return apart(found)
        values, gradients = found
        return apart(values), gradients._replace(hidden=apart(gradients.hidden))

    # Traced once for all platforms that take it.
    general = jax.jit(in_groups, inline=True)
    count = operands.hidden.shape[0] // group.together
    makes_pairs = function is _gradients and is_known(count) and count % 2 == 0
    ways = {
        "one_by_one": functools.partial(function, losses),
        "in_pairs": functools.partial(in_groups, held=2) if makes_pairs else general,
    }
    return chosen("chunks", general, operands, rows, *of_rows, **ways)


def _one_by_one(losses: Losses, count: int, size: int) -> Losses:
    """The losses of so many chunks of so many rows, one after the other in one chunk."""

    def of_group(params: list[Array], rest: list[Array], scores: Array, labels: Array) -> Array:
        by_chunk = [x.reshape(count, size, *x.shape[1:]) for x in (scores, labels)]
        return jax.vmap(losses, in_axes=(None, None, 0, 0))(params, rest, *by_chunk).reshape(-1)

    return of_group


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def total(
    losses: Losses, group: Group | None, operands: Operands, rows: Labelled, weights: Array
) -> Array:
    """The weighted sum of all losses. Its gradients are formed in the forward pass."""
    return jnp.sum(times(weights, _by_platform(_losses, losses, group, operands, rows)))


def _total_fwd(
    losses: Losses, group: Group | None, operands: Operands, rows: Labelled, weights: Array
) -> tuple[Array, Any]:
    values, gradients = _by_platform(_gradients, losses, group, operands, rows, weights)
    return jnp.sum(times(weights, values)), (gradients, operands, values)


def _total_bwd(
    losses: Losses, group: Group | None, residuals: Any, ct: Array
) -> tuple[Operands, None, Array]:
    gradients, operands, values = residuals
    scaled = jax.tree.map(lambda g, x: (ct * g).astype(x.dtype), gradients, operands)
    # As that of `times`.
    return scaled, None, ct * jnp.where(jnp.isinf(values), 0, values)


total.defvjp(_total_fwd, _total_bwd)


def _total_batch(
    axis_size: int,
    batched: Any,
    losses: Losses,
    group: Group | None,
    operands: Operands,
    rows: Labelled,
    weights: Array,
) -> Array | None:
    values = _each_batch(axis_size, batched[:2], losses, group, operands, rows)
    if values is None:
        return None
    weights = weights if batched[2] else weights[None]
    return jnp.sum(times(weights, values), range(1, values.ndim))


total.defbatch(_total_batch)


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def each(losses: Losses, group: Group | None, operands: Operands, rows: Labelled) -> Array:
    """The losses. The scores are computed once more for their gradients."""
    return _by_platform(_losses, losses, group, operands, rows)


def _each_fwd(
    losses: Losses, group: Group | None, operands: Operands, rows: Labelled
) -> tuple[Array, Any]:
    return each(losses, group, operands, rows), (operands, rows)


def _each_bwd(
    losses: Losses, group: Group | None, residuals: Any, ct: Array
) -> tuple[Operands, None]:
    def pulled(point: tuple[Operands, Labelled], ct: Array) -> Operands:
        return _by_platform(_gradients, losses, group, *point, ct)[1]

    # A loop of its own for the transpose: JAX's would keep for each chunk what they all add to.
    gradients = linear_pair(pulled, functools.partial(_pushed, losses), residuals, ct)
    operands, _ = residuals
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands), None


def _pushed(losses: Losses, point: tuple[Operands, Labelled], tangents: Operands) -> Array:
    """The tangents of the losses, given those of the operands."""
    operands, rows = point

    @jax.checkpoint
    def step(_: None, chunk: Any) -> tuple[None, Array]:
        hidden, of_hidden, labels, keep = chunk
        here, along = operands._replace(hidden=hidden), tangents._replace(hidden=of_hidden)
        along = jax.tree.map(lambda t, x: t.astype(x.dtype), along, here)

        def of_chunk(operands: Operands) -> Array:
            return _losses_of_chunk(losses, operands, rows.rest, labels, keep)

        return None, jax.jvp(of_chunk, (here,), (along,))[1]

    chunks = operands.hidden, tangents.hidden, rows.labels, rows.keep
    return lax.scan(step, None, chunks)[1]


each.defvjp(_each_fwd, _each_bwd)


def _each_batch(
    axis_size: int,
    batched: Any,
    losses: Losses,
    group: Group | None,
    operands: Operands,
    rows: Labelled,
) -> Array | None:
    """Under `vmap`: more rows, if that is all that there are more of, and no larger chunks."""
    batched_operands, batched_rows = batched
    of_rows = (batched_operands.hidden, batched_rows.labels, batched_rows.keep)
    if any(jax.tree.leaves((batched_operands[1:], batched_rows.rest))):
        return None  # other weights for other rows
    if rows.keep.ndim - batched_rows.keep != 2:
        return None  # chunks that XLA shares among devices
    if first_explicit((operands.hidden, rows.labels, rows.keep)) is not None:
        return None  # each device maps over its own

    def chunks_of(x: Array, is_batched: bool) -> Array:
        x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    arrays = (operands.hidden, rows.labels, rows.keep)
    hidden, labels, keep = map(chunks_of, arrays, of_rows)
    count, size = keep.shape
    # Small chunks are grouped, or each would be a matrix product of few rows.
    together = max(1, chunk_size_for(operands.weight.shape[1]) // size)
    groups = Chunks.of((count,), together)

    def grouped(x: Array) -> Array:
        x = groups.split(x)
        return x.reshape(groups.count, groups.size * size, *x.shape[3:])

    if group is not None:
        many = in_one(groups.count, groups.size * size, operands.weight.shape[1])
        of_many = _one_by_one(losses, many * groups.size, size)
        group = Group(groups, many, of_many) if many > 1 else None
    operands = operands._replace(hidden=grouped(hidden))
    rows = Labelled(grouped(labels), grouped(keep), rows.rest)
    values = each(_one_by_one(losses, groups.size, size), group, operands, rows)
    return values.reshape(-1, size)[:count].reshape(axis_size, -1, size)


each.defbatch(_each_batch)
