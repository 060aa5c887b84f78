"""Attention of arrays on a mesh whose axes are explicit: each device does its own part."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from jaxsoftmax import _sharding
from jaxsoftmax._configured import arrays_in
from jaxsoftmax._scores import mesh_names
from jaxsoftmax._sharding import Names, axes_of, explicit_names, first_explicit, spec_of
from jaxsoftmax.attention import _arguments
from jaxsoftmax.attention._ring_parts import streams


@dataclasses.dataclass(frozen=True)
class Places:
    """The mesh axes that scores, (B, N, T, S), are spread over."""

    batch: Names = ()
    heads: Names = ()
    queries: Names = ()
    keys: Names = ()

    @staticmethod
    def named(queries: Any, keys: Any) -> "Places":
        """Those that a caller names."""
        return Places(
            queries=mesh_names("query_axis_name", queries), keys=mesh_names("kv_axis_name", keys)
        )

    @property
    def are_a_ring(self) -> bool:
        """Whether queries and keys are spread over the same devices."""
        return self.queries == self.keys != ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How attention is shared among the devices of a mesh.

    Attributes:
      sharding: that of any array on the mesh.
      places: what each device does.
      key_heads: the mesh axes that the heads of keys are spread over.
      out_queries: the mesh axes that the queries of the output are to be spread over.
    """

    sharding: Any
    places: Places
    key_heads: Names
    out_queries: Names

    def names(self, letters: str, x: Array) -> list[Names]:
        """What the axes of an array are spread over, given their letters, the last ones first."""
        of = {
            "B": self.places.batch,
            "N": self.places.heads,
            "K": self.key_heads,
            "T": self.places.queries,
            "S": self.places.keys,
            "A": () if self.places.are_a_ring else self.places.keys,
        }
        letters = letters.rjust(x.ndim)
        letters = letters[len(letters) - x.ndim :]
        pairs = zip(letters, x.shape, strict=True)
        # Arrays are not spread over what a `shard_map` around has taken.
        left = axes_of(self.sharding.mesh, AxisType.Explicit)
        return [
            () if n == 1 else tuple(name for name in of.get(letter, ()) if name in left)
            for letter, n in pairs
        ]

    def of_output(self, query: Array) -> list[Names]:
        """What the axes of the output are spread over, but for the features."""
        places = dataclasses.replace(self.places, queries=self.out_queries)
        return dataclasses.replace(self, places=places).names(LETTERS["query"], query)[:-1]


# The axes of arrays, from the last one on; those of size 1 are on all devices.
LETTERS = {
    "query": "BTNH",
    "key": "BSKH",
    "value": "BSKV",
    "bias": "BNTA",
    "mask": "BNTA",
    "query_seq_lengths": "B",
    "key_value_seq_lengths": "B",
    "query_offset": "B",
    "query_segment_ids": "BT",
    "key_value_segment_ids": "BS",
    "sink": "N",
}
_OF_NORMALIZER = "BNTA"


def plan(given: dict[str, Any], manual: Places, normalizer: Any) -> Plan | None:
    """How to share attention, as the types of queries, keys and values tell; None: not at all.

    Args:
      given: the arrays.
      manual: what is already one device's part.
      normalizer: makes weights of scores.
    """
    inputs = [given.get(name) for name in ("query", "key", "value")]
    query, key, value, sizes = _arguments.check_inputs(*inputs)
    others = *given.values(), *arrays_in(normalizer).values()
    sharding = first_explicit((query, key, value, *others))
    if sharding is None:
        return None
    others = explicit_names(query, 1) + explicit_names(query, 2)  # as the output is to be spread
    batch = explicit_names(query, 0) or _without(others, explicit_names(key, 0))
    heads = _without(batch, explicit_names(query, 2))
    if sizes.key_heads > 1 and sizes.key_heads % math.prod(sharding.mesh.shape[n] for n in heads):
        heads = ()  # for a device's queries are not to need a part of the keys of another
    queries = _without(batch + heads, explicit_names(query, 1))
    keys = _without(batch + heads, explicit_names(key, 1) or explicit_names(value, 1))
    # Keys stay where they are, but in a ring; queries on the same mesh axes go to all devices,
    # which for forms that do not stream is less than keys going round once for each pass.
    in_ring = queries == keys and streams(normalizer)
    own = queries if in_ring or not set(queries) & set(keys) else ()
    return Plan(
        sharding=sharding,
        places=Places(batch, heads, own or manual.queries, keys or manual.keys),
        key_heads=() if sizes.key_heads == 1 else heads,
        out_queries=queries,
    )


def _without(taken: Names, names: Names) -> Names:
    return tuple(name for name in names if name not in taken)


def as_a_whole(
    here: Callable[..., Any], plan: Plan, normalizer: Any, mods: Any, given: dict[str, Any]
) -> Any:
    """Calls `here(normalizer, mods, given)` with arrays that XLA shares among the devices.

    For functions that are not ours: they see all heads and all keys, as on one device.
    """
    others, of_others = _sharding.held((normalizer, mods))

    def whole(others: Sequence[Array], given: dict[str, Any]) -> Any:
        return here(*of_others(others), given)

    spec = spec_of(plan.of_output(given["query"]))
    return _sharding.as_a_whole(whole, plan.sharding, spec)(others, given)


def on_each_device(
    here: Callable[..., Any], plan: Plan, normalizer: Any, mods: Any, given: dict[str, Any]
) -> Any:
    """Calls `here(normalizer, mods, given)` with each device's part of all arrays."""
    parameters = arrays_in(normalizer)
    others, of_others = _sharding.held(mods)
    arrays = [*map(jnp.asarray, (*given.values(), *parameters.values())), *others]
    letters = [LETTERS.get(name, "") for name in given]
    letters += [_OF_NORMALIZER for _ in parameters] + ["" for _ in others]

    def local(*parts: Array) -> tuple[Array, ...]:
        of_given = dict(zip(given, parts, strict=False))
        rest = parts[len(given) :]
        own = normalizer.with_arrays(dict(zip(parameters, rest, strict=False)))
        return here(own, of_others(rest[len(parameters) :]), of_given)

    in_axes = [plan.names(own, x) for own, x in zip(letters, arrays, strict=True)]
    of_out = in_axes[[*given].index("query")]
    out = _sharding.on_each_device(local, plan.sharding, in_axes, spec_of(of_out[:-1]))(*arrays)
    spec = spec_of(plan.of_output(given["query"]))
    return jax.tree.map(lambda x: jax.sharding.reshard(x, plan.sharding.update(spec=spec)), out)
