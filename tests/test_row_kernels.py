"""Rows by kernels, interpreted, against references in float64.

Nothing here runs on a TPU. `test_accelerators.py` compiles them for one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from jaxsoftmax import _implementations
from tests.cases import MAPPINGS, entmax43

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

INTERPRETED = "pallas, interpreted"
# Two blocks of rows, the second not full, and lanes that hold no entry.
SHAPE = 300, 200
NAMES = "softmax", "log_softmax", "sparsemax", "entmax15", "entmax", "entmax43"
CASES = {case.name: case for case in MAPPINGS if case.name in NAMES}
by_name = pytest.mark.parametrize("name", NAMES)
FUNCTIONS = {name: getattr(jsm, name, entmax43) for name in NAMES}
FUNCTIONS["entmax"] = functools.partial(jsm.entmax, alpha=1.3)


def kernel(name):
    return functools.partial(FUNCTIONS[name], implementation=INTERPRETED)


@functools.cache
def compiled(name, *options):
    """By a kernel and by XLA, with options by name."""

    def both(x, *values):
        given = dict(zip(options, values, strict=True))
        return kernel(name)(x, **given), FUNCTIONS[name](x, **given)

    return jax.jit(both)


def scores(rng, dtype=np.float32):
    """Rows far apart and alike: with few in the support, and with all."""
    scale = np.geomspace(0.01, 30, SHAPE[0])[:, None]
    return jnp.asarray(scale * rng.normal(size=SHAPE), dtype)


def assert_near(found, wanted, name, tolerance):
    """Logarithms to their size, probabilities to 1."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    size = np.maximum(1, np.abs(wanted)) if name == "log_softmax" else 1
    np.testing.assert_allclose(found / size, wanted / size, rtol=0, atol=tolerance)


@by_name
def test_float32(name, rng):
    x = scores(rng)
    found, _ = compiled(name)(x)
    assert found.dtype == np.float32
    wanted = CASES[name].reference(np.asarray(x, np.float64))
    assert_near(found, wanted, name, 1e-6)
    if CASES[name].sparse:
        assert np.mean(found == 0) > 0.4
        np.testing.assert_array_equal(found[wanted == 0], 0)


@by_name
def test_bfloat16(name, rng):
    """Computed in float32 and rounded once."""
    x = scores(rng, jnp.bfloat16)
    found, _ = compiled(name)(x)
    assert found.dtype == jnp.bfloat16
    wanted = CASES[name].reference(np.asarray(x, np.float64))
    found = np.asarray(found, np.float64)
    np.testing.assert_array_less(np.abs(found - wanted), 2.0**-8 * np.abs(wanted) + 1e-6)


@by_name
def test_what_is_not_finite(name, rng):
    x = np.array(scores(rng))
    x[3] = -np.inf
    x[4, 5], x[299, 199] = np.nan, np.nan
    x[5, 7:9] = np.inf
    x[6, :190] = -np.inf
    x[7, 130:135] = x[7, 6:270:128] = np.inf  # more in a lane than a search begins with
    found, wanted = compiled(name)(x)
    p = np.exp(found) if name == "log_softmax" else np.asarray(found)
    np.testing.assert_array_equal(p[3], 0)
    assert np.all(np.isnan(p[[4, 299]]))
    np.testing.assert_allclose(p[5, 7:9], 0.5)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    finite = np.isfinite(wanted)
    assert_near(found[finite], wanted[finite], name, 1e-5)
    np.testing.assert_array_equal(found[~finite], wanted[~finite])


@by_name
def test_options(name, rng):
    """Masks, temperatures and sinks, one per row; a row in which nothing takes part."""
    x = np.array(scores(rng))
    where = rng.random(SHAPE) < 0.5
    where[9] = False
    x[10, ~where[10]] = np.nan
    temperature = np.float32(0.5 + rng.random((SHAPE[0], 1)))
    sink = np.float32(rng.normal(size=(SHAPE[0], 1)))
    options = {"where": where, "temperature": temperature, "sink": sink}
    found, wanted = compiled(name, *options)(x, *options.values())
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(found[~finite], wanted[~finite])
    assert_near(found[finite], wanted[finite], name, 1e-6)


@pytest.mark.parametrize("shape", [(5, 1), (1, 128), (2, 3, 130), (1, 5000), (0, 4), (4, 0)])
def test_shapes(shape, rng):
    x = jnp.asarray(rng.normal(size=shape), np.float32)
    np.testing.assert_allclose(kernel("entmax15")(x), jsm.entmax15(x), rtol=0, atol=3e-7)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_axes(axis, rng):
    x = jnp.asarray(rng.normal(size=(20, 3, 10)), np.float32)
    found = kernel("sparsemax")(x, axis=axis)
    np.testing.assert_allclose(found, jsm.sparsemax(x, axis=axis), rtol=0, atol=3e-7)


def both(of, *args, rtol=3e-6):
    """Compares what `of(implementation, *args)` returns."""
    ours, wanted = (jax.jit(functools.partial(of, name))(*args) for name in (INTERPRETED, "xla"))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(np.max(np.abs(y))))


def small(rng):
    shapes = (6, 200), (6, 200), (6, 1)
    x, ct, a = (np.float32(rng.normal(size=shape)) for shape in shapes)
    return x, ct, 1.3 + 0.2 * np.tanh(a)


