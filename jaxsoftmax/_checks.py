"""Checks of numbers, which only `jax.experimental.checkify` sees.

Its own are effects: a program that has any can't be serialized, and each call of it takes 0.1 ms
longer, also where nobody looks. These are identities, which are checks under `checkify`.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def register(primitive: Primitive, rule: Callable) -> None:
    """Tells `checkify` about a primitive: `(interpret, error, enabled, *args, **params)`.

    The rule returns an error and what the primitive gives, and so does `interpret`, given a jaxpr,
    `enabled`, an error and arguments. JAX keeps this to itself and may move it: then the checks of
    the primitive are not seen.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import checkify as internals

        rule = functools.partial(rule, internals.checkify_jaxpr)
        internals.error_checks[primitive] = rule


def checked(x: Array, known: Array, message: str) -> Array:
    """`x` as it is; under `checkify`, an error if not all of `known` hold."""
    return _checked.bind(x, known, message=message)


_checked = Primitive("checked")


def _jvp(primals: Any, tangents: Any, *, message: str) -> Any:
    return _checked.bind(*primals, message=message), tangents[0]


def _batch(args: Any, dims: Any, *, message: str) -> Any:
    return _checked.bind(*args, message=message), dims[0]


def _under_checkify(
    interpret: Callable, error: Any, enabled: Any, x: Array, known: Array, *, message: str
) -> Any:
    check = jax.make_jaxpr(lambda known: checkify.check(jnp.all(known), message))(known)
    error, _ = interpret(check, enabled, error, known)
    return error, x


_checked.def_impl(lambda x, known, message: x)
_checked.def_abstract_eval(lambda x, known, message: x)
mlir.register_lowering(
    _checked, mlir.lower_fun(lambda x, known, message: x, multiple_results=False)
)
batching.primitive_batchers[_checked] = _batch
ad.primitive_jvps[_checked] = _jvp
register(_checked, _under_checkify)
