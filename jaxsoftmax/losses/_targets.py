"""What a loss is measured against: one class per row, or a distribution over the classes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._checked import checked
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._reductions import Entries, Rows, indicator, vary_like
from jaxsoftmax._scores import (
    Axis,
    Options,
    broadcasts,
    check_real,
    in_given_order,
    output_dtype,
    prepare,
    wide,
    with_ndim,
)
from jaxsoftmax._sharding import share_like


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("number", "known"), meta_fields=("axes",)
)
@dataclasses.dataclass(frozen=True)
class Classes:
    """One class per row.

    Attributes:
      number: row values, the number of the class; 0 where that is out of range.
      known: row values, whether it is in range.
      axes: the axes along which classes are counted, the one that counts fastest last.
    """

    number: Array
    known: Array
    axes: tuple[int, ...]

    def hits(self, rows: Rows, scores: Array) -> Array:
        """Where the scores of the classes are."""
        first, *others = self.axes
        number = lax.broadcasted_iota(jnp.int32, scores.shape, first)
        for axis in others:
            along = lax.broadcasted_iota(jnp.int32, scores.shape, axis)
            number = number * scores.shape[axis] + along
        return number == self._here(rows, scores)

    def distribution(self, rows: Rows, scores: Array) -> Entries:
        """All the weight on the class; none in rows whose class is out of range."""
        hits = self.hits(rows, scores) & self.known
        return (share_like(vary_like(indicator(hits, scores.dtype), scores), scores),)

    def pick(self, rows: Rows, scores: Array) -> Array:
        """The score of the class, one per row."""
        *others, axis = self.axes
        here = self._here(rows, scores)
        length = scores.shape[axis]
        if others or length == 0 or jax.typeof(scores).sharding.spec[axis] is not None:
            # Nothing to look up, or no one place to look it up on an explicit mesh.
            return rows.sum((jnp.where(self.hits(rows, scores), scores, 0),))
        index = jnp.clip(here, 0, length - 1)
        picked = jnp.take_along_axis(scores, index, axis, mode="promise_in_bounds")
        if not rows.names:
            return picked
        return lax.psum(jnp.where(here == index, picked, 0), rows.names)

    def _here(self, rows: Rows, scores: Array) -> Array:
        """The numbers, counted from the first class that is on this device."""
        if not rows.names:
            return self.number
        (axis,) = self.axes
        return self.number - lax.axis_index(rows.names) * scores.shape[axis]


def prepare_scores(scores: ArrayLike, axis: Axis, options: Options) -> tuple[Rows, Entries]:
    """The rows and their scores, if the mask can't be taken for one of rows."""
    rows, z = prepare(scores, axis, options, name="scores")
    shape = z[0].shape
    mask = () if options.where is None else jnp.shape(options.where)
    of_rows = rows.flat_shape(z[0])
    if 0 < len(mask) < len(shape) and mask == of_rows:
        of_classes, with_axes = (1,) * (len(shape) - len(mask)) + mask, rows.shape(z[0])
        if of_classes != with_axes:  # else it is the same, as for one class in one row
            raise ValueError(
                f"where must have the axes of scores, shape {of_classes} to exclude classes or "
                f"{with_axes} to exclude rows, since {mask} could mean either, got shape {mask}."
            )
    return rows, z


def as_target(rows: Rows, entries: Entries, targets: ArrayLike, axis: Axis) -> Classes | Entries:
    """The targets, checked: classes, or distributions as entries.

    Integers are classes, unless they have all axes of the scores, as one-hot rows have.
    """
    (scores,) = entries
    targets = jnp.asarray(targets)
    check_real("targets", targets)
    if targets.shape == scores.shape or jnp.issubdtype(targets.dtype, jnp.floating):
        # No other axes are added: floats of one axis may be classes.
        if targets.ndim != scores.ndim or not broadcasts(targets.shape, scores.shape):
            raise ValueError(
                "targets must be integer classes, or distributions of the shape of scores "
                f"{scores.shape}, or 1 instead of a size, got {targets.dtype} of shape "
                f"{targets.shape}."
            )
        targets = jnp.broadcast_to(targets.astype(scores.dtype), scores.shape)
        return (share_like(vary_like(targets, scores), scores),)
    if rows.names and len(rows.axes) != 1:
        raise ValueError(
            f"targets must be distributions over {len(rows.axes)} axes across devices, got "
            "integers, which name a class along one axis."
        )
    wanted = rows.flat_shape(scores)
    if len(targets.shape) != len(wanted) or not broadcasts(targets.shape, wanted):
        without = f"axis {rows.axes[0]}" if len(rows.axes) == 1 else f"axes {rows.axes}"
        raise ValueError(
            f"targets must have the shape of scores without {without}, {wanted}, if they are "
            f"classes, got shape {targets.shape}."
        )
    targets = jnp.expand_dims(jnp.broadcast_to(targets, wanted), rows.axes)
    return _as_classes(targets, rows.length(entries), in_given_order(axis, scores.ndim))


