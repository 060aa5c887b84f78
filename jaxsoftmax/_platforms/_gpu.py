"""What XLA for GPU does better in another way."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# The longest row of which XLA for GPU makes all sums in one kernel, which reads it once.
_HELD = 16384


def sums_at_once(general: Callable[..., Any], *args: Any, rows: Any, one_by_one: Any) -> Any:
    """Sums one after the other where one kernel has all of a row; else each would be a pass."""
    is_held = rows.length_in_memory(args[0][0]) <= _HELD
    return (one_by_one if is_held else general)(*args)


def log_pulled_back(
    general: Callable[..., Any], logs: Any, ct: Any, *, rows: Any, logs_of: Callable[..., Any]
) -> Any:
    """`general(logs, ct)`. One kernel that has all of a row finds maximum and sum once more.

    If they were shared with the forward pass, each would be another pass over the scores.
    """
    if 0 < rows.length_in_memory(ct[0]) <= _HELD:
        logs = logs_of(rows, _anew(rows, logs.scores))
    return general(logs, ct)


def _anew(rows: Any, scores: tuple[Array, ...]) -> tuple[Array, ...]:
    """The scores, as if they were others; of half precision as they are in memory."""
    stored = rows.stored or scores[0].dtype
    return tuple(lax.optimization_barrier(z.astype(stored)).astype(z.dtype) for z in scores)


def dominating(general: Callable[..., Any], p: Any, *, rows: Any) -> Any:
    """1 where a probability is above 1/2, 0 elsewhere.

    A rule that begins with a difference from a maximum is one kernel.
    """
    del general
    return rows.map(lambda p, t: jnp.where(p - t == 0, jnp.round(p), 0), [p], [rows.max(p)])
