"""Attention in use: a transformer that learns, and the layers of Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

VOCABULARY, HALF, WIDTH, HEADS = 8, 8, 32, 2
LENGTH = 2 * HALF


def sequences(key, count):
    """Random tokens, and then the same again: the second half is to be recalled from the first."""
    half = jax.random.randint(key, (count, HALF), 0, VOCABULARY, jnp.int32)
    return jnp.concatenate([half, half], 1)


def initial(key):
    shapes = {
        "tokens": (VOCABULARY, WIDTH),
        "places": (LENGTH, WIDTH),
        "heads": (3, WIDTH, HEADS, WIDTH // HEADS),
        "out": (HEADS, WIDTH // HEADS, WIDTH),
        "logits": (WIDTH, VOCABULARY),
    }
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {
        name: jax.random.normal(keys[name], shape, np.float32) * np.float32(WIDTH**-0.5)
        for name, shape in shapes.items()
    }
    return params | {"sink": jnp.zeros(HEADS, np.float32)}


def predict(params, tokens, attention):
    """The logits of the next token, by one layer of attention."""
    x = params["tokens"][tokens] + params["places"]
    q, k, v = jnp.einsum("btd,cdnh->cbtnh", x, params["heads"])
    mixed = attention(q, k, v, sink=params["sink"])
    x = x + jnp.einsum("btnh,nhd->btd", mixed, params["out"])
    return x @ params["logits"]


def with_sink(*args, **kwargs):
    return jsm.dot_product_attention(*args, is_causal=True, block_size=8, **kwargs)


def without_sink(normalizer):
    return lambda *args, sink: with_sink(*args, normalizer=normalizer)


ATTENTIONS = {
    "softmax": without_sink(jsm.softmax),
    "entmax15": without_sink(jsm.entmax15),
    "sink": with_sink,
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_transformer_learns_to_recall(name):
    attention = ATTENTIONS[name]
    # What follows token i of the second half is token i + 1 of the first; it is at i - HALF + 1.
    recalled = slice(HALF - 1, LENGTH - 1)

    def loss(params, tokens):
        logits = predict(params, tokens, attention)[:, recalled]
        return jnp.mean(jsm.cross_entropy(logits, tokens[:, HALF:]))

    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def step(state, key):
            params, moments = state
            value, grad = jax.value_and_grad(loss)(params, sequences(key, 32))
            updates, moments = optimizer.update(grad, moments)
            return (optax.apply_updates(params, updates), moments), value

        keys = jax.random.split(jax.random.key(1), 300)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for optax
        params, losses = train(initial(jax.random.key(0)))
        tokens = sequences(jax.random.key(2), 500)
        logits = predict(params, tokens, attention)[:, recalled]
    assert losses[0] > 1.5
    assert np.mean(np.asarray(logits).argmax(-1) == np.asarray(tokens[:, HALF:])) > 0.99
    assert (name == "sink") == bool(np.any(params["sink"] != 0))


# ---- Flax, whose layers need dtypes and ranks to be promoted


@pytest.fixture
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def layer(**kwargs):
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0), param_dtype=np.float32, **kwargs
    )


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("batch", [(3,), (3, 2)])
def test_layer_of_nnx_with_our_attention(batch, rng):
    x = jnp.asarray(rng.normal(size=(*batch, 5, 8)), np.float32)
    mask = nnx.make_causal_mask(jnp.ones((*batch, 5)))  # of floats
    ours, theirs = layer(attention_fn=jsm.attention_fn), layer()
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("promotion")
def test_layer_of_nnx_learns_with_options(rng):
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), np.float32)
    sparse = functools.partial(jsm.attention_fn, normalizer=jsm.entmax15)
    model = layer(attention_fn=sparse, dropout_rate=0.5)
    assert np.any(model(x, deterministic=True) != layer()(x))

    def loss(model, rngs):
        return jnp.sum(model(x, rngs=rngs, deterministic=False) ** 2)

    value_and_grad = nnx.jit(nnx.value_and_grad(loss))
    value, grads = value_and_grad(model, nnx.Rngs(1))
    other, _ = value_and_grad(model, nnx.Rngs(2))
    assert value != other
    assert all(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(grads)["out"]["kernel"]))


@pytest.mark.usefixtures("promotion")
def test_layer_of_linen_with_our_attention(rng):
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), np.float32)
    mask = linen.make_causal_mask(jnp.ones((3, 5)))
    theirs = linen.MultiHeadDotProductAttention(num_heads=2)
    params = theirs.init(jax.random.key(0), x)
    ours = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=jsm.attention_fn)
    wanted = theirs.apply(params, x, mask=mask)
    np.testing.assert_allclose(ours.apply(params, x, mask=mask), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("batch", [(3,), (3, 2)])
def test_weights_are_sown_as_flax_does(batch, rng):
    """Before dropout, and with the layer's own output."""
    x = jnp.asarray(rng.normal(size=(*batch, 5, 8)), np.float32)
    mask = nnx.make_causal_mask(jnp.ones((*batch, 5)))
    sown = []
    for options in ({"attention_fn": jsm.attention_fn}, {}):
        model = layer(dropout_rate=0.5, keep_rngs=True, **options)
        model(x, mask=mask, sow_weights=True, deterministic=False)
        (weights,) = jax.tree.leaves(nnx.state(model, nnx.Intermediate))
        sown.append(weights)
    np.testing.assert_allclose(*sown, rtol=1e-5, atol=1e-6)
    if len(batch) == 1:
        outs = []
        for options in ({"attention_fn": jsm.attention_fn}, {}):
            model = linen.MultiHeadDotProductAttention(num_heads=2, **options)
            params = model.init(jax.random.key(0), x)
            _, state = model.apply(params, x, mask=mask, sow_weights=True, mutable="intermediates")
            outs.append(state["intermediates"]["attention_weights"][0])
        np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)


