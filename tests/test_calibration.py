"""Fits of temperature, vector and matrix scaling, against the optimizers of SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import jaxsoftmax as jsm
from jaxsoftmax import calibration
from tests.cases import LOSSES, named

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

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


def lenient(fit):
    """The function itself; optax, beneath it, mixes integers of two widths."""

    @functools.wraps(fit)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return fit(*args, **kwargs)

    return call


fit_temperature = lenient(calibration.fit_temperature)
fit_vector_scaling = lenient(calibration.fit_vector_scaling)
fit_matrix_scaling = lenient(calibration.fit_matrix_scaling)
FITS = [fit_temperature, fit_vector_scaling, fit_matrix_scaling]


@pytest.mark.parametrize("t", [0.02, 0.5, 1.7, 30.0])
@pytest.mark.parametrize("scale", [0.01, 2.0, 1000.0])
@pytest.mark.asks_for_x64
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


@pytest.mark.asks_for_x64
def test_fit_has_no_slope_left(rng):
    logits, labels = examples(rng)
    fitted = fit_temperature(logits, labels)
    slope = jax.grad(lambda t: jnp.mean(jsm.cross_entropy(logits, labels, temperature=t)))(fitted)
    assert abs(slope) < 1e-9


def test_fit_of_logits_with_a_heavy_tail():
    """Steps that lead far out, where the loss is flat, lead back."""
    lead = np.logspace(-1, 2, 80)
    logits, labels = np.stack([lead, 0 * lead], 1), np.zeros(80, int)
    labels[0] = 1
    best = search(functools.partial(negative_log_likelihood, logits, labels))
    close(fit_temperature(logits, labels), best, rtol=1e-5)


@pytest.mark.parametrize("unit", [1e30, 1e-30])
def test_logits_may_be_of_any_size(unit, rng):
    """Squares of such would be none in float32."""
    logits, labels = examples(rng)
    logits = logits.astype(np.float32)
    expected = unit * float(fit_temperature(logits, labels))
    close(float(fit_temperature(np.float32(unit) * logits, labels)), expected, rtol=1e-3)


def test_fit_in_half_precision(rng):
    """As good as can be, for logits of so few digits."""
    logits, labels = examples(rng, t=1.7)
    logits = jnp.asarray(logits, jnp.bfloat16)
    fitted = fit_temperature(logits, labels)
    assert fitted.dtype == np.float32
    exact = np.asarray(logits, np.float64)
    best = search(lambda t: negative_log_likelihood(exact, labels, t))
    assert negative_log_likelihood(exact, labels, float(fitted)) <= (
        negative_log_likelihood(exact, labels, best) + 1e-6
    )
    np.testing.assert_allclose(fitted, best, rtol=1e-3)


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
    logits, labels = examples(rng)
    where = rng.random(400) < 0.5
    padded = np.where(where[:, None], logits, np.array([np.nan, np.inf, -np.inf, 1e30, 0]))
    fitted = fit_temperature(padded, np.where(where, labels, -1), where)
    best = search(lambda t: negative_log_likelihood(logits[where], labels[where], t))
    np.testing.assert_allclose(fitted, best, rtol=1e-6)
    assert fit_temperature(logits, labels, np.zeros(400, bool)) == 1


def test_fit_with_classes_ruled_out(rng):
    """Logits of -inf, as from a mask, say nothing of the temperature."""
    logits, labels = examples(rng, classes=4)
    ruled_out = np.concatenate([logits, np.full((len(logits), 2), -np.inf)], -1)
    np.testing.assert_allclose(
        fit_temperature(ruled_out, labels), fit_temperature(logits, labels), rtol=1e-6
    )


def test_fit_of_several_groups(rng):
    sets = [examples(rng, t=t) for t in (0.5, 1.0, 3.0)]
    logits, labels = (np.stack(part) for part in zip(*sets, strict=True))
    each = [fit_temperature(*both) for both in sets]
    np.testing.assert_allclose(jax.vmap(fit_temperature)(logits, labels), each, rtol=1e-6)
    # Rows of more axes than one are rows all the same.
    best = search(lambda t: negative_log_likelihood(logits.reshape(-1, 5), labels.ravel(), t))
    np.testing.assert_allclose(jax.jit(fit_temperature)(logits, labels), best, rtol=1e-6)


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


def padded(logits, labels, dtype):
    """Three rows of three classes: one compilation for all."""
    logits = np.asarray(logits, dtype)
    rows, classes = logits.shape
    full = np.full((3, 3), -np.inf, dtype)
    full[:rows, :classes] = logits
    return full, np.pad(labels, (0, 3 - rows)), np.arange(3) < rows


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_fit_to_degenerate_examples(name, dtype):
    logits, labels = DEGENERATE[name]
    logits, labels = np.asarray(logits, dtype), np.asarray(labels)
    fitted = float(fit_temperature(*padded(logits, labels, dtype)))
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


def test_fit_without_rows():
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1


def test_excluded_rows_may_have_any_label(rng):
    logits, labels = examples(rng, n=50)
    kept, distributions = np.arange(50) < 40, np.eye(5)[labels]
    spoiled = np.where(kept[:, None], distributions, np.nan)
    for fit in (fit_temperature, fit_vector_scaling):
        for weights in (None, np.ones(5)):
            found = (fit(logits, y, kept, class_weights=weights) for y in (distributions, spoiled))
            jax.tree.map(close, *found)


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("label", [-1, 5])
def test_no_class_has_no_weight_of_another(label, rng):
    logits, labels = examples(rng, n=50)
    labels[0] = label
    weights = np.array([1.0, 1, 1, 1, 0])
    with pytest.raises(ValueError, match=f"labels must be classes from 0 to 4, got {label}"):
        fit_temperature(logits, labels, class_weights=weights)
    jitted = jax.jit(functools.partial(fit_temperature, class_weights=weights))
    assert np.isnan(jitted(logits, labels))


def test_fit_with_class_weights(rng):
    """A class that counts three times is as good as there three times."""
    logits, labels = examples(rng)
    class_weights = np.array([1.0, 3.0, 0.0, 2.0, 1.0])
    again = np.repeat(np.arange(400), class_weights[labels].astype(int))
    best = search(lambda t: negative_log_likelihood(logits[again], labels[again], t))
    for targets in (labels, np.eye(5)[labels]):
        fitted = fit_temperature(logits, targets, class_weights=class_weights)
        np.testing.assert_allclose(fitted, best, rtol=1e-6)
    assert abs(fitted / fit_temperature(logits, labels) - 1) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("fit", FITS)
def test_weights_count_like_repetitions(fit, rng):
    logits, labels = biased_examples(rng)
    weights = rng.integers(0, 4, size=300)
    again = np.repeat(np.arange(300), weights)
    fitted = fit(logits, labels, weights=weights)
    jax.tree.map(
        functools.partial(close, rtol=1e-4, atol=1e-4), fitted, fit(logits[again], labels[again])
    )
    jax.tree.map(
        functools.partial(close, rtol=1e-4, atol=1e-4),
        fitted,
        fit(logits, labels, weights=weights / 7),
    )


# One column.


def binary_examples(rng, n=500):
    logits = 3 * rng.normal(size=n)
    return logits, (rng.random(n) < scipy.special.expit(logits / 2 + 0.7)).astype(int)


def binary_loss(logits, labels):
    return np.mean(np.logaddexp(0, np.where(labels == 1, -logits, logits)))


def test_temperature_of_one_column(rng):
    """How far class 1 is above class 0."""
    logits, labels = binary_examples(rng)
    best = search(lambda t: binary_loss(logits / t, labels))
    for z, y in (
        (logits, labels),
        (logits, labels == 1),
        (logits[:, None], labels),
        (logits[:, None], labels == 1),
        (logits[:, None], labels[:, None].astype(float)),
        (np.stack([0 * logits, logits], -1), labels),
        (logits.reshape(5, 100, 1), labels.reshape(5, 100)),
    ):
        close(fit_temperature(z, y), best, rtol=1e-6)
    soft = scipy.special.expit(logits / 3)
    close(fit_temperature(logits[:, None], soft[:, None]), 3, rtol=1e-6)
    twice = np.array([1.0, 2.0])
    again = np.repeat(np.arange(500), 1 + labels)
    best = search(lambda t: binary_loss(logits[again] / t, labels[again]))
    close(fit_temperature(logits, labels, class_weights=twice), best, rtol=1e-6)
    with pytest.raises(ValueError, match="labels must be classes from 0 to 1, got 2"):
        fit_temperature(logits, labels + 1)
    with pytest.raises(ValueError, match=r"labels must have shape \(500,\) if they are classes"):
        fit_temperature(logits[:, None], labels[:, None])
    # One row of classes is no column.
    assert fit_temperature(np.array([1.0, 2.0]), np.array(0)) > 100


def test_platt_scaling_of_one_column(rng):
    logits, labels = binary_examples(rng)
    odd = np.where(np.arange(500) % 5 > 0, logits, np.nan)
    where = np.arange(500) % 5 > 0
    z, y = logits[where], labels[where]
    best = scipy.optimize.minimize(lambda p: binary_loss(p[0] * z + p[1], y), [1.0, 0.0]).x
    for given in (odd, odd[:, None]):
        scale, bias = fit_vector_scaling(given, labels, where)
        assert scale.shape == bias.shape == (1,)
        close([scale[0], bias[0]], best, rtol=1e-4)
    weight, bias = fit_matrix_scaling(logits[where], labels[where], intercept_penalty=0.0)
    assert weight.shape == (1, 1)
    close([weight[0, 0], bias[0]], best, rtol=1e-4)


@pytest.mark.thorough
def test_one_penalty_or_each(rng):
    logits, labels = biased_examples(rng)
    for fit, first in (
        (fit_vector_scaling, "penalty"),
        (fit_matrix_scaling, "off_diagonal_penalty"),
    ):
        both = fit(logits, labels, ALL, penalty=0.2)
        each = fit(logits, labels, ALL, **{first: 0.2, "intercept_penalty": 0.2})
        jax.tree.map(functools.partial(close, rtol=1e-6, atol=1e-6), both, each)
        other = fit(logits, labels, ALL, penalty=0.2, intercept_penalty=20.0)
        assert np.max(np.abs(other[1])) < np.max(np.abs(both[1])) / 2


def test_fit_to_many_rows(rng):
    """More than one block of rows, and so many that a part of them is fitted to first."""
    logits = rng.normal(size=(9001, 40)) * 3
    labels = np.argmax(logits / 2 + rng.gumbel(size=logits.shape), -1)
    where = rng.random(9001) < 0.8
    fitted = float(fit_temperature(logits, labels, where))
    best = search(lambda t: negative_log_likelihood(logits[where], labels[where], t))
    np.testing.assert_allclose(fitted, best, rtol=1e-7)
    np.testing.assert_allclose(fitted, 2, rtol=0.03)  # that of the labels, but for chance
    # Also if those of the part are all of them right, and the others not.
    misleading = np.where(np.arange(9001) % 4 == 0, logits.argmax(-1), labels)
    fitted = float(fit_temperature(logits, misleading, where))
    best = search(lambda t: negative_log_likelihood(logits[where], misleading[where], t))
    np.testing.assert_allclose(fitted, best, rtol=1e-7)


def test_fit_without_signal_ends_soon():
    """Labels that have nothing to do with the logits: the loss is flat but for rounding."""
    evaluations = []

    def loss(logits, labels):
        counted = jax.pure_callback(
            lambda _: evaluations.append(1) or np.zeros((), np.float32),
            jax.ShapeDtypeStruct((), np.float32),
            jax.lax.stop_gradient(logits[0, 0]),
            vmap_method="sequential",
        )
        return jsm.cross_entropy(logits, labels) + counted

    fit = jax.jit(functools.partial(fit_temperature, loss=loss))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(10_000, 10)).astype(np.float32)
        labels = rng.integers(10, size=10_000)
        evaluations.clear()
        fitted = float(fit(logits, labels))
        assert 10 < len(evaluations) < 200
        # As good as a guess: nothing better is to be had.
        assert negative_log_likelihood(np.float64(logits), labels, fitted) < np.log(10) + 5e-5


def test_a_valid_fit_makes_no_nan():
    """Operation by operation, as one looks for NaN."""
    logits, labels = np.tile([2.0, 0.0], (4, 1)), np.array([0, 0, 0, 1])
    with jax.disable_jit(), jax.debug_nans(True):
        close(2 / fit_temperature(logits, labels), np.log(3), rtol=1e-6)


@pytest.mark.asks_for_nan
def test_fit_has_no_answer_for_what_is_no_class(rng):
    logits, labels = examples(rng)
    wrong = np.where(np.arange(len(labels)) == 7, 5, labels)
    for fit in FITS:
        with pytest.raises(ValueError, match="labels must be classes from 0 to 4, got 5"):
            fit(logits, wrong)
        with pytest.raises(ValueError, match="weights must not be negative, got -1"):
            fit(logits, labels, weights=np.where(wrong == 5, -1.0, 1.0))
        with pytest.raises(ValueError, match="labels must be classes from 0 to 4, got 5"):
            fit(logits, labels + 1)
    assert np.isnan(jax.jit(fit_temperature)(logits, wrong))
    assert np.isfinite(fit_temperature(logits, wrong, wrong < 5))
    assert np.isfinite(fit_temperature(logits, wrong, weights=1.0 * (wrong < 5)))
    logits[7, 0] = np.nan
    assert np.isnan(fit_temperature(logits, labels))


def test_rows_that_cannot_be_have_no_say(rng):
    """The class of row 7 is ruled out."""
    logits, labels = examples(rng)
    others = np.arange(len(labels)) != 7
    best = search(lambda t: negative_log_likelihood(logits[others], labels[others], t))
    logits[7, labels[7]] = -np.inf
    np.testing.assert_allclose(fit_temperature(logits, labels), best, rtol=1e-6)


def test_fits_have_no_derivatives(rng):
    logits, labels = examples(rng)
    gradient = jax.grad(lambda z: fit_temperature(z, labels))(logits)
    np.testing.assert_array_equal(gradient, 0)


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
    for fit in FITS:
        with pytest.raises(error, match=message):
            fit(*args)


@pytest.mark.asks_for_nan
def test_wrong_options(rng):
    logits, labels = examples(rng)
    for fit in FITS:
        with pytest.raises(
            ValueError, match=r"class_weights must have shape \(5,\), one per class"
        ):
            fit(logits, labels, class_weights=np.ones(4))
        with pytest.raises(ValueError, match="loss must return one value per row, shape"):
            fit(logits, labels, loss=lambda z, y: jnp.mean(jsm.cross_entropy(z, y)))
    with pytest.raises(ValueError, match="off_diagonal_penalty must be a number, got shape"):
        fit_matrix_scaling(logits, labels, off_diagonal_penalty=np.ones(5))
    negative = np.array([1.0, 1.0, 1.0, 1.0, -1.0])
    for fit in FITS:
        with pytest.raises(ValueError, match="class_weights must not be negative, got -1"):
            fit(logits, labels, class_weights=negative)
    assert np.isnan(
        jax.jit(functools.partial(fit_temperature, class_weights=negative))(logits, labels)
    )
    logits, labels = biased_examples(rng)
    for fit in FITS[1:]:
        for name in ("penalty", "intercept_penalty"):
            with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
                fit(logits, labels, ALL, **{name: -1.0})
    assert np.all(
        np.isnan(
            jax.jit(functools.partial(fit_vector_scaling, penalty=-1.0))(logits, labels, ALL)[0]
        )
    )


# Vector and matrix scaling.

ALL = np.ones(300, bool)


def biased_examples(rng, n=300, classes=4):
    """What the logits say of each class wants another scale and bias, and some mixing."""
    logits = 2 * rng.normal(size=(n, classes))
    true = logits * np.linspace(0.3, 1.2, classes) + np.linspace(-1, 1, classes)
    true[:, 0] += 0.5 * logits[:, 1]
    return logits, np.argmax(true + rng.gumbel(size=true.shape), -1)


def scaled(logits, multiplier, bias):
    multiplier, bias = np.asarray(multiplier), np.asarray(bias)
    return (logits @ multiplier if multiplier.ndim == 2 else logits * multiplier) + bias


def best_of_scipy(objective, start):
    return scipy.optimize.minimize(objective, start, method="BFGS", options={"gtol": 1e-7}).fun


def test_vector_scaling_equals_scipy(rng):
    logits, labels = biased_examples(rng)
    where = rng.random(300) < 0.8

    def objective(params):
        rows = scaled(logits[where], params[:4], params[4:])
        return negative_log_likelihood(rows, labels[where], 1)

    odd = np.where(where[:, None], logits, np.array([np.nan, np.inf, 1e30, 0]))
    scale, bias = fit_vector_scaling(odd, np.where(where, labels, -1), where)
    assert scale.shape == bias.shape == (4,)
    fitted = objective(np.concatenate([scale, bias]))
    assert fitted <= best_of_scipy(objective, np.repeat([1.0, 0.0], 4)) + 1e-9
    one = search(lambda t: negative_log_likelihood(logits[where], labels[where], t))
    assert fitted < negative_log_likelihood(logits[where], labels[where], one) - 0.05


def test_vector_scaling_of_logits_that_tell_nothing():
    """The temperature is high, and the penalty far steeper in the scales than the loss."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        logits = np.float32(2 * rng.normal(size=(200, 3)))
        labels = rng.choice(3, 200, p=[0.6, 0.3, 0.1])
        temperature = float(fit_temperature(logits, labels))

        def objective(params, logits=logits, labels=labels, temperature=temperature):
            scales, biases = params[:3], params[3:]
            log_p = scipy.special.log_softmax(logits * scales / temperature + biases, -1)
            distance = np.mean((scales - 1) ** 2) + np.mean(biases**2)
            return distance - np.mean(log_p[np.arange(200), labels])

        scale, bias = fit_vector_scaling(logits, labels, penalty=np.float32(1))
        fitted = objective(np.concatenate([scale * temperature, bias]).astype(float))
        assert fitted <= best_of_scipy(objective, np.repeat([1.0, 0.0], 3)) + 1e-6


