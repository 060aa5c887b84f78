"""Softpick, stick-breaking, sinkhorn, measures and masks against NumPy, and their contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

import jaxsoftmax as jsm


@pytest.fixture(autouse=True)
def strict_float64():
    """These tests choose their precision themselves."""


MAPPINGS = {
    "softpick": jsm.softpick,
    "stick_breaking": jsm.stick_breaking,
    "stick_breaking_forward": functools.partial(jsm.stick_breaking, reverse=False),
    "sinkhorn": functools.partial(jsm.sinkhorn, num_iterations=5),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)) * 2
MASK = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], bool)


@pytest.fixture(params=MAPPINGS)
def name(request):
    return request.param


@pytest.fixture
def mapping(name):
    return MAPPINGS[name]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def softpick(x, where=True):
    weights = np.where(where, np.expm1(np.where(where, x, 0)), 0)
    total = np.abs(weights).sum(-1, keepdims=True)
    return np.maximum(weights, 0) / np.where(total == 0, 1, total)


def stick_breaking(x, where=True, reverse=True):
    if reverse:
        return stick_breaking(x[..., ::-1], np.broadcast_to(where, x.shape)[..., ::-1], False)[
            ..., ::-1
        ]
    s = np.where(where, 1 / (1 + np.exp(-np.where(where, x, 0))), 0)
    left, p = np.ones(x.shape[:-1]), np.zeros_like(x)
    for i in range(x.shape[-1]):
        p[..., i] = left * s[..., i]
        left = left * (1 - s[..., i])
    return p


def sinkhorn(x, where=True, num_iterations=5):
    p = np.where(where, np.exp(np.where(where, x, 0)), 0)

    def scaled(p, axis):
        total = p.sum(axis, keepdims=True)
        return p / np.where(total == 0, 1, total)

    for _ in range(num_iterations):
        p = scaled(scaled(p, -1), -2)
    return scaled(p, -1)


REFERENCES = {
    "softpick": softpick,
    "stick_breaking": stick_breaking,
    "stick_breaking_forward": functools.partial(stick_breaking, reverse=False),
    "sinkhorn": sinkhorn,
}


@pytest.mark.parametrize("where", [None, MASK])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_reference(name, mapping, where, temperature, x64):
    expected = REFERENCES[name](X / temperature, True if where is None else where)
    actual = mapping(X, where=where, temperature=temperature)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)
    actual = jax.jit(mapping)(X, where=where, temperature=jnp.full((1, 1), temperature))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-300)


def test_masked_is_exactly_zero(name, mapping):
    for junk in (np.nan, np.inf, -np.inf, 1e30):
        x = np.where(MASK, X, junk).astype(np.float32)
        weight = RNG.normal(size=X.shape).astype(np.float32)

        def loss(x, t, weight=weight):
            return jnp.sum(weight * mapping(x, where=MASK, temperature=t))

        p = mapping(x, where=MASK)
        assert np.all(p[~MASK] == 0)
        np.testing.assert_array_equal(p, mapping(np.where(MASK, x, 0), where=MASK))
        for t in (1.0, jnp.float32(1.5)):
            value, (gx, gt) = jax.value_and_grad(loss, (0, 1))(x, t)
            assert np.isfinite(value)
            assert np.isfinite(gt)
            assert np.all(np.isfinite(gx))
            assert np.all(gx[~MASK] == 0)
            hessian = jax.hessian(loss)(x, t)
            assert np.all(np.isfinite(hessian))


@pytest.mark.parametrize("where", [None, MASK])
def test_gradients(mapping, where, x64):
    def f(x, t):
        return mapping(x, where=where, temperature=t)

    args = X, np.array([[0.7]])
    check_grads(f, args, 2, modes=["rev"], atol=1e-6, rtol=1e-6)
    check_grads(f, args, 1, modes=["fwd"], atol=1e-6, rtol=1e-6)


def test_third_derivative(mapping, x64):
    def f(x):
        return jnp.sum(jnp.sin(mapping(x)))

    check_grads(f, (X[:, :3],), 3, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_softpick_kinks(x64):
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
    np.testing.assert_allclose(jsm.softpick(tiny), softpick(np.float64(tiny)), rtol=5e-7)
    large = np.float32([95.5, 94.25, -3.0, 20.0])
    np.testing.assert_allclose(jsm.softpick(large), softpick(np.float64(large)), rtol=5e-7)
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
    np.testing.assert_allclose(f(long), f_64(long, reverse), rtol=1e-5)


def f_64(x, reverse):
    return stick_breaking(np.float64(x), reverse=reverse)


def test_nan_makes_rows_nan(name, mapping):
    x = np.float32(X)
    x[1, 2] = np.nan
    p = mapping(x)
    assert np.all(np.isnan(p[1]))
    if name != "sinkhorn":
        assert np.all(np.isfinite(np.asarray(p)[[0, 2]]))


def test_nan_in_long_rows(name, mapping):
    x = RNG.normal(size=(2, 5000)).astype(np.float32)
    for i in (0, 17, 2500, 4999):
        y = x.copy()
        y[1, i] = np.nan
        y[1, 7] = np.inf
        p = mapping(y)
        assert np.all(np.isnan(p[1]))
        assert name == "sinkhorn" or np.all(np.isfinite(p[0]))


def test_nothing_takes_part(mapping):
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
    for f in (jsm.softpick, jsm.sinkhorn):
        # In sinkhorn the columns have a say in the shares.
        rtol = 1e-6 if f is jsm.softpick else 0.1
        np.testing.assert_allclose(f(x)[0], [0.5, 0, 0.5, 0], rtol=rtol)
        np.testing.assert_array_equal(f(x)[1] > 0, True)
        assert np.all(np.isfinite(f(x)))
        assert np.all(np.isfinite(jax.jacrev(f)(x)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(mapping, dtype):
    x = jnp.asarray(X, dtype)
    p = mapping(x)
    assert p.dtype == dtype
    np.testing.assert_array_equal(p, mapping(x.astype(jnp.float32)).astype(dtype))
    assert jax.grad(lambda x: mapping(x).sum())(x).dtype == dtype


def test_dtypes_and_shapes(mapping):
    integers = np.array([[1, 2], [3, -4]])
    np.testing.assert_array_equal(mapping(integers), mapping(integers.astype(np.float32)))
    assert mapping(integers).dtype == jnp.float32
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


def test_transformations(mapping):
    x = np.float32(RNG.normal(size=(5, 3, 4)))
    t = np.float32(RNG.uniform(0.5, 2, size=(5, 1, 1)))
    expected = np.stack([mapping(a, temperature=b) for a, b in zip(x, t, strict=True)])
    for f in (mapping, jax.vmap(lambda a, temperature: mapping(a, temperature=temperature))):
        actual = f(x, temperature=t) if f is mapping else f(x, t)
        np.testing.assert_allclose(actual, expected, rtol=2e-6)

    def loss(x, t):
        return jnp.sum(jnp.sin(mapping(x, temperature=t)))

    expected = np.stack([jax.grad(loss)(a, b) for a, b in zip(x, t, strict=True)])
    np.testing.assert_allclose(jax.grad(loss)(x, t), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(loss)))(x, t), expected, rtol=1e-4, atol=1e-6
    )
    rematerialized = jax.grad(jax.checkpoint(loss))(x, t)
    np.testing.assert_allclose(rematerialized, jax.grad(loss)(x, t), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("f", [jsm.softpick, jsm.stick_breaking])
def test_other_axes(f, x64):
    np.testing.assert_allclose(f(X, axis=0), f(X.T).T, rtol=1e-12)
    np.testing.assert_allclose(f(X, -2, MASK), f(X.T, where=MASK.T).T, rtol=1e-12)
    np.testing.assert_allclose(f(X[0], axis=None), f(X[0]), rtol=1e-12)


def test_softpick_many_axes(x64):
    expected = softpick(X.ravel()).reshape(X.shape)
    np.testing.assert_allclose(jsm.softpick(X, axis=None), expected, rtol=1e-12)
    np.testing.assert_allclose(jsm.softpick(X, axis=(0, 1)), expected, rtol=1e-12)


@pytest.mark.parametrize("f", [jsm.softpick, jsm.stick_breaking])
def test_temperature_zero_is_hardmax(f):
    x = np.float32(
        [[1, 3, 3, -1], [-5, -4, -6, -4], [0, 0, 0, 0], [-np.inf] * 4, [2, np.nan, 0, 1]]
    )
    expected = jsm.hardmax(x)
    np.testing.assert_array_equal(f(x, temperature=0.0), expected)
    np.testing.assert_array_equal(f(x, temperature=jnp.float32(0)), expected)
    mixed = jnp.float32([[0], [1], [0], [1], [0]])
    np.testing.assert_allclose(
        f(x, temperature=mixed), np.where(mixed == 0, expected, f(x)), rtol=1e-6
    )
    x = x[:3]
    for t in (0.0, jnp.float32(0), mixed[:3]):
        g = jax.grad(lambda x, t=t: jnp.sum(jnp.sin(f(x, temperature=t))))(x)
        assert np.all(np.isfinite(g))
        assert np.all(g[0] == 0)
    gt = jax.grad(lambda t: jnp.sum(jnp.sin(f(x, temperature=t))))(mixed[:3])
    assert np.all(np.isfinite(gt))


def test_stick_breaking_wants_one_axis():
    for axis in (None, (0, 1), "i", (0, "i"), ()):
        with pytest.raises(ValueError, match="axis must be one array axis"):
            jsm.stick_breaking(jnp.zeros((2, 2)), axis=axis)


def test_sinkhorn_scales(x64):
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


def test_jaxprs(mapping):
    text = str(jax.make_jaxpr(mapping)(jnp.zeros((2, 3))))
    assert "custom_vjp_call" in text
    assert "sort" not in text
    assert "sort" not in str(
        jax.make_jaxpr(jax.grad(lambda x: mapping(x).sum()))(jnp.zeros((2, 3)))
    )


def _on_mesh(f, spec, out=None):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(*spec)
    out = spec if out is None else PartitionSpec(*out)
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out))


@pytest.mark.parametrize(
    ("f", "sharded", "spec"),
    [
        (jsm.softpick, lambda x: jsm.softpick(x, (-1, "i")), (None, "i")),
        (jsm.softpick, jsm.softpick, ("i",)),
        (jsm.stick_breaking, jsm.stick_breaking, ("i",)),
        (jsm.sinkhorn, lambda x: jsm.sinkhorn(x, (-2, (-1, "i"))), (None, "i")),
        (jsm.sinkhorn, lambda x: jsm.sinkhorn(x, ((0, "i"), -1)), ("i",)),
    ],
)
def test_mesh_axes(f, sharded, spec, x64):
    x = RNG.normal(size=(4, 8))

    def loss(f, x):
        return jnp.sum(jnp.sin(3 * f(x)))

    on_mesh = _on_mesh(sharded, spec)
    np.testing.assert_allclose(on_mesh(x), f(x), rtol=1e-12)
    expected = jax.grad(functools.partial(loss, f))(x)
    np.testing.assert_allclose(
        jax.grad(functools.partial(loss, on_mesh))(x), expected, rtol=1e-9, atol=1e-12
    )
    v = RNG.normal(size=x.shape)
    for g in (on_mesh, f):
        push = jax.jvp(g, (x,), (v,))[1]
        again = jax.jvp(jax.grad(functools.partial(loss, g)), (x,), (v,))[1]
        if g is on_mesh:
            first = push, again
    np.testing.assert_allclose(first[0], push, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(first[1], again, rtol=1e-9, atol=1e-12)


# Measures


def tsallis(p, alpha):
    if alpha == 1:
        return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
    return np.sum(p - p**alpha, -1) / (alpha * (alpha - 1))


P = np.array([[0.5, 0.3, 0.2, 0.0], [1.0, 0, 0, 0], [0.25] * 4])


def test_entropies(x64):
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


def test_entropy_gradients(x64):
    check_grads(jsm.shannon_entropy, (P[0, :3],), 2, atol=1e-6, rtol=1e-6)
    for alpha in (0.7, 1.0, 1 + 1e-7, 1.3, 2.0, 3.0):
        check_grads(jsm.tsallis_entropy, (P[0, :3], alpha), 2, atol=1e-5, rtol=1e-5)
    g = jax.grad(jsm.shannon_entropy)(P[0])
    np.testing.assert_allclose(g, [*(-np.log(P[0, :3]) - 1), 0])
    np.testing.assert_allclose(jax.grad(jsm.tsallis_entropy)(P[0], 1.0), g, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(jsm.tsallis_entropy)(P[0], 2.0), 0.5 - P[0], rtol=1e-12)
    assert np.all(np.isfinite(jax.hessian(jsm.tsallis_entropy, (0, 1))(P[0], 1.5)[0][0]))
    derivative = jax.grad(jsm.tsallis_entropy, 1)
    logs = np.log(P[0, :3])
    # d/dalpha at 1: sum p (log p - log(p)^2 / 2).
    np.testing.assert_allclose(
        derivative(P[0], 1.0), np.sum(P[0, :3] * (logs - logs**2 / 2)), rtol=1e-12
    )


def test_entropies_at_the_edges():
    assert np.isnan(jsm.shannon_entropy(np.float32([-0.1, 1.1])))
    assert np.isnan(jsm.tsallis_entropy(np.float32([-0.1, 1.1]), 1.5))
    assert np.isnan(jsm.shannon_entropy(np.float32([np.nan, 1])))
    assert np.isnan(jsm.tsallis_entropy(P, jnp.float32(-1))).all()
    assert jsm.shannon_entropy(jnp.zeros((3, 0))).tolist() == [0, 0, 0]
    assert jsm.shannon_entropy(jnp.zeros(3, jnp.bfloat16)).dtype == jnp.bfloat16
    assert jsm.tsallis_entropy(jnp.zeros(3, jnp.float16), 1.5).dtype == jnp.float16
    assert jsm.shannon_entropy(np.array([0, 1])).dtype == jnp.float32
    for alpha in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha must be positive"):
            jsm.tsallis_entropy(P, alpha)
    with pytest.raises(ValueError, match="alpha must broadcast"):
        jsm.tsallis_entropy(P, jnp.ones(4))
    with pytest.raises(TypeError, match="p must be real"):
        jsm.shannon_entropy(jnp.zeros(3, complex))


def test_support_size(x64):
    assert jsm.support_size(P).tolist() == [3, 1, 4]
    assert jsm.support_size(P).dtype == jnp.int32
    assert jsm.support_size(P, axis=None) == 8
    assert jsm.support_size(P, axis=[0]).tolist() == [3, 2, 2, 1]
    assert jsm.support_size(jnp.zeros((2, 0))).tolist() == [0, 0]


def test_measures_on_meshes(x64):
    p = np.float64(jsm.entmax(RNG.normal(size=(4, 8)) * 3))
    for f in (jsm.shannon_entropy, jsm.support_size, lambda p, a: jsm.tsallis_entropy(p, 1.5, a)):
        on_mesh = _on_mesh(lambda p, f=f: f(p, (-1, "i")), (None, "i"), (None,))
        np.testing.assert_allclose(on_mesh(p), f(p, -1), rtol=1e-12)
    on_mesh = _on_mesh(lambda p: jsm.tsallis_entropy(p, 1.5, (-1, "i")), (None, "i"), (None,))
    np.testing.assert_allclose(
        jax.grad(lambda p: on_mesh(p).sum())(p),
        jax.grad(lambda p: jsm.tsallis_entropy(p, 1.5).sum())(p),
        rtol=1e-12,
    )


# Masks


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


def test_min_p(x64):
    x = RNG.normal(size=(20, 30)) * 3
    q = np.exp(x - x.max(-1, keepdims=True))
    for p in (0.0, 0.05, 0.5, 1.0):
        np.testing.assert_array_equal(jsm.min_p_mask(x, p), q >= p)
        np.testing.assert_array_equal(jsm.min_p_mask(x, jnp.full((20, 1), p)), q >= p)
        np.testing.assert_array_equal(jax.vmap(jsm.min_p_mask)(x, jnp.full(20, p)), q >= p)
    q = np.exp(x - x.max())
    np.testing.assert_array_equal(jsm.min_p_mask(x, 0.05, axis=None), q >= 0.05)
    on_mesh = _on_mesh(lambda x: jsm.min_p_mask(x, 0.05, (0, 1, "i")), ("i",))
    np.testing.assert_array_equal(on_mesh(x), q >= 0.05)


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
