"""Budget-sparsemax and normmax against NumPy references, and their contract."""

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
    "budget0.7": functools.partial(jsm.budget_sparsemax, budget=0.7),
    "budget2.3": functools.partial(jsm.budget_sparsemax, budget=2.3),
    "normmax1.3": functools.partial(jsm.normmax, alpha=1.3),
    "normmax2": jsm.normmax,
    "normmax4": functools.partial(jsm.normmax, alpha=4.0),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5)) * 2
MASK = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [0, 1, 1, 1, 0]], bool)


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


def budget_row(z, budget):
    """Exact but for rounding: shifted to the score at which the budget is spent, in long double."""
    z, budget = np.asarray(z).astype(np.longdouble), np.longdouble(budget)
    p = np.zeros_like(z)
    firsts, finite = z == np.inf, np.isfinite(z)
    if firsts.sum() >= budget:
        p[firsts] = budget / max(firsts.sum(), 1)
        return p
    p[firsts] = 1
    budget = budget - firsts.sum()
    if budget >= finite.sum():
        p[finite] = 1
        return p
    gap = z[finite] - np.sort(z[finite])[::-1][int(np.ceil(budget)) - 1]
    knots = np.concatenate([gap, gap - 1, [-1, 0]])
    knots = np.unique(knots[(knots >= -1) & (knots <= 0)])
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = np.clip(gap - knots[middle], 0, 1).sum() >= budget
        low, high = (middle, high) if enough else (low, middle)
    at_low, at_high = (np.clip(gap - knots[i], 0, 1).sum() for i in (low, high))
    part = (at_low - budget) / (at_low - at_high) if at_low > at_high else 0
    p[finite] = np.clip(gap - knots[low] - part * (knots[high] - knots[low]), 0, 1)
    return p


def normmax_row(z, alpha):
    z = np.asarray(z, np.longdouble)
    q = np.longdouble(alpha) / (np.longdouble(alpha) - 1)
    low, high = z.max() - 1, z.max()
    for _ in range(70):
        middle = (low + high) / 2
        enough = (np.maximum(z - middle, 0) ** q).sum() >= 1
        low, high = (middle, high) if enough else (low, middle)
    u = np.maximum(z - low, 0)
    w = np.where(u > 0, u ** (q - 1), 0)
    return w / w.sum()


def by_rows(row, x, parameter, where=None):
    p = np.zeros(x.shape)
    where = np.broadcast_to(True if where is None else where, x.shape)
    for i in range(len(x)):
        if where[i].any():
            p[i, where[i]] = row(x[i, where[i]], parameter)
    return p


def reference(name, x, where=None):
    if name.startswith("budget"):
        return by_rows(budget_row, x, float(name[6:]), where)
    return by_rows(normmax_row, x, float(name[7:]), where)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("budget", [0, 0.5, 1, 2, 3.3, 7, 10.5, 11])
def test_budget_value(budget):
    x = RNG.normal(size=(6, 11)) * 2
    p = jsm.budget_sparsemax(x, budget)
    np.testing.assert_allclose(p, by_rows(budget_row, x, budget), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 2, 2.5, 4.0, 10.0])
