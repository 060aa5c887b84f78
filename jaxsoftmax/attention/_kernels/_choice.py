"""Which calls have a kernel, and how one is set up; a sentence for those that have none."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax import _jax
from jaxsoftmax._configured import Configured
from jaxsoftmax._form import Form
from jaxsoftmax._implementations import NoKernelError, refuse
from jaxsoftmax._scores import known_number, with_ndim
from jaxsoftmax._threshold import form_of
from jaxsoftmax.attention._arguments import Sizes, function_name
from jaxsoftmax.attention._cutting import InBlocks
from jaxsoftmax.attention._kernels import _operands
from jaxsoftmax.attention._kernels._backward import backward
from jaxsoftmax.attention._kernels._forms import has_kernel
from jaxsoftmax.attention._kernels._forward import forward
from jaxsoftmax.attention._kernels._rule import Attention, Kernels, attend
from jaxsoftmax.attention._kernels._tiles import Call
from jaxsoftmax.attention._prepared import OF_NORMALIZER, Rules, of_normalizer

# What a program may take of the VMEM that it asks for; the rest is the compiler's.
_ROOM = _operands.VMEM * 7 // 8


def by_kernels(
    platforms: Sequence[str],
    interpret: bool,
    block_size: int | None,
    in_blocks: InBlocks,
    rules: Rules,
    operands: dict[str, Array],
    sizes: Sizes,
) -> tuple[Array, ...]:
    """What `in_blocks(rules, operands, sizes)` returns, by kernels on platforms that have one.

    Args:
      platforms: those whose kernels may be used.
      interpret: whether those are interpreted, on any platform.
      block_size: how many queries make a block, None: as many as suit the kernels.
      in_blocks: attention by XLA, of which all derivatives are but for the first in reverse mode.
      rules: what happens between the two products.
      operands: the arrays.
      sizes: their sizes.
    """
    _check(rules)
    normalizer: Any = rules.normalizer
    call, temperature = _call(interpret, block_size, rules, sizes)
    own = {OF_NORMALIZER + name: jnp.asarray(x) for name, x in normalizer.arrays.items()}
    still = functools.partial(_reference, in_blocks, _without_arrays(rules), sizes)
    params_of = functools.partial(_params, normalizer.with_arrays({}), sizes)
    of_kernels = {}
    for platform, (kernels, fitted) in _found(platforms, call, operands).items():
        attention = Attention(kernels, fitted, still, params_of, temperature)
        of_kernels[platform] = functools.partial(attend, attention)
    arrays = operands | own
    if interpret:
        (attend_interpreted,) = of_kernels.values()
        return (attend_interpreted(arrays),)
    return (lax.platform_dependent(arrays, default=still, **of_kernels),)


def _found(
    platforms: Sequence[str], call: Call, operands: dict[str, Array]
) -> dict[str, tuple[Kernels, Call]]:
    """The kernels of each platform that has some for the call, and the call as it suits them."""
    found, errors = {}, []
    for platform in platforms:
        try:
            found[platform] = {"tpu": _on_tpu, "cuda": _on_hopper}[platform](call, operands)
        except NoKernelError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _on_tpu(call: Call, operands: dict[str, Array]) -> tuple[Kernels, Call]:
    if (dtype := operands["query"].dtype) not in (jnp.bfloat16, jnp.float32):
        _refuse(f"the dtype {dtype}")
    return Kernels(forward, backward), _fitted(_in_blocks(call), operands)


def _on_hopper(call: Call, operands: dict[str, Array]) -> tuple[Kernels, Call]:
    try:
        from jaxsoftmax.attention._kernels import _hopper_choice
    except ImportError:  # a jaxlib may come without what Mosaic GPU needs
        _refuse("GPUs in this installation of JAX")
    return _hopper_choice.found(call, operands)


def _call(
    interpret: bool, block_size: int | None, rules: Rules, sizes: Sizes
) -> tuple[Call, float | None]:
    """What is known of a call, and its temperature if that is a number."""
    form, params, temperature = _of_normalizer(rules.normalizer, sizes)
    scale, cap = _number("scale", rules.scale), _number("logits_soft_cap", rules.soft_cap)
    call = Call(
        form=form,
        sizes=sizes,
        block=block_size or 0,
        before=rules.before,
        after=rules.after,
        offset=rules.offset,
        scale=1.0 if scale is None else scale,
        soft_cap=None if cap == math.inf else cap,
        score_mod=rules.score_mod,
        mask_mod=rules.mask_mod,
        params=params,
        interpret=interpret,
    )
    return call, temperature


def _without_arrays(rules: Rules) -> Rules:
    normalizer: Any = rules.normalizer
    return dataclasses.replace(rules, normalizer=normalizer.with_arrays({}))


def _reference(
    in_blocks: InBlocks, rules: Rules, sizes: Sizes, arrays: Mapping[str, Array]
) -> Array:
    """The same by XLA."""
    own, operands = of_normalizer(arrays)
    normalizer: Any = rules.normalizer
    normalizer = normalizer.with_arrays(own)
    return in_blocks(dataclasses.replace(rules, normalizer=normalizer), operands, sizes)[0]


_refuse = functools.partial(refuse, "pallas")


def _check(rules: Rules) -> None:
    for name, given in {
        "return_residual": rules.row_value,
        "dropout_rate": rules.dropout_key,
        "kv_axis_name or keys that are spread over devices": rules.kv_names or None,
    }.items():
        if given is not None:
            _refuse(name)
    if not isinstance(rules.first[2], int):
        _refuse("query_axis_name or queries that are spread over devices")
    score, index = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))
    _check_function("score_mod", rules, score, *[index] * 4)
    _check_function("mask_mod", rules, *[index] * 4)


def _check_function(name: str, rules: Rules, *args: Any) -> None:
    function = getattr(rules, name)
    if function is None:
        return
    # Memory of the kernel would have to hold whatever it is.
    if _jax.hoist(function, *args)[1]:
        _refuse(f"a {name} that closes over arrays")
    if not all(isinstance(first, int) for first in rules.first):
        _refuse(f"a {name} of batch entries or heads that are spread over devices")


def _number(name: str, value: Any) -> float | None:
    number = known_number(value)
    if number is None and value is not None:
        _refuse(f"a {name} that is an array")
    return number


def _of_normalizer(normalizer: Any, sizes: Sizes) -> tuple[Form, int, float | None]:
    """The form, how many parameters it has, and the temperature if it is a number."""
    if not isinstance(normalizer, Configured) or not hasattr(normalizer.function, "form"):
        _refuse(f"the normalizer {function_name(normalizer)}")
    for name in ("sink", "where", "axis", "segment_ids"):
        if name in {**dict(normalizer.options), **normalizer.arrays}:
            _refuse(f"a normalizer with the option {name}")
    for name, x in normalizer.arrays.items():
        shape = with_ndim(jnp.asarray(x), 4).shape
        if shape[2:] != (1, 1):
            _refuse(f"an option {name} of shape {jnp.shape(x)}, that is not one number per head")
    form, params = _form_and_params(normalizer, sizes)
    if not has_kernel(form):
        _refuse(f"the normalizer {function_name(normalizer)}")
    temperature = dict(normalizer.options).get("temperature")
    if temperature is not None and not known_number(temperature):
        _refuse(f"the temperature {temperature}")
    return form, len(params), temperature


def _form_and_params(normalizer: Configured, sizes: Sizes) -> tuple[Form, tuple[Array, ...]]:
    rows = jnp.zeros((sizes.batch, sizes.heads, 1, 1), jnp.float32)
    found = form_of(normalizer, rows, {"axis": -1})
    if found is None:
        _refuse(f"the normalizer {function_name(normalizer)}")
    form, _, _, params = found
    return form, params


def _params(normalizer: Configured, sizes: Sizes, own: dict[str, Array]) -> tuple[Array, ...]:
    """The parameters of the form, (B, N, 1, 1) or less, of the arrays of the normalizer."""
    return _form_and_params(normalizer.with_arrays(own), sizes)[1]


def _in_blocks(call: Call) -> Call:
    if not call.block:
        few = min(call.sizes.queries, call.sizes.keys) <= 128
        return dataclasses.replace(call, block=128 if few else 256)
    if call.block % 128:
        _refuse(f"a block_size that is no multiple of 128, {call.block}")
    return call


def _fitted(call: Call, operands: Mapping[str, Array]) -> Call:
    """The call with what fits into VMEM: all scores of a block of queries, if that is possible."""
    for whole in (True, False):
        for block in dict.fromkeys((call.block, 128)):
            fitted = dataclasses.replace(call, block=block, whole=whole)
            if max(_room_forward(fitted, operands), _room_backward(fitted, operands)) <= _ROOM:
                return fitted
    sizes = call.sizes
    return _refuse(f"{sizes.queries} queries and {sizes.keys} keys, which do not fit into VMEM")


def _lanes(n: int) -> int:
    return -(-n // 128) * 128


def _room_forward(call: Call, operands: Mapping[str, Array]) -> int:
    """Bytes that the forward kernel keeps in VMEM; what moves in or out has two places."""
    sizes, size = call.sizes, operands["query"].dtype.itemsize
    features, values = sizes.features, sizes.value_features
    moving = call.keys * (_lanes(features) + values) * size
    moving += call.block * (features * size + 2 * values * 4 + 32)
    moving += call.block * call.blocks_of(sizes.keys) * 4
    moving += _of_scores(operands, call.keys, call.block)
    kept = call.block * (2 * values + 256) * 4
    if call.whole and not call.form.only_scales:
        kept += call.keys * call.block * 4
    return 2 * moving + kept


def _room_backward(call: Call, operands: Mapping[str, Array]) -> int:
    sizes, size = call.sizes, operands["query"].dtype.itemsize
    features, values = sizes.features, sizes.value_features
    widths = _lanes(features) + 2 * features + _lanes(values) + values
    moving = call.queries * (widths * size + 64)
    moving += call.block * 4 * (_lanes(features) + _lanes(values)) * 2
    moving += _of_scores(operands, call.block, call.queries)
    if "bias" in operands:
        moving += call.block * call.queries * 4
    return 2 * moving + call.queries * features * 4


def _of_scores(operands: Mapping[str, Array], keys: int, queries: int) -> int:
    """Bytes of what arrays over scores have for a stretch of both."""
    total = 0
    for name in _operands.OVER_SCORES:
        if name in operands:
            *_, rows, columns = operands[name].shape
            rows, columns = queries if rows > 1 else 128, keys if columns > 1 else 8
            total += rows * columns * operands[name].dtype.itemsize
    return total
