"""Entropies and support sizes against NumPy."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests import tools
from tests.tools import on_mesh

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

RNG = np.random.default_rng(0)


def tsallis(p, alpha):
    if alpha == 1:
        return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
    return np.sum(p - p**alpha, -1) / (alpha * (alpha - 1))


P = np.array([[0.5, 0.3, 0.2, 0.0], [1.0, 0, 0, 0], [0.25] * 4])


def test_entropies():
    np.testing.assert_allclose(jsm.shannon_entropy(P), tsallis(P, 1), atol=1e-15)
    assert not np.signbit(jsm.shannon_entropy(P))[1]
    for alpha in (0.5, 1, 1 + 1e-6, 1.5, 2, 3.5):
        rtol = 1e-9 if alpha == 1 + 1e-6 else 1e-13
        np.testing.assert_allclose(
            jsm.tsallis_entropy(P, alpha), tsallis(P, alpha), rtol=rtol, atol=1e-9
        )
    alphas = np.array([[1.0], [1.5], [2.0]])
    expected = [tsallis(p, a) for p, a in zip(P, alphas[:, 0], strict=True)]
    np.testing.assert_allclose(jsm.tsallis_entropy(P, alphas), expected, atol=1e-15)
    np.testing.assert_allclose(
        jsm.tsallis_entropy(P, 1.5, axis=None), tsallis(P.ravel(), 1.5), rtol=1e-13
    )
    np.testing.assert_allclose(jsm.shannon_entropy(P.T, axis=0), tsallis(P, 1), atol=1e-15)


@pytest.mark.asks_for_x64
def test_entropy_gradients():
    check_grads(jsm.shannon_entropy, (P[0, :3],), 2, atol=1e-6, rtol=1e-6)
    # All alphas at once, as many times the same row.
    alphas = np.array([[0.7], [1.0], [1 + 1e-7], [1.3], [2.0], [3.0]])
    rows = np.repeat(P[:1, :3], len(alphas), 0)
    check_grads(jsm.tsallis_entropy, (rows, alphas), 2, atol=1e-5, rtol=1e-5)
    g = jax.grad(jsm.shannon_entropy)(P[0])
    np.testing.assert_allclose(g, [*(-np.log(P[0, :3]) - 1), 0])
    np.testing.assert_allclose(jax.grad(jsm.tsallis_entropy)(P[0], 1.0), g, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(jsm.tsallis_entropy)(P[0], 2.0), 0.5 - P[0], rtol=1e-12)
    np.testing.assert_allclose(jax.hessian(jsm.tsallis_entropy)(P[0], 2.0), -np.eye(4), atol=1e-15)
    assert np.all(np.isfinite(jax.hessian(jsm.tsallis_entropy, (0, 1))(P[0], 1.5)[0][0]))
    derivative = jax.grad(jsm.tsallis_entropy, 1)
    logs = np.log(P[0, :3])
    # d/dalpha at 1: sum p (log p - log(p)^2 / 2).
    np.testing.assert_allclose(
        derivative(P[0], 1.0), np.sum(P[0, :3] * (logs - logs**2 / 2)), rtol=1e-12
    )


@pytest.mark.parametrize("alpha", [3.0, 40.0, 100.0])
def test_slope_in_a_large_alpha(alpha):
    p = np.array([0.5, 0.3, 0.2])

    def entropy(a):
        return (1 - sum(mpmath.mpf(q) ** a for q in p)) / (a * (a - 1))

    slope = jax.grad(jsm.tsallis_entropy, 1)(jnp.asarray(p), alpha)
    np.testing.assert_allclose(slope, float(mpmath.diff(entropy, alpha)), rtol=1e-6)


@pytest.mark.asks_for_nan
def test_entropies_at_the_edges():
    assert np.isnan(jsm.shannon_entropy(np.float32([-0.1, 1.1])))
    assert np.isnan(jsm.tsallis_entropy(np.float32([-0.1, 1.1]), 1.5))
    assert np.isnan(jsm.shannon_entropy(np.float32([np.nan, 1])))
    for alpha in (0.5, 1.0, 1.5, jnp.float32(1)):
        assert np.isnan(jsm.tsallis_entropy(np.float32([np.nan, 1]), alpha))
    assert np.isnan(jsm.tsallis_entropy(P, jnp.float32(-1))).all()
    assert jsm.shannon_entropy(jnp.zeros((3, 0))).tolist() == [0, 0, 0]
    assert jsm.shannon_entropy(jnp.zeros(3, jnp.bfloat16)).dtype == jnp.bfloat16
    assert jsm.tsallis_entropy(jnp.zeros(3, jnp.float16), 1.5).dtype == jnp.float16
    assert jsm.shannon_entropy(np.array([0, 1])).dtype == tools.FLOAT
    for alpha in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha must be positive"):
            jsm.tsallis_entropy(P, alpha)
    with pytest.raises(ValueError, match="alpha must broadcast"):
        jsm.tsallis_entropy(P, jnp.ones(4))
    with pytest.raises(TypeError, match="p must be real"):
        jsm.shannon_entropy(jnp.zeros(3, complex))


def test_support_size():
    assert jsm.support_size(P).tolist() == [3, 1, 4]
    assert jsm.support_size(P).dtype == jnp.int32
    assert jsm.support_size(P, axis=None) == 8
    assert jsm.support_size(P, axis=[0]).tolist() == [3, 2, 2, 1]
    assert jsm.support_size(jnp.zeros((2, 0))).tolist() == [0, 0]


@pytest.mark.leaks_in_jax
def test_measures_on_meshes():
    p = np.float64(jsm.entmax(RNG.normal(size=(4, 8)) * 3))
    for f in (jsm.shannon_entropy, jsm.support_size, lambda p, a: jsm.tsallis_entropy(p, 1.5, a)):
        sharded = on_mesh(lambda p, f=f: f(p, (-1, "i")), (None, "i"), (None,))
        np.testing.assert_allclose(sharded(p), f(p, -1), rtol=1e-12)
    sharded = on_mesh(lambda p: jsm.tsallis_entropy(p, 1.5, (-1, "i")), (None, "i"), (None,))
    np.testing.assert_allclose(
        jax.grad(lambda p: sharded(p).sum())(p),
        jax.grad(lambda p: jsm.tsallis_entropy(p, 1.5).sum())(p),
        rtol=1e-12,
    )
