"""What the measures are given: probabilities and the classes that came true."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxsoftmax._scores import as_scores, check_real

# Rounding takes a probability no further than this beyond 0 and 1.
_SLACK = 1e-2


def as_predictions(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """The probabilities and labels, checked.

    If a row holds no probabilities or has a class out of range, all are NaN, and so is what is
    computed of them: numbers are not known while tracing, so there can be no error.
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
    return jnp.where(valid, probs, jnp.nan), labels


def came_true(labels: Array, classes: int, dtype: Any) -> Array:
    """1 at the class of each label, 0 at the others."""
    hit = labels[:, None] == jnp.arange(classes, dtype=labels.dtype)[None]
    return jnp.where(hit, jnp.ones((), dtype), jnp.zeros((), dtype))


def confidences(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """The largest probability of each row, and 1 where its class came true."""
    probs, labels = as_predictions(probs, labels)
    invalid = jnp.isnan(probs[:, 0])
    hits = (jnp.argmax(probs, 1) == labels).astype(probs.dtype)
    # A maximum may lose NaN.
    return jnp.where(invalid, jnp.nan, jnp.max(probs, 1)), jnp.where(invalid, jnp.nan, hits)
