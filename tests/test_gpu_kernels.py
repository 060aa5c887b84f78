"""Attention by kernels for a Hopper GPU, interpreted, against whole matrices in float64.

Nothing here runs on a GPU. `test_accelerators.py` compiles them for one.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from jaxsoftmax import _implementations, _jax
from jaxsoftmax._configured import configured
from jaxsoftmax.attention import _attention, _call
from jaxsoftmax.attention._arguments import Sizes
from jaxsoftmax.attention._kernels._hopper_arrays import BLOCK, over_scores
from jaxsoftmax.attention._kernels._tiles import Call
from tests import test_kernels
from tests.test_kernels import (
    CAUSAL,
    OPTIONS,
    B,
    N,
    S,
    T,
    arrays_of,
    bent,
    case,
    dense,
    lowered,
    of_places,
)

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

kernels = functools.partial(
    jsm.dot_product_attention, implementation="pallas for CUDA, interpreted"
)
CASES = [
    *(("softmax", option) for option in ("lengths", "sink", "all")),
    ("sparsemax", "causal"),
    *(("entmax15", option) for option in ("window before", "offsets", "functions", "segments")),
    ("entmax", "temperature"),
]


@pytest.fixture
def step_by_step(monkeypatch):
    """The interpreter has side effects, which programs with rules of their own cannot have."""

    def call(static, normalizer, arrays):
        return _call.attend(static, configured(normalizer) or normalizer, arrays)

    monkeypatch.setattr(_attention, "call", call)


def errors(rng, name, option, dtype, widths=(64, 64)):
    how = {"attend": kernels, "compiled": lambda function: function}
    return case(rng, name, option, dtype, widths, **how)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda name: name)
@pytest.mark.usefixtures("step_by_step")
def test_float16(name, option, rng):
    """The factors of products are rounded, to 2 ** -11 of each; numbers are sums in float32."""
    found = errors(rng, name, option, np.float16)
    of_numbers = [found.pop(name) for name in ("sink", "temperature", "alpha") if name in found]
    assert max(found.values()) < 2e-3, found
    assert max(of_numbers, default=0) < 5e-5, of_numbers


@pytest.mark.usefixtures("step_by_step")
def test_bfloat16_and_wide_heads(rng):
    """Tiles are worked at in two parts where sums are wide."""
    found = errors(rng, "entmax15", "all", jnp.bfloat16, (128, 64))
    assert max(found.values()) < 1e-2, found


WIDTHS = [
    ("softmax", (32, 32)),
    ("entmax15", (80, 9)),
    ("softmax", (96, 64)),
    ("softmax", (256, 256)),
    ("entmax15", (136, 200)),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "widths"), WIDTHS, ids=str)
@pytest.mark.usefixtures("step_by_step")
def test_other_widths(name, widths, rng, monkeypatch):
    """Of keys and of values, under a mask of keys; what kernels have more is cut off."""
    seen = np.arange(100) < 90
    options = {"is_causal": True, "mask": jnp.asarray(seen[None, None, None])}
    monkeypatch.setitem(OPTIONS, "short", ((), options, seen & CAUSAL[..., :100, :100]))
    arrays = {name: x[:1, :100, :1] for name, x in arrays_of(rng, np.float16, (), widths).items()}
    if max(widths) > 128:  # of which tiles come in parts
        arrays["bias"] = jnp.asarray(rng.normal(size=(1, 1, 100, 100)), np.float16)
    ct = jnp.asarray(rng.normal(size=(1, 100, 1, widths[1])), np.float16).astype(np.float64)
    found = test_kernels.errors(name, "short", arrays, ct, kernels, lambda f: f)
    assert max(found.values()) < 2e-3, found


@pytest.mark.usefixtures("step_by_step")
def test_masks_and_biases_of_keys(rng, monkeypatch):
    """Those of padding, which are the same for all queries."""
    seen = rng.random((B, 1, 1, S)) < 0.7
    seen[..., 90:] = False
    options = {"mask": jnp.asarray(seen), "is_causal": True}
    monkeypatch.setitem(OPTIONS, "of keys", ((), options, seen & CAUSAL))
    arrays = arrays_of(rng, np.float16, widths=(64, 64))
    arrays["bias"] = jnp.asarray(rng.normal(size=seen.shape), np.float16)
    ct = jnp.asarray(rng.normal(size=(B, T, N, 64)), np.float16).astype(np.float64)
    found = test_kernels.errors("entmax15", "of keys", arrays, ct, kernels, lambda f: f)
    assert max(found.values()) < 2e-3, found


@pytest.mark.usefixtures("step_by_step")
def test_vmap_of_gradient(rng):
    """One more axis, also where others have none, is a part of the batch."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, 60, 1, 64)), np.float16) for _ in range(3))

    def gradients(attend, q, v, k, scale):
        temperature = functools.partial(jsm.entmax15, temperature=scale)

        def loss(*args):
            return jnp.sum(jnp.sin(attend(*args, normalizer=temperature).astype(np.float32)))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    def mapped(attend):
        over = functools.partial(gradients, attend)
        return jax.vmap(over, (0, 0, None, 0))(q, v, k[0], jnp.array([1.0, 0.5]))

    pairs = zip(mapped(kernels), mapped(jsm.dot_product_attention), strict=True)
    for actual, wanted in pairs:
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=4e-3 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
@pytest.mark.usefixtures("step_by_step")
def test_zeros_are_exact(name, rng):
    """Values of a unit matrix show the weights."""
    q, k = (jnp.asarray(rng.normal(size=(1, 64, 1, 64)), np.float16) for _ in range(2))
    arrays = {"query": q, "key": k, "value": jnp.eye(64, dtype=np.float16)[None, :, None]}
    wanted = dense(arrays, name, np.ones((1, 1, 64, 64), bool))
    found = kernels(*arrays.values(), normalizer=getattr(jsm, name))
    assert np.mean(wanted == 0) > 0.5
    np.testing.assert_array_equal(found[wanted == 0], 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("step_by_step")
def test_further_passes_find_what_the_largest_scores_do_not(rng):
    """Where all keys take part, the largest of each class are not enough to begin with."""
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, 1, 64)), np.float16) for _ in range(3))
    arrays = {"query": q / 64, "key": k, "value": v}
    wanted = dense(arrays, "sparsemax", np.ones((1, 1, 128, 128), bool))
    found = kernels(*arrays.values(), normalizer=jsm.sparsemax)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3 * np.max(np.abs(wanted)))


