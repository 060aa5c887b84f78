"""Measures of calibration: against NumPy, scikit-learn and algebra; netcal, relplot if there."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.calibration
import sklearn.metrics

from jaxsoftmax.calibration import (
    ReliabilityCurve,
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    fit_beta_scaling,
    fit_temperature,
    maximum_calibration_error,
    negative_log_likelihood,
    reliability_curve,
    smooth_calibration_error,
)

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
MEASURES = [
    reliability_curve,
    expected_calibration_error,
    maximum_calibration_error,
    classwise_calibration_error,
    smooth_calibration_error,
    brier_score,
    brier_decomposition,
    negative_log_likelihood,
]
BINNED = [MEASURES[i] for i in (0, 1, 2, 3, 6)]


def bins_in_numpy(confidence, num_bins, binning):
    if binning == "width":
        # Closed on the right, the first one also on the left.
        edges = np.linspace(0, 1, num_bins + 1)
        return np.clip(np.searchsorted(edges, confidence) - 1, 0, num_bins - 1)
    smaller = np.sum(confidence < confidence[:, None], 1)
    return smaller * num_bins // len(confidence)


def curve_in_numpy(probs, labels, num_bins, binning):
    confidence, correct = probs.max(-1), probs.argmax(-1) == labels
    bins = bins_in_numpy(confidence, num_bins, binning)
    curve = np.full((3, num_bins), np.nan)
    curve[2] = 0
    for b in range(num_bins):
        inside = bins == b
        if np.any(inside):
            curve[:, b] = confidence[inside].mean(), correct[inside].mean(), inside.sum()
    return curve


def error_in_numpy(probs, labels, num_bins, binning, norm):
    confidence, accuracy, count = curve_in_numpy(probs, labels, num_bins, binning)
    gap = np.abs(np.nan_to_num(accuracy - confidence))
    if norm == np.inf:
        return gap.max()
    return np.sum(count / count.sum() * gap**norm) ** (1 / norm)


@pytest.fixture
def predictions(rng):
    probs = rng.dirichlet(np.full(4, 0.6), size=503)
    labels = np.where(rng.random(503) < 0.5, probs.argmax(-1), rng.integers(4, size=503))
    return probs, labels


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("num_bins", [1, 15])
@pytest.mark.asks_for_nan
def test_curve_and_error_equal_numpy(predictions, binning, num_bins):
    options = {"num_bins": num_bins, "binning": binning}
    curve = reliability_curve(*predictions, **options)
    assert isinstance(curve, ReliabilityCurve)
    assert curve._fields == ("confidence", "accuracy", "count", "lower", "upper")
    close(curve[:3], curve_in_numpy(*predictions, **options))
    for norm in (1, 2, 3, 1.5, np.inf):
        error = expected_calibration_error(*predictions, **options, norm=norm)
        close(error, error_in_numpy(*predictions, **options, norm=norm))
        assert 0 <= error <= 1
        assert error.shape == ()


@pytest.mark.asks_for_nan
def test_defaults(predictions):
    close(
        expected_calibration_error(*predictions), error_in_numpy(*predictions, 15, "width", norm=1)
    )
    close(reliability_curve(*predictions)[:3], curve_in_numpy(*predictions, 15, "width"))


@pytest.mark.asks_for_nan
def test_edges_of_the_bins_belong_to_the_left():
    confidence = np.array([0.5, 0.75, 1.0, 0.75])
    probs = np.stack([confidence, 1 - confidence], -1)
    curve = reliability_curve(probs, np.zeros(4, int), num_bins=4)
    np.testing.assert_array_equal(curve.count, [0, 1, 2, 1])
    # Tenths are no binary fractions: 0.7 is 7 tenths nevertheless.
    confidence = np.arange(5, 11) / 10
    probs = np.stack([confidence, 1 - confidence], -1)
    curve = reliability_curve(probs, np.zeros(6, int), num_bins=10)
    np.testing.assert_array_equal(curve.count, [0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    for dtype, num_bins in itertools.product((np.float32, np.float64), (25, 49, 50, 100)):
        edges = np.arange(1, num_bins + 1, dtype=dtype) / num_bins
        curve = reliability_curve(edges, np.zeros(num_bins, int), num_bins=num_bins)
        np.testing.assert_array_equal(curve.count, np.ones(num_bins))
        above = np.nextafter(edges[:-1], dtype(2))
        curve = reliability_curve(above, np.zeros(num_bins - 1, int), num_bins=num_bins)
        np.testing.assert_array_equal(curve.count, np.arange(num_bins) > 0)


def test_bins_of_equal_mass_are_even(predictions):
    probs, labels = predictions
    count = np.asarray(reliability_curve(probs, labels, num_bins=10, binning="mass").count)
    assert count.max() - count.min() <= 1


@pytest.mark.asks_for_nan
def test_ties_share_a_bin():
    """1,000 times the same prediction, of which 700 are right: one bin, in any order."""
    probs = np.tile([0.9, 0.1], (1000, 1))
    labels = (np.arange(1000) >= 700).astype(int)
    for order in (slice(None), slice(None, None, -1), np.arange(1000) * 7 % 1000):
        close(expected_calibration_error(probs, labels[order], binning="mass"), 0.2)
        close(maximum_calibration_error(probs, labels[order], binning="mass"), 0.2)
    # Five neighbors have 4 shares; scikit-learn's quantiles tear none of them either.
    rng = np.random.default_rng(0)
    confidence = rng.choice([0.4, 0.6, 0.8, 1.0], size=397, p=[0.1, 0.2, 0.2, 0.5])
    correct = rng.random(397) < confidence**2
    probs = np.stack([1 - confidence, confidence, 0 * confidence], -1)
    probs[confidence < 0.5, 2] = 0.2
    probs[confidence < 0.5, 0] = 0.4 - 1e-9
    curve = reliability_curve(probs, correct.astype(int), num_bins=10, binning="mass")
    full = np.asarray(curve.count) > 0
    theirs = sklearn.calibration.calibration_curve(
        correct, confidence, n_bins=10, strategy="quantile"
    )
    close([curve.accuracy[full], curve.confidence[full]], theirs)


@pytest.mark.asks_for_nan
def test_interval_is_wilsons(predictions):
    curve = reliability_curve(*predictions, num_bins=5)
    full = np.asarray(curve.count) > 0
    z = scipy.special.ndtri(0.975)
    for accuracy, n, *bounds in np.stack(
        [curve.accuracy, curve.count, curve.lower, curve.upper], -1
    )[full]:
        # Its ends are the shares from which the accuracy is z standard deviations away.
        for share in bounds:
            np.testing.assert_allclose(
                abs(accuracy - share), z * np.sqrt(share * (1 - share) / n), rtol=1e-5, atol=1e-8
            )
    assert np.all(np.isnan(curve.lower[~full]))
    certain = reliability_curve(np.array([[1.0, 0.0]] * 5), np.zeros(5, int), num_bins=1)
    assert 0 < certain.lower[0] < certain.upper[0] <= 1


def test_perfect_and_worst_predictions():
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error(sure, np.array([0, 1, 2, 0])) == 0
    assert expected_calibration_error(sure, np.array([1, 2, 0, 1])) == 1


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("num_bins", [1, 15])
def test_debiased_error(predictions, binning, num_bins):
    """Kumar, Liang & Ma's estimator, bin by bin."""
    options = {"num_bins": num_bins, "binning": binning}
    confidence, accuracy, count = curve_in_numpy(*predictions, **options)
    square = 0.0
    for c, a, n in zip(confidence, accuracy, count, strict=True):
        if n > 1:
            square += n / count.sum() * ((a - c) ** 2 - a * (1 - a) / (n - 1))
    error = expected_calibration_error(*predictions, **options, norm=2, debiased=True)
    close(error, np.sqrt(max(square, 0)))


