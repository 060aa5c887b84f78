"""A mapping of a form that anyone has written."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array

from jaxsoftmax import _threshold
from jaxsoftmax._closed import Closed
from jaxsoftmax._form import Form
from jaxsoftmax._implementations import KERNELS, refuse
from jaxsoftmax._public import PARAMETER, is_array, public
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import Options, as_returned, check_per_row, check_real, prepare
from jaxsoftmax.mappings import softmax


def threshold_mapping(form: Form, *, name: str = "mapping") -> Callable[..., Array]:
    r"""Makes a mapping of a form, with all that the mappings of this package have.

    .. math:: p_i = g(x_i / t - \tau), \quad \tau \text{ such that } \sum_i p_i = 1

    Jacobian in `x/t`: :math:`\mathrm{diag}(s) - s s^\top / \sum s`, with the slopes
    :math:`s_i = g'(x_i / t - \tau)`. If `form.tau` is given, it is :math:`\mathrm{diag}(s)`.

    The mapping is called as `mapping(x, *params, axis=-1, where=None, temperature=1.0, sink=None,
    segment_ids=None, num_segments=None, implementation=None)`, where `params` are the parameters of
    `form.weight` after its first, each a number or one value per row, and differentiable. It has
    derivatives of any order in both modes, and works in `dot_product_attention`, in
    `fenchel_young_loss`, and over mesh axes. Make it once, where a module is imported: each one is
    compiled anew.

    Args:
      form: the equations of the mapping.
      name: what error messages call the mapping.

    Returns:
      The mapping. Rows in which nothing takes part are 0. At temperature 0 it is `hardmax`; if
      `form.tau` is given, the largest scores then count as 0, and all others take no part.
      `testing.check_mapping` checks it.

    Raises:
      TypeError: if `form` is not a `Form`, or a function in it is none in `jax.numpy`, takes other
        parameters, or returns no array; or if a form with a slope, or without a tau, depends on a
        traced array that is no parameter.
      ValueError: if such a function is not elementwise, or `form.weight` has parameters without a
        name of their own; when the mapping is called with no parameters but its defaults, if
        `form.weight` is not the inverse of `form.score`, or never reaches 1.

    Example:
      Entmax at alpha = 4/3, :math:`[u / 3]_+^3`:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> form = jsm.Form(lambda u: jnp.maximum(u / 3, 0) ** 3, lambda p: 3 * p ** (1 / 3))
      >>> entmax43 = jsm.threshold_mapping(form, name="entmax43")
      >>> entmax43(jnp.array([2.0, 1.0, -1.0]))
      Array([0.792, 0.208, 0.   ], dtype=float32)

    References:
      Blondel, Martins & Niculae, 2020: Learning with Fenchel-Young losses (arXiv:1901.02324).
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}.")
    _check_members(form)
    signature = _signature(form)
    own = [p for p in signature.parameters if p not in ("x", *_OPTIONS)]
    safe = _checked(form, own)
    by_jax = _by_jax(form)

    def of_rows(rows: Rows, scores: Entries, **given: Any) -> tuple[Form, tuple[Array, ...]]:
        params = [given.get(p, signature.parameters[p].default) for p in own]
        for p, value in zip(own, params, strict=True):
            if value is inspect.Parameter.empty:
                raise TypeError(f"{name} takes the parameter {p}, which has no default.")
        return safe, tuple(
            check_per_row(p, value, scores[0], rows) for p, value in zip(own, params, strict=True)
        )

    def mapping(*args: Any, **kwargs: Any) -> Array:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        _check_inverse(safe, *(given[p] for p in own))
        x, axis = given.pop("x"), given.pop("axis")
        options = Options(**{o: given.pop(o) for o in _OF_ROWS})
        rows, scores = prepare(x, axis, options)
        _, params = of_rows(rows, scores, **given)
        if by_jax and rows.implementation in KERNELS:
            refuse("pallas", f"{name}, whose form has a tau and no slope")
        make = _threshold.probabilities if by_jax else _threshold.apply
        return as_returned(make(safe, rows, scores, *params)[0], x, options.where)

    mapping.__name__ = mapping.__qualname__ = name
    mapping.__doc__ = f"The mapping `{name}` of a form; see `jaxsoftmax.threshold_mapping`."
    vars(mapping)["__signature__"] = signature
    made = public(mapping, **dict.fromkeys(own, PARAMETER))
    return made if by_jax else _threshold.has_form(of_rows)(made)


_OF_ROWS = tuple(field.name for field in dataclasses.fields(Options))
_OPTIONS = ("axis", *_OF_ROWS)
_FUNCTIONS = ("weight", "score", "slope", "partials")
# What a form is tried on: entries of rows, and a parameter for each row.
_ENTRIES, _ROW, _NUMBER = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3), (2, 1), ())
)


