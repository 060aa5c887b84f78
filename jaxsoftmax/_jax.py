"""All that this package uses of JAX beyond what JAX promises to keep; no other module may.

Each function says what it uses, in which versions, and which public way would replace it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.experimental import checkify
from jax.extend.backend import get_default_device
from jax.extend.core import Literal, Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Values = Sequence[Any]
# Of points and arguments; linear in the arguments. None stands for zeros.
Linear = Callable[[Values, Values], Values]


def hoist(fun: Callable, *args: Any) -> tuple["Opened", list[Any], list[Any]]:
    """`fun` as a function `pure(consts, *args)`, what it closes over, and the types it returns.

    Uses jaxprs without their constants: in jax 0.10 `ClosedJaxpr.jaxpr` is that, since 0.11
    `Jaxpr.with_consts([])` makes it. `jax.closure_convert` would do if it hoisted integers, too.
    """
    traced, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    jaxpr, consts = opened(traced)
    return Opened(jaxpr, jax.tree.structure(out)), consts, list(traced.out_avals)


def opened(closed: Any) -> tuple[Any, list[Any]]:
    """A jaxpr without its constants, and those."""
    if not hasattr(closed, "consts"):
        return closed, []
    jaxpr = closed.with_consts([]) if hasattr(closed, "with_consts") else closed.jaxpr
    return jaxpr, list(closed.consts)


class Opened(NamedTuple):
    """A function that was traced, given the constants that it closed over."""

    jaxpr: Any
    tree: Any

    def __call__(self, consts: Values, *args: Any) -> Any:
        leaves = core.eval_jaxpr(self.jaxpr, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(self.tree, leaves)


def is_of_closure(error: Exception) -> bool:
    """Whether JAX says that nothing may close over arrays of a mesh, by `shard_map` or not."""
    return any(x in str(error) for x in ("Closing over inputs", "should match the aval mesh"))


def varying(aval: Any) -> frozenset[str]:
    """The mesh axes of `shard_map` that arrays of a type vary over: its `vma`, later renamed."""
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def is_local() -> Array:
    """Whether XLA shares nothing among devices, as `axis_context` tells when it is lowered."""
    return _is_local.bind()


def _lower_is_local(ctx: Any) -> Any:
    context = ctx.module_context.axis_context
    local = getattr(context, "num_devices", None) == 1
    if hasattr(context, "manual_axes"):
        local = context.manual_axes == frozenset(context.mesh.axis_names)
    return mlir.lower_fun(lambda: jnp.asarray(local), multiple_results=False)(ctx)


_is_local = Primitive("is_local")
_is_local.def_impl(lambda: jnp.zeros((), bool))
_is_local.def_abstract_eval(lambda: jax.typeof(np.False_))
mlir.register_lowering(_is_local, _lower_is_local)


def tangent_type(x: Any) -> Any:
    """The type of the tangents of `x`. Uses `to_tangent_aval` of types, in all versions."""
    return jax.typeof(x).to_tangent_aval()


def zeros(of: Any) -> Array:
    """Zeros of a type. Uses `ad.Zero`; `jnp.zeros` knows no tangents of integers."""
    return ad.instantiate_zeros(ad.Zero(of))


def is_tangent(tangent: Any) -> bool:
    """Whether a tangent, be it a number of Python, is not known to be 0, as an `ad.Zero` is."""
    return not isinstance(tangent, ad.Zero) and getattr(tangent, "dtype", 0) != jax.dtypes.float0


def linear(
    evaluate: Linear, transpose: Linear, points: Values, args: Values, out: Values, **other: Linear
) -> list[Any]:
    """`evaluate(points, args)`, linear in `args`, transposed as `transpose(points, cotangents)`.

    None is a cotangent that is known to be 0, given or returned; `out` are the types of what is
    returned. `reference`, if it is given, is differentiated in the points instead of `evaluate`.
    No function may close over tracers.

    Uses a primitive (`jax.extend.core.Primitive`, rules in `jax.interpreters`, in all versions).
    `jax.custom_derivatives.linear_call` would do if it had derivatives in the points and `vmap`.
    """
    functions = {"evaluate": evaluate, "transpose": transpose, "reference": evaluate} | other
    return _linear.bind(*points, *args, num=len(points), out=tuple(out), **functions)


_linear = Primitive("linear")


def _linear_evaluate(*args: Any, evaluate: Linear, num: int, **_: Any) -> Values:
    return evaluate(args[:num], args[num:])


def _linear_jvp(
    primals: Values, tangents: Values, *, reference: Linear, num: int, **params: Any
) -> tuple[Any, Any]:
    def bind(*args: Any) -> Any:
        return _linear.bind(*points, *args, reference=reference, num=num, **params)

    points, args = primals[:num], primals[num:]
    out, pushed = bind(*args), []
    if any(map(is_tangent, tangents[num:])):
        pushed.append(bind(*map(ad.instantiate_zeros, tangents[num:])))
    active = [i for i, t in enumerate(tangents[:num]) if is_tangent(t)]

    def at(*values: Any) -> Values:
        moved = dict(enumerate(points)) | dict(zip(active, values, strict=True))
        return reference(list(moved.values()), args)

    if active:
        pushed.append(jax.jvp(at, [points[i] for i in active], [tangents[i] for i in active])[1])
    return out, [sum(parts[1:], start=parts[0]) for parts in zip(*pushed, strict=True)]


def _linear_transpose(cts: Values, *args: Any, transpose: Linear, num: int, **_: Any) -> Values:
    cts = [None if isinstance(ct, ad.Zero) else ct for ct in cts]
    return [None] * num + list(transpose(args[:num], cts))


def _linear_batch(
    axis: Any, args: Values, dims: Values, *, num: int, out: Values, **functions: Linear
) -> tuple[Any, Any]:
    is_mapped = any(d is not None for d in dims)
    over = 0 if is_mapped else None

    def mapped(function: Linear) -> Linear:
        def over_axis(points: Values, args: Values) -> Values:
            in_axes = (list(dims[:num]), over)
            return jax.vmap(function, in_axes, over, **_axis(axis))(list(points), list(args))

        return over_axis

    if is_mapped:  # all arguments, so that all cotangents are
        out = [unmapped_aval(axis.size, 0, aval, axis.explicit_mesh_axis) for aval in out]
        args = [*args[:num], *map(functools.partial(_in_front, axis), args[num:], dims[num:])]
    of_all = {name: mapped(function) for name, function in functions.items()}
    result = _linear.bind(*args, num=num, out=tuple(out), **of_all)
    return result, [over] * len(result)


def _axis(axis: Any) -> dict[str, Any]:
    return {"axis_size": axis.size, "axis_name": axis.name, "spmd_axis_name": axis.spmd_name}


def _in_front(axis: Any, x: Any, dim: int | None) -> Any:
    """With the mapped axis in front, spread over an explicit mesh as all that is mapped."""
    return batching.bdim_at_front(x, dim, axis.size, axis.explicit_mesh_axis)


def call(
    fun: Callable, jvp: Callable, batch: Callable, args: Values, message: str | None = None
) -> list[Any]:
    """`fun(*args)`, a list, with a rule for forward mode and one for `vmap`.

    The rules are `jvp(primals, tangents)`, where None is a tangent of 0, and `batch(axis_size,
    is_batched, args)`, with the new axis in front, which may return None for the usual. With a
    `message`, `checkify` sees an error if not all of the last argument hold: `checkify.check` is
    public, but an effect, and a program that has any can't be serialized and takes longer to call.

    Uses a primitive, as `linear` does. `jax.custom_jvp` would replace it if a `scan` that is
    differentiated did not unpack it (jax 0.10 to 0.12): a second derivative would miss the rule.
    """
    pure, consts, out = hoist(fun, *args)
    rules = {"jvp": jvp, "batch": batch, "message": message}
    return _call.bind(*consts, *args, pure=pure, num=len(consts), out=tuple(out), **rules)


_call = Primitive("call_with_rule")


def _call_evaluate(*args: Any, pure: Opened, num: int, **_: Any) -> list[Any]:
    return pure(args[:num], *args[num:])


def _call_jvp(primals: Values, tangents: Values, *, jvp: Callable, num: int, **_: Any) -> Any:
    out, pushed = jvp(primals[num:], [t if is_tangent(t) else None for t in tangents[num:]])
    pairs = zip(out, pushed, strict=True)
    return out, [ad.Zero(tangent_type(x)) if t is None else t for x, t in pairs]


def _call_batch(axis: Any, args: Values, dims: Values, **params: Any) -> tuple[Any, Any]:
    if all(d is None for d in dims):
        if axis.name not in [getattr(e, "name", None) for e in params["pure"].jaxpr.effects]:
            return (out := _call.bind(*args, **params)), [None] * len(out)
        # For a collective over the axis, something has to have it.
        args, dims = [_in_front(axis, args[0], None), *args[1:]], [0, *dims[1:]]
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    in_axes = [None if d is None else 0 for d in dims]
    num, of_axis = params["num"], _axis(axis)
    if not any(i == 0 for i in in_axes[:num]):
        is_batched = [i == 0 for i in in_axes[num:]]
        if (found := params["batch"](axis.size, is_batched, args[num:])) is not None:
            return found, [0] * len(found)

    def jvp(primals: Values, tangents: Values) -> Any:
        over = [None if t is None else i for t, i in zip(tangents, in_axes, strict=True)]
        each = jax.vmap(lambda p, t: params["jvp"](p[num:], t[num:]), (in_axes, over), **of_axis)
        return each(list(primals), list(tangents))

    mapped = jax.vmap(functools.partial(_call_evaluate, **params), tuple(in_axes), **of_axis)
    out = call(mapped, jvp, lambda *_: None, args, params["message"])
    return out, [0] * len(out)


for _primitive, _evaluate in ((_linear, _linear_evaluate), (_call, _call_evaluate)):
    _primitive.multiple_results = True
    _primitive.def_impl(_evaluate)
    mlir.register_lowering(_primitive, mlir.lower_fun(_evaluate, multiple_results=True))
_linear.def_abstract_eval(lambda *_, out, **__: out)
_call.def_effectful_abstract_eval(lambda *_, pure, out, **__: (out, pure.jaxpr.effects))
batching.fancy_primitive_batchers |= {_linear: _linear_batch, _call: _call_batch}
ad.primitive_jvps |= {_linear: _linear_jvp, _call: _call_jvp}
ad.primitive_transposes[_linear] = _linear_transpose


def _under_checkify(*given: Any, **params: Any) -> Any:
    at = next(i for i, x in enumerate(given) if isinstance(x, checkify.Error))
    context, (error, enabled, *args) = given[:at], given[at:]

    def interpreted(fun: Callable, *args: Any) -> Any:
        return _checkify.checkify_jaxpr(*context, jax.make_jaxpr(fun)(*args), enabled, error, *args)

    if message := params["message"]:
        error, _ = interpreted(lambda known: checkify.check(jnp.all(known), message), args[-1])
    elif params["pure"].jaxpr.effects:  # of which checks are some
        return interpreted(functools.partial(_call_evaluate, **params), *args)
    return error, _call.bind(*args, **params)


# Rules of `checkify`'s registry take an error, what is enabled and the arguments; since jax 0.11.2
# a context comes first. If the registry moves, checks of classes are not seen.
with contextlib.suppress(ImportError, AttributeError):
    from jax._src import checkify as _checkify

    _checkify.error_checks[_call] = _under_checkify


def replaced(fun: Callable, rules: Mapping[str, Callable]) -> Callable:
    """`fun`, with functions in the place of primitives of some names, and calls opened.

    Uses equations of a jaxpr: `eqns`, their `invars`, `outvars`, `primitive` and `params`, in all
    versions. It may go when Mosaic GPU lowers all of `jax.numpy` that is elementwise.
    """

    def evaluate(*args: Any) -> Any:
        pure, consts, _ = hoist(fun, *args)
        leaves = jax.tree.leaves(args)
        return jax.tree.unflatten(pure.tree, _evaluate_replaced(rules, pure.jaxpr, consts, leaves))

    return evaluate


def _evaluate_replaced(
    rules: Mapping[str, Callable], jaxpr: Any, consts: Values, args: Values
) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if (rule := rules.get(eqn.primitive.name)) is not None:
            out = rule(*given, **eqn.params)
        elif eqn.primitive is _call:
            pure, num = eqn.params["pure"], eqn.params["num"]
            out = _evaluate_replaced(rules, pure.jaxpr, given[:num], given[num:])
        elif (inner := _inner(eqn)) is not None:
            out = _evaluate_replaced(rules, *opened(inner), given)
        else:
            out = eqn.primitive.bind(*given, **eqn.params)
        out = out if eqn.primitive.multiple_results else [out]
        env |= dict(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def primitives(fun: Callable, *args: Any) -> set[str]:
    """The names of the primitives that `fun` is made of, also in what it calls."""

    def of(jaxpr: Any) -> set[str]:
        return set().union(*map(of_equation, jaxpr.eqns))

    def of_equation(eqn: Any) -> set[str]:
        inner = _inner(eqn)
        return {eqn.primitive.name} if inner is None else of(opened(inner)[0])

    return of(hoist(fun, *args)[0].jaxpr)


def _inner(eqn: Any) -> Any:
    """What an equation calls, if it is a call."""
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def transposed(ref: Any) -> Any:
    """A tile of shared memory, read the other way round: `ref.transpose` since jax 0.11."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any, optimized: bool = True) -> Array:
    """What lies in memory, in a layout: since jax 0.11 `load` needs no more indices."""
    from jax.experimental.pallas import mosaic_gpu

    index = inspect.signature(mosaic_gpu.load).parameters.get("idx")
    indices = ((),) if index is not None and index.default is index.empty else ()
    return mosaic_gpu.load(ref, *indices, layout=layout, optimized=optimized)


def interpreter() -> Any:
    """What interprets kernels for GPUs: it is public since jax 0.11."""
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams()


def may_be_hopper() -> bool:
    """Whether the default device is a Hopper or no NVIDIA GPU, by `jax.extend.backend`."""
    return getattr(get_default_device(), "compute_capability", "9.0").startswith("9.")