@pytest.mark.parametrize("debiased", [False, True])
def test_gradient_where_the_error_is_0(debiased):
    """As of sure predictions that all come true."""

    def error(p):
        return expected_calibration_error(p, np.arange(3), norm=2, debiased=debiased)

    value, gradient = jax.value_and_grad(error)(jnp.eye(3))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))


def test_probabilities_above_1_by_rounding_are_1():
    p = np.array([[1.005, 0.0]])
    np.testing.assert_array_equal(negative_log_likelihood(p, np.array([0])), 0)
    np.testing.assert_array_equal(expected_calibration_error(p, np.array([1])), 1)


def test_debiased_square_is_right_on_average(rng):
    """Of calibrated predictions: 0 where the plain square is what chance makes it."""
    probs = np.tile([0.7, 0.3], (400, 20, 1))
    labels = (rng.random((400, 20)) > 0.7).astype(int)
    error = functools.partial(expected_calibration_error, num_bins=1, norm=2)
    plain = np.mean(jax.vmap(error)(probs, labels) ** 2)
    np.testing.assert_allclose(plain, 0.7 * 0.3 / 20, rtol=0.2)
    # Negative squares come out as 0, so of an error that is there.
    sharp = probs + np.array([0.2, -0.2])
    debiased = np.mean(jax.vmap(functools.partial(error, debiased=True))(sharp, labels) ** 2)
    np.testing.assert_allclose(debiased, 0.2**2, atol=0.003)


