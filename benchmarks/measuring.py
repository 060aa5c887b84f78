"""Measuring that a noisy machine cannot easily fool: in turn, in one run, and compared by round.

In each round every function has its turn, in random order. What is reported are the median and the
quartiles over the rounds; a ratio is formed within each round, and then its median is taken. Under
load that is steadier than the ratio of medians: of repeated measurements with four busy processes
on two cores the ratio of a solver to softmax had a spread of 0.20 against 0.33 (standard deviation
of the logarithm), that of softmax to softmax 0.065 against 0.067.
"""

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# A sample lasts at least this long; a call that is shorter is repeated.
_SHORTEST_SAMPLE = 1e-3
# What is smaller is as good as no memory: a ratio to a few bytes says nothing.
_LEAST_BYTES = 2**16
_MOST_ROUNDS = 31


class Spread(NamedTuple):
    """The median of a sample and its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, sample: np.ndarray) -> "Spread":
        """That of these numbers."""
        return cls(*(float(q) for q in np.quantile(sample, (0.25, 0.5, 0.75))))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function that takes part in a comparison.

    Attributes:
      function: what is called.
      ours: of a peer, the name of our function that does the same.
      jit: whether it is compiled by JAX; otherwise it is called as it is.
      prepare: the arguments as the function takes them; not timed.
      times: how often the work that is measured fits into the one that is asked for.
      is_limit: whether it is the least that any function could take.
      result: what is to be said about the value that it gives.
    """

    function: Callable[..., Any]
    ours: str = ""
    jit: bool = True
    prepare: Callable[..., Sequence[Any]] = lambda *args: args
    times: float = 1.0
    is_limit: bool = False
    result: Callable[[Any], str] | None = None


@dataclasses.dataclass(frozen=True)
class Missing:
    """A peer that cannot take part, and why."""

    why: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What one function did: a row of the table.

    Attributes:
      operation: what was done.
      size: of what size, in words.
      x: the size as a number, where there is one that grows.
      name: the function.
      ours: of a peer, the name of our function that does the same.
      is_limit: whether it is the least that any function could take.
      quantities: what was found; `tables.COLUMNS` names all there are.
    """

    operation: str
    size: str
    x: float
    name: str
    ours: str = ""
    is_limit: bool = False
    quantities: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# What is told of a limit.
_OF_LIMITS = "time", "relative", "compile"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Functions that are measured on the same arguments.

    Attributes:
      operation: what is done.
      size: of what size, in words.
      x: the size as a number, where there is one that grows.
      entries: the functions; the times of all are related to that of the first.
      arguments: makes their arguments.
      rounds: how many each function takes part in at least.
      seconds: how long it goes on beyond these.
      compile_only: whether nothing is run: memory is known before, for sizes that would not fit.
      beyond: whether differences to the first are of interest.
      waits: whether a call lasts until its result is there, and not only until it returns.
    """

    operation: str
    size: str
    x: float
    entries: Mapping[str, Entry | Missing]
    arguments: Callable[[], Sequence[Any]] = tuple
    rounds: int = 3
    seconds: float = 0.2
    compile_only: bool = False
    beyond: bool = False
    waits: bool = True

    def measure(self, quick: bool) -> list[Result]:
        """One result per function, in their order."""
        entries = {name: e for name, e in self.entries.items() if isinstance(e, Entry)}
        args = self.arguments()
        found: dict[str, dict[str, Any]] = {name: {} for name in entries}
        calls = {}
        for name, entry in entries.items():
            mine = entry.prepare(*args)
            function = entry.function
            if entry.jit:
                function = _compiled(function, mine, found[name])
            calls[name] = _Call(function, mine, self.waits)
        if not self.compile_only:
            self._run(entries, calls, found, quick)
        for name, entry in entries.items():
            if entry.is_limit:
                found[name] = {k: v for k, v in found[name].items() if k in _OF_LIMITS}
            relate(found[name], found.get(entry.ours, {}))
        return [self._result(name, entry, found) for name, entry in self.entries.items()]

    def _run(self, entries, calls, found, quick: bool) -> None:
        for name, call in calls.items():
            value = call.warm_up()
            say = entries[name].result
            if say is not None:
                found[name]["result"] = say(value)
        rounds, patience = (1, 0.0) if quick else (self.rounds, self.seconds)
        seconds = _in_turn(calls, patience, rounds)
        seconds = {name: s * entries[name].times for name, s in seconds.items()}
        first = next(iter(seconds.values()))
        limit = next((seconds[name] for name, e in entries.items() if e.is_limit), None)
        for name, sample in seconds.items():
            of = found[name]
            of["samples"] = sample
            of["time"] = Spread.of(sample)
            of["relative"] = Spread.of(_ratios(sample, first))
            if self.beyond and sample is not first:
                rounds = min(len(sample), len(first))
                of["beyond"] = Spread.of(sample[:rounds] - first[:rounds])
            if limit is not None:
                of["share"] = Spread.of(_ratios(limit, sample)).median

    def _result(self, name: str, entry: Entry | Missing, found: Mapping[str, Any]) -> Result:
        if isinstance(entry, Missing):
            quantities = {"result": entry.why}
            return Result(self.operation, self.size, self.x, name, quantities=quantities)
        return Result(
            self.operation, self.size, self.x, name, entry.ours, entry.is_limit, found[name]
        )


