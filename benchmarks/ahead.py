"""Compile for a device that is not there, and estimate what a program would take on it.

JAX compiles for a GPU or a TPU that is described to it, fully: `as_text()` is what would run.
Nothing runs, so a time is an estimate. It ranks; it does not predict.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import kernels
from benchmarks.kernels import Kernel

_DESCRIPTIONS = Path(__file__).parent / "targets"
# A plugin asks the network for a TPU that it was told of.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no process keeps another from compiling
}
SOLVER_PASSES = 7  # those of a solver on random scores; entmax of alpha 1.3 needs 4


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A device to compile for.

    Attributes:
      name: as it is asked for.
      title: as it is told.
      platform: that of JAX's plugin.
      topology: how one of them is named, and four.
      bandwidth: of its main memory, in bytes a second.
      clock: of its cores, in Hz.
      peaks: operations a second in matrix products by the kind of their factors.
    """

    name: str
    title: str
    platform: str
    topology: tuple[str, str]
    bandwidth: float
    clock: float
    peaks: Mapping[str, float]

    def devices(self, count: int = 1) -> Sequence[Any]:
        """One device or four."""
        return _devices(self, count)[:count]

    def mesh(self) -> jax.sharding.Mesh:
        """Four devices along an axis "a"."""
        return jax.sharding.Mesh(np.array(self.devices(4)), ("a",))

    def missing(self) -> str | None:
        """Why nothing can be compiled for it here, in one sentence; None if it can."""
        modules = {"cuda": ("jax_cuda12_plugin", "nvidia.cuda_nvcc"), "tpu": ("libtpu",)}
        for module in modules[self.platform]:
            if not _is_installed(module):
                return f"{module} is not installed, which compiles for {self.title}: extra 'aot'"
        return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _gpu(name: str, title: str, bandwidth: float, clock: float, *peaks: float) -> Target:
    half, single, exact = peaks
    of = {"bf16": half, "f16": half, "f32": single, "f32 exact": exact}
    return Target(name, title, "cuda", ("1x1x1", "1x1x4"), bandwidth, clock, of)


def _tpu(name: str, title: str, topology: str, bandwidth: float, clock: float, peak: float):
    """A float32 factor is rounded to bfloat16 unless it is to be exact, in 6 products of parts."""
    of = {"bf16": peak, "f32": peak, "f32 exact": peak / 6}
    return Target(name, title, "tpu", (topology, topology), bandwidth, clock, of)


# From the makers' data sheets; float32 on a GPU is TF32, as JAX has it unless it is to be exact.
TARGETS = {
    target.name: target
    for target in (
        _gpu("h100", "H100", 3.352e12, 1.98e9, 989e12, 495e12, 67e12),
        _gpu("a100", "A100", 2.039e12, 1.41e9, 312e12, 156e12, 19.5e12),
        _tpu("v5e", "TPU v5e", "v5e:2x2", 0.819e12, 1.5e9, 197e12),
        _tpu("v5p", "TPU v5p", "v5p:2x2x1", 2.765e12, 1.75e9, 459e12),
        _tpu("v6e", "TPU v6e", "v6e:2x2", 1.64e12, 1.75e9, 918e12),
    )
}


@functools.cache
def _devices(target: Target, count: int) -> Sequence[Any]:
    if jax.default_backend() == "cpu":
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    topology = target.topology[count > 1]
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    description = (_DESCRIPTIONS / f"{target.name}.txtpb").read_text()
    return topologies.get_topology_desc(
        target.name, "cuda", target_config=description, topology=topology
    ).devices


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is known of a program that was compiled for a device that is not there.

    Attributes:
      kernels: how many different ones it has.
      launches: how often one is started.
      traffic: bytes from and to the main memory.
      flops: those of matrix products by the kind of their factors.
      waits: how often the processor waits for a number before it can go on; none on a TPU, which
        needs no other.
      memory: bytes beside arguments and results.
      compile: seconds to trace, lower and compile it.
      estimate: seconds that it would take.
    """

    kernels: int
    launches: int
    traffic: float
    flops: Mapping[str, float]
    waits: int
    memory: int
    compile: float
    estimate: float


def compiled(
    function: Callable[..., Any],
    args: Sequence[Any],
    target: Target,
    over: Any = None,
) -> Any:
    """The executable.

    Args:
      function: what is compiled.
      args: arrays or their shapes, in any trees.
      target: for what.
      over: how the arguments, or each of them, are spread over four devices, an axis "a"; by
        default there is one.
    """
    if over is None:
        shardings = jax.sharding.SingleDeviceSharding(target.devices()[0])
    else:
        spread = functools.partial(jax.sharding.NamedSharding, target.mesh())
        shardings = jax.tree.map(spread, over)

    def placed(sharding: Any, args: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )

    shapes = jax.tree.map(placed, shardings, args)
    with _nothing_kept():
        return jax.jit(function).lower(*shapes).compile()


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Without JAX's cache on disk, which does not give back what is for a device that is not there.

    Whether there is a cache is found out once, so it has to forget that too.
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def figures(
    function: Callable[..., Any],
    args: Sequence[Any],
    target: Target,
    passes: int = SOLVER_PASSES,
    over: Any = None,
) -> Figures:
    """Compiles a function and reads what it does on a device.

    Args:
      function: what is compiled.
      args: arrays or their shapes, in any trees.
      target: for what.
      passes: how often a loop is gone through whose number of passes is not known before.
      over: as `compiled` takes it.
    """
    start = time.perf_counter()
    executable = compiled(function, args, target, over)
    seconds = time.perf_counter() - start
    program = kernels.read(executable.as_text(), passes)
    return Figures(
        kernels=sum(not k.is_copy for k in program.kernels),
        launches=sum(k.times for k in program.kernels if not k.is_copy),
        traffic=sum(k.bytes * k.times for k in program.kernels),
        flops=kernels.total_flops(program.kernels),
        waits=program.waits if target.platform == "cuda" else 0,
        memory=executable.memory_analysis().temp_size_in_bytes,
        compile=seconds,
        estimate=estimate(program.kernels, target),
    )


def estimate(program: Sequence[Kernel], target: Target) -> float:
    """Seconds: one kernel after the other, copies beside them, no byte above the bandwidth."""
    computing = sum(_seconds(k, target) * k.times for k in program if not k.is_copy)
    moving = sum(k.bytes * k.times for k in program) / target.bandwidth
    return max(computing, moving)


def _seconds(kernel: Kernel, target: Target) -> float:
    """The greatest of what its bytes, its products and its cycles take."""
    products = sum(count / target.peaks[kind] for kind, count in kernel.flops.items())
    return max(kernel.bytes / target.bandwidth, products, kernel.cycles / target.clock)