def test_maximum_error(predictions):
    for options in ({}, {"num_bins": 5, "binning": "mass"}):
        error = maximum_calibration_error(*predictions, **options)
        wanted = {"num_bins": 15, "binning": "width"} | options
        close(error, error_in_numpy(*predictions, **wanted, norm=np.inf))


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_classwise_error(predictions, binning):
    probs, labels = predictions
    for norm in (1, 2, np.inf):
        each = []
        for k in range(4):
            # A class against the others: the confidence is its probability.
            one = np.stack([probs[:, k], np.zeros(len(probs))], -1)
            right = np.where(labels == k, 0, 1)
            each.append(error_in_numpy(one, right, 7, binning, norm))
        error = classwise_calibration_error(probs, labels, num_bins=7, binning=binning, norm=norm)
        wanted = np.max(each) if norm == np.inf else np.mean(np.power(each, norm)) ** (1 / norm)
        close(error, wanted)


def smoothed(confidence, correct, width):
    """The smooth error at one width: reflected kernels one by one, a trapezoidal rule."""
    t = np.linspace(0, 1, 2001)[:, None]
    density = sum(
        scipy.stats.norm.pdf(t, image, width)
        for turn in (-2, 0, 2)
        for image in (confidence + turn, turn - confidence)
    )
    return np.trapezoid(np.abs(density @ (correct - confidence)) / len(confidence), t[:, 0])


@pytest.mark.parametrize("right", [0.2, 0.55, 0.95])
def test_smooth_error_is_its_own_width(right, rng):
    probs = rng.dirichlet(np.full(4, 0.6), size=200)
    labels = np.where(rng.random(200) < right, probs.argmax(-1), rng.integers(4, size=200))
    error = float(smooth_calibration_error(probs, labels))
    np.testing.assert_allclose(
        smoothed(probs.max(-1), probs.argmax(-1) == labels, error), error, rtol=1e-4
    )


def test_smooth_error_changes_little():
    """Where the bins of the plain one tear apart what is right and what is wrong."""
    labels = np.tile([0, 1], 20)
    errors = []
    for above in (np.full(40, 1e-6), np.tile([0.0, 1e-6], 20)):
        probs = np.stack([0.5 + above, 0.5 - above], -1)
        close(smooth_calibration_error(probs, labels), 0, atol=1e-3)
        errors.append(expected_calibration_error(probs, labels, num_bins=2))
    np.testing.assert_allclose(errors, [0, 0.5], atol=1e-5)


def test_brier_score_equals_scikit_learn(predictions):
    probs, labels = predictions
    wanted = sklearn.metrics.brier_score_loss(labels, probs, scale_by_half=False)
    close(brier_score(probs, labels), wanted)
    close(brier_score(np.eye(3), np.array([0, 1, 0])), 2 / 3)


@pytest.mark.parametrize("num_bins", [1, 6])
def test_brier_decomposition(predictions, num_bins):
    for binning in ("width", "mass"):
        parts = brier_decomposition(*predictions, num_bins=num_bins, binning=binning)
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
        close(total, brier_score(*predictions))
        share = np.bincount(predictions[1]) / len(predictions[1])
        close(parts.uncertainty, np.sum(share * (1 - share)))
        assert min(parts.reliability, parts.resolution) >= 0
        assert num_bins == 1 or parts.resolution > 0.1
    squares = classwise_calibration_error(*predictions, num_bins=num_bins, binning="mass", norm=2)
    close(parts.reliability, 4 * squares**2)
    # Where predictions in a bin are all the same, it hides nothing.
    same = np.where(np.arange(40)[:, None] < 20, [0.75, 0.25], [0.25, 0.75])
    close(brier_decomposition(same, np.arange(40) % 2, num_bins=4).within_bins, 0)


