"""What crosses devices, read from a compiled program."""

import dataclasses
import re

from benchmarks import hlo
from benchmarks.hlo import Computation, Instruction, Module
from benchmarks.kernels import Reader, total_flops

_KINDS = re.compile(
    "(?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?P<start>-start)?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation in which devices take part together.

    Attributes:
      kind: its name in HLO.
      sizes: how many numbers each of its results has, on one device; several if it is fused.
      passes: how often it runs; None in a loop that runs until it is done.
      in_loop: whether it is in a loop.
      meanwhile: FLOPs of matrix products from its start to its end.
    """

    kind: str
    sizes: tuple[int, ...]
    passes: int | None
    in_loop: bool = False
    meanwhile: float = 0.0

    @property
    def size(self) -> int:
        """How many numbers it gives to each device."""
        return sum(self.sizes)


def collectives(text: str) -> list[Collective]:
    """All collective operations of a compiled program, given `compiled.as_text()`."""
    module = hlo.parse(text)
    trips = _trips(module)
    return [
        _collective(module, computation, instruction, match, trips)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if (match := _KINDS.fullmatch(instruction.opcode))
    ]


def _trips(module: Module) -> dict[str, int | None]:
    """How often loops are gone through, by the names of their bodies."""
    return {
        module.run_by(loop, "body").name: module.trips(computation, loop)
        for computation in module.computations.values()
        for loop in computation.instructions.values()
        if loop.opcode == "while"
    }


def _collective(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    match: re.Match[str],
    trips: dict[str, int | None],
) -> Collective:
    end, meanwhile = instruction, 0.0
    if match["start"]:
        end = computation.end(instruction)
        meanwhile = _between(module, computation, instruction, end)
    name = computation.name
    return Collective(
        match["kind"],
        tuple(array.size for array in end.arrays),
        trips.get(name, 1),
        name in trips,
        meanwhile,
    )


def _between(module, computation: Computation, start: Instruction, end: Instruction) -> float:
    """FLOPs of matrix products after one instruction and before another."""
    order = list(computation.instructions.values())
    reader = Reader(module, passes=1)
    between = order[order.index(start) + 1 : order.index(end)]
    kernels = (k for i in between for k in reader.kernels_of(computation, i))
    return sum(total_flops(kernels).values())
