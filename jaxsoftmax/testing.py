"""The contract of a mapping as a test, for mappings of your own.

    from jaxsoftmax import testing

    def test_entmax43():
        testing.check_mapping(entmax43, reference)

It needs nothing but NumPy and JAX, and works under pytest or alone.
"""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax._public import is_public, kinds_of
from jaxsoftmax._scores import has_parameter

__all__ = ["check_mapping"]


def __dir__() -> list[str]:
    return __all__


Mapping = Callable[..., Any]
Reference = Callable[[np.ndarray], np.ndarray]


def check_mapping(
    mapping: Mapping,
    reference: Reference,
    *,
    scores: ArrayLike | None = None,
    tolerance: float = 1e-5,
) -> None:
    r"""Checks that a mapping keeps the promises that those of this package keep.

    These are its values in all dtypes, `axis`, `where`, `temperature`, both of these, ties,
    infinite scores, NaN, rows in which nothing takes part; first derivatives in scores and
    temperature against differences of the reference, in both modes; second derivatives in scores;
    `jit`, `vmap`, `scan`. If it is made by `threshold_mapping`, or is one of this package, also
    `sink` and `segment_ids`, where it takes them, the derivative in the sink, and those in its
    parameters, against differences of its own values in float64.

    Args:
      mapping: called as `mapping(x, axis=-1, where=None, temperature=1.0)`; a `functools.partial`
        gives its parameters by name. Those of a mapping of any other origin are taken as fixed:
        their derivatives are not checked. Its rows sum to 1, and are 0 if nothing takes part.
      reference: the same of one row, by another method, in NumPy: of finite float64 scores, also
        huge ones, in float64. Best the formula, or a solver by bisection.
      scores: rows of at least three scores, shape `(rows, entries)`, at which the mapping has
        derivatives: no entry is at the edge of its support. None: two rows of four.
      tolerance: how far values may be from the reference, relative to 1, in float32. Derivatives
        may be off by 100 times as much, for differences of the reference are.

    Raises:
      AssertionError: with one sentence, if a promise is not kept.
      TypeError: if `mapping` or `reference` is no function, `tolerance` no number, `scores` are no
        numbers, or the reference returns less than float64.
      ValueError: if `scores` are not finite rows of three or more, `tolerance` is not positive, or
        the reference returns another shape, or NaN or infinity.

    Example:
      >>> import functools, jax.numpy as jnp, jaxsoftmax as jsm, scipy.special
      >>> from jaxsoftmax import testing
      >>> testing.check_mapping(jsm.softmax, lambda x: scipy.special.softmax(x, -1))
      >>> testing.check_mapping(jsm.sparsemax, lambda x: scipy.special.softmax(x, -1))
      Traceback (most recent call last):
      AssertionError: values: got 0.7 at (0, 0), wanted 0.4491438.

    References:
      Griewank & Walther, 2008: Evaluating Derivatives (forward, reverse and differences).
    """
    for name, function in (("mapping", mapping), ("reference", reference)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}.")
    x = _rows_of_scores(_SCORES if scores is None else scores)
    check = _Check(mapping, reference, _positive(tolerance))
    for part in (
        _values,
        _options,
        _pairs_of_options,
        _edges,
        _derivatives,
        _derivatives_in_options,
        _derivatives_in_parameters,
        _transformations,
    ):
        part(check, x)


_SCORES = [[1.0, 0.6, -0.9, 0.1], [0.2, -2.0, 1.4, 1.1]]


def _rows_of_scores(scores: Any) -> np.ndarray:
    try:
        x = np.asarray(scores, np.float32)
    except (TypeError, ValueError):
        raise TypeError(f"scores must be rows of numbers, got {scores!r}.") from None
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 3:
        raise ValueError(f"scores must be rows of three or more, got shape {x.shape}.")
    if not np.all(np.isfinite(x)):
        raise ValueError(f"scores must be finite, got {x[~np.isfinite(x)][0]}.")
    return x


def _positive(tolerance: Any) -> float:
    if not isinstance(tolerance, numbers.Real) or isinstance(tolerance, bool):
        raise TypeError(f"tolerance must be a positive number, got {tolerance!r}.")
    if not 0 < float(tolerance) < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance}.")
    return float(tolerance)


