"""One block of query rows with all the keys it sees: its output, and its pullback.

This is all that a hand-written kernel would have to replace.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._reductions import vary_like
from jaxsoftmax._scores import soft_cap, wide
from jaxsoftmax.attention import _dropout, _products
from jaxsoftmax.attention._bands import Band

Parts = Mapping[str, Array]
# Of the first row and the parts of the operands that the block sees.
Block = Callable[..., tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What happens between the two products. Derivatives flow to all arrays that this holds.

    Attributes:
      normalizer: makes weights of scores.
      scale: multiplies the products of queries and keys, None: nothing does.
      row_value: makes a number of each row of scores, if that is asked for, too.
      score_mod: changes a score, given its indices.
      mask_mod: tells whether a score takes part, given its indices.
      before: how far a query sees before its own position, None: without limit.
      after: the same, after its own position.
      soft_cap: bounds the scores, None: without bounds.
      sink: one virtual score per head, (N, 1, 1), if there is one.
      dropout_rate: the share of the weights that are dropped.
      dropout_key: a key of `jax.random`, if any are.
      kv_names: the mesh axes that the keys are spread over.
      first: the indices of the first batch, head, query and key.
      guard: whether the normalizer is not to see rows of which nothing takes part.
    """

    normalizer: Callable[..., Array]
    scale: ArrayLike | None
    row_value: Callable[..., Array] | None = None
    score_mod: Callable[..., Array] | None = None
    mask_mod: Callable[..., Array] | None = None
    before: int | None = None
    after: int | None = None
    soft_cap: ArrayLike | None = None
    sink: Array | None = None
    dropout_rate: float = 0.0
    dropout_key: Array | None = None
    kv_names: tuple[str, ...] = ()
    first: tuple[ArrayLike, ...] = (0, 0, 0, 0)
    guard: bool = True


def attend(rules: Rules, band: Band, first_row: Array, part: Parts) -> tuple[Array, ...]:
    """The output of a block, (B, N, rows, V), and the log-sums (B, N, rows) if they are wanted.

    Args:
      rules: what makes weights of scores.
      band: the band that the block belongs to.
      first_row: the position of its first query.
      part: what the block sees of each operand that there is.
    """
    scores = _scores(rules, part)
    places = _places(rules, band, first_row, scores.shape)
    if rules.score_mod is not None:
        scores = _modified(rules.score_mod, scores, places)
    options: dict[str, Any] = {
        "axis": (-1, *rules.kv_names) if rules.kv_names else -1,
        "where": _visible(rules, part, places),
    }
    if rules.sink is not None:
        options["sink"] = rules.sink
    if "log_sum" in part:
        options["log_sum"] = part["log_sum"]
    weights = _weights(rules, scores, options)
    if rules.dropout_key is not None:
        scale = _dropout.scale(rules.dropout_rate, rules.dropout_key, places)
        weights = weights * scale.astype(weights.dtype)
    out = _mix(weights, part["value"])
    return (out,) if rules.row_value is None else (out, rules.row_value(scores, **options))


def pull_back(
    block: Block,
    wanted: Sequence[int],
    first_row: Array,
    parts: Sequence[Array],
    ct: tuple[Array, ...],
) -> list[Array]:
    """The cotangents of the parts at `wanted`; the block is computed once more."""
    of_wanted = _of_wanted(block, wanted, first_row, parts)
    _, pullback = jax.vjp(of_wanted, *(parts[i] for i in wanted))
    return list(pullback(ct))


def push_forward(
    block: Block,
    wanted: Sequence[int],
    first_row: Array,
    parts: Sequence[Array],
    tangents: Sequence[Array],
) -> tuple[Array, ...]:
    """The tangents of the outputs, given those of the parts at `wanted`."""
    of_wanted = _of_wanted(block, wanted, first_row, parts)
    return jax.jvp(of_wanted, [parts[i] for i in wanted], list(tangents))[1]


def _of_wanted(
    block: Block, wanted: Sequence[int], first_row: Array, parts: Sequence[Array]
) -> Callable[..., tuple[Array, ...]]:
    def of_wanted(*args: Array) -> tuple[Array, ...]:
        merged = list(parts)
        for i, arg in zip(wanted, args, strict=True):
            merged[i] = arg
        return block(first_row, *merged)

    return of_wanted


