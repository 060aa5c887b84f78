"""How many instructions kernels of attention have for a tile, as compiled for a TPU v5e.

A TPU starts one bundle of instructions a cycle, so bundles are about cycles. They are counted in
the loops of what the compiler writes down; nothing runs. The peer is JAX's own splash attention,
whose loop over tiles is its grid. Needs the extra "aot": `python -m benchmarks.bundles`. The page
of accelerators makes times of them.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxsoftmax as jsm
from benchmarks import ahead

LENGTH, HEADS, FEATURES, TILE = 4096, 2, 64, 256
# What a search for thresholds does on random scores: its steps on few scores, and passes over all.
STEPS_OF_FEW, PASSES = 4, 2


def ours(name: str) -> Callable[..., Any]:
    """Attention by our kernels."""
    return functools.partial(
        jsm.dot_product_attention, implementation="pallas", normalizer=getattr(jsm, name)
    )


def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's own, in tiles of the same size."""
    from jax.experimental.pallas.ops.tpu import splash_attention as peer

    mask = peer.MultiHeadMask([peer.FullMask((LENGTH, LENGTH))] * HEADS)
    backward = ("q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = peer.BlockSizes(
        block_q=TILE,
        block_kv=TILE,
        block_kv_compute=TILE,
        **{f"block_{name}": TILE for name in backward},
    )
    kernel = peer.make_splash_mha_single_device(mask, block_sizes=sizes)
    turned = (jnp.swapaxes(x[0], 0, 1) for x in (q, k, v))
    return jnp.swapaxes(kernel(*turned), 0, 1)[None]


PROGRAMS = {
    "softmax": ours("softmax"),
    "entmax15": ours("entmax15"),
    "sparsemax": ours("sparsemax"),
    "JAX's splash attention": splash,
}


MAPPINGS = {
    "softmax of rows": jsm.softmax,
    "log_softmax of rows": jsm.log_softmax,
    "sparsemax of rows": jsm.sparsemax,
    "entmax15 of rows": jsm.entmax15,
    "entmax(1.3) of rows": functools.partial(jsm.entmax, alpha=1.3),
}
ROWS = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)


def compile_for_tpu(name: str, features: int) -> None:
    """Compiles a mapping of rows, or the value and the gradients of attention."""
    if name in MAPPINGS:
        mapping = functools.partial(MAPPINGS[name], implementation="pallas")
        ahead.compiled(mapping, (ROWS,), ahead.TARGETS["v5e"])
        return
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, features), jnp.bfloat16)

    def both(args: Sequence[Any], ct: Any) -> Any:
        out, pull_back = jax.vjp(PROGRAMS[name], *args)
        return out, pull_back(ct)

    ahead.compiled(both, ((x, x, x), x), ahead.TARGETS["v5e"])


def loops(text: str) -> list[int]:
    """The bundles of the loops of a kernel, in order: first that over the grid, with all others."""
    starts, found = {}, []
    for line in text.splitlines():
        head = re.match(r"\s*(0x[0-9a-f]+|0)\s+(LB)?[^{]*", line)
        if head is None:
            continue
        address = int(head[1], 16)
        if head[2]:
            starts |= dict.fromkeys(re.findall(r"Start region (\d+)", line), address)
        for region in re.findall(r"target = \$region(\d+)", line):
            if region in starts:
                found.append((starts[region], address))
    return [last - first + 1 for first, last in sorted(found)]


def programs_in(folder: Path, instruction: str) -> Iterator[tuple[str, list[int]]]:
    """The kernels with some instruction that a compiler wrote down, with their loops."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        text = path.read_text()
        if "schedule" not in path.name and instruction in text:
            yield path.name.split("-")[1], loops(text)


@functools.cache
def written(name: str, features: int = FEATURES) -> list[tuple[str, list[int]]]:
    """The kernels of a program, with their loops; compiled by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.bundles", name, str(features)]
        subprocess.run(command, check=True, env=os.environ | {"LIBTPU_INIT_ARGS": flags})
        # What tells kernels from what XLA makes beside them: they multiply, or turn.
        return list(programs_in(Path(folder), "vxpose" if name in MAPPINGS else "vmatmul"))


def of_a_row(loops: Sequence[float], tiles: float) -> float:
    """The bundles of one of our kernels for as many tiles, a pass of the grid's loop.

    With a search, the loops in it are the first pass, that over few scores, that of the search with
    one over all scores in it, and the last pass.
    """
    grid, *inner = loops
    if len(inner) == 1:
        return grid + (tiles - 1) * inner[0]
    first, few, search, again, last = inner
    passes = (PASSES - 1) * search + PASSES * (tiles - 1) * again
    return grid + (tiles - 1) * (first + last) + (STEPS_OF_FEW - 1) * few + passes


def seconds(name: str, attended: tuple[int, int, int], features: int, gradients: bool) -> float:
    """What our kernels take on a TPU v5e for batch, length and heads, if a bundle is a cycle."""
    batch, length, heads = attended
    tiles = -(-length // TILE)
    kernels = [found for _, found in written(name, features)][: 1 + gradients]
    bundles = sum(of_a_row(found, tiles) for found in kernels)
    return batch * heads * tiles * bundles / ahead.TARGETS["v5e"].clock


def main() -> None:
    """Prints the loops of all programs."""
    print("| program | kernel | bundles of the grid's loop | of the loops in it |")
    print("|---|---|--:|---|")
    for name in (*PROGRAMS, *MAPPINGS):
        for kernel, (grid, *inner) in written(name):
            print(f"| {name} | {kernel} | {grid} | {', '.join(map(str, inner))} |")


if __name__ == "__main__":
    compile_for_tpu(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
