"""Attention against `jax.nn`, and against itself on whole matrices of scores, in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from jaxsoftmax.attention import _block, _call, _cutting
from jaxsoftmax.attention._tiling import Tiling

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

B, T, S, N, K, H, V = 2, 10, 12, 4, 2, 3, 5
# Blocks of 4, 4 and 2 rows.
attend = functools.partial(jsm.dot_product_attention, block_size=4)


def inputs(rng, dtype=np.float64, queries=T, keys=S):
    """Queries, keys and values."""
    shapes = (B, queries, N, H), (B, keys, K, H), (B, keys, K, V)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def dense(
    q, k, v, bias=0.0, where=True, normalizer=jsm.softmax, change=lambda s: s, factor=1.0, **kwargs
):
    """Attention by its definition, on the whole matrix of scores."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = change(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]) + bias)
    where = jnp.broadcast_to(where, scores.shape)
    weights = normalizer(scores, axis=-1, where=where, **kwargs) * factor
    return jnp.einsum("bnts,bsnv->btnv", weights, v)


def derivatives(f):
    """The value and the derivatives of a function, of every kind that is used."""

    def weigh(out):
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(weights * jnp.sin(out))

    def everything(args, tangents):
        def loss(*args):
            return weigh(f(*args))

        def tangent_loss(*args):
            return weigh(jax.jvp(f, args, tangents)[1])

        grad = jax.grad(loss, tuple(range(len(args))))
        return {
            "value and tangent": jax.jvp(f, args, tangents),
            "gradient and Hessian times vector": jax.jvp(grad, args, tangents),
            "gradient of tangent": jax.grad(tangent_loss, tuple(range(len(args))))(*args),
        }

    return jax.jit(everything)


def assert_same_derivatives(ours, reference, args, rng, rtol=1e-11):
    tangents = tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in args)
    actual = derivatives(ours)(args, tangents)
    wanted = derivatives(reference)(args, tangents)
    for name, value in wanted.items():
        for x, y in zip(jax.tree.leaves(actual[name]), jax.tree.leaves(value), strict=True):
            scale = max(float(np.max(np.abs(y))), 1e-3)
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * scale, err_msg=name)


def causal(queries=T, keys=S):
    return np.tril(np.ones((queries, keys), bool))


def window(before, after):
    distance = np.arange(T)[:, None] - np.arange(S)
    return (distance <= before) & (distance >= -after)


# ---- jax.nn, option by option


def options_of_jax_nn(rng):
    mask = rng.random((B, 1, T, S)) < 0.6
    mask[..., 0] = True
    lengths = {
        "query_seq_lengths": jnp.array([T, 7], jnp.int32),
        "key_value_seq_lengths": jnp.array([5, S], jnp.int32),
    }
    return {
        "nothing": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "window": {"local_window_size": 3},
        "causal window": {"local_window_size": (2, 1), "is_causal": True},
        "bias": {"bias": rng.normal(size=(N, T, S))},
        "bias of heads": {"bias": rng.normal(size=(1, N, 1, S)), "is_causal": True},
        "mask": {"mask": mask},
        "mask and bias": {"mask": mask[0], "bias": rng.normal(size=(B, 1, T, 1))},
        "lengths": lengths,
    }


@pytest.mark.parametrize("name", options_of_jax_nn(np.random.default_rng(0)))
def test_equals_jax_nn(name, rng):
    """In float32, in which `jax.nn` normalizes anyway."""
    args = inputs(rng, np.float32)
    args = *args[:2], args[2][..., :H]  # (it wants values as wide as keys)
    options = {
        key: jnp.asarray(x, np.float32) if key == "bias" else x
        for key, x in options_of_jax_nn(rng)[name].items()
    }

    def with_gradient(f):
        out, pullback = jax.vjp(lambda *args: f(*args, **options), *args)
        return out, *pullback(jnp.cos(out))

    actual = jax.jit(lambda: with_gradient(attend))()
    with jax.numpy_dtype_promotion("standard"):  # (which it asks for)
        wanted = jax.jit(lambda: with_gradient(jax.nn.dot_product_attention))()
    for x, y in zip(actual, wanted, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6 * np.max(np.abs(y)))


def test_equals_jax_nn_without_a_batch_and_with_one_key_head(rng):
    q, k, v = (x[0] for x in inputs(rng, np.float32))
    k, v = k[:, :1], v[:, :1, :H]
    actual, log_sum = attend(q, k, v, return_residual=True)
    wanted, their_log_sum = jax.nn.dot_product_attention(q, k, v, return_residual=True)
    assert actual.shape == (T, N, H)
    assert log_sum.dtype == jnp.float32
    np.testing.assert_allclose(actual, wanted, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(log_sum, their_log_sum, rtol=2e-6)


# ---- every derivative, against the whole matrix


def test_softmax_with_bias_and_cap(rng):
    args = *inputs(rng), jnp.asarray(rng.normal(size=(1, N, T, S)))

    def ours(q, k, v, bias):
        return attend(q, k, v, bias, is_causal=True, logits_soft_cap=2.0)

    def reference(q, k, v, bias):
        return dense(q, k, v, bias, causal(), change=lambda s: 2 * jnp.tanh(s / 2))

    assert_same_derivatives(ours, reference, args, rng)


@pytest.mark.thorough
def test_heads_that_learn_their_alpha_and_sink(rng):
    alpha, sink = jnp.array([1.2, 1.5, 1.8, 2.0]), jnp.array([0.1, -1.0, 0.5, 0.0])
    queries, keys = np.repeat([[0, 1, 2]], [3, 4, 3], 1), np.repeat([[0, 2, 1]], [4, 2, 6], 1)

    def ours(q, k, v, alpha, sink):
        normalizer = functools.partial(jsm.entmax, alpha=alpha[:, None, None])
        return attend(
            q,
            k,
            v,
            normalizer=normalizer,
            sink=sink,
            query_segment_ids=queries,
            key_value_segment_ids=keys,
        )

    def reference(q, k, v, alpha, sink):
        normalizer = functools.partial(jsm.entmax, alpha=alpha[:, None, None])
        where = (queries[..., None] == keys[:, None])[:, None]
        return dense(q, k, v, where=where, normalizer=normalizer, sink=sink[:, None, None])

    assert_same_derivatives(ours, reference, (*inputs(rng), alpha, sink), rng, rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("normalizer", [jsm.sparsemax, jsm.entmax15])
def test_sparse_mappings_in_a_window(normalizer, rng):
    def ours(q, k, v):
        return attend(q, k, v, normalizer=normalizer, local_window_size=(3, 2))

    def reference(q, k, v):
        return dense(q, k, v, where=window(3, 2), normalizer=normalizer)

    assert_same_derivatives(ours, reference, inputs(rng), rng)


OFFSETS = {
    "bottom right": S - T,
    "far": 9,
    "before the keys": -4,
    "an array": np.array(2, np.int32),
    "one per batch": np.array([0, 5], np.int32),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"is_causal": True}, 100, 0),
        ({"is_causal": True, "local_window_size": (3, 1)}, 3, 0),
        ({"local_window_size": (2, 1)}, 2, 1),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_queries_that_begin_at_an_offset(name, options, before, after, rng):
    offset = OFFSETS[name]
    places = np.broadcast_to(offset, (B,))[:, None, None, None] + np.arange(T)[:, None]
    distance = places - np.arange(S)
    where = (distance <= before) & (distance >= -after)
    q, k, v = inputs(rng)

    def ours(q, k, v):
        return attend(q, k, v, query_offset=offset, **options)

    np.testing.assert_allclose(ours(q, k, v), dense(q, k, v, where=where), rtol=1e-11, atol=1e-13)
    both = [
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))(q, k, v)
        for f in (ours, functools.partial(dense, where=where))
    ]
    for x, y in zip(*both, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def test_offsets_reach_functions_of_positions_and_leave_lengths_alone(rng):
    q, k, v = inputs(rng)
    lengths = np.array([T, 3], np.int32)
    for offset in (2, np.array([2, 2], np.int32)):
        out = attend(
            q,
            k,
            v,
            query_offset=offset,
            query_seq_lengths=lengths,
            score_mod=lambda s, b, n, i, j: s - 0.1 * ((i - j) * (b + n + 1)).astype(s.dtype),
            mask_mod=lambda b, n, i, j: j <= i,
        )
        i, j = np.arange(T)[:, None] + 2, np.arange(S)
        factor = np.arange(B)[:, None, None, None] + np.arange(N)[:, None, None] + 1
        counts = np.arange(T)[:, None] < lengths[:, None, None, None]
        expected = dense(q, k, v, bias=-0.1 * (i - j) * factor, where=(j <= i) & counts)
        np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-13)


