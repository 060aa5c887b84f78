"""What XLA for CPU does better in another way."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_Pair = tuple[Sequence[Array], Sequence[Array]]

# Searches in rows of so many entries and more begin with one of each so many parts. As measured:
# fewer are gone through before it pays to choose among them.
MANY, _PARTS = 1024, 64

# As measured: a block's scores should stay near the core that works on them, yet a block of few
# rows spends its time on going through all keys. Where heads may be taken one after the other,
# blocks can have both: few scores and many rows.
ATTENTION = {
    "forward": 2**21,
    "backward": 2**20,
    "group": 2**20,
    "rows": (64, 512),
    "bands": 8,
}

# Arrays of so many entries and more are gone through again and again in blocks of rows, of so many
# entries. As measured: these stay in the caches of two cores, and are enough for more of them.
LARGE, _AT_ONCE = 2**22, 2**19

LOCAL = ("joint", "rounded", "first_tau", "blocks", "sum_before", "add_product")


def joint(
    general: Callable[..., Any],
    entries: Sequence[Array],
    row_values: Sequence[Array],
    *,
    axes: tuple[int, ...],
    terms: Callable[..., _Pair],
    exactly: Callable[..., Sequence[Array]] | None,
) -> _Pair:
    """The sums of rows, over all of the `axes`, as exact as they can be had, and maxima."""
    del general
    if exactly is None:
        return _folded(terms, entries, row_values, axes)

    def sums(terms: Callable[..., Sequence[Array]], row_values: Sequence[Array]) -> Any:
        return _folded(lambda *args: (terms(*args), ()), entries, row_values, axes)[0]

    return exactly(sums, *row_values), ()


def _folded(
    terms: Callable[..., _Pair],
    entries: Sequence[Array],
    row_values: Sequence[Array],
    axes: tuple[int, ...],
    again: bool = False,
) -> _Pair:
    """The sums of the first terms of rows, and the maxima of the second ones.

    XLA for CPU reduces the minor axis one number at a time. Folded into blocks, depth and lanes, it
    is reduced over the depth, and LLVM vectorizes across the lanes. What is left is a minor axis
    again.
    """
    minor = entries[0].ndim - 1
    length = entries[0].shape[minor] if minor in axes else 1
    lanes, depth = _folding(length)
    if lanes == 1 or jax.typeof(entries[0]).sharding.spec[minor] is not None:
        return _stacked(terms, entries, row_values, axes)
    is_short = length <= _SHORT and not again
    of_parts = _stacked if is_short else functools.partial(_folded, again=True)
    of_rest = functools.partial(_folded, again=again)
    return _in_parts(terms, entries, row_values, axes, (minor, depth, lanes), of_parts, of_rest)


# As measured: what is left of so short a row takes less time one by one than folded again. Of
# longer rows, so many sums one by one would round too often.
_SHORT = 128


def _stacked(
    terms: Callable[..., _Pair],
    entries: Sequence[Array],
    row_values: Sequence[Array],
    axes: tuple[int, ...],
) -> _Pair:
    """What `_folded` returns, of some entries at a time along an axis that is not the minor one.

    One by one, so many sums would round too often.
    """
    shape, spec = entries[0].shape, jax.typeof(entries[0]).sharding.spec
    long = [i for i in axes[::-1] if i < len(shape) - 1 and isinstance(shape[i], int)]
    axis = next((i for i in long if shape[i] > _FEW and spec[i] is None), None)
    if axis is None:
        return _reduce(terms(*entries, *row_values), axes)
    return _in_parts(terms, entries, row_values, axes, (axis, _DEPTH, 1), _stacked, _stacked)


# LLVM vectorizes no depth that it does not unroll, which it does up to 8.
_DEPTH, _FEW = 8, 32


def _in_parts(
    terms: Callable[..., _Pair],
    entries: Sequence[Array],
    row_values: Sequence[Array],
    axes: tuple[int, ...],
    parts: tuple[int, int, int],
    of_parts: Callable[..., _Pair],
    of_rest: Callable[..., _Pair],
) -> _Pair:
    """An axis in blocks, depth and lanes, over the depth; then what is left of it, and the rest.

    Args:
      terms: what is summed, and of what there are maxima.
      entries: what they take of each entry.
      row_values: what they take of each row.
      axes: those that all is reduced over.
      parts: the axis, the depth and the lanes.
      of_parts: what reduces what is left; as `_folded`.
      of_rest: what reduces the entries beyond the last block.
    """
    axis, depth, lanes = parts
    shape = entries[0].shape
    count = shape[axis] // (depth * lanes)
    whole = count * depth * lanes
    split = *shape[:axis], count, depth, lanes, *shape[axis + 1 :]
    # The entries are cut, not the terms: terms of two uses would be held in memory.
    cut = [lax.slice_in_dim(x, 0, whole, axis=axis).reshape(split) for x in entries]
    spread = [jnp.expand_dims(values, (axis + 1, axis + 2)) for values in row_values]
    partial = _reduce(terms(*cut, *spread), (axis + 1,))
    left, structure = jax.tree.flatten(partial)
    left = [lax.collapse(x, axis, axis + 3) for x in left]
    found = of_parts(lambda *left: structure.unflatten(left), left, (), axes)
    if whole == shape[axis]:
        return found
    rest = [lax.slice_in_dim(x, whole, shape[axis], axis=axis) for x in entries]
    return _join(found, of_rest(terms, rest, row_values, axes))


def _folding(length: Any) -> tuple[int, int]:
    """Lanes and depth, as measured on rows of 10 to 100,000."""
    if not isinstance(length, int) or length < 16:
        return 1, 1
    lanes = 32 if length >= 256 else 16 if length >= 32 else 4
    return lanes, min(length // lanes, _DEPTH)


def _join(x: _Pair, y: _Pair) -> _Pair:
    return tuple(map(jnp.add, x[0], y[0])), tuple(map(jnp.maximum, x[1], y[1]))


def _reduce(terms: _Pair, axes: tuple[int, ...]) -> _Pair:
    sums, maxima = map(tuple, terms)
    zeros = tuple(jnp.zeros((), x.dtype) for x in sums)
    least = tuple(jnp.full((), -jnp.inf, x.dtype) for x in maxima)
    found = lax.reduce((sums, maxima), (zeros, least), _join, axes)
    return jax.tree.map(lambda x: jnp.expand_dims(x, axes), found)


def rounded(
    general: Callable[..., Any], scores: tuple[Array, ...], *, stored: Any
) -> tuple[Array, ...]:
    """The scores as they are in memory.

    XLA for CPU computes a product anew wherever it is used, and does not round it where it is added
    to something: no score might be equal to the largest of them. It does where a minimum is taken.

    But it holds a conversion from half precision that has two uses, in float32. So each use gets a
    conversion of its own, of scores that XLA does not know to be the same.
    """
    del general
    if stored is not None:
        return tuple(lax.optimization_barrier(z.astype(stored)).astype(z.dtype) for z in scores)
    most = jnp.finfo(scores[0].dtype).max
    return tuple(jnp.where(z == jnp.inf, z, jnp.minimum(z, most)) for z in scores)


def largest(general: Callable[..., Array], scores: tuple[Array, ...], *, stored: Any) -> Array:
    """The largest of what is stored in half precision, which saves a conversion."""
    return general(tuple(z.astype(stored) for z in scores)).astype(scores[0].dtype)


def first_tau(
    general: Callable[..., Any],
    scores: tuple[Array, ...],
    start: Any,
    *,
    search: Callable[[tuple[Array, ...], Any], Array],
) -> Array:
    """Where a search begins: at the threshold of the largest entry of each of some parts of a row.

    The threshold of some entries never exceeds that of all, and so it is as good a start from
    below; that of the largest is near.
    """
    del general
    first, *sink = scores
    length = first.shape[-1]
    whole = first[..., : length - length % _PARTS]
    largest = jnp.max(whole.reshape(*first.shape[:-1], length // _PARTS, _PARTS), -2)
    return search((largest, *sink), start)


def blocks(
    general: Callable[..., tuple[Array, ...]],
    entries: tuple[Array, ...],
    *row_values: Array,
    stored: Any,
) -> tuple[Array, ...]:
    """`general`, of so many rows at a time that they stay in the caches.

    So memory is read and written once, and what is held on the way is small. Blocks are halves of
    halves: all alike.
    """
    *lead, length = entries[0].shape
    size = count = entries[0].size // length
    while size % 2 == 0 and size * length > _AT_ONCE:
        size //= 2
    if size == count:
        return general(entries, *row_values)

    def cut(x: Array) -> Array:
        whole = jnp.broadcast_to(x, (*lead, x.shape[-1]))
        return whole.reshape(-1, *(1,) * (len(lead) - 1), size, x.shape[-1])

    def block(cuts: tuple[Any, Any]) -> tuple[Array, ...]:
        bits, row_values = cuts
        return general(tuple(map(from_bits, bits)), *row_values)

    # Half precision is cut as integers: floats XLA would convert before the loop, and hold.
    bits_of, from_bits = _bits(entries[0].dtype, stored)
    cuts = jax.tree.map(cut, (tuple(map(bits_of, entries)), row_values))
    return tuple(x.reshape(*lead, x.shape[-1]) for x in lax.map(block, cuts))


def _bits(dtype: Any, stored: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """To the bits of what is stored in half precision, and back; nothing if nothing is."""
    if stored is None:
        return lambda x: x, lambda x: x
    return (
        lambda x: lax.bitcast_convert_type(x.astype(stored), jnp.uint16),
        lambda bits: lax.bitcast_convert_type(bits, stored).astype(dtype),
    )


def sum_before(general: Callable[..., Array], x: Array, *, axis: int, reverse: bool) -> Array:
    """The sums of what comes before each entry, or after it, along an axis.

    Within blocks, and of the blocks before. XLA for CPU goes through an array once for each bit of
    its length to scan it. A product with a matrix of 0 and 1 takes the time of one pass.
    """
    length = x.shape[axis]
    size = min(length, _SUMMED)
    missing = -length % max(size, 1)
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    count = (length + missing) // max(size, 1)
    blocks = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    first, second = (lax.broadcasted_iota(jnp.int32, (size, size), i) for i in (0, 1))
    before = jnp.where(first > second if reverse else first < second, 1, 0).astype(x.dtype)
    product = (((axis + 1,), (0,)), ((), ()))
    sums = lax.dot_general(blocks, before, product, precision=lax.Precision.HIGHEST)
    sums = jnp.moveaxis(sums, -1, axis + 1)
    if length > size:
        last = 0 if reverse else size - 1
        totals, last_ones = (lax.index_in_dim(y, last, axis + 1, False) for y in (sums, blocks))
        of_blocks = sum_before(general, totals + last_ones, axis=axis, reverse=reverse)
        sums = sums + jnp.expand_dims(of_blocks, axis + 1)
    return lax.slice_in_dim(sums.reshape(x.shape), 0, length, axis=axis)


# How many entries a block has. As measured: 16 to 128 take the same time.
_SUMMED = 32


def sums_at_once(general: Callable[..., Any], *args: Any, rows: Any, one_by_one: Any) -> Any:
    """Sums one after the other, each by a loop that XLA for CPU fuses with what it sums."""
    del general, rows
    return one_by_one(*args)


def log_total(general: Callable[..., Any], scores: Any, *, in_two: Callable[..., Any]) -> Any:
    """Maximum and sum one after the other: both at once are no loop that LLVM vectorizes."""
    del general
    return in_two(scores)


def chunks(
    general: Callable[..., Any], *args: Any, one_by_one: Callable[..., Any], **_: Any
) -> Any:
    """Small chunks of a last layer's rows are large enough for any CPU."""
    del general
    return one_by_one(*args)


def columns(general: Callable[..., Array], first: Array, second: Array) -> Array:
    """The product in float32: of bfloat16, XLA for CPU has none where `vmap` is of the second."""
    return general(first.astype(jnp.float32), second.astype(jnp.float32))


def add_product(
    general: Callable[..., Array], total: Array, hidden: Array, ct_scores: Array
) -> Array:
    """`general`, in blocks of columns that stay in the cache.

    XLA for CPU cannot add to what is there: the product would be one more array of the size of the
    weights.
    """
    count = max(1, total.size // _BLOCK)
    width = total.shape[1] // count

    def step(total: Array, i: Array) -> tuple[Array, None]:
        block = general(
            lax.dynamic_slice_in_dim(total, i * width, width, 1),
            hidden,
            lax.dynamic_slice_in_dim(ct_scores, i * width, width, 1),
        )
        return lax.dynamic_update_slice_in_dim(total, block, i * width, 1), None

    total, _ = lax.scan(step, total, jnp.arange(count))
    done = count * width
    if done == total.shape[1]:
        return total
    return total.at[:, done:].set(general(total[:, done:], hidden, ct_scores[:, done:]))


_BLOCK = 2**20
