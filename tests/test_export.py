"""Every public function, forward and gradient, lowers for CPUs, GPUs and TPUs, without having one.

An exported function is a file: what it holds is called again and gives the same numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxsoftmax as jsm
from jaxsoftmax import calibration
from tests.calls import CALLS, NAMES, public_functions, value_and_gradients
from tests.cases import FUNCTIONS, named

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

for result in (calibration.ReliabilityCurve, calibration.BrierDecomposition):
    export.register_namedtuple_serialization(result, serialized_name=result.__name__)


@pytest.fixture(autouse=True)
def float32():
    """As users call it; with float64 there would be conversions that they do not have."""
    with jax.enable_x64(False):
        yield


def test_every_public_function_is_called():
    assert sorted(CALLS) == sorted(public_functions())


def same(actual, expected, atol=1e-4):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=atol), actual, expected
    )


@pytest.mark.parametrize("name", NAMES)
def test_forward(name):
    fun, args = CALLS[name]
    exported = export.export(jax.jit(fun), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    exported = export.deserialize(exported.serialize())
    # Where an optimum is, rounding of the loss tells up to the root of its own size, 3e-4.
    atol = 2e-3 if ".fit_" in name else 1e-4
    same(exported.call(*args), jax.jit(fun)(*args), atol)


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name):
    fun, args = CALLS[name]
    exported = export.export(jax.jit(value_and_gradients(fun)), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    assert exported.out_avals
    assert exported.serialize()


@pytest.mark.parametrize("name", ["softmax", "entmax", "entmax_loss", "dot_product_attention"])
def test_an_export_can_be_differentiated(name):
    fun, args = CALLS[name]
    blob = export.export(jax.jit(fun), platforms=PLATFORMS)(*args).serialize(vjp_order=1)
    gradients = jax.jit(value_and_gradients(export.deserialize(blob).call))(*args)
    same(gradients, jax.jit(value_and_gradients(fun))(*args))


@pytest.mark.parametrize("case", **named(FUNCTIONS))
def test_shapes_may_be_symbols(case, rng):
    """One export serves all numbers of rows, and all lengths."""

    def with_gradient(x):
        value, pull_back = jax.vjp(case.fun, x)
        return value, pull_back(jnp.cos(value))[0]

    shape = export.symbolic_shape("rows, length")
    exported = export.export(jax.jit(with_gradient))(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = np.float32(rng.normal(size=(3, 40)))
    for actual, wanted in zip(exported.call(x), with_gradient(x), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


CHOICES = {
    "sample": lambda x: jsm.sample(jax.random.key(0), x, temperature=0.7),
    "several": lambda x: jsm.sample(jax.random.key(0), x, shape=(2, x.shape[0])),
    "without replacement": lambda x: jsm.sample(
        jax.random.key(0), x, shape=(3, x.shape[0]), replace=False
    ),
    "gumbel_softmax": lambda x: jsm.gumbel_softmax(jax.random.key(0), x, hard=True),
    "straight_through": jsm.straight_through(jsm.sparsemax),
    "top_k_mask": lambda x: jsm.top_k_mask(x, 3, where=x < 2),
    "k per row": lambda x: jsm.top_k_mask(x, jnp.int32(5)),
    "top_p_mask": lambda x: jsm.top_p_mask(x, 0.9, temperature=0.7, min_tokens_to_keep=2),
    "min_p_mask": lambda x: jsm.min_p_mask(x, 0.1, where=x < 2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CHOICES)
def test_shapes_of_choices_may_be_symbols(name, rng):
    fun = CHOICES[name]
    # Three that differ are to be had of three or more.
    enough = ["length >= 3"] if name == "without replacement" else []
    shape = export.symbolic_shape("rows, length", constraints=enough)
    exported = export.export(jax.jit(fun))(jax.ShapeDtypeStruct(shape, jnp.float32))
    # The last is shorter than `k`.
    for size in ((3, 40), (2, 7)) + (((4, 2),) if "mask" in name else ()):
        x = np.float32(rng.normal(size=size))
        np.testing.assert_allclose(exported.call(x), fun(x), rtol=1e-6)


def _linear(reduction, hidden, weight):
    labels = jnp.arange(hidden.shape[0]) % weight.shape[1]
    return jsm.linear_cross_entropy(hidden, weight, labels, reduction=reduction)


def _decode(query, key, value):
    offset = key.shape[1] - query.shape[1]
    return jsm.dot_product_attention(query, key, value, is_causal=True, query_offset=offset)


_attention = functools.partial(jsm.dot_product_attention, block_size=16)
WITH_SYMBOLS = {
    # Of a batch, where blocks are cut as they are from one of its entries.
    "batch": (
        functools.partial(_attention, is_causal=True, normalizer=jsm.entmax15),
        ("b, 40, 4, 8", "b, 40, 2, 8", "b, 40, 2, 8"),
        ({"b": 3}, {"b": 1}),
    ),
    "batch of another's mapping": (
        functools.partial(_attention, normalizer=lambda s, axis, where: jax.nn.softmax(s, axis)),
        ("b, 40, 2, 8",) * 3,
        ({"b": 3},),
    ),
    "keys": (_decode, ("b, 1, 4, 8", "b, s, 2, 8", "b, s, 2, 8"), ({"b": 2, "s": 30},)),
    "lengths": (
        functools.partial(_attention, local_window_size=(5, 2)),
        ("b, t, 4, 8", "b, s, 2, 8", "b, s, 2, 8"),
        ({"b": 2, "t": 40, "s": 50}, {"b": 1, "t": 5, "s": 1}),
    ),
    "rows of a layer": (
        functools.partial(_linear, "mean"),
        ("n, 8", "8, 300"),
        ({"n": 3}, {"n": 600}),
    ),
    "rows and classes": (functools.partial(_linear, "none"), ("n, 8", "8, v"), ({"n": 3, "v": 9},)),
}


@pytest.mark.parametrize("name", WITH_SYMBOLS)
def test_sizes_may_be_symbols(name, rng):
    """Of attention and of a last layer, with their gradients."""
    fun, shapes, all_sizes = WITH_SYMBOLS[name]

    def with_gradients(*args):
        value, pull_back = jax.vjp(fun, *args)
        return value, pull_back(jnp.cos(value))

    symbols = [export.symbolic_shape(shape, scope=_SCOPE) for shape in shapes]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in symbols]
    exported = export.export(jax.jit(with_gradients), platforms=PLATFORMS)(*args)
    for sizes in all_sizes:
        given = [[sizes.get(str(n), n) for n in shape] for shape in symbols]
        x = [np.float32(rng.normal(size=shape)) for shape in given]
        same(exported.call(*x), with_gradients(*x))


_SCOPE = export.SymbolicScope()