X = jax.ShapeDtypeStruct((2, 200, 4, 64), jnp.bfloat16)
attend = functools.partial(jsm.dot_product_attention, implementation="pallas")


def count(attend, x=X):
    """How many kernels output and gradients are."""
    return lowered(attend, "cuda", x, x, x).count("mosaic_gpu_v2")


SEGMENTS = jnp.zeros((2, 200), int)
OVER_SCORES = {
    "bias": jnp.zeros((200, 200)),
    "mask": jnp.ones((200, 200), bool),
    "query_segment_ids": SEGMENTS,
    "key_value_segment_ids": SEGMENTS,
}

# Of primitives that Mosaic GPU does not have.
POWER = jsm.Form(weight=lambda u: jnp.maximum(u, 0) ** 1.5, score=lambda p: p ** (2 / 3))
MAPPINGS = {
    "softmax": jsm.softmax,
    "one's own": jsm.threshold_mapping(POWER),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_programs_for_a_gpu_are_three_kernels(name):
    assert count(functools.partial(attend, normalizer=MAPPINGS[name], is_causal=True)) == 3


def test_one_more_axis_takes_no_more_kernels():
    assert count(jax.vmap(attend), jax.ShapeDtypeStruct((3, *X.shape), X.dtype)) == 3


def test_functions_of_scores_are_part_of_kernels():
    own = {"score_mod": bent, "mask_mod": of_places, "query_offset": jnp.array([3, 5])}
    assert count(functools.partial(attend, **own)) == 3


def test_arrays_over_scores_are_part_of_kernels():
    assert count(functools.partial(attend, **OVER_SCORES)) == 3


@pytest.mark.parametrize("by_keys", [False, True], ids=["of queries", "of keys"])
@pytest.mark.parametrize("of", ["segments", "mask"])
def test_tiles_that_hold_nothing_are_left_out(of, by_keys, rng):
    """Segments of queries and keys are sorted, so that tiles that share any lie side by side."""
    sizes = Sizes(2, 200, 300, 1, 1, 64, 64)
    ids = [np.sort(rng.integers(0, 9, (2, n))) for n in (sizes.queries, sizes.keys)]
    query, key = ids[0][:, None, :, None], ids[1][:, None, None]
    mask = query == key
    arrays = {"query_segments": query, "key_segments": key} if of == "segments" else {"mask": mask}
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    ends = np.asarray(over_scores(Call(POWER, sizes, BLOCK), arrays, by_keys)["ends"])
    mask = np.swapaxes(mask, 2, 3) if by_keys else mask
    for batch, block in np.ndindex(2, -(-mask.shape[2] // BLOCK)):
        of_block = mask[batch, 0, block * BLOCK : (block + 1) * BLOCK]
        tiles = np.flatnonzero(np.any(of_block, 0)) // BLOCK
        assert tuple(ends[batch, 0, :, block]) == (tiles[0], tiles[-1] + 1)


def of_value(attend, x=X, platform="cuda"):
    """The program of the output alone."""
    with jax.enable_x64(False):
        return export.export(jax.jit(attend), platforms=[platform])(x, x, x).mlir_module()


WITHOUT = {
    "float32": (jax.ShapeDtypeStruct(X.shape, np.float32), {}),
    "257 features": (jax.ShapeDtypeStruct((2, 200, 4, 257), X.dtype), {}),
    "floor": (X, {"score_mod": lambda score, *_: jnp.floor(score)}),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_kernel_on_a_gpu_is_left_to_xla(name):
    x, options = WITHOUT[name]
    assert "mosaic_gpu" not in of_value(functools.partial(attend, **options), x)


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_other_gpus_have_no_kernels(capability, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(_jax, "get_default_device", lambda: device)
    x = jax.ShapeDtypeStruct((1, 210, 4, 64), X.dtype)
    assert "mosaic_gpu" not in of_value(attend, x)


def test_float16_has_kernels_on_a_gpu_alone():
    x = jax.ShapeDtypeStruct(X.shape, np.float16)
    assert "mosaic_gpu" in of_value(attend, x)
    assert "tpu_custom_call" not in of_value(attend, x, "tpu")


def test_kernels_are_chosen_where_they_were_measured(monkeypatch):
    """So far nowhere: nothing has run on a device."""
    x = jax.ShapeDtypeStruct((1, 130, 2, 64), jnp.bfloat16)
    chosen = jsm.dot_product_attention
    assert "mosaic_gpu" not in of_value(chosen, x)
    monkeypatch.setitem(_implementations.MEASURED, ("cuda", "attention"), "pallas")
    jax.clear_caches()
    assert "mosaic_gpu" in of_value(chosen, x)
    assert "tpu_custom_call" not in of_value(chosen, x, "tpu")
    jax.clear_caches()


@pytest.mark.parametrize("check_vma", [False, True])
def test_each_device_has_its_heads(check_vma):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = P(None, None, "a")
    shared = jax.shard_map(attend, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=check_vma)
    assert count(shared) == 3


def test_explicit_axes_stay_where_they_are():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, P("a"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=spread)
    with jax.set_mesh(mesh):
        assert count(attend, x) == 3
