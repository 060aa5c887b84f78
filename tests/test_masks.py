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
    # Of numbers that are not known while tracing, none loses the largest.
    for p in (2.0, -1.0, np.nan):
        assert jsm.min_p_mask(x, np.array(p)).tolist() == [True, False, False, True]


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


# Masks that compose.

X = np.float32(RNG.normal(size=(30, 12)) * 2)
WHERE = RNG.random((30, 12)) < 0.7
WHERE[0] = False


def test_k_of_each_row():
    k = RNG.integers(-1, 12, size=(50, 1))
    wanted = np.concatenate(
        [top_k(row[None], max(n, 0)) for row, n in zip(TIED, k[:, 0], strict=True)]
    )
    np.testing.assert_array_equal(jsm.top_k_mask(TIED, k), wanted)
    np.testing.assert_array_equal(jsm.top_k_mask(TIED.T, k.T, axis=0).T, wanted)
    np.testing.assert_array_equal(jax.vmap(jsm.top_k_mask)(TIED, k[:, 0]), wanted)
    traced = jax.jit(lambda x, k: jsm.top_k_mask(x, k))
    for n in (0, 1, 4, 9, 100):
        np.testing.assert_array_equal(traced(TIED, jnp.int32(n)), top_k(TIED, n))
    integers = np.array([[-128, 127, -128, 3]], np.int8)
    assert jsm.top_k_mask(integers, np.array([3])).tolist() == [[True, True, False, True]]
    assert jsm.top_k_mask(np.zeros((2, 0)), np.array([3])).shape == (2, 0)
    with pytest.raises(TypeError, match="k must be integers, got dtype float32"):
        jsm.top_k_mask(TIED, np.ones(1, np.float32))
    with pytest.raises(TypeError, match="k must be an integer or an array of integers, got list"):
        jsm.top_k_mask(TIED, [3])
    with pytest.raises(ValueError, match=r"k must broadcast to .* \(50, 1\), got shape \(50,\)"):
        jsm.top_k_mask(TIED, k[:, 0])


def of_those(mask, x, where, *args):
    """A mask of rows that hold what takes part alone, put back in place."""
    out = np.zeros(x.shape, bool)
    for row, scores, inside in zip(out, x, where, strict=True):
        if np.any(inside):
            row[inside] = mask(scores[inside][None], *args)[0]
    return out


@pytest.mark.parametrize("k", [0, 3, 7, 12, 40, np.array([3])])
def test_top_k_of_what_takes_part(k):
    n = int(np.squeeze(k))
    for x in (X, X.round(), X.round().astype(np.int8)):
        wanted = of_those(lambda row: top_k(row, n), np.float64(x), WHERE)
        np.testing.assert_array_equal(jsm.top_k_mask(x, k, where=WHERE), wanted)
        np.testing.assert_array_equal(jsm.top_k_mask(x.T, k, 0, WHERE.T).T, wanted)
    # -inf may be kept, and what is excluded not, be it NaN.
    x = np.float32([np.nan, -np.inf, 1, -np.inf, np.inf])
    where = np.array([False, True, True, True, False])
    assert jsm.top_k_mask(x, k, where=where).tolist() == [False, n > 1, n > 0, n > 2, False]


def softmax(x, t):
    q = np.exp((x - x.max(-1, keepdims=True)) / t)
    return q / q.sum(-1, keepdims=True)


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0, np.linspace(0.2, 4, 30)[:, None]])
def test_masks_of_tempered_scores(t):
    x, where = np.float64(X), WHERE | (np.arange(12) == 3)
    each = np.broadcast_to(t, (30, 1))
    p_masks = np.zeros((2, 30, 12), bool)
    for i in range(30):
        p = softmax(x[i : i + 1, where[i]], each[i])
        p_masks[0, i, where[i]] = top_p(np.log(p), 0.8)[0]
        p_masks[1, i, where[i]] = (p >= 0.2 * p.max())[0]
    for mask, p, wanted in zip((jsm.top_p_mask, jsm.min_p_mask), (0.8, 0.2), p_masks, strict=True):
        np.testing.assert_array_equal(mask(x, p, -1, where, temperature=t), wanted)
        odd = np.where(where, x, np.nan)
        np.testing.assert_array_equal(mask(odd, p, where=where, temperature=t), wanted)


def test_cold_masks_keep_the_largest():
    x = np.float32([[1, 3, 3], [2, -np.inf, 0], [-np.inf, -np.inf, -np.inf]])
    for t in (0, jnp.zeros(())):
        top = [[False, True, True], [True, False, False], [False] * 3]
        assert jsm.min_p_mask(x, 0.0, temperature=t).tolist() == top
        assert jsm.top_p_mask(x, 1.0, temperature=t).tolist() == top
    with pytest.raises(ValueError, match="temperature must not be negative"):
        jsm.top_p_mask(x, 0.5, temperature=-1)


def test_masks_in_the_usual_order():
    """Temperature, top-k, top-p, min-p: each on the probabilities of what is left."""
    t, k, p, least = 0.7, 8, 0.9, 0.1
    wanted = np.zeros(X.shape, bool)
    for row, scores in zip(wanted, np.float64(X), strict=True):
        order = np.argsort(-scores, kind="stable")[:k]
        q = softmax(scores[order], t)
        order = order[np.cumsum(q) - q < p]
        q = softmax(scores[order], t)
        row[order[q >= least * q.max()]] = True
    mask = jsm.top_k_mask(X, k)
    mask = jsm.top_p_mask(X, p, where=mask, temperature=t)
    mask = jsm.min_p_mask(X, least, where=mask, temperature=t)
    np.testing.assert_array_equal(mask, wanted)
    # Before the temperature more are kept: what the nucleus holds depends on it.
    assert np.sum(jsm.top_p_mask(X, p)) > np.sum(jsm.top_p_mask(X, p, temperature=t))


def test_at_least_so_many():
    for mask, p in ((jsm.top_p_mask, 0.3), (jsm.min_p_mask, 0.9)):
        plain = mask(TIED, p)
        for n in (0, 1, 4, 20):
            kept = mask(TIED, p, min_tokens_to_keep=n)
            np.testing.assert_array_equal(kept, plain | top_k(TIED, n if n > 1 else 0))
        x = np.float32([1, -np.inf, 0.5, -np.inf, 0])
        where = np.array([True, True, True, True, False])
        kept = mask(x, 0.1 if mask is jsm.top_p_mask else 1.0, where=where, min_tokens_to_keep=3)
        assert kept.tolist() == [True, False, True, False, False]
        with pytest.raises(ValueError, match="min_tokens_to_keep must not be negative, got -1"):
            mask(TIED, p, min_tokens_to_keep=-1)
        with pytest.raises(TypeError, match="min_tokens_to_keep must be an integer, got float"):
            mask(TIED, p, min_tokens_to_keep=1.0)


def test_wrong_where_of_masks():
    for mask, p in ((jsm.top_k_mask, 2), (jsm.top_p_mask, 0.5), (jsm.min_p_mask, 0.5)):
        with pytest.raises(TypeError, match="where must be boolean"):
            mask(TIED, p, where=np.ones(9))
        with pytest.raises(ValueError, match="where must broadcast to shape"):
            mask(TIED, p, where=np.ones(8, bool))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
def test_top_k_of_few_bits(dtype):
    np.testing.assert_array_equal(jsm.top_k_mask(jnp.arange(5.0), dtype(2)), np.arange(5) >= 3)
