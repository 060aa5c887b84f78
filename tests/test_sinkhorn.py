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


def sinkhorn(x, where=True, num_iterations=5, a=1.0, b=1.0):
    p = np.where(where, np.exp(np.where(where, x, 0)), 0)

    def scaled(p, axis, sums):
        total = p.sum(axis)
        scale = sums / np.where(total == 0, 1, total)
        return p * np.expand_dims(scale, axis)

    for _ in range(num_iterations):
        p = scaled(scaled(p, -1, a), -2, b)
    return scaled(p, -1, a)


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
        (
            functools.partial(jsm.log_sinkhorn, tol=0.1, row_sums=2.0),
            lambda x: jsm.log_sinkhorn(x, (-2, (-1, "i")), tol=0.1, row_sums=2.0),
            (None, "i"),
        ),
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


A = np.array([0.2, 0.5, 0.3])
B = np.array([0.1, 0.4, 0.3, 0.2])


@pytest.mark.parametrize("where", [None, MASK])
def test_sums(where):
    expected = sinkhorn(X, True if where is None else where, a=A, b=B)
    actual = mapping(X, where=where, row_sums=A, column_sums=B)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)
    log_p = jsm.log_sinkhorn(X, where=where, num_iterations=5, row_sums=A, column_sums=B)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_p, np.log(expected), rtol=1e-12)
    # Those that are not given share the total.
    for given in ({"row_sums": A}, {"column_sums": 3 * B}):
        both = {"row_sums": 1.0, "column_sums": 0.25} | given
        expected = sinkhorn(X, a=both["row_sums"], b=both["column_sums"])
        np.testing.assert_allclose(mapping(X, **given), expected, rtol=1e-12)
    expected = sinkhorn(X, a=np.full(3, 5 / 3), b=np.full(4, 5 / 4))
    np.testing.assert_allclose(mapping(X, column_sums=1.25), expected, rtol=1e-12)
    # One per matrix, and along other axes.
    x = RNG.normal(size=(2, 3, 4))
    sums = np.stack([A, A[::-1]]), np.stack([B, B[::-1]])
    expected = np.stack([sinkhorn(m, a=a, b=b) for m, a, b in zip(x, *sums, strict=True)])
    actual = mapping(x, row_sums=sums[0], column_sums=sums[1])
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    x = np.moveaxis(x, 2, 0)
    actual = mapping(x, axes=(2, 0), row_sums=sums[0], column_sums=sums[1].T)
    np.testing.assert_allclose(actual, np.moveaxis(expected, 2, 0), rtol=1e-12)


def test_sums_of_zero_take_no_part():
    a, b = np.array([0.5, 0, 0.5]), np.array([0.25, 0.25, 0, 0.5])
    x = np.float32(np.where((a > 0)[:, None] & (b > 0), X, RNG.choice([np.nan, np.inf], (3, 4))))
    p = mapping(x, row_sums=a, column_sums=b)
    kept = np.ix_(a > 0, b > 0)
    expected = sinkhorn(X[kept], a=a[a > 0], b=b[b > 0])
    np.testing.assert_allclose(p[kept], expected, rtol=1e-5)
    np.testing.assert_array_equal(p[1], 0)
    np.testing.assert_array_equal(p[:, 2], 0)

    def loss(x, a, b):
        return jnp.sum(jnp.sin(mapping(x, row_sums=a, column_sums=b)))

    gx, ga, gb = jax.grad(loss, (0, 1, 2))(x, jnp.float32(a), jnp.float32(b))
    assert np.all(gx[1] == 0)
    assert np.all(gx[:, 2] == 0)
    assert np.all(np.isfinite(gx))
    assert ga[1] == 0
    assert gb[2] == 0


@pytest.mark.asks_for_x64
@pytest.mark.parametrize("tol", [None, 1e-14])
def test_derivatives_are_those_of_the_limit(tol):
    """The implicit function theorem gives them: the sums are fixed, and p is e^(x + f + g)."""

    def f(x, a, b):
        return jsm.sinkhorn(x, row_sums=a, column_sums=b, num_iterations=400, tol=tol)

    point = X, A, B
    p = np.asarray(f(*point))
    np.testing.assert_allclose(p.sum(1), A, rtol=1e-13)
    np.testing.assert_allclose(p.sum(0), B, rtol=1e-13)
    off = np.log(p) - X
    off = off - off[:1] - off[:, :1] + off[0, 0]
    np.testing.assert_allclose(off, 0, atol=1e-12)

    da, db = RNG.normal(size=3), RNG.normal(size=4)
    along = RNG.normal(size=X.shape), da - da.mean(), db - db.mean()
    matrix = np.block([[np.diag(A), p], [p.T, np.diag(B)]])
    forces = np.concatenate([along[1] - (p * along[0]).sum(1), along[2] - (p * along[0]).sum(0)])
    moved = np.linalg.lstsq(matrix, forces, rcond=None)[0]
    expected = p * (along[0] + moved[:3, None] + moved[3:])
    _, pushed = jax.jvp(f, point, along)
    np.testing.assert_allclose(pushed, expected, rtol=1e-9, atol=1e-11)
    ct = RNG.normal(size=X.shape)
    _, pull_back = jax.vjp(jax.jit(f), *point)
    pulled = sum(np.sum(g * v) for g, v in zip(pull_back(ct), along, strict=True))
    np.testing.assert_allclose(pulled, np.sum(ct * expected), rtol=1e-9)


