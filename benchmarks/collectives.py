"""What crosses devices, read from a compiled program."""

import dataclasses
import math
import re

# In the text of a program an operation's shapes come before its name, and may be several.
_OPERATION = re.compile(
    r" = (?P<shapes>\([^)]*\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_LOOP = re.compile(
    r" while\(.*body=%?(?P<body>[\w.\-]+)(?:.*known_trip_count\":{\"n\":\"(?P<count>\d+))?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation in which devices take part together.

    Attributes:
      kind: its name in HLO.
      sizes: how many numbers each of its results has, on one device; several if it is fused.
      passes: how often it runs; None in a loop that runs until it is done.
    """

    kind: str
    sizes: tuple[int, ...]
    passes: int | None

    @property
    def size(self) -> int:
        """How many numbers it gives to each device."""
        return sum(self.sizes)


def collectives(text: str) -> list[Collective]:
    """All collective operations of a compiled program, given `compiled.as_text()`."""
    loops = {loop["body"]: loop["count"] for loop in _LOOP.finditer(text)}
    found, name = [], ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match["name"]
        if match := _OPERATION.search(line):
            shapes = _SHAPE.finditer(match["shapes"])
            sizes = (math.prod(int(n) for n in s["sizes"].split(",") if n) for s in shapes)
            passes = loops.get(name, "1")
            passes = None if passes is None else int(passes)
            found.append(Collective(match["kind"], tuple(sizes), passes))
    return found
