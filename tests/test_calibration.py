"""Calibration: the fit against a bounded search, the error and the curve against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import jaxsoftmax as jsm
from jaxsoftmax.calibration import (
    ReliabilityCurve,
    expected_calibration_error,
    reliability_curve,
)
from tests.cases import LOSSES, named

close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)


def negative_log_likelihood(logits, labels, t):
    log_p = scipy.special.log_softmax(logits / t, -1)
    return -np.mean(np.take_along_axis(log_p, labels[:, None], -1))


def search(objective, low=-7.0, high=7.0):
    """The best temperature, by a bounded search in its logarithm."""
    found = scipy.optimize.minimize_scalar(
        lambda log_t: objective(np.exp(log_t)), bounds=(low, high), options={"xatol": 1e-10}
    )
    return np.exp(found.x)


def examples(rng, n=400, classes=5, t=1.7, scale=2.0):
    """Logits and labels of which the right temperature is `t`, up to chance."""
    logits = scale * rng.normal(size=(n, classes))
    p = scipy.special.softmax(logits / t, -1)
    labels = np.array([rng.choice(classes, p=row) for row in p])
    return logits, labels


# Fitting.


def fit_temperature(*args, **kwargs):
    """The function itself; optax, beneath it, mixes integers of two widths."""
    with jax.numpy_dtype_promotion("standard"):
        return jsm.calibration.fit_temperature(*args, **kwargs)


@pytest.mark.parametrize("t", [0.02, 0.5, 1.7, 30.0])
@pytest.mark.parametrize("scale", [0.01, 2.0, 1000.0])
def test_fit_equals_a_bounded_search(t, scale, rng):
    logits, labels = examples(rng, t=t * scale / 2, scale=scale)
    fitted = fit_temperature(logits, labels)
    assert fitted.shape == ()
    assert fitted.dtype == np.float64
    best = search(lambda t: negative_log_likelihood(logits, labels, t * scale), -8, 8) * scale
    gap = negative_log_likelihood(logits, labels, float(fitted)) - negative_log_likelihood(
        logits, labels, best
    )
    assert gap <= 1e-9
    np.testing.assert_allclose(fitted, best, rtol=1e-4)


def test_fit_recovers_the_temperature(rng):
    logits, labels = examples(rng, n=20000, t=1.7)
    np.testing.assert_allclose(fit_temperature(logits, labels), 1.7, rtol=0.03)


def test_fit_has_no_slope_left(rng):
    logits, labels = examples(rng)
    fitted = fit_temperature(logits, labels)
    slope = jax.grad(lambda t: jnp.mean(jsm.cross_entropy(logits, labels, temperature=t)))(fitted)
    assert abs(slope) < 1e-9


def test_fit_in_single_precision(rng):
    logits, labels = examples(rng, t=1.7)
    fitted = fit_temperature(logits.astype(np.float32), labels)
    assert fitted.dtype == np.float32
    best = search(lambda t: negative_log_likelihood(logits, labels, t))
    assert negative_log_likelihood(logits, labels, float(fitted)) <= (
        negative_log_likelihood(logits, labels, best) + 1e-6
    )
    half = fit_temperature(logits.astype(np.float16), labels)
    np.testing.assert_allclose(half.astype(float), best, rtol=2e-3)


def test_fit_is_equivariant(rng):
    """Scaled logits want a scaled temperature; shifted ones, the same."""
    logits, labels = examples(rng)
    fitted = fit_temperature(logits, labels)
    np.testing.assert_allclose(fit_temperature(100 * logits, labels), 100 * fitted, rtol=1e-6)
    shifted = logits + 50 * rng.normal(size=(len(logits), 1))
    np.testing.assert_allclose(fit_temperature(shifted, labels), fitted, rtol=1e-6)


def test_fit_to_distributions(rng):
    logits, labels = examples(rng)
    fitted = fit_temperature(logits, np.eye(5)[labels])
    np.testing.assert_allclose(fitted, fit_temperature(logits, labels), rtol=1e-9)
    soft = scipy.special.softmax(logits / 3, -1)
    np.testing.assert_allclose(fit_temperature(logits, soft), 3, rtol=1e-6)


@pytest.mark.parametrize("case", **named(LOSSES))
def test_fit_by_other_losses(case, rng):
    logits, labels = examples(rng)
    fitted = fit_temperature(logits, labels, loss=case.fun)
    one_hot = np.eye(5)[labels]
    objective = lambda t: np.mean(case.reference(logits / t, one_hot))  # noqa: E731
    assert objective(float(fitted)) <= objective(search(objective, -2, 3)) + 1e-9


def test_fit_leaves_out_rows(rng):
    logits, labels = examples(rng, n=60)
    where = rng.random(60) < 0.5
    padded = np.where(where[:, None], logits, np.array([np.nan, np.inf, -np.inf, 1e30, 0]))
    fitted = fit_temperature(padded, np.where(where, labels, -1), where)
    np.testing.assert_allclose(fitted, fit_temperature(logits[where], labels[where]), rtol=1e-9)


def test_fit_with_classes_ruled_out(rng):
    """Logits of -inf, as from a mask, say nothing of the temperature."""
    logits, labels = examples(rng, classes=4)
    ruled_out = np.concatenate([logits, np.full((len(logits), 2), -np.inf)], -1)
    np.testing.assert_allclose(
        fit_temperature(ruled_out, labels), fit_temperature(logits, labels), rtol=1e-6
    )


def test_fit_under_jit_and_vmap(rng):
    sets = [examples(rng, n=50, t=t) for t in (0.5, 1.0, 3.0)]
    logits, labels = (np.stack(part) for part in zip(*sets, strict=True))
    each = [fit_temperature(*both) for both in sets]
    np.testing.assert_allclose(jax.vmap(fit_temperature)(logits, labels), each, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(fit_temperature)(*sets[0]), each[0], rtol=1e-9)
    # Rows of more axes than one are rows all the same.
    several = fit_temperature(logits, labels)
    flat = fit_temperature(logits.reshape(150, 5), labels.ravel())
    np.testing.assert_allclose(several, flat, rtol=1e-9)


DEGENERATE = {
    "separable": ([[2.0, 0.0], [0.0, 3.0]], [0, 1]),
    "misleading": ([[2.0, 0.0], [0.0, 3.0]], [1, 0]),
    "constant": ([[1.0, 1.0], [1.0, 1.0]], [0, 1]),
    "one example, right": ([[2.0, 0.0, 1.0]], [0]),
    "one example, wrong": ([[2.0, 0.0, 1.0]], [1]),
    "one class": ([[2.0], [0.0]], [0, 0]),
    "no rows": (np.zeros((0, 3)), np.zeros(0, int)),
    "tiny": ([[1e-15, 0.0], [0.0, 2e-15], [1e-15, 0.0]], [0, 1, 1]),
    "huge": ([[1e15, 0.0], [0.0, 2e15], [1e15, 0.0]], [0, 1, 1]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_fit_to_degenerate_examples(name, dtype):
    logits, labels = DEGENERATE[name]
    logits, labels = np.asarray(logits, dtype), np.asarray(labels)
    fitted = float(fit_temperature(logits, labels))
    assert 0 < fitted < np.inf
    if name in ("constant", "one class", "no rows"):
        assert fitted == 1
        return
    loss = negative_log_likelihood(logits.astype(float), labels, fitted)
    if name in ("separable", "one example, right"):
        assert loss < 1e-6  # the colder, the better
    elif name in ("misleading", "one example, wrong"):
        assert loss < np.log(logits.shape[1]) + 1e-2  # the hotter, the better
    else:
        unit = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
        best = search(lambda t: negative_log_likelihood(unit, labels, t))
        np.testing.assert_allclose(fitted / logits.max() * 2, best, rtol=1e-3)


def test_fit_leaves_out_every_row(rng):
    logits, labels = examples(rng, n=4)
    assert fit_temperature(logits, labels, np.zeros(4, bool)) == 1


FIT_ERRORS = {
    "a scalar": ((np.array(1.0), np.array(0)), ValueError, "logits must have an axis of classes"),
    "complex": ((np.ones((2, 2)) * 1j, np.zeros(2, int)), TypeError, "logits must be real"),
    "labels too long": ((np.ones((2, 2)), np.zeros(3, int)), ValueError, "labels must have shape"),
    "where of floats": ((np.ones((2, 2)), np.zeros(2, int), np.ones(2)), TypeError, "where must"),
    "where per score": (
        (np.ones((2, 3)), np.zeros(2, int), np.ones((2, 3), bool)),
        ValueError,
        r"where must broadcast to shape \(2,\), got shape \(2, 3\)",
    ),
}


@pytest.mark.parametrize("name", FIT_ERRORS)
def test_wrong_call_of_fit(name):
    args, error, message = FIT_ERRORS[name]
    with pytest.raises(error, match=message):
        fit_temperature(*args)


# Measuring.


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


def test_calibrated_predictions_have_little_error(rng):
    logits, labels = examples(rng, n=20000, t=1.0)
    sharp = expected_calibration_error(scipy.special.softmax(2 * logits, -1), labels)
    right = expected_calibration_error(scipy.special.softmax(logits, -1), labels)
    assert right < 0.02
    assert sharp > 0.1
    fitted = fit_temperature(2 * logits, labels)
    np.testing.assert_allclose(fitted, 2, rtol=0.05)


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
