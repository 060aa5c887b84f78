"""Attention by kernels, interpreted, against whole matrices of scores in float64.

Nothing here runs on a TPU. `test_accelerators.py` compiles them for one.
"""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from jaxsoftmax import _implementations

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

INTERPRETED = "pallas, interpreted"
# Two blocks of queries and two of keys, neither of them full.
B, T, S, N, K, H, V = 2, 140, 160, 2, 1, 16, 8
kernels = functools.partial(jsm.dot_product_attention, implementation=INTERPRETED, block_size=128)


def normalizer(name, params):
    """A mapping, with the parameters that it is given."""
    options = {key: params[key] for key in ("alpha", "temperature") if key in params}
    return functools.partial(getattr(jsm, name), **options)


def dense(arrays, name, where, soft_cap=None, score_mod=None):
    """Attention by its definition, in float64, of arrays by name."""
    arrays = {key: x.astype(np.float64) for key, x in arrays.items()}
    q, k, v = (arrays[key] for key in ("query", "key", "value"))
    scores = jnp.einsum("btnh,bskh->bnts", q, k) / np.sqrt(q.shape[-1]) + arrays.get("bias", 0.0)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if score_mod is not None:
        batch, head, *_ = np.indices((B, N, 1, 1))
        scores = score_mod(scores, batch, head, *places(OFFSET))
    sink = {"sink": arrays["sink"][:, None, None]} if "sink" in arrays else {}
    seen = jnp.any(where, -1, keepdims=True)
    weights = normalizer(name, arrays)(jnp.where(where, scores, 0.0), where=where | ~seen, **sink)
    return jnp.einsum("bnts,bskv->btnv", jnp.where(seen, weights, 0.0), v)


def by_kernels(arrays, name, options, attend=kernels):
    own = {key: arrays[key] for key in ("bias", "sink") if key in arrays}
    inputs = (arrays[key] for key in ("query", "key", "value"))
    return attend(*inputs, normalizer=normalizer(name, arrays), **own, **options)


def places(offset=0):
    """The positions of queries and keys, (B, 1, T, 1) and (S,)."""
    query = np.arange(T)[:, None] + np.reshape(offset, (-1, 1, 1, 1))
    return query, np.arange(S)


OFFSET = 20


def bent(score, batch, head, i, j):
    """Scores with all that a function sees; NaN where there is no query or key."""
    batch, head, distance = (jnp.asarray(x).astype(score.dtype) for x in (batch, head, abs(i - j)))
    found = score + jnp.tanh(score) / (1 + batch) - 0.1 * (1 + head) * distance
    found = jnp.where((i < T + OFFSET) & (j < S), found, jnp.nan)
    return jnp.where(j == 3, -jnp.inf, found)


def of_places(batch, head, i, j):
    """A mask in which a row of one head has nothing."""
    return ((i + j) % 3 != batch) & (j < i + 9) & ((head == 0) | (i != OFFSET + 50))


def arrays_of(rng, dtype, more=(), widths=(H, V)):
    features, values = widths
    shapes = {
        "query": (B, T, N, features),
        "key": (B, S, K, features),
        "value": (B, S, K, values),
        "bias": (1, N, T, S),
        "sink": (N,),
        "temperature": (N, 1, 1),
        "alpha": (N, 1, 1),
    }
    made = {name: rng.normal(size=shapes[name]) for name in ("query", "key", "value", *more)}
    made["query"] *= 2
    for name in ("temperature", "alpha"):
        if name in made:
            made[name] = 1.3 + 0.2 * np.tanh(made[name])
    wide = "sink", "temperature", "alpha"
    return {n: jnp.asarray(x, np.float32 if n in wide else dtype) for n, x in made.items()}


query, key = places()
CAUSAL = key <= query
SEGMENTS = np.arange(T)[None] // 50, np.arange(S)[None] // 50
LENGTHS = np.array([60, T]), np.array([S, 90])
RANDOM = np.random.default_rng(0).random((1, N, T, S)) < 0.5
RANDOM[:, :, 7] = False
INSIDE = (query < LENGTHS[0][:, None, None, None]) & (key < LENGTHS[1][:, None, None, None])
BIAS_OF_KEYS = (B, 1, 1, S)

