"""One block of query rows with all the keys it sees: its output, and its derivatives.

Scores are made of the operands by what `jax.vjp` can differentiate. Then they are normalized, and
mixed with the values. If the normalizer has a form, its threshold is kept: the reverse rule makes
the weights of it, and solves for nothing again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax import _threshold
from jaxsoftmax._platforms import if_local
from jaxsoftmax._reductions import Entries, is_known
from jaxsoftmax.attention import _products
from jaxsoftmax.attention._prepared import Factors, First, Prepared
from jaxsoftmax.mappings._softmax import SOFTMAX


@dataclasses.dataclass(frozen=True)
class Again:
    """How scores are made again rather than read: see `Tiling`.

    Attributes:
      mask: which of them take part, where their places tell, (1, 1, rows, S); None: all of them,
        or it is not known before the block.
      weights: what was made of them before the block, in the reverse rule; None: nothing.
      key: cuts the keys `with_ones` that the block sees; None: the block makes its own.
      value: the same for the values.
    """

    mask: Array | None
    weights: Array | None = None
    key: Callable[[], Array] | None = None
    value: Callable[[], Array] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """What is computed for each block of a band.

    Attributes:
      prepare: `(first, *parts) -> Prepared`.
      query: which of the parts are the queries.
      key: which are the keys.
      value: which are the values.
    """

    prepare: Callable[..., Prepared]
    query: int
    key: int
    value: int

    def attend(self, first: First, parts: Sequence[Array]) -> tuple[Array, ...]:
        """The output, (B, N, rows, V), and row values; with derivatives of any kind and order."""
        made = self.prepare(first, *parts)
        weights = _threshold.apply(made.form, made.rows, made.entries, *made.params)[0]
        return _mix(made.after_dropout(weights), parts[self.value]), *made.row_values

    def where(self, first: First, parts: Sequence[Array]) -> Array | None:
        """Which scores take part, if that is a matter of their places alone, and some do not."""
        factors = self.prepare(first, *parts).factors
        return None if factors is None else factors.where

    def attend_and_keep(
        self, again: Again | None, first: First, parts: Sequence[Array]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The same, and the threshold of each row; without derivatives.

        Args:
          again: how to make scores again; None: they are read.
          first: where the block begins.
          parts: what it sees of the operands.
        """
        made, value = self.prepare(first, *parts), parts[self.value]
        if made.form is SOFTMAX:
            threshold = _before_sum(made, again)
            weights = _weights_of(made, threshold, again)
            out, total = _mix_and_sum(made, weights, value, again and again.value)
            # Rows that see nothing have weights of 0, and cotangents are multiplied by this first.
            by = jnp.where(total == 0, 0, _threshold.inverse_of(total))
            out, threshold = out * by, (threshold[0], by)
        else:
            threshold = _threshold.solve(made.form, made.rows, made.entries, *made.params)
            out = _mix(made.after_dropout(_weights_of(made, threshold, again)[0]), value)
        return (out, *made.row_values), threshold

    def weights_again(
        self,
        again: Again | None,
        first: First,
        parts: Sequence[Array],
        threshold: Sequence[Array],
    ) -> Array | None:
        """The weights before they are divided, if they are made again, in the dtype of the keys."""
        made = self.prepare(first, *parts)
        if _factors_again(made, again) is None:
            return None
        weights = _weights_of(made, (threshold[0], jnp.ones_like(threshold[1])), again)
        return weights[0].astype(parts[self.key].dtype)

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
        again: Again | None,
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
        value, (ct_out, *ct_row_values) = parts[self.value], ct
        factors = _factors_again(made, again)
        if factors is not None:
            # A factor of rows goes to their cotangents, where no kernel is needed for it.
            top, by = threshold
            threshold = top, jnp.ones_like(by)
            ct_out = (ct_out * by).astype(value.dtype).astype(ct_out.dtype)
        p = _weights_of(made, threshold, again)
        factor = _products.grouped(ct_out, value.shape[1]).astype(value.dtype)
        mean = None
        # The slopes of softmax are its weights, and so the mean is known, up to the rounding of
        # weights that are mixed. That would be left of sums over rows, such as those of a scale.
        if made.form.only_scales and {self.query, self.key, self.value}.issuperset(wanted):
            mean = jnp.sum(ct_out * out, -1, keepdims=True)
            mean = lax.psum(mean, made.rows.names) if made.rows.names else mean
        if again is not None and mean is not None and made.dropout is None:
            less_mean = _less(factor, _with_ones(value, again.value), mean)
            if factors is not None and not made.row_values:
                found = self._pull_back_products(factors, p[0], factor, less_mean, made.is_relative)
                return [found[i].astype(parts[i].dtype) for i in wanted]
            cts = less_mean.astype(value.dtype).astype(p[0].dtype), *(-mean for _ in p[1:])
            mean = jnp.zeros_like(mean)
        else:
            ct_weights = _products.apart(_products.scores(factor, value), p[0].shape[1])
            ct_weights = made.after_dropout(ct_weights)
            cts = ct_weights, *map(jnp.zeros_like, p[1:])
        if mean is None:
            mean = _threshold.mean_at_once(made.form, made.rows, p, made.params, cts)
        ct_entries, *ct_params = _threshold.pull_back(
            made.form, made.rows, p, made.params, cts, mean
        )
        found = list(pullback((ct_entries, tuple(ct_params), tuple(ct_row_values))))
        if self.query in wanted and made.is_relative and parts[self.key].dtype == jnp.bfloat16:
            places = self.key, self.query
            key = _less_common(parts[self.key], ct_entries[0].dtype)

            def of_query(query: Array) -> Entries:
                return self.prepare(first, *_merged(parts, places, (key, query))).entries

            i = list(wanted).index(self.query)
            found[i] = jax.vjp(of_query, parts[self.query])[1](ct_entries)[0]
        if self.value in wanted:
            mixing = _products.grouped(made.after_dropout(p[0]), value.shape[1])
            i = list(wanted).index(self.value)
            mixed = _products.columns(factor, mixing.astype(value.dtype))
            found[i] = mixed.astype(found[i].dtype)
        return found

    def _pull_back_products(
        self,
        factors: Factors,
        weights: Array,
        factor: Array,
        ct_weights: Array,
        is_relative: bool,
    ) -> dict[int, Array]:
        """The cotangents of queries, keys and values, where scores are products.

        One kernel makes the cotangents of the products, if the weights were there before a loop.
        """
        query, key, scale, _ = factors
        heads = query.shape[1]
        weights = weights.astype(factor.dtype)
        ct = weights * (ct_weights * scale).astype(factor.dtype)
        ct, weights = (_products.grouped(x, key.shape[1]) for x in (ct, weights))
        near = key
        if is_relative and key.dtype == jnp.bfloat16:
            near = _less_common(key, ct_weights.dtype)
        return {
            self.query: _products.apart(_products.rows(ct, near), heads),
            self.key: _products.columns(_products.grouped(query, key.shape[1]), ct),
            self.value: _products.columns(factor, weights),
        }

    def _of_wanted(
        self, wanted: Sequence[int], first: First, parts: Sequence[Array]
    ) -> Callable[..., tuple[Array, ...]]:
        return lambda *args: self.attend(first, _merged(parts, wanted, args))


