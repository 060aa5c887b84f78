"""Masks for `where` against NumPy, exact under ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from tests.tools import on_mesh

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

RNG = np.random.default_rng(0)


def top_k(x, k):
    order = np.argsort(-x, -1, kind="stable")
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order[..., :k], True, -1)
    return mask


def top_p(x, p):
    order = np.argsort(-x, -1, kind="stable")
    with np.errstate(invalid="ignore"):
        weights = np.exp(x - x.max(-1, keepdims=True))
    weights = np.where(x == x.max(-1, keepdims=True), 1.0, weights)
    weights = np.take_along_axis(weights, order, -1)
    before = np.cumsum(weights, -1) - weights
    kept = before < p * weights.sum(-1, keepdims=True)
    kept[..., 0] = True
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order, kept, -1)
    return mask & (x > -np.inf)


TIED = RNG.integers(-3, 4, size=(50, 9)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8, np.float16])
def test_top_k(dtype):
    x = TIED.astype(dtype)
    for k in (0, 1, 3, 8, 9, 20):
        mask = jsm.top_k_mask(x, k)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, top_k(TIED, k))
        np.testing.assert_array_equal(jax.vmap(lambda x, k=k: jsm.top_k_mask(x, k))(x), mask)
        np.testing.assert_array_equal(jsm.top_k_mask(x.T, k, axis=0).T, mask)
        np.testing.assert_array_equal(jax.jit(lambda x, k=k: jsm.top_k_mask(x, k))(x), mask)


def test_top_k_edges():
    x = np.float32([-np.inf, 0.0, -0.0, np.inf, -np.inf])
    for k in range(6):
        np.testing.assert_array_equal(jsm.top_k_mask(x, k), top_k(x, k))
    assert jsm.top_k_mask(np.float32([1, np.nan, 2]), 1).tolist() == [False, True, False]
    large = np.array([2**24, 2**24 + 1, 2**24 + 2, -(2**31)], np.int32)
    np.testing.assert_array_equal(jsm.top_k_mask(large, 1), [False, False, True, False])
    np.testing.assert_array_equal(jsm.top_k_mask(large, 2), [False, True, True, False])
    assert jsm.top_k_mask(jnp.zeros((2, 0)), 3).shape == (2, 0)
    with pytest.raises(ValueError, match="k must not be negative"):
        jsm.top_k_mask(x, -1)
    with pytest.raises(TypeError):
        jsm.top_k_mask(x, 1.5)
    with pytest.raises(ValueError, match="axis must be one array axis"):
        jsm.top_k_mask(jnp.zeros((2, 2)), 1, axis=None)
    with pytest.raises(TypeError, match="x must be real"):
        jsm.top_k_mask(x > 0, 1)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.5, 0.613, 0.9, 0.999, 1.0])
def test_top_p(p):
    for x in (TIED, np.float32(RNG.normal(size=(20, 30)) * 3)):
        mask = jsm.top_p_mask(x, p)
        np.testing.assert_array_equal(mask, top_p(np.float64(x), p))
        np.testing.assert_array_equal(jsm.top_p_mask(x, jnp.full((len(x), 1), p)), mask)
        np.testing.assert_array_equal(jsm.top_p_mask(x.T, p, axis=0).T, mask)
        per_row = jax.jit(jax.vmap(jsm.top_p_mask))
        np.testing.assert_array_equal(per_row(x, jnp.full(len(x), p)), mask)


def test_top_p_edges():
    equal = np.zeros(10, np.float32)
    for tenths in range(1, 11):
        for p in (tenths / 10, jnp.float32(tenths / 10)):
            assert jsm.top_p_mask(equal, p).tolist() == [True] * tenths + [False] * (10 - tenths)
    x = np.float32([0, -200, -np.inf])
    assert jsm.top_p_mask(x, 1.0).tolist() == [True, True, False]
    assert jsm.top_p_mask(x, jnp.float32(1)).tolist() == [True, True, False]
    assert jsm.top_p_mask(x, 0.99999).tolist() == [True, False, False]
    x = np.float32([np.inf, 0, np.inf, np.inf])
    assert jsm.top_p_mask(x, 0.5).tolist() == [True, False, True, False]
    assert jsm.top_p_mask(x, 1).tolist() == [True, False, True, True]
    assert not np.any(jsm.top_p_mask(np.full(3, -np.inf, np.float32), 0.5))
    assert jsm.top_p_mask(np.float32([1, np.nan, 2]), 0.9).tolist() == [False, True, False]
    assert jsm.top_p_mask(jnp.zeros((2, 0)), 0.9).shape == (2, 0)
    assert jsm.top_p_mask(np.array([1, 5, 5]), 0.4).tolist() == [False, True, False]
    for p in (-0.1, 1.1, np.nan):
        for f in (jsm.top_p_mask, jsm.min_p_mask):
            with pytest.raises(ValueError, match="p must be from 0 to 1"):
                f(x, p)
    with pytest.raises(ValueError, match="p must broadcast"):
        jsm.top_p_mask(TIED, jnp.ones(9))


def test_min_p():
    x = RNG.normal(size=(20, 30)) * 3
    q = np.exp(x - x.max(-1, keepdims=True))
    for p in (0.0, 0.05, 0.5, 1.0):
        np.testing.assert_array_equal(jsm.min_p_mask(x, p), q >= p)
        np.testing.assert_array_equal(jsm.min_p_mask(x, jnp.full((20, 1), p)), q >= p)
        np.testing.assert_array_equal(jax.vmap(jsm.min_p_mask)(x, jnp.full(20, p)), q >= p)
    q = np.exp(x - x.max())
    np.testing.assert_array_equal(jsm.min_p_mask(x, 0.05, axis=None), q >= 0.05)
    sharded = on_mesh(lambda x: jsm.min_p_mask(x, 0.05, (0, 1, "i")), ("i",))
    np.testing.assert_array_equal(sharded(x), q >= 0.05)


def test_min_p_edges():
    x = np.float32([0, -200, -np.inf, 0])
    assert jsm.min_p_mask(x, 0).tolist() == [True, True, False, True]
    assert jsm.min_p_mask(x, 1).tolist() == [True, False, False, True]
    assert jsm.min_p_mask(np.float32([np.inf, 3, np.inf]), 0.1).tolist() == [True, False, True]
    assert not np.any(jsm.min_p_mask(np.full(3, -np.inf, np.float32), 0.0))
    assert jsm.min_p_mask(np.float32([1, np.nan, 2]), 0.9).tolist() == [False, True, False]
    assert jsm.min_p_mask(jnp.zeros((2, 0)), 0.9).shape == (2, 0)


def test_masks_under_differentiation():
    x = jnp.float32([1.0, 3.0, 2.0, 0.5])
    for mask in (
        lambda x: jsm.top_k_mask(x, 2),
        lambda x: jsm.top_p_mask(x, 0.8),
        lambda x: jsm.min_p_mask(x, 0.3),
    ):
        fixed = mask(x)
        expected = jax.jacrev(lambda x, fixed=fixed: jsm.softmax(x, where=fixed))(x)
        for jacobian in (jax.jacrev, jax.jacfwd):
            actual = jacobian(lambda x, mask=mask: jsm.softmax(x, where=mask(x)))(x)
            np.testing.assert_allclose(actual, expected, atol=1e-7)