# By name: what has a gradient beside queries, keys and values; options; what they say is seen.
OPTIONS = {
    "plain": ((), {}, np.ones((1, 1, T, S), bool)),
    "causal": ((), {"is_causal": True}, CAUSAL),
    "window": ((), {"local_window_size": (30, 5)}, (key <= query + 5) & (key >= query - 30)),
    "window before": (
        (),
        {"local_window_size": (30, 5), "is_causal": True, "query_offset": 20},
        (key <= query + 20) & (key >= query - 10),
    ),
    "offsets": (
        (),
        {"is_causal": True, "query_offset": jnp.asarray([20, -60])},
        key <= places([20, -60])[0],
    ),
    "bias": (("bias",), {}, np.ones((1, 1, T, S), bool)),
    "mask": ((), {"mask": jnp.asarray(RANDOM), "is_causal": True}, RANDOM & CAUSAL),
    "lengths": (
        (),
        {
            "query_seq_lengths": jnp.asarray(LENGTHS[0]),
            "key_value_seq_lengths": jnp.asarray(LENGTHS[1]),
        },
        INSIDE,
    ),
    "segments": (
        (),
        {
            "query_segment_ids": jnp.asarray(SEGMENTS[0]),
            "key_value_segment_ids": jnp.asarray(SEGMENTS[1]),
        },
        (SEGMENTS[0][0, :, None] == SEGMENTS[1][0])[None, None],
    ),
    "sink": (("sink",), {"is_causal": True}, CAUSAL),
    "soft cap": ((), {"logits_soft_cap": 2.0, "is_causal": True}, CAUSAL),
    "temperature": (("temperature",), {"is_causal": True}, CAUSAL),
    "functions": (
        ("temperature",),
        {"score_mod": bent, "mask_mod": of_places, "query_offset": OFFSET},
        of_places(*np.indices((B, N, 1, 1))[:2], *places(OFFSET)) & (np.arange(S) != 3),
    ),
    "all": (
        ("bias", "sink", "temperature"),
        {"mask": jnp.asarray(RANDOM), "is_causal": True, "logits_soft_cap": 2.0},
        RANDOM & CAUSAL,
    ),
}
FORMS = "softmax", "entmax15", "sparsemax", "entmax"
CASES = [
    *((form, "causal") for form in FORMS),
    *((form, "plain") for form in ("softmax", "entmax15")),
    *(("entmax15", option) for option in OPTIONS if option not in ("plain", "causal")),
    *(("softmax", option) for option in ("lengths", "sink", "functions", "all")),
    ("sparsemax", "mask"),
    ("entmax", "all"),
]


def value_and_cotangents(f, arrays, ct):
    value, pull_back = jax.vjp(f, arrays)
    return {"out": value, **pull_back(ct.astype(value.dtype))[0]}


def errors(name, option, arrays, ct, attend=kernels, compiled=jax.jit):
    """Of the output and of all gradients, relative to the largest entry of each."""
    _, options, where = OPTIONS[option]

    ours = functools.partial(by_kernels, name=name, options=options, attend=attend)
    others = {"soft_cap": options.get("logits_soft_cap"), "score_mod": options.get("score_mod")}
    wanted = functools.partial(dense, name=name, where=where, **others)
    actual = compiled(functools.partial(value_and_cotangents, ours))(arrays, ct)
    wide = {key: x.astype(np.float64) for key, x in arrays.items()}
    wanted = jax.jit(functools.partial(value_and_cotangents, wanted))(wide, ct)
    return {
        key: float(np.max(np.abs(actual[key].astype(np.float64) - x)) / np.max(np.abs(x)))
        for key, x in wanted.items()
    }


def case(rng, name, option, dtype, widths=(H, V), **how):
    more = (*OPTIONS[option][0], *(("alpha",) if name == "entmax" else ()))
    ct = jnp.asarray(rng.normal(size=(B, T, N, widths[1])), dtype).astype(np.float64)
    return errors(name, option, arrays_of(rng, dtype, more, widths), ct, **how)


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda name: name)
def test_float32(name, option, rng):
    found = case(rng, name, option, np.float32)
    # What is summed over all rows cancels; blocks are as far off.
    of_numbers = [found.pop(name) for name in ("sink", "temperature", "alpha") if name in found]
    assert max(found.values()) < 3e-6, found
    assert max(of_numbers, default=0) < 1e-5, of_numbers


