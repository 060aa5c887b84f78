"""What arguments may be: scalars, integers, empty arrays, and a temperature of 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from tests import tools
from tests.cases import FUNCTIONS, MAPPINGS, named

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

every_function = pytest.mark.parametrize("case", **named(FUNCTIONS))
tempered = pytest.mark.parametrize(
    "case", **named([c for c in FUNCTIONS if c.takes("temperature")])
)
hard_when_cold = pytest.mark.parametrize(
    "case",
    **named([c for c in MAPPINGS if c.takes("temperature") and c.name != "budget_sparsemax"]),
)
of_differences = pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if c.shifts]))
of_sets = pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if not c.in_order]))

INF, NAN = np.inf, np.nan
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
equal = np.testing.assert_array_equal


@every_function
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)], ids=str)
def test_axes_of_length_0(case, shape):
    x = np.zeros(shape, tools.FLOAT)
    for axis in (-1,) if case.in_order else (-1, None):
        out = case.fun(x, axis=axis)
        expected = x.sum(axis).shape if case.gives == "row value" else shape
        assert out.shape == expected
        assert out.dtype == x.dtype
    jacobian = jax.jit(jax.jacrev(case.fun))(x)
    assert jacobian.shape == (*case.fun(x).shape, *shape)


@of_differences
def test_scalars_need_axis_none(case):
    for value in (3.0, np.float64(-2.0), jnp.array(0.5)):
        expected = {"probabilities": 1.0, "logarithms": 0.0, "row value": value}
        assert case.fun(value, axis=None) == expected[case.gives]
        assert case.fun(value, axis=None).shape == ()
    slope = 1.0 if case.gives == "row value" else 0.0
    assert jax.grad(functools.partial(case.fun, axis=None))(3.0) == slope
    with pytest.raises(ValueError, match="axis -1 is out of range for an array of 0 dimensions"):
        case.fun(3.0)


@pytest.mark.thorough
@every_function
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "int64"])
def test_integers_become_the_default_float(case, dtype):
    x = np.array([[1, 0, 3], [2, 2, 5]], dtype)
    out = case.fun(x)
    assert out.dtype == tools.FLOAT
    close(out, case.fun(x.astype(float)))
    with jax.enable_x64(False):
        x = x.astype("int32" if dtype == "int64" else dtype)
        assert case.fun(x).dtype == np.float32


@every_function
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", tools.IN_FLOAT64])
def test_dtype_in_is_dtype_out(case, dtype):
    x = jax.ShapeDtypeStruct((2, 3), dtype)
    mask = np.array([True, False, True])
    assert jax.eval_shape(case.fun, x).dtype == dtype
    assert jax.eval_shape(lambda x: case.fun(x, where=mask), x).dtype == dtype
    if case.takes("temperature"):
        for t in (0.5, 0.0, jnp.float32(2), np.ones((2, 1)), jnp.ones((), "bfloat16"), np.int32(2)):
            assert jax.eval_shape(lambda x, t=t: case.fun(x, temperature=t), x).dtype == dtype


@hard_when_cold
@pytest.mark.asks_for_nan
def test_temperature_zero_is_hardmax(case):
    x = np.array([[1.0, 3.0, 3.0], [INF, 2.0, INF], [-INF, -INF, -INF], [-4.0, -INF, -5.0]])
    where = np.array([True, True, False])
    hard = jsm.hardmax(x)
    for zero in (0, 0.0, -0.0, np.float32(0), np.int64(0), jnp.array(0.0), np.zeros((4, 1))):
        equal(case.probabilities(x, temperature=zero), hard)
    hard = jsm.hardmax(x, where=where)
    for zero in (0, jnp.array(0.0)):
        equal(case.probabilities(x, where=where, temperature=zero), hard)
        assert np.all(np.isnan(case.fun(np.array([1.0, NAN]), temperature=zero)))


@pytest.mark.thorough
@tempered
def test_temperature_zero_has_no_gradient(case):
    x = np.array([[1.0, 3.0, 3.0], [INF, 2.0, INF], [-INF, -INF, -INF], [-4.0, -INF, -5.0]])
    for t in (0.0, np.zeros((4, 1))):
        fun = functools.partial(case.fun, temperature=t)
        out, pull_back = jax.vjp(fun, x)
        equal(pull_back(jnp.ones_like(out))[0], np.zeros_like(x))
        along = jax.jvp(fun, (x,), (np.ones_like(x),))[1]
        equal(along, np.zeros_like(along))
    by_temperature = jax.grad(
        lambda t: jnp.sum(jnp.where(jnp.isfinite(out := case.fun(x, temperature=t)), out, 0))
    )(np.zeros((4, 1)))
    equal(by_temperature, np.zeros((4, 1)))


@pytest.mark.thorough
@tempered
def test_temperature_zero_in_some_rows(case):
    x = np.array([[1.0, 3.0, 2.5], [1.0, 3.0, 2.5]])
    t = np.array([[0.0], [2.0]])
    out = case.fun(x, temperature=t)
    equal(out[0], case.fun(x[0], temperature=0.0))
    close(out[1], case.fun(x[1], temperature=2.0))
    gradient = jax.grad(lambda x: jnp.sum(case.fun(x, temperature=t)[1]))(x)
    equal(gradient[0], np.zeros(3))
    expected = jax.grad(lambda x: jnp.sum(case.fun(x, temperature=2.0)))(x[1])
    close(gradient[1], expected)


def test_logsumexp_at_temperature_zero():
    x = np.array([[2.0, 1.0], [-2.0, -3.0], [-INF, -INF], [0.0, -1.0], [0.0, 0.0]])
    for zero in (0.0, jnp.array(0.0)):
        close(jsm.logsumexp(x, temperature=zero), [INF, -INF, -INF, 0, np.log(2)])


SWEPT = {
    "temperature": lambda x, number: jsm.softmax(x, temperature=number),
    "alpha of entmax": jsm.entmax,
    "alpha of normmax": jsm.normmax,
    "alpha of a loss": lambda x, number: jsm.entmax_loss(x, np.zeros_like(x), number),
    "alpha of an entropy": jsm.tsallis_entropy,
}


@pytest.mark.parametrize("function", SWEPT.values(), ids=SWEPT)
def test_nothing_is_compiled_for_one_number_alone(function, caplog):
    x, longer = np.ones((2, 23)), np.ones((3, 23))
    function(x, 1.25)
    with jax.log_compiles():
        function(x, 1.75)
        assert "Compiling" not in caplog.text
        function(longer, 1.75)
        assert "Compiling" in caplog.text


@of_sets
def test_axis_may_be_a_list_or_a_numpy_integer(case):
    x = np.arange(6.0).reshape(2, 3)
    equal(case.fun(x, axis=[0, 1]), case.fun(x, axis=(0, 1)))
    equal(case.fun(x, [0, 1]), case.fun(x, axis=(0, 1)))
    equal(case.fun(x, axis=np.int64(0)), case.fun(x, axis=0))


@tempered
@pytest.mark.asks_for_nan
def test_a_negative_temperature_that_is_traced_gives_nan(case):
    t = np.array([[2.0], [-1.0]])
    out = case.fun(np.ones((2, 3)), temperature=t)
    assert np.all(np.isnan(out[1]))
    assert not np.any(np.isnan(out[0]))
