"""What comes before the first number: import, tracing, compiling; and what every call costs."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

import jaxsoftmax as jsm
from benchmarks.charts import Ratios
from benchmarks.command import Topic, main
from benchmarks.measuring import Apart, Comparison, Entry
from benchmarks.transforms import forward, value_and_pullback

Function = Callable[..., Any]

SOFTMAX = "jax.nn.softmax"
DISPATCH, CALL = "dispatch", "one call"
TRACE, COMPILE = "trace and lower", "trace, lower and compile"
IMPORT = "import"
FORWARD, PULLBACK = "forward", "value and vjp"
MAPPINGS: dict[str, Function] = {
    SOFTMAX: jax.nn.softmax,
    "jsm.softmax": jsm.softmax,
    "jax.nn.log_softmax": jax.nn.log_softmax,
    "jsm.log_softmax": jsm.log_softmax,
    "jsm.sparsemax": jsm.sparsemax,
    "jsm.entmax15": jsm.entmax15,
    "jsm.entmax(1.3)": functools.partial(jsm.entmax, alpha=1.3),
    "jsm.normmax(2)": jsm.normmax,
    "jsm.budget_sparsemax(2)": functools.partial(jsm.budget_sparsemax, budget=2.0),
    "jsm.softpick": jsm.softpick,
    "jsm.stick_breaking": jsm.stick_breaking,
    "jsm.sinkhorn": jsm.sinkhorn,
    "jsm.hardmax": jsm.hardmax,
}
PEERS = {SOFTMAX: "jsm.softmax", "jax.nn.log_softmax": "jsm.log_softmax"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      shape: of the scores, so small that a call costs little but itself.
      mappings: their names.
      imports: what a new Python imports.
    """

    shape: tuple[int, int] = (8, 128)
    mappings: Sequence[str] = tuple(MAPPINGS)
    imports: Sequence[str] = ("jax", "jax, optax", "jax, jaxsoftmax")


TINY = Sizes((2, 4), (SOFTMAX, "jsm.softmax"), ("os", "os, sys"))


def arguments(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Scores and cotangents."""
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)


def traced(function: Function) -> Function:
    """Traces and lowers, with nothing remembered."""

    def trace(*args: Any) -> Any:
        jax.clear_caches()
        jax.jit(function).lower(*args)

    return trace


def compiled(function: Function) -> Function:
    """Compiles too."""

    def compile_(*args: Any) -> Any:
        jax.clear_caches()
        jax.jit(function).lower(*args).compile()

    return compile_


# How each is measured, and whether JAX compiles it before.
MEASURED: dict[str, Function] = {
    DISPATCH: jax.jit,
    CALL: jax.jit,
    TRACE: traced,
    COMPILE: compiled,
}


def of_mappings(measured: str, name: str, what: Function, sizes: Sizes) -> Comparison | Apart:
    """One cost of all mappings."""
    entries = {
        mapping: Entry(
            MEASURED[measured](what(MAPPINGS[mapping])), PEERS.get(mapping, ""), jit=False
        )
        for mapping in sizes.mappings
    }
    operation, size = f"{measured}, {name}", f"{sizes.shape[0]} × {sizes.shape[1]}"
    compare = functools.partial(
        Comparison,
        operation,
        size,
        sizes.shape[1],
        arguments=functools.partial(arguments, sizes.shape),
        seconds=0.5,
        waits=measured != DISPATCH,
    )
    if measured not in (DISPATCH, CALL):
        return compare(entries)
    peers = {ours: peer for peer, ours in PEERS.items()}
    groups = [
        dict.fromkeys((SOFTMAX, peers.get(ours, SOFTMAX), ours))
        for ours in sizes.mappings
        if ours not in PEERS
    ]
    comparisons = [compare({name: entries[name] for name in group}) for group in groups]
    return Apart(operation, size, comparisons)


def of_imports(programs: Sequence[str]) -> Comparison:
    """A new Python that imports ours, and what it builds on."""

    def importing(modules: str) -> Entry:
        def run() -> None:
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)

        return Entry(run, jit=False)

    entries = {f"import {modules}": importing(modules) for modules in programs}
    return Comparison(IMPORT, "", 1, entries, rounds=7, beyond=True)


def steps(quick: bool) -> list[Comparison | Apart]:
    """All comparisons."""
    sizes = TINY if quick else Sizes()
    whats = {FORWARD: forward, PULLBACK: value_and_pullback}
    return [
        *(
            of_mappings(measured, name, what, sizes)
            for measured in MEASURED
            for name, what in whats.items()
        ),
        of_imports(sizes.imports),
    ]


NOTES = """
- One call: on CPUs, most of the time goes into starting kernels. XLA starts up to 8 kernels in the
  thread that calls, and hands more of them to other threads. A solver starts some in each of its
  passes. A large kernel is shared among threads, which takes 20 µs. This happens to `log_softmax`
  of this size; at 8 × 64, it takes 1.2 times as long as that of `jax.nn`.
- Tracing: every function checks its arguments, so that an error is one clear sentence, and has
  rules for derivatives in both modes. `jax.nn.softmax` does neither. You pay for it once per shape.
- Compiling: programs for CPUs and for other devices are traced, and one of them is compiled. It may
  contain a loop that solves for the threshold.
"""

TOPIC = Topic(
    "compile",
    "Time to compile, to call and to import",
    """
This page measures three things. The first is a call of a compiled mapping with little to compute:
the time until it returns (its dispatch), and the time until the result is there. The second is the
time to trace and lower a mapping, and to compile it, with JAX's caches cleared before. The third is
the time that a new Python takes to import the package. The column `relative` compares with the
first function of each group, `jax.nn.softmax`.
""",
    steps,
    (
        Ratios(
            "Forward, relative to jax.nn.softmax (less is better)",
            "{name}",
            "{operation}",
            ("relative",),
            "time, relative",
            tuple(f"{measured}, {FORWARD}" for measured in MEASURED),
        ),
        Ratios(
            "Value and vjp, relative to jax.nn.softmax (less is better)",
            "{name}",
            "{operation}",
            ("relative",),
            "time, relative",
            tuple(f"{measured}, {PULLBACK}" for measured in MEASURED),
        ),
    ),
    NOTES,
)

if __name__ == "__main__":
    main([TOPIC])