@pytest.mark.asks_for_x64
def test_gradients_with_sums_and_tolerance():
    @jax.jit
    def f(x, t, a):
        options = {"temperature": t, "row_sums": a, "tol": 1e-2, "num_iterations": 30}
        return jsm.sinkhorn(x, where=MASK, **options)

    args = X, np.array([[0.7]]), A
    check_grads(f, args, 2, modes=["rev"], atol=1e-6, rtol=1e-6)
    check_grads(f, args, 2, modes=["fwd"], atol=1e-6, rtol=1e-6)


@pytest.mark.asks_for_x64
def test_tolerance():
    x = RNG.normal(size=(4, 5, 6)) * np.array([0, 1, 3, 10]).reshape(4, 1, 1)

    def by(tol, x=x, n=200):
        return jsm.sinkhorn(x, tol=tol, num_iterations=n)

    def counted(x, tol):
        """As numpy finds it, and by how many rounds."""
        for n in range(1, 200):
            p = sinkhorn(x, num_iterations=n)
            if np.abs(p.sum(0) * 6 / 5 - 1).max() <= tol:
                return p
        return sinkhorn(x, num_iterations=200)

    for tol in (1e-1, 1e-4):
        expected = np.stack([counted(one, tol) for one in x])
        np.testing.assert_allclose(by(tol), expected, rtol=1e-11)
    # A matrix ends when it would alone, also where it is mapped.
    np.testing.assert_allclose(jax.vmap(lambda x: by(1e-4, x))(x), by(1e-4), rtol=1e-12)
    residual = jsm.sinkhorn_residual(by(1e-4))
    assert residual.shape == (4,)
    assert np.all(residual[:3] <= 1e-4)
    assert np.all(jsm.sinkhorn_residual(by(1e-4, n=3))[1:] > 1e-4)
    tols = np.array([1e-1, 1e-1, 1e-4, 1e-4]).reshape(4, 1, 1)
    expected = np.concatenate([by(1e-1)[:2], by(1e-4)[2:]])
    np.testing.assert_allclose(jax.jit(by)(tols), expected, rtol=1e-12)

    def loss(x):
        return jnp.sum(jnp.sin(by(1e-4, x)))

    mapped = jax.vmap(jax.grad(loss))
    np.testing.assert_allclose(jax.grad(loss)(x), mapped(x), rtol=1e-9, atol=1e-14)
    of_all, of_each = (jax.jvp(f, (x,), (x,))[1] for f in (jax.grad(loss), mapped))
    np.testing.assert_allclose(of_all, of_each, rtol=1e-9, atol=1e-12)


def test_iterations_end():
    """After the last, nothing is computed: a million of them are no more than a few."""
    x = jnp.float32(X)
    p = jax.jit(functools.partial(jsm.sinkhorn, num_iterations=10**6))(x, tol=1e-3)
    np.testing.assert_allclose(p, jsm.sinkhorn(x, tol=1e-3, num_iterations=100), rtol=1e-6)


def test_residual():
    p = sinkhorn(X, num_iterations=1)
    residual = jsm.sinkhorn_residual(p)
    np.testing.assert_allclose(residual, np.abs(p.sum(0) / 0.75 - 1).max(), rtol=1e-5)
    # Rows count as columns do.
    swapped = jsm.sinkhorn_residual(p.T, row_sums=0.75, column_sums=1.0)
    np.testing.assert_allclose(swapped, residual, rtol=1e-5)
    other = jsm.sinkhorn_residual(p, row_sums=3 * A, column_sums=3 * B)
    sums = np.concatenate([p.sum(1) / (3 * A), p.sum(0) / (3 * B)])
    np.testing.assert_allclose(other, np.abs(sums - 1).max(), rtol=1e-5)
    where = np.ones((3, 4), bool)
    where[1] = False
    where[:, 2] = False
    q = jsm.sinkhorn(X, where=where, num_iterations=100)
    assert jsm.sinkhorn_residual(q, where=where) < 1e-6
    np.testing.assert_allclose(jsm.sinkhorn_residual(q), 1)
    assert jsm.sinkhorn_residual(jnp.asarray(q, jnp.bfloat16), where=where).dtype == jnp.float32
    assert jsm.sinkhorn_residual(q, where=np.zeros((3, 4), bool)) == 0
    assert jsm.sinkhorn_residual(jnp.zeros((3, 0))) == 0