class _Check:
    """A mapping, what it should be, and how near."""

    def __init__(self, mapping: Mapping, reference: Reference, tolerance: float) -> None:
        self.mapping, self.reference, self.tolerance = mapping, reference, tolerance

    def exact(
        self, x: Any, where: Any = True, temperature: Any = 1.0, sink: float | None = None
    ) -> np.ndarray:
        """The reference along the last axis, also of infinite scores."""
        x = np.where(where, np.asarray(x, np.float64) / temperature, -np.inf)
        rows = x.reshape(-1, x.shape[-1])
        if sink is not None:
            rows = np.concatenate([rows, np.full_like(rows[:, :1], sink)], -1)
        p = [_of_row(self.reference, row)[: x.shape[-1]] for row in rows]
        return np.reshape(p, x.shape)

    def near(self, found: Any, wanted: Any, what: str, tolerance: float | None = None) -> None:
        """Fails where two arrays differ, or the shapes do."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        if found.shape != wanted.shape:
            raise AssertionError(f"{what}: got shape {found.shape}, wanted {wanted.shape}.")
        tolerance = self.tolerance if tolerance is None else tolerance
        same = np.isclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not np.all(same):
            i = np.unravel_index(np.argmin(same), same.shape)
            at = f" at {tuple(map(int, i))}" if i else ""
            raise AssertionError(f"{what}: got {found[i]:.7g}{at}, wanted {wanted[i]:.7g}.")

    def slope(
        self, f: Callable[[Any], Any], wanted: np.ndarray, at: float, what: str, tolerance: float
    ) -> None:
        """Fails where the derivative of `f` in one number is not the wanted one, in either mode."""
        what = f"derivatives in {what}"
        weights = np.cos(np.arange(wanted.size)).reshape(wanted.shape)

        def total(number: Any) -> Any:
            p = f(number)
            return jnp.sum(p * jnp.asarray(weights, p.dtype))

        _, forward = jax.jvp(f, (at,), (1.0,))
        self.near(forward, wanted, f"{what} in forward mode", tolerance)
        reverse = jax.grad(total)(at)
        self.near(reverse, np.sum(weights * wanted), f"{what} in reverse mode", tolerance)


def _of_row(reference: Reference, row: np.ndarray) -> np.ndarray:
    """What the contract says of one row, in which -inf takes no part."""
    if np.any(np.isnan(row)):
        return np.full_like(row, np.nan)
    if np.any(row == np.inf):
        return (row == np.inf) / np.sum(row == np.inf)
    p, finite = np.zeros_like(row), row > -np.inf
    if np.any(finite):
        p[finite] = _of_finite(reference, row[finite])
    return p


def _of_finite(reference: Reference, row: np.ndarray) -> np.ndarray:
    """The reference, if it can be one."""
    p = np.asarray(reference(row))
    if not np.issubdtype(p.dtype, np.floating) or np.finfo(p.dtype).bits < 64:
        raise TypeError(
            "reference must return float64, since it is the truth that the mapping is compared "
            f"with, got {p.dtype}."
        )
    if p.shape != row.shape:
        raise ValueError(
            f"reference must return the shape of its scores, {row.shape}, got shape {p.shape}."
        )
    if not np.all(np.isfinite(p)):
        raise ValueError(
            f"reference must return finite numbers of finite scores, also of huge ones, got "
            f"{p[~np.isfinite(p)][0]} of {row.tolist()}."
        )
    return p


def _values(check: _Check, x: np.ndarray) -> None:
    many = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    for rows in (x, x[:, :1], np.ones_like(x), 30 * x, x - 100, many):
        check.near(check.mapping(rows), check.exact(rows), "values")
    for dtype in (jnp.float16, jnp.bfloat16):
        rows = jnp.asarray(x, dtype)
        p = check.mapping(rows)
        if p.dtype != dtype:
            raise AssertionError(f"dtype: got {p.dtype} for scores of {jnp.dtype(dtype)}.")
        rounding = float(jnp.finfo(dtype).eps)
        check.near(p.astype(np.float32), check.exact(rows), f"values in {p.dtype}", rounding)
    whole = np.array([[2, 1, 0, -1]])
    check.near(check.mapping(whole), check.exact(whole), "values of integers")


def _options(check: _Check, x: np.ndarray) -> None:
    mapping = check.mapping
    cube = np.stack([x, x[::-1] / 2, -x])
    for axis in (0, 1, -1):
        moved = np.moveaxis(check.exact(np.moveaxis(cube, axis, -1)), -1, axis)
        check.near(mapping(cube, axis=axis), moved, f"axis={axis}")
    flat = check.exact(cube.reshape(len(cube), -1)).reshape(cube.shape)
    check.near(mapping(cube, axis=(1, 2)), flat, "axis=(1, 2)")
    where = _where(x)
    check.near(mapping(x, where=where), check.exact(x, where), "where")
    spoiled = np.where(where, x, np.nan)
    check.near(mapping(spoiled, where=where), check.exact(x, where), "NaN that where excludes")
    for t in (0.5, 2.0, np.float32(3.0), np.array([[0.5], [2.0]], np.float32)[: len(x)]):
        if np.ndim(t) == 0 or len(x) == 2:
            wanted = check.exact(x, temperature=t)
            check.near(mapping(x, temperature=t), wanted, f"temperature={t!r}")
    coldest = np.where(x == x.max(-1, keepdims=True), np.inf, -np.inf)
    check.near(mapping(x, temperature=0.0), check.exact(coldest), "temperature=0")
    if _takes(mapping, "sink"):
        check.near(mapping(x, sink=0.3), check.exact(x, sink=0.3), "sink")
    if _takes(mapping, "segment_ids"):
        ids = np.array([0] * 2 + [1] * (x.shape[1] - 2))
        apart = np.concatenate([check.exact(x[:, :2]), check.exact(x[:, 2:])], -1)
        check.near(mapping(x, segment_ids=ids, num_segments=2), apart, "segment_ids")


def _where(x: np.ndarray) -> np.ndarray:
    return np.arange(x.size).reshape(x.shape) % 3 != 0


def _pairs_of_options(check: _Check, x: np.ndarray) -> None:
    """Each option may be right alone, and wrong beside another."""
    given = {"where": _where(x), "temperature": 0.5, "sink": 0.3}
    if not _takes(check.mapping, "sink"):
        del given["sink"]
    for one, other in itertools.combinations(given, 2):
        options = {one: given[one], other: given[other]}
        check.near(check.mapping(x, **options), check.exact(x, **options), f"{one} and {other}")


def _edges(check: _Check, x: np.ndarray) -> None:
    extremes = [-np.inf, -1e30, 0.0, 0.5, 1e30, np.inf, np.nan]
    rows = np.array(list(itertools.product(extremes, repeat=3)), np.float32)
    check.near(check.mapping(rows), check.exact(rows), "rows of extreme scores")
    empty = np.zeros(x.shape, bool)
    check.near(check.mapping(x, where=empty), np.zeros(x.shape), "rows without entries")
    valid = rows[~np.isnan(rows).any(-1)]
    slopes = jax.grad(lambda x: jnp.sum(check.mapping(x)[:, 0]))(valid)
    if not np.all(np.isfinite(slopes)):
        raise AssertionError("derivatives of rows of extreme scores: got NaN or inf.")


def _derivatives(check: _Check, x: np.ndarray) -> None:
    for t in (1.0, 0.7):

        def mapping(x: Any, t: float = t) -> Any:
            return check.mapping(x, temperature=t)

        far = 100 * check.tolerance
        for row in x:
            exact = _jacobian(
                lambda row, t=t: _of_row(check.reference, row / t), row.astype(np.float64)
            )
            check.near(jax.jacrev(mapping)(row), exact, "derivatives in reverse mode", far)
            check.near(jax.jacfwd(mapping)(row), exact, "derivatives in forward mode", far)
            hessian = _jacobian(
                lambda row, f=mapping: np.asarray(jax.jacrev(f)(row.astype(np.float32))), row
            )
            for second in (jax.jacfwd(jax.jacrev(mapping)), jax.jacrev(jax.jacfwd(mapping))):
                check.near(second(row), hessian, "second derivatives", max(far, 1e-2))
    where = np.arange(x.shape[1]) != 1
    slopes = jax.grad(lambda x: jnp.sum(check.mapping(x, where=where)[:, 0]))(x)
    check.near(np.asarray(slopes)[:, 1], np.zeros(len(x)), "derivatives of what where excludes")


def _derivatives_in_options(check: _Check, x: np.ndarray) -> None:
    mapping, far, where = check.mapping, 100 * check.tolerance, _where(x)
    spoiled = np.where(where, x, np.nan)
    t, sink = 0.7, float(x.max()) + 0.07  # a sink surely inside of the support
    wanted = _difference(lambda t: check.exact(x, temperature=t), t)
    check.slope(lambda t: mapping(x, temperature=t), wanted, t, "temperature", far)
    wanted = _difference(lambda t: check.exact(x, where, t), t)
    check.slope(
        lambda t: mapping(spoiled, where=where, temperature=t),
        wanted,
        t,
        "temperature beside where",
        far,
    )
    if _takes(mapping, "sink"):
        wanted = _difference(lambda sink: check.exact(x, sink=sink), sink)
        check.slope(lambda sink: mapping(x, sink=sink), wanted, sink, "sink", far)


def _derivatives_in_parameters(check: _Check, x: np.ndarray) -> None:
    """Against the mapping's own values, for the reference knows no parameters."""
    for name, value in _parameters(check.mapping).items():
        with jax.enable_x64(True):
            at, x = jnp.asarray(value, jnp.float64), x.astype(np.float64)

            def moved(by: Any, x: Any = x, at: Any = at, name: str = name) -> Any:
                return check.mapping(x, **{name: at + by})

            wanted = _difference(lambda by, f=moved: np.asarray(f(by)), 0.0)
            # At the edge of what a parameter may be there are no such differences.
            if np.all(np.isfinite(wanted)):
                check.slope(moved, wanted, 0.0, name, check.tolerance)