class Module:
    """Keeps what is sown in it."""

    def sow(self, kind, name, weights):
        self.weights = weights


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("names", [("kv_axis_name",), ("kv_axis_name", "query_axis_name")])
def test_weights_of_keys_that_are_spread(names, rng):
    """Of the keys of all devices, as without a mesh."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, 8, 2, 4))) for _ in range(3))

    def sown(*args, **options):
        module = Module()
        jsm.attention_fn(*args, module=module, deterministic=True, **options)
        return module.weights

    here = P(None, "s")
    in_ring = len(names) == 2
    mesh = jax.make_mesh((4,), ("s",), (AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.shard_map(
        functools.partial(sown, **dict.fromkeys(names, "s")),
        mesh=mesh,
        in_specs=(here if in_ring else P(), here, here),
        out_specs=P(None, None, "s") if in_ring else P(),
    )
    np.testing.assert_allclose(spread(q, k, v), sown(q, k, v), rtol=1e-6)


def test_precision_is_not_for_a_layer_to_say():
    q = jnp.zeros((1, 2, 1, 4), np.float32)
    with pytest.raises(ValueError, match="precision must be None, got 'highest': use"):
        jsm.attention_fn(q, q, q, precision="highest")


@pytest.mark.usefixtures("promotion")
def test_layer_of_nnx_decodes_with_our_attention(rng):
    """Step by step, with the cache and the mask of Flax, as all at once."""
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), np.float32)
    model = layer(attention_fn=jsm.attention_fn)
    whole = model(x, mask=nnx.make_causal_mask(jnp.ones((3, 5))))
    model.init_cache(x.shape)
    for i in range(5):
        out = model(x[:, i : i + 1], decode=True)
        np.testing.assert_allclose(out[:, 0], whole[:, i], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("promotion")
def test_attention_fn_pairs_equal_batch_axes_only(rng):
    """As many queries as keys is not enough."""
    q, k = (jnp.asarray(rng.normal(size=(*batch, 4, 2, 3))) for batch in ((2, 3), (3, 2)))
    for name, args in {"key": (q, k, k), "value": (q, q, k)}.items():
        with pytest.raises(
            ValueError,
            match=rf"{name} must .*batch of query, \(2, 3\), got shape \(3, 2, 4, 2, 3\)",
        ):
            jsm.attention_fn(*args)
    with pytest.raises(ValueError, match=r"query must have the axes .* got shape \(2, 3\)"):
        jsm.attention_fn(*(q[0, 0, 0],) * 3)
    swapped = k.swapaxes(0, 1)
    out = jsm.attention_fn(q, swapped, swapped)
    for i, j in np.ndindex(2, 3):
        expected = jax.nn.dot_product_attention(*(x[i, j] for x in (q, swapped, swapped)))
        np.testing.assert_allclose(out[i, j], expected, rtol=1e-5)


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_masks_of_attention_fn_broadcast_to_the_batch(name, batch, rng):
    q = jnp.asarray(rng.normal(size=(*batch, 4, 2, 3)))
    given = jnp.asarray(rng.integers(2, size=(1, 2, 4, 4)), bool if name == "mask" else float)
    out = jsm.attention_fn(q, q, q, **{name: given})
    for i in np.ndindex(batch):
        expected = jsm.dot_product_attention(q[i], q[i], q[i], **{name: given[0]})
        np.testing.assert_allclose(out[i], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=rf"{name} must .*\(5, 2, 4, 4\)"):
        jsm.attention_fn(q, q, q, **{name: jnp.broadcast_to(given, (5, 2, 4, 4))})


@pytest.mark.usefixtures("promotion")
def test_options_of_each_sequence_have_the_batch_axes(rng):
    """As the arrays have them, or one for all of them; or none."""
    q, k, v = rng.normal(size=(3, 2, 3, 5, 2, 4)).astype(np.float32)
    options = {
        "query_segment_ids": rng.integers(2, size=(2, 3, 5)),
        "key_value_segment_ids": rng.integers(2, size=(2, 3, 5)),
        "query_seq_lengths": np.array([[5, 4, 3], [5, 5, 2]]),
        "key_value_seq_lengths": np.array([[5, 2, 5], [1, 5, 4]]),
        "query_offset": np.array([[0, 1, 2], [0, -1, 3]]),
    }
    attend = functools.partial(jsm.attention_fn, is_causal=True)
    out = attend(q, k, v, **options)
    flat = {name: x.reshape(6, *x.shape[2:]) for name, x in options.items()}
    np.testing.assert_array_equal(attend(q, k, v, **flat), out)
    for i, j in np.ndindex(2, 3):
        one = attend(q[i, j], k[i, j], v[i, j], **{name: x[i, j] for name, x in options.items()})
        np.testing.assert_allclose(one, out[i, j], rtol=1e-5, atol=1e-6)
        rows, columns = np.arange(5)[:, None] + options["query_offset"][i, j], np.arange(5)
        segments = [options[f"{x}_segment_ids"][i, j] for x in ("query", "key_value")]
        seen = (columns <= rows) & (segments[0][:, None] == segments[1])
        seen &= columns < options["key_value_seq_lengths"][i, j]
        seen &= np.arange(5)[:, None] < options["query_seq_lengths"][i, j]
        weights = jsm.softmax(np.einsum("tnh,snh->nts", q[i, j], k[i, j]) / 2, where=seen)
        expected = np.einsum("nts,snh->tnh", weights, v[i, j])
        np.testing.assert_allclose(out[i, j], expected, rtol=1e-4, atol=1e-6)
