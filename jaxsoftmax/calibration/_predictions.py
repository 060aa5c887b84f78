"""What the measures are given: probabilities and the classes that came true."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import core, lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import Kind, public, within_range
from jaxsoftmax._reductions import indicator
from jaxsoftmax._scores import (
    as_scores,
    at_least_int32,
    broadcasts,
    check_mask,
    check_real,
    with_ndim,
)
from jaxsoftmax._sharding import gathered, joinable

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Rounding takes a probability no further than this beyond 0 and 1.
_SLACK = 1e-2


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Rows of probabilities with what came true.

    Attributes:
      probs: (n, classes); or (n, 1), of one event each. NaN in rows that hold what is none.
      labels: (n,) classes, or 0 and 1.
      weights: (n,), in `unit`; 0 for rows that do not count.
      unit: see `in_unit`.
      shape: the shape that the rows came in.
    """

    probs: Array
    labels: Array
    weights: Array
    unit: Array
    shape: tuple[int, ...]

    @property
    def of_events(self) -> bool:
        """Whether there is one column, of something that happens or not."""
        return self.probs.shape[1] == 1

    def came_true(self) -> Array:
        """1 for what came true, 0 for what did not, of the shape of the probabilities."""
        first = 1 if self.of_events else 0
        classes = jnp.arange(first, first + self.probs.shape[1], dtype=self.labels.dtype)
        return indicator(self.labels[:, None] == classes[None], self.probs.dtype)

    def reduce(self, values: Array, reduction: str) -> Array:
        """The mean of a value per row; or the values, 0 for rows that do not count."""
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
        counts = self.weights != 0
        values = jnp.where(counts, values, 0)
        return self.mean(values) if reduction == "mean" else values.reshape(self.shape)

    def mean(self, values: Array) -> Array:
        """The weighted mean of finite values."""
        return jnp.sum(self.weights * values) / jnp.sum(self.weights)

    def confidences(self) -> "Events":
        """The largest probability of each row, and whether its class came true."""
        if self.of_events:
            value, outcome = self.probs[:, 0], self.came_true()[:, 0]
        else:
            value = jnp.max(self.probs, 1)
            outcome = (jnp.argmax(self.probs, 1) == self.labels).astype(self.probs.dtype)
        events = jax.tree.map(gathered, Events(value, outcome, self.weights))
        return events.all_or_none(self.probs)

    def of_each_class(self, function: Callable[["Events"], T]) -> T:
        """`function` of each column, one after the other: bins of all would fill the memory."""
        probs, outcomes, weights = map(gathered, (self.probs, self.came_true(), self.weights))

        def of_one(column: tuple[Array, Array]) -> T:
            return function(Events(*column, weights).all_or_none(probs))

        return lax.map(of_one, (probs.T, outcomes.T))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "outcome", "weights"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Events:
    """Predictions of one event each, on each device of an explicit mesh: bins are of all of them.

    Attributes:
      value: the probabilities.
      outcome: 1 where the event came, 0 where it did not.
      weights: 0 for those that do not count.
    """

    value: Array
    outcome: Array
    weights: Array

    def all_or_none(self, probs: Array) -> "Events":
        """NaN, all of them, if any of `probs` is: a maximum, or a bin, may lose it."""
        known = ~jnp.any(jnp.isnan(probs))
        value, outcome = (nan_unless(known, x) for x in (self.value, self.outcome))
        return Events(value, outcome, self.weights)


