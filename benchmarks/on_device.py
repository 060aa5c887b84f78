"""The parts of `on_device.sh`: whether all of it is right on this device, and how fast it is."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerators, limits, tables
from benchmarks.accelerators import ATTENTION, FORWARD, Program, Sizes
from benchmarks.attention import OURS
from benchmarks.environment import Environment
from benchmarks.kernels_on_device import kernels
from benchmarks.mappings import SAME
from benchmarks.measuring import Comparison, Entry, Missing, Result, relate
from benchmarks.peers import peer
from tests.calls import CALLS, value_and_gradients

Function = Callable[..., Any]

# Errors relative to the largest number: that of one operation is 6e-8, and sums may cancel.
TOLERANCE = 1e-3
# Where float32 cannot tell apart what it searches for: fits of many parameters to few examples.
FITTED = 2e-2
TOLERANCES = {
    "calibration.fit_vector_scaling": FITTED,
    "calibration.fit_matrix_scaling": FITTED,
}
# They draw, and draw other numbers in float64.
DRAWN = ("sample", "gumbel_softmax")
SHORT, REPEATS = 2e-3, 20
TINY_LENGTH = dataclasses.replace(accelerators.TINY, attended=(1, 128, 2))


def main() -> None:
    """Takes one part and writes it to the end of the page."""
    parser = argparse.ArgumentParser(prog="benchmarks/on_device.sh", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0, help="when it stops by itself")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    before = options.page.read_text(encoding="utf-8") if options.page.exists() else head()
    deadline = time.perf_counter() + options.seconds
    for text in PARTS[options.part](options.quick, deadline):
        options.page.write_text(f"{before}\n{text}", encoding="utf-8")


def head() -> str:
    """What comes before all parts."""
    rows = tables.rows(Environment().rows.items())
    return f"""\
# On a device

Written by `benchmarks/on_device.sh`, in one run on the device below.

{rows}
"""


# Whether it is right.


def checks(quick: bool, deadline: float) -> Iterator[str]:
    """A line for every public function: how far it and its derivatives are from float64."""
    names = [name for name in CALLS if not quick or len(name) % 3 == 0]
    lines: list[str] = []
    wrong: list[str] = []
    for name in names:
        in_time = time.perf_counter() < deadline
        cells = _checked(name) if in_time else ["not reached", "", "", ""]
        if cells[0] != "right":
            wrong.append(f"`{name}`")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
        verdict = f"Not right: {', '.join(wrong)}." if wrong else "All of them are right."
        yield _CHECKS.format(verdict=verdict, lines="\n".join(lines), count=len(lines))


_CHECKS = f"""
## Is it right?

{{count}} functions in float32 on this device, beside the same in float64 on the processor: the
value, the pullback of a cotangent to every argument, and the derivative along a direction. Errors
are relative to the largest number; more than {TOLERANCE:g} is wrong, {FITTED:g} of many fitted
parameters. Matrix products are exact to float32 here. Of what is drawn, float32 on the processor is
the truth.

{{verdict}}