def is_smooth(x: Array) -> bool:
    """Whether `x` can have a derivative."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _scores(rules: Rules, part: Parts) -> Array:
    query, key = part["query"], part["key"]
    batch, heads, rows, _ = query.shape
    dtype = wide(query.dtype)
    # The heads that share keys are rows of one product.
    grouped = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    scores = _products.scores(grouped, key).reshape(batch, heads, rows, -1)
    if rules.scale is not None:
        scores = scores * rules.scale
    if "bias" in part:
        scores = scores + part["bias"].astype(dtype)
    if rules.soft_cap is not None:
        capped = soft_cap(scores, rules.soft_cap)
        # A bias of -inf excludes; it is not to be capped.
        scores = jnp.where(scores == -jnp.inf, scores, capped) if "bias" in part else capped
    return scores


def _places(
    rules: Rules, band: Band, first_row: Array, shape: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """The indices of batch, head, query and key, one vector each."""
    batch, heads, rows, keys = (jnp.arange(n, dtype=jnp.int32) for n in shape)
    here = batch, heads, band.row(first_row, rows), keys + band.key_start(first_row)
    batch, heads, rows, keys = (x + first for x, first in zip(here, rules.first, strict=True))
    return batch, heads, rows, keys


def _modified(score_mod: Callable[..., Array], scores: Array, places: Sequence[Array]) -> Array:
    modified = jnp.asarray(_over_all(score_mod, scores)(scores, *places))
    if modified.shape != scores.shape:
        raise ValueError(
            "score_mod must return one number per score, got an array of shape "
            f"{modified.shape[4:]}."
        )
    return modified.astype(scores.dtype)


def _over_all(function: Callable[..., Array], *scores: Array) -> Callable[..., Array]:
    """Maps a function of scores and four indices over vectors of indices."""
    for axis in (3, 2, 1, 0):
        over = [0 if i == axis else None for i in range(4)]
        function = jax.vmap(function, in_axes=(*(0 for _ in scores), *over))
    return function


def _visible(rules: Rules, part: Parts, places: Sequence[Array]) -> Array:
    """Where a key takes part, in a shape that broadcasts to that of the scores."""
    query = places[2][None, None, :, None]
    key = places[3][None, None, None, :]
    conditions = []
    if rules.after is not None:
        conditions.append(key <= query + rules.after)
    if rules.before is not None:
        conditions.append(key >= query - rules.before)
    if "query_lengths" in part:
        conditions.append(query < part["query_lengths"])
    if "key_lengths" in part:
        conditions.append(key < part["key_lengths"])
    if "query_segments" in part:
        conditions.append(part["query_segments"] == part["key_segments"])
    if "mask" in part:
        conditions.append(part["mask"])
    if rules.mask_mod is not None:
        conditions.append(_mapped_mask(rules.mask_mod, places))
    where = jnp.ones((1, 1, 1, 1), bool)
    for condition in conditions:
        where = where & condition
    return where


def _mapped_mask(mask_mod: Callable[..., Array], places: Sequence[Array]) -> Array:
    mask = jnp.asarray(_over_all(mask_mod)(*places))
    if mask.dtype != jnp.bool_ or mask.ndim != 4:
        raise TypeError(
            f"mask_mod must return one boolean per score, got dtype {mask.dtype} and shape "
            f"{mask.shape[4:]}."
        )
    return mask


def _weights(rules: Rules, scores: Array, options: dict[str, Any]) -> Array:
    if not rules.guard:
        return rules.normalizer(scores, **options)
    where = options["where"]
    seen = _any_key(rules, where)
    options = options | {"where": where | ~seen}
    weights = rules.normalizer(jnp.where(seen, scores, 0), **options)
    if jnp.shape(weights) != scores.shape:
        raise ValueError(
            f"normalizer must return an array of the shape of the scores {scores.shape}, got "
            f"shape {jnp.shape(weights)}."
        )
    return jnp.where(seen, weights, 0)


def _any_key(rules: Rules, where: Array) -> Array:
    """Whether a query sees anything."""
    seen = jnp.any(where, -1, keepdims=True)
    if not rules.kv_names:
        return seen
    seen = vary_like(seen, lax.axis_index(rules.kv_names))
    return lax.pmax(seen.astype(jnp.int32), rules.kv_names) > 0


def _mix(weights: Array, value: Array) -> Array:
    """The values, weighted and summed."""
    batch, heads, rows, keys = weights.shape
    grouped = weights.reshape(batch, value.shape[1], -1, keys).astype(value.dtype)
    out = _products.rows(grouped, value)
    return out.reshape(batch, heads, rows, -1)