def test_negative_log_likelihood_equals_scikit_learn(predictions):
    probs, labels = predictions
    close(negative_log_likelihood(probs, labels), sklearn.metrics.log_loss(labels, probs))
    impossible = np.array([[0.0, 1.0], [0.5, 0.5]])
    assert negative_log_likelihood(impossible, np.array([0, 0])) == np.inf
    gradient = jax.grad(negative_log_likelihood)(impossible, np.array([0, 0]))
    np.testing.assert_array_equal(np.isfinite(gradient), impossible != 0)


@pytest.mark.asks_for_nan
def test_bootstrap_interval(predictions):
    """As wide as that of resampled rows; and it has the accuracy inside."""
    key, rng = jax.random.key(0), np.random.default_rng(1)
    options = {"num_bins": 4, "binning": "mass"}
    curve = reliability_curve(*predictions, **options, key=key, num_resamples=2000)
    confidence, correct = predictions[0].max(-1), predictions[0].argmax(-1) == predictions[1]
    bins = bins_in_numpy(confidence, **options)
    rows = rng.integers(len(bins), size=(2000, len(bins)))
    for b in range(4):
        inside = bins[rows] == b
        accuracy = np.sum(correct[rows] & inside, 1) / np.sum(inside, 1)
        lower, upper = np.quantile(accuracy, [0.025, 0.975])
        np.testing.assert_allclose([curve.lower[b], curve.upper[b]], [lower, upper], atol=0.015)
        assert curve.lower[b] < curve.accuracy[b] < curve.upper[b]
    again = reliability_curve(*predictions, **options, key=key, num_resamples=2000)
    np.testing.assert_array_equal(again.lower, curve.lower)
    empty = reliability_curve(*predictions, key=key)
    np.testing.assert_array_equal(np.isnan(empty.lower), empty.count == 0)


def test_bootstrap_interval_of_one_bin_is_binomial():
    """All of one bin: how many of 200 resampled predictions are right has a known distribution."""
    probs, labels = np.tile([0.75, 0.25], (200, 1)), (np.arange(200) >= 140).astype(int)
    key = jax.random.key(0)
    curve = reliability_curve(probs, labels, num_bins=1, key=key, num_resamples=4000)
    assert curve.lower.shape == curve.upper.shape == (1,)
    wanted = scipy.stats.binom.ppf([0.025, 0.975], 200, 0.7) / 200
    np.testing.assert_allclose([curve.lower[0], curve.upper[0]], wanted, atol=0.0051)


@pytest.mark.parametrize("fun", MEASURES)
@pytest.mark.asks_for_nan
def test_measures_under_transformations(fun, predictions):
    probs, labels = predictions
    probs, labels = probs[:300].reshape(3, 100, 4), labels[:300].reshape(3, 100)
    each = [fun(*both) for both in zip(probs, labels, strict=True)]
    jax.tree.map(
        lambda all_of_them, *each: close(all_of_them, each), jax.vmap(fun)(probs, labels), *each
    )


def numbers(out):
    """All of an answer but how many there are."""
    if isinstance(out, ReliabilityCurve):
        out = out._replace(count=out.accuracy)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)])


WRONG = {
    "logits": ({"probs": [1.5, -3.0]}, r"probs must be from 0 to 1, got 1.5; softmax makes them"),
    "classes from 1": ({"labels": 2}, "labels must be classes from 0 to 1, got 2"),
    "a negative class": ({"labels": -1}, "labels must be classes from 0 to 1, got -1"),
    "a negative weight": ({"weights": -2.0}, "weights must not be negative, got -2"),
    "NaN": ({"probs": [np.nan, 0.5]}, None),
}