def _by_jax(form: Form) -> bool:
    """Whether nothing is solved for: JAX's own derivatives do, at the score rather than at `p`."""
    return form.tau is not None and form.slope is None


def _check_members(form: Any) -> None:
    """Refuses what can be refused before anything is called."""
    if not isinstance(form, Form):
        raise TypeError(f"form must be a jaxsoftmax.Form, got {type(form).__name__}.")
    for part in _FUNCTIONS:
        fun = getattr(form, part)
        is_needed = part in ("weight", "score")
        if isinstance(fun, np.ufunc):
            raise TypeError(
                f"form.{part} must be a function in jax.numpy, got numpy.{fun.__name__}."
            )
        if not callable(fun) and (is_needed or fun is not None):
            wanted = "a function" if is_needed else "a function or None"
            raise TypeError(f"form.{part} must be {wanted}, got {type(fun).__name__}.")


def _check_takes(part: str, fun: Callable[..., Any], own: Sequence[str]) -> None:
    of = "u" if part == "weight" else "p"
    signature = _signature_of(part, fun)
    try:
        signature.bind(of, *own)
    except TypeError:
        raise TypeError(
            f"form.{part} must take {of} and the parameters of form.weight, "
            f"({', '.join((of, *own))}), got a function of {signature}."
        ) from None


def _check_takes_numbers(part: str, fun: Callable[..., Any], number: int) -> None:
    try:
        jax.eval_shape(fun, *[_NUMBER] * (1 + number))
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"form.{part} must be elementwise, got a function that takes no number: {error}"
        ) from error


def _checked(form: Form, own: Sequence[str]) -> Form:
    """The form, whose functions say clearly if they return anything but what they have to."""
    functions = {part: fun for part in _FUNCTIONS if (fun := getattr(form, part)) is not None}
    for part, fun in functions.items():
        _check_takes(part, fun, own)
        returns = _one_per_parameter if part == "partials" else _as_entries
        functions[part] = _returning(functools.partial(returns, part), part, fun)
    traced = ["tau"] if isinstance(form.tau, core.Tracer) else []
    for part, fun in functions.items():
        closed = Closed()
        closed.opened(fun, _ENTRIES, *[_ROW] * len(own))  # computes nothing
        traced += [part] if closed.arrays else []
        _check_takes_numbers(part, fun, len(own))
    # A rule knows the parameters of a form alone; JAX finds the others.
    if traced and not _by_jax(form):
        raise TypeError(
            f"form.{traced[0]} must not depend on an array that is traced, which would get no "
            "gradient: make that a parameter of form.weight, or the mapping outside of jax.jit."
        )
    weight = functions["weight"]
    # A rule differentiates at probabilities, where they are above 0.
    weight = _inside(weight, functions["score"]) if _by_jax(form) else weight
    functions["weight"] = _at_infinity(weight)
    for part in ("slope", "partials"):
        if part in functions:
            functions[part] = _zero_at_zero(functions[part])
    return dataclasses.replace(form, tau=_number_or_none(form.tau), **functions)


def _returning(
    result: Callable[..., Any], part: str, fun: Callable[..., Any]
) -> Callable[..., Any]:
    """The function of a form, followed by a look at its result."""

    @functools.wraps(fun)
    def checked(x: Array, *params: Array) -> Any:
        try:
            found = fun(x, *params)
        except TypeError as error:
            why = str(error).split("\n", 1)[0]
            raise TypeError(
                f"form.{part} must be written in jax.numpy for arrays, got an error: {why}"
            ) from error
        return result(found, x, params)

    return checked


def _as_entries(part: str, found: Any, x: Array, params: Sequence[Array]) -> Array:
    """The result of an elementwise function, in the dtype of its argument."""
    if not is_array(found):
        raise TypeError(f"form.{part} must return an array, got {type(found).__name__}.")
    found = jnp.asarray(found)
    if found.dtype != jnp.bool_:  # a comparison counts as 0 or 1
        check_real(f"form.{part}", found)
    wanted = jnp.broadcast_shapes(x.shape, *(param.shape for param in params))
    if found.shape not in (x.shape, wanted):
        raise ValueError(
            f"form.{part} must be elementwise, and return shape {wanted} for that shape, got shape "
            f"{found.shape}."
        )
    return found.astype(x.dtype)


