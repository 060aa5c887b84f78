"""Reverse rules that serve forward mode too: the one place that knows the trick."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

P = ParamSpec("P")
R = TypeVar("R")


class custom_vjp(Generic[P, R]):  # noqa: N801 (named as jax.custom_vjp)
    """A function with its own reverse rule that can be differentiated in every mode.

    The interface is that of `jax.custom_vjp`. JAX refuses forward mode for such functions; here it
    comes from the rule that you have already written:

    1. The pullback `ct -> bwd(res, ct)` at a point is the transpose `J^T` of the Jacobian there.
    2. It is linear in `ct`, so `jax.linear_transpose` can turn it round: its transpose is `J`.
    3. `J` applied to the tangents is all that `jax.custom_jvp` asks for. Hence `fun` is wrapped
       twice: `jax.custom_vjp` inside, holding your rule, and `jax.custom_jvp` outside, whose rule
       runs `jax.vjp` of the inside and transposes the pullback.
    4. Reverse mode transposes that JVP once more and so gets `bwd` back, the same operations and
       no more; `jax.grad` costs what it costs with `jax.custom_vjp`.
    5. Both directions are traced through `fwd` and `bwd`, so higher orders follow as long as
       `fwd` and `bwd` are differentiable: let `fwd` call the decorated function itself, not a
       solver, and second derivatives use the rule instead of unrolling the solver.

    What it asks of `bwd`: it has to be linear in the cotangent, made of operations that JAX can
    transpose. Put `jax.checkpoint` around the body of a `scan` in `bwd`, or its transpose keeps
    every intermediate.

    Arguments without a tangent (integers, booleans, keys, None, and pytrees that mix them with
    floats) need no declaration; `bwd` returns None for them, as with `jax.custom_vjp`.

    Args:
      fun: the function, of any pytrees.
      nondiff_argnums: positions of arguments that are not arrays (functions, strings, ...). As
        with `jax.custom_vjp`, they come first in the arguments of `bwd`.

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

    def __init__(self, fun: Callable[P, R], nondiff_argnums: int | Sequence[int] = ()) -> None:
        functools.update_wrapper(self, fun)
        if isinstance(nondiff_argnums, int):
            nondiff_argnums = (nondiff_argnums,)
        # Ascending: JAX hands the static arguments over in this order, and so they go back in.
        self._nondiff_argnums = tuple(sorted(nondiff_argnums))
        self._reverse = jax.custom_vjp(fun, nondiff_argnums=self._nondiff_argnums)
        self._both = jax.custom_jvp(self._reverse, nondiff_argnums=self._nondiff_argnums)
        self._has_rule = False

    def defvjp(self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False) -> None:
        """Defines the rule.

        Args:
          fwd: takes the arguments of the function, returns its output and the residuals.
          bwd: takes the residuals and the output's cotangent (after the arguments at
            `nondiff_argnums`), returns a tuple of cotangents, one per remaining argument.
          symbolic_zeros: as in `jax.custom_vjp`.
        """
        self._reverse.defvjp(fwd, bwd, symbolic_zeros=symbolic_zeros)
        self._both.defjvp(self._jvp, symbolic_zeros=True)
        self._has_rule = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._has_rule:
            name = getattr(self, "__name__", "the function")
            raise AttributeError(f"no rule defined for custom_vjp function {name}: call defvjp.")
        return self._both(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def _jvp(self, *args: Any) -> tuple[Any, Any]:
        *static, primals, tangents = args
        leaves, treedef = jax.tree.flatten(tuple(primals))
        tangent_leaves = treedef.flatten_up_to(tuple(tangents))
        active = [i for i, t in enumerate(tangent_leaves) if _is_tangent(t)]
        if not active:
            # A loop asks this of what turns out constant. The answer stays wrapped, or an outer
            # derivative would meet a bare `jax.custom_vjp`.
            out = self._both(*self._with_static(static, primals))
            return out, jax.tree.map(_zero_tangent, out)

        def reverse(*active_leaves: Any) -> Any:
            merged = list(leaves)
            for i, leaf in zip(active, active_leaves, strict=True):
                merged[i] = leaf
            return self._reverse(*self._with_static(static, jax.tree.unflatten(treedef, merged)))

        out, pullback = jax.vjp(reverse, *(leaves[i] for i in active))
        return out, _push_forward(pullback, out, [tangent_leaves[i] for i in active])

    def _with_static(self, static: Sequence[Any], dynamic: Sequence[Any]) -> list[Any]:
        merged = list(dynamic)
        for position, value in zip(self._nondiff_argnums, static, strict=True):
            merged.insert(position, value)
        return merged


def _push_forward(pullback: Callable, out: Any, tangents: list[Any]) -> Any:
    """The tangent of `out`: the transpose of the pullback, applied to the tangents."""
    out_leaves, out_tree = jax.tree.flatten(out)
    smooth = [i for i, leaf in enumerate(out_leaves) if _has_tangent(leaf)]
    result = [None if i in smooth else _zero_tangent(x) for i, x in enumerate(out_leaves)]

    def pullback_of_smooth(*cotangents: Any) -> Any:
        merged = list(result)
        for i, ct in zip(smooth, cotangents, strict=True):
            merged[i] = ct
        return pullback(jax.tree.unflatten(out_tree, merged))

    transpose = jax.linear_transpose(pullback_of_smooth, *(out_leaves[i] for i in smooth))
    for i, tangent in zip(smooth, transpose(tuple(tangents)), strict=True):
        result[i] = tangent
    return jax.tree.unflatten(out_tree, result)


def _zero_tangent(x: Any) -> Any:
    if _has_tangent(x):
        return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def _has_tangent(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _is_tangent(tangent: Any) -> bool:
    is_zero = isinstance(tangent, SymbolicZero)
    return not is_zero and getattr(tangent, "dtype", None) != jax.dtypes.float0