@pytest.mark.parametrize("fun", MEASURES)
@pytest.mark.asks_for_nan
def test_what_is_no_prediction(fun):
    """An error where numbers are known, NaN where they are traced; nothing where it has no say."""
    given = {"probs": np.tile([0.25, 0.75], (40, 1)), "labels": np.zeros(40, int)}
    given |= {"weights": np.ones(40), "where": np.ones(40, bool)}
    others = np.arange(40) != 3
    jitted = jax.jit(fun)
    of_others = numbers(jitted(**given | {"where": others}))
    assert not np.all(np.isnan(of_others))
    for change, message in WRONG.values():
        wrong = {name: x.copy() for name, x in given.items()}
        for name, value in change.items():
            wrong[name][3] = value
        assert np.all(np.isnan(numbers(jitted(**wrong))))
        if message is None:
            assert np.all(np.isnan(numbers(fun(**wrong))))
        else:
            with pytest.raises(ValueError, match=message):
                fun(**wrong)
        wrong["where"] = others
        close(numbers(fun(**wrong)), of_others)


# Rows of any shape, that count or not, more or less.


def each_way(fun):
    """A measure in each way that takes options."""
    if fun in BINNED:
        return [functools.partial(fun, num_bins=6, binning=b) for b in ("width", "mass")]
    return [fun]


@pytest.mark.thorough
@pytest.mark.parametrize("fun", MEASURES)
@pytest.mark.asks_for_nan
def test_rows_that_do_not_count(fun, predictions, rng):
    """As if they were not there, whatever they hold; rows of any number of axes."""
    probs, labels = (x[:480] for x in predictions)
    where = rng.random(480) < 0.7
    odd = np.where(where[:, None], probs, np.array([np.nan, np.inf, -3, 7]))
    wrong = np.where(where, labels, -1)
    for measure in each_way(fun):
        wanted = measure(probs[where], labels[where])
        for out in (
            measure(odd, wrong, where),
            measure(odd, wrong, weights=where.astype(float)),
            measure(odd.reshape(4, 120, 4), wrong.reshape(4, 120), where.reshape(4, 120)),
            measure(
                odd.reshape(4, 120, 4), wrong.reshape(4, 120), weights=where.reshape(4, 120) * 0.1
            ),
        ):
            if fun is reliability_curve:
                out = out._replace(count=wanted.count * (float(np.sum(out.count)) / np.sum(where)))
                wanted = wanted._replace(count=out.count)
            jax.tree.map(functools.partial(close, atol=1e-9), out, wanted)
    one = fun(probs[0], labels[0])
    jax.tree.map(close, one, fun(probs[:1], labels[:1]))


@pytest.mark.thorough
@pytest.mark.parametrize("fun", MEASURES)
@pytest.mark.asks_for_nan
def test_weights_count_like_repetitions(fun, predictions, rng):
    probs, labels = predictions
    weights = rng.integers(0, 4, size=len(labels))
    again = np.repeat(np.arange(len(labels)), weights)
    for measure in each_way(fun):
        out = measure(probs, labels, weights=weights)
        wanted = measure(probs[again], labels[again])
        if fun is reliability_curve:  # intervals are those of fewer that differ
            assert np.all((out.upper - out.lower >= wanted.upper - wanted.lower)[wanted.count > 0])
            out, wanted = out[:3], wanted[:3]
        jax.tree.map(functools.partial(close, rtol=1e-9, atol=1e-9), out, wanted)
        # Only their ratios matter.
        scaled = measure(probs, labels, weights=weights / 7)
        if fun is reliability_curve:
            close(scaled.count, wanted[2] / 7)
            scaled = (*scaled[:2], wanted[2])
        jax.tree.map(functools.partial(close, rtol=1e-9, atol=1e-9), scaled, wanted)


