"""What computes rows: XLA, or kernels where they are named."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._implementations import NoKernelError, is_interpreted, platforms
from jaxsoftmax._reductions import Entries, Rows


def by_implementation(
    function: Callable[..., Entries], rows: Rows, scores: Entries, *params: Array
) -> Entries:
    """`function(rows, scores, *params)`, by kernels if they are named and there is a TPU."""
    by_xla = functools.partial(function, rows)
    if not platforms(rows.implementation, "rows") or 0 in scores[0].shape:
        return by_xla(scores, *params)
    # Pallas is imported by those who use it.
    from jaxsoftmax._row_kernels import in_kernels

    interpret = is_interpreted(rows.implementation)
    by_kernels = functools.partial(in_kernels, function, rows, interpret=interpret)
    try:
        if interpret:
            return by_kernels(scores, *params)
        return lax.platform_dependent(scores, *params, tpu=by_kernels, default=by_xla)
    except NoKernelError:
        if rows.implementation is None:
            return by_xla(scores, *params)
        raise


def batched_in_kernels(rule: custom_vjp, place: int) -> Callable[..., Entries]:
    """`rule`, for which in kernels a batch of rows is more rows.

    As they come from `vmap`, each would be a block. JAX asks nobody before it maps a function whose
    rule is its own, so that only calls that name a kernel have a rule for `vmap`.

    Args:
      rule: a function of rows, scores and row values, after `place` arguments without derivatives.
      place: where the rows are.
    """
    in_kernels = copy.copy(rule)

    def batch(size: int, is_batched: Any, *args: Any) -> Entries:
        rows, *values = args[place:]
        rows = dataclasses.replace(rows, axes=tuple(axis + 1 for axis in rows.axes))
        (first, *sink), *params = jax.tree.map(
            lambda x, b: x if b else x[None], values, list(is_batched[1:])
        )
        first = jnp.broadcast_to(first, (size, *first.shape[1:]))
        return in_kernels(*args[:place], rows, (first, *sink), *params)

    in_kernels.defbatch(batch)

    @functools.wraps(rule)
    def applied(*args: Any) -> Entries:
        of_kernels = platforms(args[place].implementation, "rows")
        return (in_kernels if of_kernels else rule)(*args)

    return applied