def measure(**kinds: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Jits a measure of `(probs, labels, where, *, weights, ...)`; see `public`, `explained`."""

    def decorated(fun: Callable[P, R]) -> Callable[P, R]:
        return explained(public(fun, **kinds), _what_is_wrong)

    return decorated


def explained(
    fun: Callable[P, R], what_is_wrong: Callable[..., dict[str, Array]]
) -> Callable[P, R]:
    """`fun`, with an error outside of jit that says where NaN comes from, if that is known.

    While tracing, numbers are not known: there, arguments that cannot be right, such as logits for
    probabilities, make the answer NaN.

    Args:
      fun: gives NaN if something is wrong with its arguments.
      what_is_wrong: tells, from the same arguments by name, in a form for `raise_first`.
    """
    signature = inspect.signature(fun)

    @functools.wraps(fun)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        result = fun(*args, **kwargs)
        if has_nan(result):
            given = signature.bind(*args, **kwargs).arguments
            raise_first(what_is_wrong(**{name: within_range(x) for name, x in given.items()}))
        return result

    return cast(Callable[P, R], answer)


def has_nan(result: Any) -> bool:
    """Whether there is NaN among numbers that are known."""
    leaves = jax.tree.leaves(result)
    if any(isinstance(x, core.Tracer) for x in leaves):
        return False
    return any(bool(jnp.any(jnp.isnan(x))) for x in leaves)


def raise_first(faults: dict[str, Array]) -> None:
    """Raises the first sentence whose number is not NaN.

    The number is what came; NaN means that nothing is wrong.
    """
    for sentence, got in faults.items():
        if not isinstance(got, core.Tracer) and not jnp.isnan(got):
            raise ValueError(sentence.format(f"{float(got):g}"))


def _what_is_wrong(
    probs: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    penalty: ArrayLike | None = None,
    **_: Any,
) -> dict[str, Array]:
    probs, labels, rows = _checked(probs, labels)
    counts = _weights(rows, where, weights, probs.dtype) != 0
    faults = wrong_probs(probs, counts[..., None])
    faults |= wrong_labels(labels, max(probs.shape[-1], 2), counts)
    faults |= wrong_weights("weights", weights, counts)
    return faults | wrong_weights("penalty", penalty, True)


def wrong_probs(probs: Array, counts: ArrayLike = True) -> dict[str, Array]:
    """A number that counts and is no probability, for `raise_first`."""
    sentence = "probs must be from 0 to 1, got {}; softmax makes them of logits."
    return {sentence: _one_of(probs, ((probs < -_SLACK) | (probs > 1 + _SLACK)) & counts)}


def are_probs(rows: Array) -> Array:
    """Whether all of a row are probabilities, up to rounding."""
    return jnp.all((rows >= -_SLACK) & (rows <= 1 + _SLACK), -1)


def within_bounds(probs: Array) -> Array:
    """Probabilities without what rounding has added."""
    # Not by a minimum, which has no derivative at 1 itself.
    return jnp.where(probs > 1, 1, jnp.where(probs < 0, 0, probs))


def wrong_labels(labels: Array, classes: int, counts: Array) -> dict[str, Array]:
    """A label of a row that counts and is no class, for `raise_first`."""
    sentence = f"labels must be classes from 0 to {classes - 1}, got {{}}."
    return {sentence: _one_of(labels, ((labels < 0) | (labels >= classes)) & counts)}


def wrong_weights(name: str, weights: ArrayLike | None, counts: ArrayLike) -> dict[str, Array]:
    """A negative weight of a row that counts, for `raise_first`."""
    if weights is None:
        return {}
    weights, counts = jnp.broadcast_arrays(jnp.asarray(weights), jnp.asarray(counts))
    return {f"{name} must not be negative, got {{}}.": _one_of(weights, (weights < 0) & counts)}


def _one_of(x: Array, chosen: Array) -> Array:
    """One of those that are chosen; NaN if there is none."""
    numbers = jnp.where(chosen, x.astype(jnp.result_type(float)), -jnp.inf)
    largest = jnp.max(numbers, initial=-jnp.inf)
    return nan_unless(jnp.any(chosen), largest)


def as_predictions(
    probs: ArrayLike, labels: ArrayLike, where: ArrayLike | None, weights: ArrayLike | None
) -> Predictions:
    """The probabilities and labels, checked.

    Rows that count and hold a number outside of [0, 1], or have a class out of range, are NaN.
    """
    probs, labels, rows = _checked(probs, labels)
    counted = _weights(rows, where, weights, probs.dtype)
    unit = jnp.ones((), probs.dtype)
    if weights is not None:
        counted, unit = in_unit(counted)
    counts = counted != 0
    classes = probs.shape[-1]
    labels = jnp.where(counts, labels, 0)
    # An impossible row that does not count has no say, and one that is certain has no NaN.
    probs = jnp.where(counts[..., None], probs, 1)
    known = (labels >= 0) & (labels < max(classes, 2)) & are_probs(probs)
    probs = nan_unless(known[..., None], within_bounds(probs))
    n = labels.size
    return Predictions(probs.reshape(n, classes), labels.reshape(n), counted.reshape(n), unit, rows)


def _checked(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, tuple[int, ...]]:
    """Probabilities (..., classes), labels, and the shape of the rows."""
    probs, labels = as_scores(probs, "probs"), jnp.asarray(labels)
    if probs.ndim == 1 and labels.ndim == 1:
        probs = probs[:, None]
    if probs.ndim == 0 or probs.shape[-1] == 0:
        raise ValueError(f"probs must have shape (..., classes), got shape {probs.shape}.")
    of_events = probs.shape[-1] == 1
    if of_events and labels.dtype == jnp.bool_:
        labels = labels.astype(jnp.int32)
    check_real("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer classes, got dtype {labels.dtype}.")
    if labels.shape != probs.shape[:-1]:
        raise ValueError(
            f"labels must have shape {probs.shape[:-1]}, one per row of probs, got shape "
            f"{labels.shape}."
        )
    rows = probs.shape[:-1]
    return joinable(probs, len(rows)), joinable(at_least_int32(labels), len(rows)), rows


def _weights(
    rows: tuple[int, ...], where: ArrayLike | None, weights: ArrayLike | None, dtype: Any
) -> Array:
    """How much each row counts; NaN if that is negative."""
    counted = row_weights(weights, rows, dtype)
    if where is None:
        return counted
    return jnp.where(joinable(check_mask(where, rows), len(rows)), counted, 0)


def row_weights(weights: ArrayLike | None, rows: tuple[int, ...], dtype: Any) -> Array:
    """Weights of rows of this shape, 1 by default; NaN where negative."""
    if weights is None:
        return jnp.ones(rows, dtype)
    weights = jnp.asarray(weights)
    check_real("weights", weights)
    if not broadcasts(weights.shape, rows):
        raise ValueError(f"weights must broadcast to shape {rows}, got shape {weights.shape}.")
    weights = jnp.broadcast_to(with_ndim(weights, len(rows)), rows).astype(dtype)
    weights = joinable(weights, len(rows))
    return nan_unless(weights >= 0, weights)


def in_unit(weights: Array) -> tuple[Array, Array]:
    """The weights in a unit that makes the largest one about 1; and the unit, a power of two.

    So no sum or square of weights leaves the range of floats, and no digit is lost.
    """
    largest = jnp.max(lax.stop_gradient(weights), initial=0)
    mantissa, _ = jnp.frexp(largest)
    unit = jnp.where(largest > 0, largest / (2 * mantissa), 1)
    unit = jnp.minimum(unit, 1 / jnp.finfo(unit.dtype).tiny)  # whose inverse is no subnormal
    return weights / unit, unit
