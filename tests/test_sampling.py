"""Sampling: draws against their probabilities, straight-through derivatives against soft ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests import tools
from tests.cases import MAPPINGS, SCORES, named

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

KEY = jax.random.key(0)
NUM_DRAWS = 200_000
X = np.array([1.0, -0.5, 0.0, 2.0, -4.0, 0.3])
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)


def assert_drawn_from(draws, p):
    """A chi-square test; what has no probability is never drawn."""
    counts = np.bincount(draws, minlength=len(p))
    assert len(counts) == len(p)
    possible = p > 0
    assert np.all(counts[~possible] == 0)
    expected = len(draws) * p[possible]
    assert scipy.stats.chisquare(counts[possible], expected).pvalue > 1e-3


def rows_of(x):
    return jnp.broadcast_to(jnp.asarray(x), (NUM_DRAWS, len(x)))


# What is drawn.

DRAWS = {
    "float32": (np.float32(X), {}),
    "float64": (X, {}),
    "far from 0": (np.float32(X.round() + 2**20), {}),
    "cold": (np.float32(X), {"temperature": 0.5}),
    "hot": (np.float32(X), {"temperature": np.float32(3.0)}),
    "ruled out by -inf": (np.float32([1, -np.inf, 2, 0, -np.inf, 0]), {}),
    "masked": (np.float32(X), {"where": X < 1.5}),
    "several infinite": (np.float32([np.inf, 0, np.inf, 3, np.inf, -np.inf]), {}),
}


def probabilities(x, where=True, temperature=1.0):
    scores = np.where(where, np.float64(x) / temperature, -np.inf)
    if np.isinf(scores.max()):
        return (scores == np.inf) / np.sum(scores == np.inf)
    return scipy.special.softmax(scores)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_follow_the_probabilities(name):
    x, options = DRAWS[name]
    draws = jsm.sample(KEY, rows_of(x), **options)
    assert draws.dtype == np.int32
    assert draws.shape == (NUM_DRAWS,)
    assert_drawn_from(draws, probabilities(x, **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_draws_of_half_precision(dtype):
    """No coarser than those of float32, and the very same."""
    x = jnp.asarray(X, dtype)
    draws = jsm.sample(KEY, rows_of(x))
    np.testing.assert_array_equal(draws, jsm.sample(KEY, rows_of(x.astype(np.float32))))
    assert_drawn_from(draws, probabilities(np.asarray(x, np.float64)))
    one_hot = jsm.gumbel_softmax(KEY, rows_of(x), hard=True)
    assert one_hot.dtype == x.dtype
    np.testing.assert_array_equal(one_hot.argmax(-1), draws)


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: jsm.top_k_mask(x, 3),
        lambda x: jsm.top_p_mask(x, 0.8),
        lambda x: jsm.min_p_mask(x, 0.2),
    ],
)
def test_masks_compose(mask):
    x = np.float32(X)
    where = mask(x)
    assert 1 < np.sum(where) < len(x)
    draws = jsm.sample(KEY, rows_of(x), where=where, temperature=0.7)
    assert_drawn_from(draws, probabilities(x, where, 0.7))


def test_draws_of_many_keys():
    draws = jax.jit(jax.vmap(lambda key: jsm.sample(key, np.float32(X))))(
        jax.random.split(KEY, NUM_DRAWS)
    )
    assert_drawn_from(draws, probabilities(X))


# Several draws.


def test_several_draws_with_replacement():
    """The shape is that of `jax.random.categorical`; all draws of all rows are independent."""
    x = np.float32([X, X[::-1]])
    draws = jsm.sample(KEY, x, shape=(50_000, 2, 2), temperature=1.5)
    assert draws.shape == (50_000, 2, 2)
    assert draws.dtype == np.int32
    assert_drawn_from(np.ravel(draws[:, 0, 0]), probabilities(X, temperature=1.5))
    assert_drawn_from(np.ravel(draws[:, 1, 1]), probabilities(X[::-1], temperature=1.5))
    p = probabilities(X, temperature=1.5)
    joint = np.ravel(draws[:, 0, 0] * 6 + draws[:, 1, 0])
    assert_drawn_from(joint, np.outer(p, p).ravel())
    # Draws of one axis, of scores of which the rows are another.
    along = jsm.sample(KEY, x.T, 0, shape=(7, 2), where=np.array(X > 0)[:, None])
    assert along.shape == (7, 2)
    assert np.all(np.isin(along, np.flatnonzero(X > 0)))
    np.testing.assert_array_equal(jsm.sample(KEY, x, shape=(2,)), jsm.sample(KEY, x))


def test_draws_without_replacement():
    """The second is drawn from what the first has left."""
    x = np.float32(X)
    draws = np.asarray(jsm.sample(KEY, rows_of(x), shape=(2, NUM_DRAWS), replace=False))
    assert draws.shape == (2, NUM_DRAWS)
    assert draws.dtype == np.int32
    p = probabilities(x)
    pairs = p[:, None] * p[None] / (1 - p[:, None]) * (1 - np.eye(6))
    assert_drawn_from(draws[0] * 6 + draws[1], pairs.ravel())
    # All of them, in an order; the first is that of a single draw.
    every = np.asarray(jsm.sample(KEY, rows_of(x)[:100], shape=(3, 2, 100), replace=False))
    np.testing.assert_array_equal(
        np.sort(every.reshape(6, 100), 0), np.arange(6)[:, None] + 0 * every[0, 0]
    )
    np.testing.assert_array_equal(every[0, 0], jsm.sample(KEY, rows_of(x)[:100]))


@pytest.mark.asks_for_nan
def test_draws_without_replacement_of_what_there_is():
    x = np.array([[1.0, 3.0, 2.0], [-np.inf, 7.0, -np.inf], [np.nan, 1.0, 2.0]])
    draws = jsm.sample(KEY, x, shape=(3, 3), temperature=0, replace=False)
    np.testing.assert_array_equal(draws.T, [[1, 2, 0], [1, -1, -1], [-1, -1, -1]])
    of_signs = jsm.sample(
        KEY, np.array([-0.0, 0.0, -1.0]), shape=(3,), temperature=0, replace=False
    )
    np.testing.assert_array_equal(of_signs, [0, 1, 2])
    where = np.array([True, True, False])
    draws = jsm.sample(KEY, x, -1, where, shape=(3, 3), temperature=jnp.zeros(()), replace=False)
    np.testing.assert_array_equal(draws.T, [[1, 0, -1], [1, -1, -1], [-1, -1, -1]])
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    draws = jsm.sample(KEY, x, (0, 2), shape=(8, 3), temperature=0, replace=False)
    flat = x.transpose(1, 0, 2).reshape(3, 8)
    np.testing.assert_array_equal(draws.T, np.argsort(-flat, -1))


def test_wrong_shape_of_draws():
    for shape in ((3,), (2, 3), 3):
        with pytest.raises(
            ValueError, match=r"shape must be a tuple that ends with .* \(2,\), got"
        ):
            jsm.sample(KEY, np.zeros((2, 6)), shape=shape)
    for shape in ((-1, 2), (2.0, 2), (True, 2), ("a", 2)):
        with pytest.raises(ValueError, match=r"shape must be of whole numbers that are not neg"):
            jsm.sample(KEY, np.zeros((2, 6)), shape=shape)
    draws = jsm.sample(KEY, np.zeros((2, 6)), shape=[3, 2])
    np.testing.assert_array_equal(draws, jsm.sample(KEY, np.zeros((2, 6)), shape=(3, 2)))
    with pytest.raises(ValueError, match="at most 6 draws of a row if replace=False, got 7"):
        jsm.sample(KEY, X, shape=(7,), replace=False)
    draw = lambda x: jsm.sample(KEY, x, (0, "i"), shape=(2,), replace=False)  # noqa: E731
    with pytest.raises(ValueError, match="axis must be array axes if replace=False, got"):
        tools.on_mesh(draw, ("i",))(np.zeros(8))


def _keys(n):
    return jax.random.split(KEY, n)


def test_rows_are_independent():
    pairs = jsm.sample(KEY, np.zeros((20_000, 2, 3), np.float32))
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(np.asarray(pairs).T), 1)
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_positions_along_other_axes():
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    kwargs = {"temperature": 0}
    np.testing.assert_array_equal(jsm.sample(KEY, x, 1, **kwargs), x.argmax(1))
    np.testing.assert_array_equal(jsm.sample(KEY, x, None, **kwargs), x.argmax())
    np.testing.assert_array_equal(
        jsm.sample(KEY, x, (0, -1), **kwargs), x.transpose(1, 0, 2).reshape(3, 8).argmax(1)
    )
    assert jsm.sample(KEY, x, 0).shape == (3, 4)


@pytest.mark.parametrize("zero", [0, 0.0, jnp.zeros(()), np.zeros((3, 1))])
def test_temperature_0_is_argmax(zero):
    x = np.array([[1.0, 3.0, 3.0], [np.inf, np.inf, 0.0], [-np.inf, -7.0, -np.inf]])
    for key in _keys(5):
        np.testing.assert_array_equal(jsm.sample(key, x, temperature=zero), [1, 0, 1])


def test_temperature_per_row():
    x = np.broadcast_to(np.float32(X), (NUM_DRAWS, len(X)))
    temperature = np.where(np.arange(NUM_DRAWS) % 2, 0.0, 2.0).astype(np.float32)[:, None]
    draws = np.asarray(jsm.sample(KEY, x, temperature=temperature))
    assert np.all(draws[1::2] == X.argmax())
    assert_drawn_from(draws[::2], probabilities(X, temperature=2.0))


@pytest.mark.asks_for_nan
def test_rows_without_anything_to_draw():
    x = np.array([[0.0, 1.0], [-np.inf, -np.inf], [np.nan, 1.0], [np.nan, 1.0]])
    where = np.array([[False, False], [True, True], [True, True], [False, True]])
    np.testing.assert_array_equal(jsm.sample(KEY, x, where=where), [-1, -1, -1, 1])
    assert jsm.sample(KEY, np.zeros((2, 0))).tolist() == [-1, -1]
    for hard in (False, True):
        p = jsm.gumbel_softmax(KEY, x, where=where, hard=hard)
        np.testing.assert_array_equal(p, [[0, 0], [0, 0], [np.nan] * 2, [0, 1]])
    assert jsm.gumbel_softmax(KEY, np.zeros((2, 0)), hard=True).shape == (2, 0)


@pytest.mark.leaks_in_jax
def test_draws_across_devices():
    """Each device draws noise of its own; positions count over all of them."""
    mesh = jax.make_mesh((2,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec(None, "vocab")
    x = rows_of(np.float32(X))
    draw = jax.shard_map(
        lambda x: jsm.sample(KEY, x, (-1, "vocab")),
        mesh=mesh,
        in_specs=spec,
        out_specs=PartitionSpec(),
    )
    assert_drawn_from(jax.jit(draw)(x), probabilities(X))
    one_hot = jax.shard_map(
        lambda x: jsm.gumbel_softmax(KEY, x, (-1, "vocab"), hard=True),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )(x[:100])
    np.testing.assert_array_equal(np.argmax(one_hot, -1), draw(x[:100]))
    np.testing.assert_array_equal(np.sum(one_hot, -1), 1)

    def loss(x, hard):
        p = jsm.gumbel_softmax(KEY, x, (-1, "vocab"), temperature=0.5, hard=hard)
        weights = jnp.asarray([[1.0, -2.0, 0.5]], x.dtype)
        drawn = jsm.sample(KEY, x, (-1, "vocab")).astype(x.dtype)
        return jax.lax.psum(jnp.sum(weights * p) + jnp.sum(drawn), "vocab")

    def gradient(hard):
        of_all = jax.shard_map(
            functools.partial(loss, hard=hard), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
        )
        return jax.jit(jax.grad(of_all))(x[:10])

    soft = gradient(hard=False)
    assert np.any(soft != 0)
    close(gradient(hard=True), soft, rtol=1e-5, atol=1e-7)


# Gumbel-softmax.


def test_gumbel_softmax_is_largest_where_sample_draws():
    x = np.random.default_rng(0).normal(size=(50, 5))
    drawn = jsm.sample(KEY, x)
    soft = jsm.gumbel_softmax(KEY, x, temperature=0.3)
    np.testing.assert_array_equal(soft.argmax(-1), drawn)
    close(soft.sum(-1), 1)
    hard = jsm.gumbel_softmax(KEY, x, temperature=0.3, hard=True)
    np.testing.assert_array_equal(hard, np.eye(5)[drawn])
    np.testing.assert_array_equal(jsm.gumbel_softmax(KEY, x, temperature=0), np.eye(5)[drawn])


def test_gumbel_softmax_is_softmax_of_gumbel_noise():
    """Logarithms give the noise back: it has the distribution that it should."""
    x = np.zeros((5_000, 3))
    log_p = np.log(jsm.gumbel_softmax(KEY, x, temperature=1.0))
    # The difference of two Gumbel variables is logistic.
    assert scipy.stats.kstest(log_p[:, 0] - log_p[:, 1], "logistic").pvalue > 1e-3
    half = np.log(jsm.gumbel_softmax(KEY, x, temperature=2.0))
    close(np.diff(half), np.diff(log_p) / 2, rtol=1e-9)


def test_gumbel_softmax_along_another_axis_and_masked():
    x = np.random.default_rng(0).normal(size=(4, 3))
    where = np.array([[True], [True], [False], [True]])
    p = jsm.gumbel_softmax(KEY, x, 0, where)
    close(p.sum(0), 1)
    assert np.all(p[2] == 0)
    odd = np.where(where, x, np.nan)
    gradient = jax.grad(lambda x: jnp.sum(jsm.gumbel_softmax(KEY, x, 0, where)[0]))(odd)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[2] == 0)
    assert np.all(gradient[0] != 0)


def test_gumbel_softmax_derivatives():
    x = np.random.default_rng(0).normal(size=(2, 4))
    fun = jax.jit(lambda x, t: jsm.gumbel_softmax(KEY, x, temperature=t))
    check_grads(fun, (x, np.array(0.7)), 1, rtol=1e-4)


def test_hard_gumbel_softmax_has_the_soft_derivatives():
    x = np.random.default_rng(0).normal(size=(2, 4))

    def loss(x, t, hard):
        p = jsm.gumbel_softmax(KEY, x, temperature=t, hard=hard)
        return jnp.sum(jnp.asarray(SCORES) * p)  # linear: second derivatives are those of p

    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        of_loss = jax.jit(derivative(loss, (0, 1)), static_argnums=2)
        hard, soft = (of_loss(x, 0.7, hard) for hard in (True, False))
        jax.tree.map(close, hard, soft)
        assert np.any(jax.tree.leaves(soft)[0] != 0)


@pytest.mark.parametrize("fun", [jsm.sample, jsm.gumbel_softmax])
def test_the_same_under_jit_and_vmap(fun):
    x = np.random.default_rng(0).normal(size=(3, 5))
    keys = _keys(3)
    each = np.stack([fun(key, row) for key, row in zip(keys, x, strict=True)])
    close(jax.vmap(fun)(keys, x), each)
    close(jax.jit(fun)(keys[0], x[0]), each[0])
    close(fun(jax.random.key_data(keys[0]), x[0]), each[0])  # a key of the old style


# Straight through.


@pytest.mark.parametrize(
    "case", **named([m for m in MAPPINGS if m.name in ("softmax", "entmax15", "stick_breaking")])
)
def test_straight_through(case):
    fun = jsm.straight_through(case.fun)
    options = {"temperature": 0.8} if case.takes("temperature") else {}
    np.testing.assert_array_equal(fun(SCORES, **options), jsm.hardmax(SCORES))
    np.testing.assert_array_equal(
        fun(SCORES, 0, SCORES < 1, **options),
        jsm.hardmax(SCORES, 0, SCORES < 1),
    )

    def loss(x, fun):
        return jnp.sum(jnp.asarray([1.0, -2.0, 0.5, 3.0]) * fun(x, **options)[0])

    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        ours, wanted = (
            jax.jit(derivative(functools.partial(loss, fun=f)))(SCORES) for f in (fun, case.fun)
        )
        close(ours, wanted)


def test_straight_through_is_exact():
    """One-hot at the first of the largest; where ties share, as hardmax has it to the last bit."""
    x = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    x[::2, 2:5] = 5.0
    x[1] = np.inf
    one_hot = np.eye(7)[x.argmax(-1)]
    np.testing.assert_array_equal(jsm.straight_through(jsm.softmax)(x), one_hot)
    along = jsm.straight_through(jsm.softmax)(x.T, axis=0)
    np.testing.assert_array_equal(along, one_hot.T)
    sharing = jsm.straight_through(jsm.softmax, lambda x, **rows: jsm.hardmax(x, **rows))
    np.testing.assert_array_equal(sharing(x), jsm.hardmax(x))


def test_straight_through_chooses_in_half_precision():
    """Where many rows tie."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(500, 50)), jnp.bfloat16)
    assert np.any(np.sum(x == x.max(-1, keepdims=True), -1) > 1)
    choice = np.float32(jsm.straight_through(jsm.entmax15)(x))
    np.testing.assert_array_equal(choice, np.eye(50)[np.float32(x).argmax(-1)])


