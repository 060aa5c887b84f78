"""What a compiled program does: kernels, how often they run, bytes and matrix products."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks import hlo
from benchmarks.hlo import Computation, Instruction, Module

# They start nothing: names of what is there, what runs other computations, and ends of copies.
_NO_KERNEL = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|"
    "partition-id|replica-id|opt-barrier|add-dependency|domain|.*-start|.*-update|.*-done"
)
# Of what is none of these, a number takes the operand's number at one place, if both have as many.
_MIXES = re.compile("dot|convolution|reduce-window|sort|custom-call|gather|scatter|fft|while")
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# They change an operand, the first, where it is; and which operand holds what is new.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is started at once, and how often.

    Attributes:
      name: that of its instruction.
      opcode: what it is.
      times: how often it runs.
      bytes: what it reads from the main memory and writes to it, each time.
      flops: those of its matrix products by the kind of their factors, each time.
      cycles: what the compiler thinks that it takes each time; 0 if it does not say.
      is_copy: whether it moves bytes while others compute.
    """

    name: str
    opcode: str
    times: int
    bytes: float
    flops: Mapping[str, float]
    cycles: float = 0.0
    is_copy: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """All that a compiled program does.

    Attributes:
      kernels: all of them.
      waits: how often a number has to be known before it is clear what runs next.
    """

    kernels: Sequence[Kernel]
    waits: int