@pytest.mark.parametrize("fit", FITS[1:])
def test_scaling_of_logits_far_from_zero(fit, rng):
    """As good as of the same logits around 0: a bias takes up what all have in common."""
    logits, labels = biased_examples(rng)

    def fitted(offset):
        moved = logits + offset * np.std(logits)
        parameters = fit(moved, labels, ALL, penalty=0.0)
        return negative_log_likelihood(scaled(moved, *parameters), labels, 1)

    best = fitted(0)
    for offset in (50, 300):
        assert fitted(offset) <= best + 1e-6


@pytest.mark.asks_for_x64
def test_penalties_of_logits_far_from_zero(rng):
    """A large mean makes that of the bias steep, against that of the scale."""
    logits, labels = biased_examples(rng)
    logits = logits + 50 * np.std(logits)
    temperature = float(fit_temperature(logits, labels))

    def objective(params):
        loss = negative_log_likelihood(scaled(logits, params[:4], params[4:]), labels, 1)
        distances = (params[:4] * temperature - 1) ** 2 + params[4:] ** 2
        return loss + 0.1 * np.mean(distances)

    found = np.concatenate(fit_vector_scaling(logits, labels, ALL, penalty=0.1))
    assert objective(found) <= best_of_scipy(objective, found) + 1e-9


