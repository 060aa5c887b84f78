"""The divergence of two softmaxes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax._public import public
from jaxsoftmax._reductions import indicator
from jaxsoftmax._scores import Axis, Options, as_scores
from jaxsoftmax.losses._targets import one_per_row, prepare_scores
from jaxsoftmax.mappings import _log_softmax


@public
def kl_divergence(
    scores: Real[ArrayLike, "*shape"],
    target_scores: Real[ArrayLike, "*shape"],
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*rows"]:
    r"""The Kullback-Leibler divergence between two softmaxes, which are given by their scores.

    .. math:: L(x, z) = \sum_i q_i (\log q_i - \log p_i), \quad p = \mathrm{softmax}(x / t),
              \quad q = \mathrm{softmax}(z / t)

    In distillation, `p` is the student and `q` is the teacher. The gradient in `x/t` is `p - q`.
    The teacher's scores get a gradient, too: use `jax.lax.stop_gradient` if you do not want it. The
    loss is accurate even if `p` and `q` are nearly equal, where the terms of the formula would
    cancel. Each term is computed as `q (d + exp(-d) - 1)` with `d = log q - log p`; these have the
    same sum.

    Args:
      scores: the scores of `p`, of any shape and real dtype.
      target_scores: the scores of `q`, of the shape of `scores`. Log-probabilities are scores.
      axis: the axes of a distribution: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which classes take part; a boolean mask that broadcasts to `scores`.
      temperature: divides both kinds of scores; a number or one value per row, not negative. In
        distillation, the loss is often multiplied by the square of the temperature. Here it is not.

    Returns:
      One value per row, in the dtype of `scores`, or float32 for half precision. It is never
      negative. It is inf if, for some class, `p` is 0 and `q` is not, and 0 if no class has a `q`.

    Raises:
      TypeError: if `scores` or `target_scores` are not real.
      ValueError: if shapes do not fit, or `temperature` is a negative number.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]])
      >>> print(f"{jsm.kl_divergence(student, teacher)[0]:.4f}")
      0.1698
      >>> print(f"{jsm.kl_divergence(teacher + 1e-3, teacher)[0]:.4f}")
      0.0000

    References:
      Kullback & Leibler, 1951: On information and sufficiency; Hinton, Vinyals & Dean, 2015
      (arXiv:1503.02531).
    """
    if jnp.shape(target_scores) != jnp.shape(scores):
        raise ValueError(
            f"target_scores must have the shape of scores, {jnp.shape(scores)}, got shape "
            f"{jnp.shape(target_scores)}."
        )
    options = Options(where, temperature)
    rows, x = prepare_scores(scores, axis, options)
    targets = as_scores(target_scores, "target_scores").astype(x[0].dtype)
    _, z = prepare_scores(targets, axis, options)
    log_p, log_q = (_log_softmax.log_probabilities(rows, s) for s in (x, z))
    divergence = rows.sum(rows.map(_term, [log_p, log_q]))
    # No target, no divergence. Elsewhere `p - q` sums to 0.
    of_target = rows.sum(rows.map(lambda lq: indicator(lq != -jnp.inf, lq.dtype), [log_q]))
    return one_per_row(rows, jnp.where(of_target == 0, 0, divergence), None, scores)


def _term(log_p: Array, log_q: Array) -> Array:
    """`q log(q / p) + p - q`, which is never negative."""
    has_p, has_q = log_p != -jnp.inf, log_q != -jnp.inf
    p, q = (jnp.exp(jnp.where(has, x, -jnp.inf)) for has, x in ((has_p, log_p), (has_q, log_q)))
    both = has_p & has_q
    d = jnp.where(both, log_q, 0) - jnp.where(both, log_p, 0)
    near = jnp.where(jnp.abs(d) < 1, d, 0)
    # Where `d` is small, `p - q` is what the logarithms say it is.
    term = jnp.where(jnp.abs(d) < 1, q * (near + jnp.expm1(-near)), q * d + (p - q))
    return jnp.where(both, term, jnp.where(has_q, jnp.inf, p))
