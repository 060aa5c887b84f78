"""The linear loss against the same with all scores: values, derivatives, memory, and a model."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
all_close = functools.partial(jax.tree.map, close)

NUM_ROWS, WIDTH, NUM_CLASSES = 7, 3, 5
RNG = np.random.default_rng(1)
HIDDEN = RNG.normal(size=(NUM_ROWS, WIDTH))
WEIGHT = 2 * RNG.normal(size=(WIDTH, NUM_CLASSES))
BIAS = RNG.normal(size=NUM_CLASSES)
LABELS = np.array([0, 4, 2, 2, 1, 3, 0])
KEEP = np.array([True, False, True, True, True, False, True])
OPERANDS = (HIDDEN, WEIGHT, BIAS)

REDUCE = {"mean": jnp.mean, "sum": jnp.sum, "none": lambda losses: losses}


def smoothed(scores, labels):
    return jsm.cross_entropy(scores, labels, label_smoothing=0.1, z_loss=0.01, temperature=1.3)


EXAMPLES = {
    "cross_entropy": jsm.cross_entropy,
    "with_options": smoothed,
    "sparsemax_loss": jsm.sparsemax_loss,
    "entmax_loss": functools.partial(jsm.entmax_loss, alpha=1.5),
    "optax": optax.softmax_cross_entropy_with_integer_labels,
}


def chunked(hidden, weight, bias, *, labels=LABELS, **kwargs):
    """In chunks that do not divide the rows."""
    return jsm.linear_cross_entropy(
        hidden, weight, labels, bias=bias, **{"chunk_size": 3, **kwargs}
    )


def whole(
    hidden, weight, bias, *, loss=jsm.cross_entropy, reduction="mean", cap=None, labels=LABELS
):
    """The same with all scores."""
    scores = hidden @ weight + bias[None]
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    return REDUCE[reduction](loss(scores, labels))


def weighed(f):
    """A scalar in which every row counts differently."""

    def scalar(*operands):
        out = f(*operands)
        return jnp.vdot(jnp.cos(jnp.arange(out.size, dtype=out.dtype)), jnp.ravel(out))

    return scalar


def tangents(operands):
    return jax.tree.map(lambda x: jnp.cos(7 * x), operands)


# Values and derivatives.


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [("cross_entropy", "sum"), ("with_options", "none"), *((name, "mean") for name in EXAMPLES)],
)
def test_equals_the_loss_of_all_scores(loss, reduction):
    ours = functools.partial(chunked, loss=EXAMPLES[loss], reduction=reduction)
    theirs = functools.partial(whole, loss=EXAMPLES[loss], reduction=reduction)

    def derivatives(f):
        value_and_gradient = jax.value_and_grad(weighed(f), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (f(*x), value_and_gradient(*x)))(*OPERANDS)

    all_close(derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_and_second_derivatives(reduction):
    def derivatives(f):
        gradient = jax.grad(weighed(f), argnums=(0, 1, 2))

        def all_of_them(operands):
            moved = tangents(operands)
            return (
                jax.jvp(f, operands, moved),
                jax.jvp(gradient, operands, moved),
                jax.vjp(gradient, *operands)[1](moved),
                jax.jvp(lambda *x: jax.jvp(f, x, moved)[1], operands, moved),
            )

        return jax.jit(all_of_them)(OPERANDS)

    ours = derivatives(functools.partial(chunked, loss=smoothed, reduction=reduction))
    all_close(ours, derivatives(functools.partial(whole, loss=smoothed, reduction=reduction)))


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 100])
def test_chunks_of_any_size(chunk_size):
    gradient = jax.value_and_grad(functools.partial(chunked, chunk_size=chunk_size), (0, 1, 2))
    all_close(gradient(*OPERANDS), jax.value_and_grad(whole, (0, 1, 2))(*OPERANDS))


def test_weights_wider_than_a_block(monkeypatch):
    """The gradient of the weights is added up in blocks, which may not divide the classes."""
    monkeypatch.setattr("jaxsoftmax._platforms._cpu._BLOCK", 6)  # two classes
    ours = jax.value_and_grad(lambda *x: chunked(*x, chunk_size=2), (0, 1, 2))(*OPERANDS)
    all_close(ours, jax.value_and_grad(whole, (0, 1, 2))(*OPERANDS))


@pytest.fixture
def as_on_accelerators(monkeypatch):
    """What runs on accelerators only runs here; gives how many chunks of two rows it joins."""
    monkeypatch.setattr("jaxsoftmax.linear_loss._chunks.chunk_size_for", lambda num_classes: 2)
    monkeypatch.setattr("jax.lax.platform_dependent", lambda *args, default, **_: default(*args))
    taken = []
    in_one = jsm.linear_loss._losses.in_one

    def recorded(*sizes):
        taken.append(in_one(*sizes))
        return taken[-1]

    monkeypatch.setattr("jaxsoftmax.linear_loss._losses.in_one", recorded)
    return taken


@pytest.fixture
def in_pairs(as_on_accelerators, monkeypatch):
    """As a GPU takes chunks in half precision: two chunks, of two of those, are one product."""

    def of_pairs(general, *args, in_pairs, **_):
        as_on_accelerators.append(in_pairs is not general and "in pairs")
        return in_pairs(*args)

    def on_gpu(*args, default, cuda=None, **_):
        return (cuda or default)(*args)

    monkeypatch.setattr("jax.lax.platform_dependent", on_gpu)
    monkeypatch.setattr("jaxsoftmax._platforms._gpu.chunks", of_pairs)
    monkeypatch.setattr("jaxsoftmax.linear_loss._chunks._FEWEST_OF_ACCELERATOR", 4)
    monkeypatch.setattr("jaxsoftmax.linear_loss._chunks._SCORES_OF_ACCELERATOR", 4)
    return as_on_accelerators


def derivatives_of(f):
    value = weighed(f)
    second = jax.jvp(jax.grad(value, (0, 1, 2)), OPERANDS, tangents(OPERANDS))
    return f(*OPERANDS), jax.jvp(value, OPERANDS, tangents(OPERANDS)), second


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_that_an_accelerator_takes_as_one(reduction, as_on_accelerators):
    options = {"loss": smoothed, "reduction": reduction}
    ours = functools.partial(chunked, chunk_size=None, **options)
    all_close(derivatives_of(ours), derivatives_of(functools.partial(whole, **options)))
    assert as_on_accelerators[0] == 4  # all four, of two rows each


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pairs_of_chunks_in_one_product(reduction, in_pairs):
    options = {"loss": smoothed, "reduction": reduction}
    ours = functools.partial(chunked, chunk_size=None, **options)
    all_close(derivatives_of(ours), derivatives_of(functools.partial(whole, **options)))
    assert in_pairs[0] == 2
    assert "in pairs" in in_pairs


def test_pairs_of_chunks_whose_rows_devices_share(in_pairs, rng):
    """Inside `shard_map`, where types say what varies."""
    hidden, labels = rng.normal(size=(28, WIDTH)), rng.integers(NUM_CLASSES, size=28)
    ours = functools.partial(chunked, chunk_size=None, loss=smoothed)
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def shared(hidden, weight, bias):
        def share(hidden, weight, bias, labels):
            return jax.lax.pmean(ours(hidden, weight, bias, labels=labels), "a")

        specs = (P("a"), P(), P(), P("a"))
        mapped = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P())
        return mapped(hidden, weight, bias, labels)

    expected = jax.value_and_grad(functools.partial(whole, loss=smoothed, labels=labels), (0, 1, 2))
    found = jax.jit(jax.value_and_grad(shared, (0, 1, 2)))(hidden, WEIGHT, BIAS)
    all_close(found, expected(hidden, WEIGHT, BIAS))
    assert "in pairs" in in_pairs


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("shape", "spread"), [((16,), P("a")), ((4, 8), P("a")), ((2, 8), P())])
def test_the_same_of_rows_that_xla_shares(shape, spread, reduction, as_on_accelerators, rng):
    """Each device's rows of all these chunks are one chunk."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    hidden, labels = rng.normal(size=(*shape, WIDTH)), rng.integers(NUM_CLASSES, size=shape)
    options = {"loss": smoothed, "reduction": reduction}

    def ours(hidden, weight, bias, labels):
        return chunked(hidden, weight, bias, chunk_size=None, labels=labels, **options)

    def theirs(hidden, weight, bias, labels):
        return whole(hidden.reshape(-1, WIDTH), weight, bias, labels=labels.reshape(-1), **options)

    def derivatives(f):
        value = weighed(lambda *operands: f(*operands, labels))
        gradient = jax.grad(value, (0, 1, 2))
        return jax.jit(lambda *x: (value(*x), jax.jvp(gradient, x, tangents(x))))

    operands = (hidden, WEIGHT, BIAS)
    expected = derivatives(theirs)(*operands)
    sharding = jax.NamedSharding(mesh, spread)
    with jax.set_mesh(mesh):
        hidden, labels = (jax.device_put(x, sharding) for x in (hidden, labels))
        all_close(derivatives(ours)(hidden, WEIGHT, BIAS), expected)
    assert as_on_accelerators[0] > 1


