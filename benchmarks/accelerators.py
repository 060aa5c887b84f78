"""Accelerators that are not there: what is compiled for them, and what it should take."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

import jaxsoftmax as jsm
from benchmarks import ahead, bundles, losses
from benchmarks.ahead import TARGETS, Target
from benchmarks.attention import OURS, THEIRS
from benchmarks.charts import Ratios
from benchmarks.command import Topic, main
from benchmarks.mappings import ours_and_jax
from benchmarks.measuring import Entry, Result, relate
from benchmarks.transforms import forward, value_and_gradient, value_and_pullback

Function = Callable[..., Any]

# For others, set this variable to some of h100, a100, v5e, v5p, v6e, with spaces between.
VARIABLE, DEFAULT = "JAXSOFTMAX_TARGETS", "h100 v5e"
FORWARD, PULLBACK, GRADIENT = "forward", "value and vjp", "value and gradient"
PULLED_BACK = {FORWARD: forward, PULLBACK: value_and_pullback}
ATTENTION, MAPPINGS, CROSS_ENTROPY = "attention", "mappings", "cross_entropy"
LINEAR = "linear_cross_entropy"
# Their entries have this name at the end, and a time only where bundles are counted.
KERNELS, COUNTED = ", kernels", "v5e"
MAPPED = ("softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15", "entmax(1.3)")
# How often loops go on, where that is not the usual number. That of softmax attention is for maxima
# far from 0.
PASSES = {"jsm.entmax(1.3)": 4, OURS: 0}


class Program(NamedTuple):
    """Functions of the same arguments, the shapes of these, and the seconds of our kernels."""

    operation: str
    entries: Mapping[str, Entry]
    arguments: Sequence[Any]
    cycles: Mapping[str, Callable[[], float]] = {}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that is compiled for one device."""

    program: Program
    target: Target

    @property
    def operation(self) -> str:
        """What is done."""
        return self.program.operation

    @property
    def size(self) -> str:
        """The device."""
        return self.target.title

    def measure(self, quick: bool) -> list[Result]:
        """One result per function, in their order."""
        entries = {
            name: entry
            for name, entry in self.program.entries.items()
            if name not in self.program.cycles or self.target.name == COUNTED
        }
        found = {name: self._figures(name, entry) for name, entry in entries.items()}
        first = next(iter(found.values())).get("estimate")
        for name, entry in entries.items():
            if first and "estimate" in found[name]:
                found[name]["relative_estimate"] = found[name]["estimate"] / first
            relate(found[name], found.get(entry.ours, {}))
        return [
            Result(self.operation, self.size, 1, name, entry.ours, quantities=found[name])
            for name, entry in entries.items()
        ]

    def _figures(self, name: str, entry: Entry) -> dict[str, Any]:
        args = entry.prepare(*self.program.arguments)
        passes = PASSES.get(name, ahead.SOLVER_PASSES)
        try:
            found = dict(vars(ahead.figures(entry.function, args, self.target, passes)))
        except jax.errors.JaxRuntimeError as error:  # as where the memory does not suffice
            return {"result": str(error).partition("\n")[0][:100]}
        if name in self.program.cycles:
            found["estimate"] += self.program.cycles[name]()
        return found


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is compiled.

    Attributes:
      attended: batch, length and heads of attention.
      features: of each head.
      dtypes: of everything.
      causal: whether a query sees all keys.
      rows: shapes of scores.
      linear: rows, width and classes of a linear layer.
    """

    attended: tuple[int, int, int] = (4, 4096, 8)
    features: Sequence[int] = (64, 128)
    dtypes: Sequence[str] = ("bfloat16", "float32")
    causal: Sequence[bool] = (False, True)
    rows: Sequence[tuple[int, int]] = ((4096, 1024), (256, 32768))
    linear: tuple[int, int, int] = (8192, 1024, 32768)


TINY = Sizes((1, 64, 2), (8,), ("float32",), (False,), ((8, 64),), (16, 8, 32))


def array(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
    """One that is not there either."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def attention(what: str, causal: bool, features: int, dtype: str, sizes: Sizes) -> Program:
    """Softmax attention beside that of `jax.nn`, and entmax15 attention; kernels of both."""

    def entry(attend: Function, ours: str = "", **options: Any) -> Entry:
        attend = functools.partial(attend, is_causal=causal, **options)
        return Entry(PULLED_BACK[what](lambda qkv: attend(*qkv)), ours)

    x = array(dtype, *sizes.attended, features)
    entries = {
        THEIRS: entry(jax.nn.dot_product_attention, OURS),
        OURS: entry(jsm.dot_product_attention),
        f"{OURS}, entmax15": entry(jsm.dot_product_attention, normalizer=jsm.entmax15),
    }
    cycles = {}
    if dtype == "bfloat16" and not causal:
        for name in ("softmax", "entmax15"):
            ours = OURS + (f", {name}" if name != "softmax" else "") + KERNELS
            entries[ours] = entry(bundles.ours(name))
            cycles[ours] = functools.partial(
                bundles.seconds, name, sizes.attended, features, what != FORWARD
            )
    kind = "causal" if causal else "full"
    operation = f"{ATTENTION}, {kind}, H = {features}, {dtype}, {what}"
    return Program(operation, entries, ((x, x, x), x), cycles)