def test_decoding_with_an_offset_gives_the_rows_of_the_whole(rng):
    """Row by row, with a cache that is longer than what is in it, under one program."""
    q, k, v = inputs(rng, queries=S)
    whole = attend(q, k, v, is_causal=True, local_window_size=(4, 0))
    step = jax.jit(
        lambda q, i: attend(q, k, v, is_causal=True, local_window_size=(4, 0), query_offset=i)
    )
    for i in range(S):
        out = step(q[:, i : i + 1], jnp.asarray(i))
        np.testing.assert_allclose(out[:, 0], whole[:, i], rtol=1e-11, atol=1e-13)
    # As many keys as there are so far, the last query at the last one.
    lengths = np.array([5, S], np.int32)
    last = jnp.stack([q[0, 4:5], q[1, S - 1 :]])
    options = {"key_value_seq_lengths": lengths, "query_offset": lengths - 1}
    out = attend(last, k, v, is_causal=True, local_window_size=(4, 0), **options)
    np.testing.assert_allclose(out[0, 0], whole[0, 4], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(out[1, 0], whole[1, S - 1], rtol=1e-11, atol=1e-13)


def test_offsets_that_do_not_fit_are_named(rng):
    q, k, v = inputs(rng)
    with pytest.raises(TypeError, match="query_offset must be integers, got dtype float64"):
        attend(q, k, v, query_offset=1.5)
    with pytest.raises(ValueError, match=r"query_offset must be an integer or one per batch"):
        attend(q, k, v, query_offset=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"query_offset must be from -2\*\*29 to 2\*\*29, got"):
        attend(q, k, v, query_offset=2**31 - 1)


@pytest.mark.parametrize("offset", [2**31 - 1, 2**40])
def test_offsets_beyond_all_keys(offset, rng):
    q, k, v = inputs(rng)
    out = attend(q, k, v, is_causal=True, query_offset=np.array([offset, -offset]))
    np.testing.assert_allclose(out[0], dense(q, k, v)[0], rtol=1e-11, atol=1e-13)
    assert np.all(out[1] == 0)


def test_offsets_that_have_no_sign(rng):
    q, k, v = inputs(rng)
    out = attend(q, k, v, is_causal=True, query_offset=jnp.array([1, 1], jnp.uint32))
    same = attend(q, k, v, is_causal=True, query_offset=1)
    np.testing.assert_allclose(out, same, rtol=1e-11, atol=1e-13)


def test_a_cap_that_is_none_is_no_number(rng):
    q, k, v = inputs(rng)
    capped = jax.jit(lambda cap: attend(q, k, v, logits_soft_cap=cap))
    assert np.all(np.isnan(capped(0.0)))
    assert np.all(np.isnan(capped(-2.0)))
    np.testing.assert_allclose(capped(np.inf), attend(q, k, v), rtol=1e-11, atol=1e-13)


def test_a_bias_excludes_whatever_becomes_of_it(rng):
    q, k, v = inputs(rng)
    where = np.arange(S) != 2
    bias = np.where(where, 0.3, -np.inf)

    def loss(q, bias, **options):
        return jnp.sum(jnp.sin(attend(q, k, v, bias=bias, **options)))

    for bent in ({"score_mod": lambda s, *_: jnp.tanh(s) + s * s}, {"logits_soft_cap": 2.0}):
        found, grads = jax.value_and_grad(loss, (0, 1))(q, bias, **bent)
        masked = functools.partial(loss, mask=where[None, None, None], **bent)
        # Nor does it count what is there, be it no number.
        for other in (0.3, np.nan):
            expected = jax.value_and_grad(masked, (0, 1))(q, np.where(where, 0.3, other))
            for x, y in zip((found, *grads), (expected[0], *expected[1]), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


def test_a_budget_beyond_the_keys_that_a_block_sees(rng):
    q, k, v = inputs(rng)
    normalizer = functools.partial(jsm.budget_sparsemax, budget=6.0)
    of_arrays = functools.partial(jsm.budget_sparsemax, budget=jnp.array(6.0))
    out = attend(q, k, v, normalizer=normalizer, is_causal=True)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    close(out, attend(q, k, v, normalizer=of_arrays, is_causal=True))
    close(out[:, 2, 0], np.sum(v[:, :3, 0], 1))  # each of the keys has 1
    for none in (-1.0, np.nan):
        with pytest.raises(ValueError, match="budget must be from 0 to"):
            attend(q, k, v, normalizer=functools.partial(jsm.budget_sparsemax, budget=none))


def test_what_wraps_a_normalizer_is_another(rng):
    q, k, v = inputs(rng)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    for mapping in (jsm.softmax, jsm.entmax15):
        hard = attend(q, k, v, normalizer=jsm.straight_through(mapping))
        close(hard, attend(q, k, v, normalizer=jsm.hardmax))

    @functools.wraps(jsm.softmax)
    def halved(x, **options):
        return jsm.softmax(x, **options) / 2

    close(attend(q, k, v, normalizer=halved), attend(q, k, v) / 2)


def test_a_parameter_of_each_query_in_blocks(rng):
    q, k, v = inputs(rng)
    alpha = rng.uniform(1.1, 1.9, size=(N, T, 1))
    temperature = rng.uniform(0.5, 2, size=(T, 1))

    def loss(alpha, **options):
        normalizer = functools.partial(jsm.entmax, alpha=alpha, temperature=temperature)
        return jnp.sum(jnp.sin(attend(q, k, v, normalizer=normalizer, **options)))

    for options in ({}, {"is_causal": True}):
        one, many = (
            jax.value_and_grad(functools.partial(loss, **options, block_size=n))(alpha)
            for n in (T, 2)
        )
        for x, y in zip(one, many, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_weights_are_the_output_for_values_of_the_unit_matrix(rng):
    """The recipe of the guide."""
    q, k, _ = inputs(rng)
    units = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
    weights = attend(q, k, units, normalizer=jsm.entmax15, is_causal=True).swapaxes(1, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, 2)) / np.sqrt(H)
    expected = jsm.entmax15(scores, where=causal())
    np.testing.assert_allclose(weights, expected, rtol=1e-10, atol=1e-12)


def test_another_alpha_is_no_other_program(rng):
    """A float in a partial is traced, as it is in a call; with a result of its own."""
    q, k, v = inputs(rng)
    compiled, sizes = _call._attend_compiled, []
    for alpha in (1.3, 1.31, 1.7):
        out = attend(q, k, v, normalizer=functools.partial(jsm.entmax, alpha=alpha))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
        close(out, dense(q, k, v, normalizer=functools.partial(jsm.entmax, alpha=alpha)))
        sizes.append(compiled._cache_size())
    assert len(set(sizes)) == 1


def normalized_sigmoid(scores, axis, where):
    """A function that knows nothing of rows in which nothing takes part."""
    weights = jnp.where(where, jax.nn.sigmoid(scores), 0)
    return weights / jnp.sum(weights, axis, keepdims=True)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": (2, 1)}], ids=str)
def test_functions_of_a_user_get_all_keys(options, rng):
    """They may use how many there are, and hold a number for each."""
    gains = jnp.asarray(rng.normal(size=S))

    def rectified(scores, axis, where):
        return (
            jnp.where(where, jax.nn.relu(scores + gains[None, None, None]), 0) / scores.shape[axis]
        )

    before, after = options.get("local_window_size", (T + S, 0))
    i, j = jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    where = (i - before <= j) & (j <= i + after)
    args = inputs(rng)
    ours = attend(*args, normalizer=rectified, **options)
    reference = dense(*args, where=where[None, None], normalizer=rectified)
    np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-12)


def test_functions_that_close_over_what_is_learned(rng):
    """Batch 1 has a query that sees nothing, which the function of the user has not to know."""
    slopes, table = jnp.asarray(rng.normal(size=N)), jnp.asarray(rng.normal(size=(B, T + S)))

    def ours(q, k, v, slopes, table):
        def score_mod(score, b, n, i, j):
            return score - slopes[n] * jnp.abs(i - j).astype(score.dtype) + table[b, i - j + S]

        def mask_mod(b, n, i, j):
            return ((i + j + n) % 3 > 0) & ((b == 0) | (i != 2))

        return attend(
            q, k, v, normalizer=normalized_sigmoid, score_mod=score_mod, mask_mod=mask_mod
        )

    def reference(q, k, v, slopes, table):
        i, j = jnp.arange(T)[:, None], jnp.arange(S)[None, :]
        distance = abs(i - j).astype(np.float64)[None, None]
        bias = table[:, i - j + S][:, None] - slopes[None, :, None, None] * distance
        where = ((i + j)[None, None] + jnp.arange(N)[None, :, None, None]) % 3 > 0
        out = dense(q, k, v, bias, where, normalizer=normalized_sigmoid)
        return out.at[1, 2].set(0)

    assert_same_derivatives(ours, reference, (*inputs(rng), slopes, table), rng)


def test_residual_has_derivatives_too(rng):
    lengths = np.array([7, S])
    where = (np.arange(S) < lengths[:, None])[:, None, None]

    def both(out, log_sum):
        return jnp.concatenate([out, log_sum[..., None]], -1)

    def ours(q, k, v, scale):
        return both(
            *attend(
                q, k, v, scale=scale, key_value_seq_lengths=lengths, sink=0.5, return_residual=True
            )
        )

    def reference(q, k, v, scale):
        q = q * scale * np.sqrt(H)
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, N // K, 2)) / np.sqrt(H)
        padded = jnp.concatenate(
            [jnp.where(where, scores, -jnp.inf), jnp.full((B, N, T, 1), 0.5)], -1
        )
        log_sum = jax.scipy.special.logsumexp(padded, -1)
        return both(dense(q, k, v, where=where, sink=0.5), jnp.moveaxis(log_sum, 1, 2))

    assert_same_derivatives(ours, reference, (*inputs(rng), jnp.array(0.7)), rng)


def test_softmax_against_scipy(rng):
    q, k, v = inputs(rng)
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, 2)) / np.sqrt(H)
    weights = scipy.special.softmax(scores, -1)
    wanted = np.einsum("bnts,bsnv->btnv", weights, np.repeat(v, N // K, 2))
    np.testing.assert_allclose(attend(q, k, v), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block_size", [1, 3, 5, 10, 64, None])
def test_blocks_of_all_sizes_agree(block_size, rng):
    args = inputs(rng)
    options = {"is_causal": True, "local_window_size": (4, 0), "normalizer": jsm.sparsemax}
    out = jsm.dot_product_attention(*args, block_size=block_size, **options)
    np.testing.assert_allclose(out, attend(*args, **options), rtol=1e-13, atol=1e-14)


@pytest.fixture
def tiled(monkeypatch):
    """Has attention cut as a tiling says, on this platform."""

    def use(tiling):
        monkeypatch.setattr(_cutting, "TILING", tiling)
        monkeypatch.setattr(_cutting, "TILINGS", {})
        # A function of its own, or JAX would remember what it traced of the other.
        fresh = jax.jit(lambda *args: _call.attend(*args), static_argnums=0)
        monkeypatch.setattr(_call, "_attend_compiled", fresh)

    return use


TILINGS = {
    "heads one by one": Tiling(forward=1, backward=1, group=1, rows=(4, 5), bands=3),
    "some heads": Tiling(forward=400, backward=200, group=4 * S * (N // K), rows=(1, 9), bands=1),
    "all heads": Tiling(forward=600, backward=200, group=None, rows=(1, 6), bands=2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_all_tilings_agree(tiling, tiled, rng):
    """With all that has an axis for the batch or the heads, and all that has not."""
    bias, alpha, sink = rng.normal(size=(N, T, S)), rng.uniform(1, 2, (N, 1, 1)), rng.normal(size=N)
    options = {
        "mask": rng.random((B, 1, T, S)) < 0.8,
        "key_value_seq_lengths": jnp.array([7, S]),
        "query_segment_ids": jnp.zeros((B, T), int),
        "key_value_segment_ids": jnp.zeros((1, S), int),
        "is_causal": True,
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(0),
    }

    def attention(q, k, v, bias, alpha, sink):
        entmax = functools.partial(jsm.entmax, alpha=alpha)
        out = attend(q, k, v, bias, normalizer=entmax, sink=sink, **options)
        dense = functools.partial(jsm.softmax, temperature=alpha)
        return out, *attend(q, k, v, normalizer=dense, sink=sink, return_residual=True)

    def everything(*args):
        out, pull_back = jax.vjp(attention, *args)
        return out, pull_back(out)

    args = *inputs(rng), bias, alpha, sink
    together = jax.jit(everything)(*args)
    tiled(tiling)
    apart = jax.jit(lambda *args: everything(*args))(*args)
    for x, y in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2**10], ids=["head by head", "at once"])
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float32, 2.0**-20), (jnp.bfloat16, 2.0**-7)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"normalizer": functools.partial(jsm.softmax, temperature=2.0)},
        {"normalizer": functools.partial(jsm.softmax, temperature=np.full((1, N, 1, 1), 2.0))},
    ],
    ids=["full", "causal", "temperature", "temperature of a head"],
)
def test_scores_that_are_made_again_are_the_same(
    dtype, rounding, options, group, tiled, monkeypatch, rng
):
    """As on GPUs. Scores far from 0, which the products have to subtract, and values that are."""
    q, k, v = inputs(rng)
    q, k, v, sink = 5 * q + 3, k + 2, v + 4, rng.normal(size=N)
    ct = rng.normal(size=(B, T, N, v.shape[-1]))
    args = [x.astype(dtype) for x in (q, k, v, ct)] + [sink.astype(np.float32)]

    def everything(q, k, v, ct, sink):
        def attention(q, k, v, sink):
            return jsm.dot_product_attention(q, k, v, sink=sink, scale=0.3, **options)

        out, pull_back = jax.vjp(attention, q, k, v, sink)
        without_sink = jax.vjp(functools.partial(attention, sink=sink), q, k, v)[1]
        return out, pull_back(ct), without_sink(ct)

    exact = everything(*(x.astype(np.float64) for x in args))
    tiled(Tiling(2**10, 2**10, group, (T, T), 1, products_again=True))
    ahead = []

    def kept(*args, made=_block.Block.weights_again):
        ahead.append(made(*args))
        return ahead[-1]

    monkeypatch.setattr(_block.Block, "weights_again", kept)
    found = jax.jit(lambda *args: everything(*args))(*args)
    # Before the loop over heads, if there is one. Temperatures divide scores.
    assert {x is not None for x in ahead} == (
        {"normalizer" not in options} if group == 1 else set()
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(
            x.astype(np.float64), y, rtol=0, atol=4 * rounding * np.max(np.abs(y))
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2.0**-13), (jnp.bfloat16, 2.0**-4)])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"local_window_size": (2, 1), "return_residual": True},
        {"is_causal": True, "query_offset": -2},
        {"is_causal": True, "query_offset": np.array([-2, 3])},
    ],
    ids=["causal", "window", "rows that see nothing", "offsets of examples"],
)
def test_masks_of_scores_that_are_made_again(dtype, tolerance, options, tiled, monkeypatch, rng):
    """As on GPUs, where a mask of places is made before the heads are taken one after the other."""
    q, k, v = inputs(rng)
    k = (k + 2).at[:, T - 1].multiply(8)  # what rows do not see leaves them their weights
    q, k, v = (x.astype(dtype) for x in (5 * q + 3, k, v + 4))
    masks, held = [], []

    def seen(block, first, parts, where=_block.Block.where):
        masks.append(where(block, first, parts))
        return masks[-1]

    def kept(*args, made=_block.Block.weights_again):
        held.append(made(*args))
        return held[-1]

    def everything(*args):
        attention = functools.partial(jsm.dot_product_attention, scale=0.3, **options)
        out, pull_back = jax.vjp(attention, *args)
        return out, pull_back(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x + 4, 0), out))

    exact = everything(*(x.astype(np.float64) for x in (q, k, v)))
    tiled(Tiling(2**10, 2**10, 1, (T // 2, T), 2, products_again=True))
    monkeypatch.setattr(_block.Block, "where", seen)
    monkeypatch.setattr(_block.Block, "weights_again", kept)
    found = jax.jit(lambda *args: everything(*args))(q, k, v)
    # One of each of the two bands; none where positions are not known while tracing.
    shapes = {None if mask is None else mask.shape[:3] for mask in masks}
    is_known = np.ndim(options.get("query_offset", 0)) == 0
    assert shapes == ({(1, 1, T // 2)} if is_known else {None})
    assert {x is not None for x in held} == {is_known}
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        x, largest = x.astype(np.float64), np.max(np.abs(y), where=np.isfinite(y), initial=0)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("large", [60.0, 500.0, 5e4, 1e6, -500.0, -5e4, "rows", "heads"])
def test_maxima_may_be_far_from_0_where_scores_are_made_again(dtype, large, tiled, rng):
    """As on GPUs, which write rounded scores for them. Here all scores are whole numbers."""
    q, k = rng.integers(-3, 4, size=(2, 3, 16, 2, 8)).astype(np.float64)
    v, sink = rng.integers(-8, 9, size=(3, 16, 2, 8)), np.array([0.0, 300.0])
    # In a factor that bfloat16 has, and in several terms: rounded scores differ from their sum.
    q[..., :4] = 1
    k[..., :4] = (500.0 if isinstance(large, str) else large) * np.array([0.5, 0.25, 0.125, 0.125])
    if large == "rows":
        q[:, ::2, :, :4] = 100
    if large == "heads":
        k[1, :, :, :4] *= 100
    k = np.asarray(k, jnp.bfloat16).astype(np.float64)

    def everything(q, k, v, sink):
        def attention(k, v, sink):
            return jsm.dot_product_attention(q, k, v, scale=1.0, sink=sink)

        out, pull_back = jax.vjp(attention, k, v, sink)
        return out, *pull_back(jnp.ones_like(out))

    exact = everything(*(jnp.asarray(x, np.float64) for x in (q, k, v, sink)))
    tiled(Tiling(2**10, 2**10, 2**10, (1, 16), 2, products_again=True))
    args = [*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(sink, np.float32)]
    together = jax.jit(lambda *args: everything(*args))(*args)
    over_batch = jax.vmap(lambda *args: everything(*args), in_axes=(0, 0, 0, None))
    out, of_key, of_value, of_sink = jax.jit(over_batch)(*args)
    apart = out, of_key, of_value, jnp.sum(of_sink, 0)
    for x, y, z in zip(together, exact, apart, strict=True):
        tolerance = 4 * float(jnp.finfo(dtype).eps) * np.max(np.abs(y)) + 1e-30
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=tolerance)
        np.testing.assert_allclose(z.astype(np.float64), y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [3e4, 1e9])
def test_scores_without_digits_keep_a_weight_where_they_are_made_again(size, tiled, rng):
    """As on GPUs. Made twice they differ by more than any weight survives; one key has all."""
    q, k = (jnp.asarray(size * rng.normal(size=(1, 24, 1, 3)), jnp.bfloat16) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(1, 24, 1, 3)), jnp.bfloat16)
    tiled(Tiling(2**10, 2**10, 2**10, (1, 24), 2, products_again=True))
    out = jax.jit(jsm.dot_product_attention)(q, k, v)
    first = jnp.argmax(jnp.einsum("btnh,bsnh->bts", *(x.astype(float) for x in (q, k))), -1)
    np.testing.assert_array_equal(out, jnp.take_along_axis(v, first[:, :, None, None], 1))


def test_queries_may_be_shared_by_what_is_mapped_over(rng):
    """In bfloat16, with grouped heads."""
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, 8, n, 4)), jnp.bfloat16) for n in (4, 2, 2))

    def gradients(k, v):
        out, pull_back = jax.vjp(jsm.dot_product_attention, q[0], k, v)
        return pull_back(jnp.ones_like(out))

    for x, y in zip(
        jax.vmap(gradients)(k, v), zip(*map(gradients, k, v), strict=True), strict=True
    ):
        np.testing.assert_allclose(x.astype(np.float32), np.stack(y), rtol=2**-6, atol=2**-6)


