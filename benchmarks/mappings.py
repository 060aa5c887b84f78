"""Time of the mappings relative to `jax.nn.softmax`, and of sorting to get a sparsemax."""

import jax
import optax

import jaxsoftmax as jsm
from benchmarks.timing import medians, ratios

SHAPES = ((4096, 1024), (256, 32768), (16384, 64))
BASE = "jax.nn.softmax"
FORWARD = {
    BASE: jax.nn.softmax,
    "jsm.softmax": jsm.softmax,
    "jax.nn.log_softmax": jax.nn.log_softmax,
    "jsm.log_softmax": jsm.log_softmax,
    "jsm.sparsemax": jsm.sparsemax,
    "jsm.entmax15": jsm.entmax15,
}
SORTED = "optax.projections.projection_simplex"


def with_gradient(mapping):
    """The value and the pullback of ones, jitted."""

    @jax.jit
    def value_and_pullback(x, ct):
        value, pullback = jax.vjp(mapping, x)
        return value, pullback(ct)[0]

    return value_and_pullback


def table(title: str, rows: dict[str, list[float]]) -> str:
    """A Markdown table with a column per shape."""
    head = "| " + " | ".join([title, *(f"{n} x {k}" for n, k in SHAPES)]) + " |"
    lines = [head, "|---" * (1 + len(SHAPES)) + "|"]
    lines += [
        "| " + " | ".join([name, *(f"{value:.2f}" for value in values)]) + " |"
        for name, values in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints both tables."""
    forward: dict[str, list[float]] = {}
    backward: dict[str, list[float]] = {}
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        ct = jax.random.normal(jax.random.key(1), shape)
        times = medians({name: jax.jit(f) for name, f in FORWARD.items()}, x)
        by_sort = jax.jit(jax.vmap(optax.projections.projection_simplex))
        times |= medians({SORTED: by_sort}, x, rounds=3)
        for name, ratio in ratios(times, BASE).items():
            forward.setdefault(name, []).append(ratio)
        times = medians({name: with_gradient(f) for name, f in FORWARD.items()}, x, ct)
        for name, ratio in ratios(times, BASE).items():
            backward.setdefault(name, []).append(ratio)
    print(f"float32 on {jax.devices()[0].device_kind}, jax {jax.__version__}; {BASE} is 1\n")
    print(table("forward", forward), "\n")
    print(table("value and gradient", backward))


if __name__ == "__main__":
    main()
