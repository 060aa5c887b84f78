"""What crosses devices, read from a compiled program."""

import collections
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
_BODY = re.compile(r"body=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation in which devices take part together.

    Attributes:
      kind: its name in HLO.
      sizes: how many numbers each of its results has, on one device; several if it is fused.
      in_loop: whether it is in the body of a loop.
    """

    kind: str
    sizes: tuple[int, ...]
    in_loop: bool

    @property
    def size(self) -> int:
        """How many numbers it gives to each device."""
        return sum(self.sizes)


def collectives(text: str) -> list[Collective]:
    """All collective operations of a compiled program, given `compiled.as_text()`."""
    bodies, found, name = set(_BODY.findall(text)), [], ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match["name"]
        if match := _OPERATION.search(line):
            shapes = _SHAPE.finditer(match["shapes"])
            sizes = (math.prod(int(n) for n in s["sizes"].split(",") if n) for s in shapes)
            found.append(Collective(match["kind"], tuple(sizes), name in bodies))
    return found


def by_kind(text: str) -> dict[str, int]:
    """How many numbers all operations of each kind give to a device."""
    totals: collections.Counter[str] = collections.Counter()
    for operation in collectives(text):
        totals[operation.kind] += operation.size
    return dict(totals)
