"""How many instructions kernels of attention have for a tile, as compiled for an H100.

They are counted in the loops of what the assembler makes; nothing runs. The peer is JAX's own
attention for Hopper GPUs. Needs the extra "aot": `python -m benchmarks.instructions`.

Times made of them are estimates, for batch 4, length 4096, 8 heads, 64 features where no other
number is told, and queries that see the keys up to their own. What is counted is not causal: there,
tiles on the diagonal have a mask besides. Of the peer too, only what a warpgroup does that computes
is counted. Assumed is:

- A block of 64 queries or keys is four warps, one on each quarter of a core. A quarter starts one
  instruction a cycle. Minima, comparisons, selections, integers and conversions take it 2 cycles,
  and special functions 8: a core has 64 and 16 results of them a cycle, and 128 of additions (table
  of throughputs for 9.0 in the CUDA programming guide).
- Matrix products run at the peak that `benchmarks/ahead.py` has; its clock tells what a cycle is.
- At the low end all units work at once, so the busiest one takes the time. At the high end none
  works while another does.
- A search makes as many steps and passes as in `benchmarks/bundles.py`, where it starts from the
  largest scores of more classes of keys.
- Latencies and copies cost nothing. They do cost something, and more so the fewer blocks a core
  holds at once; so the high end is no bound.
"""

import collections
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import ahead, bundles

TARGET = ahead.TARGETS["h100"]
BATCH, LENGTH, HEADS, FEATURES, TILE = 4, 4096, 8, 64, 64
# Of an H100, as `targets/h100.txtpb` has it: its cores, and what each has of bytes and registers.
CORES, SHARED, REGISTERS = 132, 233472, 65536
OF_SYSTEM = 1024  # bytes of shared memory that each block has besides
SLOW_CYCLES, SPECIAL_CYCLES = 2, 8
# All that a core has half as many units for as for additions.
SLOW = {"FMNMX", "FSEL", "FSETP", "F2FP"}
SLOW |= {"SEL", "ISETP", "IADD3", "VIADD", "LOP3", "SHF", "LEA", "PRMT", "PLOP3"}
OF_SHARED = {"LDS", "STS", "LDSM", "STSM"}
COMPUTING = {"FADD", "FMUL", "FFMA", "FMNMX", "HGMMA"}


class Work(NamedTuple):
    """What a warp does.

    Attributes:
      instructions: all that it starts.
      special: those of them that are exponentials, logarithms, reciprocals or roots.
      slow: those that take two cycles.
      shared: those that read or write shared memory.
      flops: what it and the three other warps multiply and add in matrix products.
    """

    instructions: float
    special: float
    slow: float
    shared: float
    flops: float

    def cycles(self) -> tuple[float, float]:
        """Those of a core, if all of its units work at once, and if one waits for another."""
        special, slow = SPECIAL_CYCLES * self.special, SLOW_CYCLES * self.slow
        others = self.instructions - self.special - self.slow
        product = self.flops / (TARGET.peaks["bf16"] / CORES) * TARGET.clock
        return max(self.instructions, special, slow, product), others + special + slow + product


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as the assembler made it.

    Attributes:
      whole: all of it, as it is gone through once.
      loops: its loops that compute, in order.
      registers: what a thread has.
      spilled: bytes that it writes for lack of registers.
      threads: those of a block.
      shared: bytes of shared memory of a block.
    """

    whole: Work
    loops: list[Work]
    registers: int
    spilled: int
    threads: int
    shared: int

    @property
    def at_once(self) -> int:
        """How many blocks a core holds."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(REGISTERS // registers, SHARED // (self.shared + OF_SYSTEM))