@pytest.mark.asks_for_nan
def test_straight_through_where_there_is_nothing_to_choose():
    x = np.array([[-np.inf, -np.inf], [np.nan, 1.0], [2.0, 2.0]])
    choose = jsm.straight_through(jsm.softmax)
    np.testing.assert_array_equal(choose(x), [[0, 0], [np.nan, np.nan], [1, 0]])
    np.testing.assert_array_equal(choose(x[2], where=np.array([False, True])), [0, 1])


def test_straight_through_of_other_signatures():
    along = jsm.straight_through(functools.partial(jsm.softmax, axis=0))
    np.testing.assert_array_equal(along(SCORES), jsm.hardmax(SCORES, 0))
    entmax = jsm.straight_through(jsm.entmax)
    np.testing.assert_array_equal(entmax(SCORES, 1.3, 0), jsm.hardmax(SCORES, 0))
    np.testing.assert_array_equal(entmax(x=SCORES, axis=None), jsm.hardmax(SCORES, None))
    any_of_it = jsm.straight_through(lambda x, **kwargs: jsm.softmax(x, **kwargs))
    np.testing.assert_array_equal(any_of_it(SCORES, axis=0), jsm.hardmax(SCORES, 0))
    top = functools.partial(jsm.softmax, temperature=0)
    segments = jsm.straight_through(jsm.softmax, top)(
        SCORES, segment_ids=np.array([0, 0, 1, 1]), temperature=2.0
    )
    np.testing.assert_array_equal(segments, [[1, 0, 0, 1], [1, 0, 1, 0]])


