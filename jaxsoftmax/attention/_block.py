"""One block of query rows with all the keys it sees: its output, and its derivatives.

Scores are made of the operands by what `jax.vjp` can differentiate. Then they are normalized, and
mixed with the values. If the normalizer has a form, its threshold is kept: the reverse rule makes
the weights of it, and solves for nothing again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax import _threshold
from jaxsoftmax._configured import Configured
from jaxsoftmax._form import Form
from jaxsoftmax._reductions import Entries, Rows, is_known, vary_like
from jaxsoftmax._scores import soft_cap, wide
from jaxsoftmax._threshold import IDENTITY, form_of
from jaxsoftmax.attention import _dropout, _products
from jaxsoftmax.attention._bands import Band
from jaxsoftmax.mappings._softmax import SOFTMAX

Parts = Mapping[str, Array]
# The positions of the first batch, head and query of a block.
First = tuple[Any, Any, Any]

# What the operands that hold the arrays of a normalizer are called, before the names of those.
OF_NORMALIZER = "normalizer "


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
      dropout_rate: the share of the weights that are dropped.
      dropout_key: a key of `jax.random`, if any are.
      kv_names: the mesh axes that the keys are spread over.
      offset: the position of the first query, as far as it is known while tracing.
      first: the indices of the first batch and head, the positions of the first query and key.
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
    dropout_rate: float = 0.0
    dropout_key: Array | None = None
    kv_names: tuple[str, ...] = ()
    offset: int = 0
    first: tuple[ArrayLike, ...] = (0, 0, 0, 0)
    guard: bool = True


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "entries", "params", "row_values", "dropout", "factors"),
    meta_fields=("form",),
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is made of the operands before it is normalized.

    Attributes:
      form: what makes weights of the entries; weights are those of others.
      rows: the rows of the entries.
      entries: the scores, (B, N, rows, S), and those of a sink.
      params: the parameters of the form.
      row_values: a number per row, (B, N, rows), if it was asked for.
      dropout: what weights are multiplied by, if any are dropped.
      factors: queries, keys and a scale, if the scores are their product and nothing else.
    """

    form: Form
    rows: Rows
    entries: Entries
    params: tuple[Array, ...]
    row_values: tuple[Array, ...]
    dropout: Array | None
    factors: tuple[Array, Array, Array] | None

    def kept(self, weights: Array) -> Array:
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
        scores = _modified(_at_positions(rules.score_mod, part, places), scores, places)
    normalizer, row_value = _with_arrays(rules, part)
    options: dict[str, Any] = {
        "axis": (-1, *rules.kv_names) if rules.kv_names else -1,
        "where": _visible(rules, part, places),
    }
    if "sink" in part:
        options["sink"] = part["sink"]
    if "log_sum" in part:
        options["log_sum"] = part["log_sum"]
    found = form_of(normalizer, scores, options) if isinstance(normalizer, Configured) else None
    if found is None:
        weights = _weights(rules, normalizer, scores, options)
        found = IDENTITY, Rows((weights.ndim - 1,)), (weights,), ()
    dropout = None
    if rules.dropout_key is not None:
        dropout = _dropout.scale(rules.dropout_rate, rules.dropout_key, places)
    row_values = () if row_value is None else (row_value(scores, **options),)
    return Prepared(*found, row_values, dropout, _factors(rules, part))


def _factors(rules: Rules, part: Parts) -> tuple[Array, Array, Array] | None:
    changes = rules.score_mod, rules.mask_mod, rules.before, rules.after, rules.soft_cap
    others = "bias", "mask", "query_lengths", "key_lengths", "query_segments"
    if any(x is not None for x in changes) or any(name in part for name in others):
        return None
    scale = jnp.asarray(1 if rules.scale is None else rules.scale, wide(part["query"].dtype))
    return part["query"], part["key"], scale


