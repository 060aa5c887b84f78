"""The largest entry of a row, and the others relative to it."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax._platforms import chosen
from jaxsoftmax._reductions import Entries, Rows


def top_of(rows: Rows, scores: Entries) -> Array:
    """The maximum of each row, finite in a row in which nothing takes part."""
    # JAX has no derivative of a maximum over devices. Only differences of scores matter: it would
    # change nothing but losses whose targets do not sum to 1.
    scores = lax.stop_gradient(scores) if rows.names else scores

    def largest(scores: Entries) -> Array:
        return rows.max(scores, float(jnp.finfo(scores[0].dtype).min))

    if rows.stored is None or rows.names:
        return largest(scores)
    return chosen("largest", largest, scores, stored=rows.stored)


def gap(score: Array, top: Array) -> Array:
    """The score less the maximum: exactly 0 there, be it infinite, and -inf at -inf."""
    # A finite maximum is 0 by subtraction, which keeps its derivative.
    return jnp.where(score == jnp.inf, 0, score - top)


def pivot(rows: Rows, scores: Entries, top: Array) -> Array:
    """What to subtract from scores before `exp`, such that the differences are exact.

    A rounding error in `score - top` is an error of the same size in the logarithm of the
    probability: 64 ulp where the difference is 80. Here it is a whole number, so near to the
    maximum that no sum overflows and so far from it that next to no score that matters falls
    below it. The difference of a score above it is exact.
    """
    finfo = jnp.finfo(top.dtype)
    # The sum of the exponentials and its reciprocal are to be normal numbers.
    room = math.floor(-math.log(float(finfo.tiny)) - 2 - math.log(max(rows.length(scores), 1)))
    # Where whole numbers get sparse, a maximum less the room would be rounded to far below that.
    room = jnp.floor(jnp.minimum(_LARGE * room / jnp.maximum(top, 1), room))
    below = jnp.floor(top) - room
    return jnp.maximum(jnp.maximum(below, jnp.minimum(jnp.floor(top), 0)), finfo.min)


_LARGE = 2.0**20


def below_top(rows: Rows, scores: Entries) -> tuple[Entries, Array]:
    """The scores less their row's maximum, and that maximum."""
    top = top_of(rows, scores)
    return rows.map(gap, [scores], [top]), top


def relative_to_dominating(rows: Rows, p: Entries, x: Entries) -> Entries:
    """`x` less that of the entry that dominates its row, if there is one: its own is exactly 0.

    To the softmax it is the same. But where `p` is nearly 1, `x - sum(p x)` would cancel, and with
    it the sum over the other entries, which is all that is left.
    """
    of_dominating = rows.sum(rows.map(jnp.multiply, [dominating(rows, p), x]))
    return rows.map(jnp.subtract, [x], [of_dominating])


def dominating(rows: Rows, p: Entries) -> Entries:
    """1 where a probability is above 1/2, 0 elsewhere."""
    p = lax.stop_gradient(p)
    return chosen("dominating", lambda p: rows.map(jnp.round, [p]), p, rows=rows)