def test_straight_through_under_jit_and_vmap():
    fun = jsm.straight_through(jsm.entmax15)
    gradient = jax.grad(lambda row: fun(row)[0])
    close(jax.jit(jax.vmap(gradient))(SCORES), [gradient(row) for row in SCORES])
    half = fun(jnp.asarray(SCORES, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


# Wrong calls.

CALLS = {
    "an integer": (0, TypeError, "key must be a key of jax.random.key, got dtype int32"),
    "floats": (
        np.zeros(2, "float32"),
        TypeError,
        "key must be a key of jax.random.key, got dtype float32",
    ),
    "many keys": (_keys(3), ValueError, r"key must be a single key, got keys of shape \(3,\)"),
}


@pytest.mark.parametrize("fun", [jsm.sample, jsm.gumbel_softmax])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_key(name, fun):
    key, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        fun(jnp.int32(0) if name == "an integer" else key, X)


@pytest.mark.parametrize("fun", [jsm.sample, jsm.gumbel_softmax])
def test_wrong_call(fun):
    with pytest.raises(TypeError, match="where must be boolean"):
        fun(KEY, X, where=np.ones(6))
    with pytest.raises(ValueError, match="axis 1 is out of range"):
        fun(KEY, X, axis=1)
    with pytest.raises(ValueError, match="temperature must not be negative or NaN, got -1"):
        fun(KEY, X, temperature=-1)
    with pytest.raises(TypeError, match="x must be real"):
        fun(KEY, X * 1j)


def test_hard_is_no_array():
    with pytest.raises(TypeError, match="hard must be True or False, got "):
        jsm.gumbel_softmax(KEY, X, hard=jnp.ones((), bool))


def test_wrong_call_of_straight_through():
    with pytest.raises(ValueError, match="mapping must have a parameter axis, got one with"):
        jsm.straight_through(jsm.sinkhorn)
    with pytest.raises(ValueError, match="hard must take sink, got one with"):
        jsm.straight_through(jsm.softmax)(X, sink=0.0)
    with pytest.raises(ValueError, match=r"hard must return the shape .* \(6,\), got shape \(\)"):
        jsm.straight_through(jsm.softmax, jsm.logsumexp)(X)