def test_the_same_under_vmap_over_an_explicit_mesh(as_on_accelerators, rng):
    hidden, labels = rng.normal(size=(4, 8, WIDTH)), rng.integers(NUM_CLASSES, size=(4, 8))

    def gradient(hidden, labels):
        def value(hidden, labels):
            return chunked(hidden, WEIGHT, BIAS, chunk_size=None, labels=labels)

        return jax.vmap(jax.value_and_grad(value))(hidden, labels)

    expected = jax.jit(gradient)(hidden, labels)
    mesh = jax.make_mesh((4,), ("a",))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, jax.NamedSharding(mesh, P("a"))) for x in (hidden, labels)]
        all_close(jax.jit(gradient)(*placed), expected)
    assert as_on_accelerators[0] > 1


def test_leading_axes_and_no_bias(rng):
    hidden, labels = rng.normal(size=(2, 3, 4, WIDTH)), rng.integers(5, size=(2, 3, 4))
    expected = jsm.cross_entropy(hidden @ WEIGHT, labels)
    options = {"reduction": "none", "chunk_size": 5}
    close(jsm.linear_cross_entropy(hidden, WEIGHT, labels, **options), expected)
    close(jsm.linear_cross_entropy(hidden, WEIGHT, labels, chunk_size=5), expected.mean())
    close(jsm.linear_cross_entropy(hidden[0, 0, 0], WEIGHT, labels[0, 0, 0]), expected[0, 0, 0])