@dataclasses.dataclass(frozen=True)
class Apart:
    """Comparisons that begin with the same function, and are told as one.

    For functions that take so little time that those in turn with them are felt: programs of many
    kernels leave threads awake, which are in the way of the next.
    """

    operation: str
    size: str
    comparisons: Sequence[Comparison]

    def measure(self, quick: bool) -> list[Result]:
        """One result per function; of the first, the one beside the second."""
        first, *others = (comparison.measure(quick) for comparison in self.comparisons)
        return [*first, *(result for results in others for result in results[1:])]


class _Call:
    """A function with its arguments, called as often as makes a sample long enough."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], waits: bool):
        self._function, self._args, self._waits = function, args, waits
        self._calls, self._is_short = 1, False

    def warm_up(self) -> Any:
        start = time.perf_counter()
        value = jax.block_until_ready(self._function(*self._args))
        self._is_short = time.perf_counter() - start < 100 * _SHORTEST_SAMPLE
        if self._is_short:
            self._calls = min(math.ceil(_SHORTEST_SAMPLE / self.seconds()), 1000)
        return value

    def seconds(self) -> float:
        if self._is_short:
            self._once()  # pays for what the function before left behind in caches and threads
        return sum(self._once() for _ in range(self._calls)) / self._calls

    def _once(self) -> float:
        start = time.perf_counter()
        value = self._function(*self._args)
        returned = time.perf_counter()
        jax.block_until_ready(value)
        return (time.perf_counter() if self._waits else returned) - start


def _compiled(function: Callable[..., Any], args: Sequence[Any], found: dict[str, Any]) -> Any:
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile()
    found["compile"] = time.perf_counter() - start
    memory = executable.memory_analysis()
    if memory is not None:
        found["memory"] = memory.temp_size_in_bytes
    return executable


def _in_turn(calls: Mapping[str, _Call], patience: float, fewest: int) -> dict[str, np.ndarray]:
    """Seconds by function and round; what is slow takes part in fewer rounds."""
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    gc.collect()
    for done in range(_MOST_ROUNDS):
        turns = [name for name in calls if done < fewest or spent[name] < patience]
        shuffle(turns)
        for name in turns:
            start = time.perf_counter()
            seconds[name].append(calls[name].seconds())
            spent[name] += time.perf_counter() - start
    return {name: np.array(sample) for name, sample in seconds.items()}


def _ratios(sample: np.ndarray, base: np.ndarray) -> np.ndarray:
    """By round, over those that both took part in."""
    rounds = min(len(sample), len(base))
    return sample[:rounds] / base[:rounds]


def relate(peer: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """Adds to a peer's quantities how ours relate to them."""
    if "samples" in peer and "samples" in ours:
        peer["ours_time"] = Spread.of(_ratios(ours["samples"], peer["samples"]))
    if "memory" in peer and "memory" in ours:
        peer["ours_memory"] = max(ours["memory"], _LEAST_BYTES) / max(peer["memory"], _LEAST_BYTES)
    for quantity in ("compile", "estimate", "traffic"):
        if quantity in peer and quantity in ours:
            peer[f"ours_{quantity}"] = ours[quantity] / peer[quantity]