def test_normmax_value(alpha):
    x = RNG.normal(size=(6, 11)) * 2
    p = jsm.normmax(x, alpha)
    np.testing.assert_allclose(p, by_rows(normmax_row, x, alpha), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_normmax_jacobian():
    x = np.array([1.0, 0.8, 0.3, -1.0])
    for alpha in (1.4, 2.0, 3.5):
        p = np.asarray(jsm.normmax(x, alpha))
        norm = (p**alpha).sum() ** (1 / alpha)
        slope = np.where(p > 0, (np.where(p > 0, p, 1) / norm) ** (2 - alpha), 0) * norm
        centre = np.eye(4) - np.outer(p, np.ones(4))
        expected = centre @ np.diag(slope / (alpha - 1)) @ centre.T
        jacobian = jax.jacrev(jsm.normmax)(x, alpha)
        np.testing.assert_allclose(jacobian, expected, atol=1e-12)
        np.testing.assert_allclose(jax.jacfwd(jsm.normmax)(x, alpha), expected, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_limits_and_relatives():
    np.testing.assert_allclose(jsm.budget_sparsemax(X, 1), jsm.sparsemax(X), atol=1e-14)
    np.testing.assert_allclose(jsm.normmax(X, 1 + 1e-4), jsm.hardmax(X), atol=1e-3)
    support = np.asarray(jsm.normmax(X, 1e6) > 0)
    even = support / support.sum(-1, keepdims=True)
    np.testing.assert_allclose(jsm.normmax(X, 1e6), even, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_against_deep_spin():
    torch = pytest.importorskip("torch")
    entmax = pytest.importorskip("entmax")
    x, ct = RNG.normal(size=(6, 11)) * 2, RNG.normal(size=(6, 11))

    def check(ours, theirs):
        scores = torch.tensor(x, requires_grad=True)
        expected = theirs(scores)
        expected.backward(torch.tensor(ct))
        p, pullback = jax.vjp(ours, jnp.asarray(x))
        np.testing.assert_allclose(p, expected.detach().numpy(), atol=1e-9)
        np.testing.assert_allclose(pullback(jnp.asarray(ct))[0], scores.grad.numpy(), atol=1e-9)

    for budget in (0.5, 2.2, 7.7):
        check(
            functools.partial(jsm.budget_sparsemax, budget=budget),
            functools.partial(entmax.budget_bisect, budget=budget, n_iter=80),
        )
    for alpha in (1.2, 1.5, 2.0, 3.0):
        check(
            functools.partial(jsm.normmax, alpha=alpha),
            functools.partial(entmax.normmax_bisect, alpha=alpha, n_iter=80),
        )


ADVERSARIAL = {
    "normal": RNG.normal(size=1000),
    "wide": RNG.normal(size=1000) * 100,
    "narrow": RNG.normal(size=1000) / 100,
    "far": RNG.normal(size=1000) + 1e6,
    "long": RNG.normal(size=100_000),
    "outlier": np.r_[1e30, RNG.normal(size=1000)],
    "lowest": np.r_[-1e30, RNG.normal(size=1000)],
    "outliers": np.r_[1e30, -1e30, 3e38, -3e38, RNG.normal(size=1000)],
    "geometric": np.r_[2.0 ** -np.arange(0, 100), 2.0 ** np.arange(1, 100)],
    "geometric, both signs": np.r_[-(2.0 ** np.arange(-99, 100)), 2.0 ** np.arange(1, 100)],
    "equal": np.full(100_000, 3.7),
    "equal and large": np.full(100_000, 1e30),
    "alternating": np.tile([0.0, 0.5, 1.0, 2.0], 5000),
    "spaced": 1 + np.arange(10_000) * 1e-7,
    "spaced at 0": np.arange(10_000) * 1e-7,
    "large ties": np.r_[np.full(100, 1e30), np.full(100, -1e30), np.zeros(100)],
    "tiny": np.r_[1.0, RNG.normal(size=1000) * 1e-30],
    "infinite": np.r_[np.inf, np.inf, RNG.normal(size=100)],
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_budget_ends_on_any_row(case):
    z = ADVERSARIAL[case].astype(np.float32)
    for budget in (1e-6, 0.5, 1, 2, 3.3, 17.25, len(z) / 2, len(z) - 1, len(z) - 0.3):
        budget = np.float32(budget)
        # Traced: compiled once per case.
        p = np.asarray(jsm.budget_sparsemax(z, jnp.asarray(budget)))
        expected = budget_row(z, budget)
        np.testing.assert_allclose(p, expected, rtol=0, atol=2e-7)
        np.testing.assert_array_equal(p > 0, expected > 0)
        off = abs(p.astype(np.longdouble).sum() - budget)
        assert off <= 3 * np.spacing(budget), (budget, off)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", ["outliers", "geometric, both signs", "spaced at 0", "far"])
def test_budget_ends_on_any_row_in_float64(case):
    z = np.r_[ADVERSARIAL[case], 1e300, -1e300]
    for budget in (1e-6, 1.0, 3.3, 17.25, len(z) - 0.3):
        p = np.asarray(jsm.budget_sparsemax(z, jnp.asarray(budget)))
        np.testing.assert_allclose(p, budget_row(z, budget), rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", [1.01, 1.3, 2.0, 4.0])
def test_normmax_ends_on_any_row(alpha):
    for case in ("wide", "outlier", "geometric", "equal", "alternating", "spaced"):
        z = ADVERSARIAL[case].astype(np.float32)
        p = np.asarray(jsm.normmax(z, alpha))
        np.testing.assert_allclose(p.sum(dtype=np.float64), 1, atol=2e-6)
        shifted = np.maximum(z.astype(np.float64) - z.max(), -2)
        np.testing.assert_allclose(p, normmax_row(shifted, alpha), rtol=0, atol=5e-6)


def test_a_budget_that_is_clear_cut_leaves_no_specks():
    x = RNG.normal(size=(50, 6)).astype(np.float32) * 10
    best = np.argsort(-x, -1)
    for k in (1, 2, 3, 5):
        clear = np.take_along_axis(x, best[:, k - 1 : k], -1) - np.take_along_axis(
            x, best[:, k : k + 1], -1
        )
        p = np.asarray(jsm.budget_sparsemax(x, k))
        whole = ((p == 0) | (p == 1)).all(-1)
        np.testing.assert_array_equal(whole, clear[:, 0] >= 1)


@pytest.mark.usefixtures("x64")
def test_gradients(name, mapping):
    check_grads(mapping, (X,), order=2, modes=("rev",), rtol=1e-4, atol=1e-5)
    check_grads(mapping, (X,), order=1, modes=("fwd",), rtol=1e-4, atol=1e-5)
    p = mapping(X, where=MASK)
    np.testing.assert_allclose(p, reference(name, X, MASK), atol=1e-13)
    masked = functools.partial(mapping, where=MASK)
    check_grads(masked, (X,), order=2, modes=("rev",), rtol=1e-4, atol=1e-5)
    check_grads(masked, (X,), order=1, modes=("fwd",), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("fun", "values"),
    [(jsm.budget_sparsemax, [0.6, 1.7, 3.4]), (jsm.normmax, [1.4, 2.0, 3.1])],
)
def test_gradients_in_parameters(fun, values, per_row):
    def tempered(x, parameter, temperature):
        return fun(x, parameter, temperature=temperature)

    for value in [np.reshape(values, (3, 1))] if per_row else values:
        args = (X, jnp.asarray(value), jnp.full((3, 1) if per_row else (), 0.9))
        check_grads(tempered, args, order=2, modes=("rev",), rtol=1e-4, atol=1e-5)
        check_grads(tempered, args, order=1, modes=("fwd",), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_numbers_known_and_traced_agree():
    for budget in (0.0, 0.3, 2.0, 5.0):
        traced = jax.jit(jsm.budget_sparsemax)(X, budget)
        np.testing.assert_allclose(traced, jsm.budget_sparsemax(X, budget), atol=1e-14)
    for alpha in (1.5, 2.0):
        traced = jax.jit(jsm.normmax)(X, alpha)
        np.testing.assert_allclose(traced, jsm.normmax(X, alpha), atol=1e-14)
    each = jsm.budget_sparsemax(X, jnp.array([[0.5], [1.0], [4.0]]))
    for i, budget in enumerate((0.5, 1.0, 4.0)):
        np.testing.assert_allclose(each[i], jsm.budget_sparsemax(X[i], budget), atol=1e-14)


def test_parameters_out_of_range():
    for budget in (-1, 5.5, np.nan):
        with pytest.raises(ValueError, match="budget must be from 0 to the number"):
            jsm.budget_sparsemax(X, budget)
    for alpha in (1, 0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha must be above 1"):
            jsm.normmax(X, alpha)
    with pytest.raises(ValueError, match="budget must broadcast"):
        jsm.budget_sparsemax(X, jnp.ones((2, 1)))
    with pytest.raises(TypeError, match="budget must be real"):
        jsm.budget_sparsemax(X, jnp.array(1j))
    assert jnp.all(jsm.budget_sparsemax(X, jnp.array(-1.0)) == 0)
    assert jnp.all(jsm.budget_sparsemax(X, jnp.array(9.0)) == 1)
    assert jnp.all(jnp.isnan(jsm.budget_sparsemax(X, jnp.array(jnp.nan))))
    np.testing.assert_array_equal(jsm.budget_sparsemax(X, jnp.array(9.0), where=MASK), MASK)
    assert jnp.all(jnp.isnan(jsm.normmax(X, jnp.array(1.0))))
    grad = jax.grad(lambda b: jsm.budget_sparsemax(X, b)[0, 0])(9.0)
    assert grad == 0


def test_masks_hide_everything(mapping):
    x = np.float32(X)
    for hidden in (np.nan, np.inf, -np.inf, 3e38):
        spoiled = np.where(MASK, x, np.float32(hidden))
        np.testing.assert_array_equal(mapping(spoiled, where=MASK), mapping(x, where=MASK))

        def loss(x, t):
            return jnp.sum(mapping(x, where=MASK, temperature=t) ** 2)

        got = jax.grad(loss, (0, 1))(spoiled, jnp.float32(0.9))
        expected = jax.grad(loss, (0, 1))(x, jnp.float32(0.9))
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert np.all(np.asarray(got[0])[~MASK] == 0)


def test_edges(name, mapping):
    x = np.float32(X)
    spoiled = x.copy()
    spoiled[0, 1] = np.nan
    p = np.asarray(mapping(spoiled))
    assert np.isnan(p[0]).all()
    np.testing.assert_allclose(p[1:], mapping(x)[1:], atol=1e-7)
    nothing = np.full((2, 5), -np.inf, np.float32)
    p, pullback = jax.vjp(mapping, nothing)
    assert np.all(p == 0)
    assert np.all(pullback(jnp.ones_like(p))[0] == 0)
    assert mapping(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert mapping(np.zeros((0, 5), np.float32)).shape == (0, 5)
    infinite = np.float32([[np.inf, 1, np.inf, 0, -np.inf], [np.inf, 1, 2, 3, -np.inf]])
    p, pullback = jax.vjp(mapping, infinite)
    assert p[0, 0] == p[0, 2] > 0
    assert p[1, 0] == p.max() > 0
    assert np.all(p[:, 4] == 0)
    assert np.all(np.isfinite(pullback(jnp.ones_like(p))[0]))
    if name == "budget2.3":
        np.testing.assert_allclose(p[0], [1, 0.3, 1, 0, 0], atol=1e-6)
        np.testing.assert_allclose(p[1], [1, 0, 0.3, 1, 0], atol=1e-6)
    if name == "budget0.7":
        np.testing.assert_allclose(p[0], [0.35, 0, 0.35, 0, 0], atol=1e-6)


def test_nan_in_long_rows(mapping):
    x = RNG.normal(size=(2, 50_000)).astype(np.float32)
    x[0, 777] = np.nan
    p = np.asarray(mapping(x))
    assert np.isnan(p[0]).all()
    assert np.isfinite(p[1]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(name, mapping, dtype):
    x = jnp.asarray(X, dtype)
    p, pullback = jax.vjp(mapping, x)
    assert p.dtype == dtype
    assert pullback(p)[0].dtype == dtype
    expected = jnp.asarray(reference(name, np.asarray(x, np.float64)), jnp.float32)
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(p.astype(jnp.float32), expected, rtol=0.51 * ulp, atol=1e-7)


def test_integers_and_axes(mapping):
    assert mapping(np.array([3, 1, 0])).dtype == jnp.float32
    x = np.float32(RNG.normal(size=(2, 3, 4)))
    moved = mapping(np.moveaxis(x, 1, -1))
    np.testing.assert_allclose(mapping(x, axis=1), np.moveaxis(moved, -1, 1), atol=1e-6)
    flat = mapping(x.reshape(-1)).reshape(x.shape)
    np.testing.assert_allclose(mapping(x, axis=None), flat, atol=1e-6)
    np.testing.assert_allclose(mapping(x, axis=(0, 1, 2)), flat, atol=1e-6)
    pairs = mapping(np.moveaxis(x, 0, 1).reshape(3, 8), axis=-1)
    pairs = np.moveaxis(pairs.reshape(3, 2, 4), 0, 1)
    np.testing.assert_allclose(mapping(x, axis=(0, -1)), pairs, atol=1e-6)


def test_batches(mapping):
    x = np.float32(RNG.normal(size=(4, 3, 5)))
    expected = mapping(x)
    np.testing.assert_allclose(jax.vmap(mapping)(x), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(mapping)))(x), expected, atol=1e-6)

    def loss(x):
        return jnp.sum(mapping(x) ** 2)

    batched = jax.vmap(jax.grad(loss))(x)
    np.testing.assert_allclose(batched, jax.grad(loss)(x), atol=1e-5)


def test_temperature(mapping):
    x = np.float32(X)
    np.testing.assert_allclose(mapping(x, temperature=0.5), mapping(x * 2), atol=1e-6)
    with pytest.raises(ValueError, match="temperature must not be negative"):
        mapping(x, temperature=-1)
    cold = mapping(x, temperature=0)
    np.testing.assert_allclose(mapping(x, temperature=1e-6), cold, atol=1e-5)
    np.testing.assert_array_equal(mapping(x, temperature=jnp.zeros(())), cold)
    mixed = mapping(x, temperature=jnp.array([[0.0], [1.0], [0.5]]))
    np.testing.assert_allclose(mixed[0], cold[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], mapping(x)[1], atol=1e-6)
    for t in (0, jnp.zeros(())):
        grad = jax.grad(lambda x, t=t: jnp.sum(mapping(x, temperature=t) ** 2))(x)
        assert np.all(grad == 0)


def test_temperature_zero_is_the_limit():
    x = np.float32([[3, 1, 1, 0, np.inf], [2, 2, 2, 2, -np.inf], [5, 4, 3, 2, 1]])
    for zero in (0, jnp.zeros((3, 1))):
        np.testing.assert_array_equal(jsm.normmax(x, temperature=zero), jsm.hardmax(x))
        np.testing.assert_allclose(
            jsm.budget_sparsemax(x, 1, temperature=zero), jsm.hardmax(x), atol=1e-7
        )
        np.testing.assert_allclose(
            jsm.budget_sparsemax(x, 3, temperature=zero),
            [[1, 0.5, 0.5, 0, 1], [0.75, 0.75, 0.75, 0.75, 0], [1, 1, 1, 0, 0]],
            atol=1e-7,
        )


def test_no_sort_and_the_rule_is_the_gradient(mapping):
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(mapping(x) ** 2)))(X))
    assert "sort[" not in text
    text = str(jax.make_jaxpr(jax.hessian(lambda x: jnp.sum(mapping(x) ** 2)))(X))
    assert "sort[" not in text


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_mesh_axes(mapping):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    x = np.float32(RNG.normal(size=(4, 10)))

    def sharded(x, t):
        spec = PartitionSpec("rows", "columns")
        local = functools.partial(mapping, axis=(-1, "columns"))
        return jax.shard_map(
            lambda x, t: local(x, temperature=t),
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
        )(x, t)

    def whole(x, t):
        return mapping(x, temperature=t)

    t = jnp.float32(0.8)
    np.testing.assert_allclose(sharded(x, t), whole(x, t), atol=2e-6)
    np.testing.assert_allclose(sharded(x, 0 * t), whole(x, 0), atol=2e-6)

    def grads(f):
        return jax.jit(jax.grad(lambda x, t: jnp.sum(jnp.sin(x) * f(x, t)), (0, 1)))(x, t)

    got, expected = grads(sharded), grads(whole)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)
    tangents = (np.ones_like(x) * np.cos(x), jnp.float32(1))
    got, expected = (jax.jvp(f, (x, t), tangents)[1] for f in (sharded, whole))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize(
    ("fun", "value"), [(jsm.budget_sparsemax, 2.3), (jsm.normmax, 1.7), (jsm.normmax, 3.0)]
)
def test_parameters_on_a_mesh(fun, value):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    x = np.float32(RNG.normal(size=(4, 10)))
    spec = PartitionSpec("rows", "columns")

    def sharded(x, value):
        return jax.shard_map(
            lambda x, value: fun(x, value, axis=("columns", 1)),
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
        )(x, value)

    def grads(f):
        return jax.grad(lambda x, v: jnp.sum(jnp.sin(x) * f(x, v)), (0, 1))(x, jnp.float32(value))

    got, expected = grads(sharded), grads(fun)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4)
