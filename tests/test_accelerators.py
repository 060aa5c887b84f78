"""What JAX compiles for an H100 and a TPU v5e, neither of which is here: that it does, and what.

Nothing runs: kernels, bytes and memory are read from the compiled programs. Needs the extra "aot".
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from benchmarks import ahead, instructions
from benchmarks.ahead import TARGETS
from benchmarks.collectives import collectives
from tests.calls import CALLS, value_and_gradients
from tests.cases import entmax43


class Bound(NamedTuple):
    """The most that a program may have.

    Attributes:
      kernels: how many different ones.
      launches: how often one starts, in loops too.
      memory: megabytes beside arguments and results.
      moved: megabytes from and to the main memory.
    """

    kernels: int
    launches: int
    memory: float
    moved: float


# A tenth above what is compiled, by program and device; what is still to come down says how far.
BOUNDS = {
    ("softmax", "h100"): Bound(1, 1, 0.1, 37),
    ("softmax, vjp", "h100"): Bound(2, 2, 0.1, 93),
    ("log_softmax", "h100"): Bound(1, 1, 0.1, 37),
    ("log_softmax, vjp", "h100"): Bound(2, 2, 0.1, 93),
    ("log_softmax, bfloat16", "h100"): Bound(1, 1, 0.1, 19),
    ("softmax, long rows, vjp", "h100"): Bound(13, 13, 0.4, 297),
    ("log_softmax, long rows, vjp", "h100"): Bound(11, 11, 0.3, 260),
    ("logsumexp, long rows, vjp", "h100"): Bound(5, 5, 0.2, 111),
    ("attention", "h100"): Bound(28, 140, 380, 5500),
    ("attention, vjp", "h100"): Bound(58, 288, 470, 14_100),
    ("attention, causal", "h100"): Bound(80, 202, 260, 4050),
    ("attention, causal, vjp", "h100"): Bound(140, 380, 590, 10_700),
    ("linear_cross_entropy", "h100"): Bound(18, 120, 150, 4300),
    ("linear_cross_entropy, gradient", "h100"): Bound(49, 175, 450, 8100),
    ("softmax", "v5e"): Bound(5, 5, 0.1, 56),
    ("softmax, vjp", "v5e"): Bound(7, 7, 0.1, 93),
    ("log_softmax", "v5e"): Bound(5, 5, 0.1, 56),
    # Sums of cotangents are taken in the forward pass, before these are near: 0.84 of the time.
    ("log_softmax, vjp", "v5e"): Bound(8, 8, 0.1, 111),
    ("log_softmax, bfloat16", "v5e"): Bound(7, 7, 0.1, 28),
    ("softmax, long rows, vjp", "v5e"): Bound(7, 7, 0.1, 185),
    ("log_softmax, long rows, vjp", "v5e"): Bound(8, 8, 0.1, 222),
    ("logsumexp, long rows, vjp", "v5e"): Bound(4, 4, 0.1, 111),
    ("attention", "v5e"): Bound(18, 290, 0.3, 74),
    ("attention, vjp", "v5e"): Bound(69, 1100, 130, 1100),
    ("attention, causal", "v5e"): Bound(43, 530, 38, 150),
    # In half precision, keys less their mean are written for each band: 4 % of the time.
    ("attention, causal, vjp", "v5e"): Bound(150, 1700, 120, 1600),
    ("linear_cross_entropy", "v5e"): Bound(22, 170, 150, 3000),
    # Two products make their probabilities of the scores: more bytes than to write them, less time.
    ("linear_cross_entropy, gradient", "v5e"): Bound(20, 136, 444, 8530),
}

BATCH, LENGTH, HEADS, FEATURES = 4, 4096, 8, 64
ROWS, CLASSES = 4096, 1024
LINEAR = 8192, 1024, 32768
X = jax.ShapeDtypeStruct((ROWS, CLASSES), jnp.float32)
LONG = jax.ShapeDtypeStruct((256, 32768), jnp.float32)
LONG_SUMS = jax.ShapeDtypeStruct(LONG.shape[:1], jnp.float32)
QUERY = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, FEATURES), jnp.bfloat16)
HIDDEN, WEIGHT = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (LINEAR[:2], LINEAR[1:]))
LABELS = jax.ShapeDtypeStruct(LINEAR[:1], jnp.int32)


def pulled_back(fun):
    def both(args, ct):
        value, pull_back = jax.vjp(fun, *args)
        return value, pull_back(ct)

    return both


full = functools.partial(jsm.dot_product_attention, is_causal=False)
causal = functools.partial(jsm.dot_product_attention, is_causal=True)
QKV = QUERY, QUERY, QUERY
PROGRAMS = {
    "softmax": (jsm.softmax, (X,)),
    "softmax, vjp": (pulled_back(jsm.softmax), ((X,), X)),
    "log_softmax": (jsm.log_softmax, (X,)),
    "log_softmax, vjp": (pulled_back(jsm.log_softmax), ((X,), X)),
    "log_softmax, bfloat16": (jsm.log_softmax, (jax.ShapeDtypeStruct(X.shape, jnp.bfloat16),)),
    "softmax, long rows, vjp": (pulled_back(jsm.softmax), ((LONG,), LONG)),
    "log_softmax, long rows, vjp": (pulled_back(jsm.log_softmax), ((LONG,), LONG)),
    "logsumexp, long rows, vjp": (pulled_back(jsm.logsumexp), ((LONG,), LONG_SUMS)),
    "attention": (full, QKV),
    "attention, vjp": (pulled_back(full), (QKV, QUERY)),
    "attention, causal": (causal, QKV),
    "attention, causal, vjp": (pulled_back(causal), (QKV, QUERY)),
    "linear_cross_entropy": (jsm.linear_cross_entropy, (HIDDEN, WEIGHT, LABELS)),
    "linear_cross_entropy, gradient": (
        jax.value_and_grad(jsm.linear_cross_entropy, (0, 1)),
        (HIDDEN, WEIGHT, LABELS),
    ),
}

DEVICES = {name: TARGETS[name] for name in ("h100", "v5e")}
WHY_NOT = [why for target in DEVICES.values() if (why := target.missing())]

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=next(iter(WHY_NOT), ""))
on_both = pytest.mark.parametrize("target", DEVICES.values(), ids=DEVICES)


@pytest.fixture(autouse=True)
def float32():
    """As users call it; with float64 there would be conversions that they do not have."""
    with jax.enable_x64(False):
        yield


@on_both
@pytest.mark.parametrize("name", CALLS)
def test_every_public_function_compiles(name, target):
    fun, args = CALLS[name]
    assert ahead.compiled(fun, args, target).as_text()


@on_both
@pytest.mark.parametrize("name", CALLS)
def test_every_gradient_compiles(name, target):
    fun, args = CALLS[name]
    assert ahead.compiled(value_and_gradients(fun), args, target).as_text()


@pytest.mark.parametrize(("program", "device"), BOUNDS, ids=lambda name: name)
def test_programs_stay_small(program, device):
    fun, args = PROGRAMS[program]
    # No solver; the loop of attention is for maxima far from 0.
    found = ahead.figures(fun, args, DEVICES[device], passes=0)
    actual = Bound(found.kernels, found.launches, found.memory / 1e6, found.traffic / 1e6)
    assert all(x <= most for x, most in zip(actual, BOUNDS[program, device], strict=True)), actual


# Rows, classes, and how rows, weights and labels are spread.
LAST_LAYERS = {
    "31 chunks for a CPU": (8192 - 256, 32768, None),
    "128k classes": (8192, 2**17, None),
    "rows on four devices": (4 * 8192, 32768, (P("a"), P(), P("a"))),
}


@on_both
@pytest.mark.parametrize("case", LAST_LAYERS)
def test_bytes_of_a_last_layer_are_those_of_its_scores(case, target):
    rows, classes, over = LAST_LAYERS[case]
    hidden, weight = (HIDDEN.update(shape=s) for s in ((rows, LINEAR[1]), (LINEAR[1], classes)))
    fun, _ = PROGRAMS["linear_cross_entropy, gradient"]
    args = hidden, weight, LABELS.update(shape=(rows,))
    scores = rows * classes // (4 if over else 1)
    assert ahead.figures(fun, args, target, over=over).traffic < 36 * scores


@on_both
def test_matrix_products_and_bytes_are_those_of_algebra(target):
    """Of what is known: attention of `jax.nn` is two products, and negation moves every byte."""
    with jax.numpy_dtype_promotion("standard"):
        theirs = ahead.figures(jax.nn.dot_product_attention, QKV, target)
    assert theirs.flops == {"bf16": 2 * 2 * BATCH * HEADS * LENGTH**2 * FEATURES}
    moved = ahead.figures(jnp.negative, (X,), target)
    assert (moved.kernels, moved.traffic, moved.memory) == (1, 2 * 4 * ROWS * CLASSES, 0)


def of_kernels(dtype, features, queries=1024, keys=1024, values=None, **options):
    """Attention by kernels with its gradients, and the shapes that it takes."""
    attend = functools.partial(jsm.dot_product_attention, implementation="pallas", **options)
    values = values or features
    query, key, value, out = (
        jax.ShapeDtypeStruct((1, length, 2, width), dtype)
        for length, width in (
            (queries, features),
            (keys, features),
            (keys, values),
            (queries, values),
        )
    )
    return pulled_back(attend), ((query, key, value), out)


def of_bias(features, shape):
    """The same with the gradient of a bias."""

    def attend(query, key, value, bias):
        options = {"bias": bias, "is_causal": True, "normalizer": jsm.entmax15}
        return jsm.dot_product_attention(query, key, value, implementation="pallas", **options)

    x = jax.ShapeDtypeStruct((1, shape[3], 2, features), jnp.bfloat16)
    return pulled_back(attend), ((x, x, x, jax.ShapeDtypeStruct(shape, jnp.float32)), x)


ALPHA = functools.partial(jsm.entmax, alpha=1.3)
MASKS = {
    "mask": jnp.ones((1, 1, 512, 512), bool),
    "bias": jnp.zeros((1, 2, 512, 512)),
    "sink": jnp.zeros(2),
    "logits_soft_cap": 20.0,
    "query_segment_ids": jnp.zeros((1, 512), jnp.int32),
    "key_value_segment_ids": jnp.zeros((1, 512), jnp.int32),
    "query_seq_lengths": jnp.array([300]),
    "key_value_seq_lengths": jnp.array([300]),
    "query_offset": jnp.array([5]),
    "local_window_size": (100, 20),
}
KERNELS = {
    "softmax": of_kernels(jnp.bfloat16, 64, is_causal=True),
    "softmax, 128 features": of_kernels(jnp.bfloat16, 128),
    "softmax, 256 features, float32": of_kernels(jnp.float32, 256),
    "sparsemax": of_kernels(jnp.bfloat16, 64, is_causal=True, normalizer=jsm.sparsemax),
    "entmax15": of_kernels(jnp.bfloat16, 64, is_causal=True, normalizer=jsm.entmax15),
    "entmax15, 32 features": of_kernels(jnp.float32, 32, 1000, 700, normalizer=jsm.entmax15),
    "entmax, one query": of_kernels(jnp.bfloat16, 64, 1, normalizer=ALPHA),
    "long rows": of_kernels(jnp.bfloat16, 128, 256, 16384, normalizer=jsm.entmax15),
    "bias of keys": of_kernels(
        jnp.bfloat16, 64, 512, 512, bias=jnp.zeros((1, 1, 1, 512)), normalizer=jsm.sparsemax
    ),
    "functions": of_kernels(
        jnp.bfloat16,
        64,
        512,
        512,
        score_mod=lambda x, b, n, i, j: (
            jnp.tanh(x) - 2.0 ** -(n + 1).astype(x.dtype) * abs(i - j).astype(x.dtype)
        ),
        mask_mod=lambda b, n, i, j: (i >= j) | (j < 10),
    ),
    "all options": of_kernels(jnp.bfloat16, 64, 512, 512, normalizer=jsm.entmax15, **MASKS),
}
VMEM = 2**26  # half of what a v5e, v5p or v6e has


FITTED = [
    *(("v5e", name) for name in KERNELS),
    *((device, name) for device in ("v5p", "v6e") for name in ("softmax", "all options")),
]


@pytest.mark.parametrize(("device", "name"), FITTED)
def test_kernels_fit(device, name):
    """Mosaic refuses kernels that need more VMEM than they ask for."""
    compiled = ahead.compiled(*KERNELS[name], TARGETS[device])
    lines = compiled.as_text().splitlines()
    calls = [line for line in lines if 'custom_call_target="tpu_custom_call"' in line]
    asked = [re.search(r'"scoped_memory_configs":.*?"size":"(\d+)"', call) for call in calls]
    assert len(asked) == 2
    assert all(VMEM / 2 < int(size[1]) <= VMEM for size in asked)
    of_scores = 4 * 2 * 1024 * 1024
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * of_scores


GPU_KERNELS = {
    "softmax": of_kernels(jnp.bfloat16, 64, is_causal=True),
    "softmax, 80 features": of_kernels(jnp.bfloat16, 80),
    "softmax, 128 features": of_kernels(jnp.float16, 128),
    "sparsemax": of_kernels(jnp.bfloat16, 64, is_causal=True, normalizer=jsm.sparsemax),
    "entmax15": of_kernels(jnp.bfloat16, 64, is_causal=True, normalizer=jsm.entmax15),
    "entmax15, 128 features": of_kernels(jnp.bfloat16, 128, 1000, 700, normalizer=jsm.entmax15),
    "entmax": of_kernels(jnp.bfloat16, 64, is_causal=True, normalizer=ALPHA),
    "all options": of_kernels(jnp.bfloat16, 128, 512, 512, normalizer=jsm.entmax15, **MASKS),
    "all options, 192 and 128 features": of_kernels(
        jnp.bfloat16, 192, 512, 512, 128, normalizer=jsm.entmax15, **MASKS
    ),
    "bias": of_bias(128, (1, 2, 512, 512)),
    "bias of keys": of_bias(128, (1, 1, 1, 512)),
}
# Those of keys and of values have a kernel each.
WIDE_GPU_KERNELS = {
    "softmax, 256 features": of_kernels(jnp.float16, 256, is_causal=True),
    "entmax15, 160 and 224 features": of_kernels(
        jnp.bfloat16, 160, 1000, 700, 224, normalizer=jsm.entmax15
    ),
    "all options, 256 features": of_kernels(
        jnp.bfloat16, 256, 512, 512, normalizer=jsm.entmax15, **MASKS
    ),
    "bias of keys, 256 features": of_bias(256, (1, 1, 1, 512)),
}


@pytest.mark.parametrize("name", [*GPU_KERNELS, *WIDE_GPU_KERNELS])
def test_gpu_kernels_keep_to_registers(name, monkeypatch, capfd):
    """The assembler tells what it spills to memory; a warp has 255 registers a thread."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    capfd.readouterr()
    compiled = ahead.compiled(*{**GPU_KERNELS, **WIDE_GPU_KERNELS}[name], TARGETS["h100"])
    told = "".join(capfd.readouterr())
    is_wide = name in WIDE_GPU_KERNELS
    assert len(re.findall(r"Used \d+ registers", told)) == (4 if is_wide else 3)
    assert set(re.findall(r"(\d+) bytes spill stores", told)) == {"0"}
    of_scores = 4 * 2 * 1024 * 1024  # outputs of wide heads are nearly as many numbers
    assert compiled.memory_analysis().temp_size_in_bytes < of_scores / (1 if is_wide else 2)


