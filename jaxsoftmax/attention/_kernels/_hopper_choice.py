"""Which calls have a kernel on a Hopper GPU, and how one is set up."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax import _jax
from jaxsoftmax._implementations import refuse
from jaxsoftmax.attention._kernels._forms import (
    gaps,
    row_values,
    shares,
    squares_errors,
    with_slope,
)
from jaxsoftmax.attention._kernels._hopper import BLOCK
from jaxsoftmax.attention._kernels._hopper_backward import backward
from jaxsoftmax.attention._kernels._hopper_forward import forward
from jaxsoftmax.attention._kernels._plain import is_known
from jaxsoftmax.attention._kernels._rule import Kernels
from jaxsoftmax.attention._kernels._tiles import F32, Call

# Heads get more features, of zeros, up to a multiple of this: so rows can be swizzled.
_STRETCH = 32
# Sums of more would not leave registers for a tile.
_MOST = 256

_refuse = functools.partial(refuse, "pallas")


def found(call: Call, operands: Mapping[str, Array]) -> tuple[Kernels, Call]:
    """The kernels, and the call in their blocks; a `block_size` is not theirs to have."""
    if not (call.interpret or _jax.may_be_hopper()):
        _refuse("this GPU")
    dtypes = {operands[name].dtype for name in ("query", "key", "value")}
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        _refuse(f"the dtypes {', '.join(sorted(map(str, dtypes)))} on a GPU")
    widths = call.sizes.features, call.sizes.value_features
    if max(widths) > _MOST:
        _refuse(f"{max(widths)} features on a GPU")
    if not _can_lower(call):
        _refuse("these functions on a GPU")
    # Where sums of wide values, or forms with many terms, would not leave registers for a tile.
    is_light = call.params == 0 and max(widths) <= 64
    part = BLOCK if is_light else BLOCK // 2
    features, value_features = (-(-width // _STRETCH) * _STRETCH for width in widths)
    sizes = dataclasses.replace(call.sizes, features=features, value_features=value_features)
    call = dataclasses.replace(call, sizes=sizes, block=BLOCK, part=part)
    return Kernels(forward, backward), call


def _can_lower(call: Call) -> bool:
    """Whether the functions of the form, and of a user, are made of what Mosaic GPU knows."""
    form, score = call.form, jax.ShapeDtypeStruct((), F32)
    params, index = (score,) * call.params, jax.ShapeDtypeStruct((), jnp.int32)

    def weights(x: Array, kept: tuple[Array, ...], *params: Array) -> tuple[Array, ...]:
        made = shares(form, gaps(form, x, kept), with_slope(form, kept, params), params)
        return *made, *form.moved_by_params(made[0], *params)

    def search(x: Array, *params: Array) -> object:
        state = form.start(x, *params)
        sums = form.terms(x, form.of_row(state[0], *params), *params)
        return form.update(sums, state, *params), squares_errors(form, params, x)

    known = is_known(weights, score, (score,) * row_values(form), *params)
    if not form.only_scales:
        known = known and is_known(search, score, *params)
    if call.score_mod is not None:
        known = known and is_known(_with_gradient(call.score_mod), score, *[index] * 4)
    if call.mask_mod is not None:
        known = known and is_known(call.mask_mod, *[index] * 4)
    return known


def _with_gradient(score_mod: Callable[..., Array]) -> Callable[..., Any]:
    def both(x: Array, *at: Array) -> Any:
        found, pull_back = jax.vjp(lambda x: score_mod(x, *at), x)
        return found, pull_back(found)

    return both
