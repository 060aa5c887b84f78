"""Reverse rules that serve forward mode too: the one place that knows the trick."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxsoftmax import _checks

P = ParamSpec("P")
R = TypeVar("R")


class custom_vjp(Generic[P, R]):  # noqa: N801 (named as jax.custom_vjp)
    """A function with its own reverse rule that can be differentiated in every mode.

    The interface is that of `jax.custom_vjp`, without `optimize_remat`. JAX refuses forward mode
    for such functions; here it comes from the rule that you have already written:

    1. The pullback `ct -> bwd(res, ct)` at a point is the transpose `J^T` of the Jacobian there.
    2. It is linear in `ct`, so `jax.linear_transpose` can turn it round: its transpose is `J`.
    3. `J` applied to the tangents is all that forward mode asks for. So a call becomes a primitive
       that holds the `jax.custom_vjp` with your rule, and whose own JVP rule runs `jax.vjp` of that
       and transposes the pullback.
    4. Reverse mode transposes that JVP once more and so gets `bwd` back, the same operations and
       no more; `jax.grad` costs what it costs with `jax.custom_vjp`.
    5. Both directions are traced through `fwd` and `bwd`, so higher orders follow as long as
       `fwd` and `bwd` are differentiable: let `fwd` call the decorated function itself, not a
       solver, and second derivatives use the rule instead of unrolling the solver.
    6. It is a primitive and not a `jax.custom_jvp`, because a `scan` that is linearized unpacks
       the latter, and forward over reverse mode would meet a bare `jax.custom_vjp`.

    What it asks of `bwd`: it has to be linear in the cotangent, made of operations that JAX can
    transpose. Put `jax.checkpoint` around the body of a `scan` in `bwd`, or its transpose keeps
    every intermediate.

    Arguments without a tangent (integers, booleans, keys, None, and pytrees that mix them with
    floats) need no declaration; `bwd` returns None for them, as with `jax.custom_vjp`.

    Args:
      fun: the function, of any pytrees.
      nondiff_argnums: positions of arguments that are not arrays (functions, strings, ...). As
        with `jax.custom_vjp`, they come first in the arguments of `bwd`.
      nondiff_argnames: names of more of them.

    Raises:
      AttributeError: when it is called before it was given its rule by `defvjp`.
      TypeError: when it is given an argument that can be passed by keyword only.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> @jsm.custom_vjp
      ... def log1pexp(x):
      ...     return jnp.logaddexp(x, 0.0)
      >>> def fwd(x):
      ...     return log1pexp(x), x
      >>> def bwd(x, ct):
      ...     return (ct * jax.nn.sigmoid(x),)
      >>> log1pexp.defvjp(fwd, bwd)
      >>> y, dy = jax.jvp(log1pexp, (0.0,), (1.0,))
      >>> print(f"{y:.4f} {dy:.4f} {jax.grad(log1pexp)(0.0):.4f}")
      0.6931 0.5000 0.5000
      >>> print(f"{jax.hessian(log1pexp)(0.0):.4f}")
      0.2500

    References:
      The request for forward mode of `jax.custom_vjp` functions: jax-ml/jax#3996.
    """

    def __init__(
        self,
        fun: Callable[P, R],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Sequence[str] = (),
    ) -> None:
        functools.update_wrapper(self, fun)
        self._signature = inspect.signature(fun)
        numbers = [nondiff_argnums] if isinstance(nondiff_argnums, int) else nondiff_argnums
        names = [nondiff_argnames] if isinstance(nondiff_argnames, str) else nondiff_argnames
        named = map(list(self._signature.parameters).index, names)
        # Ascending, so that they can be put back one after the other.
        self._nondiff_argnums = tuple(sorted({*numbers, *named}))
        self._reverse = jax.custom_vjp(fun, nondiff_argnums=self._nondiff_argnums)
        self._has_rule = False
        self._batch: Callable | None = None

    def defvjp(self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False) -> None:
        """Defines the rule.

        Args:
          fwd: takes the arguments of the function, returns its output and the residuals.
          bwd: takes the residuals and the output's cotangent (after the arguments at
            `nondiff_argnums`), returns a tuple of cotangents, one per remaining argument.
          symbolic_zeros: as in `jax.custom_vjp`.
        """
        self._reverse.defvjp(fwd, bwd, symbolic_zeros=symbolic_zeros)
        self._has_rule = True

    def defbatch(self, batch: Callable) -> None:
        """Defines what `vmap` does, where it is not just the function on more axes.

        Args:
          batch: takes the size of the new axis, pytrees of bools that tell which arguments have it
            (as those arguments, without those at `nondiff_argnums`), and the arguments, which have
            it in front. Returns the output with it in front, or None for the usual.
        """
        self._batch = batch

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        name = getattr(self, "__name__", "the function")
        if not self._has_rule:
            raise AttributeError(f"no rule defined for custom_vjp function {name}: call defvjp.")
        bound = self._signature.bind(*args, **kwargs)
        if bound.kwargs:
            given = ", ".join(bound.kwargs)
            raise TypeError(f"{name} must be given arguments that have a position, got {given}.")
        bound.apply_defaults()
        static = {i: bound.args[i] for i in self._nondiff_argnums}
        dynamic = [arg for i, arg in enumerate(bound.args) if i not in static]
        leaves, tree = jax.tree.flatten(dynamic)
        leaves = [jnp.asarray(x) if isinstance(x, complex | float | int) else x for x in leaves]
        out_tree = None

        def merged(leaves: Sequence[Any]) -> list[Any]:
            args = jax.tree.unflatten(tree, leaves)
            for i, value in static.items():
                args.insert(i, value)
            return args

        def flat(*leaves: Any) -> list[Any]:
            nonlocal out_tree
            out_leaves, out_tree = jax.tree.flatten(self._reverse(*merged(leaves)))
            return out_leaves

        def batch(axis_size: int, batched: Sequence[bool], leaves: Sequence[Any]) -> Any:
            trees = jax.tree.unflatten(tree, batched)
            out = rule(axis_size, trees, *merged(leaves)) if rule else None
            return None if out is None else jax.tree.leaves(out)

        rule = self._batch
        out = _bind(flat, leaves, rule and batch)
        return jax.tree.unflatten(out_tree, out)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


# A call of a function that has a reverse rule, `jaxpr`, and gets its JVP from that.
_call = Primitive("custom_vjp_with_jvp")
_call.multiple_results = True


def hoist(fun: Callable, *args: Any) -> tuple[Callable, list[Any], list[Any]]:
    """`fun` as a function `(smooth, rest, *args)`, and the tracers that it closes over.

    For a rule that gives gradients to what a user's function closes over: `smooth` are those that
    have one, `rest` are integers, keys, and the like.
    """
    jaxpr, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    tree, opened = jax.tree.structure(out), jaxpr.jaxpr  # what is kept must not hold the tracers

    def kind(x: Any) -> str:
        if not isinstance(x, core.Tracer):
            return "constant"
        return "smooth" if jnp.issubdtype(x.dtype, jnp.inexact) else "rest"

    kinds = [kind(x) for x in jaxpr.consts]

    def pure(smooth: Sequence[Any], rest: Sequence[Any], *args: Any) -> Any:
        given = {"smooth": iter(smooth), "rest": iter(rest), "constant": iter(constants)}
        consts = [next(given[k]) for k in kinds]
        leaves = jaxpr_as_fun(ClosedJaxpr(opened, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(tree, leaves)

    smooth, rest, constants = (
        [x for x, k in zip(jaxpr.consts, kinds, strict=True) if k == wanted]
        for wanted in ("smooth", "rest", "constant")
    )
    return pure, smooth, rest


def _bind(fun: Callable, args: Sequence[Any], batch: Callable | None = None) -> list[Any]:
    jaxpr = jax.make_jaxpr(fun)(*args)
    if not jaxpr.consts:
        return _call.bind(*args, jaxpr=jaxpr, batch=batch)

    # What `fun` closes over becomes an argument: a parameter must not hold a tracer.
    consts, opened = jaxpr.consts, jaxpr.jaxpr
    count = len(consts)

    def of_consts(consts: Sequence[Any], *args: Any) -> list[Any]:
        return jaxpr_as_fun(ClosedJaxpr(opened, consts))(*args)

    def batch_of_args(axis_size: int, batched: Sequence[bool], args: Sequence[Any]) -> Any:
        if batch is None or any(batched[:count]):
            return None  # the usual
        return batch(axis_size, batched[count:], args[count:])

    closed = jax.make_jaxpr(of_consts)(consts, *args)
    return _call.bind(*consts, *args, jaxpr=closed, batch=batch and batch_of_args)


def _evaluate(*args: Any, jaxpr: ClosedJaxpr, batch: Callable | None) -> list[Any]:
    return jaxpr_as_fun(jaxpr)(*args)


def _under_checkify(
    interpret: Callable,
    error: Any,
    enabled: Any,
    *args: Any,
    jaxpr: ClosedJaxpr,
    batch: Callable | None,
) -> Any:
    if jaxpr.effects:  # of which checks are some
        return interpret(jaxpr, enabled, error, *args)
    return error, _call.bind(*args, jaxpr=jaxpr, batch=batch)


def _batch(
    axis_data: Any,
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    jaxpr: ClosedJaxpr,
    batch: Callable | None,
):
    if all(dim is None for dim in dims):
        out = _call.bind(*args, jaxpr=jaxpr, batch=batch)
        return out, [None] * len(jaxpr.out_avals)
    if batch is not None:
        front = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
        out = batch(axis_data.size, [d is not None for d in dims], front)
        if out is not None:
            return out, [0] * len(out)
    mapped = jax.vmap(
        jaxpr_as_fun(jaxpr),
        in_axes=tuple(dims),
        axis_size=axis_data.size,
        axis_name=axis_data.name,
        spmd_axis_name=axis_data.spmd_name,
    )
    out = _bind(mapped, args)
    return out, [0] * len(out)


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    jaxpr: ClosedJaxpr,
    batch: Callable | None,
):
    active = [i for i, t in enumerate(tangents) if _is_tangent(t)]

    def of_active(*args: Any) -> list[Any]:
        merged = list(primals)
        for i, arg in zip(active, args, strict=True):
            merged[i] = arg
        return jaxpr_as_fun(jaxpr)(*merged)

    out, pullback = jax.vjp(of_active, *(primals[i] for i in active))
    return out, _push_forward(pullback, out, [tangents[i] for i in active])


def _push_forward(pullback: Callable, out: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """The tangents of `out`: the transpose of the pullback, applied to the tangents."""
    smooth = [i for i, x in enumerate(out) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    def pullback_of_smooth(*cotangents: Any) -> Any:
        given = iter(cotangents)
        nothing = jax.dtypes.float0
        return pullback(
            [
                next(given) if i in smooth else np.zeros(jnp.shape(x), nothing)
                for i, x in enumerate(out)
            ]
        )

    transpose = jax.linear_transpose(pullback_of_smooth, *(out[i] for i in smooth))
    pushed = _with_fresh_loops(jax.make_jaxpr(transpose)(tuple(tangents)), tangents)
    result: list[Any] = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    for i, tangent in zip(smooth, pushed, strict=True):
        result[i] = tangent
    return result


def _with_fresh_loops(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr whose scans are written anew, by `jax.lax.scan`.

    What a scan in `bwd` sums up is handed on unchanged from step to step of its transpose. There it
    looks like a state, and reverse mode would keep it for every step; a new scan finds that it is
    a constant.
    """
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            out = _scan([read(atom) for atom in eqn.invars], **eqn.params)
        else:
            known = list(dict.fromkeys(a for a in eqn.invars if not isinstance(a, Literal)))
            names = jaxpr.debug_info.with_unknown_names()
            step = ClosedJaxpr(Jaxpr([], known, eqn.outvars, [eqn], debug_info=names), [])
            out = jaxpr_as_fun(step)(*(values[atom] for atom in known))
        values |= zip(eqn.outvars, out, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _scan(
    inputs: Sequence[Any],
    *,
    jaxpr: ClosedJaxpr,
    num_consts: int,
    num_carry: int,
    length: int,
    reverse: bool,
    unroll: int,
    **_: Any,
) -> list[Any]:
    consts, rest = inputs[:num_consts], inputs[num_consts:]

    def body(carry: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        out = jaxpr_as_fun(jaxpr)(*consts, *carry, *x)
        return out[:num_carry], out[num_carry:]

    start, xs = list(rest[:num_carry]), list(rest[num_carry:])
    carry, ys = jax.lax.scan(body, start, xs, length, reverse, unroll)
    return [*carry, *ys]


def linear_pair(fun: Callable, transpose: Callable, point: Any, args: Any) -> Any:
    """`fun(point, args)`, linear in `args`, whose transpose is `transpose(point, cotangents)`.

    For a loop whose transpose is better written than found: JAX would keep for every step what the
    loop carries along. Both functions are to be differentiable in `point`.
    """
    points, of_points = jax.tree.flatten(point)
    given, of_args = jax.tree.flatten(args)

    def flat(function: Callable, tree: Any) -> Callable:
        def of_leaves(*leaves: Any) -> list[Any]:
            point = jax.tree.unflatten(of_points, leaves[: len(points)])
            return jax.tree.leaves(function(point, jax.tree.unflatten(tree, leaves[len(points) :])))

        return of_leaves

    of_out = jax.tree.structure(jax.eval_shape(fun, point, args))
    forward = jax.make_jaxpr(flat(fun, of_args))(*points, *given)
    back = jax.make_jaxpr(flat(transpose, of_out))(*points, *forward.out_avals)
    out = _linear.bind(*points, *given, forward=forward, back=back, num_points=len(points))
    return jax.tree.unflatten(of_out, out)


_linear = Primitive("linear_pair")
_linear.multiple_results = True


def _linear_evaluate(*args: Any, forward: ClosedJaxpr, back: ClosedJaxpr, num_points: int) -> Any:
    return jaxpr_as_fun(forward)(*args)


def _linear_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, num_points: int, **jaxprs: ClosedJaxpr
):
    bind = functools.partial(_linear.bind, num_points=num_points, **jaxprs)
    out, pushed = bind(*primals), []
    points, args = primals[:num_points], primals[num_points:]
    if any(map(_is_tangent, tangents[num_points:])):
        pushed.append(bind(*points, *map(ad.instantiate_zeros, tangents[num_points:])))
    if active := [i for i, t in enumerate(tangents[:num_points]) if _is_tangent(t)]:

        def of_active(*values: Any) -> Any:
            merged = list(points)
            for i, value in zip(active, values, strict=True):
                merged[i] = value
            return jaxpr_as_fun(jaxprs["forward"])(*merged, *args)

        at = [points[i] for i in active]
        pushed.append(jax.jvp(of_active, at, [tangents[i] for i in active])[1])
    return out, [functools.reduce(jnp.add, parts) for parts in zip(*pushed, strict=True)]


def _linear_transpose(
    cts: Sequence[Any], *args: Any, forward: ClosedJaxpr, back: ClosedJaxpr, num_points: int
):
    cts = [ad.instantiate_zeros(ct) for ct in cts]
    points = args[:num_points]
    out = _linear.bind(*points, *cts, forward=back, back=forward, num_points=num_points)
    return [None] * num_points + out


def _linear_batch(
    axis_data: Any,
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    forward: ClosedJaxpr,
    back: ClosedJaxpr,
    num_points: int,
):
    size = axis_data.size
    points, point_dims = args[:num_points], tuple(dims[:num_points])
    pairs = zip(args[num_points:], dims[num_points:], strict=True)
    args = [batching.bdim_at_front(x, d, size) for x, d in pairs]

    def mapped(jaxpr: ClosedJaxpr, count: int) -> Callable:
        in_axes = (*point_dims, *(0,) * count)
        return jax.vmap(
            jaxpr_as_fun(jaxpr),
            in_axes=in_axes,
            axis_size=size,
            axis_name=axis_data.name,
            spmd_axis_name=axis_data.spmd_name,
        )

    mapped_forward = jax.make_jaxpr(mapped(forward, len(args)))(*points, *args)
    outs = mapped_forward.out_avals
    mapped_back = jax.make_jaxpr(mapped(back, len(outs)))(*points, *outs)
    out = _linear.bind(
        *points, *args, forward=mapped_forward, back=mapped_back, num_points=num_points
    )
    return out, [0] * len(out)


def _is_tangent(tangent: Any) -> bool:
    is_zero = isinstance(tangent, ad.Zero)
    return not is_zero and getattr(tangent, "dtype", None) != jax.dtypes.float0


_linear.def_impl(_linear_evaluate)
_linear.def_abstract_eval(lambda *_, forward, back, num_points: forward.out_avals)
mlir.register_lowering(_linear, mlir.lower_fun(_linear_evaluate, multiple_results=True))
batching.fancy_primitive_batchers[_linear] = _linear_batch
ad.primitive_jvps[_linear] = _linear_jvp
ad.primitive_transposes[_linear] = _linear_transpose
_call.def_impl(_evaluate)
_call.def_effectful_abstract_eval(lambda *_, jaxpr, batch: (jaxpr.out_avals, jaxpr.effects))
mlir.register_lowering(_call, mlir.lower_fun(_evaluate, multiple_results=True))
batching.fancy_primitive_batchers[_call] = _batch
ad.primitive_jvps[_call] = _jvp
_checks.register(_call, _under_checkify)
