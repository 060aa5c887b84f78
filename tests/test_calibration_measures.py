"""Measures of calibration: against NumPy, scikit-learn and algebra; netcal, relplot if there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from jaxsoftmax import calibration
from jaxsoftmax.calibration import (
    ReliabilityCurve,
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    negative_log_likelihood,
    reliability_curve,
    smooth_calibration_error,
)

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
BINNED = [
    fun for fun in MEASURES if fun.__name__.endswith(("curve", "ted_calibration_error", "position"))
]


def bins_in_numpy(confidence, num_bins, binning):
    if binning == "width":
        # Closed on the right, the first one also on the left.
        edges = np.linspace(0, 1, num_bins + 1)
        return np.clip(np.searchsorted(edges, confidence) - 1, 0, num_bins - 1)
    order = np.argsort(confidence, kind="stable")
    bins = np.empty(len(confidence), int)
    for rank, index in enumerate(order):
        bins[index] = rank * num_bins // len(confidence)
    return bins


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
@pytest.mark.parametrize("num_bins", [1, 15, 600])
def test_curve_and_error_equal_numpy(predictions, binning, num_bins):
    options = {"num_bins": num_bins, "binning": binning}
    curve = reliability_curve(*predictions, **options)
    assert isinstance(curve, ReliabilityCurve)
    assert curve._fields == ("confidence", "accuracy", "count", "lower", "upper")
    close(curve[:3], curve_in_numpy(*predictions, **options))
    for norm in (1, 2, np.inf):
        error = expected_calibration_error(*predictions, **options, norm=norm)
        close(error, error_in_numpy(*predictions, **options, norm=norm))
        assert 0 <= error <= 1
        assert error.shape == ()


def test_defaults(predictions):
    close(
        expected_calibration_error(*predictions), error_in_numpy(*predictions, 15, "width", norm=1)
    )
    close(reliability_curve(*predictions)[:3], curve_in_numpy(*predictions, 15, "width"))


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


def test_bins_of_equal_mass_are_even(predictions):
    probs, labels = predictions
    count = np.asarray(reliability_curve(probs, labels, num_bins=10, binning="mass").count)
    assert count.max() - count.min() <= 1
    # Also where all confidences are the same.
    tied = np.full((20, 2), 0.5)
    curve = reliability_curve(tied, np.zeros(20, int), num_bins=4, binning="mass")
    np.testing.assert_array_equal(curve.count, [5, 5, 5, 5])


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


def test_curve_and_error_under_transformations(predictions):
    probs, labels = predictions
    probs, labels = probs[:500].reshape(5, 100, 4), labels[:500].reshape(5, 100)
    for binning in ("width", "mass"):
        fun = functools.partial(expected_calibration_error, num_bins=6, binning=binning)
        each = [fun(*both) for both in zip(probs, labels, strict=True)]
        close(jax.vmap(fun)(probs, labels), each)
        close(jax.jit(fun)(probs[0], labels[0]), each[0])


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
    "one axis": ((PROBS[0], LABELS), {}, ValueError, r"probs must have shape \(n, classes\), got"),
    "no classes": ((PROBS[:, :0], LABELS), {}, ValueError, "probs must have shape"),
    "complex": ((PROBS * 1j, LABELS), {}, TypeError, "probs must be real numbers"),
    "labels too short": (
        (PROBS, LABELS[:2]),
        {},
        ValueError,
        r"labels must have shape \(3,\), one per row of probs, got shape \(2,\)",
    ),
    "labels of floats": (
        (PROBS, LABELS * 1.0),
        {},
        TypeError,
        "labels must be integer classes, got dtype float64",
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
    for fun in (reliability_curve, expected_calibration_error):
        with pytest.raises(error, match=message):
            fun(*args, **kwargs)


def test_wrong_norm():
    with pytest.raises(ValueError, match="norm must be 1, 2 or inf, got 3"):
        expected_calibration_error(PROBS, LABELS, norm=3)
