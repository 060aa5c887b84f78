"""Whether kernels are right on this device: the cases of their tests, there interpreted."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax as jsm
from benchmarks.tables import in_short
from tests import test_kernels as attention
from tests import test_row_kernels as rows

# Errors relative to the largest number; in bfloat16 the factors of products are rounded.
TOLERANCES = {"bfloat16": 1e-2, "float32": 1e-5}
FEATURES = 64, 64


def kernels(quick: bool, deadline: float) -> Iterator[str]:
    """A line for every case: how far the output and the gradients are from float64."""
    platform = jax.default_backend()
    if platform not in ("tpu", "gpu") and not quick:
        yield f"\n## Are the kernels right?\n\nThere are none for the platform {platform}.\n"
        return
    lines: list[str] = []
    wrong: list[str] = []
    for what, how_far in _cases(platform)[: 2 if quick else None]:
        in_time = time.perf_counter() < deadline
        cells = [_cell(how_far, dtype) if in_time else "not reached" for dtype in TOLERANCES]
        if any(cell.startswith(("**", "not", "!")) for cell in cells):
            wrong.append(what)
        lines.append(f"| {what} | {' | '.join(cells)} |")
        verdict = f"Not right: {'; '.join(wrong)}." if wrong else "All of them are right."
        yield _PAGE.format(verdict=verdict, lines="\n".join(lines), columns=" | ".join(TOLERANCES))


_PAGE = f"""
## Are the kernels right?

`implementation="pallas"` on this device, beside float64 on the processor. Errors are relative to
the largest number, of the output and of all gradients; more than {TOLERANCES["float32"]:g} in
float32 or {TOLERANCES["bfloat16"]:g} in bfloat16 is wrong.

{{verdict}}

| kernel | {{columns}} |
|---|---|---|
{{lines}}
"""


def _cases(platform: str) -> list[tuple[str, Callable[[str], float]]]:
    of_attention = [
        (f"attention, {form}, {option}", functools.partial(_attention, form, option))
        for form, option in attention.CASES
    ]
    of_rows = [(f"rows, {name}", functools.partial(_rows, name)) for name in rows.NAMES]
    return of_rows + of_attention if platform == "tpu" else of_attention


def _cell(how_far: Callable[[str], float], dtype: str) -> str:
    try:
        error = how_far(dtype)
    except Exception as problem:  # it is what the page is to tell
        return f"! {in_short(problem)}"
    return f"{error:.1e}" if error <= TOLERANCES[dtype] else f"**{error:.1e}**"


def _attention(form: str, option: str, dtype: str) -> float:
    device = jax.devices()[0]

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(arrays: Any, ct: Any) -> Any:
            ct = ct.astype(np.float32)
            with jax.enable_x64(False):
                return jax.device_get(jax.jit(function)(*jax.device_put((arrays, ct), device)))

        return call

    attend = functools.partial(jsm.dot_product_attention, implementation="pallas")
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        found = attention.case(
            np.random.default_rng(0),
            form,
            option,
            jnp.dtype(dtype),
            FEATURES,
            attend=attend,
            compiled=compiled,
        )
    return max(found.values())


def _rows(name: str, dtype: str) -> float:
    x = np.asarray(rows.scores(np.random.default_rng(0), jnp.dtype(dtype)))
    mapping = functools.partial(rows.FUNCTIONS[name], implementation="pallas")
    found = np.float64(jax.device_get(jax.jit(mapping)(x)))
    wanted = rows.CASES[name].reference(np.float64(x))
    size = np.maximum(1, np.abs(wanted)) if name == "log_softmax" else 1
    return float(np.max(np.abs(found - wanted) / size))
