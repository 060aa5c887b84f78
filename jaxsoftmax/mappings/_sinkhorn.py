"""Sinkhorn's scaling of a matrix of scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._public import AXIS, INTEGER, known_number, public
from jaxsoftmax._reductions import Rows, vary_like
from jaxsoftmax._scores import Axis, Options, is_cold, output_dtype, prepare, split_axis
from jaxsoftmax._sharding import share_like
from jaxsoftmax.mappings._softmax import SOFTMAX, log_sum

_OneOrMore = int | str | tuple[int | str, ...]


@public(axes=AXIS, num_iterations=INTEGER)
def sinkhorn(
    x: Real[ArrayLike, "*shape"],
    axes: tuple[_OneOrMore, _OneOrMore] = (-2, -1),
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
    num_iterations: int = 20,
) -> Float[Array, "*shape"]:
    r"""Softmax over rows and columns at once: rows sum to 1, and columns share that evenly.

    .. math:: p_{ij} = e^{x_{ij} / t + f_i + g_j}, \quad \sum_j p_{ij} = 1,
              \quad \sum_i p_{ij} = \text{rows} / \text{columns}

    It maximizes :math:`\langle p, x/t \rangle + H(p)` over such matrices, with Shannon's entropy
    :math:`H`: a soft assignment, and transport with entropic regularization `t`. Columns and rows
    are normalized in turn, as logarithms, and rows come last. So the sums of rows are exact, and
    those of columns as good as `num_iterations` makes them; at low temperatures that takes
    hundreds. The result shows how far they are: `p.sum(-2) - rows / columns`. There is no
    tolerance, because then the number of steps would depend on the data. All rows have the same
    sum, and so have all columns.

    The derivative is that of the iterations themselves. So it is exact for the returned matrix, for
    any `num_iterations`, in every mode and to any order. It keeps one potential per column and
    iteration, and no matrices.

    Args:
      x: scores of any shape and real dtype.
      axes: the axis of the rows and the axis of the columns. A row sums to 1 over the second one.
        Each is an array axis, a mesh axis name, or a tuple of these.
      where: which entries take part; a boolean mask that broadcasts to `x`. Rows and columns
        without any entry that takes part are 0 and do not count.
      temperature: divides the scores; a positive number, or one value per matrix. If it is traced,
        0 gives NaN, since the limit is not a `hardmax`.
      num_iterations: how often columns are normalized, at least 1.

    Returns:
      Probabilities of the shape and dtype of `x`. Entries of +inf leave nothing to others in
      their row.

    Raises:
      TypeError: if `x` is not real, `where` not boolean or `num_iterations` not an integer.
      ValueError: if `axes` are not two different axes in range, shapes do not fit, `temperature`
        is a number that is not positive, or `num_iterations` is below 1.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> p = jsm.sinkhorn(jnp.log(jnp.array([[4.0, 1.0], [1.0, 1.0]])))
      >>> print(p)
      [[0.667 0.333]
       [0.333 0.667]]

    References:
      Sinkhorn, 1964; Cuturi, 2013: Sinkhorn distances (arXiv:1306.0895).
      Mena, Belanger, Linderman & Snoek, 2018 (arXiv:1802.08665).
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}.")
    if known_number(temperature) == 0:
        raise ValueError("temperature must be positive, got 0, which has no limit in sinkhorn.")
    both, rows, columns = _rows_and_columns(axes, jnp.ndim(x))
    whole, (scores,) = prepare(x, both, Options(where, temperature))
    cold = is_cold(whole, scores, temperature)
    scores = nan_unless(jnp.logical_not(cold), _below_top(rows, scores))

    def normalize(g: Array, _: None) -> tuple[Array, None]:
        f = -_finite_log_sum(rows, scores + g)
        return -_finite_log_sum(columns, scores + f), None

    # The columns' sum is left out: it moves g by a constant, which f takes back.
    g = jnp.zeros(columns.shape(scores), scores.dtype)
    g = share_like(vary_like(g, scores, but=columns.names), scores)
    g, _ = lax.scan(jax.checkpoint(normalize), g, length=num_iterations)
    return _threshold.apply(SOFTMAX, rows, (scores + g,))[0].astype(output_dtype(x))


def _rows_and_columns(axes: tuple[_OneOrMore, _OneOrMore], ndim: int) -> tuple[Axis, Rows, Rows]:
    if not isinstance(axes, tuple) or len(axes) != 2:
        raise ValueError(f"axes must be two axes, got {axes!r}.")
    both: Axis = tuple(a for axis in axes for a in (axis if isinstance(axis, tuple) else (axis,)))
    split_axis(both, ndim)
    return both, Rows(*split_axis(axes[1], ndim)), Rows(*split_axis(axes[0], ndim))


def _below_top(rows: Rows, scores: Array) -> Array:
    """The scores less their row's maximum, which changes no result. +inf leaves nothing else."""
    top = rows.max((lax.stop_gradient(scores),))
    moved = scores - jnp.where(jnp.abs(top) == jnp.inf, 0, top)
    below = (top == jnp.inf) & (scores < jnp.inf)
    return jnp.where(below, -jnp.inf, jnp.where(scores == jnp.inf, 0, moved))


def _finite_log_sum(rows: Rows, scores: Array) -> Array:
    """Log-sum-exp, 0 where nothing takes part."""
    total = log_sum(rows, (scores,))
    return jnp.where(total == -jnp.inf, 0, total)