def _one_per_parameter(
    part: str, found: Any, x: Array, params: Sequence[Array]
) -> tuple[Array, ...]:
    wanted = f"form.{part} must return a tuple of one array per parameter, {len(params)}"
    if not isinstance(found, tuple | list):
        raise TypeError(f"{wanted}, got {_said(found)} in place of the tuple.")
    if len(found) != len(params):
        raise ValueError(f"{wanted}, got {len(found)}.")
    return tuple(_as_entries(part, partial, x, params) for partial in found)


def _number_or_none(tau: Any) -> Any:
    """The fixed threshold of a form; as a Python number it leaves dtypes as they are."""
    if tau is None:
        return None
    real = is_array(tau) and jnp.issubdtype(jnp.result_type(tau), jnp.number)
    if not real or jnp.iscomplexobj(tau) or jnp.shape(tau) != ():
        raise TypeError(f"form.tau must be a finite number or None, got {_said(tau)}.")
    if isinstance(tau, core.Tracer):
        return tau
    if not math.isfinite(tau):
        raise ValueError(f"form.tau must be a finite number or None, got {tau}.")
    return float(tau)


def _said(value: Any) -> str:
    """What came, in an error message."""
    if hasattr(value, "dtype"):
        return f"an array of shape {jnp.shape(value)} and dtype {value.dtype}"
    return repr(value)


def _check_inverse(form: Form, *params: Any) -> None:
    if any(isinstance(param, core.Tracer) or jnp.shape(param) for param in params):
        return  # only numbers that are known while tracing
    # Rows that sum to 1 may have an entry of 1; others need not.
    for p in (1.0, 0.25) if form.tau is None else (0.25,):
        with jax.ensure_compile_time_eval():
            own = [jnp.float32(param) for param in params]
            u = form.score(jnp.float32(p), *own)
            found = form.weight(u, *own)
            below = [form.weight(u - far, *own) for far in (100.0, 10.0, 1.0, 0.1, 0.0)]
        if isinstance(found, core.Tracer):  # it closes over something that is traced
            return
        u, found, *below = map(float, (u, found, *below))
        if below != sorted(below) or below[0] < 0:
            raise ValueError("form.weight must be increasing and never negative.")
        if not math.isfinite(u) or not abs(found - p) < 1e-3:
            raise ValueError(
                f"form.weight must be the inverse of form.score, got {found:.4g} for the score of "
                f"{p}, which is {u:.4g}."
            )


# What takes no part has a score of -inf, or in a kernel the least float32, which is below this.
_LEAST = -1e30
# Where the functions of a form are defined, whatever it is.
_INSIDE = 0.25


def _at_infinity(weight: Callable[..., Array]) -> Callable[..., Array]:
    """The weight, 0 of what takes no part, and NaN of NaN: a comparison in it would lose that."""

    @functools.wraps(weight)
    def whole(u: Array, *params: Array) -> Array:
        return jnp.where(u > _LEAST, weight(u, *params), jnp.where(jnp.isnan(u), u, 0))

    return whole


def _inside(weight: Callable[..., Array], score: Callable[..., Array]) -> Callable[..., Array]:
    """The weight, of another score where that is -inf: there JAX's derivatives would be NaN."""

    @functools.wraps(weight)
    def safe(u: Array, *params: Array) -> Array:
        inside = score(jnp.full((1,) * u.ndim, _INSIDE, u.dtype), *params)
        return weight(jnp.where(u > _LEAST, u, inside), *params)

    return safe


def _zero_at_zero(part: Callable[..., Any]) -> Callable[..., Any]:
    """The slopes or partials of a form, 0 of what has no weight: it may have taken no part."""

    @functools.wraps(part)
    def safe(p: Array, *params: Array) -> Any:
        has_none = p == 0
        found = part(jnp.where(has_none, _INSIDE, p), *params)
        return jax.tree.map(lambda x: jnp.where(has_none, 0, x), found)

    return safe


def _signature_of(part: str, fun: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(fun)
    except ValueError:
        raise TypeError(f"form.{part} must be a function in jax.numpy, got {fun!r}.") from None


def _signature(form: Form) -> inspect.Signature:
    """That of the mapping: scores, the parameters of the form, and the options of all mappings."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [*_signature_of("weight", form.weight).parameters.values()][1:]
    for p in own:
        if p.name in ("x", *_OPTIONS) or p.kind is not kind:
            raise ValueError(
                f"form.weight must name its parameters, and not as the mapping's own, got {p}."
            )
        if p.default is not p.empty and not is_array(p.default):
            raise TypeError(f"form.weight must have numbers as defaults, got {p}.")
    own = [p.replace(annotation=p.empty) for p in own]
    of_all = [p for name, p in inspect.signature(softmax).parameters.items() if name != "x"]
    return inspect.Signature([inspect.Parameter("x", kind), *own, *of_all])