@pytest.mark.parametrize("option", ["causal", "all"])
@pytest.mark.parametrize("name", FORMS)
def test_bfloat16(name, option, rng):
    """The factors of products are rounded, to 2 ** -9 of each; numbers are sums in float32."""
    found = case(rng, name, option, jnp.bfloat16)
    of_numbers = [found.pop(name) for name in ("sink", "temperature", "alpha") if name in found]
    assert max(found.values()) < 1e-2, found
    assert max(of_numbers, default=0) < 5e-5, of_numbers


@jax.jit
def errors_of_masks(arrays, ct, offset, lengths, segments):
    """Relative errors under masks that are known when it runs."""
    options = {
        "query_offset": offset,
        "query_seq_lengths": lengths[0],
        "key_value_seq_lengths": lengths[1],
        "query_segment_ids": segments[0],
        "key_value_segment_ids": segments[1],
        "local_window_size": (50, 9),
    }
    rows, keys = query, key[None, None, None]
    position = rows + offset[:, None, None, None]
    where = (keys <= position + 9) & (keys >= position - 50)
    where &= (rows < lengths[0][:, None, None, None]) & (keys < lengths[1][:, None, None, None])
    where &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    ours = functools.partial(by_kernels, name="entmax15", options=options)
    wanted = functools.partial(dense, name="entmax15", where=where)
    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    pairs = value_and_cotangents(ours, arrays, ct), value_and_cotangents(wanted, wide, ct)
    leaves = zip(*map(jax.tree.leaves, pairs), strict=True)
    return jnp.stack([jnp.max(jnp.abs(x.astype(np.float64) - y)) for x, y in leaves])


lengths = st.lists(st.integers(0, S + 20), min_size=2 * B, max_size=2 * B)


@given(
    offset=st.lists(st.integers(-T - 60, S + 60), min_size=B, max_size=B),
    lengths=lengths,
    starts=st.lists(st.integers(0, S), max_size=5),
)
def test_any_offsets_lengths_and_segments(offset, lengths, starts):
    rng = np.random.default_rng(0)
    arrays, ct = arrays_of(rng, np.float32), jnp.asarray(rng.normal(size=(B, T, N, V)))
    ids = np.sum(np.arange(S)[:, None] >= np.asarray([0, *starts]), -1)
    segments = [jnp.asarray(np.broadcast_to(ids[:n], (B, n))) for n in (T, S)]
    lengths = jnp.asarray(lengths).reshape(2, B)
    off = errors_of_masks(arrays, ct, jnp.asarray(offset), lengths, segments)
    assert np.all(off < 1e-4), off


def small(rng, dtype=np.float32, shape=(1, 100, 2, 16)):
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))


def both(of, *args, rtol=3e-6, normalizer=jsm.entmax15):
    """Compares what `of(attend, *args)` returns for kernels and blocks, compiled."""
    options = {"normalizer": normalizer, "is_causal": True}
    ours, wanted = (
        jax.jit(functools.partial(of, functools.partial(attend, **options)))(*args)
        for attend in (functools.partial(kernels, block_size=None), jsm.dot_product_attention)
    )
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(np.max(np.abs(y))))


def loss(attend):
    return lambda *args: jnp.sum(jnp.sin(attend(*args)))


def test_forward_mode(rng):
    args = small(rng)
    both(lambda attend, *args: jax.jvp(attend, args, args[::-1]), *args)


@pytest.mark.thorough
def test_hessian_times_vector(rng):
    args = small(rng)

    def of(attend, *args):
        return jax.jvp(jax.grad(loss(attend), (0, 1, 2)), args, args[::-1])[1]

    both(of, *args, rtol=1e-5, normalizer=jsm.softmax)


@pytest.mark.thorough
def test_gradient_of_gradient(rng):
    args = small(rng)

    def of(attend, *args):
        def slope(*args):
            pairs = zip(jax.grad(loss(attend), (0, 1, 2))(*args), args, strict=True)
            return sum(jnp.vdot(g, x) for g, x in pairs)

        return jax.grad(slope, (0, 1, 2))(*args)

    both(of, *args, rtol=1e-5, normalizer=jsm.softmax)