def _parameters(mapping: Mapping) -> dict[str, Any]:
    """What one of our mappings has parameters for, and the values given or taken by default."""
    kinds = kinds_of(getattr(mapping, "func", mapping))
    given = inspect.signature(mapping).parameters if kinds else {}
    return {
        name: p.default
        for name, p in given.items()
        if name in kinds and kinds[name].is_parameter and p.default is not p.empty
    }


def _difference(f: Callable[[float], np.ndarray], at: float) -> np.ndarray:
    """The derivative in one number, in float64, by a central difference."""
    return (f(at + 1e-6) - f(at - 1e-6)) / 2e-6


def _jacobian(f: Callable[[np.ndarray], np.ndarray], row: np.ndarray) -> np.ndarray:
    """By central differences; the entries of the argument are the last axis."""
    step = 1e-6 if row.dtype == np.float64 else 1e-3
    shifts = step * np.eye(len(row), dtype=row.dtype)
    return np.stack([(f(row + h) - f(row - h)) / (2 * step) for h in shifts], -1)


def _transformations(check: _Check, x: np.ndarray) -> None:
    mapping, p = check.mapping, check.exact(x)
    check.near(jax.jit(mapping)(x), p, "under jit")
    check.near(jax.vmap(mapping)(x), p, "under vmap")
    by_column = jax.vmap(lambda x: mapping(x, axis=0), 1, 1)(x.T)
    check.near(by_column, p.T, "under vmap over the last axis")
    masks = np.stack([np.ones(x.shape, bool), np.arange(x.size).reshape(x.shape) % 2 == 0])
    of_masks = jax.vmap(lambda where: mapping(x, where=where))(masks)
    check.near(of_masks, check.exact(np.where(masks, x, -np.inf)), "under vmap over where")
    _, scanned = jax.lax.scan(lambda carry, row: (carry, mapping(row)), 0, x)
    check.near(scanned, p, "in a scan")

    def squares(row: Any) -> Any:
        return jnp.sum(mapping(row) ** 2)

    alone = np.stack([jax.grad(squares)(row) for row in x])
    check.near(jax.vmap(jax.grad(squares))(x), alone, "vmap of grad")
    check.near(jax.vmap(jax.grad(jax.checkpoint(squares)))(x), alone, "checkpoint")


def _takes(mapping: Mapping, option: str) -> bool:
    """Whether one of our mappings has an option."""
    function = getattr(mapping, "func", mapping)
    return is_public(function) and has_parameter(inspect.signature(mapping), option)
