"""Time and memory of `linear_cross_entropy`, relative to optax on all scores."""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax as jsm
from benchmarks.timing import medians, ratios

ROWS, WIDTH, CLASSES = 4096, 256, 32768
BASE = "optax, all scores"
LOSSES = {
    "jsm": jsm.cross_entropy,
    "jsm, label smoothing": functools.partial(jsm.cross_entropy, label_smoothing=0.1),
    "jsm, z-loss": functools.partial(jsm.cross_entropy, z_loss=1e-4),
    "jsm, sparsemax_loss": jsm.sparsemax_loss,
    "jsm, entmax_loss": jsm.entmax_loss,
}


def all_scores(hidden, weight, labels):
    """The loss that everything is compared to."""
    scores = hidden @ weight
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def with_gradient(loss):
    """The loss and its gradients in `hidden` and `weight`."""
    return jax.value_and_grad(loss, argnums=(0, 1))


def hessian_product(loss):
    """The product of the Hessian with the point itself."""

    def product(hidden, weight, labels):
        def gradient(*x):
            return jax.grad(loss, argnums=(0, 1))(*x, labels)

        return jax.jvp(gradient, (hidden, weight), (hidden, weight))[1]

    return product


def push_forward(loss):
    """The derivative along the point itself."""

    def push(hidden, weight, labels):
        return jax.jvp(lambda *x: loss(*x, labels), (hidden, weight), (hidden, weight))

    return push


KINDS = {
    "forward": lambda loss: loss,
    "value and gradient": with_gradient,
    "jvp": push_forward,
    "Hessian-vector product": hessian_product,
}


def temporaries(function, rows: int) -> int:
    """Bytes of temporary memory that the compiled function asks for."""
    args = (
        jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((WIDTH, CLASSES), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def main() -> None:
    """Prints the time of every loss, then the memory of the plain one."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (ROWS, WIDTH))
    weight = jax.random.normal(keys[1], (WIDTH, CLASSES)) / WIDTH**0.5
    labels = jax.random.randint(keys[2], (ROWS,), 0, CLASSES)
    linear = {
        name: functools.partial(jsm.linear_cross_entropy, loss=loss)
        for name, loss in LOSSES.items()
    }
    print(f"{ROWS} rows, {WIDTH} wide, {CLASSES} classes, float32 on")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {BASE} is 1\n")
    print("| time | forward | value and gradient |\n|---|---|---|")
    columns = []
    for kind in ("forward", "value and gradient"):
        functions = {name: jax.jit(KINDS[kind](f)) for name, f in linear.items()}
        functions[BASE] = jax.jit(KINDS[kind](all_scores))
        columns.append(ratios(medians(functions, hidden, weight, labels, rounds=7), BASE))
    for name in linear:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |")
    print(f"\n| temporary memory, MB | {BASE} | jsm | jsm, {4 * ROWS} rows |\n|---|---|---|---|")
    for kind, transform in KINDS.items():
        theirs = temporaries(transform(all_scores), ROWS)
        ours = [temporaries(transform(linear["jsm"]), rows) for rows in (ROWS, 4 * ROWS)]
        line = [f"{theirs / 1e6:.0f}", f"{ours[0] / 1e6:.0f} (1/{theirs / ours[0]:.1f})"]
        print(f"| {kind} | " + " | ".join([*line, f"{ours[1] / 1e6:.0f}"]) + " |")


if __name__ == "__main__":
    main()