def test_a_row_does_not_depend_on_maxima_of_other_rows(tiled, rng):
    """As on GPUs: what one row asks of a block changes no bit of another."""
    q, k, v = (jnp.asarray(rng.normal(size=(1, 16, 1, 8)), np.float32) for _ in range(3))
    tiled(Tiling(2**10, 2**10, 2**10, (1, 16), 2, products_again=True))
    attention = jax.jit(jsm.dot_product_attention)
    for other in (1e6, np.nan):
        changed = attention(q.at[:, 3].multiply(other), k, v)
        np.testing.assert_array_equal(np.delete(changed, 3, 1), np.delete(attention(q, k, v), 3, 1))


@pytest.mark.parametrize(
    ("batch", "key_heads", "row_size", "rows", "group"),
    [
        (4, 6, 2**11, 2**12, (1, 1)),
        (4, 6, 2**10, 2**9, (1, 2)),
        (4, 6, 2**7, 2**9, (2, 6)),
        (4, 6, 2**7, 2**5, (4, 6)),
    ],
)
def test_as_many_heads_are_taken_together_as_fit(batch, key_heads, row_size, rows, group):
    tiling = Tiling(forward=0, backward=0, group=2**20, rows=(64, 512), bands=1)
    assert tiling.group_sizes(batch, key_heads, row_size, rows) == group