def test_vmap_of_gradient(rng):
    args = small(rng, shape=(2, 1, 100, 2, 16))
    both(lambda attend, *args: jax.vmap(jax.grad(loss(attend), (0, 1, 2)))(*args), *args)


def test_scan_with_remat(rng):
    args = small(rng)

    def of(attend, q, k, v):
        def layers(q):
            step = jax.checkpoint(lambda x, _: (x + attend(x, k, v), None))
            return jnp.sum(jax.lax.scan(step, q, None, length=2)[0] ** 2)

        return jax.grad(layers)(q)

    both(of, *args, rtol=1e-5)


@pytest.mark.parametrize(
    "normalizer",
    [jsm.softmax, jsm.entmax15, functools.partial(jsm.entmax, alpha=1.3)],
    ids=["softmax", "entmax15", "entmax"],
)
def test_what_sees_nothing_is_0_and_padding_may_be_nan(normalizer, rng):
    q, k, v = small(rng, shape=(2, 100, 2, 16))
    padded = [x.at[0, 60:].set(np.nan) for x in (q, k, v)]
    lengths = jnp.asarray([60, 0])
    attend = functools.partial(
        kernels,
        normalizer=normalizer,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
    )
    out, pull_back = jax.vjp(attend, *padded)
    cts = pull_back(jnp.ones_like(out))
    for x in (out, *cts):
        np.testing.assert_array_equal(x[0, 60:], 0)
        np.testing.assert_array_equal(x[1], 0)
        assert np.all(np.isfinite(x))
        assert np.any(x[0, :60] != 0)


@pytest.mark.parametrize("alpha", [1.3, 2.5])
def test_gradients_beside_a_query_that_sees_nothing(alpha, rng):
    q, k, v = small(rng, shape=(1, 100, 1, 16))
    mask = np.ones((100, 100), bool)
    mask[2] = False
    entmax = functools.partial(jsm.entmax, alpha=alpha)

    def gradients(attend):
        def total(*args):
            return jnp.sum(jnp.sin(attend(*args, mask=mask, normalizer=entmax)))

        return jax.grad(total, (0, 1, 2))(q, k, v)

    for actual, wanted in zip(
        gradients(kernels), gradients(jsm.dot_product_attention), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("of", ["products", "bias"])
@pytest.mark.parametrize("name", ["softmax", "entmax15"])
def test_scores_of_infinity_share_a_row(name, of, rng):
    """As they do in blocks, and in the gradient of the values, too."""
    q, k, v = small(rng)
    bias = jnp.zeros((100, 100))
    shared, infinite = np.arange(3, 6), np.array([2, 7, 99])
    if of == "products":
        q, k = q.at[..., 0].set(0).at[:, shared, :, 0].set(1e20), k.at[..., 0].set(0)
        k = k.at[:, infinite, :, 0].set(1e20)
    else:
        bias = bias.at[shared[:, None], infinite].set(jnp.inf).at[50].set(-jnp.inf)
        bias = bias.at[60:].set(-jnp.inf).at[60:, 9].set(jnp.inf)
    options = {"bias": bias} if of == "bias" else {}

    def of_values(attend, v):
        attend = functools.partial(attend, q, k, normalizer=getattr(jsm, name), **options)
        out, pull_back = jax.vjp(attend, v)
        return out, pull_back(jnp.cos(out))[0]

    ours, theirs = (
        jax.jit(functools.partial(of_values, attend))(v)
        for attend in (kernels, jsm.dot_product_attention)
    )
    mean = jnp.broadcast_to(jnp.mean(v[:, infinite], 1, keepdims=True), (1, 3, 2, 16))
    np.testing.assert_allclose(ours[0][:, shared], mean, rtol=0, atol=1e-6)
    if of == "bias":
        np.testing.assert_array_equal(ours[0][:, 50], 0)
        np.testing.assert_array_equal(ours[0][:, 60:], jnp.repeat(v[:, 9:10], 40, axis=1))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-6 * float(np.max(np.abs(y))))


