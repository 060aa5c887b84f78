"""Held-out examples to fit to: checked, weighted, and gone through in blocks that fit a cache."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._configured import public_with_loss
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._reductions import indicator
from jaxsoftmax._scores import as_scores, at_least_int32, check_mask, check_real
from jaxsoftmax._sharding import explicit, gathered, joinable
from jaxsoftmax.calibration._predictions import (
    explained,
    in_unit,
    row_weights,
    wrong_labels,
    wrong_weights,
)
from jaxsoftmax.losses._targets import filled_scores, filled_targets

P = ParamSpec("P")
R = TypeVar("R")
Loss = Callable[[Array, Array], Array]

# The numbers in a block: 1 MB of float32.
_BLOCK = 2**18


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("logits", "labels", "weights"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of logits with their labels.

    Attributes:
      logits: (n, classes), in the dtype that came; or (n, 1), how far class 1 of two is above 0.
      labels: (n,) classes or (n, classes) distributions.
      weights: (n,), in the dtype to compute in; 0 for rows that do not count.
    """

    logits: Array
    labels: Array
    weights: Array

    @property
    def dtype(self) -> Any:
        """The dtype to compute in."""
        return self.weights.dtype

    def loss(self, loss: Loss) -> Loss:
        """The loss of `(logits, labels)`, the logits being as many columns as here."""
        return _apart(loss if self.logits.shape[1] != 1 else lambda z, y: loss(_both_columns(z), y))

    def of_whole_rows(self) -> "Examples":
        """The same, of which no row is spread over an explicit mesh, for parameters per class."""
        labels = gathered(self.labels, 1) if self.labels.ndim > 1 else self.labels
        return Examples(gathered(self.logits, 1), labels, self.weights)

    def every(self, stride: int) -> "Examples":
        """A part of the examples, evenly spread."""
        return jax.tree.map(lambda x: x[::stride], self)

    def sum(self, fun: Callable[["Examples"], Any]) -> Any:
        """The sum of `fun`, a pytree of numbers, over blocks of rows."""
        n, classes = self.logits.shape
        size = max(1, min(n, _BLOCK // max(classes, 1)))

        def block(number: Array) -> "Examples":
            # The last block reaches back into the one before, whose rows count no more.
            begin = number * size
            start = jnp.minimum(begin, n - size)
            part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), self)
            fresh = start + jnp.arange(size, dtype=jnp.int32) >= begin
            weights = jnp.where(fresh, part.weights, 0)
            counts = weights > 0
            logits = filled_scores(part.logits.astype(self.dtype), counts)
            return Examples(logits, filled_targets(part.labels, counts), weights)

        def step(total: Any, number: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, fun(block(number))), None

        if n == 0:
            return fun(dataclasses.replace(self, logits=self.logits.astype(self.dtype)))
        if n == size:
            return fun(block(jnp.int32(0)))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fun, block(jnp.int32(0)))
        )
        return lax.scan(step, zeros, jnp.arange(-(-n // size), dtype=jnp.int32))[0]


def fit(fun: Callable[P, R]) -> Callable[P, R]:
    """Jits a fit to `(logits, labels, where, *, loss, ...)`; see `explained`."""
    return explained(public_with_loss()(fun), _what_is_wrong)


def _what_is_wrong(
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    **others: Any,
) -> dict[str, Array]:
    examples = as_examples(logits, labels, where, weights)
    faults, rows = {}, jnp.shape(labels)
    if examples.labels.ndim == 1:
        classes = max(examples.logits.shape[1], 2)
        faults = wrong_labels(examples.labels, classes, examples.weights != 0)
    elif jnp.ndim(logits) > 1:
        rows = rows[:-1]
    counts = (examples.weights != 0).reshape(rows)
    faults |= wrong_weights("weights", weights, counts)
    faults |= wrong_weights("class_weights", class_weights, True)
    for name, value in others.items():
        if name.endswith("penalty"):
            faults |= wrong_weights(name, value, True)
    return faults


def _both_columns(logits: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(logits), logits], 1)


def as_examples(
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    class_weights: ArrayLike | None = None,
) -> Examples:
    """Checks what a fit is given."""
    scores = jnp.asarray(logits)
    dtype = jax.eval_shape(functools.partial(as_scores, name="logits"), logits).dtype
    if scores.ndim == 0:
        raise ValueError("logits must have an axis of classes, got a scalar.")
    labels = jnp.asarray(labels)
    if labels.dtype == jnp.bool_ and (labels.ndim == 1 or scores.shape[-1] == 1):
        labels = labels.astype(jnp.int32)
    check_real("labels", labels)
    are_classes = jnp.issubdtype(labels.dtype, jnp.integer)
    if are_classes:
        labels = at_least_int32(labels)
    if scores.ndim == labels.ndim == 1:  # of class 1 of two
        scores = scores[:, None]
        labels = labels if are_classes else labels[:, None]
    rows, classes = scores.shape[:-1], scores.shape[-1]
    wanted = rows if are_classes else scores.shape
    if labels.shape != wanted:
        kind = "classes" if are_classes else "distributions"
        raise ValueError(
            f"labels must have shape {wanted} if they are {kind}, got shape {labels.shape}."
        )
    # A search has no derivatives worth the name.
    scores, labels = lax.stop_gradient((scores, labels))
    n = math.prod(rows)
    scores = joinable(scores, len(rows)).reshape(n, classes)
    labels = joinable(labels, len(rows)).reshape((n,) if are_classes else (n, classes))
    if classes == 1 and not are_classes:
        labels = jnp.concatenate([1 - labels, labels], 1)
    counted = lax.stop_gradient(row_weights(weights, rows, dtype)).reshape(n)
    if class_weights is not None:
        of_labels = _label_weights(labels, class_weights, max(classes, 2), dtype)
        counted = jnp.where(counted == 0, 0, counted * of_labels)
    if where is not None:
        takes_part = joinable(jnp.broadcast_to(check_mask(where, rows), rows), len(rows))
        counted = jnp.where(takes_part.reshape(n), counted, 0)
    if weights is not None or class_weights is not None:
        counted, _ = in_unit(counted)
    return Examples(scores, labels, counted)


def _label_weights(labels: Array, class_weights: ArrayLike, classes: int, dtype: Any) -> Array:
    class_weights = jnp.asarray(class_weights)
    check_real("class_weights", class_weights)
    if class_weights.shape != (classes,):
        raise ValueError(
            f"class_weights must have shape {(classes,)}, one per class, got shape "
            f"{class_weights.shape}."
        )
    class_weights = lax.stop_gradient(class_weights.astype(dtype))
    # A fit to negative weights has no answer.
    class_weights = nan_unless(class_weights >= 0, class_weights)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        # One that is out of range counts: its loss is NaN, and so is to be all.
        known = (labels >= 0) & (labels < classes)
        of_labels = (
            gathered(class_weights)
            .at[labels]
            .get(mode="clip", wrap_negative_indices=False, out_sharding=explicit(labels))
        )
        return jnp.where(known, of_labels, 1)
    return labels.astype(dtype) @ class_weights


def mean_loss(examples: Examples, loss: Callable[[Any, Examples], Array]) -> Callable[[Any], Array]:
    """The weighted mean of `loss(params, block)`, one value per row, as a function of `params`.

    The gradient is taken block by block along with the value. A row whose loss is infinite is so
    at any parameters, as one of a class that was ruled out, and has no say.
    """

    def of_block(params: Any, block: Examples) -> tuple[Array, Array]:
        losses = loss(params, block)
        if losses.shape != block.weights.shape:
            raise ValueError(
                f"loss must return one value per row, shape {block.weights.shape}, got shape "
                f"{losses.shape}."
            )
        losses = losses.astype(block.dtype)
        weights = jnp.where(losses == jnp.inf, 0, block.weights)
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0)), jnp.sum(weights)

    def mean_of(total: Array, weight: Array) -> Array:
        return total / jnp.where(weight == 0, 1, weight)

    @custom_vjp
    def mean(params: Any) -> Array:
        return mean_of(*examples.sum(functools.partial(of_block, params)))

    def fwd(params: Any) -> tuple[Array, Any]:
        slope_of = jax.value_and_grad(of_block, has_aux=True)
        (total, weight), slope = examples.sum(functools.partial(slope_of, params))
        return mean_of(total, weight), jax.tree.map(lambda x: mean_of(x, weight), slope)

    def bwd(gradient: Any, ct: Array) -> tuple[Any]:
        return (jax.tree.map(lambda g: ct * g, gradient),)

    mean.defvjp(fwd, bwd)
    return mean


