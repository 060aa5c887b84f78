"""Budget-sparsemax: sparsemax whose rows sum to a budget, with no entry above 1."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from jaxsoftmax import _threshold
from jaxsoftmax._elementary import two_sum
from jaxsoftmax._form import tolerance
from jaxsoftmax._public import BUDGET, known_number, public
from jaxsoftmax._reductions import Entries, Pair, Rows, indicator, iterate, no_passes
from jaxsoftmax._scores import (
    Axis,
    Options,
    as_returned,
    as_stored,
    check_per_row,
    is_cold,
    prepare,
)
from jaxsoftmax._threshold import Solved


@public(budget=BUDGET)
def budget_sparsemax(
    x: Real[ArrayLike, "*shape"],
    budget: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    r"""Sparsemax for sharing out a budget: each entry is from 0 to 1, each row sums to `budget`.

    .. math:: p_i = \min(\max(x_i / t - \tau, 0), 1),
              \quad \tau \text{ such that } \sum_i p_i = \text{budget}

    Entries are shares: more of them than `budget` may be above 0, and to choose so many is for
    `top_k_mask`. It maximizes :math:`\langle p, x/t \rangle - \frac{1}{2} \|p\|^2` over all such
    rows; at budget
    1 it is `sparsemax`. Jacobian in `x/t`: :math:`\mathrm{diag}(s) - s s^\top / \sum s`, with `s`
    the indicator of the entries strictly between 0 and 1; in `budget`: :math:`s / \sum s`. Where
    all entries are 0 or 1, both are 0. The row has a kink there in `budget`: a budget that is
    learned should not start at a whole number.

    Args:
      x: scores of any shape and real dtype.
      budget: what each row sums to, from 0 to the number of entries; a number or one value per row,
        differentiable. If it exceeds the number of entries that take part, all of these get 1.
      axis: the axes to normalize over: array axes, mesh axis names, both in a tuple, or None for
        all array axes.
      where: which entries take part; a boolean mask that broadcasts to `x`.
      temperature: divides the scores; a number or one value per row, not negative. At 0 the
        largest scores get 1 as long as the budget lasts; ties share what is left.

    Returns:
      Numbers from 0 to 1, of the shape and dtype of `x`. Entries of +inf come first and get 1, or
      share the budget.

    Raises:
      TypeError: if `x` is not real or `where` not boolean.
      ValueError: if an axis is out of range, shapes do not fit, `temperature` is a negative number,
        or `budget` is a number below 0 or above the number of entries. If `budget` is traced, a
        value out of range gives all 0 or all 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> x = jnp.array([3.0, 1.0, 0.5, -1.0])
      >>> jsm.budget_sparsemax(x, 2)
      Array([1.  , 0.75, 0.25, 0.  ], dtype=float32)
      >>> jax.jacfwd(jsm.budget_sparsemax, argnums=1)(x, 2.0)
      Array([0. , 0.5, 0.5, 0. ], dtype=float32)

    References:
      Blondel, Martins & Niculae, 2020: Learning with Fenchel-Young losses (arXiv:1901.02324).
      Correia, Niculae, Aziz & Martins, 2020: Efficient marginalization of discrete and structured
      latent variables via sparsity (arXiv:2007.01919).
    """
    options = Options(where, temperature)
    rows, scores = prepare(x, axis, options)
    rows = as_stored(rows, x, options)
    _check_budget(known_number(budget), rows.length(scores))
    total = check_per_row("budget", budget, scores[0], rows)
    cold = is_cold(rows, scores[0], temperature)
    if cold is not False:
        _, tied = prepare(x, axis, Options(where))
        tied = _coldest(rows, tied, total)
        cold = jnp.broadcast_to(cold, rows.shape(scores[0]))
        scores = rows.map(lambda z, t, c: jnp.where(c, t, z), [scores, tied], [cold])
    return as_returned(_threshold.apply(BUDGET_SPARSEMAX, rows, scores, total)[0], x, where)


def _check_budget(budget: float | None, length: int) -> None:
    # A row of length 0 has nothing to spend its budget on, and nothing to be wrong about.
    if budget is not None and (not budget >= 0 or budget > length > 0):
        raise ValueError(
            f"budget must be from 0 to the number of entries in a row, {length}, got {budget}."
        )


def _coldest(rows: Rows, scores: Entries, budget: Array) -> Entries:
    """The limit of temperature 0: +inf above the score at which the budget is spent, 0 at it.

    That score is the largest one that at least `budget` entries reach. It is found by bisection of
    the ordered numbers of all floats, and so after as many passes as a float has bits.
    """
    scores, budget = lax.stop_gradient((scores, budget))

    def step(state: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        low, high = state
        middle = _middle(low, high)
        mark = _from_ordered(middle)
        reached = rows.map(lambda z, m: indicator(z >= m, z.dtype), [scores], [mark])
        enough = rows.sum(reached) >= budget
        low = jnp.where(enough, middle, low)
        high = jnp.where(enough, high, middle - 1)
        return (low, high), low < high

    def limit(z: Array, mark: Array) -> Array:
        tied = jnp.where((z == mark) & (mark > -jnp.inf), 0, -jnp.inf)
        return jnp.where(jnp.isnan(z), z, jnp.where(z > mark, jnp.inf, tied))

    top = rows.max(scores) + 0 * budget
    low = _to_ordered(jnp.full_like(top, -jnp.inf))
    high = _to_ordered(jnp.full_like(top, jnp.inf))
    low, _ = iterate(step, (low, high))
    return rows.map(limit, [scores], [_from_ordered(low)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Budget(Solved):
    def totals(self, *params: Array) -> tuple[Array, ...]:
        """A row sums to its budget."""
        return tuple(map(jnp.ones_like, params))

    def probabilities(self, rows: Rows, scores: Entries, *params: Array) -> Entries:
        """Those of `Solved`."""
        return rows.in_blocks(functools.partial(super().probabilities, rows), scores, *params)

    def solve(self, rows: Rows, scores: Entries, *params: Array) -> tuple[Array, ...]:
        """The threshold of finite scores, and what infinite ones get."""
        (budget,) = params

        def counts_and_ends(z: Array) -> Pair:
            # Sums keep a NaN, which maxima may lose.
            finite = jnp.where(jnp.isnan(z), z, indicator(jnp.isfinite(z), z.dtype))
            below = _finite(z)
            ends = below, jnp.where(below == -jnp.inf, below, -below)
            return (indicator(z == jnp.inf, z.dtype), finite), ends

        (firsts, others), (top, bottom) = rows.sums_and_maxima(counts_and_ends, [scores])
        share = jnp.clip(budget / jnp.maximum(firsts, 1), 0, 1)
        left = budget - firsts
        # Where nothing is left to be found, any total that there is a threshold for.
        total = jnp.where((left > 0) & (left < others), left, others / 2)
        return *_spend(rows, scores, (-bottom, top), total), share, left, others

    def at(self, score: Array, *row: Array) -> Array:
        """The share of a score."""
        tau, rest, missing, clear, share, left, others, _ = row
        u = _inside(score, tau, rest)
        p = jnp.clip(u - _between(u) * missing, 0, 1)
        p = jnp.where(clear, jnp.round(p), p)
        none = left <= 0
        p = jnp.where(none, 0, jnp.where(left >= others, indicator(score > -jnp.inf, p.dtype), p))
        spoiled = jnp.isnan(left + others)
        return jnp.where(spoiled, left + others, jnp.where(score == jnp.inf, share, p))


def _finite(z: Array) -> Array:
    return jnp.where(z == jnp.inf, -jnp.inf, z)


def _between(u: Array) -> Array:
    return indicator((u > 0) & (u < 1), u.dtype)


def _spend(
    rows: Rows, scores: Entries, ends: tuple[Array, Array], total: Array
) -> tuple[Array, ...]:
    """The threshold of `clip(scores - tau, 0, 1)` that sum to `total`; NaN where that is NaN.

    Scores of +inf take no part.

    A float is not fine enough for a `tau` far from 0: 1000 scores around 100 would miss their
    total by 1%. Hence it is kept as the sum of two, `tau + rest`, and `scores - tau` is exact
    where it matters. What is missing in the end is shared among the entries between 0 and 1.
    """

    def parts(z: Array, tau: Array, rest: Array) -> tuple[Array, Array, Array]:
        u = _inside(z, tau, rest)
        partly = jnp.where(u < 1, jnp.maximum(u, 0), 0)
        # With both ends: an entry at an end leaves it to one side.
        free = indicator((u >= 0) & (u <= 1), u.dtype)
        return partly, free, indicator(u >= 1, u.dtype)

    def step(scores: Entries, state: _State) -> tuple[_State, Array]:
        # Ones apart from the others: their number is exact, and so is what they leave.
        held, free, ones = rows.sums(parts, [scores], [state.tau, state.rest])
        return _stepped(state, held - (total - ones), held, free)

    tau, rest, *_ = rows.search(scores, step, _start(*ends, total))
    return tau, rest, *_shared_out(rows, scores, tau, rest, total)


def _inside(z: Array, tau: Array, rest: Array) -> Array:
    return (_finite(z) - tau) - rest


class _State(NamedTuple):
    """A state of the search.

    Attributes:
      tau: the larger part of the threshold.
      rest: the smaller one.
      low: what `tau` is not below.
      high: what it is not above.
      last: how long the last step was, infinite after a halved bracket.
      passes: how many there were.
      finishing: how many of them there were since no float was left within the bracket.
    """

    tau: Array
    rest: Array
    low: Array
    high: Array
    last: Array
    passes: Array
    finishing: Array


def _start(bottom: Array, top: Array, total: Array) -> _State:
    low = jnp.maximum(_next(bottom - 1, -1), jnp.finfo(top.dtype).min)
    nothing = jnp.zeros_like(top + total)
    return _State(
        tau=jnp.maximum(top - 1, low) + nothing,
        rest=nothing,
        low=low + nothing,
        high=top + nothing,
        last=nothing + jnp.inf,
        passes=no_passes(),
        finishing=nothing,
    )


def _stepped(state: _State, excess: Array, held: Array, free: Array) -> tuple[_State, Array]:
    """The next state, and which rows move.

    The sum is piecewise linear in `tau`, with as its slope the number of entries between 0 and 1,
    so that Newton's method ends as soon as it knows the piece. A bracket is kept, and halved where
    a step leaves it or is not half of the last. From pass `_PATIENCE` on, every other pass halves
    it in the ordered numbers of floats, which pins down `tau` in twice as many passes as a float
    has bits.

    Args:
      state: the state.
      excess: what the entries sum to, less their total.
      held: the sum of those between 0 and 1.
      free: their number.
    """
    tau, rest, low, high, last, passes, finishing = state
    low = jnp.where(excess >= 0, jnp.where(rest < 0, _next(tau, -1), tau), low)
    high = jnp.where(excess <= 0, jnp.where(rest > 0, _next(tau, 1), tau), high)
    middle = _from_ordered(_middle(_to_ordered(low), _to_ordered(high)))
    tight = middle <= _next(low, 1)
    early = passes < _PATIENCE
    middle = jnp.where(early & ~tight, low + (high / 2 - low / 2), middle)
    # Beyond, every other pass is one of Newton's, if it may be.
    by_turns = early | (passes % 2 == 0)

    jump = jnp.where(free > 0, excess / jnp.maximum(free, 1), 0)
    newton, newton_rest = two_sum(tau, rest + jump)
    fits = (free > 0) & (newton >= low) & (newton <= high)
    slow = jnp.abs(jump) > last / 2
    follow = fits & (tight | (by_turns & ~slow))
    finishing = jnp.where(tight, finishing + 1, 0)
    moved = jnp.abs(excess) > 8 * tolerance(tau) * held
    moved &= finishing <= _LAST_STEPS
    new = _State(
        tau=jnp.where(moved, jnp.where(follow, newton, middle), tau),
        rest=jnp.where(moved, jnp.where(follow, newton_rest, 0), rest),
        low=low,
        high=high,
        last=jnp.where(follow, jnp.abs(jump), jnp.inf),
        passes=passes + 1,
        finishing=finishing,
    )
    return new, moved


def _shared_out(
    rows: Rows, scores: Entries, tau: Array, rest: Array, total: Array
) -> tuple[Array, Array]:
    """What is missing of the total, for each entry between 0 and 1, and whether there is any.

    Args:
      rows: the rows.
      scores: the scores.
      tau: their threshold.
      rest: a smaller part of it.
      total: what the solution sums to.
    """

    def counts(z: Array, tau: Array, rest: Array) -> tuple[Array, Array, Array]:
        u = _inside(z, tau, rest)
        return indicator(u >= 1, u.dtype), _between(u), indicator(u > 0.5, u.dtype)

    # And by how much the scores that get more than 1/2 are above all others.
    def off_and_cut(z: Array, tau: Array, rest: Array, share: Array) -> Pair:
        u, z = _inside(z, tau, rest), _finite(z)
        off = jnp.where(_between(u) > 0, u - share, 0)
        return (off,), (jnp.where(u > 0.5, -z, -jnp.inf), jnp.where(u > 0.5, -jnp.inf, z))

    ones, free, chosen = rows.sums(counts, [scores], [tau, rest])
    free = jnp.maximum(free, 1)
    share = (total - ones) / free
    # The mean of deviations is more exact than the sum of many entries that are nearly equal.
    (missing,), (least, others) = rows.sums_and_maxima(off_and_cut, [scores], [tau, rest, share])
    # If the cut is 1 or more, and there are as many as the budget, 0 and 1 are all that the row
    # needs. Then many a `tau` will do, and rounding must not leave a speck on entries at its ends.
    return missing / free, (chosen == total) & (-least - others >= 1)


# Most rows need fewer passes, and what is left of the bound is enough for a float64.
_PATIENCE = 10
# Between neighbouring floats there are few pieces left.
_LAST_STEPS = 6


def _next(x: Array, direction: int) -> Array:
    """The next float up or down."""
    return _from_ordered(_to_ordered(x) + direction)


def _to_ordered(x: Array) -> Array:
    """Floats as integers in the same order, one after the other."""
    return _flip(lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}")))


def _from_ordered(number: Array) -> Array:
    return lax.bitcast_convert_type(_flip(number), jnp.dtype(f"float{8 * number.dtype.itemsize}"))


def _flip(number: Array) -> Array:
    """Reverses the order of negative floats' bits; its own inverse."""
    return number ^ ((number >> (8 * number.dtype.itemsize - 1)) & jnp.iinfo(number.dtype).max)


def _middle(low: Array, high: Array) -> Array:
    """The mean of integers, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


def _slope(p: Array, budget: Array) -> Array:
    del budget
    return indicator((p > 0) & (p < 1), p.dtype)


BUDGET_SPARSEMAX = _Budget(
    weight=lambda u, budget: jnp.clip(u, 0, 1),
    score=lambda p, budget: p,
    slope=_slope,
    partials=lambda p, budget: (jnp.zeros_like(p),),
)