def test_weighted_scores_equal_scikit_learn(predictions, rng):
    probs, labels = predictions
    weights = rng.random(len(labels))
    wanted = sklearn.metrics.log_loss(labels, probs, sample_weight=weights)
    close(negative_log_likelihood(probs, labels, weights=weights), wanted)
    wanted = sklearn.metrics.brier_score_loss(
        labels, probs, sample_weight=weights, scale_by_half=False
    )
    close(brier_score(probs, labels, weights=weights), wanted)


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e19, 2e38])
def test_no_measure_depends_on_the_unit_of_weights(scale, predictions, rng):
    probs, labels = (np.asarray(x, t) for x, t in zip(predictions, (np.float32, int), strict=True))
    weights = rng.uniform(0.5, 1.5, len(labels)).astype(np.float32)
    debiased = {"num_bins": 5, "norm": 2, "debiased": True}
    for measure in (
        functools.partial(expected_calibration_error, **debiased),
        functools.partial(classwise_calibration_error, **debiased),
        functools.partial(expected_calibration_error, num_bins=5, binning="mass"),
        smooth_calibration_error,
        brier_score,
        negative_log_likelihood,
        lambda *args, **options: reliability_curve(*args, **options, num_bins=5)[3:],
        lambda *args, **options: fit_beta_scaling(args[0][:, :1], args[1] == 0, **options),
        lambda *args, **options: fit_temperature(jnp.log(args[0] + 1e-6), args[1], **options),
    ):
        actual = measure(probs, labels, weights=weights * np.float32(scale))
        close = functools.partial(np.testing.assert_allclose, rtol=2e-4)
        jax.tree.map(close, actual, measure(probs, labels, weights=weights))


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("measure", [expected_calibration_error, classwise_calibration_error])
def test_debiased_errors_of_nothing_are_nan(measure):
    probs, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0])
    assert np.isnan(measure(probs, labels, np.zeros(2, bool), norm=2, debiased=True))
    with pytest.raises(ValueError, match="weights must not be negative, got -1"):
        measure(probs, labels, weights=-np.ones(2), norm=2, debiased=True)


def test_debiased_square_of_weights_is_right_on_average(rng):
    """Weights make bins as uncertain as fewer predictions would."""
    probs = np.tile([0.8, 0.2], (4000, 20, 1))
    labels = (rng.random((4000, 20)) > 0.6).astype(int)
    weights = np.tile([1.0, 4.0], 10)
    error = functools.partial(
        expected_calibration_error, num_bins=1, norm=2, debiased=True, weights=weights
    )
    np.testing.assert_allclose(np.mean(jax.vmap(error)(probs, labels) ** 2), 0.04, atol=0.005)


def test_scores_of_each_row(predictions):
    probs, labels = predictions
    squares = np.sum((probs - np.eye(4)[labels]) ** 2, -1)
    surprises = -np.log(np.take_along_axis(probs, labels[:, None], 1)[:, 0])
    where = np.arange(503) % 3 > 0
    for fun, wanted in ((brier_score, squares), (negative_log_likelihood, surprises)):
        close(fun(probs, labels, reduction="none"), wanted)
        close(fun(probs, labels, where, reduction="none"), wanted * where)
        close(fun(probs, labels, where), wanted[where].mean())
        pairs = fun(probs[:6].reshape(2, 3, 4), labels[:6].reshape(2, 3), reduction="none")
        close(pairs, wanted[:6].reshape(2, 3))


# One column.


def test_measures_of_one_column_equal_scikit_learn(predictions, rng):
    """Of class 1 of two."""
    p = rng.beta(0.5, 0.5, size=600)
    labels = (rng.random(600) < p**1.5).astype(int)
    for probs in (p, p[:, None]):
        close(brier_score(probs, labels), sklearn.metrics.brier_score_loss(labels, p))
        close(negative_log_likelihood(probs, labels), sklearn.metrics.log_loss(labels, p))
        curve = reliability_curve(probs, labels, num_bins=10)
        theirs = sklearn.calibration.calibration_curve(labels, p, n_bins=10)
        close([curve.accuracy, curve.confidence], theirs)
        wanted = np.sum(np.abs(theirs[0] - theirs[1]) * curve.count) / 600
        for fun in (expected_calibration_error, classwise_calibration_error):
            close(fun(probs, labels, num_bins=10), wanted)
        close(
            maximum_calibration_error(probs, labels, num_bins=10),
            np.max(np.abs(np.subtract(*theirs))),
        )
        parts = brier_decomposition(probs, labels)
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
        close(total, brier_score(probs, labels))
    both = np.stack([1 - p, p], -1)
    close(negative_log_likelihood(both, labels), negative_log_likelihood(p, labels))
    close(brier_score(both, labels), 2 * brier_score(p, labels))
    with pytest.raises(ValueError, match="labels must be classes from 0 to 1, got 2"):
        brier_score(p, labels + 1)


