"""Beta calibration and isotonic regression, against SciPy's optimizer and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.isotonic import IsotonicRegression

from jaxsoftmax import calibration

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)


def lenient(fit):
    """The function itself; optax, beneath it, mixes integers of two widths."""

    @functools.wraps(fit)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return fit(*args, **kwargs)

    return call


fit_beta_scaling = lenient(calibration.fit_beta_scaling)
fit_isotonic = calibration.fit_isotonic
beta_scaling, isotonic = calibration.beta_scaling, calibration.isotonic
PAIRS = [(fit_beta_scaling, beta_scaling), (fit_isotonic, isotonic)]


def events(rng, n=400, power=2.0):
    """What is predicted with `p` comes true with `p ** power`."""
    p = rng.beta(0.7, 0.7, size=n).clip(1e-6, 1 - 1e-6)
    return p, (rng.random(n) < p**power).astype(int)


def of_classes(rng, n=400):
    probs = rng.dirichlet(np.full(3, 0.7), size=n)
    wrong = probs**1.7
    wrong /= wrong.sum(-1, keepdims=True)
    return probs, np.array([rng.choice(3, p=row) for row in wrong])


def beta_loss(params, p, y, weights=None, penalty=0.0):
    a, b, c = params
    z = a * np.log(p) - b * np.log1p(-p) + c
    pull = penalty * np.sum((np.array(params) - [1, 1, 0]) ** 2) / 3
    return np.average(np.logaddexp(0, z) - y * z, weights=weights) + pull


def best_beta(p, y, **options):
    """By another optimizer, that knows of bounds."""
    return scipy.optimize.minimize(
        beta_loss,
        [1.0, 1.0, 0.0],
        args=(p, y, *options.values()),
        bounds=[(0, None), (0, None), (None, None)],
        options={"ftol": 1e-15, "gtol": 1e-9},
    )


# The last two have a and b at their bound.
EVENTS = {
    "too sure": lambda rng: events(rng),
    "too modest": lambda rng: events(rng, power=0.3),
    "misleading": lambda rng: (lambda p, y: (p, 1 - y))(*events(rng)),
    "bent at one end": lambda rng: (lambda p: (p, (rng.random(400) < 0.4 * p).astype(int)))(
        rng.beta(1, 1, size=400)
    ),
}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.asks_for_x64
def test_beta_scaling_equals_scipy(name, rng):
    p, y = EVENTS[name](rng)
    for penalty in (0.0, 0.1):
        fitted = np.ravel(fit_beta_scaling(p, y, penalty=penalty))
        assert np.all(fitted[:2] >= 0)
        best = best_beta(p, y, weights=None, penalty=penalty)
        assert beta_loss(fitted, p, y, penalty=penalty) <= best.fun + 1e-8
        np.testing.assert_allclose(fitted, best.x, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("count", [0, 1, 200])
def test_beta_scaling_of_a_class_that_no_row_finds_likely(count):
    """There a penalty is far steeper than the likelihood in `b`, and that in `a` than in all."""
    y = (np.arange(400) < count).astype(int)
    for size in (1e-20, 1e-10, 1e-3):
        p = size * np.linspace(0.5, 1, 400)
        for penalty in (0.1, 100.0):
            fitted = np.ravel(fit_beta_scaling(p, y, penalty=penalty))
            best = best_beta(p, y, weights=None, penalty=penalty)
            assert beta_loss(fitted, p, y, penalty=penalty) <= best.fun + 1e-6


def test_beta_scaling_of_weights_and_classes(rng):
    probs, labels = of_classes(rng)
    weights = rng.random(400)
    fitted = fit_beta_scaling(probs, labels, weights=weights)
    assert all(x.shape == (3,) for x in fitted)
    for k, params in enumerate(np.transpose(fitted)):
        p, y = probs[:, k], labels == k
        assert beta_loss(params, p, y, weights) <= best_beta(p, y, weights=weights).fun + 1e-8
    a, b, c = np.array(fitted)
    each = 1 / (1 + np.exp(-(a * np.log(probs) - b * np.log1p(-probs) + c)))
    close(beta_scaling(probs, *fitted), each / each.sum(-1, keepdims=True))


def test_beta_scaling_where_all_is_sure():
    """Finite, and as good as can be."""
    p, y = np.repeat([0.0, 1.0], 200), np.repeat([0, 1], 200)
    for outcome in (y, 1 - y, 0 * y, 1 + 0 * y):
        a, b, c = fit_beta_scaling(p, outcome)
        assert np.all(np.isfinite([a, b, c]))
        mended = beta_scaling(p, a, b, c)
        expected = outcome if np.any(outcome != 1 - y) else 0.5
        np.testing.assert_allclose(mended, expected, atol=1e-3)


@pytest.mark.parametrize("distinct", [7, 100, 10**6])
def test_isotonic_equals_scikit_learn(distinct, rng):
    """Few values tie."""
    p, _ = events(rng)
    p = np.ceil(p * distinct) / distinct
    y = (rng.random(400) < p**2).astype(int)
    weights = rng.random(400)
    q = np.linspace(0, 1, 1001)
    for options in ({}, {"weights": weights}):
        points, values = fit_isotonic(p, y, **options)
        assert points.shape == values.shape == (1, 402)
        theirs = IsotonicRegression(out_of_bounds="clip").fit(p, y, *options.values())
        close(isotonic(q, points, values), theirs.predict(q))
    close(isotonic(q[:, None], points, values)[:, 0], theirs.predict(q))


@pytest.mark.asks_for_nan
def test_isotonic_keeps_nan():
    points, values = fit_isotonic(np.array([0.1, 0.2, 0.6, 0.9]), np.array([0, 1, 0, 1]))
    found = isotonic(np.array([np.nan, 0.5]), points, values)
    assert np.isnan(found).tolist() == [True, False]
    points, values = (np.repeat(x, 2, 0) for x in (points, values))
    found = isotonic(np.array([[np.nan, 0.5], [0.3, 0.7]]), points, values)
    assert np.isnan(found).tolist() == [[True, True], [False, False]]


def test_isotonic_where_it_takes_many_rounds():
    """One low value after many rising ones takes them down one after the other."""
    y = np.repeat([0, 1] * 30, np.array([[30 - i, 1 + i] for i in range(30)]).ravel())
    y = np.concatenate([y, np.zeros(4000, int)])
    p = np.linspace(0, 1, len(y))
    points, values = fit_isotonic(p, y)
    close(isotonic(p, points, values), IsotonicRegression().fit(p, y).predict(p))


def test_isotonic_of_classes(rng):
    """One class after the other, made to sum to 1, as scikit-learn's classifiers are mended."""
    probs, labels = of_classes(rng)
    each = [
        IsotonicRegression(out_of_bounds="clip").fit(p, labels == k).predict(p)
        for k, p in enumerate(probs.T)
    ]
    wanted = np.stack(each, -1)
    close(isotonic(probs, *fit_isotonic(probs, labels)), wanted / wanted.sum(-1, keepdims=True))
    nothing = np.zeros((2, 3)), np.tile([[0.0, 1.0]], (3, 1)), np.zeros((3, 2))
    close(isotonic(*nothing), 1 / 3)