@pytest.mark.parametrize(("queries", "keys"), [(13, 4), (3, 13), (1, 13), (13, 1)])
@pytest.mark.parametrize("local_window_size", [None, (2, 1)])
def test_lengths_of_all_kinds(queries, keys, local_window_size, rng):
    q, k, v = inputs(rng, queries=queries, keys=keys)
    out = attend(q, k, v, is_causal=True, local_window_size=local_window_size)
    where = causal(queries, keys)
    if local_window_size:
        where &= np.arange(queries)[:, None] - np.arange(keys) <= 2
    np.testing.assert_allclose(out, dense(q, k, v, where=where), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("empty", [{"queries": 0}, {"keys": 0}])
def test_nothing_to_attend(empty, rng):
    args = inputs(rng, **empty)
    out, log_sum = attend(*args, return_residual=True)
    assert out.shape == (B, args[0].shape[1], N, V)
    assert not np.any(out)
    assert np.all(log_sum == -np.inf)


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)])
def test_half_precision_is_rounded_at_the_end(dtype, rounding, rng):
    args = inputs(rng, dtype)
    exact = dense(*(x.astype(np.float64) for x in args), where=causal())
    out = attend(*args, is_causal=True)
    assert out.dtype == dtype
    # The weights are rounded for the product with the values, and the result.
    largest = np.max(np.abs(args[2].astype(np.float64)))
    assert np.max(np.abs(out.astype(np.float64) - exact)) <= 2 * rounding * largest
    grads = jax.grad(
        lambda *args: attend(*args, is_causal=True).astype(np.float32).sum(), (0, 1, 2)
    )
    assert [x.dtype for x in grads(*args)] == [dtype] * 3