def _apart(loss: Loss) -> Loss:
    """The loss, with gradient 0 in rows in which it is infinite, even if its own is NaN there."""

    @custom_vjp
    def losses(logits: Array, labels: Array) -> Array:
        return loss(logits, labels)

    def fwd(logits: Array, labels: Array) -> tuple[Array, Any]:
        values, pull_back = jax.vjp(lambda logits: loss(logits, labels), logits)
        return values, (pull_back, values)

    def bwd(residuals: Any, ct: Array) -> tuple[Array, None]:
        pull_back, values = residuals
        (ct_logits,) = pull_back(ct)
        return jnp.where(jnp.expand_dims(values == jnp.inf, 1), 0, ct_logits), None

    losses.defvjp(fwd, bwd)
    return losses


def spread(examples: Examples) -> Array:
    """The root mean square of the logits' distance from their row's mean, infinite ones apart."""

    def moments(block: Examples) -> tuple[Array, Array]:
        logits = block.logits if block.logits.shape[1] != 1 else _both_columns(block.logits)
        counted = jnp.isfinite(logits) & (block.weights[:, None] > 0)
        finite = jnp.where(counted, logits / largest, 0)
        counts = indicator(counted, finite.dtype)
        mean = jnp.sum(finite, 1) / jnp.maximum(jnp.sum(counts, 1), 1)
        return jnp.sum(jnp.where(counted, finite - mean[:, None], 0) ** 2), jnp.sum(counts)

    # Squares of what is measured by the largest do not overflow, nor are all of them too small.
    finite = jnp.isfinite(examples.logits) & (examples.weights[:, None] > 0)
    largest = jnp.max(jnp.where(finite, jnp.abs(examples.logits), 0), initial=0)
    largest = jnp.where(largest == 0, 1, largest).astype(examples.dtype)
    squares, count = examples.sum(moments)
    return largest * jnp.sqrt(squares / jnp.maximum(count, 1))


def by_class(examples: Examples, unit: Array) -> tuple[Array, Array]:
    """The mean and the standard deviation of each class's finite logits, in units of `unit`.

    The deviation is 1 where there is none.
    """

    def mean_of(function: Callable[[Array], Array]) -> Array:
        def moments(block: Examples) -> tuple[Array, Array]:
            finite = jnp.isfinite(block.logits)
            weights = jnp.where(finite, block.weights[:, None], 0)
            values = function(jnp.where(finite, block.logits, 0) / unit)
            return jnp.sum(weights * values, 0), jnp.sum(weights, 0)

        total, weight = examples.sum(moments)
        return total / jnp.where(weight == 0, 1, weight)

    center = mean_of(lambda x: x)
    variance = mean_of(lambda x: (x - center[None]) ** 2)
    return center, jnp.sqrt(jnp.where(variance > 0, variance, 1))