def _less_common(key: Array, dtype: Any) -> Array:
    """Keys less what they have in common, for the cotangent of queries.

    The cotangents of the scores of a row sum to 0, but not when they are rounded to bfloat16: what
    is left would be multiplied by the mean of the keys.
    """
    wide = key.astype(dtype)
    less_mean = wide - jnp.mean(wide, -1, keepdims=True)
    largest, left = (jnp.max(jnp.abs(x), -1, keepdims=True) for x in (wide, less_mean))
    # In each block: one more array for all of them would take longer to read. Not where a key lacks
    # what others have in common: it would lose digits, and queries may see it alone.
    return jnp.where(left <= largest / 2, less_mean, wide).astype(key.dtype)


def _merged(parts: Sequence[Array], places: Sequence[int], args: Sequence[Array]) -> list[Array]:
    merged = list(parts)
    for i, arg in zip(places, args, strict=True):
        merged[i] = arg
    return merged


def _factors_again(made: Prepared, again: Again | None) -> Factors | None:
    """The factors of scores that are made again for weights of softmax."""
    factors = made.factors
    if again is None or made.form is not SOFTMAX or factors is None:
        return None
    if factors.where is not None and again.mask is None:
        return None
    factors = factors._replace(where=again.mask)
    return factors if _are_many(factors.query, factors.key) else None