def mapped(what: str, rows: tuple[int, int], dtype: str) -> Program:
    """Mappings; softmax of `jax.nn` is the first, and the one that sparse ones are beside."""
    x = array(dtype, *rows)
    entries = {}
    for name, entry in ours_and_jax(MAPPED, PULLED_BACK[what]).items():
        if isinstance(entry, Entry):
            value = array(dtype, rows[0]) if name.endswith("logsumexp") else x
            entries[name] = dataclasses.replace(entry, prepare=lambda x, value=value: (x, value))
    return Program(f"{MAPPINGS}, {in_words(rows)}, {dtype}, {what}", entries, (x,))


def cross_entropy(what: str, rows: tuple[int, int], dtype: str) -> Program:
    """The loss of scores that are there, beside that of optax."""
    x, labels = array(dtype, *rows), array("int32", rows[0])

    def entry(loss: Function, ours: str = "") -> Entry:
        value = jax.eval_shape(loss, x, labels)  # theirs is of the type of the scores
        return Entry(PULLED_BACK[what](loss), ours, prepare=lambda: (x, value, labels))

    ours, theirs = "jsm.cross_entropy", optax.softmax_cross_entropy_with_integer_labels
    entries = {"optax": entry(theirs, ours), ours: entry(jsm.cross_entropy)}
    return Program(f"{CROSS_ENTROPY}, {in_words(rows)}, {dtype}, {what}", entries, ())


def linear_layer(dtype: str, sizes: Sizes) -> Program:
    """The gradient of the loss of a linear layer, beside that of optax on all scores."""
    rows, width, classes = sizes.linear
    point = array(dtype, rows, width), array(dtype, width, classes)
    entries = {
        "optax, all scores": Entry(value_and_gradient(losses.all_scores), losses.OURS),
        losses.OURS: Entry(value_and_gradient(losses.linear())),
    }
    operation = f"{LINEAR}, {in_words(sizes.linear)}, {dtype}, {GRADIENT}"
    return Program(operation, entries, (point, point, array("int32", rows)))


def in_words(sizes: Sequence[int]) -> str:
    """As they are written."""
    return " × ".join(map(str, sizes))


def programs(sizes: Sizes) -> list[Program]:
    """All of them."""
    return [
        *(
            attention(what, causal, features, dtype, sizes)
            for causal, features, dtype, what in itertools.product(
                sizes.causal, sizes.features, sizes.dtypes, PULLED_BACK
            )
        ),
        *(linear_layer(dtype, sizes) for dtype in sizes.dtypes),
        *(
            make(what, rows, dtype)
            for make in (mapped, cross_entropy)
            for rows, dtype, what in itertools.product(sizes.rows, sizes.dtypes, PULLED_BACK)
        ),
    ]


def targets() -> list[Target]:
    """Those that are asked for."""
    names = os.environ.get(VARIABLE, DEFAULT).split()
    if unknown := [name for name in names if name not in TARGETS]:
        raise SystemExit(f"{VARIABLE} must name some of {', '.join(TARGETS)}, got {unknown[0]!r}")
    return [TARGETS[name] for name in names]


