"""The scores of a tile in a kernel: as blocks make them, with the pullback of each step."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax.attention._kernels._tiles import F32, LEAST, Place
from jaxsoftmax.attention._prepared import mapped_mask, modified


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a tile and what their derivative needs.

    Attributes:
      scores: with `LEAST` where a key takes no part.
      pulls: the pullbacks of what made them of products and a bias, from the first to the last.
    """

    scores: Array
    pulls: tuple[Callable[[Array], Array], ...]

    def pull_back(self, ct: Array) -> Array:
        """The cotangent of the scaled products, which is that of a bias."""
        for pull in reversed(self.pulls):
            ct = pull(ct)
        return ct


def scores(place: Place, keys: Any, queries: Any, read: Any, is_cut: Any, product: Any) -> Scores:
    """The scores of a tile, given the products of its keys and queries.

    Args:
      place: where a program works.
      keys: the first key of the tile.
      queries: the first query.
      read: gives the part of an array over (keys, queries) that belongs to the tile, by name.
      is_cut: whether positions may exclude some of it; may be known only when it runs.
      product: the products.
    """
    call, refs, pulls = place.call, place.refs, []
    tile = Tile(place, keys, queries, product.shape)
    x = product if call.factor == 1 else product * call.factor
    if "bias" in refs:
        x = x + read("bias").astype(F32)
    if call.soft_cap is not None:
        capped = jnp.tanh(x * (1 / call.soft_cap))
        bounded = capped * call.soft_cap
        # A bias of -inf excludes; it is not to be capped.
        x = jnp.where(x == -jnp.inf, x, bounded) if "bias" in refs else bounded
        # What takes no part may be no number.
        pulls.append(lambda ct: jnp.where(ct == 0, 0, ct * (1 - capped * capped)))
    if call.score_mod is not None:
        modify = place.rows.plain(functools.partial(tile.modified, call.score_mod))
        pulls.append(place.rows.plain(functools.partial(_pull_back, modify, x)))
        x = modify(x)
    if "temperature" in refs:
        by = place.number("temperature")
        x = x * by
        pulls.append(lambda ct: ct * by)
    if "bias" in refs or call.score_mod is not None:
        x = jnp.maximum(x, LEAST)
    conditions = _conditions(tile, read)
    if is_cut is True:
        conditions += _by_position(tile)
    x = _where(conditions, x)
    if not isinstance(is_cut, bool):
        x = lax.cond(is_cut, lambda x: _where(_by_position(tile), x), lambda x: x, x)
    return Scores(x, tuple(pulls))


def _where(conditions: list[Array], x: Array) -> Array:
    return jnp.where(functools.reduce(operator.and_, conditions), x, LEAST) if conditions else x


def _pull_back(function: Callable[[Array], Array], x: Array, ct: Array) -> Array:
    # What takes no part may have no derivative.
    return jnp.where(ct == 0, 0, jax.vjp(function, x)[1](ct)[0])


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile lies among keys and queries, and how it reads the functions of a call.

    Attributes:
      place: where a program works.
      keys: the first key.
      queries: the first query.
      shape: how many there are of both.
    """

    place: Place
    keys: Any
    queries: Any
    shape: tuple[int, ...]

    @property
    def key(self) -> Array:
        """The positions of the keys."""
        return self._indices(self.keys, self.place.rows.key_axis)

    @property
    def query(self) -> Array:
        """Which queries there are, from 0."""
        return self._indices(self.queries, 1 - self.place.rows.key_axis)

    def _indices(self, first: Any, axis: int) -> Array:
        index = self.place.rows.settled(lax.broadcasted_iota(jnp.int32, self.shape, axis))
        return first + index

    def modified(self, score_mod: Callable[..., Array], x: Array) -> Array:
        """What a function makes of scores."""
        has_bias = "bias" in self.place.refs
        return modified(jax.vmap(jax.vmap(score_mod)), x, self._places(), has_bias)

    def mapped(self, mask_mod: Callable[..., Array]) -> Array:
        """Where a function says that a key takes part."""
        return mapped_mask(jax.vmap(jax.vmap(mask_mod)), self._places(), len(self.shape))

    def _places(self) -> tuple[Array, ...]:
        """The indices of batch, head, query and key, as blocks hand them to functions."""
        place = self.place
        alike = (jnp.full(self.shape, i, jnp.int32) for i in (place.batch, place.head))
        return *alike, self.query + place.offset, self.key


def _by_position(tile: Tile) -> list[Array]:
    """What must hold of positions for a key to take part."""
    place, conditions = tile.place, []
    call, key, query = place.call, tile.key, tile.query + place.offset
    if not (isinstance(place.keys, int) and place.keys == call.keys):
        conditions.append(key < place.keys)
    if call.after is not None:
        conditions.append(key <= query + call.after)
    if call.before is not None:
        conditions.append(key >= query - call.before)
    return conditions


def _conditions(tile: Tile, read: Any) -> list[Array]:
    """What else must hold."""
    place, conditions = tile.place, []
    call, refs = place.call, place.refs
    if "query_segments" in refs:
        same = read("query_segments") == read("key_segments")
        conditions.append(jnp.broadcast_to(same, tile.shape))
    if "mask" in refs:
        mask = read("mask").astype(jnp.int32) != 0
        conditions.append(jnp.broadcast_to(mask, tile.shape))
    if call.mask_mod is not None:
        conditions.append(place.rows.plain(functools.partial(tile.mapped, call.mask_mod))())
    if call.score_mod is not None and call.queries > call.sizes.queries:
        # A function may return anything for queries that are none.
        conditions.append(tile.query < call.sizes.queries)
    return conditions
