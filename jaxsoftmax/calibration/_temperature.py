"""Temperature scaling: one number that divides all logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax.calibration._examples import Examples, Loss, as_examples, fit, mean_loss, spread
from jaxsoftmax.calibration._minimize import minimize, precise
from jaxsoftmax.losses import cross_entropy

# How far the fitted temperature may be from the spread of the logits, either way.
_MAX_RATIO = 1000.0


@fit
def fit_temperature(
    logits: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"] | Float[ArrayLike, "*rows classes"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
    class_weights: Real[ArrayLike, " classes"] | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
) -> Float[Array, ""]:
    r"""The temperature that makes held-out labels most likely.

    .. math:: \arg\min_t \sum_n w_{y_n} L(z_n / t, y_n) \Big/ \sum_n w_{y_n}

    It is found by L-BFGS with a line search, on the logarithm of the temperature. The search is
    limited to 1/1000 to 1000 times the spread of the logits (the root mean square of their distance
    from the mean of their row). So the result stays finite where there is no optimum: if every
    example is classified correctly, it decreases until the loss has no slope beyond rounding, and
    if the logits mislead, it increases. If there is nothing to fit, as with constant logits or no
    rows, it is 1.

    The result has no derivatives. Under `vmap` there is one temperature per head or group.

    Args:
      logits: scores of held-out examples, as they go into the mapping. A single column, or (n,)
        with labels (n,), means class 1 of two, for `sigmoid(logits / t)`.
      labels: the integer classes of these examples, or distributions over the classes.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.
      class_weights: multiplies the weight of the rows of each class. Default: 1. If a label is a
        distribution, its row uses the mean under that distribution.
      loss: a function of `(logits, labels)` that returns one value per row. Use the loss of your
        mapping.

    Returns:
      The temperature `t`, a scalar, for `softmax(logits / t)`. NaN if the loss of a row that counts
      is NaN. Rows of infinite loss, whose class the logits rule out, are ignored.

    Raises:
      TypeError: if `logits` is not real, `where` not boolean, or `labels` not numbers.
      ValueError: if shapes do not fit, or `loss` does not return one value per row. Outside of
        `jit`, also if a class is out of range or a weight is negative. While tracing, the result is
        then NaN.

    Example:
      Of these predictions, made with probability 0.98, a quarter is wrong:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> logits = jnp.tile(jnp.array([4.0, 0.0]), (4, 1))
      >>> t = jsm.calibration.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
      >>> print(jsm.softmax(logits[0], temperature=t))
      [0.75 0.25]

    References:
      Guo, Pleiss, Sun & Weinberger, 2017: On calibration of modern neural networks
      (arXiv:1706.04599).
    """
    examples = as_examples(logits, labels, where, weights, class_weights)
    return best_temperature(examples, loss, spread(examples))


def best_temperature(examples: Examples, loss: Loss, scale: Array) -> Array:
    """The temperature of `fit_temperature`, given the spread of the logits."""
    constant = scale == 0
    scale = jnp.where(constant, 1, scale)
    tempered_loss = functools.partial(_tempered_loss, examples.loss(loss), scale)

    def mean_loss_within(examples: Examples) -> Callable[[Array], Array]:
        mean = mean_loss(examples, tempered_loss)
        # Beyond the range the loss is flat, and a search that ended up there would stay.
        return lambda log_ratio: mean(log_ratio) + (log_ratio - _within(log_ratio)) ** 2

    start, curvature = jnp.zeros((), examples.dtype), jnp.ones((), examples.dtype)
    # A part of many rows gives away nearly all, and leaves few steps to be made on the whole.
    stride = len(examples.weights) // _FEW_ROWS
    if stride > 1:
        few = mean_loss_within(examples.every(stride))
        best, _ = minimize(few, start, _ROUGH, memory=1)
        # Unless the part is separable, or misleads otherwise.
        inside = jnp.abs(best) < _INSIDE
        start = jnp.where(inside, best, start)
        curvature = jnp.where(inside, _curvature(few, start), curvature)
    whole = mean_loss_within(examples)
    unit = 1 / jnp.sqrt(curvature)
    steps, value = minimize(
        lambda steps: whole(start + steps * unit),
        jnp.zeros_like(start),
        precise(examples.dtype),
        memory=1,
    )
    best = jnp.where(constant, 1, scale * _ratio(start + steps * unit))
    best = jnp.minimum(best, jnp.finfo(best.dtype).max)
    return nan_unless(~jnp.isnan(value), best)


def _tempered_loss(loss: Loss, scale: Array, log_ratio: Array, block: Examples) -> Array:
    finite = jnp.isfinite(block.logits)
    # Infinite logits stay what they are, and out of the derivative.
    tempered = jnp.where(finite, block.logits, 0) / scale / _ratio(log_ratio)
    return loss(jnp.where(finite, tempered, block.logits), block.labels)


def _ratio(log_ratio: Array) -> Array:
    return jnp.exp(_within(log_ratio))


def _within(log_ratio: Array) -> Array:
    return jnp.clip(log_ratio, -math.log(_MAX_RATIO), math.log(_MAX_RATIO))


def _curvature(objective: Callable[[Any], Array], at: Array) -> Array:
    """The second derivative, by differences: it need not be exact, nor the loss twice smooth."""
    width = jnp.asarray(0.02, at.dtype)
    ends = jax.vmap(jax.grad(objective))(at + jnp.stack([-width, width]))
    # Not so small that a first step in units of it, from inside, might leave the range.
    return jnp.maximum((ends[1] - ends[0]) / (2 * width), 0.2)


# Of so many rows the best temperature is right to about a percent.
_FEW_ROWS = 2000
_ROUGH = 1e-3
_INSIDE = 4.0
