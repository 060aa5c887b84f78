"""Laws that hold for all scores, on scores that hypothesis makes up.

`pytest --hypothesis-profile=deep tests/test_properties.py` looks for an hour; see `conftest.py`.
Arrays of few shapes, so that each program is compiled once; fractions of 64, so that the sums and
differences of two scores are exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import jaxsoftmax as jsm
from jaxsoftmax import calibration
from jaxsoftmax.testing import _of_row
from tests import tools
from tests.cases import FUNCTIONS, LOSSES, MAPPINGS, SOLVED, named, share_the_top

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")


def every(table, condition=lambda case: True):
    return pytest.mark.parametrize("case", **named([case for case in table if condition(case)]))


SHAPE = (3, 6)
INF, NAN = np.inf, np.nan
HUGE = tools.huge()
EXTREMES = [-INF, -HUGE, -1e4, -1 / HUGE, -0.0, 0.0, 1 / HUGE, 1e-7, 1e4, HUGE, INF, NAN]

fractions = st.integers(-3200, 3200).map(lambda n: n / 64)
few = st.integers(-3, 3).map(lambda n: n / 2)  # so that many tie
finite = st.one_of(
    arrays(np.float64, SHAPE, elements=fractions), arrays(np.float64, SHAPE, elements=few)
)
anything = arrays(np.float64, SHAPE, elements=st.one_of(fractions, st.sampled_from(EXTREMES)))
directions = arrays(np.float64, SHAPE, elements=st.integers(-64, 64).map(lambda n: n / 16))
masks = arrays(bool, SHAPE)
EVERYTHING = np.ones(SHAPE, bool)
ONES = np.ones(SHAPE)

close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)


@functools.cache
def with_derivatives(case):
    """The value, the tangent along one direction and the pullback of another, of masked scores."""

    @jax.jit
    def both(x, where, tangent, cotangent):
        f = functools.partial(case.fun, where=where)
        value, along = jax.jvp(f, (x,), (tangent,))
        weights = cotangent[:, 0] if case.gives == "row value" else cotangent
        return value, along, jax.vjp(f, x)[1](weights)[0]

    def call(x, where=EVERYTHING, tangent=ONES, cotangent=ONES):
        return tuple(np.asarray(y) for y in both(x, where, tangent, cotangent))

    return call


def values(case, x, where=EVERYTHING):
    return with_derivatives(case)(x, where)[0]


def probabilities(case, x, where=EVERYTHING):
    out = values(case, x, where)
    return np.exp(out) if case.gives == "logarithms" else out


# Values.


@every(MAPPINGS)
@given(x=anything, where=masks)
@pytest.mark.asks_for_nan
def test_bounds_and_sums(case, x, where):
    hidden = np.where(where, x, -INF)
    p = probabilities(case, x, where)
    sound = ~np.any(np.isnan(hidden), -1)
    assert np.all(np.isnan(p[~sound]).any(-1))
    assert np.all((p[sound] >= 0) & (p[sound] <= 1 + 1e-14))
    assert np.all(p[(hidden == -INF) & sound[:, None]] == 0)
    if case.simplex:
        total = np.any(hidden > -INF, -1).astype(float)
        close(p.sum(-1)[sound], total[sound])
    elif case.name == "stick_breaking":
        assert np.all(p.sum(-1)[sound] <= 1 + 1e-14)


@every(MAPPINGS, lambda case: case.simplex)
@given(x=anything, where=masks)
@pytest.mark.asks_for_nan
def test_odd_rows_are_as_promised(case, x, where):
    def reference(row):
        with np.errstate(over="ignore"):
            out = case.reference(row)
        return np.exp(out) if case.gives == "logarithms" else out

    hidden = np.where(where, x, -INF)
    sound = ~np.any(np.isnan(hidden), -1)
    expected = np.array([_of_row(reference, row) for row in hidden])
    close(probabilities(case, x, where)[sound], expected[sound])


@every(MAPPINGS, lambda case: not case.in_order)
@given(x=anything, where=masks)
@pytest.mark.asks_for_nan
def test_greater_scores_get_no_less(case, x, where):
    hidden = np.where(where, x, -INF)
    sound = ~np.any(np.isnan(hidden), -1)
    order = np.argsort(hidden, -1)
    p = np.take_along_axis(probabilities(case, x, where), order, -1)
    assert np.all(np.diff(p, axis=-1)[sound] >= 0)
    some = np.any(hidden > -INF, -1)
    if case.simplex:
        assert np.all(p[sound & some, -1] > 0)


@every(FUNCTIONS, lambda case: case.shifts)
@given(x=finite, shift=fractions)
def test_shift_invariance(case, x, shift):
    expected = values(case, x)
    if case.gives == "row value":
        expected = expected + shift
    close(values(case, x + shift), expected)


@every(FUNCTIONS, lambda case: not case.in_order)
@given(x=finite, order=st.permutations(range(6)))
def test_permutation_equivariance(case, x, order):
    expected = values(case, x)
    if case.gives != "row value":
        expected = expected[:, np.array(order)]
    close(values(case, x[:, order]), expected)


@every(FUNCTIONS)
@given(x=finite, where=arrays(bool, (6,)).filter(np.any), junk=st.sampled_from(EXTREMES))
def test_a_mask_is_removal(case, x, where, junk):
    x = np.where(where, x, junk)
    masked, _, gradient = with_derivatives(case)(x, np.broadcast_to(where, SHAPE))
    kept = case.reference(x[:, where])
    assert np.all(gradient[:, ~where] == 0)
    if case.gives == "row value":
        close(masked, kept)
        return
    close(masked[:, where], kept)
    assert np.all(masked[:, ~where] == (-INF if case.gives == "logarithms" else 0))


@functools.cache
def segmented(case):
    return jax.jit(lambda x, ids: case.fun(x, segment_ids=ids, num_segments=3))


@every(FUNCTIONS, lambda case: case.takes("segment_ids"))
@given(x=finite, ids=arrays(np.int64, (6,), elements=st.integers(-1, 3)))
def test_a_segment_is_a_row(case, x, ids):
    out = np.asarray(segmented(case)(x, ids))
    for segment in range(3):
        members = ids == segment
        if case.gives == "row value":
            close(out[:, segment], case.reference(x[:, members]) if members.any() else -INF)
        elif members.any():
            close(out[:, members], case.reference(x[:, members]))
    if case.gives != "row value":  # ids out of range belong to no segment
        outside = (ids < 0) | (ids >= 3)
        assert np.all(out[:, outside] == (-INF if case.gives == "logarithms" else 0))


@functools.cache
def tempered(case):
    return jax.jit(lambda x, t: case.fun(x, temperature=t))


@every(FUNCTIONS, lambda case: case.takes("temperature"))
@given(x=finite, t=arrays(np.float64, (3, 1), elements=st.integers(16, 640).map(lambda n: n / 64)))
def test_temperature_divides_the_scores(case, x, t):
    close(tempered(case)(x, t), case.reference(x / t))


@every(MAPPINGS, lambda case: case.simplex and case.takes("temperature"))
@given(
    x=finite,
    cold=arrays(np.float64, (3, 1), elements=st.sampled_from([0.0, 1e-300, 1e-100, 1e-30, 1e-5])),
    hot=arrays(np.float64, (3, 1), elements=st.sampled_from([1e15, 1e100, 1e300, INF])),
)
def test_limits_of_temperature(case, x, cold, hot):
    def limit(t):
        out = tempered(case)(x, t)
        return np.exp(out) if case.gives == "logarithms" else out

    close(limit(cold), share_the_top(x))
    close(limit(hot), np.full(SHAPE, 1 / 6))


# Derivatives.


@every(FUNCTIONS)
@given(x=anything, where=masks, tangent=directions, cotangent=directions)
@pytest.mark.asks_for_nan
def test_both_modes_are_dual(case, x, where, tangent, cotangent):
    if case.name == "softpick":  # its slopes are as large as 1 / x, and so are their roundings
        x = np.where(np.abs(x) < HUGE ** (-1 / 3), 0, x)
    value, along, gradient = with_derivatives(case)(x, where, tangent, cotangent)
    sound = ~np.any(where & np.isnan(x), -1)
    assert np.all(np.isfinite(gradient[sound]))
    assert np.all(gradient[~where] == 0)
    weights = cotangent[:, 0] if case.gives == "row value" else cotangent
    forward = weights * along
    if not np.all(np.isfinite(value)):  # what is infinite cannot be weighed, but with 0
        finite = np.isfinite(value)
        cotangent = np.where(finite[:, None] if case.gives == "row value" else finite, cotangent, 0)
        _, _, gradient = with_derivatives(case)(x, where, tangent, cotangent)
        forward = np.where(finite, forward, 0)
    if case.gives != "row value":
        forward = forward.sum(-1)
    close(forward[sound], np.sum(tangent * gradient, -1)[sound], atol=1e-9)


@every(MAPPINGS, lambda case: case.gives == "probabilities" and case.shifts)
@given(x=anything, where=masks, direction=directions)
@pytest.mark.asks_for_nan
def test_jacobian_is_symmetric_with_zero_row_sums(case, x, where, direction):
    sound = ~np.any(where & np.isnan(x), -1)
    _, along, gradient = with_derivatives(case)(x, where, direction, direction)
    close(along[sound], gradient[sound], atol=1e-10)
    _, along, gradient = with_derivatives(case)(x, where)
    close(along[sound], 0, atol=1e-10)
    close(gradient[sound], 0, atol=1e-10)


@every(MAPPINGS, lambda case: case.gives == "probabilities" and case.simplex and case.shifts)
@given(x=finite, where=masks, entry=st.integers(0, 5))
def test_rows_of_the_jacobian_sum_to_0_relative_to_their_size(case, x, where, entry):
    """Also where one entry dominates, and all derivatives are tiny."""
    one = np.zeros(SHAPE)
    one[:, entry] = 1
    _, column, row = with_derivatives(case)(x, where, one, one)
    # Slopes of the others are powers of probabilities below 1: next to 1, more digits go.
    rounding = 1e-12 if case.name == "softmax" else 1e-9
    for of_entry in (row, column):
        assert np.all(np.abs(of_entry.sum(-1)) <= rounding * np.abs(of_entry).sum(-1))


# Losses.


@every(LOSSES)
@given(x=finite, labels=arrays(np.int64, SHAPE[:1], elements=st.integers(0, 5)))
def test_classes_and_one_hot_targets_agree(case, x, labels):
    """In value and gradient, to a few ulp of what the gradients are: they may be tiny."""
    of_classes = loss_and_gradient(case)(x, labels)
    of_targets = loss_and_gradient(case)(x, np.eye(6)[labels])
    jax.tree.map(functools.partial(close, rtol=1e-12, atol=1e-300), of_classes, of_targets)


@functools.cache
def loss_and_gradient(case):
    @jax.jit
    def both(scores, targets):
        loss, pull_back = jax.vjp(lambda s: case.fun(s, targets), scores)
        return loss, pull_back(jnp.ones_like(loss))[0]

    return both


@every(LOSSES)
@given(x=finite, counts=arrays(np.int64, SHAPE, elements=st.integers(0, 4)))
def test_losses_are_not_negative_and_pull_to_the_target(case, x, counts):
    counts[:, 0] += counts.sum(-1) == 0
    y = counts / counts.sum(-1, keepdims=True)
    loss, gradient = loss_and_gradient(case)(x, y)
    close(gradient, case.mapping(x) - y)
    close(loss, case.reference(x, y), atol=1e-11)
    # Cross-entropy is above the entropy of its target by what the others are above 0.
    least = jsm.shannon_entropy(y) if case.name == "cross_entropy" else 0.0
    assert np.all(loss >= np.asarray(least) * (1 - 1e-13))


# Other shapes, axes and dtypes; and rows on which a solver might not end, or end elsewhere.

LAYOUTS = [((18,), -1), ((6, 3), 0), ((1, 18), None), ((2, 3, 3), (0, 2)), ((3, 1, 6), -3)]


@every(FUNCTIONS, lambda case: not case.in_order)
@given(data=finite, layout=st.sampled_from(LAYOUTS))
def test_axes(case, data, layout):
    shape, axis = layout
    x = data.reshape(shape)
    axes = tuple(range(x.ndim)) if axis is None else tuple(np.atleast_1d(axis) % x.ndim)
    order = [i for i in range(x.ndim) if i not in axes] + list(axes)
    kept = [x.shape[i] for i in order[: x.ndim - len(axes)]]
    expected = case.reference(x.transpose(order).reshape(*kept, -1))
    if case.gives != "row value":
        expected = expected.reshape([x.shape[i] for i in order]).transpose(np.argsort(order))
    close(case.fun(x, axis=axis), expected)


@every(MAPPINGS)
@given(x=finite, dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_lower_precision_is_near(case, x, dtype):
    x = jnp.asarray(x / 8, dtype)
    out = case.fun(x)
    assert out.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    exact = case.reference(np.asarray(x, np.float64))
    close(np.asarray(out, np.float64), exact, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("mapping", SOLVED.values(), ids=SOLVED)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-30, 30).map(lambda e: 2.0**e),
    offset=st.sampled_from([0.0, 1.0, -1e4]),
    step=st.sampled_from([0.0, 0.25, 1.0]),
    absent=st.floats(0, 0.9),
)
def test_many_rows_are_solved(mapping, seed, scale, offset, step, absent):
    """A thousand rows an example: ties, offsets and gaps of all sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, size=(1000, 24))
    x = (np.round(x / step) * step if step else x) * scale + offset
    x[rng.random(x.shape) < absent] = -np.inf
    x = x.astype(np.float32)
    p = np.asarray(mapping(x), np.float64)
    total = np.where(np.any(x > -np.inf, -1), 1, 0)
    np.testing.assert_allclose(p.sum(-1), total, rtol=0, atol=1e-6)
    assert np.all(p >= 0)
    assert np.all(p[x == -np.inf] == 0)
    assert np.all(p.max(-1) == np.take_along_axis(p, x.argmax(-1)[:, None], -1)[:, 0])