@pytest.mark.parametrize(("fit", "mend"), PAIRS)
def test_rows_that_do_not_count(fit, mend, rng):
    probs, labels = of_classes(rng)
    where = rng.random(400) < 0.6
    odd, wrong = np.where(where[:, None], probs, [np.nan, 7, -np.inf]), np.where(where, labels, 9)
    wanted = mend(probs, *fit(probs[where], labels[where]))
    nearly = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    nearly(mend(probs, *fit(odd, wrong, where)), wanted)
    nearly(mend(probs, *fit(odd, wrong, weights=2.0 * where)), wanted)
    pairs = odd.reshape(2, 200, 3), wrong.reshape(2, 200), where.reshape(2, 200)
    nearly(mend(probs.reshape(2, 200, 3), *fit(*pairs)).reshape(400, 3), wanted)
    # Where nothing counts, nothing is changed.
    nearly(mend(probs, *fit(probs, labels, np.zeros(400, bool))), probs)
    nearly(mend(probs, *fit(np.zeros((0, 3)), np.zeros(0, int))), probs)


@pytest.mark.parametrize(("fit", "mend"), PAIRS)
def test_mended_is_better(fit, mend, rng):
    """On other examples, of one event and of classes; any order of the examples gives the same."""
    (p, y), (probs, labels) = events(rng, 2000), of_classes(rng, 2000)
    for predicted, came in ((p, y), (probs, labels)):
        half, other = slice(0, 1000), slice(1000, None)
        mended = mend(predicted[other], *fit(predicted[half], came[half]))
        assert mended.shape == predicted[other].shape
        before = calibration.brier_score(predicted[other], came[other])
        assert calibration.brier_score(mended, came[other]) < before - 0.005
        order = rng.permutation(1000)
        again = mend(predicted[other], *fit(predicted[half][order], came[half][order]))
        np.testing.assert_allclose(again, mended, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fit", "mend"), PAIRS)
def test_under_transformations(fit, mend, rng):
    p, y = (x.reshape(4, 100) for x in events(rng))
    each = [mend(*[p[i], *fit(p[i], y[i])]) for i in range(4)]
    fitted = jax.jit(jax.vmap(fit))(p, y)
    np.testing.assert_allclose(jax.vmap(mend)(p, *fitted), each, rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(mend(x, *fit(p[0], y[0]))))(p[0])
    step = 1e-6 * np.eye(100)[3]
    rise = (mend(p[0] + step, *fit(p[0], y[0])) - mend(p[0] - step, *fit(p[0], y[0])))[3] / 2e-6
    if mend is beta_scaling:
        np.testing.assert_allclose(slope[3], rise, rtol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(jnp.stack(jax.tree.leaves(fit(x, y[0])))))(p[0])
    np.testing.assert_array_equal(gradient, 0)
    assert mend(p[0].astype(np.float16), *fit(p[0], y[0])).dtype == np.float16


@pytest.mark.asks_for_nan
def test_wrong_calls(rng):
    p, y = events(rng)
    for fit in (fit_beta_scaling, fit_isotonic):
        with pytest.raises(ValueError, match="probs must be from 0 to 1, got 3"):
            fit(3 + 0 * p, y)
        with pytest.raises(ValueError, match="labels must be classes from 0 to 1, got 2"):
            fit(p, y + 1)
        assert np.all(np.isnan(jax.tree.leaves(jax.jit(fit)(p, y + 1))[-1]))
    with pytest.raises(ValueError, match="penalty must not be negative, got -1"):
        fit_beta_scaling(p, y, penalty=-1.0)
    with pytest.raises(ValueError, match="a must be of 2 classes, as probs of shape"):
        beta_scaling(np.full((4, 2), 0.5), *np.ones((3, 1)))
    with pytest.raises(ValueError, match="points must be of 2 classes, as probs of shape"):
        isotonic(np.full((4, 2), 0.5), np.zeros((1, 2)), np.zeros((1, 2)))


@pytest.mark.asks_for_nan
@pytest.mark.parametrize(("fit", "mend"), PAIRS)
def test_logits_are_not_mended(fit, mend, rng):
    fitted = fit(*events(rng))
    for logits, got in ((np.array([0.3, 3.0]), "3"), (np.array([0.3, -2.0]), "-2")):
        with pytest.raises(ValueError, match=f"probs must be from 0 to 1, got {got}; softmax"):
            mend(logits, *fitted)
        assert np.isnan(jax.jit(mend)(logits, *fitted)).tolist() == [False, True]
    rounded = np.array([-1e-3, 1 + 1e-3])
    np.testing.assert_array_equal(mend(rounded, *fitted), mend(np.array([0.0, 1.0]), *fitted))
