"""Drawing from the probabilities of scores, and gradients for what was drawn.

A draw from `softmax(x)` is where `x + g` is largest, with independent Gumbel noise `g`: nothing is
normalized, and no cumulative sum rounds away what is rare.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, Real

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import FLAG, SHAPE, is_int, public
from jaxsoftmax._reductions import Entries, Rows, indicator, is_known, vary_like
from jaxsoftmax._scores import (
    Axis,
    Options,
    as_array,
    as_returned,
    check_key,
    has_parameter,
    is_cold,
    output_dtype,
    prepare,
    split_axis,
    temper,
)
from jaxsoftmax._sharding import gathered, share_like
from jaxsoftmax.mappings import _softmax, hardmax


@public(shape=SHAPE, replace=FLAG)
def sample(
    key: PRNGKeyArray,
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    shape: tuple[int, ...] | None = None,
    replace: bool = True,
) -> Int[Array, "*draws_and_rows"]:
    r"""Positions drawn with the probabilities of `softmax`, one per row or several.

    .. math:: i = \arg\max_j (x_j / t + g_j), \quad g_j \sim \mathrm{Gumbel}(0, 1)

    The noise is drawn in float32 or better, for any dtype of the scores. Several draws without
    replacement are the positions where :math:`x_j / t + g_j` is largest, second largest, and so on.

    Args:
      key: a key of `jax.random.key`, used once. Rows are independent of each other.
      x: scores of any shape and real dtype.
      axis: the axes to draw along: array axes, mesh axis names, both in a tuple, or None for all
        array axes.
      where: what may be drawn, such as a mask of `top_k_mask`, `top_p_mask` or `min_p_mask` at the
        same temperature; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative. 0 gives the
        position of the maximum (of the first one, if several are equal); without replacement, the
        next largest scores follow.
      shape: the shape of the result, as in `jax.random.categorical`: axes of draws, followed by the
        shape of `x` without `axis`. Default: the latter alone, which is one draw per row.
      replace: whether a position may be drawn more than once. If not, all draws of a row differ, in
        the order in which they are drawn; `axis` must then be array axes.

    Returns:
      int32 positions of shape `shape`. If there are several axes, positions are those of the
      flattened axes, mesh axes first, then array axes in ascending order. The result is -1 where
      nothing is left to draw, because all entries are excluded or -inf, as all but those of +inf
      are beside one, and where a score that takes part is NaN.

    Raises:
      TypeError: if `key` is not a key, `x` not real or `where` not boolean.
      ValueError: if `key` is more than one, an axis is out of range, shapes do not fit,
        `temperature` is a negative number, or if you ask for more draws without replacement than
        there are entries.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.log(jnp.array([0.1, 0.6, 0.3, 0.0]))
      >>> keys = jax.random.split(jax.random.key(0), 10_000)
      >>> draws = jax.vmap(jsm.sample, (0, None))(keys, x)
      >>> jnp.set_printoptions(precision=2, suppress=True)
      >>> print(jnp.bincount(draws, length=4) / 10_000)
      [0.1 0.6 0.3 0. ]
      >>> nucleus = jsm.top_p_mask(x, 0.5, temperature=0.7)
      >>> print(jsm.sample(keys[0], x, where=nucleus, temperature=0.7))
      1
      >>> print(jsm.sample(keys[0], x, shape=(3,), replace=False))
      [1 2 0]

    References:
      Gumbel, 1954: Statistical theory of extreme values and some practical applications; Maddison,
      Tarlow & Minka, 2014: A* sampling (arXiv:1411.0030). Without replacement: Kool, van Hoof &
      Welling, 2019: Stochastic beams and where to find them (arXiv:1903.06059).
    """
    key, x = check_key(key), as_array(x, "x")
    axes, names = split_axis(axis, x.ndim)
    draws = _axes_of_draws(shape, tuple(n for i, n in enumerate(x.shape) if i not in axes))
    if not replace:
        return _without_replacement(key, x, axis, Options(where, temperature), draws)
    x = jnp.broadcast_to(x, draws + x.shape)
    axis = (*(i + len(draws) for i in axes), *names)
    rows, scores = prepare(x, axis, Options(where, temperature))
    noise = _gumbel(key, rows, scores)
    noise = jnp.where(is_cold(rows, scores[0], temperature), 0, noise)
    perturbed = lax.stop_gradient(_perturb(rows, scores, noise))
    drawn = _first_at_top(rows, perturbed, _positions(rows, perturbed))
    return rows.flatten(jnp.where(_any_nan(rows, perturbed), -1, drawn))


def _axes_of_draws(shape: Any, rows: tuple[int, ...]) -> tuple[int, ...]:
    """What stands before the shape of the rows."""
    if shape is None:
        return ()
    if not isinstance(shape, tuple) or shape[len(shape) - len(rows) :] != rows:
        raise ValueError(
            f"shape must be a tuple that ends with the shape of the rows {rows}, got {shape!r}."
        )
    draws = shape[: len(shape) - len(rows)]
    if any(isinstance(n, float | bool | str) or (is_int(n) and n < 0) for n in draws):
        raise ValueError(f"shape must be of whole numbers that are not negative, got {shape!r}.")
    return draws


def _without_replacement(
    key: PRNGKeyArray, x: Array, axis: Axis, options: Options, draws: tuple[int, ...]
) -> Array:
    rows, scores = prepare(x, axis, options)
    if rows.names:
        raise ValueError(f"axis must be array axes if replace=False, got {axis!r}.")
    (perturbed,) = _perturb(rows, scores, _gumbel(key, rows, scores))
    # At temperature 0 only the largest is left of the scores; but there is a second one.
    _, (as_they_are,) = prepare(x, axis, dataclasses.replace(options, temperature=1.0))
    perturbed = jnp.where(is_cold(rows, scores[0], options.temperature), as_they_are, perturbed)
    perturbed = lax.stop_gradient(perturbed)
    perturbed = jnp.where(_any_nan(rows, (perturbed,)), -jnp.inf, perturbed)
    perturbed = jnp.where(perturbed == 0, 0, perturbed)  # to `top_k`, -0 is less than 0
    last = jnp.moveaxis(perturbed, rows.axes, range(-len(rows.axes), 0))
    last = lax.collapse(last, last.ndim - len(rows.axes))
    count, length = math.prod(draws), last.shape[-1]
    if is_known(length) and count > length:
        raise ValueError(
            f"shape must ask for at most {length} draws of a row if replace=False, got {count}."
        )
    highest, drawn = lax.top_k(gathered(last, last.ndim - 1), count)
    drawn = jnp.where(highest > -jnp.inf, drawn, -1).astype(jnp.int32)
    return jnp.moveaxis(drawn, -1, 0).reshape(draws + drawn.shape[:-1])


@public(hard=FLAG)
def gumbel_softmax(
    key: PRNGKeyArray,
    x: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    hard: bool = False,
) -> Float[Array, "*shape"]:
    r"""A differentiable draw from `softmax(x)`: nearly one-hot.

    .. math:: p = \mathrm{softmax}\big((x + g) / t\big), \quad g_i \sim \mathrm{Gumbel}(0, 1)

    The largest entry is at `i` with probability :math:`\mathrm{softmax}(x)_i` at any temperature,
    and it is the one that `sample(key, x)` returns. A lower temperature makes the result closer to
    one-hot. Unlike the temperature of `sample`, it divides the noise as well. So it softens the
    draw, and does not change how likely each draw is.

    Args:
      key: a key of `jax.random.key`, used once. Rows are independent of each other.
      x: scores of any shape and real dtype.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: what may be drawn, such as a mask of `top_k_mask`, `top_p_mask` or `min_p_mask`; a
        boolean mask that broadcasts to `x`.
      temperature: divides the perturbed scores; a number or one value per row, not negative. 0
        gives one-hot rows without a gradient.
      hard: whether to return exactly one-hot rows that have the gradient of the soft ones.

    Returns:
      Probabilities of the shape and dtype of `x`; all 0 in a row in which nothing can be drawn, and
      NaN in a row with a NaN that takes part.

    Raises:
      TypeError: if `key` is not a key, `x` not real, `where` not boolean or `hard` not a bool.
      ValueError: if `key` is more than one, an axis is out of range, shapes do not fit, or
        `temperature` is a negative number.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> key, x = jax.random.key(1), jnp.array([1.0, 2.0, 0.5])
      >>> print(jsm.gumbel_softmax(key, x, temperature=0.5))
      [0.179 0.758 0.063]
      >>> print(jsm.gumbel_softmax(key, x, temperature=0.5, hard=True))
      [0. 1. 0.]

    References:
      Jang, Gu & Poole, 2017 (arXiv:1611.01144); Maddison, Mnih & Teh, 2017 (arXiv:1611.00712).
    """
    rows, scores = prepare(x, axis, Options(where))
    perturbed = _perturb(rows, scores, _gumbel(key, rows, scores))
    tempered = temper(rows, perturbed[0], temperature)
    (p,) = _threshold.apply(_softmax.SOFTMAX, rows, (tempered,))
    if hard:
        p = _with_value(p, _one_hot(rows, lax.stop_gradient(perturbed)))
    return as_returned(p, x, where)


def straight_through(
    mapping: Callable[..., Array], hard: Callable[..., Array] = hardmax
) -> Callable[..., Array]:
    r"""A mapping whose value is hard and whose derivatives are soft.

    .. math:: f(x) = \mathrm{hard}(x), \quad Df(x) = D\,\mathrm{mapping}(x)

    The value is exactly that of `hard`, without rounding errors from adding and subtracting the
    soft value. The derivatives are those of `mapping`, in both modes and to any order.

    Args:
      mapping: has the derivatives: a mapping of this package, or your own. Its first argument is
        the scores, and it has an argument `axis`.
      hard: has the value, in the same shape. It gets the arguments that say what the rows are
        (`axis`, `where`, `sink`, `segment_ids`, `num_segments`), but not the temperature. Here
        `hardmax` returns one-hot rows: of several largest scores it chooses the first, as
        `jnp.argmax` does. (If ties should share, pass `lambda x, **rows: hardmax(x, **rows)`.)

    Returns:
      A mapping with the parameters of `mapping`.

    Raises:
      ValueError: if `mapping` has no `axis`; when called, if `hard` does not take one of these
        arguments, or returns another shape than `mapping`. (`hardmax` takes no segments;
        `functools.partial(softmax, temperature=0)` does.)

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> choose = jsm.straight_through(jsm.softmax)
      >>> x, v = jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 0.0, 0.0])
      >>> choice, change = jax.jvp(lambda x: choose(x, temperature=2.0), (x,), (v,))
      >>> print(choice, change)
      [0. 1. 0.] [ 0.103 -0.07  -0.033]
      >>> print(jsm.straight_through(jsm.entmax15)(jnp.array([2.0, 2.0, 0.0])))
      [1. 0. 0.]

    References:
      Bengio, Leonard & Courville, 2013: Estimating or propagating gradients through stochastic
      neurons (arXiv:1308.3432).
    """
    for name, function in (("mapping", mapping), ("hard", hard)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}.")
    signature = inspect.signature(mapping)
    if not has_parameter(signature, "axis"):
        raise ValueError(f"mapping must have a parameter axis, got one with {signature}.")
    hard_signature = inspect.signature(hard)
    hard = _first_of_the_largest if hard is hardmax else hard

    @functools.wraps(mapping)
    def hardened(*args: Any, **kwargs: Any) -> Array:
        soft = mapping(*args, **kwargs)
        given = _arguments(signature, args, kwargs)
        rows = {name: given[name] for name in _ROW if given.get(name) is not None}
        if "axis" in given:
            rows["axis"] = given["axis"]  # None says something: all of them
        for name in rows:
            if not has_parameter(hard_signature, name):
                raise ValueError(f"hard must take {name}, got one with {hard_signature}.")
        value = hard(next(iter(given.values())), **rows)
        if value.shape != soft.shape:
            raise ValueError(
                f"hard must return the shape of the mapping {soft.shape}, got shape {value.shape}."
            )
        return _with_value(soft, value.astype(soft.dtype))

    return hardened


@public
def _first_of_the_largest(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Array:
    """`hardmax`, in which ties do not share."""
    rows, scores = prepare(x, axis, Options(where))
    return _one_hot(rows, lax.stop_gradient(scores)).astype(output_dtype(x))


# The arguments of a mapping that say what a row is.
_ROW = ("axis", "where", "sink", "segment_ids", "num_segments")


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


@custom_vjp
def _with_value(soft: Array, value: Array) -> Array:
    """`value`, with the derivatives of `soft`."""
    del soft
    return value


def _with_value_fwd(soft: Array, value: Array) -> tuple[Array, None]:
    return _with_value(soft, value), None


def _with_value_bwd(_: None, ct: Array) -> tuple[Array, Array]:
    return ct, jnp.zeros_like(ct)


_with_value.defvjp(_with_value_fwd, _with_value_bwd)


def _gumbel(key: PRNGKeyArray, rows: Rows, scores: Entries) -> Array:
    """Noise for each score; other noise on each device of the mesh axes that rows go over."""
    key = check_key(key)
    for name in rows.names:
        key = jax.random.fold_in(key, lax.axis_index(name))
    (x,) = scores
    # Twice the bits, or what is rarer than one in millions is drawn too often.
    return vary_like(jax.random.gumbel(key, x.shape, x.dtype, mode="high"), x)


def _perturb(rows: Rows, scores: Entries, noise: Array) -> Entries:
    """The scores with noise: below their maximum, and with the derivatives of the scores.

    Below the maximum, since large numbers would round off the noise, and infinite ones swallow it.
    """
    (x,) = scores
    (gap,), _ = _tops.below_top(rows, (lax.stop_gradient(x),))
    return (_with_value(x, gap + noise),)


def _any_nan(rows: Rows, entries: Entries) -> Array:
    """Which rows hold NaN; a maximum may lose it."""
    return rows.max(rows.map(lambda x: indicator(jnp.isnan(x), x.dtype), [entries])) > 0


def _positions(rows: Rows, entries: Entries) -> Array:
    """The positions in a row, in a shape that broadcasts against its entries."""
    shape = entries[0].shape
    sizes = [n if i in rows.axes else 1 for i, n in enumerate(shape)]
    length = math.prod(sizes)
    positions = jnp.arange(length, dtype=jnp.int32).reshape(sizes)
    return positions + lax.axis_index(rows.names) * length if rows.names else positions


def _one_hot(rows: Rows, entries: Entries) -> Array:
    """1 at the first of each row's largest entries, all 0 if that is -inf; NaN where one is."""
    positions = _positions(rows, entries)
    positions = share_like(jnp.broadcast_to(positions, entries[0].shape), entries[0])
    drawn = positions == _first_at_top(rows, entries, positions)
    return nan_unless(~_any_nan(rows, entries), indicator(drawn, entries[0].dtype))


def _first_at_top(rows: Rows, entries: Entries, positions: Array) -> Array:
    """The first position of each row's largest entry, -1 if that is -inf."""
    top = rows.max(entries)
    nowhere = jnp.iinfo(jnp.int32).max
    at_top = (entries[0] == top) & (top > -jnp.inf)
    first = jnp.min(
        jnp.where(at_top, positions, nowhere), rows.axes, keepdims=True, initial=nowhere
    )
    first = lax.pmin(first, rows.names) if rows.names else first
    return jnp.where(first == nowhere, -1, first)
