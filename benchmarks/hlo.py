"""What a compiled program does, read from its text: kernels, bytes, matrix products, loops.

The text is what `compiled.as_text()` gives after all of XLA's passes: what is left of it runs as
it is written. A program is a tree of computations: loops, branches and calls run others.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](?:\{(?P<layout>[^{}]*)\})?")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_REFERENCE = re.compile(r"%([\w.\-]+)")

# They cost nothing by themselves: names of what is there, or what runs something else.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier add-dependency domain async-start async-update async-done "
    "copy-start copy-done all-reduce-done all-gather-done collective-permute-done send-done "
    "recv-done reshape".split()
)
# Each of their results needs one number of the operand at the same place, or moves it.
_ONE_FOR_ONE = frozenset(
    "bitcast reshape transpose copy convert add subtract multiply divide maximum minimum power "
    "compare select and or not xor negate abs exponential log exponential-minus-one log-plus-one "
    "logistic tanh sqrt rsqrt cbrt floor ceil sign round-nearest-even round-nearest-afz is-finite "
    "clamp bitcast-convert shift-left shift-right-logical shift-right-arithmetic reverse".split()
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_SAME_PLACE = frozenset({"bitcast", "reshape", "copy", "convert", "transpose"})


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as it lies in memory.

    Attributes:
      dtype: as HLO names it.
      sizes: of its axes.
      layout: the order of its axes, its tiles, and its memory if that is not the main one.
    """

    dtype: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """How many it takes in the main memory, with what fills up its tiles; 0 elsewhere."""
        if "S(" in self.layout and "S(0)" not in self.layout:
            return 0.0
        return math.prod(self._padded()) * bits(self.dtype) / 8

    def _padded(self) -> Sequence[int]:
        tile = re.search(r":T\(([\d,]+)\)", self.layout)
        if not tile or not self.sizes:
            return self.sizes
        order = [int(axis) for axis in self.layout.partition(":")[0].split(",")]
        sizes = [self.sizes[axis] for axis in order]  # the fastest first
        for i, multiple in enumerate(map(int, reversed(tile[1].split(",")))):
            if i < len(sizes) and sizes[i] > 1:
                sizes[i] = math.ceil(sizes[i] / multiple) * multiple
        return sizes


def bits(dtype: str) -> int:
    """Of one number; of what is no number, none."""
    width = _BITS.search(dtype)
    return 8 if dtype == "pred" else int(width[0]) if width else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name.
      opcode: what it does.
      arrays: its results.
      operands: names of others of the same computation.
      rest: its attributes, as text.
      number: of a parameter, which one it is; of a constant that is one integer, that.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    number: int | None = None

    def called(self, role: str = r"calls|to_apply|called_computations") -> list[str]:
        """Names of the computations that it runs in this role."""
        found = re.findall(rf"\b(?:{role})=(?:%([\w.\-]+)|\{{([^}}]*)\}})", self.rest)
        return [
            name for one, many in found for name in ([one] if one else _REFERENCE.findall(many))
        ]

    @property
    def size(self) -> int:
        """How many numbers its results hold."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> float:
        """How many of the main memory its results take."""
        return sum(array.bytes for array in self.arrays)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run.

    Attributes:
      name: its name.
      instructions: by name.
      root: what it gives.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    @functools.cached_property
    def users(self) -> Mapping[str, Sequence[Instruction]]:
        """Who takes the result of an instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    def parameter(self, number: int) -> Instruction:
        """One of what it is given."""
        return next(
            i for i in self.instructions.values() if i.opcode == "parameter" and i.number == number
        )

    def operand(self, instruction: Instruction, index: int = 0) -> Instruction:
        """What an instruction takes."""
        return self.instructions[instruction.operands[index]]

    def source(self, instruction: Instruction) -> Instruction:
        """Where the numbers of an instruction come from that only moves them."""
        while instruction.opcode in _SAME_PLACE:
            instruction = self.operand(instruction)
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations, entry, header, lines = {}, None, None, []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            header, lines = match, []
        elif header and line.startswith("}"):
            computations[header["name"]] = _computation(header["name"], lines)
            if header["entry"]:
                entry = computations[header["name"]]
            header = None
        elif header and (match := _LINE.match(line)):
            lines.append(match)
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, entry)


