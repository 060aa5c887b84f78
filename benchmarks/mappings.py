"""Time of the mappings relative to `jax.nn.softmax`, and beside a sort and PyTorch."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoftmax as jsm
from benchmarks.timing import medians, ratios

SHAPES = ((4096, 1024), (256, 32768), (16384, 64))
BASE = "jax.nn.softmax"
PAIRED = {
    BASE: jax.nn.softmax,
    "jsm.softmax": jsm.softmax,
    "jax.nn.log_softmax": jax.nn.log_softmax,
    "jsm.log_softmax": jsm.log_softmax,
    "jsm.sparsemax": jsm.sparsemax,
    "jsm.entmax15": jsm.entmax15,
    "jsm.entmax(1.3)": functools.partial(jsm.entmax, alpha=1.3),
}
FAMILY = {
    BASE: jax.nn.softmax,
    "jsm.logsumexp": jsm.logsumexp,
    "jsm.hardmax": jsm.hardmax,
    "jsm.normmax(2)": jsm.normmax,
    "jsm.normmax(1.5)": functools.partial(jsm.normmax, alpha=1.5),
    "jsm.budget_sparsemax(2)": functools.partial(jsm.budget_sparsemax, budget=2.0),
    "jsm.softpick": jsm.softpick,
    "jsm.stick_breaking": jsm.stick_breaking,
    "jsm.sinkhorn": jsm.sinkhorn,
}
HALF = {BASE: jax.nn.softmax, "jsm.softmax": jsm.softmax}
SORTED = "optax.projections.projection_simplex"


def with_gradient(mapping):
    """The value and the pullback, jitted."""

    @jax.jit
    def value_and_pullback(x, ct):
        value, pullback = jax.vjp(mapping, x)
        return value, pullback(ct)[0]

    return value_and_pullback


def torch_entmax():
    """The peers in PyTorch, where it and deep-spin's entmax are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "entmax")):
        return {}
    import entmax
    import torch

    torch.set_num_threads(2)

    def timed(mapping):
        return lambda x: mapping(torch.from_numpy(np.asarray(x)), dim=-1)

    return {
        "torch entmax.sparsemax": timed(entmax.sparsemax),
        "torch entmax.entmax15": timed(entmax.entmax15),
    }


def table(title: str, rows: dict[str, list[float]]) -> str:
    """A Markdown table with a column per shape."""
    head = "| " + " | ".join([title, *(f"{n} x {k}" for n, k in SHAPES)]) + " |"
    lines = [head, "|---" * (1 + len(SHAPES)) + "|"]
    lines += [
        "| " + " | ".join([name, *(f"{value:.2f}" for value in values)]) + " |"
        for name, values in rows.items()
    ]
    return "\n".join(lines)


def collect(rows: dict[str, list[float]], times: dict[str, float]) -> None:
    """Adds a column of ratios to the base."""
    for name, ratio in ratios(times, BASE).items():
        rows.setdefault(name, []).append(ratio)


def main() -> None:
    """Prints all tables."""
    titles = ("forward", "value and gradient", "the others, forward", "bfloat16, forward")
    tables: dict[str, dict[str, list[float]]] = {title: {} for title in titles}
    forward, backward, family, half = tables.values()
    slow = torch_entmax() | {SORTED: jax.jit(jax.vmap(optax.projections.projection_simplex))}
    for shape in SHAPES:
        x = jax.random.normal(jax.random.key(0), shape)
        ct = jax.random.normal(jax.random.key(1), shape)
        times = medians({name: jax.jit(f) for name, f in PAIRED.items()}, x)
        collect(forward, times | medians(slow, x, rounds=3))
        collect(backward, medians({name: with_gradient(f) for name, f in PAIRED.items()}, x, ct))
        collect(family, medians({name: jax.jit(f) for name, f in FAMILY.items()}, x, rounds=5))
        short = x.astype(jnp.bfloat16)
        collect(half, medians({name: jax.jit(f) for name, f in HALF.items()}, short))
    print(f"float32 on {jax.devices()[0].device_kind}, jax {jax.__version__}; {BASE} is 1\n")
    print("\n\n".join(table(title, rows) for title, rows in tables.items()))


if __name__ == "__main__":
    main()