@pytest.mark.leaks_in_jax
def test_derivative_of_the_residual_over_a_mesh(rng):
    p = jnp.asarray(rng.uniform(size=(4, 3)))
    spread = on_mesh(lambda p: jsm.sinkhorn_residual(p, axes=((0, "i"), 1)), ("i",), ())
    for f in (spread, jsm.sinkhorn_residual):
        check_grads(f, (p,), order=1, modes=("fwd", "rev"))
    np.testing.assert_allclose(jax.grad(spread)(p), jax.grad(jsm.sinkhorn_residual)(p))


def test_logarithm():
    np.testing.assert_allclose(np.exp(jsm.log_sinkhorn(X)), jsm.sinkhorn(X), rtol=1e-5)
    # The probabilities next to 1 are too small for float32.
    x = np.float32([[400, 0], [0, 400]])
    np.testing.assert_allclose(jsm.log_sinkhorn(x), [[0, -400], [-400, 0]])
    x = np.float32(np.where(MASK, X, -np.inf))
    assert np.all((jsm.log_sinkhorn(x) == -np.inf) == ~MASK)

    def loss(x):
        return jnp.sum(jnp.where(MASK, jsm.log_sinkhorn(x), 0) ** 2)

    def same(x):
        p = jsm.sinkhorn(x, where=MASK)
        return jnp.sum(jnp.log(jnp.where(MASK, p, 1)) ** 2)

    np.testing.assert_allclose(jax.grad(loss)(x), jax.grad(same)(x), rtol=1e-3, atol=1e-4)
    assert jsm.log_sinkhorn(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("f", [jsm.sinkhorn, jsm.log_sinkhorn, jsm.sinkhorn_residual])
def test_wrong_sums(f):
    x = jnp.float32(np.exp(X))
    with pytest.raises(ValueError, match="row_sums must be finite and not negative, got -1"):
        f(x, row_sums=jnp.array([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match="column_sums must be finite and not negative, got nan"):
        f(x, column_sums=np.nan)
    with pytest.raises(ValueError, match="must have the same total, got 3"):
        f(x, row_sums=1.0, column_sums=1.0)
    with pytest.raises(ValueError, match=r"one value per row, shape \(3,\), got shape \(4,\)"):
        f(x, row_sums=B)
    with pytest.raises(ValueError, match=r"one value per column, shape \(4,\), got .* \(4, 1\)"):
        f(x, column_sums=B[:, None])
    with pytest.raises(TypeError, match="row_sums must be real"):
        f(x, row_sums=np.ones(3, bool))
    with pytest.raises(TypeError, match="row_sums must be an array"):
        f(x, row_sums=[1.0, 1.0, 1.0])
    # What is left out does not count.
    where = np.arange(4) < 3
    assert not np.any(np.isnan(f(x, where=where, row_sums=1.0, column_sums=1.0)))
    # Nor does rounding.
    assert not np.any(np.isnan(f(x, row_sums=jnp.bfloat16(A), column_sums=np.float32(B))))
    traced = jax.jit(lambda a: f(x, row_sums=a, column_sums=B))
    assert np.all(np.isnan(traced(2 * A)))
    assert np.any(np.isnan(traced(-A)))
    assert not np.any(np.isnan(traced(A)))


def test_wrong_tolerance():
    for tol in (-1, np.nan):
        with pytest.raises(ValueError, match="tol must not be negative or NaN"):
            jsm.sinkhorn(X, tol=tol)
    with pytest.raises(ValueError, match="tol must broadcast"):
        jsm.sinkhorn(X, tol=np.ones(3))


def test_totals_that_differ_by_more_than_rounding(rng):
    x = rng.normal(size=(3, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="must have the same total, got"):
        jsm.sinkhorn(x, row_sums=1.0, column_sums=1.003)
    halves = jnp.asarray(rng.uniform(size=3), jnp.bfloat16)
    p = jsm.sinkhorn(x, row_sums=halves, column_sums=float(halves.astype(np.float32).mean()))
    np.testing.assert_allclose(p.sum(1), halves.astype(np.float32), rtol=1e-2)


def test_arguments_by_name_are_told_what_is_wrong():
    with pytest.raises(ValueError, match="row_sums must be finite and not negative, got -1"):
        jsm.sinkhorn_residual(p=jnp.full((2, 2), jnp.nan), row_sums=-jnp.ones(2))
    nan = jsm.sinkhorn_residual(p=jnp.full((2, 2), jnp.nan), row_sums=jnp.ones(2))
    assert np.all(np.isnan(nan))
