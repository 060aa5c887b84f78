"""All that this package uses of JAX beyond what JAX promises to keep.

Each function says what it uses, in which versions, and which public way would replace it. No other
module may import `jax.extend`, `jax.interpreters` or `jax._src`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.extend.core import Primitive, jaxpr_as_fun, unmapped_aval
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

# Of points and arguments; linear in the arguments. None stands for zeros.
Linear = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]


def hoist(fun: Callable, *args: Any) -> tuple["Opened", list[Any], list[Any]]:
    """`fun` as a function `pure(consts, *args)`, what it closes over, and the types it returns.

    Uses the constants of a jaxpr: `ClosedJaxpr.jaxpr` has none in jax 0.10, `Jaxpr.with_consts`
    takes them away since 0.11. `jax.closure_convert` would do if it hoisted integers and keys, too.
    """
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    opened: Any = closed.with_consts([]) if hasattr(closed, "with_consts") else closed.jaxpr
    pure = Opened(opened, jax.tree.structure(out))
    return pure, list(closed.consts), list(closed.out_avals)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A function that was traced, given the constants that it closed over."""

    jaxpr: Any
    tree: Any

    def __call__(self, consts: Sequence[Any], *args: Any) -> Any:
        leaves = jax.core.eval_jaxpr(self.jaxpr, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(self.tree, leaves)


def varying(x: Array) -> frozenset[str]:
    """The mesh axes of `shard_map` that `x` varies over.

    Uses `vma` of its type, which is `manual_axis_type.varying` since jax 0.10. A public function
    would replace it.
    """
    aval: Any = jax.typeof(x)
    return aval.manual_axis_type.varying if hasattr(aval, "manual_axis_type") else aval.vma


def tangent_type(x: Any) -> Any:
    """The type of the tangents of `x`. Uses `to_tangent_aval` of types, in all versions."""
    return jax.typeof(x).to_tangent_aval()


def zeros(of: Any) -> Array:
    """Zeros of a type, the types of tangents included, which `jnp.zeros` does not know."""
    return ad.instantiate_zeros(ad.Zero(of))


def _is_tangent(tangent: Any) -> bool:
    is_zero = isinstance(tangent, ad.Zero)
    return not is_zero and getattr(tangent, "dtype", None) != jax.dtypes.float0


def linear(
    evaluate: Linear,
    transpose: Linear,
    points: Sequence[Any],
    args: Sequence[Any],
    out: Sequence[Any],
    reference: Linear | None = None,
) -> list[Any]:
    """`evaluate(points, args)`, whose transpose is `transpose(points, cotangents)`.

    Uses a primitive (`jax.extend.core.Primitive`, rules in `jax.interpreters`, in all versions).
    `jax.custom_derivatives.linear_call` would replace it if it had derivatives in the points, a
    rule for `vmap`, and a transpose that is not traced twice.

    Args:
      evaluate: what is computed. None of the functions may close over tracers.
      transpose: gets None for a cotangent that is known to be 0, and may return None for one.
      points: what both depend on.
      args: what both are linear in.
      out: the types of what `evaluate` returns.
      reference: what is differentiated in the points instead of `evaluate`.
    """
    reference = evaluate if reference is None else reference
    functions = {"evaluate": evaluate, "transpose": transpose, "reference": reference}
    return _linear.bind(*points, *args, num=len(points), out=tuple(out), **functions)


_linear = Primitive("linear")
_linear.multiple_results = True


def _linear_evaluate(*args: Any, evaluate: Linear, num: int, **_: Any) -> Sequence[Any]:
    return evaluate(args[:num], args[num:])


def _linear_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, reference: Linear, num: int, **params: Any
) -> tuple[Any, Any]:
    def bind(*args: Any) -> Any:
        return _linear.bind(*points, *args, reference=reference, num=num, **params)

    points, args = primals[:num], primals[num:]
    of_points, of_args = tangents[:num], tangents[num:]
    out, pushed = bind(*args), []
    if any(map(_is_tangent, of_args)):
        pushed.append(bind(*map(ad.instantiate_zeros, of_args)))
    if active := [i for i, t in enumerate(of_points) if _is_tangent(t)]:

        def at(*values: Any) -> Sequence[Any]:
            moved = list(points)
            for i, value in zip(active, values, strict=True):
                moved[i] = value
            return reference(moved, args)

        here, along = [points[i] for i in active], [of_points[i] for i in active]
        pushed.append(jax.jvp(at, here, along)[1])
    return out, [sum(parts[1:], start=parts[0]) for parts in zip(*pushed, strict=True)]


def _linear_transpose(
    cts: Sequence[Any], *args: Any, transpose: Linear, num: int, **_: Any
) -> list[Any]:
    cts = [None if isinstance(ct, ad.Zero) else ct for ct in cts]
    return [None] * num + list(transpose(args[:num], cts))


def _linear_batch(
    axis: Any,
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    evaluate: Linear,
    transpose: Linear,
    reference: Linear,
    num: int,
    out: Sequence[Any],
) -> tuple[Any, Any]:
    is_mapped = any(d is not None for d in dims)
    over = 0 if is_mapped else None

    def mapped(function: Linear) -> Linear:
        def of_one(_: Array, points: Sequence[Any], args: Sequence[Any]) -> Sequence[Any]:
            return function(points, args)

        def over_axis(points: Sequence[Any], args: Sequence[Any]) -> Sequence[Any]:
            names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
            each = jax.vmap(of_one, (0, list(dims[:num]), over), over, **names)
            return each(jnp.arange(axis.size), list(points), list(args))

        return over_axis

    args = list(args)
    if is_mapped:  # all arguments, so that all cotangents are
        mesh_axis = getattr(axis, "explicit_mesh_axis", None)
        out = [unmapped_aval(axis.size, 0, aval, mesh_axis) for aval in out]
        args[num:] = [
            batching.bdim_at_front(x, d, axis.size)
            for x, d in zip(args[num:], dims[num:], strict=True)
        ]
    functions = mapped(evaluate), mapped(transpose)
    result = linear(*functions, args[:num], args[num:], out, mapped(reference))
    return result, [over] * len(result)