def _computation(name: str, lines: Sequence[re.Match[str]]) -> Computation:
    instructions = {line["name"]: _instruction(line["name"], line["rest"]) for line in lines}
    root = next((line["name"] for line in lines if line["root"]), lines[-1]["name"])
    return Computation(name, instructions, instructions[root])


def _instruction(name: str, text: str) -> Instruction:
    shapes, text = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, text = text.strip().partition("(")
    inner, rest = _balanced(f"({text}")
    arrays = tuple(
        Array(a["dtype"], tuple(int(n) for n in re.findall(r"\d+", a["sizes"])), a["layout"] or "")
        for a in _ARRAY.finditer(shapes)
    )
    plain = re.fullmatch(r"\((-?\d+)\)", inner)
    number = int(plain[1]) if plain and opcode in ("parameter", "constant") else None
    operands = () if opcode == "constant" else tuple(_REFERENCE.findall(inner))
    return Instruction(name, opcode, arrays, operands, rest, number)


def _balanced(text: str) -> tuple[str, str]:
    """What is within the first parentheses, with them, and what follows."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is started at once, and how often.

    Attributes:
      name: of its instruction.
      opcode: what it is.
      times: how often it runs.
      bytes: what it reads from the main memory and writes to it, once.
      flops: those of its matrix products by the kind of their factors, once.
      cycles: what the compiler thinks that it takes, once; 0 if it does not say.
      is_copy: whether it only moves bytes while others compute.
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
      waits: how often the processor has to know a number before it can go on.
    """

    kernels: Sequence[Kernel]
    waits: int


def read(text: str, passes: int) -> Program:
    """What `compiled.as_text()` does.

    Args:
      text: the program.
      passes: how often a loop is gone through whose number of passes is not known before.
    """
    module = parse(text)
    reader = _Reader(module, passes)
    return Program(list(reader.run(module.entry, 1)), reader.waits)


