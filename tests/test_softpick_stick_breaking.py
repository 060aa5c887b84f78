"""What is particular to softpick and to stick-breaking."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from tests.cases import break_from_the_end, pick_softly
from tests.tools import on_mesh

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

RNG = np.random.default_rng(0)


def test_softpick_kinks():
    x = np.array([0.0, 1.0, -1.0])
    jacobian = jax.jacrev(jsm.softpick)(x)
    np.testing.assert_array_equal(jacobian[0], 0)
    np.testing.assert_array_equal(jacobian[:, 0], 0)
    for zeros in (np.zeros(3), np.full(3, -1e-320)):
        assert np.all(jsm.softpick(zeros) == 0)
        assert np.all(np.isfinite(jax.jacrev(jsm.softpick)(zeros)))
    assert np.all(jsm.softpick(-np.arange(1.0, 4)) == 0)


def test_softpick_extremes():
    tiny = np.float32([1e-6, 2e-6, -1e-6])
    np.testing.assert_allclose(jsm.softpick(tiny), pick_softly(np.float64(tiny)), rtol=5e-7)
    large = np.float32([95.5, 94.25, -3.0, 20.0])
    np.testing.assert_allclose(jsm.softpick(large), pick_softly(np.float64(large)), rtol=5e-7)
    huge = np.float32([3e38, 3e38, -3e38, 1.0])
    np.testing.assert_array_equal(jsm.softpick(huge), [0.5, 0.5, 0, 0])
    # Excluded and -inf: not in the denominator either.
    np.testing.assert_allclose(jsm.softpick(np.float32([1, -np.inf])), [1, 0])
    assert np.all(np.isfinite(jax.hessian(lambda x: jsm.softpick(x)[0])(large)))


@pytest.mark.parametrize("reverse", [True, False])
def test_stick_breaking_extremes(reverse):
    f = functools.partial(jsm.stick_breaking, reverse=reverse)
    x = np.float32([0, np.inf, 0, np.inf, 0])
    np.testing.assert_array_equal(f(x), [0, 0, 0, 0.5, 0.5] if reverse else [0.5, 0.5, 0, 0, 0])
    assert np.all(np.isfinite(jax.jacrev(f)(x)))
    x = np.float32([200, -200, 300, 50])
    assert np.all(np.isfinite(f(x)))
    assert np.all(np.isfinite(jax.hessian(lambda x: f(x)[1])(x)))
    long = np.full(10_000, -9.0, np.float32)
    expected = break_from_the_end(np.float64(long))
    np.testing.assert_allclose(f(long), expected if reverse else expected[::-1], rtol=1e-5)


def test_stick_breaking_either_way():
    x = RNG.normal(size=(3, 4)) * 2
    mask = np.array([True, False, True, True])

    def mirrored(x, where):
        return jsm.stick_breaking(x[:, ::-1], where=where[::-1])[:, ::-1]

    def forward(x, where):
        return jsm.stick_breaking(x, where=where, reverse=False)

    np.testing.assert_allclose(forward(x, mask), mirrored(x, mask), rtol=1e-15)
    _, push = jax.linearize(lambda x: forward(x, mask), x)
    _, push_mirrored = jax.linearize(lambda x: mirrored(x, mask), x)
    np.testing.assert_allclose(push(np.cos(x)), push_mirrored(np.cos(x)), atol=1e-15)


def test_stick_breaking_wants_one_axis():
    for axis in (None, (0, 1), "i", ()):
        with pytest.raises(ValueError, match="axis must be one array axis"):
            jsm.stick_breaking(jnp.zeros((2, 2)), axis=axis)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.leaks_in_jax
def test_stick_over_the_devices_of_a_mesh(reverse, rng):
    x = rng.normal(size=(2, 8))
    x[1, 5] = -np.inf

    def value_and_gradient(fun):
        value, pull_back = jax.vjp(fun, x)
        return value, pull_back(np.cos(np.arange(16.0)).reshape(2, 8))[0]

    broken = functools.partial(jsm.stick_breaking, reverse=reverse)
    over_devices = on_mesh(lambda x: broken(x, (-1, "i")), (None, "i"))
    for actual, wanted in zip(
        value_and_gradient(over_devices), value_and_gradient(broken), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-13, atol=1e-15)


@pytest.mark.asks_for_x64
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("length", [0, 1, 31, 33, 1056, 3000])
def test_stick_of_any_length(length, reverse, rng):
    """Blocks of sums, and blocks of those, leave out nothing."""
    x = 3 * rng.normal(size=(2, length)) - 3
    along = np.cos(np.arange(2.0 * length)).reshape(2, length)
    f = functools.partial(jsm.stick_breaking, reverse=reverse)
    order = slice(None, None, -1 if reverse else 1)
    in_order, s = x[:, order], 1 / (1 + np.exp(-x[:, order]))
    expected = np.array([break_from_the_end(row[::-1])[::-1] for row in in_order])
    p, pushed = jax.jvp(f, (x,), (along,))
    np.testing.assert_allclose(p[:, order], expected.reshape(2, length), rtol=1e-12, atol=1e-300)
    taken = np.cumsum(s * along[:, order], 1) - s * along[:, order]
    expected = expected.reshape(2, length) * ((1 - s) * along[:, order] - taken)
    np.testing.assert_allclose(pushed[:, order], expected, rtol=1e-9, atol=1e-13)