| function | | value | reverse | forward |
|---|---|---|---|---|
{{lines}}
"""


def _checked(name: str) -> list[str]:
    """A verdict and three errors."""
    fun, args = CALLS[name]
    both = with_derivatives(fun)
    processor = jax.devices("cpu")[0]
    try:
        with jax.default_matmul_precision("highest"):
            actual = jax.device_get(jax.jit(both)(*args))
        with jax.default_device(processor), jax.enable_x64(name not in DRAWN):
            wide = args if name in DRAWN else jax.tree.map(_float64, args)
            wanted = jax.device_get(jax.jit(both)(*wide))
        errors = [error(a, w) for a, w in zip(actual, wanted, strict=True)]
    except Exception as problem:  # it is what the page is to tell
        return [tables.in_short(problem), "", "", ""]
    tolerance = TOLERANCES.get(name, TOLERANCE)
    verdict = "right" if max(errors) <= tolerance else "**wrong**"
    return [verdict, *(f"{e:.1e}" for e in errors)]


def with_derivatives(fun: Function) -> Function:
    """The value, what is pulled back, and what is pushed forward."""
    in_reverse = value_and_gradients(fun)

    def all_of_it(*args: Any) -> tuple[Any, Any, Any]:
        value, gradients = in_reverse(*args)
        tangents = jax.tree.map(_direction, args)
        return value, gradients, jax.jvp(fun, args, tangents)[1]

    return all_of_it


def _direction(x: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return np.zeros(np.shape(x), jax.dtypes.float0)
    return jnp.cos(jnp.arange(np.size(x), dtype=jnp.result_type(x))).reshape(np.shape(x))


def _float64(x: Any) -> Any:
    return np.float64(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def error(actual: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest number of an array; NaN must be NaN."""
    worst = 0.0
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        a, w = np.float64(a), np.float64(w)
        finite = np.isfinite(w)
        if a.shape != w.shape or not np.array_equal(
            np.where(np.isfinite(a), 0, a), np.where(finite, 0, w), equal_nan=True
        ):
            return float("inf")
        a, w = a[finite], w[finite]
        scale = max(np.abs(w).max(initial=0.0), 1e-6)
        worst = max(worst, float(np.abs(a - w).max(initial=0.0)) / scale)
    return worst


# How fast it is.


def times(quick: bool, deadline: float) -> Iterator[str]:
    """A table that grows by one program after the other, the most important ones first."""
    sizes = TINY_LENGTH if quick else Sizes()
    found: list[Result] = []
    left: list[str] = []
    for program in sorted(accelerators.programs(sizes), key=importance):
        if time.perf_counter() > deadline:
            left.append(program.operation)
        else:
            found += measured(program, quick, deadline)
            jax.clear_caches()
        yield _TIMES.format(
            table=tables.table(found) if found else "",
            losses=tables.losses(found),
            left="; ".join(left) or "nothing",
        )


_TIMES = """
## How fast is it?

Each group in turn, in one run: medians with quartiles, and ratios formed within each round. Short
calls are started 20 at once, and the last is waited for. Where a peer is not measured the table
says why.

{table}

### Where it loses

{losses}

For lack of time, left out: {left}.
"""


def importance(program: Program) -> tuple[bool, ...]:
    """What is sorted by it begins with what matters most."""
    name = program.operation
    return (
        "H = 128" in name or "256 ×" in name,
        not name.startswith((ATTENTION, accelerators.LINEAR)),
        name.startswith(ATTENTION) and "float32" in name,
        FORWARD in name,
        "full" in name,
    )


def measured(program: Program, quick: bool, deadline: float) -> list[Result]:
    """One comparison, in which what does not work is a line that says so."""
    entries: dict[str, Entry | Missing] = dict(program.entries)
    if program.operation.startswith(ATTENTION):
        entries |= other_attention(program)
    if program.operation.startswith(accelerators.MAPPINGS):
        entries |= limits.copy | row_kernels(program)
    costs: dict[str, dict[str, Any]] = {}
    ready = {
        name: _ready(entry, program, costs.setdefault(name, {}), deadline)
        for name, entry in entries.items()
    }
    runs = any(isinstance(entry, Entry) for entry in ready.values())
    comparison = Comparison(program.operation, "", 1, ready, seconds=0.25, compile_only=not runs)
    try:
        results = comparison.measure(quick)
    except Exception as problem:
        note = {"result": tables.in_short(problem)}
        return [Result(program.operation, "", 1, OURS, quantities=note)]
    of = {result.name: dict(result.quantities) | costs[result.name] for result in results}
    for result in results:
        relate(of[result.name], of.get(result.ours, {}))
    return [dataclasses.replace(result, quantities=of[result.name]) for result in results]