@pytest.mark.asks_for_nan
def test_soft_cap_that_turns_out_to_be_negative():
    loss = jax.jit(lambda cap: chunked(*OPERANDS, logits_soft_cap=cap))
    assert np.isfinite(loss(2.0))
    assert np.isnan(loss(-2.0))


def test_soft_cap():
    for cap in (2.0, jnp.asarray(2.0)):
        ours = jax.value_and_grad(lambda *x, c=cap: chunked(*x, logits_soft_cap=c), (0, 1, 2))
        theirs = jax.value_and_grad(functools.partial(whole, cap=2.0), (0, 1, 2))
        all_close(ours(*OPERANDS), theirs(*OPERANDS))
    slope = jax.grad(lambda cap, f: f(cap))
    close(
        slope(2.0, lambda cap: chunked(*OPERANDS, logits_soft_cap=cap)),
        slope(2.0, lambda cap: whole(*OPERANDS, cap=cap)),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_loss_closes_over_has_gradients(reduction):
    """A learned alpha and temperature, a value per class, and integers, which have none."""

    def derivatives(f):
        def value(params, order):
            alpha, temperature, shift = params

            def loss(scores, labels):
                scores = jnp.take(scores + shift[None], order, axis=-1)
                return jsm.entmax_loss(scores, labels, alpha, temperature=temperature)

            return weighed(functools.partial(f, loss=loss, reduction=reduction))(*OPERANDS)

        params = (jnp.asarray(1.3), jnp.asarray(0.8), BIAS)
        gradient = jax.grad(value)
        order = np.array([1, 0, 2, 4, 3])
        hvp = jax.jit(lambda p: jax.jvp(lambda p: gradient(p, order), (p,), (tangents(p),)))
        return hvp(params)

    all_close(derivatives(chunked), derivatives(whole))


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_labels_of_any_integers(dtype):
    labels = LABELS.astype(dtype)
    close(chunked(*OPERANDS, labels=labels), whole(*OPERANDS))
    labels[0] = 100
    assert np.isnan(chunked(*OPERANDS, labels=labels))


def test_layers_of_width_0():
    loss = jsm.linear_cross_entropy(np.ones((6, 0)), np.ones((0, 7)), np.arange(6))
    close(loss, np.log(7))


def test_losses_are_looked_at_anew_in_each_call():
    """They may use other numbers, whatever kind of callable they are."""

    class Mutable:
        alpha = 1.3

        def __call__(self, scores, labels):
            return jsm.entmax_loss(scores, labels, self.alpha)

    loss = Mutable()
    for loss.alpha in (1.3, 1.7):
        expected = whole(*OPERANDS, loss=functools.partial(jsm.entmax_loss, alpha=loss.alpha))
        close(chunked(*OPERANDS, loss=loss), expected)


def test_losses_of_any_kind_leak_nothing():
    """Those that hold traced values, or have no hash, are not kept with what is compiled."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, scores, labels):
            return jsm.cross_entropy(scores, labels)

    close(chunked(*OPERANDS, loss=Unhashable()), whole(*OPERANDS))

    def f(alpha):
        by_keyword = functools.partial(jsm.cross_entropy, temperature=alpha)
        by_closure = lambda *args: jsm.cross_entropy(*args, temperature=alpha)  # noqa: E731
        return chunked(*OPERANDS, loss=by_keyword) + chunked(*OPERANDS, loss=by_closure)

    with jax.checking_leaks():  # which traces everything anew, again and again
        jax.make_jaxpr(f)(1.3)


# Rows that do not count.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_do_not_count_leave_no_trace(reduction):
    """Whatever they hold: NaN, infinity, labels that there are not."""
    poisoned = np.where(KEEP[:, None], HIDDEN, np.array([np.nan, np.inf, 1.0]))
    labels = np.where(KEEP, LABELS, -100)

    def ours(hidden, weight, bias):
        return chunked(hidden, weight, bias, labels=labels, where=KEEP, reduction=reduction)

    def theirs(hidden, weight, bias):
        scores = hidden[KEEP] @ weight + bias[None]
        kept = jsm.cross_entropy(scores, LABELS[KEEP])
        if reduction == "none":
            return jnp.zeros(NUM_ROWS).at[np.flatnonzero(KEEP)].set(kept)
        return REDUCE[reduction](kept)

    close(ours(poisoned, WEIGHT, BIAS), theirs(*OPERANDS))
    gradients = jax.grad(weighed(ours), (0, 1, 2))(poisoned, WEIGHT, BIAS)
    all_close(gradients, jax.grad(weighed(theirs), (0, 1, 2))(*OPERANDS))
    np.testing.assert_array_equal(gradients[0][~KEEP], 0)
    _, tangent = jax.jvp(lambda h: ours(h, WEIGHT, BIAS), (poisoned,), (poisoned,))
    assert np.all(np.isfinite(tangent))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("option", ["where", "ignore_index"])
def test_rows_that_do_not_count_where_a_bias_rules_a_class_out(option, reduction):
    """Their infinite losses are not multiplied by what the loss closes over."""
    labels = np.where(KEEP, np.maximum(LABELS, 1), 0)
    bias = np.where(np.arange(NUM_CLASSES) == 0, -np.inf, BIAS)
    options = {"where": KEEP} if option == "where" else {"ignore_index": 0}

    def ours(factor, bias):
        def loss(scores, labels):
            return factor * jsm.cross_entropy(scores, labels)

        options_here = {"loss": loss, "reduction": reduction, **options}
        return jnp.sum(chunked(HIDDEN, WEIGHT, bias, labels=labels, **options_here))

    def theirs(factor, bias):
        scores = HIDDEN[KEEP] @ WEIGHT + bias[None]
        summed = jnp.mean if reduction == "mean" else jnp.sum
        return factor * summed(jsm.cross_entropy(scores, labels[KEEP]))

    gradients = [jax.grad(f, (0, 1))(1.5, bias) for f in (ours, theirs)]
    all_close(*gradients)
    close(jax.jvp(lambda a: ours(a, bias), (1.5,), (1.0,))[1], gradients[1][0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("keep", [KEEP, np.zeros(NUM_ROWS, bool)], ids=("some", "none"))
def test_rows_that_do_not_count_where_a_loss_has_no_derivative_at_0(keep, reduction):
    """Nor have those that fill up a chunk: here scores are divided by their norm."""

    def normed(scores, labels):
        scores = scores / jnp.linalg.norm(scores, axis=-1, keepdims=True)
        return jsm.cross_entropy(scores, labels, temperature=0.1)

    def ours(*operands):
        return jnp.sum(chunked(*operands, loss=normed, where=keep, reduction=reduction))

    def theirs(hidden, weight, bias):
        losses = jnp.sum(normed(hidden[keep] @ weight + bias[None], LABELS[keep]))
        return losses / max(1, int(keep.sum())) if reduction == "mean" else losses

    def derivatives(f):
        gradient = jax.grad(f, (0, 1, 2))
        return gradient(*OPERANDS), jax.jvp(gradient, OPERANDS, tangents(OPERANDS))[1]

    all_close(derivatives(ours), derivatives(theirs))


DENSE = RNG.dirichlet(np.ones(NUM_CLASSES), size=NUM_ROWS)
PADDED = np.where(KEEP, LABELS, -100)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_distributions_of_rows_that_do_not_count_are_some(reduction):
    """A loss may divide by what they sum to: here they are given as counts."""

    def of_counts(scores, counts):
        return jsm.cross_entropy(scores, counts / jnp.sum(counts, -1, keepdims=True))

    def ours(*operands):
        options = {"labels": 3 * DENSE, "loss": of_counts, "where": KEEP, "reduction": reduction}
        return jnp.sum(chunked(*operands, **options))

    def theirs(hidden, weight, bias):
        losses = jnp.sum(jsm.cross_entropy(hidden[KEEP] @ weight + bias[None], DENSE[KEEP]))
        return losses / int(KEEP.sum()) if reduction == "mean" else losses

    def derivatives(f):
        gradient = jax.grad(f, (0, 1, 2))
        return gradient(*OPERANDS), jax.jvp(gradient, OPERANDS, tangents(OPERANDS))[1]

    all_close(derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize(("labels", "ignored"), [(PADDED, -100), (DENSE, None)], ids=("ids", "p"))
def test_weights_of_rows_ignored_classes_and_distributions(labels, ignored, reduction):
    """Values and derivatives, those in the weights too, of first and second order."""
    weights = np.linspace(0, 2, NUM_ROWS)
    counts = KEEP * 1.0 if ignored else np.ones(NUM_ROWS)

    def ours(hidden, weight, weights):
        options = {"weights": weights, "ignore_index": ignored, "reduction": reduction}
        return jsm.linear_cross_entropy(hidden, weight, labels, chunk_size=3, **options)

    def theirs(hidden, weight, weights):
        targets = np.where(labels == -100, 0, labels) if ignored else labels
        losses = counts * weights * jsm.cross_entropy(hidden @ weight, targets)
        if reduction == "none":
            return losses
        return jnp.sum(losses) / (jnp.sum(counts * weights) if reduction == "mean" else 1)

    def derivatives(f):
        def scalar(*args):
            return jnp.sum(jnp.sin(f(*args)))

        args = HIDDEN, WEIGHT, weights
        first = jax.grad(scalar, (0, 1, 2))
        return f(*args), first(*args), jax.jvp(first, args, args)[1]

    jax.tree.map(functools.partial(close, rtol=1e-9), derivatives(ours), derivatives(theirs))
    mapped = jax.vmap(lambda w: jnp.sum(ours(HIDDEN, WEIGHT, w)))(np.stack([weights, 2 * weights]))
    close(mapped[0], jnp.sum(theirs(HIDDEN, WEIGHT, weights)))


def test_distributions_as_labels_are_constants():
    gradient = jax.grad(lambda y: jsm.linear_cross_entropy(HIDDEN, WEIGHT, y))(DENSE)
    np.testing.assert_array_equal(gradient, np.zeros_like(DENSE))
    hidden = np.where(KEEP[:, None], HIDDEN, np.nan)
    dense = np.where(KEEP[:, None], DENSE, np.nan)
    close(
        jsm.linear_cross_entropy(hidden, WEIGHT, dense, where=KEEP),
        jsm.linear_cross_entropy(HIDDEN[KEEP], WEIGHT, DENSE[KEEP]),
    )


def test_weights_of_0_take_away_what_is_infinite():
    hidden, weight = np.array([[1.0], [2.0]]), np.array([[0.0, -np.inf, 1.0]])
    for reduction, expected in (("mean", np.log(1 + np.e)), ("none", [np.log(1 + np.e), 0])):
        loss = jsm.linear_cross_entropy(
            hidden, weight, np.array([0, 1]), weights=np.array([3.0, 0.0]), reduction=reduction
        )
        close(loss, 3 * np.array(expected) if reduction == "none" else expected)
    for reduction in ("sum", "none"):  # and what is infinite has no derivative in its weight
        gradient = jax.grad(
            lambda weights, reduction=reduction: jnp.sum(
                jsm.linear_cross_entropy(
                    hidden, weight, np.array([0, 1]), weights=weights, reduction=reduction
                )
            )
        )(np.array([3.0, 0.0]))
        close(gradient, [np.log(1 + np.e), 0])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS, {"weights": np.ones(3)}, r"weights must broadcast to one value per row, .*\(3,\)"),
        (DENSE, {"ignore_index": 0}, "ignore_index goes with classes, got distributions"),
        (DENSE[:, :2], {}, r"labels must have the shape \(7, 5\), rows and classes, .*\(7, 2\)"),
    ],
)
def test_what_does_not_fit_rows_is_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        jsm.linear_cross_entropy(HIDDEN, WEIGHT, labels, **options)


def test_distributions_and_weights_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 2), ("r", "c"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(4, 3)), rng.normal(size=(3, 6))
    dense, weights = rng.dirichlet(np.ones(6), size=4), rng.uniform(size=4)

    def loss(hidden, weight, dense, weights):
        return jsm.linear_cross_entropy(hidden, weight, dense, weights=weights)

    expected = jax.value_and_grad(loss, (0, 1, 3))(hidden, weight, dense, weights)
    with jax.set_mesh(mesh):
        specs = P("r"), P(None, "c"), P("r", "c"), P("r")
        placed = map(jax.device_put, (hidden, weight, dense, weights), specs)
        all_close(jax.value_and_grad(loss, (0, 1, 3))(*placed), expected)


def test_no_rows():
    for where, rows in ((np.zeros(7, bool), 7), (None, 0)):
        f = functools.partial(chunked, labels=LABELS[:rows], where=where)
        value, gradients = jax.value_and_grad(f, (0, 1, 2))(HIDDEN[:rows], WEIGHT, BIAS)
        assert value == 0
        assert all(np.all(np.asarray(g) == 0) for g in gradients)
    assert chunked(HIDDEN[:0], WEIGHT, BIAS, labels=LABELS[:0], reduction="none").shape == (0,)


def without_a_look(scores, labels):
    """A loss that takes -1 for the last class."""
    log_p = jax.nn.log_softmax(scores)
    return -jnp.take_along_axis(log_p, labels[:, None], 1, mode="clip")[:, 0]


@pytest.mark.asks_for_nan
@pytest.mark.parametrize("loss", [jsm.cross_entropy, without_a_look])
def test_label_out_of_range_is_nan_without_gradient(loss):
    bad = np.array([0, 4, 5, 2, -1, 3, 0])
    known = (bad >= 0) & (bad < 5)
    losses = chunked(*OPERANDS, labels=bad, reduction="none", loss=loss)
    np.testing.assert_array_equal(np.isnan(losses), ~known)

    def of_known(*operands):
        return jnp.sum(whole(*operands, reduction="none", labels=bad)[known])

    for reduction in ("none", "sum"):
        f = functools.partial(chunked, labels=bad, reduction=reduction, loss=loss)
        value, pull_back = jax.vjp(f, *OPERANDS)
        gradients = pull_back(jnp.ones_like(value))
        all_close(gradients, jax.grad(of_known, (0, 1, 2))(*OPERANDS))


@pytest.mark.asks_for_nan
def test_checkify_finds_labels_out_of_range():
    bad = np.where(LABELS == 3, 5, LABELS)

    def check(labels, **kwargs):
        f = jax.value_and_grad(lambda h: chunked(h, WEIGHT, BIAS, labels=labels, **kwargs))
        return checkify.checkify(jax.jit(f))(HIDDEN)[0].get()

    assert "labels must be classes from 0 to 4" in check(bad)
    assert check(LABELS) is None
    assert check(bad, where=bad != 5) is None


# Cost.


def products(f, *args):
    """How many matrix products are in the program, and how many rows of scores they give."""
    text = jax.jit(f).lower(*args).as_text()
    return text.count("stablehlo.dot_general")


def test_three_matrix_products_for_a_gradient_and_one_without(monkeypatch):
    # As for other devices, where there are no blocks to be counted twice.
    monkeypatch.setattr(
        "jaxsoftmax.linear_loss._rule._add_product",
        lambda total, hidden, ct: total + jnp.tensordot(hidden, ct, (0, 0)),
    )

    def f(hidden, weight, reduction):
        return jnp.sum(
            jsm.linear_cross_entropy(hidden, weight, LABELS, reduction=reduction, chunk_size=3)
        )

    for reduction, of_gradient in (("mean", 3), ("sum", 3), ("none", 4)):
        g = functools.partial(f, reduction=reduction)
        assert products(g, HIDDEN, WEIGHT) == 1
        assert products(jax.value_and_grad(g, (0, 1)), HIDDEN, WEIGHT) == of_gradient


# Transformations.


def test_vmap(rng):
    hidden, labels = rng.normal(size=(4, 6, WIDTH)), rng.integers(5, size=(4, 6))

    def f(hidden, weight, labels, where):
        return jsm.linear_cross_entropy(hidden, weight, labels, where=where, chunk_size=4)

    where = rng.uniform(size=(4, 6)) < 0.7
    weights = rng.normal(size=(4, WIDTH, 5))
    for weight, axes in ((WEIGHT, (0, None, 0, 0)), (weights, (0, 0, 0, 0))):
        gradient = jax.value_and_grad(f, (0, 1))
        one_by_one = [
            gradient(h, weight if axes[1] is None else weight[i], y, keep)
            for i, (h, y, keep) in enumerate(zip(hidden, labels, where, strict=True))
        ]
        expected = jax.tree.map(lambda *x: np.stack(x), *one_by_one)
        all_close(jax.vmap(gradient, in_axes=axes)(hidden, weight, labels, where), expected)
        total = jax.grad(lambda h, w, a=axes: jnp.sum(jax.vmap(f, a)(h, w, labels, where)), (0, 1))
        of_hidden, of_weight = total(hidden, weight)
        close(of_hidden, expected[1][0])
        close(of_weight, expected[1][1].sum(0) if axes[1] is None else expected[1][1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_of_single_rows(reduction, rng):
    """Twice: what is mapped over becomes more rows, and these are grouped and filled up."""
    hidden, labels = rng.normal(size=(3, 5, 2, WIDTH)), rng.integers(5, size=(3, 5, 2))

    def mapped(hidden, weight, bias):
        def f(hidden, labels):
            return jsm.linear_cross_entropy(
                hidden, weight, labels, bias=bias, reduction=reduction, chunk_size=1
            )

        return jax.vmap(jax.vmap(f, in_axes=(1, 1)), in_axes=(2, 2))(hidden, labels)

    def theirs(hidden, weight, bias):
        losses = jsm.cross_entropy(hidden @ weight + bias, labels).transpose(2, 1, 0)
        return losses if reduction == "none" else REDUCE[reduction](losses, -1)

    def derivatives(f):
        operands = (hidden, WEIGHT, np.broadcast_to(BIAS, hidden.shape[:-1] + BIAS.shape))
        operands = operands if f is theirs else (*operands[:2], BIAS)
        gradient = jax.grad(weighed(f), (0, 1))
        moved = tangents(operands[:2])
        return jax.jit(
            lambda h, w: (
                f(h, w, operands[2]),
                jax.jvp(lambda *x: gradient(*x, operands[2]), (h, w), moved),
            )
        )(*operands[:2])

    all_close(derivatives(mapped), derivatives(theirs))


@pytest.mark.leaks_in_jax
def test_sharded_classes_and_rows(rng):
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    hidden, labels = rng.normal(size=(8, WIDTH)), np.array([0, 5, 3, 4, 1, 2, 0, 3])
    weight, bias = rng.normal(size=(WIDTH, 6)), rng.normal(size=6)

    def local(hidden, weight, bias, alpha, labels):
        loss = functools.partial(jsm.entmax_loss, alpha=alpha)
        mean = jsm.linear_cross_entropy(
            hidden, weight, labels, bias=bias, loss=loss, vocab_axis_name="classes", chunk_size=3
        )
        # A gradient summed over the devices too early would take one's factor for another's.
        factor = 1.0 + jax.lax.axis_index("rows").astype(float)
        return jax.lax.psum(mean * factor, "rows")

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("rows"), P(None, "classes"), P("classes"), P(), P("rows")),
        out_specs=P(),
    )

    def full(hidden, weight, bias, alpha, labels):
        losses = jsm.entmax_loss(hidden @ weight + bias[None], labels, alpha)
        return jnp.vdot(losses.reshape(2, 4).mean(1), np.array([1.0, 2.0]))

    def derivatives(f):
        operands = (hidden, weight, bias, jnp.asarray(1.4))
        gradient = jax.grad(lambda *x: f(*x, labels), (0, 1, 2, 3))
        return jax.jit(lambda *x: (f(*x, labels), jax.jvp(gradient, x, tangents(x))))(*operands)

    all_close(derivatives(sharded), derivatives(full))


@pytest.mark.leaks_in_jax
def test_only_row_sized_values_cross_devices():
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(hidden, weight, labels):
        return jsm.linear_cross_entropy(hidden, weight, labels, vocab_axis_name="classes")

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(None, "classes"), P()), out_specs=P()
    )
    args = (np.ones((6, 3)), np.ones((3, 400)), np.zeros(6, int))
    compiled = jax.jit(jax.grad(sharded, (0, 1))).lower(*args).compile().as_text()
    sizes = []
    for line in compiled.splitlines():
        rest = line.partition(" = ")[2]
        if any(f" {name}(" in rest for name in ("all-reduce", "all-gather", "all-to-all")):
            shapes = rest.split(" all-")[0].replace("(", "").split("]")[:-1]
            sizes += [np.prod([int(n) for n in s.split("[")[1].split(",") if n]) for s in shapes]
    assert sizes
    assert max(sizes) <= 6 * 3


# Precision.


def test_bfloat16_is_summed_in_float32(rng):
    """The gradient of the weights, over many chunks, is that of exact sums rounded once."""
    hidden = jnp.asarray(rng.normal(size=(512, 8)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16)
    labels = rng.integers(16, size=512)

    def f(hidden, weight):
        return jsm.linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_size=4)

    value, gradients = jax.value_and_grad(f, (0, 1))(hidden, weight)
    assert value.dtype == jnp.float32
    exact = jax.value_and_grad(f, (0, 1))(hidden.astype(float), weight.astype(float))
    np.testing.assert_allclose(value, exact[0], rtol=1e-6)
    for ours, theirs in zip(gradients, exact[1], strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = np.abs(theirs).max()
        assert np.max(np.abs(np.asarray(ours, float) - theirs)) <= 2**-8 * scale


def test_float16_keeps_small_gradients():
    hidden, weight = np.array([[1.0]], np.float16), np.array([[0.0, 18.0]], np.float16)
    gradient = jax.grad(jsm.linear_cross_entropy, argnums=1)(hidden, 1000 * weight, np.array([1]))
    assert np.all(np.isfinite(gradient))
    out = jsm.linear_cross_entropy(hidden, weight, np.array([1]))
    np.testing.assert_allclose(out.astype(float), np.exp(-18.0), rtol=1e-6)


def test_operands_of_different_dtypes(rng):
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    weight = jnp.asarray(WEIGHT, jnp.float32)
    value, gradients = jax.value_and_grad(jsm.linear_cross_entropy, (0, 1))(hidden, weight, LABELS)
    assert [value.dtype, *(g.dtype for g in gradients)] == [jnp.float32, jnp.bfloat16, jnp.float32]
    close(value, whole(hidden.astype(float), WEIGHT, np.zeros(5)), rtol=1e-5)


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(D, V\), got shape \(5,\)"),
        (
            {"hidden": HIDDEN[:, :2]},
            ValueError,
            r"hidden must have shape \(\.\.\., 3\), to go with",
        ),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have the shape of hidden without its"),
        ({"labels": np.float32(LABELS)}, TypeError, "labels must be integers, got dtype float32"),
        ({"bias": BIAS[:2]}, ValueError, r"bias must have shape \(5,\), got shape \(2,\)"),
        ({"where": LABELS}, TypeError, "where must be boolean, got dtype int"),
        ({"where": KEEP[:2]}, ValueError, r"where must broadcast to shape \(7,\)"),
        ({"loss": None}, TypeError, "loss must be a function, got NoneType"),
        ({"loss": lambda s, y: s}, ValueError, r"loss must return one value per row, shape \(7,\)"),
        (
            {
                "chunk_size": 1,
                "loss": functools.partial(jsm.cross_entropy, temperature=np.ones((7, 1))),
            },
            ValueError,
            r"loss must hold nothing per row, .* chunks of rows, got temperature of shape \(7, 1\)",
        ),
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer or None, got 0"),
        (
            {"chunk_size": 2.5},
            ValueError,
            r"chunk_size must be a positive integer or None, got 2\.5",
        ),
        ({"logits_soft_cap": 0.0}, ValueError, r"logits_soft_cap must be positive, got 0\.0"),
        ({"hidden": HIDDEN * 1j}, TypeError, "hidden must be real numbers, got dtype complex"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **changes}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "labels")]
    with pytest.raises(error, match=message):
        jsm.linear_cross_entropy(*positional, **arguments)


# A real use.


def corpus():
    """The project's own words: its sources and documents, about 100,000 characters."""
    root = pathlib.Path(jsm.__file__).parents[1]
    paths = sorted([*root.glob("*.md"), *root.glob("jaxsoftmax/**/*.py")])
    text = "".join(path.read_text(encoding="utf-8") for path in paths)[:100_000]
    assert len(text) > 90_000
    return text


def test_character_model_trains_as_with_all_scores():
    """Predicts a character from the eight before it; the loss is the same at every step."""
    alphabet, numbers = np.unique(list(corpus()), return_inverse=True)
    context, width, num_steps = 8, 32, 60
    windows = np.lib.stride_tricks.sliding_window_view(numbers.astype(np.int32), context + 1)
    rng = np.random.default_rng(0)
    batches = jnp.asarray(windows[rng.integers(len(windows), size=(num_steps, 256))])
    optimizer = optax.adam(3e-3)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    start = {
        "embedding": normal(len(alphabet), width),
        "inner": normal(context * width, 64),
        "outer": normal(64, len(alphabet)),
        "bias": jnp.zeros(len(alphabet), jnp.float32),
    }

    def with_all_scores(hidden, weight, labels, bias):
        scores = hidden @ weight + bias[None]
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def in_chunks(hidden, weight, labels, bias):
        return jsm.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=48)

    @functools.partial(jax.jit, static_argnums=0)
    def curve(last_layer):
        def loss(params, batch):
            inputs = params["embedding"][batch[:, :-1]].reshape(len(batch), -1)
            hidden = jnp.tanh(inputs @ params["inner"])
            return last_layer(hidden, params["outer"], batch[:, -1], params["bias"])

        def step(carry, batch):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (start, optimizer.init(start)), batches)[1]

    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as users have it
        ours, theirs = np.asarray(curve(in_chunks)), np.asarray(curve(with_all_scores))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert theirs[-10:].mean() < 0.75 * theirs[0]  # it learned


def test_a_bias_of_minus_infinity_excludes_a_class_under_a_cap(rng):
    hidden, weight = rng.normal(size=(4, 5)), rng.normal(size=(5, 6))
    labels, bias = np.array([0, 1, 2, 3]), np.where(np.arange(6) == 5, -np.inf, 0.0)
    found, wanted = (
        jsm.linear_cross_entropy(hidden, w, labels, bias=b, logits_soft_cap=2.0)
        for w, b in ((weight, bias), (weight[:, :5], None))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