def test_a_bias_that_excludes_does_so_under_all_that_follows(rng):
    q, k, v = small(rng)
    bias = jnp.where(jnp.arange(100) < 40, 0.0, -jnp.inf)
    options = {
        "normalizer": functools.partial(jsm.softmax, temperature=4.0),
        "logits_soft_cap": 2.0,
        "score_mod": lambda score, *_: score / 8,
    }
    wanted = jsm.dot_product_attention(q, k[:, :40], v[:, :40], **options)
    found = kernels(q, k, v, bias=bias, **options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_zeros_are_exact(name, rng):
    """Values of a unit matrix show the weights."""
    q, k, _ = small(rng, shape=(1, 128, 1, 16))
    units = jnp.eye(128, dtype=np.float32)[None, :, None]
    arrays = {"query": 3 * q, "key": k, "value": units}
    where = np.ones((1, 1, 128, 128), bool)
    wanted = dense(arrays, name, where)
    found = kernels(3 * q, k, units, normalizer=getattr(jsm, name))
    assert np.mean(wanted == 0) > 0.5
    np.testing.assert_array_equal(found[wanted == 0], 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [0.0, 0.02, 10.0], ids=["all alike", "alike", "far apart"])
@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_supports_large_and_small(name, factor, rng):
    """Where all keys take part, the largest of each class are not enough to begin with."""
    q, k, v = small(rng, shape=(1, 256, 1, 16))
    arrays = {"query": factor * q, "key": k, "value": v}
    wanted = dense(arrays, name, np.ones((1, 1, 256, 256), bool))
    found = kernels(factor * q, k, v, normalizer=getattr(jsm, name))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted)))


def call_of(rng):
    """A call of the kernels themselves, and its arrays: 2 x 2 tiles."""
    from jaxsoftmax.attention._arguments import Sizes
    from jaxsoftmax.attention._kernels._tiles import Call
    from jaxsoftmax.mappings._entmax import ENTMAX15

    q, k, v = small(rng, shape=(1, 256, 1, 16))
    arrays = {
        "query": jnp.transpose(q, (0, 2, 1, 3)),
        "key": jnp.transpose(k, (0, 2, 3, 1)),
        "value": jnp.transpose(v, (0, 2, 3, 1)),
    }
    return Call(ENTMAX15, Sizes(1, 256, 256, 1, 1, 16, 16), 128, interpret=True), arrays


def test_scores_may_be_made_again(rng):
    """Where those of all keys do not fit into VMEM."""
    from jaxsoftmax.attention._kernels._forward import forward

    call, arrays = call_of(rng)
    outs = [
        forward(dataclasses.replace(call, whole=whole), arrays, True) for whole in (True, False)
    ]
    jax.tree.map(np.testing.assert_array_equal, *outs)


def test_tiles_that_hold_nothing_are_skipped(rng):
    """The first half of the queries takes only keys of the first half, by their scores."""
    from jaxsoftmax.attention._kernels._backward import backward
    from jaxsoftmax.attention._kernels._forward import forward

    call, arrays = call_of(rng)
    sides = jnp.where(jnp.arange(256) < 128, 9.0, -9.0)
    arrays["query"] = arrays["query"].at[0, 0, :128, 0].set(9.0)
    arrays["key"] = arrays["key"].at[0, 0, 0].set(sides)
    out, kept = forward(call, arrays, True)
    scores = np.einsum("th,hs->ts", *(np.float64(arrays[name][0, 0]) for name in ("query", "key")))
    held = np.asarray(jsm.entmax15(scores)) > 0
    wanted = np.any(held.reshape(256, 2, 128), -1).T
    assert not np.any(wanted[1, :128])
    np.testing.assert_array_equal(kept["seen"][0, 0] != 0, wanted)

    def pulled(seen):
        return backward(call, arrays, {**kept, "seen": seen}, out, ())

    # Now the last keys are in no tile that is said to hold anything.
    found = pulled(kept["seen"].at[:, :, 1].set(0))
    for name in ("key", "value"):
        np.testing.assert_array_equal(found[name][..., 128:], 0)
        assert np.any(found[name][..., :128] != 0)
    assert not np.any(pulled(jnp.zeros_like(kept["seen"]))["query"])


X = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)


