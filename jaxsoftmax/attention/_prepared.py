"""Scores of one block of queries with the keys it sees, and what is to be made of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._configured import Configured
from jaxsoftmax._form import Form
from jaxsoftmax._reductions import Entries, Rows, vary_like
from jaxsoftmax._scores import as_array, soft_cap, wide
from jaxsoftmax._threshold import IDENTITY, form_of
from jaxsoftmax.attention import _dropout, _products
from jaxsoftmax.attention._bands import Band

Parts = Mapping[str, Array]
# The positions of the first batch, head and query of a block.
First = tuple[Any, Any, Any]

# What the operands that hold the arrays of a normalizer are called, before the names of those.
OF_NORMALIZER = "normalizer "


def of_normalizer(part: Parts) -> tuple[dict[str, Array], dict[str, Array]]:
    """The arrays of the normalizer, by their own names, and all others."""
    start = len(OF_NORMALIZER)
    own = {name[start:]: x for name, x in part.items() if name.startswith(OF_NORMALIZER)}
    return own, {name: x for name, x in part.items() if not name.startswith(OF_NORMALIZER)}


@dataclasses.dataclass(frozen=True)
class Rules:
    """What happens between the two products. Derivatives flow to all arrays that this holds.

    Attributes:
      normalizer: makes weights of scores.
      scale: multiplies the products of queries and keys, None: nothing does.
      row_value: makes a number, or some, of each row of scores, if that is asked for, too.
      score_mod: changes a score, given its indices.
      mask_mod: tells whether a score takes part, given its indices.
      before: how far a query sees before its own position, None: without limit.
      after: the same, after its own position.
      soft_cap: bounds the scores, None: without bounds.
      dropout_rate: the share of the weights that are dropped.
      dropout_key: a key of `jax.random`, if any are.
      kv_names: the mesh axes that the keys are spread over.
      offset: the position of the first query, as far as it is known while tracing.
      first: the indices of the first batch and head, the positions of the first query and key.
      guard: whether the normalizer is not to see rows of which nothing takes part.
    """

    normalizer: Callable[..., Array]
    scale: ArrayLike | None
    row_value: Callable[..., Array | tuple[Array, ...]] | None = None
    score_mod: Callable[..., Array] | None = None
    mask_mod: Callable[..., Array] | None = None
    before: int | None = None
    after: int | None = None
    soft_cap: ArrayLike | None = None
    dropout_rate: float = 0.0
    dropout_key: Array | None = None
    kv_names: tuple[str, ...] = ()
    offset: int = 0
    first: tuple[ArrayLike, ...] = (0, 0, 0, 0)
    guard: bool = True


class Factors(NamedTuple):
    """What scores are the product of.

    Attributes:
      query: the queries.
      key: the keys.
      scale: multiplies the products.
      where: which of them take part by their places, (1, 1, rows, S); None: all do.
    """

    query: Array
    key: Array
    scale: Array
    where: Array | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "entries", "params", "row_values", "dropout", "factors"),
    meta_fields=("form", "is_relative"),
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is made of the operands before it is normalized.

    Attributes:
      form: what makes weights of the entries; weights are those of others.
      rows: the rows of the entries.
      entries: the scores, (B, N, rows, S), and those of a sink.
      params: the parameters of the form.
      row_values: numbers per row, (B, N, rows), if they were asked for.
      dropout: what weights are multiplied by, if any are dropped.
      factors: of the scores, if these are products and nothing else.
      is_relative: whether the cotangents of the scores of each row sum to 0, and no key is known to
        be seen by nobody: then that of a query is the same if all keys lose the same.
    """

    form: Form
    rows: Rows
    entries: Entries
    params: tuple[Array, ...]
    row_values: tuple[Array, ...]
    dropout: Array | None
    factors: Factors | None
    is_relative: bool

    def after_dropout(self, weights: Array) -> Array:
        """The weights after dropout."""
        return weights if self.dropout is None else weights * self.dropout.astype(weights.dtype)


