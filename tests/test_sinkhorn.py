"""Sinkhorn, which is a mapping of matrices and not of rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests import tools
from tests.tools import on_mesh

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)) * 2
mapping = functools.partial(jsm.sinkhorn, num_iterations=5)
MASK = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], bool)


def sinkhorn(x, where=True, num_iterations=5):
    p = np.where(where, np.exp(np.where(where, x, 0)), 0)

    def scaled(p, axis):
        total = p.sum(axis, keepdims=True)
        return p / np.where(total == 0, 1, total)

    for _ in range(num_iterations):
        p = scaled(scaled(p, -1), -2)
    return scaled(p, -1)


@pytest.mark.parametrize("where", [None, MASK])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_reference(where, temperature):
    expected = sinkhorn(X / temperature, True if where is None else where)
    actual = mapping(X, where=where, temperature=temperature)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)
    actual = jax.jit(mapping)(X, where=where, temperature=jnp.full((1, 1), temperature))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)


def test_masked_is_exactly_zero():
    weight = RNG.normal(size=X.shape).astype(np.float32)

    def loss(x, t):
        return jnp.sum(weight * mapping(x, where=MASK, temperature=t))

    gradient, hessian = jax.jit(jax.value_and_grad(loss, (0, 1))), jax.jit(jax.hessian(loss))
    for junk in (np.nan, np.inf, -np.inf, 1e30):
        x = np.where(MASK, X, junk).astype(np.float32)
        p = mapping(x, where=MASK)
        assert np.all(p[~MASK] == 0)
        np.testing.assert_array_equal(p, mapping(np.where(MASK, x, 0), where=MASK))
        for t in jnp.float32([1.0, 1.5]):
            value, (gx, gt) = gradient(x, t)
            assert np.isfinite(value)
            assert np.isfinite(gt)
            assert np.all(np.isfinite(gx))
            assert np.all(gx[~MASK] == 0)
            assert np.all(np.isfinite(hessian(x, t)))


@pytest.mark.asks_for_x64
def test_gradients():
    @jax.jit
    def f(x, t):
        return mapping(x, where=MASK, temperature=t)

    args = X, np.array([[0.7]])
    check_grads(f, args, 2, modes=["rev"], atol=1e-6, rtol=1e-6)
    check_grads(f, args, 1, modes=["fwd"], atol=1e-6, rtol=1e-6)


@pytest.mark.asks_for_nan
def test_nan_makes_rows_nan():
    x = np.float32(X)
    x[1, 2] = np.nan
    p = mapping(x)
    assert np.all(np.isnan(p[1]))


def test_nothing_takes_part():
    where = np.ones((3, 4), bool)
    where[1] = False
    where[:, 2] = False
    infinite = np.where(where, X, -np.inf).astype(np.float32)
    for x, mask in ((np.float32(X), where), (infinite, None)):
        p = mapping(x, where=mask)
        assert np.all(p[1] == 0)
        assert np.all(p[:, 2] == 0)
        assert np.all(np.isfinite(p))
        g = jax.grad(lambda x, mask=mask: jnp.sum(jnp.sin(mapping(x, where=mask))))(x)
        assert np.all(g[1] == 0)
        assert np.all(g[:, 2] == 0)
        assert np.all(np.isfinite(g))


def test_infinite_scores_share():
    x = np.float32([[np.inf, 0, np.inf, -np.inf], [1, 2, 3, 4]])
    p = jsm.sinkhorn(x)
    np.testing.assert_allclose(p[0], [0.5, 0, 0.5, 0], rtol=0.1)  # the columns have a say
    assert np.all(p[1] > 0)
    assert np.all(np.isfinite(p))
    assert np.all(np.isfinite(jax.jacrev(jsm.sinkhorn)(x)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    x = jnp.asarray(X, dtype)
    p = mapping(x)
    assert p.dtype == dtype
    np.testing.assert_array_equal(p, mapping(x.astype(jnp.float32)).astype(dtype))
    assert jax.grad(lambda x: mapping(x).sum())(x).dtype == dtype


def test_dtypes_and_shapes():
    integers = np.array([[1, 2], [3, -4]])
    np.testing.assert_array_equal(mapping(integers), mapping(integers.astype(float)))
    assert mapping(integers).dtype == tools.FLOAT
    for shape in ((2, 0), (0, 2), (0, 0)):
        assert mapping(jnp.zeros(shape)).shape == shape
        assert jax.grad(lambda x: mapping(x).sum())(jnp.zeros(shape)).shape == shape
    with pytest.raises(TypeError, match="x must be real"):
        mapping(jnp.zeros((2, 2), complex))
    with pytest.raises(TypeError, match="where must be boolean"):
        mapping(jnp.zeros((2, 2)), where=jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="where must broadcast"):
        mapping(jnp.zeros((2, 2)), where=jnp.ones((3, 2), bool))
    with pytest.raises(ValueError, match="temperature must not be negative"):
        mapping(jnp.zeros((2, 2)), temperature=-1.0)


def test_transformations():
    x = np.float32(RNG.normal(size=(5, 3, 4)))
    t = np.float32(RNG.uniform(0.5, 2, size=(5, 1, 1)))
    expected = np.stack([mapping(a, temperature=b) for a, b in zip(x, t, strict=True)])
    for f in (mapping, jax.vmap(lambda a, temperature: mapping(a, temperature=temperature))):
        actual = f(x, temperature=t) if f is mapping else f(x, t)
        np.testing.assert_allclose(actual, expected, rtol=2e-6)

    def loss(x, t):
        return jnp.sum(jnp.sin(mapping(x, temperature=t)))

    gradient = jax.jit(jax.grad(loss))
    expected = np.stack([gradient(a, b) for a, b in zip(x, t, strict=True)])
    np.testing.assert_allclose(gradient(x, t), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(loss)))(x, t), expected, rtol=1e-4, atol=1e-6
    )
    rematerialized = jax.jit(jax.grad(jax.checkpoint(loss)))(x, t)
    np.testing.assert_allclose(rematerialized, gradient(x, t), rtol=1e-4, atol=1e-6)


@pytest.mark.asks_for_x64
def test_sinkhorn_scales():
    x = RNG.normal(size=(2, 6, 3))
    p = jsm.sinkhorn(x, num_iterations=100)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-14)
    np.testing.assert_allclose(p.sum(-2), 2, rtol=1e-10)
    np.testing.assert_allclose(jsm.sinkhorn(x, num_iterations=jnp.int32(3).item()).sum(-1), 1)
    # Rows and columns that take no part do not count.
    where = np.ones((6, 3), bool)
    where[[0, 2]] = False
    where[:, 1] = False
    p = jsm.sinkhorn(x, where=where, num_iterations=100)
    np.testing.assert_allclose(p.sum(-1)[:, where.any(1)], 1, rtol=1e-14)
    np.testing.assert_allclose(p.sum(-2)[:, where.any(0)], 4 / 2, rtol=1e-10)
    # Other axes, and a shift of rows or columns.
    y = np.moveaxis(x, 1, 0)
    expected = np.moveaxis(np.asarray(jsm.sinkhorn(x)), 1, 0)
    np.testing.assert_allclose(jsm.sinkhorn(y, axes=(0, -1)), expected, rtol=1e-12)
    np.testing.assert_allclose(jsm.sinkhorn(y, axes=[0, 2]), expected, rtol=1e-12)
    np.testing.assert_allclose(
        jsm.sinkhorn(x.reshape(12, 3), num_iterations=7),
        jsm.sinkhorn(x, axes=((0, 1), 2), num_iterations=7).reshape(12, 3),
        rtol=1e-12,
    )
    far = x + 1e5 * RNG.normal(size=(2, 6, 1)).round(3)
    np.testing.assert_allclose(jsm.sinkhorn(far), jsm.sinkhorn(x), rtol=1e-9)


def test_sinkhorn_large_scores():
    x = np.float32(RNG.normal(size=(5, 5)) * 1e3)
    p = jsm.sinkhorn(x)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(jsm.sinkhorn(x))))(x)))


@pytest.mark.asks_for_nan
def test_sinkhorn_errors():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="temperature must be positive"):
        jsm.sinkhorn(x, temperature=0)
    assert np.all(np.isnan(jsm.sinkhorn(x, temperature=jnp.float32(0))))
    for number in (0, -1):
        with pytest.raises(ValueError, match="num_iterations must be at least 1"):
            jsm.sinkhorn(x, num_iterations=number)
    with pytest.raises(TypeError):
        jsm.sinkhorn(x, num_iterations=2.0)
    for axes in ((0,), (0, 1, 2), 0, None):
        with pytest.raises(ValueError, match="axes must be two axes"):
            jsm.sinkhorn(x, axes=axes)
    with pytest.raises(ValueError, match="twice"):
        jsm.sinkhorn(x, axes=(-1, 1))
    with pytest.raises(ValueError, match="out of range"):
        jsm.sinkhorn(x, axes=(0, 2))


def test_sinkhorn_gradient_keeps_no_matrices():
    x = jnp.zeros((8, 16))
    _, pullback = jax.vjp(lambda x: jsm.sinkhorn(x, num_iterations=50), x)
    assert all(leaf.size <= 50 * 16 for leaf in jax.tree.leaves(pullback))


@pytest.mark.parametrize(
    ("f", "sharded", "spec"),
    [
        (jsm.sinkhorn, lambda x: jsm.sinkhorn(x, (-2, (-1, "i"))), (None, "i")),
        (jsm.sinkhorn, lambda x: jsm.sinkhorn(x, ((0, "i"), -1)), ("i",)),
    ],
)
@pytest.mark.leaks_in_jax
def test_mesh_axes(f, sharded, spec):
    x = RNG.normal(size=(4, 8))

    def loss(f, x):
        return jnp.sum(jnp.sin(3 * f(x)))

    v = RNG.normal(size=x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, x):
        along = jax.jvp(f, (x,), (v,))
        return along, jax.jvp(jax.grad(functools.partial(loss, f)), (x,), (v,))

    results = derivatives(on_mesh(sharded, spec), x), derivatives(f, x)
    chex.assert_trees_all_close(*results, rtol=1e-9, atol=1e-12)
