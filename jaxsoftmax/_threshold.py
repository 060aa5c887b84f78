"""Mappings in threshold form: one solver and one reverse rule for the whole family.

The total of `p_i = g(z_i - tau)` is the same for all scores. Differentiating it gives
`dtau = sum(s dz) / sum(s)` with the slopes `s_i = g'(z_i - tau)`, and so the Jacobian

    J = diag(s) - s s^T / sum(s),

which is symmetric. A parameter of `g` moves `p_i` by its partial derivative at fixed `tau`, less
what `tau` gives back; a cotangent `ct` of `p` is worth `v = ct - sum(s ct) / sum(s)` to both.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._form import Form
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._platforms import chosen
from jaxsoftmax._public import looked_at
from jaxsoftmax._reductions import Entries, Rows, sum_to
from jaxsoftmax._row_choice import batched_in_kernels, by_implementation
from jaxsoftmax._scores import Options, prepare
from jaxsoftmax._tops import gap, relative_to_dominating, top_of

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True, eq=False)
class Solved(Form, abc.ABC):
    """A form whose threshold is found in a way of its own, in several row values if need be."""

    @abc.abstractmethod
    def solve(self, rows: Rows, scores: Entries, *params: Array) -> tuple[Array, ...]:
        """The threshold; never differentiated."""

    @abc.abstractmethod
    def at(self, score: Array, *row: Array) -> Array:
        """The probability of a score, given the threshold and the parameters."""

    def probabilities(self, rows: Rows, scores: Entries, *params: Array) -> Entries:
        """The probabilities; never differentiated."""
        return weights(self, rows, scores, self.solve(rows, scores, *params), params)


@dataclasses.dataclass(frozen=True)
class AtThreshold(Solved):
    """A form whose threshold is given: its parameters begin with the row values of `solve`.

    So parts of a row can be computed apart from each other. The derivative is that in `tau`; to it,
    the first and the last row value are constants.

    Attributes:
      of: the form.
    """

    of: Form = dataclasses.field(kw_only=True)
    tau: ArrayLike | None = 0

    def solve(self, rows: Rows, scores: Entries, *params: Array) -> tuple[Array, ...]:
        """Nothing: it is among the parameters."""
        return ()

    def at(self, score: Array, *row: Array) -> Array:
        """The probability of a score."""
        top, tau, by, *params = row
        if self.of.tau is not None:
            return self.of.weight(score - self.of.tau, *params)
        return self.of.weigh(gap(score, top), self.of.of_row(tau, *params), *params) * by

    def slopes(self, p: Array, *params: Array) -> Array:
        """Those of the form."""
        _, _, _, *own = params
        return self.of.slopes(p, *own)

    def moved_by_params(self, p: Array, *params: Array) -> tuple[Array, ...]:
        """The derivatives of the probabilities in the parameters."""
        _, _, _, *own = params
        none = jnp.zeros_like(p)
        of_tau = none if self.of.tau is not None else -_slopes(self.of, p, *own)
        return none, of_tau, none, *self.of.moved_by_params(p, *own)


# What already are weights: each depends on its own score alone, as it is.
IDENTITY = Form(lambda u: u, lambda p: p, jnp.ones_like, tau=0)


def solve(form: Form, rows: Rows, scores: Entries, *params: Array) -> tuple[Array, ...]:
    """The threshold, as row values; never differentiated.

    They are the maximum of the scores, `tau` less that as entries take it, and what weights are
    multiplied by for their sum to be 1 but for rounding.
    """
    if isinstance(form, Solved):
        return form.solve(rows, scores, *params)
    if form.tau is not None:
        return ()
    top = top_of(rows, scores)

    def step(scores: Entries, state: Any) -> tuple[Any, Array]:
        state, _ = state
        sums = pass_over(form, rows, scores, top, state[0], params)
        state, moved = form.update(sums, state, *params)
        return (state, sums[0]), moved

    length = jnp.full_like(sum(params, top), rows.length(scores))
    start = form.start(length, *params), jnp.zeros_like(length)
    (tau, *_), total = rows.search(scores, step, start)
    return top, form.of_row(tau, *params), inverse_of(total)


def pass_over(
    form: Form, rows: Rows, scores: Entries, top: Array, tau: Array, params: Sequence[Array]
) -> tuple[Array, ...]:
    """The sums of one pass of the search."""

    def terms(score: Array, top: Array, tau: Array, *params: Array) -> Sequence[Array]:
        return form.terms(gap(score, top), tau, *params)

    return rows.sums(terms, [scores], [top, form.of_row(tau, *params), *params])


def weights(
    form: Form, rows: Rows, scores: Entries, threshold: Sequence[Array], params: Sequence[Array]
) -> Entries:
    """The probabilities, given the threshold; never differentiated."""
    return rows.map(functools.partial(weight, form), [scores], [*threshold, *params])


def weight(form: Form, score: Array, *row: Array) -> Array:
    """The probability of a score, given the threshold and the parameters."""
    if isinstance(form, Solved):
        return form.at(score, *row)
    if form.tau is not None:
        return form.weight(score - form.tau, *row)
    top, tau, by, *params = row
    return form.weigh(gap(score, top), tau, *params) * by


def probabilities(form: Form, rows: Rows, scores: Entries, *params: Array) -> Entries:
    """The probabilities; never differentiated."""
    if isinstance(form, Solved):
        return form.probabilities(rows, scores, *params)
    return weights(form, rows, scores, solve(form, rows, scores, *params), params)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _apply(form: Form, rows: Rows, scores: Entries, *params: Array) -> Entries:
    """The probabilities that `form` gives to `scores`, with the rule of the family."""
    return by_implementation(functools.partial(probabilities, form), rows, scores, *params)


def _apply_fwd(form: Form, rows: Rows, scores: Entries, *params: Array) -> tuple[Entries, Any]:
    p = apply(form, rows, scores, *params)
    return p, (rows, p, params)


def _apply_bwd(form: Form, residuals: Any, ct: Entries) -> tuple[Any, ...]:
    """The rule: residuals and the cotangents of `p` to those of rows, scores and parameters."""
    rows, p, params = residuals
    if form.only_scales:
        p = rows.map(functools.partial(_slopes, form), [p], params)
        pull = functools.partial(_by_platform, _softmax_jacobian_at_once, softmax_jacobian)
        return None, _by_symmetric(pull, softmax_jacobian, (rows, p), ct)
    if params or form.tau is not None:
        return None, *pull_back(form, rows, p, params, rows.summed_cotangents(ct))
    slow, fast = (functools.partial(_jacobian, form, at_once) for at_once in (False, True))
    return None, _by_symmetric(fast, slow, (rows, p), ct)


def _by_symmetric(
    fast: Callable[..., Entries],
    slow: Callable[..., Entries],
    point: tuple[Rows, Entries],
    ct: Entries,
) -> Entries:
    """The cotangents that a symmetric Jacobian makes of `ct`; both functions are that Jacobian."""
    pull_fast, pull_slow = (functools.partial(of_shares, jacobian) for jacobian in (fast, slow))
    return linear_pair(pull_fast, slow, point, ct, reference=pull_slow)


def of_shares(pull: Callable[..., Entries], point: Any, ct: Entries) -> Entries:
    """`pull(point, ct)`, of whole cotangents, for those as JAX has them."""
    rows, _ = point
    return rows.shared_cotangents(pull(point, rows.summed_cotangents(ct)))


def _jacobian(form: Form, at_once: bool, point: tuple[Rows, Entries], ct: Entries) -> Entries:
    """`s (ct - sum(s ct) / sum(s))`; symmetric, and so its own transpose."""
    rows, p = point
    slope = rows.map(functools.partial(_slopes, form), [p])
    mean = mean_at_once(form, rows, p, (), ct) if at_once else None
    if mean is None:
        mean = _mean(form, rows, slope, ct)
    return rows.map(lambda s, c, m: s * (c - m), [slope, ct], [mean])


def softmax_jacobian(point: tuple[Rows, Entries], ct: Entries) -> Entries:
    """`p (ct - sum(p ct))`; symmetric, and so its own transpose."""
    rows, p = point
    relative = relative_to_dominating(rows, p, ct)
    mean = rows.sum(rows.map(jnp.multiply, [p, relative]))
    return rows.map(lambda p, c, m: p * (c - m), [p, relative], [mean])


def _softmax_jacobian_at_once(point: tuple[Rows, Entries], ct: Entries) -> Entries:
    """The same, of which all sums are one pass."""
    rows, p = point

    def terms(p: Array, ct: Array) -> tuple[Array, Array, Array]:
        dominates = jnp.round(p)
        share = (1 - dominates) * p
        return dominates * ct, share * ct, share

    of_dominating, of_others, others = rows.sums(terms, [p, ct])
    mean = of_others - others * of_dominating  # relative to the dominating
    return rows.map(lambda p, c, d, m: p * ((c - d) - m), [p, ct], [of_dominating, mean])


def _by_platform(
    at_once: Callable[..., Entries],
    one_by_one: Callable[..., Entries],
    point: tuple[Rows, Entries],
    ct: Entries,
) -> Entries:
    """What both functions make of a point and cotangents, in as many passes as suit a platform.

    Where its room does not choose, all sums are taken at once.
    """
    rows, x = point
    general, other = (
        lambda x, ct, rule=rule: rule((rows, x), ct) for rule in (at_once, one_by_one)
    )
    return chosen("sums_at_once", general, x, ct, rows=rows, one_by_one=other)


def pull_back(
    form: Form,
    rows: Rows,
    p: Entries,
    params: Sequence[Array],
    ct: Entries,
    mean: Array | None = None,
) -> tuple[Any, ...]:
    """The cotangents of scores and parameters, given the probabilities and their cotangents.

    A sink and the parameters get shares; see `Rows`.

    Args:
      form: the form.
      rows: the rows of `p`.
      p: the probabilities.
      params: the parameters of the form.
      ct: the cotangents of `p`, whole ones.
      mean: the mean of `ct`, weighted by the slopes, where it is known.
    """
    slope = rows.map(functools.partial(_slopes, form), [p], params)
    if mean is None:
        mean = _mean(form, rows, slope, ct)
    worth = rows.map(jnp.subtract, [ct], [mean])
    ct_params = [jnp.zeros_like(mean)] * len(params)
    for i, partial in enumerate(_transposed(rows.map(form.moved_by_params, [p], params))):
        ct_params[i] += rows.sum(rows.map(jnp.multiply, [partial, worth]))
    for i, total in enumerate(form.totals(*params)):
        ct_params[i] += mean * total
    ct_params = map(rows.shared_cotangent, ct_params)
    ct_params = (sum_to(x, param.shape) for x, param in zip(ct_params, params, strict=True))
    return rows.shared_cotangents(rows.map(jnp.multiply, [slope, worth])), *ct_params


def _mean(form: Form, rows: Rows, slope: Entries, ct: Entries) -> Array:
    if form.tau is not None:
        return jnp.zeros((1,) * ct[0].ndim, ct[0].dtype)
    mean = rows.sum(rows.map(jnp.multiply, [slope, ct]))
    if form.only_scales:
        return mean
    total = rows.sum(slope)
    return mean / jnp.where(total == 0, 1, total)


def _slopes(form: Form, p: Array, *params: Array) -> Array:
    """The slopes, NaN where the probabilities are: a comparison in the form would lose that."""
    return jnp.where(jnp.isnan(p), p, form.slopes(p, *params))


def mean_at_once(
    form: Form, rows: Rows, p: Entries, params: Sequence[Array], ct: Entries
) -> Array | None:
    """The mean that `pull_back` takes, from one pass; not for what is differentiated again."""
    if form.tau is not None:
        return None

    def terms(p: Array, ct: Array, *params: Array) -> tuple[Array, Array]:
        slope = _slopes(form, p, *params)
        return slope * ct, slope

    weighted, total = rows.sums(terms, [p, ct], params)
    return weighted / jnp.where(total == 0, 1, total)


_apply.defvjp(_apply_fwd, _apply_bwd)
apply = batched_in_kernels(_apply, 1)


def _transposed(entries: tuple[tuple[Array, ...], ...]) -> list[Entries]:
    return list(zip(*entries, strict=True))


def has_form(
    find: Callable[..., tuple[Form, tuple[Array, ...]]],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that tells which form a public mapping has, for those who normalize in parts.

    Args:
      find: `(rows, scores, **options of its own) -> (form, params)`.
    """

    def tell(mapping: Callable[P, R]) -> Callable[P, R]:
        vars(mapping)["form"] = find
        return mapping

    return tell