def of_counts(scores, counts):
    """A loss that is NaN if a row counts nothing."""
    return jsm.cross_entropy(scores, counts / jnp.sum(counts, -1, keepdims=True))


def with_norm(scores, labels):
    """A loss that has no derivative at equal scores."""
    return jsm.cross_entropy(scores, labels) + 0.01 * jnp.linalg.norm(scores, axis=-1)


@pytest.mark.parametrize("loss", [of_counts, with_norm])
@pytest.mark.parametrize("fit", FITS)
def test_fits_of_a_loss_that_rows_that_do_not_count_might_spoil(fit, loss, rng):
    """As without these rows."""
    logits, labels = biased_examples(rng)
    where = rng.random(300) < 0.8
    if loss is of_counts:
        labels = 3 * np.eye(4)[labels] + rng.random((300, 4))
    found = fit(logits, labels, where, loss=loss)
    wanted = fit(logits[where], labels[where], loss=loss)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), found, wanted)


@pytest.mark.asks_for_nan
def test_fits_leave_out_what_is_ruled_out_where_a_loss_has_no_derivative(rng):
    def of_probabilities(scores, labels):
        return -jnp.log(jnp.take_along_axis(jsm.softmax(scores), labels[:, None], 1)[:, 0])

    logits, labels = biased_examples(rng)
    wanted = fit_temperature(logits[1:], labels[1:])
    logits[0, labels[0]] = -np.inf
    found = fit_temperature(logits, labels, loss=of_probabilities)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_fit_without_a_gradient_is_nan(rng):
    def loss(scores, labels):
        return jsm.cross_entropy(scores, labels) + 0.0 * jnp.linalg.norm(0.0 * scores, axis=-1)

    logits, labels = biased_examples(rng)
    with jax.debug_nans(False):
        assert np.isnan(fit_temperature(logits, labels, loss=loss))


