"""What every mapping promises at the edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from jaxsoftmax.testing import _of_row
from tests import tools
from tests.cases import ARCTAN, FUNCTIONS, MAPPINGS, SQUAREPLUS, named

every_function = pytest.mark.parametrize("case", **named(FUNCTIONS))
every_mapping = pytest.mark.parametrize("case", **named(MAPPINGS))
tempered = pytest.mark.parametrize(
    "case", **named([c for c in FUNCTIONS if c.takes("temperature")])
)
of_simplex = pytest.mark.parametrize("case", **named([c for c in MAPPINGS if c.simplex]))

INF, NAN = np.inf, np.nan
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
equal = np.testing.assert_array_equal

# All rows of three such scores, under all masks: 5,832 rows.
HUGE = tools.huge()
EXTREMES = [-INF, -HUGE, -1.0, 0.0, 0.5, 1 / HUGE, HUGE, INF, NAN]
ROWS = np.array(list(itertools.product(EXTREMES, repeat=3)), tools.FLOAT)
MASKS = np.array(list(itertools.product([False, True], repeat=3)))
ROWS, MASKS = np.repeat(ROWS, len(MASKS), 0), np.tile(MASKS, (len(ROWS), 1))
HIDDEN = np.where(MASKS, ROWS, -INF)
HAS_NAN = np.any(MASKS & np.isnan(ROWS), -1)
IS_EMPTY = np.all(HIDDEN == -INF, -1)


@pytest.mark.parametrize("form", [SQUAREPLUS, ARCTAN], ids=["squareplus", "arctan"])
def test_infinite_scores_share_a_row_of_any_form(form):
    equal(jsm.threshold_mapping(form)(np.array([INF, 1, INF])), [0.5, 0, 0.5])


@pytest.mark.thorough
@of_simplex
@pytest.mark.asks_for_nan
def test_all_extreme_rows_under_all_masks(case):
    def reference(row):
        with np.errstate(over="ignore"):
            out = case.reference(np.float64(row))
        return np.exp(out) if case.gives == "logarithms" else out

    expected = np.array([_of_row(reference, row) for row in HIDDEN])
    p = case.probabilities(ROWS, where=MASKS)
    # An excluded entry beside a NaN: the row has no answer, whatever stands there.
    undefined = HAS_NAN[:, None] & ~MASKS
    np.testing.assert_allclose(
        np.where(undefined, 0, p), np.where(undefined, 0, expected), rtol=1e-12, atol=1e-15
    )
    assert np.all(p[~MASKS & ~HAS_NAN[:, None]] == 0)
    assert np.all(p[(HIDDEN == -INF) & ~HAS_NAN[:, None]] == 0)


@every_function
@pytest.mark.asks_for_nan
def test_gradients_of_all_extreme_rows_under_all_masks(case):
    """Never NaN where the row is not, and 0 for what is excluded even there."""
    out, pull_back = jax.vjp(lambda x: case.fun(x, where=MASKS), ROWS)
    cotangent = np.cos(np.arange(out.size)).reshape(out.shape)
    (gradient,) = pull_back(cotangent)
    assert np.all(np.isfinite(gradient[~HAS_NAN]))
    assert np.all(gradient[~MASKS] == 0)
    assert np.all(gradient[IS_EMPTY] == 0)
    assert np.all(np.asarray(gradient)[(HIDDEN == -INF) & ~HAS_NAN[:, None]] == 0)


@every_mapping
@pytest.mark.asks_for_nan
def test_forward_mode_of_all_extreme_rows_under_all_masks(case):
    tangent = np.broadcast_to(np.array([1.0, -0.3, 2.0]), ROWS.shape)
    along = jax.jvp(lambda x: case.fun(x, where=MASKS), (ROWS,), (tangent,))[1]
    assert np.all(np.isfinite(along[~HAS_NAN]))
    assert np.all(along[IS_EMPTY] == 0)
    if case.gives == "probabilities":
        assert np.all(np.asarray(along)[~MASKS & ~HAS_NAN[:, None]] == 0)


@pytest.mark.thorough
@tempered
@pytest.mark.asks_for_nan
def test_gradients_in_temperature_of_all_extreme_rows(case):
    temperature = np.full((len(ROWS), 1), 0.7)
    fun = lambda t: case.fun(ROWS, where=MASKS, temperature=t)  # noqa: E731
    out, pull_back = jax.vjp(fun, temperature)
    (gradient,) = pull_back(jnp.where(jnp.isfinite(out), jnp.ones_like(out), 0))
    assert np.all(np.isfinite(gradient[~HAS_NAN]))
    assert np.all(gradient[IS_EMPTY] == 0)
    along = jax.jvp(fun, (temperature,), (np.ones_like(temperature),))[1]
    assert np.all(np.isfinite(along[~HAS_NAN]))


@every_mapping
@pytest.mark.asks_for_nan
def test_nan_stays_in_its_row(case):
    x = np.array([[1.0, NAN, 2.0], [1.0, 0.5, -INF]])
    p = case.probabilities(x)
    assert np.all(np.isnan(p[0]))
    close(p[1], case.probabilities(x[1]))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(case.fun(x))[1, :2]))(x)
    assert np.all(np.isfinite(gradient[1]))
    # Whoever watches the gradients sees it, too.
    spoiled = jax.grad(lambda x: jnp.sum(jnp.sin(case.fun(x))))(x)
    assert np.any(np.isnan(spoiled[0]))


@pytest.mark.thorough
@every_function
@pytest.mark.parametrize("shape", [(22_000, 3), (40, 1700)], ids=str)
@pytest.mark.asks_for_nan
def test_nan_is_not_lost_in_large_arrays(case, shape):
    """XLA reduces large arrays by other code, whose maximum ignores NaN."""
    rows = np.arange(shape[0])
    x = np.zeros(shape)
    x[rows, rows * 7 % shape[1]] = NAN
    x[::2] = 0.0
    for kwargs in [{}, {"temperature": 0.0}] if case.takes("temperature") else [{}]:
        out = case.fun(x, **kwargs)
        assert np.all(np.isnan(out[1::2]))
        assert not np.any(np.isnan(out[::2]))


@pytest.mark.parametrize("fun", [jsm.softmax, jsm.log_softmax, jsm.logsumexp])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(16_384, 64), (5000, 203), (40, 1700)], ids=str)
@pytest.mark.asks_for_nan
def test_nan_beside_infinity_in_large_arrays(fun, dtype, shape):
    """XLA for CPU has code for softmax in float32 whose minimum loses a NaN that comes first."""
    rows = np.arange(shape[0])
    x = np.zeros(shape, np.float32)
    x[:, 2] = np.where(rows % 3, INF, 1)
    x[rows, rows % shape[1]] = np.where(rows % 2, NAN, 0)
    out = np.asarray(fun(jnp.asarray(x, dtype))).reshape(shape[0], -1)
    assert np.all(np.isnan(out[1::2]))
    assert not np.any(np.isnan(out[::2]))


@pytest.mark.thorough
@every_function
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.asks_for_nan
def test_rows_of_large_arrays_are_as_those_of_small_ones(case, dtype):
    """XLA has other code for large arrays."""
    few = jnp.array([[INF, 1, 2], [1, 2, -INF], [1, INF, INF], [-INF] * 3, [NAN, 1, 0]], dtype)
    p = case.fun(few).astype(float)
    rows = np.arange(22_000) % len(few)
    # Another sum, and the same but for that.
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(case.fun(few[rows]).astype(float), p[rows], rtol=4 * ulp)
    np.testing.assert_allclose(jax.vmap(case.fun)(few[rows]).astype(float), p[rows], rtol=4 * ulp)


@pytest.mark.thorough
@of_simplex
@pytest.mark.parametrize(("dtype", "rows"), [("float32", 5000), ("float32", 40), ("float64", 40)])
def test_scores_that_are_products(case, dtype, rows, rng):
    """XLA does not round a product that a maximum is subtracted from, which makes no such sum."""
    x = (10.0 ** rng.uniform(0, 30, (rows, 1)) * rng.normal(size=(rows, 16))).astype(dtype)
    factor = np.asarray(0.7, dtype)
    outs = [jax.jit(lambda x, c, f=f: f(x * c))(x, factor) for f in (case.fun, jax.vmap(case.fun))]
    if case.takes("temperature"):
        outs.append(case.fun(x, temperature=0.7))
    for out in outs:
        p = np.exp(out) if case.gives == "logarithms" else np.asarray(out)
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", tools.IN_FLOAT64])
def test_softmax_of_large_scores(dtype):
    """Where whole numbers get sparse, and what is subtracted from scores has to be one."""
    finfo = jnp.finfo(dtype)
    top = 2.0 ** np.arange(0.0, 100, 0.25)[:, None] * [1, -1]
    top = top.reshape(-1, 1).astype(dtype)
    below = np.nextafter(top, top.dtype.type(-INF))
    x = np.concatenate([top, below, top - 1, top - 20, top - 80, 0 * top], -1)
    for length in (6, 600):  # the longer the row, the less room there is
        scores = np.tile(x, length // 6)
        reference = scores - scores.max(-1, keepdims=True).astype("longdouble")
        reference = np.exp(reference) / np.exp(reference).sum(-1, keepdims=True)
        error = np.abs(np.asarray(jsm.softmax(scores)) - reference)
        assert np.all(error <= 6 * finfo.eps * reference + finfo.tiny)


@every_mapping
def test_nothing_takes_part(case):
    x = np.array([[1.0, 2.0], [-INF, -INF]])
    empty = -INF if case.gives == "logarithms" else 0.0
    equal(case.fun(x, where=False), np.full((2, 2), empty))
    equal(case.fun(x)[1], np.full(2, empty))
    finite = case.fun(x[:1])
    close(case.fun(x, where=np.array([[True], [False]]))[:1], finite)


@pytest.mark.asks_for_nan
def test_logsumexp_at_the_edges():
    x = np.array([[NAN, 1, 2], [-INF, -INF, -INF], [INF, 1, INF], [-INF, 1, -INF]])
    equal(jsm.logsumexp(x), [NAN, -INF, INF, 1])
    equal(jsm.logsumexp(x, where=np.array([False, True, False])), [1, -INF, 1, 1])
    equal(jsm.logsumexp(x, where=False), np.full(4, -INF))
    equal(jsm.logsumexp(np.zeros((4, 0))), np.full(4, -INF))
    gradient = jax.grad(lambda x: jnp.sum(jsm.logsumexp(x)[1:]))(x)
    equal(gradient[1:], [[0, 0, 0], [0.5, 0, 0.5], [0, 1, 0]])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_few_bits_under_a_mask(dtype, rng):
    """Some have no infinity, but what takes no part has no share."""
    x, where = jnp.asarray(rng.normal(size=(3, 6)), dtype), np.arange(6) < 4
    wide = x.astype(np.float32)
    for fun in (jsm.log_softmax, jsm.softmax):
        left = fun(x, where=where)[:, :4]
        np.testing.assert_array_equal(left, fun(wide, where=where)[:, :4].astype(dtype))
    sums = jsm.logsumexp(wide, where=where)
    np.testing.assert_array_equal(jsm.logsumexp(x, where=where), sums.astype(dtype))
    losses = [jsm.cross_entropy(z, np.arange(3), where=where) for z in (x, wide)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_draws_of_no_rows_and_attention_to_no_keys():
    draws = jsm.sample(jax.random.key(0), np.zeros((0, 3)), shape=(2, 0), replace=False)
    assert draws.shape == (2, 0)
    query, none = np.zeros((2, 3, 2, 4)), np.zeros((2, 0, 2, 4))
    np.testing.assert_array_equal(jsm.attention_fn(query, none, none), np.zeros_like(query))
    assert jsm.attention_fn(none, query, query).shape == none.shape
