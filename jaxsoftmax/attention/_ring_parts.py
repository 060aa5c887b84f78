"""What attention in a ring does with the keys that have arrived, in blocks; see `_ring`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax import _threshold, _tops
from jaxsoftmax._closed import Closed, is_smooth
from jaxsoftmax._configured import Configured
from jaxsoftmax._elementary import nan_unless
from jaxsoftmax._form import Form
from jaxsoftmax._public import COLD, known_number
from jaxsoftmax._reductions import Entries, Rows, vary_like
from jaxsoftmax._scores import wide
from jaxsoftmax._threshold import Solved, form_of
from jaxsoftmax.attention._arguments import Sizes
from jaxsoftmax.attention._bands import Reach
from jaxsoftmax.attention._cutting import InBlocks
from jaxsoftmax.attention._operands import KEY_AXIS
from jaxsoftmax.attention._prepared import Rules
from jaxsoftmax.attention._ring import Arrays, Parts, Ring, Search, attend, zeros_of
from jaxsoftmax.mappings import softmax
from jaxsoftmax.mappings._log_softmax import total_of
from jaxsoftmax.mappings._softmax import SOFTMAX


def streams(normalizer: Any) -> bool:
    """Whether outputs of parts of rows make those of the whole: softmax, at some temperature."""
    if not (isinstance(normalizer, Configured) and normalizer.function is softmax):
        return False
    return {*_options(normalizer)} <= {"temperature"} and not _is_cold(normalizer)


def has_thresholds(normalizer: Any, rows: Array) -> bool:
    """Whether parts of rows need to know no more of the whole than its threshold.

    Args:
      normalizer: makes weights of scores.
      rows: one score per row.
    """
    if not isinstance(normalizer, Configured) or _is_cold(normalizer):
        return False
    found = form_of(normalizer, rows, {"axis": -1})
    return found is not None and (found[0] is SOFTMAX or not isinstance(found[0], Solved))


def _options(normalizer: Configured) -> dict[str, Any]:
    return dict(normalizer.options) | normalizer.arrays


def _is_cold(normalizer: Configured) -> bool:
    # Of a part it is not known which of its scores are the largest of the whole.
    return known_number(_options(normalizer).get("temperature")) == 0


def _not_cold(normalizer: Configured) -> Configured:
    """The same, with NaN for a temperature that turns out to be 0: see `_is_cold`."""
    found = normalizer.arrays.get("temperature")
    if found is None:
        return normalizer
    warm = nan_unless(jnp.abs(found) >= COLD, found)
    return normalizer.with_arrays(normalizer.arrays | {"temperature": warm})


def in_ring(
    names: tuple[str, ...],
    in_blocks: InBlocks,
    rules: Rules,
    operands: dict[str, Array],
    sizes: Sizes,
) -> tuple[Array, ...]:
    """Attention of queries to the keys of all devices: outputs, and log-sum-exps if wanted.

    Args:
      names: the mesh axes that queries and keys are spread over.
      in_blocks: attention to the keys that are here.
      rules: what makes weights of scores, by a form.
      operands: what blocks are cut from; a bias or a mask has all the keys.
      sizes: the sizes of what is on this device.
    """
    query = operands["query"]

    # Outside of the rule, so that JAX sums their cotangents over devices.
    def vary(x: Any) -> Any:
        return vary_like(x, query) if isinstance(x, jax.Array) else x

    names_of_arrays = ("normalizer", "scale", "soft_cap")
    varied = {name: jax.tree.map(vary, getattr(rules, name)) for name in names_of_arrays}
    going = ("key", "value", "key_segments")
    moving = {name: x for name, x in operands.items() if name in going}
    staying = {name: vary(x) for name, x in operands.items() if name not in going}
    varied["normalizer"] = _not_cold(varied["normalizer"])
    here = _Here(names, in_blocks, dataclasses.replace(rules, **varied), sizes)
    parts, closed = here.opened(moving, staying)
    # Where what is common to all devices has a gradient, it is summed at every step by all.
    can_skip = all(vary_like(x, query) is x for x in closed if is_smooth(x))
    can_skip = can_skip and "query_offset" not in staying
    reach = Reach(rules.before, rules.after).of_rows_from(rules.offset) if can_skip else Reach()
    ring = Ring(names, sizes.queries, sizes.keys, reach, parts)
    named = {_CLOSED.format(i): x for i, x in enumerate(closed)}
    out, threshold = attend(ring, moving, staying | named)
    return (out,) if rules.row_value is None else (out, threshold[..., 0] + threshold[..., 1])


# The names of what functions close over, beside those of operands.
_CLOSED = "closed over {}"


def _with_closed(opened: Callable[..., Any]) -> Callable[..., Any]:
    """What was opened as a function of `staying`, which has what was closed over, and the rest."""

    def call(staying: Arrays, *args: Any) -> Any:
        own = {name: x for name, x in staying.items() if not name.startswith(_CLOSED[:-2])}
        closed = [staying[_CLOSED.format(i)] for i in range(len(staying) - len(own))]
        # The first key varies over the ring alone.
        return opened(closed, own, *jax.tree.map(lambda x: vary_like(x, own["query"]), args))

    return call


@dataclasses.dataclass(frozen=True)
class _Here:
    """The functions of `Parts` and `Search`; they close over the arrays of the rules."""

    names: tuple[str, ...]
    in_blocks: InBlocks
    rules: Rules
    sizes: Sizes

    def opened(self, moving: Arrays, staying: Arrays) -> tuple[Parts, list[Array]]:
        """The functions, for a `staying` that has all that they close over; and all that."""
        closed, rows = Closed(), self.rows(staying)
        threshold = jnp.concatenate([rows] * 3, -1)
        first = vary_like(jnp.zeros((), jnp.int32), rows)
        keys = {name: x for name, x in moving.items() if name != "value"}

        def opened(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
            return _with_closed(closed.opened(function, staying, *args))

        mix = opened(self.mix, first, moving, threshold)
        if self.form(rows)[0].tau is not None:
            return Parts(mix), closed.arrays
        total = opened(self.total, first, keys, threshold)
        if streams(self.rules.normalizer):
            stream = opened(self.stream, first, moving)
            return Parts(mix, stream=stream, total=total), closed.arrays
        state = zeros_of(staying, self.start, staying)
        sums = zeros_of(staying, self.sums, staying, first, keys, threshold)
        search = Search(
            top=opened(self.top, first, keys),
            sums=opened(self.sums, first, keys, threshold),
            start=opened(self.start),
            update=opened(self.update, sums, state),
        )
        return Parts(mix, search=search, total=total), closed.arrays

    def rows(self, staying: Arrays) -> Array:
        """Zeros, one per row, (B, N, T, 1)."""
        query = staying["query"]
        return vary_like(jnp.zeros((*query.shape[:-1], 1), wide(query.dtype)), query)

    def form(self, rows: Array) -> tuple[Form, tuple[Array, ...]]:
        """The form of the normalizer, and its parameters."""
        found: Any = form_of(self.rules.normalizer, rows, {"axis": -1})
        form, _, _, params = found
        return form, params

    def mix(self, staying: Arrays, first_key: Array, moving: Arrays, threshold: Array) -> Any:
        """Given the threshold, the part's share of the output and of the sum of the weights."""
        rules, part = self.of_part(_total, staying, first_key, moving)
        return self.in_blocks(rules, part | {"threshold": threshold}, self.sizes)

    def stream(self, staying: Arrays, first_key: Array, moving: Arrays) -> Any:
        """The output of the part and its log-sum-exp, in two numbers."""
        rules, part = self.of_part(_log_sum, staying, first_key, moving)
        return self.in_blocks(rules, part, self.sizes)

    def top(self, staying: Arrays, first_key: Array, keys: Arrays) -> Array:
        """The largest score of each row."""
        return self.of_rows(_top, staying, first_key, keys)[0]

    def sums(
        self, staying: Arrays, first_key: Array, keys: Arrays, threshold: Array
    ) -> tuple[Array, ...]:
        """What one pass of the search adds up."""
        return self.of_rows(_sums, staying | {"threshold": threshold}, first_key, keys)

    def total(self, staying: Arrays, first_key: Array, keys: Arrays, threshold: Array) -> Array:
        """Given the threshold, the part's share of the sum of the weights alone."""
        return self.of_rows(_total, staying | {"threshold": threshold}, first_key, keys)[0][..., 0]

    def start(self, staying: Arrays) -> Any:
        """The first state of the search."""
        rows = self.rows(staying)
        form, params = self.form(rows)
        length = self.sizes.keys * lax.axis_size(self.names) + ("sink" in staying)
        return form.start(jnp.full_like(sum(params, rows), length), *params)

    def update(self, staying: Arrays, sums: tuple[Array, ...], state: Any) -> Any:
        """The next state, and which rows move."""
        form, params = self.form(self.rows(staying))
        return form.update(sums, state, *params)

    def of_rows(
        self, function: RowValue, staying: Arrays, first_key: Array, keys: Arrays
    ) -> tuple[Array, ...]:
        """Values of the rows of scores alone, (B, N, T, 1)."""
        key = keys["key"]
        rules, part = self.of_part(function, staying, first_key, keys | {"value": key[..., :0, :]})
        scores_alone = rules.normalizer.of(_unweighted)
        rules = dataclasses.replace(rules, normalizer=scores_alone, dropout_key=None)
        _, *found = self.in_blocks(rules, part, dataclasses.replace(self.sizes, value_features=0))
        return tuple(x[..., None] for x in found)

    def of_part(
        self, function: RowValue, staying: Arrays, first_key: Array, moving: Arrays
    ) -> tuple[Any, Arrays]:
        """The rules for the keys that begin at `first_key`, and all operands of that part."""
        part = moving | staying
        for name in ("bias", "mask"):
            if name in part and part[name].shape[KEY_AXIS] != 1:
                keys = self.sizes.keys
                part[name] = lax.dynamic_slice_in_dim(part[name], first_key, keys, KEY_AXIS)
        if "sink" in part:  # once in all
            is_own = first_key == lax.axis_index(self.names) * self.sizes.keys
            part["sink"] = jnp.where(is_own, part["sink"], -jnp.inf)
        normalizer: Any = self.rules.normalizer
        rules = dataclasses.replace(
            self.rules,
            row_value=normalizer.of(functools.partial(function, normalizer.function)),
            first=(*self.rules.first[:3], first_key),
            kv_names=(),
        )
        return rules, part


