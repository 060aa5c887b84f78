"""Mappings against truth from outside, and the properties that they all have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxsoftmax as jsm
from jaxsoftmax._platforms import _cpu
from tests.cases import (
    FUNCTIONS,
    MAPPINGS,
    named,
    project_by_sorting,
    share_the_top,
)

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

every_function = pytest.mark.parametrize("case", **named(FUNCTIONS))
every_mapping = pytest.mark.parametrize("case", **named(MAPPINGS))
tempered = pytest.mark.parametrize(
    "case", **named([c for c in FUNCTIONS if c.takes("temperature")])
)
tempered_of_simplex = pytest.mark.parametrize(
    "case", **named([c for c in MAPPINGS if c.simplex and c.takes("temperature")])
)
of_differences = pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if c.shifts]))
of_sets = pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if not c.in_order]))

close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)


# Truth from outside.


@every_function
@pytest.mark.parametrize("length", [1, 2, 600])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_equals_its_reference(case, length, scale, rng):
    x = scale * rng.normal(size=(4, length))
    close(case.fun(x), case.reference(x))


@every_function
def test_equals_its_reference_on_rows_full_of_ties(case, rng):
    x = rng.integers(-2, 3, size=(50, 40)) / 4
    close(case.fun(x), case.reference(x))
    close(case.fun(np.ones((2, 40))), case.reference(np.ones((2, 40))))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_equals_jax(name, rng):
    x = rng.normal(size=(5, 40))
    where = rng.random((5, 40)) < 0.5
    theirs = getattr(jax.scipy.special if name == "logsumexp" else jax.nn, name)
    theirs = jax.jit(theirs, static_argnames="axis")
    ours = getattr(jsm, name)
    close(ours(x), theirs(x, axis=-1))
    close(ours(x, where=where), theirs(x, axis=-1, where=where))
    jacobian = jax.jit(jax.jacfwd(functools.partial(theirs, axis=-1)))(x[0])
    close(jax.jit(jax.jacfwd(ours))(x[0]), jacobian)


def test_two_classes_are_the_sigmoid():
    s = np.linspace(-40, 40, 161)
    p = jsm.softmax(np.stack([s, np.zeros_like(s)], -1))
    close(p[:, 0], scipy.special.expit(s), atol=0)
    log_p = jsm.log_softmax(np.stack([s, np.zeros_like(s)], -1))
    close(log_p[:, 0], scipy.special.log_expit(s), atol=0)
    slope = jax.vmap(jax.grad(lambda s: jsm.softmax(jnp.stack([s, 0.0]))[0]))(s)
    close(slope, scipy.special.expit(s) * scipy.special.expit(-s), atol=2e-16)


def test_two_classes_of_sparsemax_are_the_hard_sigmoid():
    s = np.linspace(-3, 3, 61)
    p = jsm.sparsemax(np.stack([s, np.zeros_like(s)], -1))
    close(p[:, 0], np.clip((s + 1) / 2, 0, 1))


@pytest.mark.asks_for_x64
def test_sparsemax_is_the_nearest_point_of_the_simplex(rng):
    z = 2 * rng.normal(size=30)
    p = np.asarray(jsm.sparsemax(z))
    others = rng.dirichlet(np.full(30, 0.1), size=1000)
    assert np.all(np.sum((others - z) ** 2, -1) >= np.sum((p - z) ** 2) - 1e-12)
    # Optimality: <z - p, q - p> <= 0 for every q of the simplex, that is for every corner.
    assert np.max(z - p) <= np.dot(z - p, p) + 1e-12


# Masks and temperature.


@every_function
def test_masks_broadcast(case, rng):
    x = rng.normal(size=(2, 3, 4))
    for shape in [(), (4,), (2, 1, 1)]:
        mask = rng.random(shape) < 0.8
        full = np.broadcast_to(mask, x.shape)
        np.testing.assert_array_equal(case.fun(x, where=mask), case.fun(x, where=full))


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if c.fun is not jsm.logsumexp]))
def test_cotangents_of_what_is_excluded_reach_nothing(case, rng):
    """As of an entropy, `-jnp.sum(p * jnp.log(p), where=where)`, which is NaN where `p` is 0."""
    x, where = rng.normal(size=(3, 5)), rng.random((3, 5)) < 0.6
    out, pull_back = jax.vjp(lambda x: case.fun(x, where=where), x)
    ct = rng.normal(size=out.shape)
    for bad in (np.nan, np.inf, -np.inf):
        found, wanted = (pull_back(np.where(where, ct, y))[0] for y in (bad, 0.0))
        np.testing.assert_array_equal(found, wanted)


@tempered
@pytest.mark.parametrize("t", [0.25, 3.0, np.float32(2.0), 2])
def test_temperature_divides_the_scores(case, t, rng):
    x = rng.normal(size=(3, 5))
    close(case.fun(x, temperature=t), case.reference(x / t))
    close(case.fun(x, temperature=jnp.asarray(t, float)), case.reference(x / t))


@tempered
def test_temperature_per_row(case, rng):
    x = rng.normal(size=(2, 3, 4))
    for shape in [(3, 1), (2, 1, 1), (2, 3, 1)]:
        t = rng.uniform(0.5, 2, size=shape)
        close(case.fun(x, temperature=t), case.reference(x / t))
    t = rng.uniform(0.5, 2, size=(4,))
    expected = case.fun(np.moveaxis(x, 1, -1) / t[:, None])
    if case.gives != "row value":
        expected = np.moveaxis(expected, -1, 1)
    close(case.fun(x, axis=1, temperature=t), expected)


@tempered_of_simplex
def test_limits_of_temperature(case, rng):
    x = rng.normal(size=(4, 7))
    x[:, :2] = 3.0  # a tie at the top
    where = np.arange(7) != 6
    hard = share_the_top(x)
    uniform = np.full_like(x, 1 / 7)
    for cold in (1e-3, 1e-100, 1e-300, 0.0):
        close(case.probabilities(x, temperature=cold), hard)
        close(case.probabilities(x, temperature=jnp.array(cold)), hard)
    for hot in (1e15, 1e300, np.inf):
        close(case.probabilities(x, temperature=hot), uniform)
        close(case.probabilities(x, temperature=jnp.array(hot)), uniform)
        close(case.probabilities(x, where=where, temperature=hot), where / 6 + 0 * x)


def test_logsumexp_at_temperature_is_not_multiplied_back():
    assert jsm.logsumexp(np.array([4.0, 4.0]), temperature=2.0) == 2 + np.log(2)


# Axes.


@of_sets
@pytest.mark.parametrize("axis", [0, -2, (2,), (-1, -3), None], ids=str)
def test_axes(case, axis, rng):
    x = rng.normal(size=(2, 3, 4))
    axes = (0, 1, 2) if axis is None else tuple(np.atleast_1d(axis) % 3)
    others = [i for i in range(3) if i not in axes]
    order = [*others, *axes]
    kept = tuple(x.shape[i] for i in others)
    expected = case.reference(x.transpose(order).reshape(*kept, -1))
    if case.gives != "row value":
        shape = tuple(x.shape[i] for i in order)
        expected = expected.reshape(shape).transpose(np.argsort(order))
    out = case.fun(x, axis=axis)
    assert out.shape == expected.shape
    close(out, expected)
    np.testing.assert_array_equal(case.fun(x, axis), out)  # positional, as in NumPy


@of_sets
def test_derivatives_along_several_axes(case, rng):
    x = rng.normal(size=(2, 3, 4))
    along_axes = functools.partial(case.fun, axis=(0, 2))
    flat = lambda x: case.fun(x.transpose(1, 0, 2).reshape(3, 8))  # noqa: E731
    tangent = np.cos(x)
    along = jax.jvp(along_axes, (x,), (tangent,))[1]
    expected = jax.jvp(flat, (x,), (tangent,))[1]
    if case.gives != "row value":
        expected = expected.reshape(3, 2, 4).transpose(1, 0, 2)
    close(along, expected)
    squares = [jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(x) for f in (along_axes, flat)]
    close(*squares)


@of_differences
def test_no_axes_make_rows_of_one(case):
    x = np.array([[2.0, -3.0]])
    p = case.fun(x, axis=())
    expected = {"probabilities": np.ones_like(x), "logarithms": np.zeros_like(x), "row value": x}
    np.testing.assert_array_equal(p, expected[case.gives])


@every_function
def test_layout_of_the_batch_does_not_matter(case, rng):
    x = rng.normal(size=(4, 6, 40))
    out = case.fun(x)
    flat = case.fun(x.reshape(24, 40))
    close(flat.reshape(out.shape), out)
    close(case.fun(x[2, 3]), out[2, 3])
    close(jax.vmap(case.fun, in_axes=1, out_axes=1)(x), out)


@every_mapping
@pytest.mark.parametrize("length", [33, 700, 1100])
def test_lengths_around_those_where_the_sums_change(case, length, rng):
    """Sums and solvers take other paths for long rows; no path may drop the rest of a row."""
    x = rng.normal(size=(3, length))
    x[np.arange(3), [0, length // 2, length - 1]] += 10
    close(case.fun(x), case.reference(x))


IN_BLOCKS = ("normmax", "budget_sparsemax", "stick_breaking")


@pytest.mark.parametrize("case", **named([c for c in MAPPINGS if c.name in IN_BLOCKS]))
def test_many_rows_in_blocks(case, monkeypatch, rng):
    """What many rows are cut into for a CPU's caches: here 12 rows into 3 blocks."""
    monkeypatch.setattr(_cpu, "LARGE", 84)
    monkeypatch.setattr(_cpu, "_AT_ONCE", 30)
    x, t = rng.normal(size=(2, 6, 7)), rng.uniform(0.5, 2, size=(6, 1))
    x[1, 3, 2] = np.nan
    expected = case.reference(x / t)
    expected[1, 3] = np.nan  # of all rows no other
    assert "scan[" in str(jax.make_jaxpr(case.fun)(x))
    close(case.fun(x, temperature=t), expected)
    mapped = jax.vmap(lambda x, t: case.fun(x, temperature=t), in_axes=(None, 0))
    close(mapped(x, np.stack([t, 2 * t]))[1], case.fun(x, temperature=2 * t))
    half = jnp.asarray(rng.normal(size=(12, 7)), jnp.bfloat16)
    where = rng.random((12, 7)) < 0.8
    found = case.fun(half, where=where)
    assert found.dtype == jnp.bfloat16
    expected = case.reference(np.where(where, half.astype(float), -1e30))
    np.testing.assert_allclose(found.astype(float), expected, rtol=0.01, atol=1e-6)
    x = rng.normal(size=(13, 7))  # no number of rows near 8 divides them
    monkeypatch.setattr(_cpu, "_AT_ONCE", 60)
    assert "scan[" not in str(jax.make_jaxpr(case.fun)(x))
    close(case.fun(x), case.reference(x))


@every_function
@pytest.mark.parametrize("length", [40, 1100])
def test_no_rows(case, length):
    """As of a batch from which all was filtered: its values and derivatives are empty."""
    for shape in ((0, length), (2, 0, length)):
        out, pushed = jax.jvp(case.fun, (np.zeros(shape),), (np.zeros(shape),))
        assert out.shape == pushed.shape == (shape[:-1] if case.gives == "row value" else shape)
        assert jax.grad(lambda x: jnp.sum(case.fun(x)))(np.zeros(shape)).shape == shape


@pytest.mark.asks_for_x64
def test_sparse_mappings_reach_zero_and_dense_ones_do_not(rng):
    x = 5 * rng.normal(size=(10, 30))
    for case in MAPPINGS:
        assert np.any(case.probabilities(x) == 0) == case.sparse


def test_supports_are_nested(rng):
    """The larger alpha, the smaller the support."""
    x = rng.normal(size=(20, 30))
    hard, sparse, half = (f(x) > 0 for f in (jsm.hardmax, jsm.sparsemax, jsm.entmax15))
    assert np.all(hard <= sparse)
    assert np.all(sparse <= half)
    np.testing.assert_array_equal(sparse, project_by_sorting(x) > 0)
