"""Time and memory of attention relative to `jax.nn.dot_product_attention`, float32.

`python -m benchmarks.attention` prints one table; parts of rows' names select rows. Where tokamax
is installed, its chunked attention is there too.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxsoftmax as jsm
from benchmarks.timing import medians

try:
    import tokamax
except ImportError:
    tokamax = None

HEADS, FEATURES = 8, 64
Attention = Callable[..., jax.Array]


def forward(attention: Attention) -> Callable[..., Any]:
    """The output."""
    return lambda q, k, v, *_: attention(q, k, v)


def gradient(attention: Attention) -> Callable[..., Any]:
    """The value of a loss and its gradient in queries, keys and values."""

    def loss(q, k, v, weights):
        return jnp.sum(attention(q, k, v) * weights)

    return lambda *args: jax.value_and_grad(loss, (0, 1, 2))(*args[:4])


def jvp(attention: Attention) -> Callable[..., Any]:
    """The output and its tangent."""
    return lambda q, k, v, _, *tangents: jax.jvp(attention, (q, k, v), tangents)


def hvp(attention: Attention) -> Callable[..., Any]:
    """The Hessian of a loss times a vector, forward over reverse."""

    def product(q, k, v, weights, *tangents):
        grad = jax.grad(lambda *qkv: jnp.sum(jnp.sin(attention(*qkv)) * weights), (0, 1, 2))
        return jax.jvp(grad, (q, k, v), tangents)[1]

    return product


def gradient_of_jvp(attention: Attention) -> Callable[..., Any]:
    """The gradient of a loss of a tangent, reverse over forward."""

    def product(q, k, v, weights, *tangents):
        def loss(*qkv):
            return jnp.sum(jax.jvp(attention, qkv, tangents)[1] * weights)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return product


def inputs(length: int) -> list[jax.Array]:
    """Queries, keys, values, weights of a loss, and three tangents."""
    keys = jax.random.split(jax.random.key(0), 7)
    return [jax.random.normal(key, (1, length, HEADS, FEATURES)) for key in keys]


def compiled(function: Callable[..., Any], args: list[jax.Array]) -> tuple[Any, int]:
    """The compiled function, and how many bytes it needs beside arguments and results."""
    executable = jax.jit(function).lower(*args).compile()
    return executable, executable.memory_analysis().temp_size_in_bytes


def compare(ours: Attention, base: Attention, what: Callable, length: int, rounds: int):
    """The ratios of times and memories, and our memory in MB."""
    args = inputs(length)
    functions, bytes_ = {}, {}
    for name, attention in {"ours": ours, "base": base}.items():
        functions[name], bytes_[name] = compiled(what(attention), args)
    times = medians(functions, *args, rounds=rounds)
    memory = bytes_["ours"] / max(bytes_["base"], 1)
    return times["ours"] / times["base"], memory, times["ours"], bytes_["ours"] / 2**20


def with_normalizer(normalizer: Callable, **kwargs: Any) -> Attention:
    """Our attention."""
    return functools.partial(jsm.dot_product_attention, normalizer=normalizer, **kwargs)


def rows() -> dict[str, tuple[Attention, Attention, Callable, int]]:
    """What is compared with what: ours, the other, what of both, and the length."""
    ours, theirs = jsm.dot_product_attention, jax.nn.dot_product_attention
    causal = functools.partial(ours, is_causal=True)
    their_causal = functools.partial(theirs, is_causal=True)
    table = {
        "causal 4096, forward": (causal, their_causal, forward, 4096),
        "causal 4096, gradient": (causal, their_causal, gradient, 4096),
    }
    for what in (forward, gradient, jvp, hvp, gradient_of_jvp):
        name = what.__name__.replace("_", " ")
        table[f"full 2048, {name}"] = ours, theirs, what, 2048
    for normalizer in (jsm.entmax15, jsm.sparsemax):
        sparse = with_normalizer(normalizer)
        name = f"full 2048, {normalizer.__name__}"
        table[f"{name}, forward"] = sparse, theirs, forward, 2048
        table[f"{name} / our softmax, forward"] = sparse, ours, forward, 2048
        table[f"{name} / our softmax, gradient"] = sparse, ours, gradient, 2048
    if tokamax is not None:
        chunked = functools.partial(tokamax.dot_product_attention, implementation="xla_chunked")
        for what in (forward, gradient):
            table[f"full 2048, {what.__name__} / tokamax"] = ours, chunked, what, 2048
    return table


def growth() -> str:
    """How memory grows when the sequence is 4 times as long."""
    grown = []
    for what in (forward, gradient):
        function = what(jsm.dot_product_attention)
        short, long = (compiled(function, inputs(length))[1] for length in (2048, 8192))
        grown.append(f"{what.__name__} {long / short:.2f}x")
    return f"memory from 2048 to 8192: {', '.join(grown)}"


def main(selected: list[str]) -> None:
    """Prints the table."""
    device = jax.devices()[0].device_kind
    print(f"float32, (1, T, {HEADS}, {FEATURES}), {device}, jax {jax.__version__}")
    print("\n| | time | memory | ours, ms | ours, MiB |\n|---|---|---|---|---|")
    for name, row in rows().items():
        if not selected or any(part in name for part in selected):
            time, memory, seconds, mib = compare(*row, rounds=5)
            print(
                f"| {name} | {time:.2f}x | {memory:.3f}x | {1e3 * seconds:.0f} | {mib:.0f} |",
                flush=True,
            )
    if not selected or "growth" in selected:
        print(f"\n{growth()}")


if __name__ == "__main__":
    main(sys.argv[1:])
