"""The largest entry of a row, and the others relative to it."""

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
