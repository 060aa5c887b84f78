"""The loss of any mapping that says what it maximizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxsoftmax import _tops
from jaxsoftmax._closed import closed_over
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._elementary import times
from jaxsoftmax._public import public
from jaxsoftmax._reductions import Entries, Rows
from jaxsoftmax._scores import Axis, Options
from jaxsoftmax.losses._targets import (
    as_distribution,
    not_negative,
    one_per_row,
    prepare_scores,
    without_rounding,
)


def fenchel_young_loss(
    mapping: Callable[..., Array], entropy: Callable[..., Array]
) -> Callable[..., Array]:
    r"""Makes the loss of a mapping, given the entropy that the mapping maximizes.

    .. math:: L(x, y) = \langle p - y, x \rangle + H(p) - H(y), \quad
              p = \mathrm{mapping}(x) = \arg\max_p \langle p, x \rangle + H(p)

    The gradient in `x` is `p - y` for every mapping. So the mapping is evaluated once, and it is
    differentiated only for second derivatives. Arrays that `entropy` closes over, such as a learned
    `alpha`, get gradients. These are taken at fixed `p`, which is right because `p` is the maximum.

    Args:
      mapping: `mapping(scores, axis=axis, where=where)` returns probabilities of the shape of
        `scores`. It gets `where` only if the loss does; the scores that `where` excludes are -inf.
      entropy: `entropy(p, axis=axis)` returns the concave `H`, one value per row. If the mapping
        divides the scores by a temperature, multiply the entropy by that temperature.

    Returns:
      A function `loss(scores, targets, axis=-1, where=None)`. It returns one value per row, in the
      dtype of `scores`, or float32 for half precision. The value is never negative for targets that
      the mapping can return. Targets are classes or distributions, as in `cross_entropy`. Each call
      of `fenchel_young_loss` makes a function that is compiled anew, so call it once.

    Raises:
      TypeError: if an argument is not a function. The loss raises it if `scores` or `targets` are
        not real.
      ValueError: the loss raises it if shapes do not fit, including those that `mapping` and
        `entropy` return.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> gini = lambda p, axis: (1 - jnp.sum(p * p, axis)) / 2
      >>> loss = jsm.fenchel_young_loss(jsm.sparsemax, gini)
      >>> loss(jnp.array([[2.0, 0.0], [0.5, 0.0]]), jnp.array([0, 0]))
      Array([0.    , 0.0625], dtype=float32)

    References:
      Blondel, Martins & Niculae, 2020: Learning with Fenchel-Young losses (arXiv:1901.02324).
    """
    for name, argument in (("mapping", mapping), ("entropy", entropy)):
        if not callable(argument):
            raise TypeError(f"{name} must be a function, got {type(argument).__name__}.")

    @public
    def loss(
        scores: ArrayLike, targets: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
    ) -> Array:
        """The Fenchel-Young loss of one mapping."""
        rows, z = prepare_scores(scores, axis, Options(where))
        target, classes = as_distribution(rows, z, targets, axis)
        mask = {} if where is None else {"where": where}
        p = mapping(z[0], axis=axis, **mask)
        if jnp.shape(p) != z[0].shape:
            raise ValueError(
                f"mapping must give probabilities of the shape of scores, {z[0].shape}, got shape "
                f"{jnp.shape(p)}."
            )
        p = (p.astype(z[0].dtype),)

        def entropy_of_rows(p: Entries) -> Array:
            values = jnp.asarray(entropy(p[0], axis=axis))
            wanted = rows.flat_shape(p[0])
            if values.shape != wanted:
                raise ValueError(
                    f"entropy must give one value per row, shape {wanted}, got shape "
                    f"{values.shape}."
                )
            return values.astype(p[0].dtype).reshape(rows.shape(p[0]))

        (pure,), params, rest = closed_over(entropy_of_rows, (p,))
        return one_per_row(rows, _gap(pure, rows, z, target, p, params, rest), classes, scores)

    return loss


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _gap(
    entropy: Callable[..., Array],
    rows: Rows,
    scores: Entries,
    target: Entries,
    p: Entries,
    params: list[Array],
    rest: list[Array],
) -> Array:
    """`(<p, x> + H(p)) - (<y, x> + H(y))` where `p` maximizes the first."""
    gaps, top = _tops.below_top(rows, scores)
    excess = rows.map(jnp.subtract, [p, target])
    # Where `p` and the target have the same sum, any shift of the scores will do; the maximum at 0
    # keeps the digits.
    shift = without_rounding(rows.sum(excess), rows.sum(rows.map(jnp.abs, [p])))
    linear = rows.map(lambda e, gap: jnp.where(e == 0, 0, e * gap), [excess, gaps])
    of_shift = times(shift, top)
    ours, theirs = entropy(params, rest, p), entropy(params, rest, target)
    loss = (rows.sum(linear) + of_shift) + (ours - theirs)
    size = rows.sum(rows.map(jnp.abs, [linear])) + sum(map(jnp.abs, (of_shift, ours, theirs)))
    return not_negative(loss, 8 * jnp.finfo(loss.dtype).eps * size)


def _gap_fwd(
    entropy: Callable[..., Array],
    rows: Rows,
    scores: Entries,
    target: Entries,
    p: Entries,
    params: list[Array],
    rest: list[Array],
) -> tuple[Array, Any]:
    gap = _gap(entropy, rows, scores, target, p, params, rest)
    return gap, (rows, scores, target, p, params, rest)


def _gap_bwd(entropy: Callable[..., Array], residuals: Any, ct: Array) -> tuple[Any, ...]:
    rows, scores, target, p, params, rest = residuals

    def of_params(params: list[Array]) -> Array:
        return entropy(params, rest, p) - entropy(params, rest, target)

    (ct_params,) = jax.vjp(of_params, params)[1](ct)
    (ct_target,) = jax.vjp(lambda y: -entropy(params, rest, y), target)[1](ct)
    ct = rows.summed_cotangent(ct)
    ct_target = rows.map(
        lambda c, z, ct: c - ct * jnp.where(jnp.isfinite(z), z, 0), [ct_target, scores], [ct]
    )
    ct_scores = rows.map(lambda p, y, ct: ct * (p - y), [p, target], [ct])
    # The derivative in `p` vanishes, since `p` is the maximum: no second solve.
    return None, ct_scores, ct_target, None, ct_params, None


_gap.defvjp(_gap_fwd, _gap_bwd)
