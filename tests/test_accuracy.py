"""The last digits, against `mpmath`: of what users get, compiled as they compile it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special

import jaxsoftmax as jsm
from jaxsoftmax._platforms import _cpu
from tests.cases import FUNCTIONS, MAPPINGS, entmax_by_bisection, named
from tests.tools import exact_log_softmax, top_and_rest, ulp_error


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("length", "scale"), [*itertools.product([10, 200, 1000], [1, 10, 100]), (100_000, 10)]
)
def test_accuracy_in_ulp(dtype, scale, length):
    """Prints the errors beside those of `jax.nn`: `pytest -rP -k accuracy_in_ulp`."""
    # Long rows are few, for mpmath is slow: those of 1000 are the worst of the first eight seeds,
    # and of the longest each thousandth entry is looked at.
    seeds = {10: range(20), 200: range(9), 1000: (0, 6), 100_000: (0,)}[length]
    x = np.stack([np.random.default_rng(seed).normal(size=length) for seed in seeds])
    x = jnp.asarray(scale * x, dtype)
    tops = np.argmax(x, -1)
    looked_at = slice(None, None, 1000) if length > 1000 else slice(None)
    with mpmath.workdps(40):
        parts = [top_and_rest(row) for row in np.asarray(x)]
        of_tops = [rest for _, rest in parts]  # minus their log-softmax
        exact = np.array(
            [
                [(mpmath.mpf(float(z)) - top) - rest for z in row[looked_at]]
                for row, (top, rest) in zip(np.asarray(x), parts, strict=True)
            ]
        )
        shares = [mpmath.exp(z) for z in exact.ravel()]

        def error(fun, exact):
            return ulp_error(np.asarray(fun(x))[:, looked_at], exact)

        errors = {
            "log_softmax": error(jsm.log_softmax, exact),
            "softmax": error(jsm.softmax, shares),
            "logsumexp": ulp_error(jsm.logsumexp(x), [sum(p) for p in parts]),
            "cross_entropy": ulp_error(jsm.cross_entropy(x, tops), of_tops),
            "cross_entropy of the first": ulp_error(
                jsm.cross_entropy(x, np.zeros_like(tops)), -exact[:, 0]
            ),
        }
        theirs = [error(jax.nn.softmax, shares), error(jax.nn.log_softmax, exact)]
    print(f"{dtype}, scale {scale}, length {length}: ", {k: round(v, 2) for k, v in errors.items()})
    print("jax.nn.softmax and log_softmax:", [round(v, 2) for v in theirs])
    assert errors.pop("softmax") <= 6
    assert max(errors.values()) <= 4


ALONG = [((5003, 8), 0), ((3, 4100, 2), 1), ((4100, 3), (0, 1)), ((520, 9, 300), (0, 2))]


@pytest.mark.parametrize(("shape", "axis"), ALONG)
def test_accuracy_of_rows_along_any_axes(shape, axis, rng):
    """However many entries of a row lie apart in memory; scores of few values have no luck."""
    x = np.float32(rng.normal(size=shape).round())
    for ours, theirs in (
        (jsm.log_softmax, scipy.special.log_softmax),
        (jsm.logsumexp, scipy.special.logsumexp),
    ):
        exact = theirs(np.float64(x), axis)
        off = np.abs(np.float64(ours(x, axis=axis)) - exact)
        assert np.all(off <= 4 * np.spacing(np.abs(exact).astype(np.float32)))
    for mapping in (jsm.sparsemax, jsm.entmax15, functools.partial(jsm.entmax, alpha=1.3)):
        total = np.sum(np.float64(mapping(x, axis=axis)), axis)
        np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [0.0, -81.3, 1000.1])
@pytest.mark.parametrize("gap", [0.5, 5.0, 45.0])
def test_accuracy_where_one_class_dominates(dtype, shift, gap, rng):
    x = shift + rng.uniform(-1, 0, size=50)
    x[7] = shift + gap
    x = jnp.asarray(x, dtype)
    with mpmath.workdps(40):
        exact = exact_log_softmax(x)
        assert ulp_error(jsm.log_softmax(x), exact) <= 4
        assert ulp_error(jsm.cross_entropy(x, 7), [-exact[7]]) <= 4
        one_hot = jnp.zeros_like(x).at[7].set(1)
        assert ulp_error(jsm.cross_entropy(x, one_hot), [-exact[7]]) <= 4
        assert ulp_error(jsm.softmax(x), [mpmath.exp(z) for z in exact]) <= 6


@pytest.mark.parametrize(("length", "gap"), [(31, 87), (255, 80), (1000, 78)])
def test_sums_of_what_is_nearly_too_small(length, gap):
    """What rounding takes from such terms is below the smallest normal number."""
    x = np.zeros(length, np.float32)
    x[5] = gap
    with mpmath.workdps(60):
        exact = [-mpmath.log1p((length - 1) * mpmath.exp(-gap))]
        assert ulp_error(jsm.log_softmax(x)[5:6], exact) <= 4
        assert ulp_error(-jsm.cross_entropy(x, 5)[None], exact) <= 4


@pytest.mark.parametrize("scores", [(-0.99, -88.0), (-20.99, -108.0), (0.5, -86.5)])
def test_exponentials_that_are_nearly_too_small(scores):
    scores = jnp.asarray(scores, jnp.float32)
    top, other = map(float, scores)
    with mpmath.workdps(60):
        weight = mpmath.exp(mpmath.mpf(other) - mpmath.mpf(top))
        assert ulp_error(jsm.log_softmax(scores)[:1], [-mpmath.log1p(weight)]) <= 4
        assert ulp_error(jsm.softmax(scores)[1:], [weight / (1 + weight)]) <= 6


@pytest.mark.parametrize("scale", [1, 30, 300])
@pytest.mark.asks_for_x64
def test_cross_entropy_within_4_ulp(scale, rng):
    for dtype in ("float32", "float64"):
        scores = (scale * rng.normal(size=(20, 50))).astype(dtype)
        # The likeliest class of some rows, a random one of others.
        labels = np.where(np.arange(20) % 2, scores.argmax(-1), rng.integers(50, size=20))
        with mpmath.workdps(200):
            exact = [
                -exact_log_softmax(row)[label] for row, label in zip(scores, labels, strict=True)
            ]
            assert ulp_error(jsm.cross_entropy(scores, labels), exact) <= 4


@pytest.fixture(params=["as on a CPU", "at once"])
def sums(request, monkeypatch):
    """How sums of a row are taken in a reverse rule: as on this platform, or as on others."""
    if request.param == "at once":
        monkeypatch.delattr(_cpu, "sums_at_once")
        jax.clear_caches()
    yield
    if request.param == "at once":
        monkeypatch.undo()
        jax.clear_caches()


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 18), ("float32", 45), ("float64", 40)])
@pytest.mark.asks_for_x64
@pytest.mark.usefixtures("sums")
def test_gradient_of_the_entry_that_dominates(dtype, gap):
    z, first = jnp.array([gap, 0, 1], dtype), jnp.array([1, 0, 0], dtype)
    with mpmath.workdps(60):
        others = [mpmath.exp(-gap), mpmath.exp(1 - gap)]
        p = [float(w / (1 + sum(others))) for w in (1, *others)]
    rest = p[1] + p[2]
    rtol = 1e-5 if dtype == "float32" else 1e-13
    surprises = [lambda z: jsm.cross_entropy(z, first), lambda z: jsm.cross_entropy(z, 0)]
    surprises.append(lambda z: -jsm.log_softmax(z)[0])
    for surprise in surprises:
        np.testing.assert_allclose(jax.grad(surprise)(z), [-rest, p[1], p[2]], rtol=rtol)
        np.testing.assert_allclose(jax.jvp(surprise, (z,), (first,))[1], -rest, rtol=rtol)
    row = np.array([p[0] * rest, -p[0] * p[1], -p[0] * p[2]])
    for jacobian in (jax.jacrev(jsm.softmax)(z), jax.jacfwd(jsm.softmax)(z)):
        np.testing.assert_allclose(jacobian[0], row, rtol=rtol)
        np.testing.assert_allclose(jacobian[:, 0], row, rtol=rtol)


def test_gradient_of_what_is_nearly_certain():
    gradient = jax.grad(jsm.cross_entropy)(np.array([70.0, 0.0, -5.0]), np.array(0))
    others = np.exp([-70.0, -75.0])
    np.testing.assert_allclose(gradient, [-others.sum(), *others], rtol=1e-14)


@pytest.mark.parametrize("case", **named(FUNCTIONS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_half_precision_is_rounded_once(case, dtype, scale, rng):
    x = jnp.asarray(scale * rng.normal(size=(20, 33)), dtype)
    out = case.fun(x)
    assert out.dtype == dtype
    # float64 is exact enough to tell 0.5 from 0.51 of these units. Below the normal numbers they
    # are those of the smallest one; float16 gets there. XLA flushes what is below that of float32.
    exact = case.reference(np.asarray(x, np.float64))
    exact[np.abs(exact) < np.finfo(np.float32).tiny] = 0
    finfo = jnp.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(exact), float(finfo.tiny)))
    unit = np.ldexp(1.0, exponent - 1 - finfo.nmant)
    assert np.max(np.abs(np.asarray(out, np.float64) - exact) / unit) <= 0.51


@pytest.mark.parametrize("case", **named([c for c in MAPPINGS if c.simplex]))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_sum_to_one(case, dtype, rng):
    x = jnp.asarray(3 * rng.normal(size=(50, 200)), dtype)
    p = case.probabilities(x)
    assert np.all(p >= 0)
    total = p.astype(np.float64).sum(-1)
    np.testing.assert_allclose(total, 1, rtol=20 * float(jnp.finfo(dtype).eps))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "row",
    [
        -(2.0 ** np.arange(60)),  # geometric scores: support of one, many passes for Michelot
        -(0.5 ** np.arange(60)),
        np.r_[np.zeros(3000), 1e-3],
        np.r_[1e4, np.linspace(-1, 0, 3000)],  # one outlier
        np.linspace(0, 1e-4, 5000),  # nearly equal
        np.repeat([0.0, -1e-3, -0.5], 1000),  # huge ties
        1 + 1e-7 * np.arange(4096),
        1e30 * np.arange(5),
    ],
    ids=["doubling", "halving", "tied", "outlier", "flat", "steps", "offset", "huge"],
)
def test_adversarial_rows(name, dtype, row):
    row = jnp.asarray(row, dtype)
    alpha = {"sparsemax": 2, "entmax15": 1.5}[name]
    exact = entmax_by_bisection(np.asarray(row, np.float64), alpha)
    p = np.asarray(getattr(jsm, name)(row), np.float64)
    # The threshold is as exact as the differences of scores, some ulp of the largest.
    np.testing.assert_allclose(p, exact, atol=8 * float(jnp.finfo(dtype).eps), rtol=1e-3)
    np.testing.assert_allclose(p.sum(), 1, rtol=20 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("shape", [(4096, 1024), (1000, 509)], ids=str)
@pytest.mark.parametrize("scale", [1, 10, 100])
def test_accuracy_of_many_rows(shape, scale, rng):
    """Against float64, which is exact enough for float32: more entries than mpmath has time for.

    One row in 20,000 is beyond 4 ulp: rounding errors of two exponentials, of their product, and of
    the logarithm have one sign.
    """
    x = (scale * rng.normal(size=shape)).astype(np.float32)
    gaps = x.astype(np.float64) - x.max(-1, keepdims=True)
    others = np.exp(np.where(gaps == 0, -np.inf, gaps)).sum(-1, keepdims=True)
    exact = gaps - np.log1p(others)

    def error(out, exact):
        unit = np.maximum(np.spacing(np.abs(exact).astype(np.float32)), np.finfo(np.float32).tiny)
        return np.max(np.abs(np.asarray(out) - exact) / unit)

    assert error(jax.jit(jsm.softmax)(x), np.exp(exact)) <= 6
    assert error(jax.jit(jsm.log_softmax)(x), exact) <= 5