@pytest.mark.skipif(bool(instructions.missing()), reason=str(instructions.missing()))
def test_gpu_kernels_have_few_instructions():
    """A tenth above what a tile takes; the products of softmax and its gradients are nine."""
    found = instructions.written("softmax")
    tiles = {name: kernel.loops for name, kernel in found.items()}
    most = {"forward": 400, "dq": 350, "dkv": 475}
    assert all(loop.instructions <= most[name] for name, (loop,) in tiles.items()), tiles
    products = {name: loop.flops / (2 * 64**3) for name, (loop,) in tiles.items()}
    assert products == {"forward": 2, "dq": 3, "dkv": 4}


@pytest.mark.skipif(bool(instructions.missing()), reason=str(instructions.missing()))
def test_wide_gpu_kernels_have_few_instructions():
    """The same for 256 features, of which half a tile comes at a time."""
    found = instructions.written("softmax, 256 features")
    tiles = {name: kernel.loops for name, kernel in found.items()}
    most = {"forward": 430, "dv": 295, "dq": 330, "dk": 405}
    assert all(loop.instructions <= most[name] for name, (loop,) in tiles.items()), tiles
    products = {name: loop.flops / (64**2 * 256) for name, (loop,) in tiles.items()}
    assert products == {"forward": 2, "dv": 2, "dq": 3, "dk": 3}