def _with_arrays(
    rules: Rules, part: Parts
) -> tuple[Callable[..., Array], Callable[..., Array] | None]:
    """The normalizer with its arrays, which are operands, and what makes a number of each row."""
    normalizer, row_value = rules.normalizer, rules.row_value
    if not isinstance(normalizer, Configured):
        return normalizer, row_value
    start = len(OF_NORMALIZER)
    own = {name[start:]: x for name, x in part.items() if name.startswith(OF_NORMALIZER)}
    normalizer = normalizer.with_arrays(own)
    if isinstance(row_value, Configured):
        row_value = normalizer.of(row_value.function)
    return normalizer, row_value


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """What is computed for each block of a band.

    Attributes:
      prepare: `(first, *parts) -> Prepared`.
      value: which of the parts are the values.
    """

    prepare: Callable[..., Prepared]
    value: int

    def attend(self, first: First, parts: Sequence[Array]) -> tuple[Array, ...]:
        """The output, (B, N, rows, V), and row values; with derivatives of any kind and order."""
        made = self.prepare(first, *parts)
        weights = _threshold.apply(made.form, made.rows, made.entries, *made.params)[0]
        return _mix(made.kept(weights), parts[self.value]), *made.row_values

    def attend_and_keep(
        self, again: bool, first: First, parts: Sequence[Array]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The same, and the threshold of each row; without derivatives.

        Args:
          again: whether to make scores again rather than read them: see `Tiling`.
          first: where the block begins.
          parts: what it sees of the operands.
        """
        made, value = self.prepare(first, *parts), parts[self.value]
        if made.form is SOFTMAX:
            threshold = SOFTMAX.before_sum(made.rows, made.entries)
            out, total = _mix_and_sum(made, _weights_of(made, threshold, again), value)
            by = _threshold.inverse_of(total)
            out, threshold = out * by, (threshold[0], by)
        else:
            threshold = _threshold.solve(made.form, made.rows, made.entries, *made.params)
            out = _mix(made.kept(_weights_of(made, threshold, again)[0]), value)
        return (out, *made.row_values), threshold

    def pull_back(
        self,
        wanted: Sequence[int],
        first: First,
        parts: Sequence[Array],
        ct: Sequence[Array],
    ) -> list[Array]:
        """The cotangents of the parts at `wanted`, of which derivatives can be taken again."""
        of_wanted = self._of_wanted(wanted, first, parts)
        _, pullback = jax.vjp(of_wanted, *(parts[i] for i in wanted))
        return list(pullback(tuple(ct)))

    def push_forward(
        self,
        wanted: Sequence[int],
        first: First,
        parts: Sequence[Array],
        tangents: Sequence[Array],
    ) -> tuple[Array, ...]:
        """The tangents of the outputs, given those of the parts at `wanted`."""
        of_wanted = self._of_wanted(wanted, first, parts)
        return jax.jvp(of_wanted, [parts[i] for i in wanted], list(tangents))[1]

    def pull_back_from(
        self,
        again: bool,
        wanted: Sequence[int],
        first: First,
        parts: Sequence[Array],
        out: Array,
        threshold: Sequence[Array],
        ct: Sequence[Array],
    ) -> list[Array]:
        """What `pull_back` returns, given the output and the thresholds."""

        def smooth(*args: Array) -> tuple[Any, Prepared]:
            made = self.prepare(first, *_merged(parts, wanted, args))
            return (made.entries, made.params, made.row_values), made

        _, pullback, made = jax.vjp(smooth, *(parts[i] for i in wanted), has_aux=True)
        p = _weights_of(made, threshold, again)
        value, (ct_out, *ct_row_values) = parts[self.value], ct
        factor = _grouped(ct_out, value.shape[1]).astype(value.dtype)
        # The slopes of softmax are its weights, and the mean is known.
        mean = jnp.sum(ct_out * out, -1, keepdims=True) if made.form.only_scales else None
        if mean is not None and made.rows.names:
            mean = lax.psum(mean, made.rows.names)
        if again and mean is not None and made.dropout is None:
            less_mean = _less(factor, value, mean).astype(value.dtype)
            cts = less_mean.astype(p[0].dtype), *(-mean for _ in p[1:])
            mean = jnp.zeros_like(mean)
        else:
            ct_weights = made.kept(_products.scores(factor, value).reshape(p[0].shape))
            cts = ct_weights, *map(jnp.zeros_like, p[1:])
        if mean is None:
            mean = _threshold.mean_at_once(made.form, made.rows, p, made.params, cts)
        ct_entries, *ct_params = _threshold.pull_back(
            made.form, made.rows, p, made.params, cts, mean
        )
        found = list(pullback((ct_entries, tuple(ct_params), tuple(ct_row_values))))
        if self.value in wanted:
            weights = _grouped(made.kept(p[0]), value.shape[1]).astype(value.dtype)
            i = list(wanted).index(self.value)
            found[i] = _products.columns(factor, weights).astype(found[i].dtype)
        return found

    def _of_wanted(
        self, wanted: Sequence[int], first: First, parts: Sequence[Array]
    ) -> Callable[..., tuple[Array, ...]]:
        return lambda *args: self.attend(first, _merged(parts, wanted, args))


def _merged(parts: Sequence[Array], places: Sequence[int], args: Sequence[Array]) -> list[Array]:
    merged = list(parts)
    for i, arg in zip(places, args, strict=True):
        merged[i] = arg
    return merged


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


def _modified(score_mod: Callable[..., Array], scores: Array, places: Sequence[Array]) -> Array:
    modified = jnp.asarray(_over_all(score_mod, scores)(scores, *places))
    if modified.shape != scores.shape:
        raise ValueError(
            "score_mod must return one number per score, got an array of shape "
            f"{modified.shape[4:]}."
        )
    return modified.astype(scores.dtype)


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


def _visible(rules: Rules, part: Parts, places: Sequence[Array]) -> Array:
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
        conditions.append(_mapped_mask(_at_positions(rules.mask_mod, part, places), places))
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


def _weights(
    rules: Rules, normalizer: Callable[..., Array], scores: Array, options: dict[str, Any]
) -> Array:
    if not rules.guard:
        return normalizer(scores, **options)
    where = options["where"]
    seen = _any_key(rules, where)
    options = options | {"where": where | ~seen}
    weights = normalizer(jnp.where(seen, scores, 0), **options)
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


def _grouped(x: Array, key_heads: int) -> Array:
    """(B, N, rows, ...) with the heads that share keys as rows of one product."""
    batch, heads, rows, *rest = x.shape
    return x.reshape(batch, key_heads, heads // key_heads * rows, *rest)


def _weights_of(made: Prepared, threshold: Sequence[Array], again: bool) -> Entries:
    """The weights, given the threshold."""
    form, factors = made.form, made.factors
    if not again or factors is None or form is not SOFTMAX:
        return _threshold.weights(form, made.rows, made.entries, threshold, made.params)
    query, key, scale = factors
    origin = SOFTMAX.origin(*threshold)
    grouped = _grouped(query, key.shape[1])
    gaps = _less(grouped, key, origin / jnp.where(scale == 0, 1, scale)) * scale
    none, one = jnp.zeros_like(scale), jnp.ones_like(scale)
    weights = SOFTMAX.at(gaps, none, one).astype(key.dtype)
    of_sink = [SOFTMAX.at(z, *threshold) for z in made.entries[1:]]
    return weights.astype(gaps.dtype), *of_sink


def _less(query: Array, key: Array, row_values: Array) -> Array:
    """Products less a number per row, (B, N, rows, S), that need no kernel but their own."""
    batch, heads, rows, _ = row_values.shape
    row_values = _grouped(row_values, key.shape[1])
    less = _products.scores_less(query, _products.with_ones(key), row_values)
    return less.reshape(batch, heads, rows, -1)


def _mix_and_sum(made: Prepared, weights: Entries, value: Array) -> tuple[Array, Array]:
    """The values, weighted and summed, and the sums of the weights, (B, N, rows, 1)."""
    first, *sink = weights
    are_many = not is_known(first.shape[2]) or first.shape[2] > value.shape[2]
    if made.dropout is None and are_many:
        # Of values that are 1 the product makes sums, with no other kernel that reads the weights;
        # where these are few, that would not be worth a copy of the values.
        mixed = _mix(first, _products.with_ones(value))
        out, total = mixed[..., : -_products.ONES], mixed[..., -1:]
    else:
        out, total = _mix(made.kept(first), value), jnp.sum(first, -1, keepdims=True)
    if made.rows.names:
        total = lax.psum(total, made.rows.names)
    return out, sum(sink, total)


def _mix(weights: Array, value: Array) -> Array:
    """The values, weighted and summed."""
    out = _products.rows(_grouped(weights, value.shape[1]).astype(value.dtype), value)
    return out.reshape(*weights.shape[:-1], -1)
