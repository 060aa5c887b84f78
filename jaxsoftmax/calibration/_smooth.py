"""The calibration error without bins: residuals smoothed by a kernel as wide as the error is."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Real

from jaxsoftmax._elementary import nan_unless
from jaxsoftmax.calibration._predictions import as_predictions, measure

# The steps of the grid on [0, 1], far finer than the errors of any sample.
_STEPS = 2**12
# Halvings of the interval of bandwidths.
_HALVINGS = 26


@measure()
def smooth_calibration_error(
    probs: Real[ArrayLike, "*rows classes"],
    labels: Integer[ArrayLike, "*rows"],
    where: Bool[ArrayLike, "*rows"] | None = None,
    *,
    weights: Real[ArrayLike, "*rows"] | None = None,
) -> Float[Array, ""]:
    r"""The distance between confidence and accuracy, smoothed instead of binned.

    .. math:: \sigma = \int_0^1 \Big| \frac1n \sum_i (y_i - c_i) K_\sigma(c_i, t) \Big| \, dt

    with the confidence `c` of each prediction, 1 or 0 in `y` for right and wrong, and the Gaussian
    kernel `K` of width :math:`\sigma`, reflected at 0 and 1. The right side decreases with the
    width, so there is one width that equals its error: this is the result. You do not have to
    choose a number of bins, and small changes of the probabilities change the result only a little.

    Args:
      probs: predicted probabilities; the largest of a row is its confidence. A single column, or
        (n,) with labels (n,), means one event per row: class 1 of two, or that a prediction is
        right.
      labels: integer classes; for events, 1 or True if the event happened.
      where: which rows count, for instance to leave out padding. Default: all.
      weights: how much each row counts. Default: 1.

    Returns:
      A scalar between 0 and 1. NaN if a row that counts contains NaN, or if no row counts.

    Raises:
      TypeError: if `probs` is not real or `labels` are not integers.
      ValueError: if shapes do not fit. Outside of `jit`, also if a row that counts has numbers that
        are not probabilities (up to rounding), a label that is not a class, or a negative weight.
        While tracing, the result is then NaN.
      NotImplementedError: if it is differentiated twice. An error is the right answer: second
        derivatives are also those of where the residuals change their sign, which is between the
        points of the grid that they are summed on. Of these places the sum knows nothing, and its
        second derivatives would be other numbers. The first ones do not depend on them.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jnp.tile(jnp.array([0.9, 0.1]), (100, 1))
      >>> labels = (jnp.arange(100) >= 70).astype(int)  # right in 70 of 100
      >>> print(f"{jsm.calibration.smooth_calibration_error(probs, labels):.3f}")
      0.200

    References:
      Blasiok & Nakkiran, 2023: Smooth ECE (arXiv:2309.12236).
    """
    events = as_predictions(probs, labels, where, weights).confidences()
    total = jnp.sum(events.weights)
    masses = events.weights / total * (events.outcome - events.value)
    return nan_unless(total != 0, _error(events.value, masses))


@jax.custom_jvp
def _error(positions: Array, masses: Array) -> Array:
    """The error of residuals, `masses` in sum, at some `positions`."""
    return _error_on_grid(positions, masses)


@_error.defjvp
def _error_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.jvp(_error_on_grid, tuple(map(_not_again, primals)), tangents)


@jax.custom_jvp
def _not_again(x: Array) -> Array:
    """`x`, that what is made of it be differentiated no more; see `smooth_calibration_error`."""
    return x


@_not_again.defjvp
def _not_again_jvp(primals: Any, tangents: Any) -> NoReturn:
    del primals, tangents
    raise NotImplementedError(
        "smooth_calibration_error must be differentiated once, got a derivative of its derivative."
    )


def _error_on_grid(positions: Array, masses: Array) -> Array:
    spectrum = jnp.fft.rfft(_reflected(positions, masses))
    squares = (jnp.pi * jnp.arange(_STEPS + 1, dtype=positions.dtype)) ** 2

    def error(width: Array) -> Array:
        damping = jnp.exp(-squares * width**2 / 2).astype(spectrum.dtype)
        smoothed = jnp.fft.irfft(spectrum * damping, 2 * _STEPS)
        height = jnp.abs(smoothed[: _STEPS + 1])
        # The trapezoidal rule; a mass on the grid is a density times the step.
        return jnp.sum(height) - (height[0] + height[-1]) / 2

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        wider = error(middle) > middle
        return jnp.where(wider, middle, low), jnp.where(wider, high, middle)

    zero = jnp.zeros((), positions.dtype)
    low, _ = lax.stop_gradient(lax.fori_loop(0, _HALVINGS, halve, (zero, zero + 1)))
    # One step of Newton's method has the derivative that the implicit function theorem gives.
    value, slope = jax.jvp(error, (low,), (zero + 1,))
    return low + (value - low) / (1 - lax.stop_gradient(slope))


def _reflected(positions: Array, masses: Array) -> Array:
    """Masses on a grid of step `1 / _STEPS`, and their mirror images: one period of length 2."""
    scaled = jnp.clip(positions, 0, 1) * _STEPS
    left = jnp.clip(jnp.floor(scaled), 0, _STEPS - 1)
    share = scaled - left
    where = jnp.where(jnp.isnan(left), 0, left).astype(jnp.int32)
    sides = jnp.concatenate([masses * (1 - share), masses * share])
    grid = jax.ops.segment_sum(sides, jnp.concatenate([where, where + 1]), _STEPS + 1)
    inside = grid[1:-1]
    # At either end a mass is its own image.
    return jnp.concatenate([2 * grid[:1], inside, 2 * grid[-1:], inside[::-1]])