def of_rows(mapping, shape, dtype=jnp.float32, **options):
    """A mapping by a kernel, and what it takes."""
    f = functools.partial(mapping, implementation="pallas", **options)
    return f, (jax.ShapeDtypeStruct(shape, dtype),)


PER_ROW = {"temperature": jnp.ones((70, 1)), "sink": jnp.zeros((70, 1))}
MASKED = {"where": jnp.ones(300, bool), **PER_ROW}
ROW_KERNELS = {
    "softmax": of_rows(jsm.softmax, X.shape),
    "log_softmax": of_rows(jsm.log_softmax, X.shape),
    "sparsemax": of_rows(jsm.sparsemax, X.shape),
    "entmax15": of_rows(jsm.entmax15, X.shape),
    "entmax": of_rows(ALPHA, X.shape),
    "one's own": of_rows(entmax43, (700, 1000)),
    "bfloat16": of_rows(jsm.sparsemax, X.shape, jnp.bfloat16),
    "options": of_rows(jsm.entmax, (70, 300), alpha=jnp.full((70, 1), 1.7), **MASKED),
    "one row": of_rows(jsm.log_softmax, (50_001,)),
    "long rows": of_rows(jsm.entmax15, (16, 2**18)),
    "another axis": of_rows(jsm.sparsemax, (50, 30, 4), axis=1),
}
FITTED_ROWS = [
    *(("v5e", name) for name in ROW_KERNELS),
    *((device, name) for device in ("v5p", "v6e") for name in ("entmax15", "options")),
]