@pytest.mark.parametrize("again", [False, True])
def test_gradients_in_float16_of_small_cotangents(again, rng, tiled):
    """Cotangents of scores are less than its least number where those of outputs are not."""
    if again:
        tiled(Tiling(2**16, 2**16, 2**16, (1, 64), 2, products_again=True))
    query, key, value, ct = rng.normal(size=(4, 1, 512, 1, 32))
    halves = [jnp.asarray(x, jnp.float16) for x in (query, key, value, 1e-3 * ct)]

    def pulled(*args):
        return jax.vjp(jsm.dot_product_attention, *args[:3])[1](args[3])

    for x, y in zip(pulled(*halves), pulled(*(np.asarray(x, float) for x in halves)), strict=True):
        assert np.linalg.norm(np.asarray(x, float) - y) <= 0.002 * np.linalg.norm(y)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("has_sink", [False, True])
def test_gradients_in_half_precision_that_sum_over_scores(has_sink, again, rng, tiled):
    """Cotangents of a row's scores sum to 0, or to that of a sink, whatever was rounded.

    What scores have in common is multiplied by that sum; and a bias that is the same for all keys
    has no gradient.
    """
    if again:
        tiled(Tiling(2**10, 2**10, 2**10, (1, 16), 2, products_again=True))
    query, key, value, ct = rng.normal(size=(4, 1, 32, 2, 16))
    key += 20 * rng.normal(size=(2, 16))
    value += 4
    ct += 4
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value, ct)]

    def of_numbers(query, key, value, ct):
        def attention(scale, temperature, bias):
            softmax = functools.partial(jsm.softmax, temperature=temperature)
            sink = {"is_causal": True, "sink": np.ones(2, dtype)} if has_sink else {}
            own = {"normalizer": softmax, "scale": scale, **sink}
            return jsm.dot_product_attention(query, key, value, bias, **own)

        dtype = np.float32 if query.dtype == jnp.bfloat16 else np.float64
        numbers = np.asarray(0.3, dtype), np.asarray(1.3, dtype), np.zeros((1, 2, 1, 1), dtype)
        without_bias = jax.vjp(lambda *x: attention(*x, None), *numbers[:2])[1](ct)
        return *without_bias, jax.vjp(attention, *numbers)[1](ct)[-1]

    *wanted, none = of_numbers(*(np.asarray(x, float) for x in halves))
    *found, of_bias = of_numbers(*halves)
    np.testing.assert_allclose(found, wanted, rtol=0.005)
    np.testing.assert_allclose(of_bias, none, atol=0.03)


# ---- what is not seen


@pytest.mark.parametrize(
    ("normalizer", "options", "first", "common"),
    [
        (jsm.softmax, {}, 0, 100),
        (jsm.entmax15, {"is_causal": True}, 0, 100),
        (jsm.softmax, {"sink": np.ones(2)}, 0, 3),
        (functools.partial(jsm.softmax, sink=1.0), {}, 0, 3),
        (jsm.softmax, {}, 300, 0),
        (jsm.softmax, {}, 60_000, 0),
    ],
    ids=["common part", "causal", "sink", "own sink", "outlier", "large outlier"],
)
def test_gradients_in_half_precision_of_keys_far_from_0(normalizer, options, first, common, rng):
    """What keys have in common is no part of the gradient of the queries, however it is rounded.

    Beside a sink it is. And if one key is far from all others, these are what they were.
    """
    dtype = jnp.float16 if first == 60_000 else jnp.bfloat16
    query, key, value, ct = rng.normal(size=(4, 1, 64, 2, 8))
    key[..., 0] += common
    if first:
        key[:, 0, :, 0], query[..., 0] = -first, 1
    halves = [jnp.asarray(x, dtype) for x in (query, key, value, ct)]
    attention = functools.partial(jsm.dot_product_attention, normalizer=normalizer, **options)

    def of_query(query, key, value, ct):
        return jax.vjp(lambda query: attention(query, key, value), query)[1](ct)[0]

    wanted = of_query(*(np.asarray(x, float) for x in halves))
    found = np.asarray(of_query(*halves), float)
    np.testing.assert_allclose(found, wanted, atol=0.008 * np.abs(wanted).max())