@pytest.mark.parametrize("fun", [reliability_curve, *MEASURES[1:3], smooth_calibration_error])
@pytest.mark.asks_for_nan
def test_pairs_of_confidence_and_correct(fun, predictions):
    """What measures of confidence look at is all that they need."""
    probs, labels = predictions
    confidence, correct = probs.max(-1), probs.argmax(-1) == labels
    wanted = fun(probs, labels)
    for pairs in ((confidence, correct), (confidence[:, None], correct.astype(int))):
        jax.tree.map(close, fun(*pairs), wanted)


@pytest.mark.parametrize("fun", MEASURES)
def test_valid_calls_make_no_nan(fun, predictions):
    """Operation by operation, as one looks for NaN."""
    probs, labels = (x[:60] for x in predictions)
    fun = functools.partial(fun, num_bins=1) if fun is reliability_curve else fun
    wanted = fun(probs, labels)
    with jax.disable_jit(), jax.debug_nans(True):
        out = fun(probs, labels, np.ones(60, bool), weights=np.ones(60))
    jax.tree.map(close, out, wanted)


@pytest.mark.parametrize("fun", MEASURES)
@pytest.mark.asks_for_nan
def test_without_rows(fun):
    out = fun(np.zeros((0, 3)), np.zeros(0, int))
    if fun is reliability_curve:
        np.testing.assert_array_equal(out.count, 0)
        out = out._replace(count=np.nan)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(out))


@pytest.mark.parametrize(
    "fun",
    [smooth_calibration_error, expected_calibration_error, brier_score, negative_log_likelihood],
)
@pytest.mark.asks_for_x64
def test_gradients(fun, rng):
    """As regularizers they are used too; the width of the smooth error has its share."""
    logits, labels = rng.normal(size=(30, 3)), rng.integers(3, size=30)
    direction = rng.normal(size=(30, 3))
    of_step = lambda t: fun(jax.nn.softmax(logits + t * direction), labels)  # noqa: E731
    step = 1e-7
    difference = (of_step(step) - of_step(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(of_step)(0.0), difference, rtol=1e-4)
    assert abs(difference) > 1e-3


def test_smooth_error_has_first_derivatives(rng):
    """Of second ones a grid knows nothing; the first are there in all modes and transformations."""
    p, labels = rng.uniform(0.1, 0.9, size=(2, 20)), rng.integers(2, size=20)
    fun = lambda p: smooth_calibration_error(p, labels)  # noqa: E731
    slopes = jax.vmap(jax.grad(fun))(p)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(jax.checkpoint(fun)))(p), slopes, rtol=1e-3)
    for twice in (jax.hessian(fun), jax.grad(lambda p: jnp.sum(jax.grad(fun)(p)))):
        with pytest.raises(NotImplementedError, match="smooth_calibration_error must be diff"):
            twice(p[0])


def test_small_integers_as_labels():
    probs = np.full((4, 300), 1 / 300)
    labels = np.array([0, 1, 2, 255], np.uint8)
    close(brier_score(probs, labels), 299 / 300)
    close(negative_log_likelihood(probs, labels), np.log(300))


def test_many_predictions_in_single_precision(rng):
    """Sums of 100,000 keep their digits."""
    confidence = np.full(100_000, 0.99997, np.float32)
    probs = np.stack([confidence, 1 - confidence], -1)
    labels = (rng.random(100_000) < 0.01).astype(int)
    error = expected_calibration_error(probs, labels)
    assert error.dtype == np.float32
    wanted = abs(np.float64(confidence[0]) - np.mean(labels == 0))
    np.testing.assert_allclose(error, wanted, atol=1e-6)


def test_equals_netcal(predictions):
    metrics = pytest.importorskip("netcal.metrics", exc_type=ImportError)
    probs, labels = predictions
    close(expected_calibration_error(probs, labels), metrics.ECE(15).measure(probs, labels))
    close(maximum_calibration_error(probs, labels), metrics.MCE(15).measure(probs, labels))


