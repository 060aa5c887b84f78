"""The search for the thresholds of a block of queries, whose scores exist tile by tile."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxsoftmax._form import Form
from jaxsoftmax._reductions import indicator
from jaxsoftmax.attention._kernels._forms import squares_errors, sums_to_one
from jaxsoftmax.attention._kernels._tiles import F32, LEAST, Rows

STEPS_OF_FEW = 6
# The same where steps are fast, and how far the sum of a row may be off there before the last step
# but one: that brings it to the square, and the last, which is free, to that of it.
FAST_STEPS_OF_FEW = 4
ENOUGH = 1e-2
PASSES = 40
# The origin of a row that sees nothing: no score reaches it.
NOWHERE = -LEAST

State = tuple[Array, ...]
Loop = Callable[[Callable[..., Any], Any], Any]
Few = Callable[[], Sequence[Array]]


@dataclasses.dataclass(frozen=True)
class Search:
    """The search for the thresholds of a block of queries.

    Attributes:
      form: the mapping.
      params: the parameters of the form.
      top: the maxima of the rows, 0 in rows that see nothing.
      unseeing: which rows those are.
      sink: one more entry of each row, if there is one.
      rows: how rows lie in tiles.
    """

    form: Form
    params: State
    top: Array
    unseeing: Array
    sink: Array | None
    rows: Rows

    def terms(self, x: Array, state: State) -> State:
        """What scores add to the sums."""
        rows = self.top, self.of_row(state), *self.params
        top, tau, *params = (self.rows.spread(row, x) for row in rows)
        return self.rows.plain(self.form.terms)(x - top, tau, *params)

    def of_row(self, state: State) -> Array:
        """What entries take of the threshold."""
        return self.rows.plain(self.form.of_row)(state[0], *self.params)

    def with_sink(self, sums: State, state: State) -> State:
        """The sums with what the sink adds."""
        return (
            sums if self.sink is None else tuple(map(jnp.add, sums, self.terms(self.sink, state)))
        )

    def of_tiles(self, tiles: Sequence[Array], state: State) -> State:
        """The sums of tiles that are at hand."""
        parts = [self.terms(x, state) for x in tiles]
        sums = (self.rows.sum(functools.reduce(jnp.add, t)) for t in zip(*parts, strict=True))
        return self.with_sink(tuple(sums), state)

    def of_all(self, loop: Loop, state: State) -> State:
        """The sums of all scores: one pass."""

        def body(_: Any, x: Array, sums: State) -> State:
            return self.added(sums, self.terms(x, state))

        count = len(jax.eval_shape(self.terms, self.top, state))
        return self.with_sink(loop(body, self.zeros(count)), state)

    def added(self, sums: State, terms: State) -> State:
        """The sums, given the terms of one more tile."""
        return tuple(s + self.rows.sum(t) for s, t in zip(sums, terms, strict=True))

    def zeros(self, count: int) -> State:
        """What so many sums begin with."""
        return (self.rows.settled(jnp.zeros_like(self.top)),) * count

    def start(self, keys: int) -> State:
        """The first state, of rows of as many keys and a sink."""
        length = jnp.full_like(self.top, keys + 1)
        start = self.rows.plain(self.form.start)(length, *self.params)
        return tuple(map(self.rows.settled, start))

    def step(self, sums: State, state: State) -> tuple[State, Array]:
        """The next state, and 1 in rows for which another pass is due."""
        new, moved = self.rows.plain(self.form.update)(sums, state, *self.params)
        is_off = jnp.abs(sums[0] - 1) > ENOUGH
        due = indicator(moved & (is_off | ~self.is_fast()), F32)
        return tuple(map(self.rows.settled, new)), due

    def is_fast(self) -> Array:
        """In which rows steps are fast."""
        of_form = functools.partial(squares_errors, self.form)
        return self.rows.plain(of_form)(self.params, self.top)

    def steps_of_few(self) -> Array:
        """How many steps the largest scores are worth."""
        all_fast = jnp.min(self.rows.settled(indicator(self.is_fast(), F32))) > 0
        return jnp.where(all_fast, np.int32(FAST_STEPS_OF_FEW), np.int32(STEPS_OF_FEW))

    def any_seeing(self, due: Array) -> Array:
        """Whether a row that sees something has more than 0."""
        return jnp.max(self.rows.settled(jnp.where(self.unseeing, 0, due))) > 0

    def solve(self, few: Few, loop: Loop, keys: int) -> State:
        """The thresholds, first of the largest scores, then, where those may not be all, of all.

        Args:
          few: gives the largest and the second largest scores of each class of keys.
          loop: `loop(body, carry)` is one pass over tiles, `carry = body(tile, scores, carry)`.
          keys: how many there are.
        """
        start = self.start(keys)

        def step_of_few(_: Any, carry: Any) -> Any:
            return self.step(self.of_tiles(few(), carry[0]), carry[0])

        none = self.rows.settled(jnp.zeros_like(self.top))
        carry = start, none
        state, due = lax.fori_loop(np.int32(0), self.steps_of_few(), step_of_few, carry)
        # Bounds that hold for few do not hold for all.
        state = state[0], *start[1:]
        # Only in a class whose second largest takes part may there be another that does.
        hidden = self.rows.max(self.terms(few()[1], state)[0])
        most = jnp.int32(PASSES)

        def one_pass(carry: Any) -> Any:
            passes, state = carry
            state, due = self.step(self.of_all(loop, state), state)
            return jnp.where(self.any_seeing(due), passes + 1, most), state

        passes = jnp.where(self.any_seeing(due + hidden), jnp.int32(0), most)
        _, state = lax.while_loop(lambda carry: carry[0] < most, one_pass, (passes, state))
        return state

    def output(self, sums: State, weighted: Array, mean: Array) -> Array:
        """The output, given the sums of terms, and of values by weights and their mean by slopes.

        The sums tell how far the threshold is off, and the mean what the output gains by the step
        that is left: no pass more is needed for it.
        """
        total = sums[0]
        if sums_to_one(self.form):
            return weighted - self.rows.spread(total - 1, mean) * mean
        return weighted * self.rows.spread(_inverse(total), weighted)

    def kept(self, sums: State, state: State) -> State:
        """What is kept of rows, after that step."""
        (total, slopes), tau = sums, self.of_row(state)
        if sums_to_one(self.form):
            kept: State = (tau + (total - 1) * _inverse(slopes),)
        else:
            kept = tau, _inverse(total)
        origin = jnp.where(self.unseeing, NOWHERE, self.top)
        # What is kept may multiply -inf, which 0 would make NaN.
        return origin, *(jnp.where(self.unseeing, 1, x) for x in kept)

    def mean(self, sums: State, of_slopes: Array) -> Array:
        """The mean of the values by slopes, given their sum."""
        return of_slopes * self.rows.spread(_inverse(sums[1]), of_slopes)


def _inverse(total: Array) -> Array:
    return 1 / jnp.where(total == 0, 1, total)
