"""Budget-sparsemax and normmax against NumPy references, and their contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests.cases import normmax_by_bisection

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5)) * 2
MASK = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [0, 1, 1, 1, 0]], bool)


def budget_row(z, budget):
    """Exact but for rounding: shifted to the score at which the budget is spent, in long double."""
    z, budget = np.asarray(z).astype(np.longdouble), np.longdouble(budget)
    p = np.zeros_like(z)
    firsts, finite = z == np.inf, np.isfinite(z)
    if firsts.sum() >= budget:
        p[firsts] = budget / max(firsts.sum(), 1)
        return p
    p[firsts] = 1
    budget = budget - firsts.sum()
    if budget >= finite.sum():
        p[finite] = 1
        return p
    gap = z[finite] - np.sort(z[finite])[::-1][int(np.ceil(budget)) - 1]
    knots = np.concatenate([gap, gap - 1, [-1, 0]])
    knots = np.unique(knots[(knots >= -1) & (knots <= 0)])
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = np.clip(gap - knots[middle], 0, 1).sum() >= budget
        low, high = (middle, high) if enough else (low, middle)
    at_low, at_high = (np.clip(gap - knots[i], 0, 1).sum() for i in (low, high))
    part = (at_low - budget) / (at_low - at_high) if at_low > at_high else 0
    p[finite] = np.clip(gap - knots[low] - part * (knots[high] - knots[low]), 0, 1)
    return p


@pytest.mark.parametrize("budget", [0, 0.5, 1, 2, 3.3, 7, 10.5, 11])
def test_budget_value(budget):
    x = RNG.normal(size=(6, 11)) * 2
    p = jsm.budget_sparsemax(x, budget)
    np.testing.assert_allclose(p, [budget_row(row, budget) for row in x], rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 2, 2.5, 4.0, 10.0])
def test_normmax_value(alpha):
    x = RNG.normal(size=(6, 11)) * 2
    p = jsm.normmax(x, alpha)
    np.testing.assert_allclose(p, normmax_by_bisection(x, alpha), rtol=0, atol=1e-13)


def test_normmax_jacobian():
    x = np.array([1.0, 0.8, 0.3, -1.0])
    for alpha in (1.4, 2.0, 3.5):
        p = np.asarray(jsm.normmax(x, alpha))
        norm = (p**alpha).sum() ** (1 / alpha)
        slope = np.where(p > 0, (np.where(p > 0, p, 1) / norm) ** (2 - alpha), 0) * norm
        centre = np.eye(4) - np.outer(p, np.ones(4))
        expected = centre @ np.diag(slope / (alpha - 1)) @ centre.T
        jacobian = jax.jacrev(jsm.normmax)(x, alpha)
        np.testing.assert_allclose(jacobian, expected, atol=1e-12)
        np.testing.assert_allclose(jax.jacfwd(jsm.normmax)(x, alpha), expected, atol=1e-12)


def test_limits_and_relatives():
    np.testing.assert_allclose(jsm.budget_sparsemax(X, 1), jsm.sparsemax(X), atol=1e-14)
    np.testing.assert_allclose(jsm.normmax(X, 1 + 1e-4), jsm.hardmax(X), atol=1e-3)
    support = np.asarray(jsm.normmax(X, 1e6) > 0)
    even = support / support.sum(-1, keepdims=True)
    np.testing.assert_allclose(jsm.normmax(X, 1e6), even, atol=1e-4)


ADVERSARIAL = {
    "normal": RNG.normal(size=1000),
    "wide": RNG.normal(size=1000) * 100,
    "narrow": RNG.normal(size=1000) / 100,
    "far": RNG.normal(size=1000) + 1e6,
    "long": RNG.normal(size=100_000),
    "outlier": np.r_[1e30, RNG.normal(size=1000)],
    "lowest": np.r_[-1e30, RNG.normal(size=1000)],
    "outliers": np.r_[1e30, -1e30, 3e38, -3e38, RNG.normal(size=1000)],
    "geometric": np.r_[2.0 ** -np.arange(0, 100), 2.0 ** np.arange(1, 100)],
    "geometric, both signs": np.r_[-(2.0 ** np.arange(-99, 100)), 2.0 ** np.arange(1, 100)],
    "equal": np.full(100_000, 3.7),
    "equal and large": np.full(100_000, 1e30),
    "alternating": np.tile([0.0, 0.5, 1.0, 2.0], 5000),
    "spaced": 1 + np.arange(10_000) * 1e-7,
    "spaced at 0": np.arange(10_000) * 1e-7,
    "large ties": np.r_[np.full(100, 1e30), np.full(100, -1e30), np.zeros(100)],
    "tiny": np.r_[1.0, RNG.normal(size=1000) * 1e-30],
    "infinite": np.r_[np.inf, np.inf, RNG.normal(size=100)],
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_budget_ends_on_any_row(case):
    z = ADVERSARIAL[case].astype(np.float32)
    for budget in (1e-6, 0.5, 1, 2, 3.3, 17.25, len(z) / 2, len(z) - 1, len(z) - 0.3):
        budget = np.float32(budget)
        # Traced: compiled once per case.
        p = np.asarray(jsm.budget_sparsemax(z, jnp.asarray(budget)))
        expected = budget_row(z, budget)
        np.testing.assert_allclose(p, expected, rtol=0, atol=2e-7)
        np.testing.assert_array_equal(p > 0, expected > 0)
        off = abs(p.astype(np.longdouble).sum() - budget)
        assert off <= 3 * np.spacing(budget), (budget, off)


@pytest.mark.parametrize("case", ["outliers", "geometric, both signs", "spaced at 0", "far"])
@pytest.mark.asks_for_x64
def test_budget_ends_on_any_row_in_float64(case):
    z = np.r_[ADVERSARIAL[case], 1e300, -1e300]
    for budget in (1e-6, 1.0, 3.3, 17.25, len(z) - 0.3):
        p = np.asarray(jsm.budget_sparsemax(z, jnp.asarray(budget)))
        np.testing.assert_allclose(p, budget_row(z, budget), rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", [1.01, 1.3, 2.0, 4.0])
def test_normmax_ends_on_any_row(alpha):
    for case in ("wide", "outlier", "geometric", "equal", "alternating", "spaced"):
        z = ADVERSARIAL[case].astype(np.float32)
        p = np.asarray(jsm.normmax(z, alpha))
        np.testing.assert_allclose(p.sum(dtype=np.float64), 1, atol=2e-6)
        shifted = np.maximum(z.astype(np.float64) - z.max(), -2)
        np.testing.assert_allclose(p, normmax_by_bisection(shifted, alpha), rtol=0, atol=5e-6)


def test_a_budget_that_is_clear_cut_leaves_no_specks():
    x = RNG.normal(size=(50, 6)).astype(np.float32) * 10
    best = np.argsort(-x, -1)
    for k in (1, 2, 3, 5):
        clear = np.take_along_axis(x, best[:, k - 1 : k], -1) - np.take_along_axis(
            x, best[:, k : k + 1], -1
        )
        p = np.asarray(jsm.budget_sparsemax(x, k))
        whole = ((p == 0) | (p == 1)).all(-1)
        np.testing.assert_array_equal(whole, clear[:, 0] >= 1)


@pytest.mark.thorough
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("fun", "values"),
    [(jsm.budget_sparsemax, [0.6, 1.7, 3.4]), (jsm.normmax, [1.4, 2.0, 3.1])],
)
@pytest.mark.asks_for_x64
def test_gradients_in_parameters(fun, values, per_row):
    def tempered(x, parameter, temperature):
        return fun(x, parameter, temperature=temperature)

    for value in [np.reshape(values, (3, 1))] if per_row else values:
        args = (X, jnp.asarray(value), jnp.full((3, 1) if per_row else (), 0.9))
        check_grads(tempered, args, order=2, modes=("rev",), rtol=1e-4, atol=1e-5)
        check_grads(tempered, args, order=1, modes=("fwd",), rtol=1e-4, atol=1e-5)


def test_numbers_known_and_traced_agree():
    for budget in (0.0, 0.3, 2.0, 5.0):
        traced = jax.jit(jsm.budget_sparsemax)(X, budget)
        np.testing.assert_allclose(traced, jsm.budget_sparsemax(X, budget), atol=1e-14)
    for alpha in (1.5, 2.0):
        traced = jax.jit(jsm.normmax)(X, alpha)
        np.testing.assert_allclose(traced, jsm.normmax(X, alpha), atol=1e-14)
    each = jsm.budget_sparsemax(X, jnp.array([[0.5], [1.0], [4.0]]))
    for i, budget in enumerate((0.5, 1.0, 4.0)):
        np.testing.assert_allclose(each[i], jsm.budget_sparsemax(X[i], budget), atol=1e-14)


@pytest.mark.asks_for_nan
def test_parameters_out_of_range():
    for budget in (-1, 5.5, np.nan):
        with pytest.raises(ValueError, match="budget must be from 0 to the number"):
            jsm.budget_sparsemax(X, budget)
    for alpha in (1, 0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha must be above 1"):
            jsm.normmax(X, alpha)
    with pytest.raises(ValueError, match="budget must broadcast"):
        jsm.budget_sparsemax(X, jnp.ones((2, 1)))
    with pytest.raises(TypeError, match="budget must be real"):
        jsm.budget_sparsemax(X, jnp.array(1j))
    assert jnp.all(jsm.budget_sparsemax(X, jnp.array(-1.0)) == 0)
    assert jnp.all(jsm.budget_sparsemax(X, jnp.array(9.0)) == 1)
    assert jnp.all(jnp.isnan(jsm.budget_sparsemax(X, jnp.array(jnp.nan))))
    np.testing.assert_array_equal(jsm.budget_sparsemax(X, jnp.array(9.0), where=MASK), MASK)
    assert jnp.all(jnp.isnan(jsm.normmax(X, jnp.array(1.0))))
    grad = jax.grad(lambda b: jsm.budget_sparsemax(X, b)[0, 0])(9.0)
    assert grad == 0


def test_infinite_scores_are_paid_first():
    x = np.array([[np.inf, 1, np.inf, 0, -np.inf], [np.inf, 1, 2, 3, -np.inf]])
    p, pullback = jax.vjp(functools.partial(jsm.budget_sparsemax, budget=2.3), x)
    np.testing.assert_allclose(p, [[1, 0.3, 1, 0, 0], [1, 0, 0.3, 1, 0]], atol=1e-14)
    assert np.all(np.isfinite(pullback(jnp.ones_like(p))[0]))
    p = jsm.budget_sparsemax(x, 0.7)
    np.testing.assert_allclose(p, [[0.35, 0, 0.35, 0, 0], [0.7, 0, 0, 0, 0]], atol=1e-14)


def test_temperature_zero_is_the_limit():
    x = np.float32([[3, 1, 1, 0, np.inf], [2, 2, 2, 2, -np.inf], [5, 4, 3, 2, 1]])
    for zero in (0, jnp.zeros((3, 1))):
        np.testing.assert_array_equal(jsm.normmax(x, temperature=zero), jsm.hardmax(x))
        np.testing.assert_allclose(
            jsm.budget_sparsemax(x, 1, temperature=zero), jsm.hardmax(x), atol=1e-7
        )
        np.testing.assert_allclose(
            jsm.budget_sparsemax(x, 3, temperature=zero),
            [[1, 0.5, 0.5, 0, 1], [0.75, 0.75, 0.75, 0.75, 0], [1, 1, 1, 0, 0]],
            atol=1e-7,
        )