class _Reader:
    def __init__(self, module: Module, passes: int):
        self._module, self._passes, self.waits = module, passes, 0

    def run(self, computation: Computation, times: int) -> Iterator[Kernel]:
        """The kernels of a computation, of what it runs, and of what that runs."""
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._loop(computation, instruction, times)
            elif opcode == "conditional":
                self.waits += times
                yield from self._dearest(instruction, times)
            elif opcode in ("call", "async-start"):
                for name in instruction.called():
                    yield from self.run(self._module.computations[name], times)
            elif opcode == "copy-start":
                read = computation.operand(instruction).bytes
                yield Kernel(
                    instruction.name,
                    opcode,
                    times,
                    read + instruction.arrays[0].bytes,
                    {},
                    is_copy=True,
                )
            elif _is_kernel(instruction):
                yield self._kernel(computation, instruction, times)

    def _loop(self, computation, instruction: Instruction, times: int) -> Iterator[Kernel]:
        trips = trip_count(self._module, computation, instruction)
        if trips is None:
            trips = self._passes
            self.waits += times * (trips + 1)
        (condition,) = instruction.called("condition")
        (body,) = instruction.called("body")
        yield from self.run(self._module.computations[body], times * trips)
        yield from self.run(self._module.computations[condition], times * (trips + 1))

    def _dearest(self, instruction: Instruction, times: int) -> Iterator[Kernel]:
        """Of several branches the one that moves the most bytes."""
        names = instruction.called("true_computation|false_computation|branch_computations")
        branches = [list(self.run(self._module.computations[name], times)) for name in names]
        return iter(max(branches, key=lambda kernels: sum(k.bytes * k.times for k in kernels)))

    def _kernel(self, computation: Computation, instruction: Instruction, times: int) -> Kernel:
        fused = None
        if instruction.opcode == "fusion":
            fused = self._module.computations[instruction.called()[0]]
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        return Kernel(
            instruction.name,
            instruction.opcode,
            times,
            self._bytes(computation, instruction, fused),
            self._flops(computation, instruction, fused),
            float(cycles[1]) if cycles else 0.0,
        )

    def _bytes(self, computation, instruction: Instruction, fused: Computation | None) -> float:
        operands = [computation.instructions[name] for name in instruction.operands]
        if fused is None:
            fused, operands = _alone(computation, instruction)
        total = _written(fused)
        for i, operand in enumerate(operands):
            if operand.bytes:
                parameter = fused.parameter(i)
                share = self._demand(fused, parameter) / max(parameter.size, 1)
                total += share * operand.bytes
        return total

    def _demand(self, computation: Computation, instruction: Instruction) -> int:
        """How many of an instruction's numbers the root of its computation takes."""
        if instruction is computation.root:
            return instruction.size
        total = 0
        for user in computation.users[instruction.name]:
            for index, name in enumerate(user.operands):
                if name == instruction.name:
                    total += self._demand_of(computation, user, index, instruction)
        return min(total, instruction.size)

    def _demand_of(self, computation, user: Instruction, index: int, operand: Instruction) -> int:
        opcode = user.opcode
        if opcode == "fusion":
            inner = self._module.computations[user.called()[0]]
            return self._demand(inner, inner.parameter(index))
        if opcode in _SLICES and index == 0:
            return self._demand(computation, user)
        if opcode in ("dynamic-update-slice", "scatter") and index == 0:
            if _is_in_place(computation, user):
                return 0 if opcode != "scatter" else computation.operand(user, 2).size
            return operand.size
        if opcode in _ONE_FOR_ONE and user.size == operand.size:
            return self._demand(computation, user)
        return operand.size

    def _flops(self, computation, instruction: Instruction, fused) -> dict[str, float]:
        found: dict[str, float] = {}
        lines = [(computation, instruction)] if fused is None else self._within(fused)
        for where, line in lines:
            if (count := _products(where, line)) is not None:
                kind = _kind(where, line)
                found[kind] = found.get(kind, 0.0) + count
        return found

    def _within(self, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
        for line in computation.instructions.values():
            if line.opcode == "fusion":
                yield from self._within(self._module.computations[line.called()[0]])
            else:
                yield computation, line


def _is_kernel(instruction: Instruction) -> bool:
    if 'custom_call_target="AllocateBuffer"' in instruction.rest:
        return False
    # A scalar beside tiles is that of a TPU, whose scalar unit does it on its way.
    on_scalar_unit = instruction.opcode != "fusion" and all(
        not array.sizes and ":T(" in array.layout for array in instruction.arrays
    )
    return instruction.opcode not in _FREE and not on_scalar_unit


def _alone(computation, instruction: Instruction) -> tuple[Computation, list[Instruction]]:
    """One instruction as if it were a fusion of nothing else."""
    operands = [computation.instructions[n] for n in dict.fromkeys(instruction.operands)]
    parameters = {
        o.name: dataclasses.replace(o, opcode="parameter", operands=(), number=i)
        for i, o in enumerate(operands)
    }
    return Computation("", parameters | {instruction.name: instruction}, instruction), operands


def _written(fused: Computation) -> float:
    """Bytes that the root of a fusion writes; of what it changes in place, what changes."""
    root = fused.root
    parts = [fused.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return sum(_written_by(fused, part) for part in parts)


def _written_by(fused: Computation, part: Instruction) -> float:
    update = part
    while update.opcode in ("bitcast", "reshape", "copy"):
        update = fused.operand(update)
    if update.opcode in ("dynamic-update-slice", "scatter") and _is_in_place(fused, update):
        index = 1 if update.opcode == "dynamic-update-slice" else 2
        return part.bytes * fused.operand(update, index).size / max(update.size, 1)
    return part.bytes


def _is_in_place(computation: Computation, update: Instruction) -> bool:
    """Whether it changes what the fusion is given, which is not needed as it was any more."""
    operand = computation.operand(update)
    while operand.opcode in ("bitcast", "reshape"):
        operand = computation.operand(operand)
    return operand.opcode == "parameter"


def _products(computation: Computation, line: Instruction) -> float | None:
    """Twice the number of products in a matrix product, or None of anything else."""
    if line.opcode == "dot":
        lhs = computation.operand(line).arrays[0]
        return 2.0 * line.size * _contracted(lhs, line.rest, r"lhs_contracting_dims=\{([\d,]*)\}")
    if line.opcode == "convolution":
        return _of_convolution(computation, line)
    if line.opcode == "custom-call" and "__cublas$" in line.rest:
        lhs = computation.operand(line).arrays[0]
        pattern = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
        return 2.0 * line.arrays[0].size * _contracted(lhs, line.rest, pattern)
    return None


def _contracted(lhs: Array, text: str, pattern: str) -> int:
    axes = re.search(pattern, text)
    return math.prod(lhs.sizes[int(n)] for n in re.findall(r"\d+", axes[1] if axes else ""))


def _of_convolution(computation: Computation, line: Instruction) -> float:
    """A matrix product on a TPU: batches are windows that meet one place of the other each."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    lhs, rhs = (computation.operand(line, i).arrays[0].sizes for i in (0, 1))
    out = line.arrays[0].sizes
    assert labels
    of_lhs, of_rhs, of_out = labels[1], labels[2], labels[3]
    count = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]
    window = _window(line.rest)
    for axis in sorted(set(of_out) - {"b", "f"}):
        i = int(axis)
        values = {key: value.split("x")[i] for key, value in window.items()}
        count *= _meetings(
            lhs[of_lhs.index(axis)],
            rhs[of_rhs.index(axis)],
            out[of_out.index(axis)],
            int(values.get("stride", 1)),
            int(values.get("pad", "0_0").split("_")[0]),
            int(values.get("lhs_dilate", 1)),
            int(values.get("rhs_dilate", 1)),
        )
    return count


def _window(text: str) -> dict[str, str]:
    found = re.search(r"window=\{([^}]*)\}", text)
    return dict(part.split("=") for part in found[1].split()) if found else {}


def _meetings(lhs, rhs, out, stride, pad, lhs_dilate, rhs_dilate) -> int:
    """How often a window's entry meets one of the array and not what fills it up."""
    places = (
        o * stride + r * rhs_dilate - pad for o, r in itertools.product(range(out), range(rhs))
    )
    return sum(place % lhs_dilate == 0 and 0 <= place // lhs_dilate < lhs for place in places)


def _kind(computation: Computation, line: Instruction) -> str:
    """Of the factors: the wider type, and whether float32 is multiplied as such."""
    dtypes = [computation.instructions[name].arrays[0].dtype for name in line.operands[:2]]
    exact = re.search(r"operand_precision\W+highest", line.rest, re.IGNORECASE)
    return max(dtypes, key=bits) + (" exact" if exact else "")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop is gone through, if that is known before it begins."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    (condition_name,) = loop.called("condition")
    (body_name,) = loop.called("body")
    condition, body = module.computations[condition_name], module.computations[body_name]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter = condition.source(condition.operand(test, 0))
    limit = condition.source(condition.operand(test, 1)).number
    if counter.opcode != "get-tuple-element" or limit is None:
        return None
    index = _index(counter)
    start = computation.source(computation.operand(loop))
    if start.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    first = computation.source(computation.operand(start, index)).number
    step = _step(module, body, body.operand(body.root, index), index)
    return None if first is None or step is None else math.ceil((limit - first) / step)


def _index(element: Instruction) -> int:
    match = re.search(r"index=(\d+)", element.rest)
    assert match
    return int(match[1])


def _step(module: Module, body: Computation, result: Instruction, index: int) -> int | None:
    """What a pass adds to the counter, if it does nothing else with it."""
    result = body.source(result)
    where, outer = body, None
    if result.opcode == "fusion":
        where, outer = module.computations[result.called()[0]], result
        result = where.source(where.root)
    if result.opcode != "add":
        return None
    ends = [where.source(where.operand(result, i)) for i in (0, 1)]
    step = next((e.number for e in ends if e.opcode == "constant"), None)
    count = next((e for e in ends if e.opcode != "constant"), None)
    if count is not None and outer is not None and count.opcode == "parameter":
        count = body.source(body.operand(outer, count.number or 0))
    is_counter = (
        count is not None and count.opcode == "get-tuple-element" and _index(count) == index
    )
    return step if is_counter else None