def lowered(attend, platform, *args):
    """The program of value and gradient, lowered for a platform that need not be here."""

    def both(args, ct):
        out, pull_back = jax.vjp(attend, *args)
        return out, pull_back(ct)

    ct = jax.eval_shape(attend, *args)
    with jax.enable_x64(False):
        return export.export(jax.jit(both), platforms=[platform])(args, ct).mlir_module()


@pytest.mark.parametrize("form", [*FORMS, "mapped"])
def test_programs_for_a_tpu_are_two_kernels(form):
    options = {"is_causal": True, "implementation": "pallas", "logits_soft_cap": 20.0}
    mapping = functools.partial(jsm.entmax, alpha=1.3) if form == "entmax" else jsm.entmax15
    if form in ("softmax", "sparsemax"):
        mapping = getattr(jsm, form)
    attend = functools.partial(jsm.dot_product_attention, normalizer=mapping, **options)
    x = X
    if form == "mapped":
        attend = jax.vmap(attend)
        x = jax.ShapeDtypeStruct((3, *X.shape), X.dtype)
    assert lowered(attend, "tpu", x, x, x).count("tpu_custom_call") == 2


def test_other_platforms_have_no_kernels():
    attend = functools.partial(jsm.dot_product_attention, implementation="pallas")
    text = lowered(attend, "cpu", X, X, X)
    assert "custom_call @tpu" not in text
    assert "mosaic_gpu" not in text


def test_elsewhere_it_is_what_it_is_without_kernels(rng):
    args = small(rng)
    attend = functools.partial(jsm.dot_product_attention, normalizer=jsm.entmax15)
    wanted = attend(*args)
    np.testing.assert_array_equal(attend(*args, implementation="xla"), wanted)
    np.testing.assert_array_equal(attend(*args, implementation="pallas"), wanted)


def test_xla_is_the_program_that_is_chosen():
    text = (
        jax.jit(functools.partial(jsm.dot_product_attention, implementation=name))
        .lower(X, X, X)
        .as_text()
        for name in (None, "xla")
    )
    assert next(text) == next(text)


def test_kernels_are_chosen_where_they_were_measured(monkeypatch):
    """So far nowhere: nothing has run on a device."""
    x = jax.ShapeDtypeStruct((1, 130, 2, 16), jnp.bfloat16)
    attend = jsm.dot_product_attention
    assert "tpu_custom_call" not in lowered(attend, "tpu", x, x, x)
    monkeypatch.setitem(_implementations.MEASURED, ("tpu", "attention"), "pallas")
    jax.clear_caches()
    assert lowered(attend, "tpu", x, x, x).count("tpu_custom_call") == 2
    others = functools.partial(attend, normalizer=jsm.softpick)
    assert "tpu_custom_call" not in lowered(others, "tpu", x, x, x)
    jax.clear_caches()