def test_gradients_of_scores_alpha_temperature_and_sink(rng):
    def of(name, x, ct, a):
        def loss(x, alpha, temperature, sink):
            options = {"temperature": temperature, "sink": sink, "implementation": name}
            return jnp.vdot(jsm.entmax(x, alpha, **options), ct)

        return jax.grad(loss, (0, 1, 2, 3))(x, a, a, a)

    both(of, *small(rng))


@pytest.mark.parametrize("mapping", [jsm.entmax15, jsm.log_softmax])
def test_forward_mode_and_second_derivatives(mapping, rng):
    def of(name, x, ct, _):
        f = functools.partial(mapping, implementation=name)
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) * ct))
        return jax.jvp(f, (x,), (ct,)), jax.jvp(slope, (x,), (ct,))[1]

    both(of, *small(rng), rtol=1e-5)


@pytest.mark.parametrize("over", [(0, 0, 0), (0, 0, None), (None, 0, 0)])
def test_vmap_of_gradient(over, rng):
    x, ct, a = small(rng)
    args = [y if i == 0 else y[0] for y, i in zip((x, ct, a), over, strict=True)]

    def of(name, *args):
        def loss(x, ct, alpha):
            y = jsm.entmax(x, alpha, sink=alpha[0], implementation=name)
            return jnp.vdot(y, ct) + jnp.sum(jsm.log_softmax(x, implementation=name))

        return jax.vmap(jax.value_and_grad(loss, (0, 2)), over)(*args)

    both(of, *args)


def test_in_attention_and_losses(rng):
    """Where a mapping is an argument, what it says of itself does no harm."""
    x, _, _ = small(rng)
    q = x.reshape(1, 6, 4, 50)
    mapping = kernel("sparsemax")
    found = jsm.dot_product_attention(q, q, q, normalizer=mapping)
    wanted = jsm.dot_product_attention(q, q, q, normalizer=jsm.sparsemax)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def lowered(f, platform, *args):
    """The program for a platform that need not be here."""
    with jax.enable_x64(False):
        return export.export(jax.jit(f), platforms=[platform])(*args).mlir_module()


X = jax.ShapeDtypeStruct((4, 30, 200), jnp.float32)


@by_name
def test_a_program_for_a_tpu_is_one_kernel(name):
    f = functools.partial(FUNCTIONS[name], implementation="pallas")
    assert lowered(f, "tpu", X).count("tpu_custom_call") == 1
    assert lowered(jax.vmap(jax.vmap(f)), "tpu", X).count("tpu_custom_call") == 1
    for platform in ("cpu", "cuda"):
        assert "tpu_custom_call" not in lowered(f, platform, X)


def test_kernels_are_chosen_where_they_were_measured(monkeypatch):
    """So far nowhere: nothing has run on a device."""
    assert "tpu_custom_call" not in lowered(jsm.sparsemax, "tpu", X)
    monkeypatch.setitem(_implementations.MEASURED, ("tpu", "rows"), "pallas")
    jax.clear_caches()
    assert lowered(jsm.sparsemax, "tpu", X).count("tpu_custom_call") == 1
    wide = jax.ShapeDtypeStruct((2, 2**20), jnp.float32)
    assert "tpu_custom_call" not in lowered(jsm.sparsemax, "tpu", wide)
    jax.clear_caches()


@pytest.mark.parametrize("check_vma", [False, True])
def test_each_device_has_its_rows(check_vma):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    f = functools.partial(jsm.entmax15, implementation="pallas")
    f = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=check_vma)
    both = jax.value_and_grad(lambda x: jnp.sum(f(x) ** 2))
    assert lowered(both, "tpu", X).count("tpu_custom_call") == 1


identity = jsm.Form(weight=jnp.exp, score=jnp.log, tau=0.0)
REFUSED = {
    "segment_ids": (jsm.softmax, {"segment_ids": jnp.zeros(20, int), "num_segments": 1}),
    "the dtype float64": (jsm.sparsemax, {"dtype": np.float64}),
    "rows of 1000000 entries": (jsm.log_softmax, {"length": 1_000_000}),
    "own, whose form has a tau": (jsm.threshold_mapping(identity, name="own"), {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_kernel_is_named(what):
    mapping, options = REFUSED[what]
    options = dict(options)
    shape = 2, options.pop("length", 20)
    x = jax.ShapeDtypeStruct(shape, options.pop("dtype", np.float32))
    f = functools.partial(mapping, implementation="pallas", **options)
    with pytest.raises(ValueError, match=rf"implementation 'pallas' has no kernel for {what}"):
        jax.eval_shape(f, x)


def test_mesh_axes_have_no_kernel():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    f = functools.partial(jsm.sparsemax, axis=(-1, "a"), implementation="pallas")
    f = jax.shard_map(f, mesh=mesh, in_specs=P(None, None, "a"), out_specs=P(None, None, "a"))
    with pytest.raises(ValueError, match="no kernel for the mesh axes a: use 'xla' or None"):
        jax.eval_shape(f, X)


@pytest.mark.parametrize("name", ["cudnn", 3])
def test_unknown_implementations_are_named(name):
    with pytest.raises(ValueError, match=r"implementation must be None, 'xla' or 'pallas', got"):
        jsm.softmax(jnp.ones(3), implementation=name)