# Values of rows, `(normalizer, scores, **options)`.
RowValue = Callable[..., Any]


def _log_sum(normalizer: Callable[..., Array], scores: Array, **options: Any) -> Any:
    """The largest score, and the logarithm of the sum of exponentials relative to it."""
    _, rows, entries, _ = _prepared(normalizer, scores, options)
    total = total_of(rows, entries)
    log = jnp.where(total.sum == 0, -jnp.inf, total.log)
    return total.top[..., 0], log[..., 0]


def _total(normalizer: Callable[..., Array], scores: Array, **options: Any) -> Array:
    form, rows, entries, params = _prepared(normalizer, scores, options)
    return rows.sum(_threshold.apply(form, rows, entries, *params))[..., 0]


def _top(normalizer: Callable[..., Array], scores: Array, **options: Any) -> Array:
    _, rows, entries, _ = _prepared(normalizer, scores, options)
    return _tops.top_of(rows, entries)[..., 0]


def _sums(
    normalizer: Callable[..., Array], scores: Array, *, threshold: Array, **options: Any
) -> tuple[Array, ...]:
    form, rows, entries, params = _prepared(normalizer, scores, options)
    top, tau, _ = jnp.split(threshold, 3, -1)
    return tuple(x[..., 0] for x in _threshold.pass_over(form, rows, entries, top, tau, params))


def _prepared(
    normalizer: Callable[..., Array], scores: Array, options: dict[str, Any]
) -> tuple[Form, Rows, Entries, tuple[Array, ...]]:
    found: Any = form_of(Configured(normalizer, (), {}), scores, options)
    return found


def _unweighted(scores: Array, **options: Any) -> Array:
    del options
    return scores
