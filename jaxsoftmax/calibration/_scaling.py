"""Vector and matrix scaling: affine functions of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._scores import check_real
from jaxsoftmax.calibration._examples import Examples, as_examples, by_class, fit, mean_loss, spread
from jaxsoftmax.calibration._minimize import minimize, precise
from jaxsoftmax.calibration._temperature import best_temperature
from jaxsoftmax.losses import cross_entropy

# No parameter is fitted beyond this, measured in units of the logits' spread.
_LIMIT = 1000.0
_MEMORY = 10

Params = tuple[Array, Array]


@fit
def fit_vector_scaling(
    logits: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"] | Float[ArrayLike, "*rows classes"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    penalty: ArrayLike = 0.0,
    intercept_penalty: ArrayLike | None = None,
    weights: Real[ArrayLike, "*rows"] | None = None,
    class_weights: Real[ArrayLike, " classes"] | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
) -> tuple[Float[Array, " classes"], Float[Array, " classes"]]:
    r"""A scale and a bias per class that make held-out labels most likely.

    .. math:: \arg\min_{a, b} \frac{\sum_n w_{y_n} L(a \odot z_n + b, y_n)}{\sum_n w_{y_n}}
              + \frac{\lambda}{k} \sum_j (t a_j - 1)^2 + \frac{\mu}{k} \sum_j b_j^2

    for `k` classes, with the temperature `t` of `fit_temperature`: a penalty keeps the fit close to
    temperature scaling if there are few examples, or if no example is classified wrongly.

    It is found by L-BFGS with a line search that starts at temperature scaling. Scales are sought
    up to 1000 over the spread of the logits (see `fit_temperature`), biases up to 1000, either way;
    if there is no optimum, as with separable examples and no penalty, the fit ends when the loss no
    longer decreases. The result has no derivatives.

    Args:
      logits: scores of held-out examples, as they go into the mapping. Infinite scores stay as they
        are. A single column, or (n,) with labels (n,), means class 1 of two: this is Platt scaling,
        for `sigmoid(logits * scale + bias)`.
      labels: the integer classes of these examples, or distributions over the classes.
      where: which rows count, for instance to leave out padding. Default: all.
      penalty: the strength `lambda`.
      intercept_penalty: the strength `mu`; default `penalty`.
      weights: how much each row counts. Default: 1.
      class_weights: multiplies the weight of the rows of each class. Default: 1. If a label is a
        distribution, its row uses the mean under that distribution.
      loss: a function of `(logits, labels)` that returns one value per row. Use the loss of your
        mapping.

    Returns:
      `(scale, bias)`, each with one number per class, for `softmax(logits * scale + bias)`. NaN if
      the loss of a row that counts is NaN.

    Raises:
      TypeError: if `logits` or `penalty` is not real, `where` not boolean, or `labels` not numbers.
      ValueError: if shapes do not fit, or `loss` does not return one value per row. Outside of
        `jit`, also if a class is out of range or a weight or penalty is negative. While tracing,
        the result is then NaN.

    Example:
      These logits rank rightly, but favor class 0 by 2:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> logits = jnp.array([[4.0, 0.0]] * 8 + [[0.0, 0.0]] * 8)
      >>> labels = jnp.array([0] * 7 + [1] + [0] + [1] * 7)
      >>> scale, bias = jsm.calibration.fit_vector_scaling(logits, labels)
      >>> print(jsm.softmax(logits * scale + bias)[jnp.array([0, 8])])
      [[0.875 0.125]
       [0.125 0.875]]

    References:
      Guo, Pleiss, Sun & Weinberger, 2017: On calibration of modern neural networks
      (arXiv:1706.04599).
    """
    examples = as_examples(logits, labels, where, weights, class_weights).of_whole_rows()
    loss_of = examples.loss(loss)
    width = spread(examples)
    unit = jnp.where(width == 0, 1, width)
    center, deviation = by_class(examples, unit)

    def scaled_loss(params: Params, block: Examples) -> Array:
        scale, at_center = params
        finite = jnp.isfinite(block.logits)
        centered = jnp.where(finite, block.logits, 0) / unit - center[None]
        scaled = centered * scale[None] + at_center[None]
        return loss_of(jnp.where(finite, scaled, block.logits), block.labels)

    data_term = mean_loss(examples, scaled_loss)
    of_scales = strength("penalty", None, penalty, unit)
    of_biases = strength("intercept_penalty", intercept_penalty, penalty, unit)
    tempered = jnp.full(examples.logits.shape[1:], unit / best_temperature(examples, loss, width))

    # The loss is as steep in the scales as their logits deviate. At a high temperature the penalty
    # is far steeper. In the variables of the search neither is.
    flat = lax.rsqrt(deviation**2 + 2 * of_scales / (tempered.size * tempered**2))

    def sought(variables: Params) -> tuple[Array, Array, Array]:
        (scale,), at_center, bias = _parameters(center[None], flat[None], of_biases, variables)
        return scale, at_center, bias

    def objective(variables: Params) -> Array:
        scale, at_center, bias = sought(variables)
        distance = jnp.mean((scale / tempered - 1) ** 2)
        return data_term((scale, at_center)) + of_scales * distance + of_biases * jnp.mean(bias**2)

    start = (tempered / flat)[None], center * tempered
    variables, value = minimize(objective, start, precise(examples.dtype), memory=_MEMORY)
    scale, _, bias = _nan_like(value, sought(variables))
    return scale / unit, bias


@fit
def fit_matrix_scaling(
    logits: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"] | Float[ArrayLike, "*rows classes"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    penalty: ArrayLike = 1.0,
    off_diagonal_penalty: ArrayLike | None = None,
    intercept_penalty: ArrayLike | None = None,
    weights: Real[ArrayLike, "*rows"] | None = None,
    class_weights: Real[ArrayLike, " classes"] | None = None,
    loss: Callable[[Array, Array], Array] = cross_entropy,
) -> tuple[Float[Array, "classes classes"], Float[Array, " classes"]]:
    r"""A matrix and a bias that make held-out labels most likely, kept close to vector scaling.

    .. math:: \arg\min_{W, b} \frac{\sum_n w_{y_n} L(z_n W + b, y_n)}{\sum_n w_{y_n}}
              + \frac{\lambda}{k (k - 1)} \sum_{i \ne j} W_{ij}^2 + \frac{\mu}{k} \sum_j b_j^2

    for `k` classes: the regularization called ODIR, without which so many parameters overfit. Both
    strengths are best chosen by cross-validation.

    It is found by L-BFGS with a line search that starts at `1 / fit_temperature` times the
    identity. Weights are sought up to 1000 over the spread of the logits (see `fit_temperature`),
    biases up to 1000, either way. If each row has an offset of its own that is far above the spread
    within rows, subtract it first: by the search for it the fit would end early. The result has no
    derivatives.

    Args:
      logits: finite scores of held-out examples, as they go into the mapping. A single column, or
        (n,) with labels (n,), means class 1 of two: the fit has one scale and one bias.
      labels: the integer classes of these examples, or distributions over the classes.
      where: which rows count, for instance to leave out padding. Default: all.
      penalty: the strength of both penalties, unless you pass these.
      off_diagonal_penalty: the strength `lambda`.
      intercept_penalty: the strength `mu`.
      weights: how much each row counts. Default: 1.
      class_weights: multiplies the weight of the rows of each class. Default: 1. If a label is a
        distribution, its row uses the mean under that distribution.
      loss: a function of `(logits, labels)` that returns one value per row. Use the loss of your
        mapping.

    Returns:
      `(weight, bias)` of shapes (classes, classes) and (classes,), for `softmax(logits @ weight +
      bias)`. NaN if the loss of a row that counts is NaN, or if one of its logits is infinite.

    Raises:
      TypeError: if `logits` or a penalty is not real, `where` not boolean, or `labels` not
        numbers.
      ValueError: if shapes do not fit, or `loss` does not return one value per row. Outside of
        `jit`, also if a class is out of range or a weight or penalty is negative. While tracing,
        the result is then NaN.

    Example:
      What is scored as class 2 is often class 1:

      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=2, suppress=True)
      >>> logits = 4 * jnp.eye(3)[jnp.array([0, 0, 0, 1, 1, 1, 2, 2, 2])]
      >>> labels = jnp.array([0, 0, 0, 1, 1, 1, 2, 1, 1])
      >>> weight, bias = jsm.calibration.fit_matrix_scaling(
      ...     logits, labels, off_diagonal_penalty=1e-3, intercept_penalty=1e-3
      ... )
      >>> print(jsm.softmax(logits @ weight + bias)[-1])
      [0.   0.67 0.33]

    References:
      Kull, Perello-Nieto, Kangsepp, Silva Filho, Song & Flach, 2019: Beyond temperature scaling
      (arXiv:1910.12656).
    """
    examples = as_examples(logits, labels, where, weights, class_weights).of_whole_rows()
    loss_of = examples.loss(loss)
    width, classes = spread(examples), examples.logits.shape[1]
    unit = jnp.where(width == 0, 1, width)  # what the parameters that multiply are measured in
    identity = jnp.eye(classes, dtype=examples.dtype)
    across = strength("off_diagonal_penalty", off_diagonal_penalty, penalty, unit)
    along = strength("intercept_penalty", intercept_penalty, penalty, unit)

    center, deviation = by_class(examples, unit)

    def scaled_loss(params: Params, block: Examples) -> Array:
        weight, at_center = params
        centered = block.logits / unit - center[None]
        turned = jnp.matmul(centered, weight, precision=lax.Precision.HIGHEST)
        return loss_of(turned + at_center[None], block.labels)

    data_term = mean_loss(examples, scaled_loss)

    # As in vector scaling, with a penalty of what is off the diagonal.
    count = max(classes * (classes - 1), 1)
    flat = lax.rsqrt(deviation[:, None] ** 2 + 2 * across * (1 - identity) / (count * unit**2))

    def sought(variables: Params) -> tuple[Array, Array, Array]:
        return _parameters(center[:, None], flat, along, variables)

    def objective(variables: Params) -> Array:
        weight, at_center, bias = sought(variables)
        mixing = jnp.sum((weight / unit * (1 - identity)) ** 2) / count
        return data_term((weight, at_center)) + across * mixing + along * jnp.mean(bias**2)

    tempered = identity * (unit / best_temperature(examples, loss, width))
    start = tempered / flat, jnp.sum(center[:, None] * tempered, 0)
    variables, value = minimize(objective, start, precise(examples.dtype), memory=_MEMORY)
    weight, _, bias = _nan_like(value, sought(variables))
    return weight / unit, bias


def strength(name: str, value: ArrayLike | None, of_all: ArrayLike, like: Array) -> Array:
    """The strength of a penalty; NaN if it is negative, and so is all that comes of it."""
    name, value = ("penalty", of_all) if value is None else (name, value)
    value = jnp.asarray(value)
    check_real(name, value)
    if value.shape:
        raise ValueError(f"{name} must be a number, got shape {value.shape}.")
    value = value.astype(like.dtype)
    return nan_unless(value >= 0, value)


def _parameters(
    center: Array, flat: Array, strength: Array, variables: Params
) -> tuple[Array, Array, Array]:
    """Multiplier, what it and the bias make of the mean logits, and bias, within bounds.

    A search for the second soon ends, be the mean large: no change of the multiplier moves it. But
    then a penalty of the bias is steep: along that direction the variables are longer.

    Args:
      center: the mean logits, as they multiply the multiplier to be summed over its first axis.
      flat: the units of the multiplier in which neither loss nor penalty is steep.
      strength: that of the penalty of the bias.
      variables: of the search; at a bias of 0 the first two of the results, in these units.
    """
    multiplier, at_center = variables
    steep = center * flat
    length = 1 + jnp.sum(steep**2, 0)
    bias = at_center - jnp.sum(steep * multiplier, 0)
    shorter = bias * lax.rsqrt(1 + 2 * strength / bias.size * length)
    moved = (bias - shorter) / length
    multiplier, at_center = flat * (multiplier + steep * moved[None]), at_center - moved

    bounded = jnp.clip(multiplier, -_LIMIT, _LIMIT)
    moved = jnp.sum(center * (bounded - multiplier), 0)
    within = jnp.clip(shorter - moved, -_LIMIT, _LIMIT)
    return bounded, at_center + moved + (within - shorter), within


def _nan_like(value: Array, params: Any) -> Any:
    return jax.tree.map(lambda x: nan_unless(~jnp.isnan(value), x), params)
