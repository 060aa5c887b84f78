"""What is done with a function `f(point, *rest)`, where `point` is one array or a tuple of them.

What comes back takes `(point, direction, *rest)`, so that all can be measured on the same
arguments.
"""

from collections.abc import Callable
from typing import Any

import jax

Function = Callable[..., Any]


def forward(f: Function) -> Function:
    """The value."""
    return lambda point, direction, *rest: f(point, *rest)


def value_and_gradient(loss: Function) -> Function:
    """The value and gradient of a function to scalars."""
    return lambda point, direction, *rest: jax.value_and_grad(loss)(point, *rest)


def value_and_pullback(f: Function) -> Function:
    """The value, and the cotangent `direction` pulled back."""

    def both(point, direction, *rest):
        value, pullback = jax.vjp(lambda point: f(point, *rest), point)
        return value, pullback(direction)[0]

    return both


def jvp(f: Function) -> Function:
    """The value and its derivative along a direction."""

    def push(point, direction, *rest):
        return jax.jvp(lambda point: f(point, *rest), (point,), (direction,))

    return push


def hessian_product(loss: Function) -> Function:
    """The Hessian times the direction, forward over reverse."""
    gradient = jax.grad(loss)
    return lambda *args: jvp(gradient)(*args)[1]


def gradient_of_jvp(loss: Function) -> Function:
    """The gradient of the derivative along a direction, reverse over forward."""
    return jax.grad(lambda *args: jvp(loss)(*args)[1])