def test_equals_relplot(predictions):
    relplot = pytest.importorskip("relplot")
    probs, labels = predictions
    confidence, correct = probs.max(-1), (probs.argmax(-1) == labels).astype(float)
    theirs = relplot.smECE(confidence, correct)
    # It takes the width from a grid of a thousand.
    np.testing.assert_allclose(smooth_calibration_error(probs, labels), theirs, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_lower_precision_counts_all(dtype, rng):
    """4,000 predictions in one bin: more than half precision can count."""
    probs = jnp.asarray(np.tile([0.75, 0.25], (4001, 1)), dtype)
    labels = (np.arange(4001) % 4 == 0).astype(int)
    curve = reliability_curve(probs, labels, num_bins=1)
    assert curve.count[0] == 4001
    np.testing.assert_allclose(curve.accuracy[0], 3000 / 4001, rtol=1e-5)
    np.testing.assert_allclose(curve.confidence[0], 0.75, rtol=1e-5)


PROBS, LABELS = np.full((3, 2), 0.5), np.zeros(3, int)
MEASURE_ERRORS = {
    "one column beside another": (
        (PROBS[:, :1], LABELS[:, None]),
        {},
        ValueError,
        r"labels must have shape \(3,\), one per row of probs, got shape \(3, 1\)",
    ),
    "one-hot": (
        (PROBS, np.eye(2, dtype=int)[LABELS]),
        {},
        ValueError,
        r"labels must have shape \(3,\), one per row of probs, got shape \(3, 2\)",
    ),
    "a scalar": (
        (0.5, 1),
        {},
        ValueError,
        r"probs must have shape \(..., classes\), got shape \(\)",
    ),
    "booleans": ((PROBS, LABELS > 0), {}, TypeError, "labels must be real numbers, got dtype bool"),
    "where per class": (
        (PROBS, LABELS, PROBS > 0),
        {},
        ValueError,
        r"where must broadcast to shape \(3,\), got shape \(3, 2\)",
    ),
    "where of floats": ((PROBS, LABELS, np.ones(3)), {}, TypeError, "where must be boolean"),
    "no classes": ((PROBS[:, :0], LABELS), {}, ValueError, "probs must have shape"),
    "complex": ((PROBS * 1j, LABELS), {}, TypeError, "probs must be real numbers"),
    "labels too short": (
        (PROBS, LABELS[:2]),
        {},
        ValueError,
        r"labels must have shape \(3,\), one per row of probs, got shape \(2,\)",
    ),
    "labels of floats": (
        (PROBS, np.float32(LABELS)),
        {},
        TypeError,
        "labels must be integer classes, got dtype float32",
    ),
    "no bins": ((PROBS, LABELS), {"num_bins": 0}, ValueError, "num_bins must be at least 1, got 0"),
    "binning": (
        (PROBS, LABELS),
        {"binning": "size"},
        ValueError,
        'binning must be "width" or "mass", got \'size\'',
    ),
}


@pytest.mark.parametrize("name", MEASURE_ERRORS)
def test_wrong_calls_of_measures(name):
    args, kwargs, error, message = MEASURE_ERRORS[name]
    for fun in BINNED if kwargs else MEASURES:
        with pytest.raises(error, match=message):
            fun(*args, **kwargs)


def test_wrong_norm():
    for fun in (expected_calibration_error, classwise_calibration_error):
        for norm in (0.5, -1, np.nan, "max"):
            with pytest.raises(ValueError, match="norm must be a number from 1 to inf, got"):
                fun(PROBS, LABELS, norm=norm)
        with pytest.raises(ValueError, match=r"debiased needs norm 2, .* got norm 1"):
            fun(PROBS, LABELS, debiased=True)


def test_wrong_weights():
    for fun in MEASURES:
        with pytest.raises(ValueError, match=r"weights must broadcast to shape \(3,\), got"):
            fun(PROBS, LABELS, weights=np.ones(2))
        with pytest.raises(TypeError, match="weights must be real"):
            fun(PROBS, LABELS, weights=np.ones(3) * 1j)
    for fun in (brier_score, negative_log_likelihood):
        with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
            fun(PROBS, LABELS, reduction="sum")
    with pytest.raises(ValueError, match="key must be None if there are weights"):
        reliability_curve(PROBS, LABELS, weights=np.ones(3), key=jax.random.key(0))


def test_wrong_bootstrap():
    with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
        reliability_curve(PROBS, LABELS, key=jax.random.key(0), num_resamples=0)
    with pytest.raises(TypeError, match="key must be a key"):
        reliability_curve(PROBS, LABELS, key=np.zeros(2))