@pytest.mark.asks_for_nan
def test_padding_may_hold_anything(rng):
    q, k, v = inputs(rng)
    lengths = {
        "query_seq_lengths": jnp.array([T, 0]),
        "key_value_seq_lengths": jnp.array([5, S]),
    }
    bad_q = q.at[1].set(jnp.nan)
    bad_k, bad_v = k.at[0, 5:].set(jnp.nan), v.at[0, 5:].set(jnp.inf)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, normalizer=jsm.entmax15, **lengths)))

    good = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    bad = jax.value_and_grad(loss, (0, 1, 2))(bad_q, bad_k, bad_v)
    for x, y in zip(jax.tree.leaves(bad), jax.tree.leaves(good), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.any(bad[1][0][1])
    assert not np.any(bad[1][1][0, 5:])


@pytest.mark.parametrize(
    "normalizer", [jsm.softmax, jsm.sparsemax, normalized_sigmoid, jax.nn.softmax]
)
def test_queries_that_see_nothing_give_zero(normalizer, rng):
    q, k, v = inputs(rng)
    mask = rng.random((B, N, T, S)) < 0.7
    mask[0, :, 3] = mask[1, 2] = False

    def loss(q, **excluded):
        out = attend(q, k, v, normalizer=normalizer, **excluded)
        return jnp.sum(jnp.sin(out)), out

    for excluded in ({"mask": mask}, {"bias": np.where(mask, 0.0, -np.inf)}):
        (_, out), grad = jax.value_and_grad(loss, has_aux=True)(q, **excluded)
        assert np.all(np.isfinite(grad))
        for x in (out, grad):
            assert not np.any(x[0, 3])
            assert not np.any(x[1, :, 2])
        assert np.all(np.any(np.delete(out[0], 3, 0), -1))


def test_bias_of_minus_infinity_excludes_under_a_cap(rng):
    q, k, v = inputs(rng)
    bias = jnp.where(causal(), 0.0, -jnp.inf)
    out = attend(q, k, v, bias, logits_soft_cap=5.0)
    np.testing.assert_allclose(
        out, attend(q, k, v, is_causal=True, logits_soft_cap=5.0), rtol=1e-12
    )

    def loss(q, cap, **options):
        return jnp.sum(jnp.sin(attend(q, k, v, logits_soft_cap=cap, **options)))

    found = jax.grad(functools.partial(loss, bias=bias), (0, 1))(q, 5.0)
    wanted = jax.grad(functools.partial(loss, is_causal=True), (0, 1))(q, 5.0)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
def test_lengths_of_few_bits(dtype, rng):
    q, k, v = inputs(rng)
    lengths = np.full(B, 3)
    found = attend(q, k, v, key_value_seq_lengths=lengths.astype(dtype))
    np.testing.assert_array_equal(found, attend(q, k, v, key_value_seq_lengths=lengths))


def test_values_without_features_have_a_residual(rng):
    q, k, v = inputs(rng)
    wanted = attend(q, k, v, return_residual=True)[1]
    out, found = attend(q, k, v[..., :0], return_residual=True)
    assert out.shape == (B, T, N, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_residual_without_keys_is_the_sink(rng):
    q, k, v = inputs(rng)
    sink = np.array([0.5, -1.0, 2.0, 0.0])[:N]
    by_normalizer = functools.partial(jsm.softmax, sink=sink[:, None, None])
    for options in ({"sink": sink}, {"normalizer": by_normalizer}):
        out, found = attend(q, k[:, :0], v[:, :0], return_residual=True, **options)
        assert np.all(out == 0)
        np.testing.assert_allclose(found, np.broadcast_to(sink, found.shape))
    found = attend(q, k[:, :0], v[:, :0], return_residual=True)[1]
    np.testing.assert_array_equal(found, np.full(found.shape, -np.inf))


def test_normalizers_that_draw_are_refused(rng):
    """Blocks would share their noise, and the gradient would draw other noise than the output."""
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        drawing = functools.partial(jsm.gumbel_softmax, key)
        with pytest.raises(ValueError, match="same weights in every block, got gumbel_softmax"):
            attend(*inputs(rng), normalizer=drawing)


def test_what_a_normalizer_says_of_rows_is_refused(rng):
    q, k, v = inputs(rng)
    masked = functools.partial(jsm.softmax, where=np.ones(S, bool))
    with pytest.raises(ValueError, match="normalizer must leave axis, masks and segments to"):
        attend(q, k, v, normalizer=masked)
    with_sink = functools.partial(jsm.softmax, sink=1.0)
    with pytest.raises(ValueError, match="sink must be given once"):
        attend(q, k, v, normalizer=with_sink, sink=np.ones(N))
    np.testing.assert_allclose(
        attend(q, k, v, normalizer=with_sink), attend(q, k, v, sink=np.ones(N)), rtol=1e-12
    )


# ---- dropout


def weights_of(**options):
    """The weights: the outputs, where the values are the unit vectors."""
    q, k, _ = inputs(np.random.default_rng(1), keys=64)
    v = jnp.broadcast_to(jnp.eye(64)[:, None], (B, 64, K, 64))
    return jnp.moveaxis(jsm.dot_product_attention(q, k, v, **options), 1, 2)


def test_dropout_drops_its_share_and_scales_the_rest():
    key = jax.random.key(3)
    ratio = weights_of(dropout_rate=0.3, dropout_key=key) / weights_of()
    kept = ratio > 0.5
    np.testing.assert_allclose(ratio[kept], 1 / 0.7, rtol=1e-12)
    assert np.all(ratio[~kept] == 0)
    # 5120 weights: a standard deviation is 0.0064. And no index is without effect.
    assert abs(np.mean(kept) - 0.7) < 0.026
    for axis in range(4):
        assert 0.35 < np.mean(kept != np.roll(kept, 1, axis)) < 0.49
    # A raw key is the same key, another is another.
    raw = weights_of(dropout_rate=0.3, dropout_key=jax.random.key_data(key))
    np.testing.assert_array_equal(raw > 0, kept)
    other = weights_of(dropout_rate=0.3, dropout_key=jax.random.key(4))
    assert np.mean((other > 0) != kept) > 0.35


@pytest.mark.thorough
def test_dropout_depends_on_indices_alone():
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0), "is_causal": True}
    whole = weights_of(**options)
    np.testing.assert_allclose(weights_of(block_size=3, **options), whole, rtol=1e-13)
    far = weights_of(query_offset=3, **options)
    of_arrays = weights_of(query_offset=np.array([3] * B), **options)
    np.testing.assert_allclose(of_arrays, far, rtol=1e-13)
    in_window = weights_of(block_size=2, local_window_size=4, **options)
    near = np.abs(np.arange(T)[:, None] - np.arange(64)) <= 4
    np.testing.assert_array_equal((in_window > 0), (whole > 0) & near[None, None])