_linear.def_impl(_linear_evaluate)
_linear.def_abstract_eval(lambda *_, out, **__: out)
mlir.register_lowering(_linear, mlir.lower_fun(_linear_evaluate, multiple_results=True))
batching.fancy_primitive_batchers[_linear] = _linear_batch
ad.primitive_jvps[_linear] = _linear_jvp
ad.primitive_transposes[_linear] = _linear_transpose


def call(
    fun: Callable,
    jvp: Callable,
    batch: Callable | None,
    args: Sequence[Any],
    message: str | None = None,
) -> list[Any]:
    """`fun(*args)`, a list, with a rule for forward mode and maybe one for `vmap`.

    Uses a primitive, as `linear` does. `jax.custom_jvp` would replace it if a `scan` that is
    differentiated did not unpack it (jax 0.10 to 0.12): a second derivative would miss the rule.

    Args:
      fun: a function of arrays.
      jvp: `(primals, tangents) -> (outputs, tangents)`, of lists, where None is a tangent of 0.
      batch: `(axis_size, is_batched, args)`, with the new axis in front, to outputs that have it
        in front, or None for the usual.
      args: the arrays.
      message: under `checkify`, an error if not all of the last argument hold. `checkify.check` is
        public, but an effect: a program that has any can't be serialized, and takes longer to call.
    """
    pure, consts, _ = hoist(fun, *args)
    count = len(consts)

    def of_all(*args: Any) -> list[Any]:
        return pure(args[:count], *args[count:])

    def jvp_of_args(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        return jvp(primals[count:], tangents[count:])

    def batch_of_args(size: int, batched: Sequence[bool], args: Sequence[Any]) -> Any:
        if batch is None or any(batched[:count]):
            return None
        return batch(size, batched[count:], args[count:])

    jaxpr = jax.make_jaxpr(of_all)(*consts, *args)
    rules = {"jvp": jvp_of_args, "batch": batch_of_args, "message": message}
    return _call.bind(*consts, *args, jaxpr=jaxpr, **rules)


_call = Primitive("call_with_rule")
_call.multiple_results = True


def _call_evaluate(*args: Any, jaxpr: Any, **_: Any) -> list[Any]:
    return jaxpr_as_fun(jaxpr)(*args)


def _call_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, jvp: Callable, **_: Any
) -> tuple[Any, Any]:
    out, pushed = jvp(primals, [t if _is_tangent(t) else None for t in tangents])
    pairs = zip(out, pushed, strict=True)
    return out, [ad.Zero(tangent_type(x)) if t is None else t for x, t in pairs]


def _call_batch(
    axis: Any,
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    jaxpr: Any,
    jvp: Callable,
    batch: Callable,
    message: str | None,
) -> tuple[Any, Any]:
    if all(d is None for d in dims):  # so that no collective is over the axis, as `hoist` sees it
        out = _call.bind(*args, jaxpr=jaxpr, jvp=jvp, batch=batch, message=message)
        return out, [None] * len(out)
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    in_axes = [None if d is None else 0 for d in dims]
    found = batch(axis.size, [d is not None for d in dims], args)
    if found is not None:
        return found, [0] * len(found)
    names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}

    def mapped_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        over = [None if t is None else i for t, i in zip(tangents, in_axes, strict=True)]
        each = jax.vmap(jvp, (in_axes, over), axis_size=axis.size, **names)
        return each(list(primals), list(tangents))

    mapped = jax.vmap(jaxpr_as_fun(jaxpr), tuple(in_axes), axis_size=axis.size, **names)
    out = call(mapped, mapped_jvp, None, args, message)
    return out, [0] * len(out)


_call.def_impl(_call_evaluate)
_call.def_effectful_abstract_eval(lambda *_, jaxpr, **__: (jaxpr.out_avals, jaxpr.effects))
mlir.register_lowering(_call, mlir.lower_fun(_call_evaluate, multiple_results=True))
batching.fancy_primitive_batchers[_call] = _call_batch
ad.primitive_jvps[_call] = _call_jvp


def _under_checkify(*given: Any, jaxpr: Any, message: str | None, **params: Any) -> Any:
    at = next(i for i, x in enumerate(given) if isinstance(x, checkify.Error))
    context, (error, enabled, *args) = given[:at], given[at:]
    if message is not None:
        check = jax.make_jaxpr(lambda known: checkify.check(jnp.all(known), message))(args[-1])
        error, _ = _checkify.checkify_jaxpr(*context, check, enabled, error, args[-1])
    elif jaxpr.effects:  # of which checks are some
        return _checkify.checkify_jaxpr(*context, jaxpr, enabled, error, *args)
    return error, _call.bind(*args, jaxpr=jaxpr, message=message, **params)


# Rules of `checkify`'s registry take an error, what is enabled and the arguments; since jax 0.11.2
# a context comes first. If the registry moves, checks of classes are not seen.
with contextlib.suppress(ImportError, AttributeError):
    from jax._src import checkify as _checkify

    _checkify.error_checks[_call] = _under_checkify
