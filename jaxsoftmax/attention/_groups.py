"""Attention to a few heads after the other, where that keeps their scores near the cores."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._configured import Configured
from jaxsoftmax._scores import with_ndim
from jaxsoftmax.attention._arguments import Sizes
from jaxsoftmax.attention._bands import GROUP_SCORES, group_sizes
from jaxsoftmax.attention._block import Rules

# Of rules, operands, sizes and, if it is to differ from the usual, how many scores a block should
# have. The outputs begin with the axes batch and head.
Attend = Callable[..., tuple[Array, ...]]
# All arrays, in the layout of the scores where they have axes for batch and head.
Arrays = dict[str, dict[str, Array]]

BATCH_AXIS, HEAD_AXIS = 0, 1


def in_groups(
    attend: Attend, rules: Rules, operands: dict[str, Array], sizes: Sizes, rows: int | None
) -> tuple[Array, ...]:
    """What `attend` gives, computed for some entries of the batch and some heads at a time.

    Only for normalizers of ours: of others it is not known which of their arrays belong to a head.

    Args:
      attend: attends to all that it is given.
      rules: what makes weights of scores.
      operands: what blocks are cut from.
      sizes: their sizes.
      rows: how many rows a block has, if that is given.
    """
    normalizer = rules.normalizer
    if not (isinstance(normalizer, Configured) and not rules.kv_names and _on_one_cpu()):
        return attend(rules, operands, sizes)
    per_head = sizes.heads // sizes.key_heads
    batch, key_heads = group_sizes(
        sizes.batch, sizes.key_heads, per_head * sizes.keys, rows or sizes.queries
    )
    if (batch, key_heads) == (sizes.batch, sizes.key_heads):
        return attend(rules, operands, sizes)
    first, value = rules.first, rules.row_value
    group = dataclasses.replace(sizes, batch=batch, heads=per_head * key_heads, key_heads=key_heads)

    def of_group(entry: Any, head: Any, arrays: Arrays) -> tuple[Array, ...]:
        own = normalizer.with_arrays(arrays["normalizer"])
        own_rules = dataclasses.replace(
            rules,
            normalizer=own,
            row_value=own.of(value.function) if isinstance(value, Configured) else value,
            sink=arrays["sink"].get("sink"),
            first=(first[0] + entry * batch, first[1] + head * group.heads, *first[2:]),
        )
        return attend(own_rules, arrays["operands"], group, GROUP_SCORES)

    def of_entries(entry: Any, arrays: Arrays) -> tuple[Array, ...]:
        of_heads = functools.partial(of_group, entry)
        return _one_after_the_other(of_heads, HEAD_AXIS, sizes.key_heads // key_heads, arrays)

    sink = {} if rules.sink is None else {"sink": with_ndim(rules.sink, 4)}
    own = {name: _aligned(x) for name, x in normalizer.arrays.items()}
    arrays = {"operands": operands, "normalizer": own, "sink": sink}
    return _one_after_the_other(of_entries, BATCH_AXIS, sizes.batch // batch, arrays)


def _on_one_cpu() -> bool:
    """Accelerators want all heads at once, and devices that share heads would gather them."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _aligned(x: Any) -> Any:
    return with_ndim(jnp.asarray(x), 4) if jnp.ndim(x) == 3 else x


def _one_after_the_other(
    function: Callable[[Any, Any], tuple[Array, ...]], axis: int, groups: int, arrays: Any
) -> tuple[Array, ...]:
    """Outputs of `function(i, arrays of group i)`, joined along `axis`."""
    if groups == 1:
        return function(0, arrays)
    leaves, tree = jax.tree.flatten(arrays)
    shared = [jnp.ndim(x) != 4 or jnp.shape(x)[axis] == 1 for x in leaves]
    split = [_split(x, axis, groups) for x, whole in zip(leaves, shared, strict=True) if not whole]

    def of_group(args: tuple[Array, list[Array]]) -> tuple[Array, ...]:
        i, parts = args[0], iter(args[1])
        merged = [x if whole else next(parts) for x, whole in zip(leaves, shared, strict=True)]
        return function(i, jax.tree.unflatten(tree, merged))

    outs = lax.map(of_group, (jnp.arange(groups, dtype=jnp.int32), split))
    return tuple(_joined(out, axis) for out in outs)


def _split(x: Array, axis: int, groups: int) -> Array:
    x = x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: Array, axis: int) -> Array:
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
