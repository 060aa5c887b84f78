"""Probabilities mended class by class: beta calibration and isotonic regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import public
from jaxsoftmax._scores import as_scores, output_dtype
from jaxsoftmax._sharding import gathered, joinable, share_like
from jaxsoftmax.calibration._minimize import minimize, precise
from jaxsoftmax.calibration._predictions import (
    Events,
    are_probs,
    as_predictions,
    explained,
    measure,
    within_bounds,
    wrong_probs,
)
from jaxsoftmax.calibration._scaling import strength

P = ParamSpec("P")
R = TypeVar("R")

# No parameter is fitted beyond this.
_LIMIT = 1000.0


def _mends(fun: Callable[P, R]) -> Callable[P, R]:
    """Jits what is applied to `(probs, ...)`; see `explained`."""
    return explained(public(fun), lambda probs, **_: wrong_probs(as_scores(probs, "probs")))


@measure()
def fit_beta_scaling(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    penalty: ArrayLike = 0.0,
    weights: Real[ArrayLike, "*rows"] | None = None,
) -> tuple[Float[Array, " classes"], Float[Array, " classes"], Float[Array, " classes"]]:
    r"""Three numbers per class that make held-out labels most likely, class by class.

    .. math:: \arg\min_{a, b \ge 0, c} \frac1n \sum_i \Big[ \log(1 + e^{z_i}) - y_i z_i \Big]
              + \frac{\lambda}{3} \big[ (a - 1)^2 + (b - 1)^2 + c^2 \big],
              \quad z_i = a \log p_i - b \log(1 - p_i) + c

    for the probabilities `p` of a class, with 1 or 0 in `y` where it came true or not. Unlike
    scaling of logits, this can bend both ends of a curve, one by `a` and one by `b`, and the
    identity is one of its curves. It needs no logits.

    It is found by L-BFGS with a line search that starts at the identity. `a` and `b` are sought up
    to 1000, `c` up to 1000 either way. The result has no derivatives.

    Args:
      probs: predicted probabilities of held-out examples. A single column, or (n,) with labels
        (n,), means one event per row: class 1 of two, for instance.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      penalty: the strength `lambda`.
      weights: how much each row counts. Default: 1.

    Returns:
      `(a, b, c)`, each with one number per column, for `beta_scaling(probs, a, b, c)`. The identity
      if no row counts, and NaN if a row that counts contains NaN.

    Raises:
      TypeError: if `probs` or `penalty` is not real or `labels` are not integers.
      ValueError: if shapes do not fit. Outside of `jit`, also if a row that counts has numbers that
        are not probabilities (up to rounding), a label that is not a class, or a negative weight,
        or if `penalty` is negative. While tracing, the result is then NaN.

    Example:
      Of what was predicted with probability 0.9 three quarters came true, of 0.2 a fifth:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> p = jnp.repeat(jnp.array([0.9, 0.2, 0.5]), 20)
      >>> came_true = jnp.tile(jnp.arange(20), 3) < jnp.repeat(jnp.array([15, 4, 8]), 20)
      >>> a, b, c = jsm.calibration.fit_beta_scaling(p, came_true)
      >>> jnp.set_printoptions(precision=2, suppress=True)
      >>> print(jsm.calibration.beta_scaling(jnp.array([0.2, 0.5, 0.9]), a, b, c))
      [0.2  0.4  0.75]

    References:
      Kull, Silva Filho & Flach, 2017: Beta calibration: a well-founded and easily implemented
      improvement on logistic calibration for binary classifiers.
    """
    predictions = as_predictions(probs, labels, where, weights)
    pull = strength("penalty", None, penalty, predictions.probs)
    return predictions.of_each_class(lambda events: _fit_beta(lax.stop_gradient(events), pull))


def _fit_beta(events: Events, pull: Array) -> tuple[Array, Array, Array]:
    both = jnp.stack(_logs(events.value))
    total = jnp.sum(events.weights)
    shares = events.weights / jnp.where(total == 0, 1, total)
    # Logs in units of their size, and roots of what may not be negative. Where a penalty is steep,
    # the variables are longer: along none of them may all be far steeper than along others.
    size = jnp.sqrt(jnp.sum(shares[None] * both**2, 1))
    steep = 8 * pull / 3  # 4 times the second derivative of the penalty
    unit = jnp.where(size + steep > 0, size + steep, 1)
    of_shift = jax.lax.rsqrt(1 + steep)

    def parameters(params: tuple[Array, Array]) -> tuple[Array, Array]:
        roots, shift = params
        return jnp.minimum(roots**2 / unit, _LIMIT), jnp.clip(of_shift * shift, -_LIMIT, _LIMIT)

    def objective(params: tuple[Array, Array]) -> Array:
        slopes, shift = parameters(params)
        z = slopes @ both + shift
        distance = (jnp.sum((slopes - 1) ** 2) + shift**2) / 3
        return jnp.sum(shares * (jax.nn.softplus(z) - events.outcome * z)) + pull * distance

    start = jnp.sqrt(unit), jnp.zeros_like(total)
    params, value = minimize(objective, start, precise(both.dtype), memory=10)
    slopes, shift = parameters(params)
    known = ~jnp.isnan(value)
    return nan_unless(known, slopes[0]), nan_unless(known, slopes[1]), nan_unless(known, shift)


def _logs(p: Array) -> tuple[Array, Array]:
    """`log p` and `-log(1 - p)`, finite."""
    limits = jnp.finfo(p.dtype)
    return jnp.log(jnp.maximum(p, limits.tiny)), -jnp.log1p(-jnp.minimum(p, 1 - limits.eps))


@_mends
def beta_scaling(
    probs: Real[ArrayLike, "*rows classes"],
    a: Real[ArrayLike, " classes"],
    b: Real[ArrayLike, " classes"],
    c: Real[ArrayLike, " classes"],
) -> Float[Array, "*rows classes"]:
    r"""Applies what `fit_beta_scaling` has fitted.

    .. math:: \hat p_k = \sigma\big(a_k \log p_k - b_k \log(1 - p_k) + c_k\big),
              \quad q_k = \hat p_k \Big/ \sum_j \hat p_j

    A single column, or (n,) with the parameters of one column, is not divided.

    Args:
      probs: probabilities.
      a: what multiplies `log p`.
      b: what multiplies `-log(1 - p)`.
      c: what is added.

    Returns:
      Probabilities of the shape and dtype of `probs`.

    Raises:
      TypeError: if an argument is not real.
      ValueError: if there are not as many parameters as columns. Outside of `jit`, also if a number
        in `probs` is no probability (up to rounding). While tracing, its row is then NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> a, b, c = jnp.array([[1.0], [1.0], [0.0]])  # the identity
      >>> print(jsm.calibration.beta_scaling(jnp.array([0.25, 0.5]), a, b, c))
      [0.25 0.5 ]

    References:
      Kull, Silva Filho & Flach, 2017: Beta calibration.
    """
    parameters = tuple(as_scores(x, name) for name, x in (("a", a), ("b", b), ("c", c)))

    def of_class(p: Array, a: Array, b: Array, c: Array) -> Array:
        rises, falls = _logs(p)
        return jax.nn.sigmoid(a * rises + b * falls + c)

    return _class_by_class(of_class, probs, dict(zip("abc", parameters, strict=True)))


@measure()
def fit_isotonic(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
) -> tuple[Float[Array, "classes points"], Float[Array, "classes points"]]:
    r"""The increasing function of each class's probability that is nearest to the labels.

    .. math:: \arg\min_{f_1 \le f_2 \le \dots} \sum_i w_i (f_i - y_i)^2

    over the examples in the order of their probabilities, equal ones sharing a value; with 1 or 0
    in `y`. It assumes nothing but the order. So it needs more examples than fits with few
    parameters: a thousand or more.

    It is found by pooling neighbors that are in the wrong order: all such pairs at once,
    repeatedly, until there are none. The result has no derivatives.

    Args:
      probs: predicted probabilities of held-out examples. A single column, or (n,) with labels
        (n,), means one event per row: class 1 of two, for instance.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.

    Returns:
      `(points, values)`, a row for each column, for `isotonic(probs, points, values)`: the
      probabilities of the examples in ascending order, with what comes true of them. There are two
      more points than rows; points repeat. The identity if no row counts, and NaN if a row that
      counts contains NaN.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit. Outside of `jit`, also if a row that counts has numbers that
        are not probabilities (up to rounding), a label that is not a class, or a negative weight.
        While tracing, the result is then NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> p = jnp.array([0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
      >>> points, values = jsm.calibration.fit_isotonic(p, jnp.array([0, 1, 0, 1, 0, 1]))
      >>> print(jsm.calibration.isotonic(p, points, values))
      [0.  0.5 0.5 0.5 0.5 1. ]

    References:
      Zadrozny & Elkan, 2002: Transforming classifier scores into accurate multiclass probability
      estimates; Barlow et al., 1972: Statistical inference under order restrictions.
    """
    predictions = as_predictions(probs, labels, where, weights)
    return predictions.of_each_class(lambda events: _fit_isotonic(lax.stop_gradient(events)))


def _fit_isotonic(events: Events) -> tuple[Array, Array]:
    # Two more that do not count, for a line is drawn between two.
    x, y, w = (jnp.pad(x, (0, 2)) for x in (events.value, events.outcome, events.weights))
    # What does not count is put beside the largest that does.
    x = jnp.where(w == 0, jnp.max(jnp.where(w == 0, 0, x)), x)
    x, y, w = lax.sort((x, y, w), num_keys=1)
    starts = jnp.concatenate([jnp.zeros(1, bool), x[1:] != x[:-1]])
    rises = _pool(w * y, w, jnp.cumsum(starts, dtype=jnp.int32))
    total = jnp.sum(w)
    line = jnp.linspace(0, 1, x.size, dtype=x.dtype)
    return jnp.where(total == 0, line, x), jnp.where(total == 0, line, rises)


def _pool(sums: Array, weights: Array, block: Array) -> Array:
    """The mean of the block that each example ends in, given that of the start.

    Of two neighboring blocks that do not rise both are in one block of the solution, and so are all
    of a run of such.
    """
    n = block.size

    def merged(parts: Array, block: Array) -> Array:
        return jax.vmap(lambda x: jax.ops.segment_sum(x, block, n, indices_are_sorted=True))(parts)

    def means(parts: Array) -> Array:
        sums, weights = parts
        # Blocks that are no more are above all.
        return jnp.where(weights == 0, jnp.inf, sums / jnp.where(weights == 0, 1, weights))

    def step(carry: tuple) -> tuple:
        parts, block, _ = carry
        mean = means(parts)
        rises = jnp.concatenate([jnp.zeros(1, bool), mean[1:] > mean[:-1]])
        into = jnp.cumsum(rises, dtype=jnp.int32)
        return merged(parts, into), into[block], jnp.any(into[block] != block)

    start = merged(jnp.stack([sums, weights]), block), block, jnp.ones((), bool)
    parts, block, _ = lax.while_loop(lambda carry: carry[-1], step, start)
    return means(parts)[block]


@_mends
def isotonic(
    probs: Real[ArrayLike, "*rows classes"],
    points: Real[ArrayLike, "classes points"],
    values: Real[ArrayLike, "classes points"],
) -> Float[Array, "*rows classes"]:
    r"""Applies what `fit_isotonic` has fitted.

    .. math:: q_k = f_k(p_k) \Big/ \sum_j f_j(p_j)

    with `f` linear between its points and constant beyond them. A row that would be all 0 gets
    equal probabilities. A single column, or (n,) with one function, is not divided.

    Args:
      probs: probabilities.
      points: the points at which the function of each class is known, in ascending order.
      values: the values of the function at these points.

    Returns:
      Probabilities of the shape and dtype of `probs`.

    Raises:
      TypeError: if an argument is not real.
      ValueError: if there are not as many functions as columns. Outside of `jit`, also if a number
        in `probs` is no probability (up to rounding). While tracing, its row is then NaN.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> points, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 1.0]])
      >>> print(jsm.calibration.isotonic(jnp.array([0.0, 0.5]), points, values))
      [0.5  0.75]

    References:
      Zadrozny & Elkan, 2002: Transforming classifier scores into accurate multiclass probability
      estimates.
    """
    parameters = {"points": as_scores(points, "points"), "values": as_scores(values, "values")}
    return _class_by_class(jnp.interp, probs, parameters)


def _class_by_class(
    fun: Callable[..., Array], probs: ArrayLike, parameters: dict[str, Array]
) -> Array:
    """`fun(probs, *parameters)` of each column, made to sum to 1 if there are several."""
    p = as_scores(probs, "probs")
    counts = {name: x.shape[0] if x.ndim else 0 for name, x in parameters.items()}
    column = p.ndim == 1 and set(counts.values()) == {1}
    flat = joinable(p, max(p.ndim - 1, 0))
    columns = flat.reshape(-1, 1) if column else flat.reshape(-1, p.shape[-1] if p.ndim else 0)
    for name, count in counts.items():
        if count != columns.shape[1]:
            raise ValueError(
                f"{name} must be of {columns.shape[1]} classes, as probs of shape {p.shape}, got "
                f"shape {parameters[name].shape}."
            )
    known = are_probs(columns)[:, None]
    values = (gathered(x.astype(p.dtype)) for x in parameters.values())
    mended = jax.vmap(fun)(gathered(within_bounds(columns)).T, *values).T
    if columns.shape[1] > 1:
        total = jnp.sum(mended, 1, keepdims=True)
        mended = jnp.where(total == 0, 1, mended) / jnp.where(total == 0, columns.shape[1], total)
    mended = nan_unless(known, mended).reshape(p.shape)
    return share_like(mended, p).astype(output_dtype(probs))