@pytest.mark.parametrize("case", ["small", "far apart"])
@pytest.mark.asks_for_x64
def test_matrix_scaling_with_steep_penalties(case, rng):
    """Of logits far smaller than 1, the penalty is steep; of classes far apart, the loss is not."""
    logits, labels = biased_examples(rng)
    logits = logits / 1000 if case == "small" else logits + np.array([1000, -500, 3, 0])
    unit = np.std(logits)

    def objective(params):
        weight, bias = params[:16].reshape(4, 4) / unit, params[16:]
        return (
            negative_log_likelihood(scaled(logits, weight, bias), labels, 1)
            + np.mean(weight[~np.eye(4, dtype=bool)] ** 2)
            + np.mean(bias**2)
        )

    weight, bias = fit_matrix_scaling(logits, labels, ALL)
    found = np.concatenate([np.ravel(weight) * unit, bias])
    assert objective(found) <= best_of_scipy(objective, found) + 1e-8


@pytest.mark.asks_for_nan
def test_vector_scaling_with_classes_ruled_out(rng):
    logits, labels = biased_examples(rng)
    logits[np.arange(0, 300, 3), (labels[::3] + 1) % 4] = -np.inf

    def objective(params):
        return negative_log_likelihood(scaled(logits, params[:4], params[4:]), labels, 1)

    fitted = objective(np.concatenate(fit_vector_scaling(logits, labels, ALL)))
    assert fitted <= best_of_scipy(objective, np.repeat([1.0, 0.0], 4)) + 1e-9
    matrix = fit_matrix_scaling(
        logits, labels, ALL, off_diagonal_penalty=1.0, intercept_penalty=1.0
    )
    assert np.all(np.isnan(matrix[0]))