def _ready(
    entry: Entry | Missing, program: Program, costs: dict[str, Any], deadline: float
) -> Entry | Missing:
    """Compiled and tried once."""
    if isinstance(entry, Missing):
        return entry
    if time.perf_counter() > deadline:
        return Missing("not measured: no time was left")
    try:
        args = _numbers(entry.prepare(*program.arguments))
        call = entry.function
        if entry.jit:
            start = time.perf_counter()
            call = jax.jit(entry.function).lower(*args).compile()
            if not entry.is_limit:
                costs["compile"] = time.perf_counter() - start
                costs["memory"] = call.memory_analysis().temp_size_in_bytes
        jax.block_until_ready(call(*args))
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        is_short = time.perf_counter() - start < SHORT
    except Exception as problem:
        return Missing(f"not measured: {tables.in_short(problem)}")
    repeats = REPEATS if is_short else 1

    def several() -> Any:
        for _ in range(repeats - 1):
            call(*args)
        return call(*args)

    return dataclasses.replace(
        entry, function=several, jit=False, times=entry.times / repeats, prepare=lambda *_: ()
    )


def _numbers(shapes: Any) -> Any:
    """Arrays, the same ones for every function that takes these shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(
        jax.random.randint(key, x.shape, 0, 32, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.integer)
        else jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, leaves, strict=True)
    )


def other_attention(program: Program) -> Mapping[str, Entry | Missing]:
    """That of cuDNN, tokamax and PyTorch, as far as they are there."""
    causal, is_forward = "causal" in program.operation, program.operation.endswith(FORWARD)
    what = accelerators.PULLED_BACK[FORWARD if is_forward else accelerators.PULLBACK]

    def of(attend: Function) -> Function:
        return what(lambda qkv: attend(*qkv, is_causal=causal))

    def by_tokamax(tokamax: Any, flags: Any) -> Function:
        flags.FLAGS.mark_as_parsed()  # or it would read our command line
        return of(tokamax.dot_product_attention)

    cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return {
        "jax.nn, cuDNN": Entry(of(cudnn), OURS),
        "tokamax": peer(("tokamax", "absl.flags"), by_tokamax, OURS),
        "torch": peer(("torch",), functools.partial(by_torch, causal, is_forward), OURS, jit=False),
    }


def row_kernels(program: Program) -> Mapping[str, Entry]:
    """Our mappings by kernels, where there are any."""
    if jax.default_backend() != "tpu":
        return {}
    is_forward = program.operation.endswith(FORWARD)
    what = accelerators.PULLED_BACK[FORWARD if is_forward else accelerators.PULLBACK]
    found = {}
    for name in accelerators.MAPPED:
        if name != "logsumexp":  # it has none
            mapping = functools.partial(SAME[name][0], implementation="pallas")
            entry = program.entries[f"jsm.{name}"]
            ours = f"jsm.{name}{accelerators.KERNELS}"
            found[ours] = dataclasses.replace(entry, function=what(mapping))
    return found


def by_torch(causal: bool, is_forward: bool, torch: Any) -> Function:
    """PyTorch's attention, on the device that JAX has; its arrays are turned round before."""
    on_gpu = jax.default_backend() == "gpu"
    tensors: dict[int, Any] = {}

    def tensor(x: jax.Array) -> Any:
        if id(x) not in tensors:
            half = torch.from_numpy(np.array(x, np.float32)).transpose(1, 2).contiguous()
            dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
            tensors[id(x)] = half.to("cuda" if on_gpu else "cpu", dtype)
        return tensors[id(x)]

    def call(qkv: Sequence[jax.Array], ct: jax.Array) -> Any:
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=causal
        )
        if is_forward:
            with torch.no_grad():
                out = attend(*map(tensor, qkv))
        else:
            given = [tensor(x).detach().requires_grad_() for x in qkv]
            out = torch.autograd.grad(attend(*given), given, tensor(ct))
        if on_gpu:
            torch.cuda.synchronize()
        return out

    return call


PARTS = {"checks": checks, "kernels": kernels, "times": times}

if __name__ == "__main__":
    main()