def prepare(rules: Rules, band: Band, first: First, part: Parts) -> Prepared:
    """Scores of queries and keys, masked.

    Args:
      rules: what makes weights of scores.
      band: the band that the block belongs to.
      first: where the block begins.
      part: what the block sees of each operand that there is.
    """
    scores = _scores(rules, part)
    places = _places(rules, band, first, scores.shape)
    if rules.score_mod is not None:
        score_mod = _at_positions(rules.score_mod, part, places)
        scores = modified(_over_all(score_mod, scores), scores, places, "bias" in part)
    normalizer, row_value = _with_arrays(rules, part)
    options: dict[str, Any] = {
        "axis": (-1, *rules.kv_names) if rules.kv_names else -1,
        "where": visible(rules, part, places),
    }
    if "sink" in part:
        options["sink"] = part["sink"]
    if "threshold" in part:
        options["threshold"] = part["threshold"]
    found = form_of(normalizer, scores, options) if isinstance(normalizer, Configured) else None
    if found is None:
        weights = _weights(rules, normalizer, scores, options)
        found = IDENTITY, Rows((weights.ndim - 1,)), (weights,), ()
    dropout = None
    if rules.dropout_key is not None:
        offset = part.get("query_offset", 0)
        dropout = _dropout.scale(rules.dropout_rate, rules.dropout_key, places, offset)
    row_values = () if row_value is None else row_value(scores, **options)
    row_values = row_values if isinstance(row_values, tuple) else (row_values,)
    is_relative = not row_values and _is_relative(rules, part, *found[:3])
    factors = _factors(rules, part, options["where"])
    return Prepared(*found, row_values, dropout, factors, is_relative)


def _are_products(rules: Rules, part: Parts) -> bool:
    """Whether nothing but its place makes a score more than a product, or excludes it."""
    changes = rules.score_mod, rules.mask_mod, rules.soft_cap
    others = "bias", "mask", "query_lengths", "key_lengths", "query_segments"
    return all(x is None for x in changes) and not any(name in part for name in others)


def _is_relative(rules: Rules, part: Parts, form: Form, rows: Rows, entries: Entries) -> bool:
    """Whether the cotangents of the keys' scores of each row are known to sum to 0."""
    # Weights of any sum, beside that of a sink, or of a part of a row.
    if form.tau is not None or len(entries) > 1 or rows.names:
        return False
    return "query_offset" not in part and _are_products(rules, part)


def _factors(rules: Rules, part: Parts, where: Array) -> Factors | None:
    own = rules.normalizer
    if not isinstance(own, Configured) or own.options or of_normalizer(part)[0]:
        return None  # a temperature divides scores
    is_cut = rules.before is not None or rules.after is not None
    if (is_cut and "query_offset" in part) or not _are_products(rules, part):
        return None
    scale = jnp.asarray(1 if rules.scale is None else rules.scale, wide(part["query"].dtype))
    return Factors(part["query"], part["key"], scale, where if is_cut else None)


def _with_arrays(
    rules: Rules, part: Parts
) -> tuple[Callable[..., Array], Callable[..., Any] | None]:
    """The normalizer with its arrays, which are operands, and what makes a number of each row."""
    normalizer, row_value = rules.normalizer, rules.row_value
    if not isinstance(normalizer, Configured):
        return normalizer, row_value
    own, _ = of_normalizer(part)
    normalizer = normalizer.with_arrays(own)
    if isinstance(row_value, Configured):
        row_value = normalizer.of(row_value.function)
    return normalizer, row_value


def _scores(rules: Rules, part: Parts) -> Array:
    query, key = part["query"], part["key"]
    dtype = wide(query.dtype)
    grouped = _products.grouped(query, key.shape[1])
    scores = _products.apart(_products.scores(grouped, key), query.shape[1])
    if rules.scale is not None:
        scores = scores * rules.scale
    if "bias" in part:
        scores = scores + part["bias"].astype(dtype)
    if rules.soft_cap is not None:
        scores = soft_cap(scores, rules.soft_cap)
    return scores


def _places(
    rules: Rules, band: Band, first: First, shape: tuple[int, ...]
) -> tuple[Array, Array, Array, Array]:
    """The indices of batch, head, query and key, one vector each."""
    batch, heads, rows, keys = (jnp.arange(n, dtype=jnp.int32) for n in shape)
    first_batch, first_head, first_row = first
    here = (
        batch + first_batch,
        heads + first_head,
        band.row(first_row, rows),
        keys + band.key_start(first_row),
    )
    batch, heads, rows, keys = (x + first for x, first in zip(here, rules.first, strict=True))
    return batch, heads, rows, keys