@pytest.mark.parametrize(("device", "name"), FITTED_ROWS)
def test_kernels_of_rows_fit(device, name):
    fun, args = ROW_KERNELS[name]
    assert ahead.compiled(fun, args, TARGETS[device]).as_text().count('"tpu_custom_call"') == 1


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sparsemax", "entmax15"])
def test_rows_are_read_and_written_once(name):
    found = ahead.figures(*ROW_KERNELS[name], TARGETS["v5e"])
    assert (found.kernels, found.traffic, found.memory) == (1, 2 * 4 * ROWS * CLASSES, 0)


@on_both
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_ring_sends_while_it_computes(is_causal, target):
    """Keys go round four devices in every pass of a loop while their scores are used."""
    attend = functools.partial(
        jsm.dot_product_attention, is_causal=is_causal, kv_axis_name="a", query_axis_name="a"
    )
    spread = P(None, "a")
    ring = jax.shard_map(attend, mesh=target.mesh(), in_specs=spread, out_specs=spread)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    compiled = ahead.compiled(pulled_back(ring), ((x, x, x), x), target, spread)
    found = collectives(compiled.as_text())
    assert {c.kind for c in found} == {"collective-permute"}
    turns = [c for c in found if c.in_loop]
    assert {c.passes for c in turns} == {3, 4}  # forward, and back with the gradients
    of_a_part = 2 * 2 * (1024 // 4) ** 2 * 64  # one product of a device's queries and keys
    assert all(c.meanwhile >= of_a_part for c in turns)


def test_nothing_is_kept_on_disk(tmp_path):
    """What is compiled for a device that is not there cannot be read back."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        ahead.compiled(jnp.negative, (X,), DEVICES["h100"])
        assert not list(tmp_path.iterdir())
        jax.jit(jnp.negative).lower(X).compile()  # of a device that is there, it is kept again
        assert list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