@dataclasses.dataclass(frozen=True)
class Program:
    """Attention and what it is compiled with.

    Attributes:
      function: attends.
      dtype: of what it takes.
      kernels: its kernels in the order in which they are compiled.
      keys: how many keys a pass of a loop takes, which is not that of "dkv".
      features: those of its heads.
    """

    function: Callable[..., Any]
    dtype: Any
    kernels: tuple[str, ...]
    keys: int = TILE
    features: int = FEATURES

    def tiles(self, kernel: str) -> float:
        """How many tiles a pass of a loop is."""
        return 1 if kernel == "dkv" else self.keys / TILE


def ours(name: str) -> Program:
    """Attention by our kernels."""
    return Program(bundles.ours(name), jnp.bfloat16, ("forward", "dq", "dkv"))


def of_256_features(name: str) -> Program:
    """The same, of which keys and values have a kernel each, and tiles come by halves."""
    kernels = "forward", "dv", "dq", "dk"
    return Program(bundles.ours(name), jnp.bfloat16, kernels, TILE // 2, 256)


def theirs(keys: int) -> Program:
    """JAX's own; it is for float16, which takes what bfloat16 does."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.gpu import attention_mgpu as peer

        config = peer.TuningConfig(
            block_q=TILE,
            block_kv=keys,
            max_concurrent_steps=2,
            block_q_dq=TILE,
            block_kv_dq=keys,
            block_q_dkv=TILE,
            block_kv_dkv=TILE,
        )
        # It asks a driver, which is not there, for its version before it has a causal mask.
        with mock.patch.object(peer, "cuda_versions"):
            return peer.attention(q, k, v, config)

    return Program(attend, jnp.float16, ("forward", "dkv", "dq"), keys)


PROGRAMS = {
    "softmax": ours("softmax"),
    "entmax15": ours("entmax15"),
    "sparsemax": ours("sparsemax"),
    "softmax, 256 features": of_256_features("softmax"),
    "JAX's attention_mgpu, 64 keys": theirs(64),
    "JAX's attention_mgpu, 128 keys": theirs(128),
}
LOOPS_OF_SEARCH = "largest scores", "step of few", "pass and step", "pass", "last pass"


def missing() -> str | None:
    """Why nothing can be counted here, in one sentence; None if it can."""
    if (why := TARGET.missing()) is not None:
        return why
    if _tool("nvdisasm") is None:
        return "nvdisasm is not found, which reads instructions: install nvidia-cuda-nvdisasm"
    return None


def _tool(name: str) -> Path | None:
    """A program of a package of NVIDIA's."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return next((x for folder in folders or () for x in Path(folder).glob(f"*/bin/{name}")), None)


def work(instructions: Sequence[str]) -> Work:
    """What instructions do, of which this has the names alone."""
    names = collections.Counter(name.split(".")[0] for name in instructions)
    sizes = (re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", name) for name in instructions)
    return Work(
        instructions=len(instructions),
        special=names["MUFU"],
        slow=sum(names[name] for name in SLOW),
        shared=sum(names[name] for name in OF_SHARED),
        flops=sum(2 * int(x[1]) * int(x[2]) * int(x[3]) for x in sizes if x),
    )


def loops(text: str) -> tuple[Work, list[Work]]:
    """What a kernel does in all, and in its loops that compute, in order.

    What stands after the end of the program waits for a barrier once more, and comes back.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    jumps = []
    for line in text.splitlines():
        if label := re.match(r"\.(L\w+):", line):
            labels[label[1]] = len(names)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if found[1] == "BRA" and (to := re.search(r"`\(\.(L\w+)\)", found[2])):
                jumps.append((len(names), to[1]))
            names.append(found[1])
    end = max((i for i, name in enumerate(names) if name == "EXIT"), default=len(names))
    back = sorted((labels[to], at) for at, to in jumps if at < end and labels[to] <= at)
    bodies = [names[first : last + 1] for first, last in back]
    computing = [body for body in bodies if COMPUTING & {name.split(".")[0] for name in body}]
    return work(names[: end + 1]), [*map(work, computing)]


def compile_for_gpu(name: str) -> None:
    """Compiles the value and the gradients of attention."""
    program = PROGRAMS[name]
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, program.features), program.dtype)

    def both(args: Sequence[Any], ct: Any) -> Any:
        out, pull_back = jax.vjp(program.function, *args)
        return out, pull_back(ct)

    ahead.compiled(both, ((x, x, x), x), TARGET)


@functools.cache
def written(name: str) -> dict[str, Kernel]:
    """The kernels of a program; compiled by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root, dump = Path(folder, "cuda"), Path(folder, "dump")
        (root / "bin").mkdir(parents=True)
        dump.mkdir()
        for tool in ("ptxas", "nvdisasm"):
            (root / "bin" / tool).symlink_to(str(_tool(tool)))
        # The disassembler comes from the root, and the assembler is the first of the path.
        flags = {"CUDA_ROOT": str(root), "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        flags |= {"MOSAIC_GPU_DUMP_TO": str(dump)}
        flags |= {f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in ("SASS", "PTXAS")}
        command = [sys.executable, "-m", "benchmarks.instructions", name]
        subprocess.run(command, check=True, env=os.environ | flags)
        paths = sorted(dump.glob("*.ptxas"), key=lambda path: int(path.stem.split("_")[-1]))
        return dict(zip(PROGRAMS[name].kernels, map(_kernel, paths), strict=True))


def _kernel(path: Path) -> Kernel:
    """What was written of a kernel, given what the assembler told of it."""
    told, lowered = path.read_text(), path.with_suffix(".mlir-passes.log").read_text()
    launch = r"gpu\.launch_func .*threads in \(%c(\d+),.*dynamic_shared_memory_size %c(\d+)_i32"
    threads, shared = _numbers(launch, lowered)
    (registers,), (spilled,) = (
        _numbers(text, told) for text in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    found = loops(next(path.parent.glob(f"{path.stem}.sass*")).read_text())
    return Kernel(*found, registers, spilled, threads, shared)


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing written is like {pattern}")
    return [int(number) for number in found.groups()]


def estimate(kernel: Kernel, tiles: float) -> tuple[float, float]:
    """Seconds, low and high, of a kernel of which a pass of a loop is so many tiles."""
    blocks = LENGTH // TILE
    passes = (blocks + 1) / 2 / tiles
    of_block = (bundles.of_a_row(x, passes) for x in zip(kernel.whole, *kernel.loops, strict=True))
    low, high = Work(*of_block).cycles()
    each = BATCH * HEADS * blocks / CORES / TARGET.clock
    return each * low, each * high


def main() -> None:
    """Prints the loops of all programs, by tiles of 64 queries and keys, and the estimates."""
    if (why := missing()) is not None:
        sys.exit(why)
    print("| program | kernel | loop | instructions | special | half rate | shared | products |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    kernels = []
    for name, program in PROGRAMS.items():
        for kind, kernel in written(name).items():
            tiles = program.tiles(kind)
            titles = LOOPS_OF_SEARCH if len(kernel.loops) > 1 else ("tile",)
            for title, loop in zip(titles, kernel.loops, strict=True):
                *counts, flops = (x / tiles for x in loop)
                counts.append(flops / (2 * TILE * TILE * program.features))
                print(f"| {name} | {kind} | {title} | {' | '.join(f'{x:.0f}' for x in counts)} |")
            low, high = (f"{1e3 * x:.2f}" for x in estimate(kernel, tiles))
            has = kernel.registers, kernel.spilled, kernel.shared, kernel.at_once
            kernels.append(f"| {name} | {kind} | {' | '.join(map(str, has))} | {low} to {high} |")
    print()
    print("| program | kernel | registers | spilled | shared | blocks at once | estimate, ms |")
    print("|---|---|--:|--:|--:|--:|--:|")
    print("\n".join(kernels))


if __name__ == "__main__":
    compile_for_gpu(sys.argv[1]) if len(sys.argv) > 1 else main()