def as_distribution(
    rows: Rows, entries: Entries, targets: ArrayLike, axis: Axis
) -> tuple[Entries, Classes | None]:
    """The targets as distributions, and as the classes that they may be."""
    target = as_target(rows, entries, targets, axis)
    if isinstance(target, Classes):
        return target.distribution(rows, entries[0]), target
    return target, None


def without_ignored(targets: ArrayLike, ignore_index: int | None) -> tuple[Array | None, ArrayLike]:
    """Where targets are the class that is ignored, and they with class 0 in its place."""
    if ignore_index is None:
        return None, targets
    targets = jnp.asarray(targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return None, targets
    info = jnp.iinfo(targets.dtype)
    if not info.min <= ignore_index <= info.max:  # no target can be it
        return None, targets
    ignored = targets == ignore_index
    return ignored, jnp.where(ignored, 0, targets)


def one_per_row(
    rows: Rows, loss: Array, target: Classes | Entries | None, scores: ArrayLike
) -> Array:
    """The losses as they are returned: NaN, without gradient, for a class out of range.

    Half precision would lose the digits of their sum.
    """
    if isinstance(target, Classes):
        loss = nan_unless(target.known, jnp.where(target.known, loss, 0))
    return rows.flatten(loss).astype(wide(output_dtype(scores)))


def _as_classes(targets: Array, length: int, axes: tuple[int, ...]) -> Classes:
    number = targets.astype(jnp.int32)
    # What the conversion changes was out of range, and must not become a neighbour.
    known = (number.astype(targets.dtype) == targets) & (number >= 0) & (number < length)
    number = check_known("targets", jnp.where(known, number, 0), known, length)
    return Classes(number, known, axes)


def check_known(name: str, classes: Array, known: Array, length: int) -> Array:
    """The classes as they are; under `checkify`, an error if one is not known."""
    message = f"{name} must be classes from 0 to {length - 1}, got one out of range."
    return checked(classes, known, message)


def not_negative(loss: Array, noise: Array | float = jnp.inf) -> Array:
    """The loss but for what rounding takes it below 0; a maximum might lose NaN."""
    return jnp.where((loss < 0) & (loss >= -noise), 0, loss)


def without_rounding(total: Array, size: ArrayLike) -> Array:
    """A sum whose terms cancel, exactly 0 where it is but a rounding error; the derivative stays.

    Args:
      total: the sum.
      size: the sum of the absolute values of its terms.
    """
    noise = 8 * jnp.finfo(total.dtype).eps * size
    return total - lax.stop_gradient(jnp.where(jnp.abs(total) <= noise, total, 0))


def filled_scores(scores: Array, counts: Array) -> Array:
    """The scores, and unequal numbers in rows that do not count.

    These rows add 0 times their derivatives, which all losses have at unequal scores.
    """
    unequal = 1 / (1 + jnp.arange(scores.shape[-1], dtype=scores.dtype))
    return jnp.where(counts[..., None], scores, with_ndim(unequal, scores.ndim))


def filled_targets(targets: Array, counts: Array) -> Array:
    """The targets, and class 0, or a share of every class, in rows that do not count."""
    if targets.ndim == counts.ndim:
        return jnp.where(counts, targets, 0)
    return jnp.where(counts[..., None], targets, 1 / targets.shape[-1])