def total_flops(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Those of all matrix products, by the kind of their factors."""
    total: dict[str, float] = {}
    for kernel in kernels:
        for kind, count in kernel.flops.items():
            total[kind] = total.get(kind, 0.0) + count * kernel.times
    return total


def read(text: str, passes: int) -> Program:
    """What a program does, given `compiled.as_text()`.

    Args:
      text: the program.
      passes: how often a loop is gone through whose number of passes is not known before.
    """
    module = hlo.parse(text)
    reader = Reader(module, passes)
    return Program(list(reader.kernels(module.entry)), reader.waits)


class Reader:
    """Goes through computations as they would run."""

    def __init__(self, module: Module, passes: int):
        self._module, self._passes, self.waits = module, passes, 0

    def kernels(self, computation: Computation, times: int = 1) -> Iterator[Kernel]:
        """Those of a computation and of what it runs."""
        for instruction in computation.instructions.values():
            yield from self.kernels_of(computation, instruction, times)

    def kernels_of(self, computation, instruction: Instruction, times: int = 1) -> Iterator[Kernel]:
        """Those of one instruction."""
        opcode = instruction.opcode
        if opcode == "while":
            yield from self._loop(computation, instruction, times)
        elif opcode == "conditional":
            yield from self._choice(instruction, times)
        elif opcode in ("call", "async-start"):  # the latter on another stream
            for name in instruction.runs():
                yield from self.kernels(self._module.computations[name], times)
        elif opcode.endswith("-start"):
            moved = _moved(computation, instruction)
            yield Kernel(instruction.name, opcode, times, moved, {}, is_copy=True)
        elif _is_kernel(instruction):
            yield self._kernel(computation, instruction, times)

    def _loop(self, computation, loop: Instruction, times: int) -> Iterator[Kernel]:
        trips = self._module.trips(computation, loop)
        if trips is None:
            trips = self._passes
            self.waits += times * (trips + 1)
        yield from self.kernels(self._module.run_by(loop, "body"), times * trips)
        yield from self.kernels(self._module.run_by(loop, "condition"), times * (trips + 1))

    def _choice(self, instruction: Instruction, times: int) -> Iterator[Kernel]:
        """The branch that moves the most bytes."""
        self.waits += times
        names = instruction.runs("true_computation|false_computation|branch_computations")
        branches = [list(self.kernels(self._module.computations[name], times)) for name in names]
        return iter(max(branches, key=lambda kernels: sum(k.bytes * k.times for k in kernels)))

    def _kernel(self, computation, instruction: Instruction, times: int) -> Kernel:
        if instruction.opcode == "fusion":
            fused = self._module.run_by(instruction)
        else:
            fused = _alone(computation, instruction)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        return Kernel(
            instruction.name,
            instruction.opcode,
            times,
            self._read(computation, instruction, fused) + _written(fused),
            self._flops(fused),
            float(cycles[1]) if cycles else 0.0,
        )

    def _read(self, computation, instruction: Instruction, fused: Computation) -> float:
        needed = self._needed(fused)
        total = 0.0
        for i, name in enumerate(instruction.operands):
            operand = computation.instructions[name]
            if operand.bytes:
                total += operand.bytes * needed[fused.parameter(i).name] / operand.size
        return total

    def _needed(self, fused: Computation) -> dict[str, int]:
        """How many numbers of each instruction it takes for what the computation gives."""
        needed = dict.fromkeys(fused.instructions, 0) | {fused.root.name: fused.root.size}
        for user in reversed(fused.instructions.values()):
            for index, name in enumerate(user.operands):
                more = self._needed_by(fused, user, index, needed[user.name])
                needed[name] = min(needed[name] + more, fused.instructions[name].size)
        return needed

    def _needed_by(self, fused: Computation, user: Instruction, index: int, needed: int) -> int:
        """How many numbers of an operand it takes for as many as are needed of the result."""
        operand = fused.operand(user, index)
        if not needed:
            return 0
        if user.opcode == "fusion":
            within = self._module.run_by(user)
            return self._needed(within)[within.parameter(index).name]
        if user.opcode in _SLICES and index == 0:
            return needed
        if user.opcode in _UPDATES and index == 0 and _is_in_place(fused, user):
            # A scatter adds to what is there.
            return fused.operand(user, 2).size if user.opcode == "scatter" else 0
        if user.size == operand.size and not _MIXES.fullmatch(user.opcode):
            return needed
        return operand.size

    def _flops(self, fused: Computation) -> dict[str, float]:
        found: dict[str, float] = {}
        for instruction in fused.instructions.values():
            if instruction.opcode == "fusion":
                of = self._flops(self._module.run_by(instruction))
            else:
                of = _products(fused, instruction)
            for kind, count in of.items():
                found[kind] = found.get(kind, 0.0) + count
        return found


def _is_kernel(instruction: Instruction) -> bool:
    if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return False
    # Arrays of a TPU have tiles. Its scalar unit does a scalar's work on its way.
    is_scalar_of_tpu = all(not a.sizes and ":T(" in a.layout for a in instruction.arrays)
    if is_scalar_of_tpu and instruction.opcode != "fusion":
        return False
    return not _NO_KERNEL.fullmatch(instruction.opcode)


def _moved(computation: Computation, start: Instruction) -> float:
    """Bytes that a copy, of a part too, or a collective reads and writes."""
    end = computation.end(start)
    operands = [computation.instructions[name] for name in start.operands]
    size = sum(operand.size for operand in operands)
    return end.bytes + sum(o.bytes for o in operands) * min(1.0, end.size / size)


def _alone(computation: Computation, instruction: Instruction) -> Computation:
    """A fusion of this one instruction."""
    parameters = [
        dataclasses.replace(
            computation.instructions[name],
            name=f"parameter {i}",
            opcode="parameter",
            operands=(),
            number=i,
        )
        for i, name in enumerate(instruction.operands)
    ]
    root = dataclasses.replace(instruction, operands=tuple(p.name for p in parameters))
    return Computation("", {i.name: i for i in (*parameters, root)}, root)


def _written(fused: Computation) -> float:
    """Bytes that a fusion writes; of what it changes in place, only what changes."""
    root = fused.root
    results = [fused.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return sum(_written_as(fused, result) for result in results)


def _written_as(fused: Computation, result: Instruction) -> float:
    update = fused.source(result, frozenset({"bitcast", "reshape", "copy"}))
    if update.opcode in _UPDATES and _is_in_place(fused, update):
        new = fused.operand(update, _UPDATES[update.opcode])
        return result.bytes * new.size / update.size
    return result.bytes


def _is_in_place(fused: Computation, update: Instruction) -> bool:
    """Whether it changes what the fusion is given."""
    changed = fused.source(fused.operand(update), frozenset({"bitcast", "reshape"}))
    return changed.opcode == "parameter"


def _products(fused: Computation, instruction: Instruction) -> dict[str, float]:
    """Twice the products that a matrix product adds up, by the kind of its factors."""
    if instruction.opcode == "dot":
        count = _of_dot(fused, instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
    elif instruction.opcode == "convolution":
        count = _of_convolution(fused, instruction)
    elif 'custom_call_target="__cublas$' in instruction.attributes:
        count = _of_dot(fused, instruction, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    else:
        return {}
    return {_kind(fused, instruction): count}


def _kind(fused: Computation, instruction: Instruction) -> str:
    """The wider type of the factors, and whether float32 is multiplied exactly."""
    dtypes = [fused.operand(instruction, i).arrays[0].dtype for i in (0, 1)]
    exact = re.search(r"operand_precision\W+highest", instruction.attributes, re.IGNORECASE)
    return max(dtypes, key=hlo.bits) + (" exact" if exact else "")


def _of_dot(fused: Computation, instruction: Instruction, contracted: str) -> float:
    first = fused.operand(instruction).arrays[0]
    axes = hlo.sizes_in(contracted, instruction.attributes)
    return 2.0 * instruction.arrays[0].size * math.prod(first.sizes[axis] for axis in axes)


def _of_convolution(fused: Computation, instruction: Instruction) -> float:
    """What a TPU makes of a matrix product.

    An axis of a batch is a window as long as the axis, so far apart that one entry of each meets
    an entry of the array, and the others what fills it up.
    """
    text = instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if labels is None:
        raise ValueError(f"a convolution must have dim_labels, got {text!r}")
    arrays = [fused.operand(instruction, 0), fused.operand(instruction, 1), instruction]
    first, second, out = (
        dict(zip(label, array.arrays[0].sizes, strict=True))
        for label, array in zip(labels.groups(), arrays, strict=True)
    )
    count = 2.0 * out["b"] * out["f"] * second["i"]
    for axis in sorted(set(out) - {"b", "f"}):
        count *= _meetings(first[axis], second[axis], out[axis], _window(text, int(axis)))
    return count


def _window(text: str, axis: int) -> dict[str, str]:
    """What is said of a window along one axis."""
    window = re.search(r"window=\{([^}]*)\}", text)
    parts = [part.split("=") for part in window[1].split()] if window else []
    return {key: values.split("x")[axis] for key, values in parts}


def _meetings(first: int, second: int, out: int, window: Mapping[str, str]) -> int:
    """How often an entry of the window meets one of the array, at all its places."""
    stride, apart, within = (
        int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    places = (
        at * stride + entry * within - before
        for at, entry in itertools.product(range(out), range(second))
    )
    return sum(place % apart == 0 and 0 <= place // apart < first for place in places)
