"""Weights and slopes of a form, given the numbers that are kept of each row.

Those are an origin of the scores and, where a threshold is searched for, what entries take of it;
also a factor, if the sum of the weights is not 1 at the threshold. Where none is searched for, it
is what entries of +inf have: their origin is too large to hold it. All are row values.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._form import Form
from jaxsoftmax._threshold import Solved

# The score of what takes no part: exp of it is 0, and so is any difference with it.
LEAST = float(jnp.finfo(jnp.float32).min)


def has_kernel(form: Form) -> bool:
    """Whether sums, which a kernel adds up tile by tile, are all that its threshold takes."""
    return form.only_scales or not (form.tau is not None or isinstance(form, Solved))


def sums_to_one(form: Form) -> bool:
    """Whether weights are probabilities at the threshold, which they are unless it is rescaled."""
    return type(form).weigh is Form.weigh


def squares_errors(form: Form, params: Sequence[Array], like: Array) -> Array:
    """In which rows a step of Newton's method squares what a sum is off; elsewhere it may not.

    It does where slopes have no jump at the edge of the support, and weights are probabilities.
    """
    if not sums_to_one(form):
        return jnp.zeros_like(like, bool)
    return form.slopes(jnp.full_like(like, 1e-12), *params) < 1e-3


def row_values(form: Form) -> int:
    """How many numbers are kept of a row."""
    return 2 if form.only_scales or sums_to_one(form) else 3


def gaps(form: Form, scores: Array, kept: Sequence[Array]) -> Array:
    """Scores less the origin of their row; those of +inf have the same finite one."""
    origin, of_infinite, *_ = kept
    return jnp.minimum(scores - origin, of_infinite if form.only_scales else 0)


def with_slope(form: Form, kept: Sequence[Array], params: Sequence[Array]) -> tuple[Array, ...]:
    """What is kept and, where weights have a factor, the one of their slopes."""
    if form.only_scales or sums_to_one(form):
        return tuple(kept)
    _, tau, by = kept
    # Terms may have slopes in other units; the factor is the same for all entries.
    largest, of_largest, *_ = form.terms(jnp.zeros_like(tau), tau, *params)
    ratio = form.slopes(largest * by, *params) / jnp.where(of_largest == 0, 1, of_largest)
    return *kept, ratio


def shares(
    form: Form, gap: Array, kept: Sequence[Array], params: Sequence[Array]
) -> tuple[Array, Array]:
    """The probabilities and their slopes, given `gaps` and `with_slope`."""
    if form.only_scales:
        p = form.weight(gap)
        return p, p
    _, tau, *factors = kept
    weight, slope, *_ = form.terms(gap, tau, *params)
    if not factors:
        return weight, slope
    by, of_slope = factors
    return weight * by, slope * of_slope


def terms_of_numbers(
    form: Form, names: Sequence[str], made: Sequence[Array], params: Sequence[Array]
) -> list[Array]:
    """What a cotangent of each probability is multiplied by, for what numbers get, by name.

    Args:
      form: the mapping.
      names: of the numbers, and "slopes".
      made: gaps, probabilities and slopes.
      params: the parameters.
    """
    gap, share, slope = made
    terms = {"slopes": slope, "temperature": slope * jnp.maximum(gap, LEAST)}
    if any("param" in name for name in names):
        partials = form.moved_by_params(share, *params)
        terms |= {f"param {i}": partial for i, partial in enumerate(partials)}
    return [terms[name] for name in names]