@pytest.mark.thorough
def test_rows_that_are_ruled_out_do_not_strengthen_penalties(rng):
    logits = 2 * rng.normal(size=(60, 4))
    labels = np.argmax(logits + rng.gumbel(size=(60, 4)), -1)
    ruled_out = logits.copy()
    ruled_out[np.arange(60), labels] = -np.inf
    both = np.concatenate([logits, ruled_out]), np.concatenate([labels, labels])
    found, wanted = (fit_vector_scaling(*args, penalty=0.3) for args in (both, (logits, labels)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalties", [(0.1, 0.5), (100.0, 0.0)])
@pytest.mark.asks_for_x64
def test_matrix_scaling_equals_scipy(penalties, rng):
    logits, labels = biased_examples(rng)
    off_diagonal, intercept = penalties

    def objective(params):
        weight, bias = params[:16].reshape(4, 4), params[16:]
        return (
            negative_log_likelihood(scaled(logits, weight, bias), labels, 1)
            + off_diagonal * np.mean(weight[~np.eye(4, dtype=bool)] ** 2)
            + intercept * np.mean(bias**2)
        )

    weight, bias = fit_matrix_scaling(
        logits, labels, ALL, off_diagonal_penalty=off_diagonal, intercept_penalty=intercept
    )
    assert weight.shape == (4, 4)
    assert bias.shape == (4,)
    fitted = objective(np.concatenate([np.ravel(weight), bias]))
    best = best_of_scipy(objective, np.concatenate([np.eye(4).ravel(), np.zeros(4)]))
    assert fitted <= best + 1e-9
    # The stronger the penalty, the closer to vector scaling.
    scale, bias = fit_vector_scaling(logits, labels, ALL)
    vector = objective(np.concatenate([np.diag(scale).ravel(), bias]))
    assert (vector - fitted > 0.01) == (off_diagonal < 1)


@pytest.mark.parametrize("fit", FITS[1:])
def test_scaling_of_degenerate_examples(fit):
    """Finite, and as good as can be."""
    right = np.arange(300) % 4
    wrong = (right + 1) % 4
    logits = 3 * np.eye(4)[right]
    for name, x, labels, limit in (
        ("separable", logits, right, 0.01),
        ("misleading", logits, wrong, 1.4),
        ("constant", np.ones((300, 4)), right, 1.4),
        ("tiny", 1e-15 * logits, right, 0.01),
        ("huge", 1e15 * logits, right, 0.01),
        ("one class", logits, np.zeros(300, int), 0.01),
    ):
        multiplier, bias = fit(x, labels, ALL)
        assert np.all(np.isfinite(multiplier)), name
        assert np.all(np.isfinite(bias)), name
        if fit is fit_vector_scaling or name not in ("tiny", "one class"):  # penalties weigh
            loss = negative_log_likelihood(scaled(x, multiplier, bias), labels, 1)
            assert loss < limit, name
    # No rows that count.
    for part in fit(np.full((300, 4), np.nan), right, ~ALL):
        assert np.all(np.isfinite(part))


@pytest.mark.parametrize("fit", FITS[1:])
def test_scaling_of_groups_by_another_loss(fit, rng):
    """Each group gets what makes its own loss the smallest: no step of any parameter helps."""
    sets = [biased_examples(rng, n=40) for _ in range(2)]
    logits, labels = (np.stack(part) for part in zip(*sets, strict=True))
    weights = np.array([1.0, 2, 1, 1])
    multipliers, biases = jax.vmap(
        functools.partial(fit, loss=jsm.entmax_loss, class_weights=weights)
    )(logits, labels)
    for x, y, multiplier, bias in zip(logits, labels, multipliers, biases, strict=True):
        multiplier, bias = np.array(multiplier), np.array(bias)
        penalty = (
            (lambda m, b: np.mean(m[~np.eye(4, dtype=bool)] ** 2) + np.mean(b**2))
            if (multiplier.ndim == 2)
            else (lambda m, b: 0.0)
        )
        (case,) = (case for case in LOSSES if case.name == "entmax_loss")

        def objective(m, b, x=x, y=y, penalty=penalty, case=case):
            losses = case.reference(scaled(x, m, b), np.eye(4)[y])
            return np.average(losses, weights=weights[y]) + penalty(m, b)

        best = objective(multiplier, bias)
        for part in (multiplier, bias):
            for index in np.ndindex(part.shape):
                for step in (-1e-2, 1e-2):
                    part[index] += step
                    assert objective(multiplier, bias) > best - 1e-7
                    part[index] -= step


def test_penalty_pulls_vector_scaling_towards_the_temperature(rng):
    logits, labels = biased_examples(rng)
    t = float(fit_temperature(logits, labels))

    def objective(params, penalty):
        scale, bias = params[:4], params[4:]
        pull = penalty * (np.mean((t * scale - 1) ** 2) + np.mean(bias**2))
        return negative_log_likelihood(scaled(logits, scale, bias), labels, 1) + pull

    for penalty, far in ((0.3, True), (1e4, False)):
        scale, bias = fit_vector_scaling(logits, labels, ALL, penalty=penalty)
        fitted = objective(np.concatenate([scale, bias]), penalty)
        start = np.repeat([1 / t, 0.0], 4)
        assert fitted <= best_of_scipy(functools.partial(objective, penalty=penalty), start) + 1e-9
        assert np.any(np.abs(np.asarray(scale) * t - 1) > 1e-2) == far
        assert np.any(np.abs(bias) > 1e-2) == far


def test_labels_of_few_bits_may_be_of_many_classes(rng):
    labels = np.arange(256).repeat(2)
    logits = rng.normal(size=(512, 256)) + 4 * np.eye(256)[labels]
    weights = rng.uniform(0.1, 3, size=256)
    wanted, found = (
        calibration.fit_temperature(logits, y, class_weights=weights)
        for y in (labels, labels.astype(np.uint8))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_soft_labels_of_one_column_are_those_of_class_1(rng):
    logits = 3 * rng.normal(size=200)
    labels = rng.uniform(size=200) < 1 / (1 + np.exp(-logits / 2))
    wanted = calibration.fit_temperature(logits, labels.astype(np.int32))
    found = calibration.fit_temperature(logits, labels.astype(logits.dtype))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="weights"):
        calibration.fit_temperature(logits, labels * 1.0, weights=np.full(200, -1.0))