def missing() -> str | None:
    """Why one of them cannot be compiled for."""
    return next((why for target in targets() if (why := target.missing())), None)


def steps(quick: bool) -> list[Compiled]:
    """All programs for all devices."""
    sizes = TINY if quick else Sizes()
    return [Compiled(program, target) for program in programs(sizes) for target in targets()]


def panel(title: str, row: str, quantity: str, x_label: str, *kinds: str) -> Ratios:
    """Ours relative to peers, for some kinds of programs, on all devices."""
    operations = [p.operation for p in programs(Sizes()) if p.operation.startswith(kinds)]
    return Ratios(title, row, "{size}", (quantity,), x_label, operations)


TIME, MEMORY = "estimated time, relative", "temporary memory, relative"

NOTES = """
- Attention: XLA writes the scores of a block to memory and reads them once, as it does for
  `jax.nn`. On an H100, ours computes them again instead, and without a mask it writes only half of
  their bits, for the maximum of each row. If one is beyond about ±1,000, a loop finds it exactly.
  Random scores never need that loop, so its body is not counted, but its wait is.
- Linear layer: each chunk of rows adds to the gradient of all weights. So that gradient is read and
  written once per chunk, or, on an H100 in bfloat16, once per two. Instead, optax holds all scores,
  here in the dtype of the inputs.
- Mappings: the exact gradient of log-softmax needs two more sums, which read long rows once more on
  an H100. That of logsumexp goes on from the maximum and the sum that were found for the value.
- In bfloat16, `jax.nn` and optax compute with 8 bits. Ours computes in float32 and rounds once.
- Sparse mappings, compared with softmax: each pass of the solver reads the scores.
- Compiling: there is more to compile, such as an exact gradient, a solver, or the bands of causal
  attention.
"""

TOPIC = Topic(
    "accelerators",
    "Programs compiled for accelerators",
    """
This page shows what JAX compiles for an H100 and for a TPU v5e. Neither was there, so nothing on
this page ran. We read the program that would run, and report:

- its kernels, and how often they start;
- the bytes that they read from the main memory and write to it;
- the work of its matrix products, by the wider type of their factors (`f32` is TF32 on a GPU, at
  half the rate of `bf16`);
- how often the host has to wait for a number;
- the temporary memory that the compiler plans.

The estimated time of a kernel is the largest of three times: that of its bytes at the bandwidth of
the memory, that of its matrix products at the peak of the device, and, on a TPU, that of the cycles
that the compiler expects. It is multiplied by the passes of the loops around the kernel. A loop of
unknown length counts as 7 passes, which is what a solver takes on random scores. That of
entmax(1.3) counts as 4, and that of attention with softmax as none. On a TPU, copies run at the
same time as kernels.

Kernels of our own (`implementation="pallas"`) are compiled for the TPU. Their time is that of their
bundles of instructions, one a cycle, as `python -m benchmarks.bundles` counts them, with two passes
of the search for thresholds over all scores. What XLA does around them is added.

**How far to trust an estimate**: it ranks programs, but it does not predict their time. Nothing is
autotuned without a device. An estimate leaves out launches, waits of the host and, on a GPU, all
arithmetic but matrix products. It counts what is in the L2 cache as read from memory. A ratio above
1.3 means something, and a smaller one does not. Kernels, bytes and temporary memory are not
estimates: they are what was compiled. The time to compile is measured on this machine's processor.
""",
    steps,
    (
        panel(
            "Attention and linear layer: estimated time",
            "{operation}",
            "ours_estimate",
            TIME,
            ATTENTION,
            LINEAR,
        ),
        panel(
            "Attention and linear layer: temporary memory",
            "{operation}",
            "ours_memory",
            MEMORY,
            ATTENTION,
            LINEAR,
        ),
        panel(
            "Mappings and cross-entropy: estimated time",
            "{operation}: {name}",
            "ours_estimate",
            TIME,
            MAPPINGS,
            CROSS_ENTROPY,
        ),
    ),
    NOTES,
    "device",
    missing,
)

if __name__ == "__main__":
    main([TOPIC])
