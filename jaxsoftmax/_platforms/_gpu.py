"""What XLA for GPU does better in another way."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


def dominating(general: Callable[..., Any], p: Any, *, rows: Any) -> Any:
    """1 where a probability is above 1/2, 0 elsewhere.

    A rule that begins with a difference from a maximum is one kernel.
    """
    del general
    return rows.map(lambda p, t: jnp.where(p - t == 0, jnp.round(p), 0), [p], [rows.max(p)])
