"""Entmax in its alpha, the solver on hard rows, and the family beside deep-spin/entmax."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests.cases import FUNCTIONS, LOSSES, SCORES, SOLVED, entmax_by_bisection, named
from tests.tools import primitives

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

ALPHAS = [1.0, 1 + 1e-6, 1.01, 1.1, 1.5, 1.9, 2.0, 2.5, 3.0, 4.0]


def exact_entmax(row, alpha):
    """Entmax of one row in 40 digits, by halving; `alpha` may be a little below 1."""
    with mpmath.workdps(40):
        beta = mpmath.mpf(alpha) - 1
        row = [mpmath.mpf(float(z)) for z in row]

        def p(z, tau):
            if beta == 0:
                return mpmath.exp(z - tau)
            base = 1 + beta * (z - tau)
            return base ** (1 / beta) if base > 0 else mpmath.mpf(0)

        low, high = max(row) - 1, max(row) + len(row)
        for _ in range(130):
            middle = (low + high) / 2
            enough = mpmath.fsum(p(z, middle) for z in row) >= 1
            low, high = (middle, high) if enough else (low, middle)
        return [p(z, low) for z in row]


def exact_slope(row, alpha):
    """The derivative of entmax in alpha, by central differences of 40 digits."""
    with mpmath.workdps(40):
        h = mpmath.mpf("1e-14")
        above, below = (exact_entmax(row, mpmath.mpf(alpha) + s * h) for s in (1, -1))
        return [float((a - b) / (2 * h)) for a, b in zip(above, below, strict=True)]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_and_slope_in_alpha(alpha):
    row = SCORES[0]
    exact = np.array(exact_entmax(row, alpha), float)
    np.testing.assert_allclose(jsm.entmax(row, alpha), exact, rtol=1e-13, atol=1e-15)
    traced, slope = jax.jvp(lambda a: jsm.entmax(row, a), (alpha,), (1.0,))
    np.testing.assert_allclose(traced, exact, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope, exact_slope(row, alpha), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        jax.jacrev(jsm.entmax, argnums=1)(row, alpha), slope, rtol=1e-12, atol=1e-14
    )


def test_one_alpha_per_row():
    x = np.stack([SCORES[0]] * len(ALPHAS))
    alphas = np.array(ALPHAS)[:, None]
    each = np.array([jsm.entmax(SCORES[0], a) for a in ALPHAS])
    np.testing.assert_allclose(jsm.entmax(x, alphas), each, rtol=1e-12, atol=1e-15)
    per_head = jax.vmap(lambda a: jsm.entmax(SCORES[0], a))(np.array(ALPHAS))
    np.testing.assert_allclose(per_head, each, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("alpha", "mapping"), [(1.0, jsm.softmax), (1.5, jsm.entmax15), (2.0, jsm.sparsemax)]
)
def test_at_its_special_alphas(alpha, mapping):
    for given_alpha in (alpha, jnp.asarray(alpha)):
        fun = functools.partial(jsm.entmax, alpha=given_alpha)
        np.testing.assert_allclose(fun(SCORES), mapping(SCORES), rtol=1e-13, atol=1e-15)
        jacobians = [jax.jacrev(f)(SCORES[0]) for f in (fun, mapping)]
        np.testing.assert_allclose(*jacobians, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [1.0, 1 + 1e-6, 1.3, 2.5])
def test_second_derivatives_in_scores_and_alpha(alpha):
    # Around 1 the differences would reach below it, where there is no entmax: one row, one side.
    if alpha < 1.1:
        second = jax.jacfwd(jax.jacrev(jsm.entmax, argnums=1), argnums=1)(SCORES[0], alpha)
        h = 1e-4
        slopes = [exact_slope(SCORES[0], alpha + s * h) for s in (1, -1)]
        np.testing.assert_allclose(second, np.subtract(*slopes) / (2 * h), rtol=1e-6, atol=1e-8)
    else:
        check_grads(jsm.entmax, (SCORES, np.array([[alpha], [alpha + 0.1]])), order=2)


@pytest.mark.asks_for_nan
def test_alphas_out_of_range():
    for alpha in (0.99, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha must be at least 1 and finite, got"):
            jsm.entmax(SCORES, alpha)
    assert np.all(np.isnan(jsm.entmax(SCORES, jnp.asarray(0.5))))
    with pytest.raises(ValueError, match=r"alpha must broadcast to one value per row, shape \(2, "):
        jsm.entmax(SCORES, np.full(4, 1.5))
    with pytest.raises(TypeError, match="alpha must be real numbers"):
        jsm.entmax(SCORES, 1j)


# Rows on which a solver might not end, or end elsewhere.

solved = pytest.mark.parametrize("mapping", SOLVED.values(), ids=SOLVED)
HARD_ROWS = {
    "doubling": -(2.0 ** np.arange(100)),
    "halving": -(0.5 ** np.arange(100)),
    "tied": np.zeros(100),
    "near": 1 + 1e-7 * np.arange(100),
    "nearly tied": np.r_[np.zeros(99), 1e-6],
    "outlier": np.r_[1e30, np.linspace(-1, 1, 99)],
    "low outlier": np.r_[-1e30, np.linspace(-1, 1, 99)],
    "huge": 1e30 * np.linspace(-1, 1, 100),
    "partly absent": np.r_[np.full(50, -np.inf), np.linspace(0, 3, 50)],
    "alternating": np.tile([0.0, 0.5, 1.0, 1.0], 25),
    "one at the edge": np.r_[1.0, np.zeros(99)],
}


@solved
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hard_rows_sum_to_one(mapping, dtype):
    rows = jnp.asarray(np.stack(list(HARD_ROWS.values())), dtype)
    p = np.asarray(mapping(rows), np.float64)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=0, atol=8 * float(jnp.finfo(dtype).eps))
    assert np.all(p >= 0)
    order = np.argsort(rows, -1)
    assert np.all(np.diff(np.take_along_axis(p, order, -1), axis=-1) >= 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_where_many_are_at_the_edge_of_the_support(dtype, rng):
    """Where the slope is infinite, a rounding of the threshold may be much of the sum."""
    alpha = np.array([2.01, 2.5, 4.0, 20.0, 200.0], dtype)[:, None, None]
    distance = np.repeat([1e-3, 1e-8, 1e-10, 1e-12], 10)[:, None]
    x = -(1 + distance * rng.normal(size=(5, 40, 100))) / (alpha - 1)
    x[..., 0] = 0
    p = np.asarray(jsm.entmax(jnp.asarray(x, dtype), alpha), np.float64)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=0, atol=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.thorough
@solved
def test_long_ties_and_spacings(mapping):
    rows = np.stack([np.full(100_000, 0.3), 1e-7 * np.arange(100_000)]).astype(np.float32)
    p = np.asarray(mapping(rows), np.float64)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(p[0], 1e-5, rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.1, 1.3, 1.5, 2.0, 2.5, 3.0])
def test_long_rows_of_all_scales(alpha, rng):
    """They are solved for some of their scores first."""
    x = rng.normal(size=(3, 10, 1087)) * np.array([1.0, 0.1, 0.01])[:, None, None]
    x[0, 0, ::2] = -np.inf
    x[0, 1, 5] = 30
    actual, wanted = jsm.entmax(x, alpha), entmax_by_bisection(x, alpha)
    np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", **named([*FUNCTIONS, *LOSSES]))
def test_nothing_sorts(case):
    args = (SCORES, np.array([0, 1])) if case in LOSSES else (SCORES,)
    gradient = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(case.fun(*args))))(*args)
    sorts = {"sort", "top_k", "approx_top_k"}
    if not getattr(case, "in_order", False):
        sorts.add("cumsum")
    for jaxpr in (jax.make_jaxpr(case.fun)(*args), gradient):
        assert not sorts & primitives(jaxpr)


# Beside deep-spin/entmax, where it is installed: pip install -e ".[peers]".

COMPARED = {
    "sparsemax": (jsm.sparsemax, lambda e: e.sparsemax),
    "entmax15": (jsm.entmax15, lambda e: e.entmax15),
    **{
        f"entmax({a})": (
            functools.partial(jsm.entmax, alpha=a),
            lambda e, a=a: functools.partial(e.entmax_bisect, alpha=a, n_iter=80),
        )
        for a in (1.1, 1.3, 2.0, 2.6, 3.0)
    },
    **{
        f"normmax({a})": (
            functools.partial(jsm.normmax, alpha=a),
            lambda e, a=a: functools.partial(e.normmax_bisect, alpha=a, n_iter=80),
        )
        for a in (1.2, 1.5, 2.0, 3.0)
    },
    **{
        f"budget({b})": (
            functools.partial(jsm.budget_sparsemax, budget=b),
            lambda e, b=b: functools.partial(e.budget_bisect, budget=b, n_iter=80),
        )
        for b in (0.5, 2.2, 7.7)
    },
}


@pytest.mark.parametrize("name", COMPARED)
def test_equals_deep_spin(name, rng):
    torch = pytest.importorskip("torch")
    ours, theirs = COMPARED[name][0], COMPARED[name][1](pytest.importorskip("entmax"))
    x, cotangent = 2 * rng.normal(size=(6, 11)), rng.normal(size=(6, 11))
    scores = torch.tensor(x, requires_grad=True)
    expected = theirs(scores, dim=-1)
    expected.backward(torch.tensor(cotangent))
    p, pull_back = jax.vjp(ours, x)
    np.testing.assert_allclose(p, expected.detach().numpy(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(pull_back(cotangent)[0], scores.grad.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_slope_in_alpha_equals_deep_spin(alpha, rng):
    torch = pytest.importorskip("torch")
    entmax = pytest.importorskip("entmax")
    x, cotangent = 2 * rng.normal(size=(6, 11)), rng.normal(size=(6, 11))
    shape = torch.full((6, 1), alpha, dtype=torch.float64, requires_grad=True)
    entmax.entmax_bisect(torch.tensor(x), shape, n_iter=80).backward(torch.tensor(cotangent))
    _, pull_back = jax.vjp(lambda a: jsm.entmax(x, a), np.full((6, 1), alpha))
    np.testing.assert_allclose(pull_back(cotangent)[0], shape.grad.numpy(), rtol=0, atol=1e-6)
