"""Reverse rules that serve forward mode too: the one place that knows the trick."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxsoftmax import _jax
from jaxsoftmax._sharding import placed_like

P = ParamSpec("P")
R = TypeVar("R")


class custom_vjp(Generic[P, R]):  # noqa: N801 (named as jax.custom_vjp)
    """A function with its own reverse rule that can be differentiated in every mode.

    The interface is that of `jax.custom_vjp`, but for `optimize_remat`. JAX refuses forward mode
    for such functions; here it comes from the rule that you have already written:

    1. The pullback `ct -> bwd(res, ct)` at a point is the transpose `J^T` of the Jacobian there.
    2. It is linear in `ct`, so `jax.linear_transpose` applies. Its transpose is `J`.
    3. Forward mode needs only `J` applied to the tangents. So the function is a `jax.custom_jvp`
       whose rule runs `fwd` and then calls one linear function of the tangents. When evaluated,
       that is the transpose of `bwd`; when transposed, it is `bwd` itself.
    4. So reverse mode calls `bwd` as it is, with the same arguments as `jax.custom_vjp`. `jax.grad`
       costs the same as there, and `bwd` need not be linear. It is not called where all cotangents
       are known to be 0, as for what another rule returns None.
    5. Both directions are traced through `fwd` and `bwd`, so higher orders follow as long as
       `fwd` and `bwd` are differentiable: let `fwd` call the decorated function itself, not a
       solver, and second derivatives use the rule instead of unrolling the solver.

    For forward mode, `bwd` has to be linear in the cotangent and consist of operations that JAX can
    transpose. A part of it that does not depend on the cotangent counts in reverse mode only. It
    may close over no traced array, which belongs into the residuals. And where it divides by 0 and
    then selects something else, its transpose is NaN: select the divisor first.

    Arguments without a tangent (integers, booleans, keys, None, and pytrees that mix them with
    floats) need no declaration; `bwd` returns None for them, as with `jax.custom_vjp`. A cotangent
    that varies over mesh axes of `jax.shard_map` that its argument does not vary over is summed
    over them.

    Args:
      fun: the function. Its arguments and results are any pytrees.
      nondiff_argnums: positions of arguments that are not arrays (functions, strings, ...). As
        with `jax.custom_vjp`, they come first in the arguments of `bwd`.
      nondiff_argnames: names of further such arguments.

    Raises:
      AttributeError: if it is called before `defvjp` has set its rule.
      TypeError: if an argument can be passed by keyword only, if the result of `bwd` has another
        structure than the arguments, or, in forward mode, if JAX cannot transpose `bwd`.
      ValueError: if `bwd` returns a cotangent of another shape than its argument.

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
        self._fun = fun
        self._signature = inspect.signature(fun)
        numbers = [nondiff_argnums] if isinstance(nondiff_argnums, int) else nondiff_argnums
        names = [nondiff_argnames] if isinstance(nondiff_argnames, str) else nondiff_argnames
        known = list(self._signature.parameters)
        if unknown := sorted({*names} - {*known}):
            raise ValueError(
                f"nondiff_argnames must be names of the arguments of {self._name}, which are "
                f"{', '.join(known)}, got {unknown[0]}."
            )
        named = map(known.index, names)
        # Ascending, so that they can be put back one after the other.
        self._nondiff_argnums = tuple(sorted({*numbers, *named}))
        self._rule: _Rule | None = None
        self._batch: Callable | None = None

    @property
    def _name(self) -> str:
        return getattr(self, "__name__", "the function")

    def defvjp(self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False) -> None:
        """Defines the rule.

        Args:
          fwd: takes the arguments of the function, returns its output and the residuals.
          bwd: takes the residuals and the output's cotangent (after the arguments at
            `nondiff_argnums`), returns a tuple of cotangents, one per remaining argument.
          symbolic_zeros: as in `jax.custom_vjp`.
        """
        self._rule = _Rule(self._name, fwd, bwd, symbolic_zeros)

    def defbatch(self, batch: Callable) -> None:
        """Defines what `vmap` does, where it is not just the function on more axes.

        Args:
          batch: takes the size of the new axis, pytrees of bools that tell which arguments have it
            (as those arguments, without those at `nondiff_argnums`), and the arguments, which have
            it in front. Returns the output with it in front, or None for the usual.
        """
        self._batch = batch

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._rule is None:
            raise AttributeError(
                f"no rule defined for custom_vjp function {self._name}: call defvjp."
            )
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if named := [name for name in bound.kwargs if name in kwargs]:
            given = ", ".join(named)
            raise TypeError(f"{self._name} must be called with positional arguments, got {given}.")
        static = {i: bound.args[i] for i in self._nondiff_argnums}
        for i, arg in static.items():
            for leaf in jax.tree.leaves(arg):
                if isinstance(leaf, core.Tracer):
                    raise TypeError(
                        f"argument {i} of {self._name}, one of nondiff_argnums, must be known "
                        f"while tracing, got {jax.typeof(leaf)} that is traced: pass it as an "
                        "array that is differentiated, whose cotangent may be None."
                    )
        dynamic = [arg for i, arg in enumerate(bound.args) if i not in static]

        def merged(dynamic: Sequence[Any]) -> list[Any]:
            args = list(dynamic)
            for i, value in static.items():
                args.insert(i, value)
            return args

        rule = self._rule.with_arguments(merged, tuple(static.values()))
        function: Callable[..., R] = functools.partial(self._call, rule)
        if self._batch is not None:  # a `jax.custom_jvp` would be mapped before anyone asks
            return function(*dynamic)
        call = jax.custom_jvp(function)
        call.defjvp(rule.jvp, symbolic_zeros=True)
        return call(*dynamic)

    def _call(self, rule: "_Rule", *dynamic: Any) -> Any:
        fun: Callable = self._fun
        leaves, tree = jax.tree.flatten(dynamic)
        if not any(isinstance(x, core.Tracer) for x in leaves):
            return fun(*rule.merged(dynamic))
        out_tree = None

        def flat(*leaves: Any) -> list[Any]:
            nonlocal out_tree
            out = fun(*rule.merged(jax.tree.unflatten(tree, leaves)))
            out, out_tree = jax.tree.flatten(out)
            return out

        def batch(size: int, batched: Sequence[bool], leaves: Sequence[Any]) -> Any:
            args = rule.merged(jax.tree.unflatten(tree, leaves))
            out = self._batch and self._batch(size, jax.tree.unflatten(tree, batched), *args)
            return None if out is None else jax.tree.leaves(out)

        def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
            out, pushed = rule.jvp_of_leaves(tree, primals, tangents)
            return jax.tree.leaves(out), pushed

        out = _jax.call(flat, jvp, batch, leaves)
        return jax.tree.unflatten(out_tree, out)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A rule for reverse mode, and how its functions take their arguments.

    Attributes:
      name: the name of the function.
      fwd: takes the arguments that `merged` returns.
      bwd: takes `static`, the residuals and the cotangents.
      symbolic_zeros: whether both are told what is not differentiated, or known to be 0.
      merged: all arguments, given those that are differentiated.
      static: the others.
    """

    name: str
    fwd: Callable
    bwd: Callable
    symbolic_zeros: bool
    merged: Callable[[Sequence[Any]], Sequence[Any]] = list
    static: tuple[Any, ...] = ()

    def with_arguments(self, merged: Callable, static: tuple[Any, ...]) -> "_Rule":
        return dataclasses.replace(self, merged=merged, static=static)

    def jvp(self, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        """The rule for forward mode: outputs and their tangents."""
        leaves, tree = jax.tree.flatten(primals)
        given = [
            None if isinstance(t, SymbolicZero) or not _jax.is_tangent(t) else t
            for t in tree.flatten_up_to(tangents)
        ]
        out, pushed = self.jvp_of_leaves(tree, leaves, given)
        out_leaves, out_tree = jax.tree.flatten(out)
        pairs = zip(out_leaves, pushed, strict=True)
        none = jax.dtypes.float0
        filled = [np.zeros(jnp.shape(x), none) if t is None else t for x, t in pairs]
        return out, jax.tree.unflatten(out_tree, filled)

    def jvp_of_leaves(
        self, tree: Any, leaves: Sequence[Any], tangents: Sequence[Any]
    ) -> tuple[Any, list[Any]]:
        """The output, and the tangents of its leaves; None for what has none."""
        active = tuple(i for i, t in enumerate(tangents) if t is not None)
        out, residuals = self._forward(leaves, tree, active)
        out_leaves, out_tree = jax.tree.flatten(out)
        points, of_points = jax.tree.flatten(residuals)
        pullback = _Pullback(
            rule=self,
            args=_Types.of(leaves, tree),
            residuals=of_points,
            out=_Types.of(out_leaves, out_tree),
            active=active,
        )
        smooth = pullback.out.smooth
        along = [tangents[i] for i in active]
        types = [pullback.out.tangents[i] for i in smooth]
        pushed: list[Any] = [None] * len(out_leaves)
        for i, t in zip(
            smooth, _jax.linear(pullback.push, pullback, points, along, types), strict=True
        ):
            pushed[i] = t
        return out, pushed

    def _forward(self, leaves: Sequence[Any], tree: Any, active: Sequence[int]) -> tuple[Any, Any]:
        given = list(leaves)
        if self.symbolic_zeros:
            given = [CustomVJPPrimal(x, i in active) for i, x in enumerate(leaves)]
        found = self.fwd(*self.merged(jax.tree.unflatten(tree, given)))
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise TypeError(
                f"fwd of {self.name} must return a pair, the output and the residuals, got "
                f"{found!r}."
            )
        return found[0], found[1]


@dataclasses.dataclass(frozen=True)
class _Types:
    """The leaves of a pytree, as far as they are known while tracing.

    Attributes:
      tree: the pytree.
      types: their types.
      tangents: those of their tangents.
    """

    tree: Any
    types: tuple[Any, ...]
    tangents: tuple[Any, ...]

    @staticmethod
    def of(leaves: Sequence[Any], tree: Any) -> "_Types":
        return _Types(tree, tuple(map(jax.typeof, leaves)), tuple(map(_jax.tangent_type, leaves)))

    @property
    def smooth(self) -> list[int]:
        """Which of them have derivatives."""
        return [i for i, t in enumerate(self.tangents) if t.dtype != jax.dtypes.float0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """`bwd`, from residuals and cotangents to the cotangents of what is differentiated, as lists.

    Attributes:
      rule: the rule.
      args: what the function was given.
      residuals: the pytree of the residuals.
      out: what the function returned.
      active: which arguments are differentiated.
    """

    rule: _Rule
    args: _Types
    residuals: Any
    out: _Types
    active: tuple[int, ...]

    def __call__(self, points: Sequence[Any], cts: Sequence[Any]) -> list[Any]:
        if all(ct is None for ct in cts):
            return [None] * len(self.active)
        found = self.rule.bwd(
            *self.rule.static,
            jax.tree.unflatten(self.residuals, points),
            jax.tree.unflatten(self.out.tree, self._all_cotangents(points, cts)),
        )
        leaves = self._leaves(found)
        return [self._checked(leaves[i], self.args.types[i]) for i in self.active]

    def push(self, points: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
        """The tangents of the output: the transpose.

        There is none of a `bwd` that is not linear, and so the right answer is to refuse. JAX
        refuses by one of five errors, depending on the primitive that it meets first. Two of them
        say nothing that a user could understand. All become a `TypeError` that names `bwd`.
        """

        def pull(*cts: Any) -> list[Any]:
            pairs = zip(self(points, cts), tangents, strict=True)
            return [jnp.zeros_like(t) if ct is None else ct for ct, t in pairs]

        try:
            transpose = jax.linear_transpose(pull, *(self.out.tangents[i] for i in self.out.smooth))
            return transpose(list(tangents))
        except jax.errors.UnexpectedTracerError as error:
            raise TypeError(
                f"bwd of {self.rule.name} must not close over a traced array in forward mode: put "
                "it into the residuals."
            ) from error
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise TypeError(
                f"bwd of {self.rule.name} must be linear in the cotangent for forward mode, got "
                f"one that JAX cannot transpose: {error or type(error).__name__}"
            ) from error

    def _all_cotangents(self, points: Sequence[Any], cts: Sequence[Any]) -> list[Any]:
        given = dict(zip(self.out.smooth, cts, strict=True))
        return [self._cotangent(given.get(i), t) for i, t in enumerate(self.out.tangents)]

    def _cotangent(self, ct: Any, tangent: Any) -> Any:
        if ct is not None:
            return ct
        if self.rule.symbolic_zeros:
            return SymbolicZero(tangent)
        return _jax.zeros(tangent)

    def _leaves(self, found: Any) -> list[Any]:
        """One cotangent per leaf of the arguments, None where `bwd` returns that."""
        found = tuple(found) if isinstance(found, list) else found
        places = jax.tree.unflatten(self.args.tree, range(len(self.args.types)))
        leaves: list[Any] = [None] * len(self.args.types)

        def put(ct: Any, places: Any) -> None:
            if ct is not None and not isinstance(ct, SymbolicZero):
                leaves[places] = ct

        try:
            if not isinstance(found, tuple):
                raise ValueError
            jax.tree.map(put, found, places, is_leaf=lambda x: x is None)
        except (ValueError, TypeError):
            raise TypeError(
                f"bwd of {self.rule.name} must return a tuple with the cotangents of all "
                f"arguments, of the structure {self.args.tree}, got {jax.tree.structure(found)}."
            ) from None
        return leaves

    def _checked(self, ct: Any, wanted: Any) -> Any:
        if ct is None:
            return None
        if jnp.shape(ct) != wanted.shape:
            raise ValueError(
                f"bwd of {self.rule.name} must return cotangents of the shapes of the arguments, "
                f"got shape {jnp.shape(ct)} for one of shape {wanted.shape}."
            )
        if jnp.iscomplexobj(ct) and not jnp.issubdtype(wanted.dtype, jnp.complexfloating):
            raise TypeError(
                f"bwd of {self.rule.name} must return real cotangents for real arguments, got "
                f"{jnp.result_type(ct)} for {wanted.dtype}."
            )
        # It varies and is spread as all that it was made of, which may be more than the argument.
        ct = jnp.asarray(ct)
        names = _jax.varying(jax.typeof(ct)) - _jax.varying(wanted)
        ct = lax.psum(ct, tuple(sorted(names))) if names else ct
        return placed_like(ct.astype(wanted.dtype), wanted.sharding.spec)