def form_of(
    normalizer: Any, scores: Array, options: Mapping[str, Any]
) -> tuple[Form, Rows, Entries, tuple[Array, ...]] | None:
    """The form of a configured mapping, with the rows, entries and parameters it has for `scores`.

    None for mappings without a form, and for options that make rows of segments. With an option
    `threshold`, (..., 3), the form is one whose threshold is given.
    """
    find = getattr(normalizer.function, "form", None)
    given = dict(normalizer.options) | normalizer.arrays | dict(options)
    given.pop("implementation", None)
    if find is None or "segment_ids" in given:
        return None
    given = looked_at(normalizer.function, given)
    of_rows = {name: given.pop(name) for name in ("where", "temperature", "sink") if name in given}
    rows, entries = prepare(scores, given.pop("axis"), Options(**of_rows))
    threshold = given.pop("threshold", None)
    form, params = find(rows, entries, **given)
    if threshold is not None:
        form = AtThreshold(form.weight, form.score, of=form)
        params = *jnp.split(threshold, 3, -1), *params
    return form, rows, entries, params


def normalized(rows: Rows, weights: Entries) -> Entries:
    """The weights, not negative, over their sum; 0 in rows without weight."""
    return rows.map(jnp.multiply, [weights], [inverse_of(rows.sum(weights))])


def inverse_of(total: Array) -> Array:
    """What weights are multiplied by, given their sum; finite where that is 0."""
    # To any other total this adds nothing; a select XLA for CPU could not fuse with all the rest.
    return 1 / (total + jnp.finfo(total.dtype).tiny)