SLOPES = np.ones(2, np.float32)
REFUSED = {
    "a score_mod that closes over arrays": {
        "score_mod": lambda s, b, n, *_: s * jnp.asarray(SLOPES)[n]
    },
    "a mask_mod that closes over arrays": {"mask_mod": lambda b, n, *_: jnp.asarray(SLOPES)[n] > 0},
    "return_residual": {"return_residual": True},
    "dropout_rate": {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
    "a scale that is an array": {"scale": jnp.ones(()), "dtype": jnp.bfloat16},
    "a logits_soft_cap that is an array": {"logits_soft_cap": jnp.ones(())},
    "the normalizer softpick": {"normalizer": jsm.softpick},
    "the normalizer <lambda>": {"normalizer": lambda x, axis, where: x},
    "the normalizer budget": {"normalizer": functools.partial(jsm.normmax, alpha=2.0)},
    "the temperature 0": {"normalizer": functools.partial(jsm.softmax, temperature=0.0)},
    "the dtype float64": {"dtype": np.float64},
    "a block_size that is no multiple of 128": {"block_size": 100},
    "do not fit into VMEM": {"length": 300_000},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_kernel_is_named(what):
    options = dict(REFUSED[what])
    dtype = options.pop("dtype", np.float32)
    x = jax.ShapeDtypeStruct((1, options.pop("length", 20), 2, 16), dtype)
    attend = functools.partial(jsm.dot_product_attention, implementation="pallas", **options)
    what = what.replace("budget", "normmax")
    with pytest.raises(ValueError, match=rf"implementation 'pallas' has no kernel for .*{what}"):
        jax.eval_shape(attend, x, x, x)


def test_unknown_implementations_are_named():
    with pytest.raises(ValueError, match=r"implementation must be .*, got 'x'"):
        jsm.dot_product_attention(*[jnp.ones((1, 2, 1, 4))] * 3, implementation="x")


@pytest.mark.parametrize("check_vma", [False, True])
def test_each_device_has_its_heads(check_vma):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    attend = functools.partial(
        jsm.dot_product_attention, implementation="pallas", normalizer=jsm.entmax15
    )
    heads = P(None, None, "a")
    attend = jax.shard_map(attend, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=check_vma)
    assert lowered(attend, "tpu", X, X, X).count("tpu_custom_call") == 2


def test_explicit_axes_stay_where_they_are():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, P("a"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=spread)
    attend = functools.partial(
        jsm.dot_product_attention, implementation="pallas", normalizer=jsm.entmax15
    )
    mapped = functools.partial(attend, mask_mod=lambda b, n, i, j: i >= j)
    with jax.set_mesh(mesh):
        assert lowered(attend, "tpu", x, x, x).count("tpu_custom_call") == 2
        with pytest.raises(
            ValueError, match="a mask_mod of batch entries or heads that are spread"
        ):
            jax.eval_shape(mapped, x, x, x)


def test_pallas_is_imported_by_those_who_name_it():
    program = "import sys, jaxsoftmax; assert 'jax.experimental.pallas' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def as_cudnn(monkeypatch):
    """What `jax.nn` computes itself in place of cuDNN, which is not here."""
    original = jax.nn.dot_product_attention

    def attend(*args, implementation, **options):
        assert implementation == "cudnn"
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return original(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


@pytest.mark.parametrize(
    "option", ["plain", "causal", "window", "bias", "mask", "lengths", "no batch"]
)
@pytest.mark.usefixtures("as_cudnn")
def test_cudnn_is_called_for_what_is_asked(option, rng):
    more, options, _ = OPTIONS["causal" if option == "no batch" else option]
    arrays = arrays_of(rng, jnp.bfloat16, more)
    inputs = [arrays[name] for name in ("query", "key", "key", *more)]
    if option == "no batch":
        inputs = [x[0] for x in inputs]
    wanted = jsm.dot_product_attention(*inputs, **options)
    found = jsm.dot_product_attention(*inputs, implementation="cudnn", **options)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(
        found.astype(np.float32), wanted.astype(np.float32), rtol=0, atol=3e-2
    )
    np.testing.assert_array_equal(found[wanted == 0], 0)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("the normalizer entmax15", {"normalizer": jsm.entmax15}),
        ("the normalizer softmax", {"normalizer": functools.partial(jsm.softmax, temperature=2.0)}),
        ("sink", {"sink": 0.0}),
        ("logits_soft_cap", {"logits_soft_cap": 2.0}),
        ("score_mod", {"score_mod": lambda score, *_: score}),
        ("query_offset", {"query_offset": 3}),
        ("return_residual", {"return_residual": True}),
        ("the dtype float32", {"dtype": np.float32}),
    ],
)
def test_what_cudnn_does_not_know_is_named(what, options):
    options = dict(options)
    x = jax.ShapeDtypeStruct((1, 20, 2, 16), options.pop("dtype", jnp.bfloat16))
    attend = functools.partial(jsm.dot_product_attention, implementation="cudnn", **options)
    with pytest.raises(ValueError, match=f"implementation 'cudnn' has no kernel for {what}"):
        jax.eval_shape(attend, x, x, x)


def test_a_form_of_ones_own_has_kernels(rng):
    """Whose derivatives JAX finds, in the kernel."""
    mapping = jsm.threshold_mapping(
        jsm.Form(weight=lambda u: jnp.maximum(u, 0) ** 1.5, score=lambda p: p ** (2 / 3))
    )
    both(lambda attend, *args: jax.vjp(attend, *args)[1](args[0]), *small(rng), normalizer=mapping)
    attend = functools.partial(
        jsm.dot_product_attention, implementation="pallas", normalizer=mapping
    )
    assert lowered(attend, "tpu", X, X, X).count("tpu_custom_call") == 2
