"""What the measures are given: probabilities and the classes that came true."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jaxsoftmax._reductions import indicator
from jaxsoftmax._scores import as_scores, check_real

T = TypeVar("T")

# Rounding takes a probability no further than this beyond 0 and 1.
_SLACK = 1e-2


def as_predictions(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """The probabilities and labels, checked.

    If a row holds a number outside of [0, 1] or has a class out of range, all are NaN, and so is
    what is computed of them: numbers are not known while tracing, so there can be no error.
    """
    probs, labels = as_scores(probs, "probs"), jnp.asarray(labels)
    if probs.ndim != 2 or probs.shape[1] == 0:
        raise ValueError(f"probs must have shape (n, classes), got shape {probs.shape}.")
    check_real("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer classes, got dtype {labels.dtype}.")
    if labels.shape != probs.shape[:1]:
        raise ValueError(
            f"labels must have shape {probs.shape[:1]}, one per row of probs, got shape "
            f"{labels.shape}."
        )
    if jnp.iinfo(labels.dtype).bits < 32:
        labels = labels.astype(jnp.int32)  # there may be more classes than these can count
    known = (labels >= 0) & (labels < probs.shape[1])
    valid = jnp.all(known) & jnp.all((probs >= -_SLACK) & (probs <= 1 + _SLACK))
    # Not by a minimum, which has no derivative at 1 itself.
    probs = jnp.where(probs > 1, 1, jnp.where(probs < 0, 0, probs))
    return jnp.where(valid, probs, jnp.nan), labels


def came_true(labels: Array, classes: int, dtype: Any) -> Array:
    """1 at the class of each label, 0 at the others."""
    return indicator(labels[:, None] == jnp.arange(classes, dtype=labels.dtype)[None], dtype)


def of_each_class(function: Callable[[Array, Array], T], probs: ArrayLike, labels: ArrayLike) -> T:
    """`function` of each class's probabilities, and of 1 where the class came true and 0 elsewhere.

    One class after the other, for bins of all at once would fill the memory.
    """
    probs, labels = as_predictions(probs, labels)
    columns = probs.T, came_true(labels, probs.shape[1], probs.dtype).T
    return lax.map(lambda pair: function(*pair), columns)


def confidences(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """The largest probability of each row, and 1 where its class came true."""
    probs, labels = as_predictions(probs, labels)
    invalid = jnp.isnan(probs[:, 0])
    hits = (jnp.argmax(probs, 1) == labels).astype(probs.dtype)
    # A maximum may lose NaN.
    return jnp.where(invalid, jnp.nan, jnp.max(probs, 1)), jnp.where(invalid, jnp.nan, hits)
