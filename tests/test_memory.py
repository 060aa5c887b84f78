"""Memory as XLA lays it out for users."""

import functools

import jax
import jax.numpy as jnp

import jaxsoftmax as jsm


def temporaries(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_linear_cross_entropy_does_not_grow_with_the_rows(monkeypatch):
    """Neither for derivatives nor under transformations; beyond numbers per row."""

    def f(hidden, weight, labels):
        return jsm.linear_cross_entropy(hidden, weight, labels, chunk_size=8)

    def hvp(hidden, weight, labels):
        gradient = jax.grad(lambda *x: f(*x, labels), (0, 1))
        return jax.jvp(gradient, (hidden, weight), (hidden, weight))[1]

    def jvp(hidden, weight, labels):
        return jax.jvp(lambda *x: f(*x, labels), (hidden, weight), (hidden, weight))

    def scanned(hidden, weight, labels):
        def step(total, batch):
            return total + f(batch[0], weight, batch[1]), None

        return jax.lax.scan(step, jnp.zeros((), jnp.float32), (hidden[None], labels[None]))[0]

    def none(hidden, weight, labels):
        losses = functools.partial(jsm.linear_cross_entropy, reduction="none", chunk_size=8)
        return jnp.sum(losses(hidden, weight, labels) ** 2)

    def mapped(hidden, weight, labels):
        batches = hidden.reshape(8, -1, width), labels.reshape(8, -1)
        return jnp.sum(jax.vmap(f, in_axes=(0, None, 0))(batches[0], weight, batches[1]))

    num_classes, width = 2048, 4
    monkeypatch.setattr("jaxsoftmax.linear_loss._rule.chunk_size_for", lambda *_: 8)
    for fun in (
        jax.grad(mapped, (0, 1)),
        jax.grad(f, (0, 1)),
        jax.grad(jax.checkpoint(f), (0, 1)),
        jax.grad(scanned, (0, 1)),
        jax.grad(none, (0, 1)),
        jvp,
        hvp,
    ):
        few, many = (
            temporaries(
                fun,
                jax.ShapeDtypeStruct((rows, width), jnp.float32),
                jax.ShapeDtypeStruct((width, num_classes), jnp.float32),
                jax.ShapeDtypeStruct((rows,), jnp.int32),
            )
            for rows in (64, 512)
        )
        assert many < few + 512 * 4 * 8 * width  # a few numbers per number of `hidden`
        assert many < 512 * num_classes * 4 / 6


def test_cross_entropy_of_classes_holds_no_scores():
    """Neither the losses nor their gradient, which is the only array of that size."""
    scores = jax.ShapeDtypeStruct((512, 2048), jnp.float32)
    labels = jax.ShapeDtypeStruct((512,), jnp.int32)

    def total(scores, labels):
        return jnp.sum(jsm.cross_entropy(scores, labels))

    for fun in (jsm.cross_entropy, jax.value_and_grad(total)):
        assert temporaries(fun, scores, labels) < scores.size * 4 / 2


def test_losses_of_entmax_hold_the_probabilities_alone():
    scores = jax.ShapeDtypeStruct((512, 2048), jnp.float32)
    labels = jax.ShapeDtypeStruct((512,), jnp.int32)
    for loss in (jsm.sparsemax_loss, jsm.entmax_loss):
        assert temporaries(loss, scores, labels) < scores.size * 4 * 1.5

    def total(scores, targets):
        return jnp.sum(jsm.entmax_loss(scores, targets, 1.3))

    # No pullback of the zero that stands for the derivative in the probabilities.
    assert temporaries(jax.grad(total, (0, 1)), scores, scores) < scores.size * 4


def test_many_rows_hold_a_block():
    """What goes through rows again and again, as it comes and in half precision."""
    shape = 4096, 1024
    for fun in (
        jsm.normmax,
        jsm.stick_breaking,
        functools.partial(jsm.budget_sparsemax, budget=2.0),
    ):
        for dtype in ("float32", "bfloat16"):
            held = 4 * 2**22 if dtype == "bfloat16" else 0  # the result before it is rounded
            assert temporaries(fun, jax.ShapeDtypeStruct(shape, dtype)) < held + 2**23