# Calibration.


@functools.cache
def measures_of(binning):
    """All measures of 24 predictions that lie in bins, and those that need none."""
    error = calibration.expected_calibration_error

    @jax.jit
    def call(probs, labels, weights):
        binned = [
            calibration.reliability_curve,
            error,
            functools.partial(error, norm=2, debiased=True),
            calibration.maximum_calibration_error,
            calibration.classwise_calibration_error,
            calibration.brier_decomposition,
        ]
        free = [
            calibration.smooth_calibration_error,
            calibration.brier_score,
            calibration.negative_log_likelihood,
        ]
        binned = [functools.partial(f, num_bins=5, binning=binning) for f in binned]
        return [
            (
                f(probs, labels),
                f(probs, labels, weights=weights),
                f(probs, labels, where=labels > 0),
            )
            for f in (*binned, *free)
        ]

    return call


@pytest.mark.parametrize("binning", ["width", "mass"])
@given(
    counts=arrays(np.int64, (24, 3), elements=st.integers(1, 4)),
    labels=arrays(np.int64, 24, elements=st.integers(0, 2)),
    weights=arrays(np.float64, 24, elements=st.integers(0, 3).map(float)),
    order=st.permutations(range(24)),
)
@pytest.mark.asks_for_nan
def test_order_of_the_examples_does_not_matter(binning, counts, labels, weights, order):
    """Many confidences tie, as those of neighbors and of trees do."""
    probs, order = counts / counts.sum(-1, keepdims=True), np.array(order)
    jax.tree.map(
        close,
        measures_of(binning)(probs, labels, weights),
        measures_of(binning)(probs[order], labels[order], weights[order]),
    )
