"""The text of a compiled program, `compiled.as_text()`, as computations of instructions.

It is what is left after all passes of XLA, and runs as it is written. Loops, branches, fusions and
calls run other computations of the same text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,<=]*)\](?:\{(?P<layout>[^{}]*)\})?")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<text>.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
# They move numbers, or name them again.
_MOVES = frozenset({"bitcast", "reshape", "copy", "convert", "transpose"})


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
        """How many it takes of the main memory, with what fills up its tiles; none elsewhere."""
        elsewhere = re.search(r"S\([^0]", self.layout)
        return 0.0 if elsewhere else math.prod(self._filled_up()) * bits(self.dtype) / 8

    def _filled_up(self) -> Sequence[int]:
        tile = re.search(r":T\(([\d,]+)\)", self.layout)
        if not tile or not self.sizes:
            return self.sizes
        order = [int(axis) for axis in self.layout.partition(":")[0].split(",")]
        sizes = [self.sizes[axis] for axis in order]  # the one of neighbours first
        multiples = [int(n) for n in reversed(tile[1].split(","))]
        for i, multiple in enumerate(multiples[: len(sizes)]):
            sizes[i] = math.ceil(sizes[i] / multiple) * multiple
        return sizes


def bits(dtype: str) -> int:
    """Those of one number; none of what is no number."""
    width = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(width[0]) if width else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name.
      opcode: what it does.
      arrays: its results.
      operands: names of others of its computation.
      attributes: what else is said of it, as text.
      number: which parameter it is, or the value of a constant that is one integer.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    number: int | None = None

    @property
    def size(self) -> int:
        """How many numbers its results hold."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> float:
        """How many bytes of the main memory its results take."""
        return sum(array.bytes for array in self.arrays)

    @property
    def constant(self) -> int | None:
        """The integer that it is."""
        return self.number if self.opcode == "constant" else None

    @property
    def index(self) -> int:
        """Which of a tuple it gets."""
        return int(_found(r"index=(\d+)", self.attributes)[1])

    def runs(self, role: str = "calls|to_apply|called_computations") -> list[str]:
        """Names of the computations that it runs in this role."""
        found = re.findall(rf"\b(?:{role})=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return [name for names in found for name in _NAME.findall(names)]


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
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return next(i for i in found if i.number == number)

    def operand(self, instruction: Instruction, index: int = 0) -> Instruction:
        """What an instruction takes."""
        return self.instructions[instruction.operands[index]]

    def end(self, start: Instruction) -> Instruction:
        """Where what an instruction has started is waited for."""
        return next(user for user in self.users[start.name] if user.opcode.endswith("-done"))

    def source(self, instruction: Instruction, moves: frozenset[str] = _MOVES) -> Instruction:
        """Where the numbers of an instruction come from that only moves them."""
        while instruction.opcode in moves:
            instruction = self.operand(instruction)
        return instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name.
      entry: the one that runs the others.
    """

    computations: Mapping[str, Computation]
    entry: Computation

    def run_by(self, instruction: Instruction, role: str = "calls") -> Computation:
        """The one computation that an instruction runs in this role."""
        (name,) = instruction.runs(role)
        return self.computations[name]

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop of a computation is gone through, if that is known before."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = self.run_by(loop, "condition"), self.run_by(loop, "body")
        start = computation.source(computation.operand(loop))
        if "direction=LT" not in condition.root.attributes or start.opcode != "tuple":
            return None
        counter, limit = (condition.source(condition.operand(condition.root, i)) for i in (0, 1))
        if counter.opcode != "get-tuple-element" or limit.constant is None:
            return None
        first = computation.source(computation.operand(start, counter.index)).constant
        step = self._step(body, counter.index)
        return math.ceil((limit.constant - first) / step) if first is not None and step else None

    def _step(self, body: Computation, index: int) -> int | None:
        """What a pass adds to the counter, if it does nothing else to it."""
        if body.root.opcode != "tuple":
            return None
        result = body.source(body.operand(body.root, index))
        where, fusion = body, result if result.opcode == "fusion" else None
        if fusion:
            where = self.run_by(fusion)
            result = where.source(where.root)
        if result.opcode != "add":
            return None
        ends = [where.source(where.operand(result, i)) for i in (0, 1)]
        if fusion:  # what it is given
            ends = [
                body.source(body.operand(fusion, end.number or 0))
                if end.opcode == "parameter"
                else end
                for end in ends
            ]
        steps = [end.constant for end in ends if end.constant is not None]
        counters = [e for e in ends if e.opcode == "get-tuple-element" and e.index == index]
        return steps[0] if steps and counters else None


def parse(text: str) -> Module:
    """Reads the text of a program."""
    computations: dict[str, Computation] = {}
    entry, header, lines = "", None, []
    for line in text.splitlines():
        if header is None:
            header, lines = _HEADER.match(line), []
        elif line.startswith("}"):
            computations[header["name"]] = _computation(header["name"], lines)
            entry = header["name"] if header["entry"] else entry
            header = None
        elif match := _LINE.match(line):
            lines.append(match)
    return Module(computations, computations[entry])


def _computation(name: str, lines: Sequence[re.Match[str]]) -> Computation:
    instructions = {line["name"]: _instruction(line["name"], line["text"]) for line in lines}
    root = next((line["name"] for line in lines if line["root"]), lines[-1]["name"])
    return Computation(name, instructions, instructions[root])


def _instruction(name: str, text: str) -> Instruction:
    shapes, text = _within_parentheses(text) if text[0] == "(" else text.split(" ", 1)
    opcode, _, text = text.strip().partition("(")
    within, attributes = _within_parentheses(f"({text}")
    arrays = tuple(
        Array(a["dtype"], tuple(map(int, re.findall(r"\d+", a["sizes"]))), a["layout"] or "")
        for a in _ARRAY.finditer(shapes)
    )
    integer = re.fullmatch(r"\((-?\d+)\)", within)
    number = int(integer[1]) if integer and opcode in ("parameter", "constant") else None
    return Instruction(name, opcode, arrays, tuple(_NAME.findall(within)), attributes, number)


def _within_parentheses(text: str) -> tuple[str, str]:
    """What the first parentheses hold, with them, and what follows."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"parentheses must be closed, got {text!r}")


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the text of a program must have {pattern!r} here, got {text!r}")
    return match


def sizes_in(pattern: str, text: str) -> list[int]:
    """Integers that a pattern finds."""
    return [int(n) for n in re.findall(r"\d+", _found(pattern, text)[1])]