def test_dropout_is_the_same_in_derivatives(rng):
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(7), "block_size": 5}
    args = inputs(rng)
    unit = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, S))
    dropped = jnp.moveaxis(attend(*args[:2], unit, **options) / attend(*args[:2], unit), 1, 2)

    def with_gradient(f):
        out, pullback = jax.vjp(f, *args)
        return out, *pullback(jnp.cos(out))

    actual = jax.jit(with_gradient, static_argnums=0)(functools.partial(attend, **options))
    wanted = with_gradient(functools.partial(dense, factor=dropped))
    for x, y in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


# ---- how it is computed


def equations(closed, times=1):
    """All equations of a jaxpr, and how often each is run."""
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns"):
                    yield from equations(sub, inner)


def products(function, length):
    """How many scores the products of a function make or use."""
    q = jnp.zeros((1, length, 1, 4), np.float32)
    total = 0
    for eqn, times in equations(jax.make_jaxpr(function)(q, q, q)):
        if eqn.primitive.name == "attention_product":
            total += times * max(x.aval.size for x in (*eqn.invars, *eqn.outvars))
    return total


def test_memory_is_linear_in_every_derivative():
    """No array is larger than what came in or the scores of a block, at whatever length."""
    length, rows = 512, 16
    q = jnp.zeros((1, length, 1, 4), np.float32)
    f = functools.partial(jsm.dot_product_attention, block_size=rows, normalizer=jsm.entmax15)

    def everything(*args):
        return derivatives(f)(args, args)

    sizes = [
        x.aval.size
        for eqn, _ in equations(jax.make_jaxpr(everything)(q, q, q))
        for x in eqn.outvars
        if hasattr(x.aval, "size")
    ]
    assert max(sizes) == rows * length
    assert len(sizes) > 1000


def test_arrays_without_a_tangent_cost_no_gradient():
    """A bias of constants, as large as all the scores, gets no cotangent of that size."""
    q, bias = jnp.zeros((1, 64, 1, 4), np.float32), jnp.zeros((1, 1, 64, 64), np.float32)

    def loss(q, bias):
        return jnp.sum(jsm.dot_product_attention(q, q, q, bias, block_size=16))

    def largest(argnums):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(q, bias)
        return max(x.aval.size for eqn, _ in equations(jaxpr) for x in eqn.outvars)

    assert largest(0) == 16 * 64
    assert largest((0, 1)) == 64 * 64


@pytest.mark.parametrize("what", [lambda f: f, lambda f: jax.grad(lambda *args: f(*args).sum())])
def test_only_keys_within_reach_are_computed(what):
    attention = functools.partial(jsm.dot_product_attention, block_size=16)
    full = products(what(attention), 512)
    assert products(what(functools.partial(attention, is_causal=True)), 512) <= 0.57 * full
    near = what(functools.partial(attention, local_window_size=(16, 0)))
    assert products(near, 512) <= 33 / 512 * full
    assert products(near, 1024) <= 2.1 * products(near, 512)


def test_decoding_computes_one_row():
    q, k = jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 100, 2, 4))
    jaxpr = jax.make_jaxpr(jsm.dot_product_attention)(q, k, k)
    shapes = [x.aval.shape for eqn, _ in equations(jaxpr) for x in eqn.outvars]
    assert max(np.prod(shape) for shape in shapes) <= k.size
    assert "scan" not in [eqn.primitive.name for eqn, _ in equations(jaxpr)]


def test_gradients_of_half_precision_are_of_one_type_on_all_platforms():
    """Some platforms sum up what others have in parts."""
    length = 1024
    q = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 2, length, length), jnp.bfloat16)

    def loss(q, bias):
        return jnp.sum(jsm.dot_product_attention(q, q, q, bias=bias), dtype=jnp.float32)

    found = jax.eval_shape(jax.grad(loss, (0, 1)), q, bias)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, bias)]


def test_lowers_for_all_platforms():
    q = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.bfloat16)

    def loss(*args):
        return attend(*args, is_causal=True, normalizer=jsm.entmax15).astype(np.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q)
    for platform in ("cpu", "cuda", "tpu"):
        assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_functions_are_looked_at_anew_in_each_call(rng):
    """They may close over other arrays; ours, which cannot, are compiled once."""
    q, k, v = inputs(rng)
    state = {"slope": 0.0}

    def score_mod(score, b, n, i, j):
        return score - state["slope"] * jnp.abs(i - j).astype(score.dtype)

    first = attend(q, k, v, score_mod=score_mod)
    state["slope"] = 1.0
    assert np.any(attend(q, k, v, score_mod=score_mod) != first)
    normalizers = [functools.partial(jsm.entmax, alpha=np.float64(a)) for a in (1.3, 1.3, 1.7)]
    outs = [attend(q, k, v, normalizer=normalizer) for normalizer in normalizers]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.any(outs[1] != outs[2])


# ---- transformations


def test_vmap(rng):
    q, k, v = inputs(rng)

    def grad(q, k, v):
        return jax.grad(lambda *args: jnp.sin(attend(*args, is_causal=True)).sum(), (0, 1, 2))(
            q, k, v
        )

    # Keys of the second batch for both: what is not mapped is shared.
    mapped = jax.jit(jax.vmap(grad, in_axes=(0, None, 0)))(q, k[1], v)
    for i in range(B):
        one = grad(q[i], k[1], v[i])
        for x, y in zip(mapped, one, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-11, atol=1e-12)


def mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def value_and_pullback(f, *args):
    """The value and the pullback of its cosine."""

    @jax.jit
    def both(*args):
        out, pullback = jax.vjp(f, *args)
        return out, *pullback(jnp.cos(out))

    return both(*args)


def test_keys_spread_over_devices(rng):
    q, k, v = inputs(rng)
    alpha = jnp.array([1.0, 1.3, 1.5, 2.0])
    bias = jnp.asarray(rng.normal(size=(1, N, T, S)))
    lengths, segments = np.array([S, 7]), np.repeat([[0, 1]], [4, 6], 1)
    key_segments = jnp.asarray(np.repeat([[0, 1]], [5, 7], 1))

    def attention(q, k, v, alpha, bias, key_segments, name):
        return jsm.dot_product_attention(
            q,
            k,
            v,
            bias,
            normalizer=functools.partial(jsm.entmax, alpha=alpha[:, None, None]),
            is_causal=True,
            key_value_seq_lengths=lengths,
            query_segment_ids=segments,
            key_value_segment_ids=key_segments,
            mask_mod=lambda b, n, i, j: (i + j) % 5 > 0,
            kv_axis_name=name,
            block_size=5,
        )

    spec = P(None, "d")
    specs = P(), spec, spec, P(), P(None, None, None, "d"), spec
    spread = jax.shard_map(
        functools.partial(attention, name="d"), mesh=mesh(), in_specs=specs, out_specs=P()
    )
    args = q, k, v, alpha, bias
    actual = value_and_pullback(lambda *args: spread(*args, key_segments), *args)
    wanted = value_and_pullback(lambda *args: attention(*args, key_segments, None), *args)
    for x, y in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def test_keys_spread_over_devices_that_jax_does_not_check(rng):
    options = {"dropout_rate": 0.2, "dropout_key": jax.random.key(0), "is_causal": True}
    attention = functools.partial(jsm.dot_product_attention, **options)
    spread = jax.shard_map(
        functools.partial(attention, kv_axis_name="d"),
        mesh=mesh(),
        in_specs=(P(), P(None, "d"), P(None, "d")),
        out_specs=P(),
        check_vma=False,
    )
    args = inputs(rng)
    actual, wanted = value_and_pullback(spread, *args), value_and_pullback(attention, *args)
    for x, y in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