def modified(
    score_mod: Callable[..., Array], scores: Array, places: Sequence[Array], has_bias: bool
) -> Array:
    """What a function, mapped over scores and their places, makes of them.

    Where there is a bias, one of -inf excludes, whatever the function makes of it.
    """
    is_number = scores > -jnp.inf if has_bias else None
    given = scores if is_number is None else jnp.where(is_number, scores, 0)
    found = as_array(score_mod(given, *places), "the result of score_mod")
    if found.dtype == jnp.bool_:
        raise TypeError(
            "score_mod must return a number per score, got booleans: mask_mod tells which scores "
            "take part."
        )
    if found.shape != scores.shape:
        raise ValueError(
            "score_mod must return one number per score, got an array of shape "
            f"{found.shape[scores.ndim :]}."
        )
    found = found.astype(scores.dtype)
    return found if is_number is None else jnp.where(is_number, found, scores)


def _at_positions(
    function: Callable[..., Array], part: Parts, places: Sequence[Array]
) -> Callable[..., Array]:
    """The function, given positions of queries where they are counted from an offset."""
    if "query_offset" not in part:
        return function
    offset, first_batch = part["query_offset"].reshape(-1), places[0][0]

    def moved(*args: Array) -> Array:
        *scores, batch, head, row, key = args
        return function(*scores, batch, head, row + offset[batch - first_batch], key)

    return moved


def _over_all(function: Callable[..., Array], *scores: Array) -> Callable[..., Array]:
    """Maps a function of scores and four indices over vectors of indices."""
    for axis in (3, 2, 1, 0):
        over = [0 if i == axis else None for i in range(4)]
        function = jax.vmap(function, in_axes=(*(0 for _ in scores), *over))
    return function


def visible(rules: Rules, part: Parts, places: Sequence[Array]) -> Array:
    """Where a key takes part, in a shape that broadcasts to that of the scores."""
    query = places[2][None, None, :, None]
    key = places[3][None, None, None, :]
    position = query + part["query_offset"] if "query_offset" in part else query
    conditions = []
    if rules.after is not None:
        conditions.append(key <= position + rules.after)
    if rules.before is not None:
        conditions.append(key >= position - rules.before)
    if "query_lengths" in part:
        conditions.append(query - rules.offset < part["query_lengths"])
    if "key_lengths" in part:
        conditions.append(key < part["key_lengths"])
    if "query_segments" in part:
        conditions.append(part["query_segments"] == part["key_segments"])
    if "mask" in part:
        conditions.append(part["mask"])
    if rules.mask_mod is not None:
        mask_mod = _at_positions(rules.mask_mod, part, places)
        conditions.append(mapped_mask(_over_all(mask_mod), places, 4))
    where = jnp.ones((1, 1, 1, 1), bool)
    for condition in conditions:
        where = where & condition
    return where


def mapped_mask(mask_mod: Callable[..., Array], places: Sequence[Array], ndim: int) -> Array:
    """Where a function, mapped over places, is true; of so many axes."""
    mask = jnp.asarray(mask_mod(*places))
    if mask.dtype != jnp.bool_ or mask.ndim != ndim:
        raise TypeError(
            f"mask_mod must return one boolean per score, got dtype {mask.dtype} and shape "
            f"{mask.shape[ndim:]}."
        )
    return mask


def _weights(
    rules: Rules, normalizer: Callable[..., Array], scores: Array, options: dict[str, Any]
) -> Array:
    seen = True
    if rules.guard:
        seen = _any_key(rules, options["where"] & (scores != -jnp.inf))
        options = options | {"where": options["where"] | ~seen}
        scores = jnp.where(seen, scores, 0)
    weights = normalizer(scores, **options)
    if jnp.shape(weights) != scores.shape:
        raise ValueError(
            f"normalizer must return an array of the shape of the scores {scores.shape}, got "
            f"shape {jnp.shape(weights)}."
        )
    return jnp.where(seen, weights, 0) if rules.guard else weights


def _any_key(rules: Rules, where: Array) -> Array:
    """Whether a query sees anything."""
    seen = jnp.any(where, -1, keepdims=True)
    if not rules.kv_names:
        return seen
    seen = vary_like(seen, lax.axis_index(rules.kv_names))
    return lax.pmax(seen.astype(jnp.int32), rules.kv_names) > 0
