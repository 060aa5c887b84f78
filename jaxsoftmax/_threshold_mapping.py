"""A mapping of a form that anyone has written."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array

from jaxsoftmax import _threshold
from jaxsoftmax._form import Form
from jaxsoftmax._implementations import KERNELS, refuse
from jaxsoftmax._public import PARAMETER, public
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import Options, check_per_row, output_dtype, prepare
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
      The mapping. Rows in which nothing takes part are 0. `testing.check_mapping` checks it.

    Raises:
      TypeError: if `form` is not a `Form`.
      ValueError: if `form.weight` has parameters without a name of their own; when the mapping is
        called, if it has none and is not the inverse of `form.score`, or never reaches 1.

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
    if not isinstance(form, Form):
        raise TypeError(f"form must be a jaxsoftmax.Form, got {type(form).__name__}.")
    for part in ("weight", "score"):
        if not callable(getattr(form, part)):
            found = type(getattr(form, part)).__name__
            raise TypeError(f"form.{part} must be a function, got {found}.")
    signature = _signature(form)
    own = [p for p in signature.parameters if p not in ("x", *_OPTIONS)]
    safe = dataclasses.replace(form, weight=_keeping_nan(form.weight))
    # Nothing is solved for: JAX's own derivatives do, at the score rather than at `p`.
    by_jax = form.tau is not None and form.slope is None

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
        if not own:
            _check_inverse(form)
        given = bound.arguments
        x, axis = given.pop("x"), given.pop("axis")
        rows, scores = prepare(x, axis, Options(**{o: given.pop(o) for o in _OF_ROWS}))
        _, params = of_rows(rows, scores, **given)
        if by_jax and rows.implementation in KERNELS:
            refuse("pallas", f"{name}, whose form has a tau and no slope")
        make = _threshold.probabilities if by_jax else _threshold.apply
        return make(safe, rows, scores, *params)[0].astype(output_dtype(x))

    mapping.__name__ = mapping.__qualname__ = name
    mapping.__doc__ = f"The mapping `{name}` of a form; see `jaxsoftmax.threshold_mapping`."
    vars(mapping)["__signature__"] = signature
    made = public(mapping, **dict.fromkeys(own, PARAMETER))
    return made if by_jax else _threshold.has_form(of_rows)(made)


_OF_ROWS = tuple(field.name for field in dataclasses.fields(Options))
_OPTIONS = ("axis", *_OF_ROWS)


def _check_inverse(form: Form) -> None:
    # Rows that sum to 1 may have an entry of 1; others need not.
    for p in (1.0, 0.25) if form.tau is None else (0.25,):
        with jax.ensure_compile_time_eval():
            u = form.score(jnp.float32(p))
            found = form.weight(u)
            below = [form.weight(u - far) for far in (100.0, 10.0, 1.0, 0.1, 0.0)]
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


def _keeping_nan(weight: Callable[..., Array]) -> Callable[..., Array]:
    """The weight, NaN of NaN: a comparison in it would lose that."""

    @functools.wraps(weight)
    def kept(u: Array, *params: Array) -> Array:
        return jnp.where(jnp.isnan(u), u, weight(u, *params))

    return kept


def _signature(form: Form) -> inspect.Signature:
    """That of the mapping: scores, the parameters of the form, and the options of all mappings."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    _, *own = inspect.signature(form.weight).parameters.values()
    for p in own:
        if p.name in ("x", *_OPTIONS) or p.kind is not kind:
            raise ValueError(
                f"form.weight must name its parameters, and not as the mapping's own, got {p}."
            )
    own = [p.replace(annotation=p.empty) for p in own]
    of_all = [p for name, p in inspect.signature(softmax).parameters.items() if name != "x"]
    return inspect.Signature([inspect.Parameter("x", kind), *own, *of_all])