def _before_sum(made: Prepared, again: Again | None) -> tuple[Array, ...]:
    """The threshold of softmax, with 1 for what weights are multiplied by.

    Scores that are made again are written for their maximum alone. Any number does for that which
    is near and not below it, and so they are written as bfloat16.
    """
    factors = _factors_again(made, again)
    if factors is None:
        return SOFTMAX.before_sum(made.rows, made.entries)
    query, key, scale, where = factors
    grouped = _products.grouped(query, key.shape[1])

    def largest(products: Array, dtype: Any) -> Array:
        scores = (products * scale).astype(dtype)
        if where is not None:
            scores = jnp.where(where, _products.apart(scores, query.shape[1]), -jnp.inf)
            scores = _products.grouped(scores, key.shape[1])
        top = jnp.max(scores, -1, keepdims=True)
        return _products.apart(top, query.shape[1]).astype(scale.dtype)

    def exactly() -> Array:
        # What is cut outside of a loop is copied for it.
        cut = key if again is None or again.key is None else again.key()[..., : key.shape[2], :]
        return largest(_products.scores(grouped, cut), scale.dtype)

    def nearly() -> Array:
        rounded = largest(_products.scores(grouped, key), jnp.bfloat16)
        above = rounded + jnp.abs(rounded) * _ROUNDING
        is_near = jnp.abs(above) <= _NEAR

        def once(state: tuple[Array, Array]) -> tuple[Array, Array]:
            _, done = state
            return jnp.where(is_near, above, exactly()), done | True

        # A loop of no pass, or one. Of a conditional, `vmap` would compute both branches.
        return lax.while_loop(lambda state: ~state[1], once, (above, jnp.all(is_near)))[0]

    # Devices would have to tell each other in every block whether all are near.
    top = if_local(nearly, exactly)
    # What is lost in sums of such products could take all weights of a row.
    size = jnp.abs(top)
    top = jnp.where((size > _LOSSY) & (size < jnp.inf), top - size * _LOST, top)
    return SOFTMAX.before_sum(made.rows, (top, *made.entries[1:]))


# What a number loses at most, relative to itself, where it is rounded to 8 bits.
_ROUNDING = 2.0**-8
# Up to here that is at most 8, and so little that nothing is lost of weights and what they weight.
_NEAR = 2.0**10
# The float32 scores from which on weights are anyone's guess, and what they may be off by.
_LOSSY, _LOST = 2.0**27, 2.0**-20


def _weights_of(made: Prepared, threshold: Sequence[Array], again: Again | None) -> Entries:
    """The weights, given the threshold; those that are made again, before they are divided."""
    factors = _factors_again(made, again)
    if factors is None:
        return _threshold.weights(made.form, made.rows, made.entries, threshold, made.params)
    of_sink = [SOFTMAX.at(z, *threshold) for z in made.entries[1:]]
    if again is not None and again.weights is not None:
        return again.weights.astype(made.entries[0].dtype), *of_sink
    query, key, scale, where = factors
    top, _ = threshold
    is_tiny = jnp.abs(scale) < _TINY
    of_products = jnp.clip(top / jnp.where(is_tiny, 1, scale), -_HUGE, _HUGE)
    of_products = jnp.where(is_tiny, 0, of_products)
    grouped = _products.grouped(query, key.shape[1])
    less = _less(grouped, _with_ones(key, again and again.key), of_products)
    gaps = less * jnp.where(is_tiny, 0, scale) - jnp.where(is_tiny, top, 0)
    # Products of other sizes are summed in another order: a gap may come out above that of the top.
    weights = jnp.exp(jnp.minimum(gaps, 0)).astype(key.dtype)
    if where is not None:
        weights = jnp.where(where, weights, 0)
    return weights.astype(gaps.dtype), *of_sink


# Numbers that half precision has, and quotients by which are still numbers.
_HUGE, _TINY = 1e38, 1e-30


def _are_many(query: Array, key: Array) -> bool:
    """Whether there are more rows than features, so that a copy of the keys is worth it."""
    return not is_known(query.shape[2]) or query.shape[2] > key.shape[2]


def _less(query: Array, key: Array, row_values: Array) -> Array:
    """Products less a number per row, (B, N, rows, S), that need no kernel but their own."""
    less = _products.scores_less(query, key, _products.grouped(row_values, key.shape[1]))
    return _products.apart(less, row_values.shape[1])


def _with_ones(key: Array, cut: Callable[[], Array] | None) -> Array:
    """Keys, or values, `with_ones`: cut from those of all bands, if they are there."""
    return _products.with_ones(key) if cut is None else cut()


def _mix_and_sum(
    made: Prepared, weights: Entries, value: Array, cut: Callable[[], Array] | None
) -> tuple[Array, Array]:
    """The values, weighted and summed, and the sums of the weights, (B, N, rows, 1)."""
    first, *sink = weights
    if made.dropout is None and _are_many(first, value):
        # Of values that are 1 the product makes sums, with no other kernel that reads the weights;
        # where these are few, that would not be worth a copy of the values.
        mixed = _mix(first, _with_ones(value, cut))
        out, total = mixed[..., : value.shape[2]], mixed[..., -1:]
    else:
        out, total = _mix(made.after_dropout(first), value), jnp.sum(first, -1, keepdims=True)
    if made.rows.names:
        total = lax.psum(total, made.rows.names)
    return out, sum(sink, total)


def _mix(weights: Array, value: Array) -> Array:
    """The values, weighted and summed."""
    out = _products.rows(_products.grouped(weights, value.shape[1]).astype(value.dtype), value)
    return _products.apart(out, weights.shape[1])