def test_residual_and_guard_with_keys_spread_over_devices(rng):
    q, k, v = inputs(rng)
    spec = P(None, "d")

    def spread(f, out_specs):
        return jax.jit(
            jax.shard_map(f, mesh=mesh(), in_specs=(P(), spec, spec), out_specs=out_specs)
        )(q, k, v)

    options = {"is_causal": True, "sink": 0.3, "return_residual": True}
    actual = spread(functools.partial(attend, kv_axis_name="d", **options), (P(), P()))
    for x, y in zip(actual, attend(q, k, v, **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)

    def shares(scores, axis, where):
        weights = jnp.where(where, jnp.exp(scores), 0)
        return weights / jax.lax.psum(jnp.sum(weights, -1, keepdims=True), "d")

    def mask_mod(b, n, i, j):
        return i > 2

    actual = spread(
        functools.partial(attend, kv_axis_name="d", normalizer=shares, mask_mod=mask_mod), P()
    )
    np.testing.assert_allclose(actual, attend(q, k, v, mask_mod=mask_mod), rtol=1e-12, atol=1e-13)


def test_heads_spread_over_devices(rng):
    """A parameter that all devices share gets the sum of their gradients."""
    q = jnp.asarray(rng.normal(size=(4, T, 2, H)))

    def attention(q, alpha):
        return attend(q, q, q, normalizer=functools.partial(jsm.entmax, alpha=alpha))

    spread = jax.shard_map(attention, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P("d"))

    def grads(f):
        return jax.jit(jax.grad(lambda *args: jnp.sin(f(*args)).sum(), (0, 1)))(q, jnp.array(1.4))

    for x, y in zip(grads(spread), grads(attention), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


# ---- bad input


def zeros(*shape, dtype=np.float32):
    return jnp.zeros(shape, dtype)


Q, KV = zeros(B, T, N, H), zeros(B, S, K, H)
BAD_INPUTS = [
    ("query must be an array", (None, KV, KV), {}),
    ("query must be of a float dtype", (zeros(T, N, H, dtype=int), KV, KV), {}),
    ("value must have the dtype of query", (Q, KV, KV.astype(jnp.bfloat16)), {}),
    ("query must have the axes", (zeros(T, H), KV, KV), {}),
    ("query and key must have the shapes", (Q, zeros(B, S, K, 7), KV), {}),
    ("value must have the shape of key", (Q, KV, zeros(B, 5, K, H)), {}),
    ("multiple of the heads of key, 3", (Q, *2 * (zeros(B, S, 3, H),)), {}),
]
BAD_OPTIONS = [
    ("bias must broadcast", {"bias": zeros(T, T)}),
    ("bias must be real", {"bias": zeros(T, S, dtype=bool)}),
    ("mask must be boolean", {"mask": zeros(T, S)}),
    ("mask must broadcast", {"mask": zeros(3, S, dtype=bool)}),
    ("normalizer must be a function", {"normalizer": 1.5}),
    ("scale must be a number", {"scale": np.ones(3)}),
    ("local_window_size must", {"local_window_size": (1, -1)}),
    ("local_window_size must", {"local_window_size": 2.5}),
    ("block_size must", {"block_size": 0}),
    ("one length per batch", {"query_seq_lengths": np.array([1])}),
    ("key_value_seq_lengths must be integers", {"key_value_seq_lengths": np.ones(B)}),
    ("got no key_value_segment_ids", {"query_segment_ids": zeros(B, T, dtype=int)}),
    ("kv_axis_name must be", {"kv_axis_name": 1}),
    ("dropout_rate must", {"dropout_rate": 1.0}),
    ("dropout_key must be given", {"dropout_rate": 0.5}),
    ("needs the normalizer", {"return_residual": True, "normalizer": jsm.sparsemax}),
    ("sink needs", {"sink": 0.0, "normalizer": jsm.softpick}),
    ("sink must have one value per head", {"sink": np.ones(3)}),
    ("score_mod must return one", {"score_mod": lambda score, *_: score[None]}),
    ("mask_mod must return one", {"mask_mod": lambda *_: 1.0}),
    ("which does not take where.", {"normalizer": lambda scores, axis: scores}),
    ("normalizer must return", {"normalizer": lambda scores, axis, where: scores[0]}),
]


@pytest.mark.parametrize(
    ("words", "args", "options"),
    [*BAD_INPUTS, *((words, (Q, KV, KV), options) for words, options in BAD_OPTIONS)],
)
def test_bad_input_gets_one_sentence(words, args, options):
    error = TypeError if "be of" in words or "dtype" in words else (TypeError, ValueError)
    with pytest.raises(error, match=words) as caught:
        jsm.dot_product_attention(*args, **options)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [2**31 - 1, (2**31 - 1, 2**40)])
def test_a_window_may_be_longer_than_any_sequence(window, rng):
    q, k, v = inputs(rng)
    np.testing.assert_allclose(
        attend(q, k, v, local_window_size=window), attend(q, k, v), rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("of_query", "of_key", "options"),
    [
        (1.0, 1.0, {"scale": 0.0}),
        (1.0, 1.0, {"scale": 1e-38}),
        (1.0, 1.0, {"sink": np.full(1, np.inf)}),
        (3e19, np.where(np.arange(16) == 3, 3e19, -3e19)[None, :, None, None], {}),
        (3e19, -3e19, {}),
    ],
    ids=["scale 0", "tiny scale", "infinite sink", "a score of +inf", "scores of -inf"],
)
def test_scores_that_are_made_again_may_be_extreme(dtype, of_query, of_key, options, tiled):
    """As on GPUs, beside what blocks do that read scores from memory."""
    unit, v = jnp.ones((1, 16, 1, 8), dtype), jnp.arange(128.0).reshape(1, 16, 1, 8)

    def everything(q, k, v):
        attention = functools.partial(jsm.dot_product_attention, **options)
        out, pull_back = jax.vjp(lambda v: attention(q, k, v), v)
        return out, *pull_back(jnp.ones_like(out))

    args = of_query * unit, jnp.asarray(of_key, dtype) * unit, v.astype(dtype)
    wanted = jax.jit(everything)(*args)
    tiled(Tiling(2**10, 2**10, 2**10, (1, 16), 2, products_again=True))
    found = jax.jit(lambda *args: everything(*args))(*args)
    for x, y in zip(found, wanted, strict=True):
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(
            x.astype(np.float64), y.astype(np.float64), rtol=2.0**-7, atol=1e-5
        )
