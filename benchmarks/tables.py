"""Results as Markdown: one table, and a list of what ours loses."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.measuring import Result, Spread

OURS = (
    "ours_time",
    "ours_estimate",
    "ours_traffic",
    "ours_memory",
    "ours_compile",
    "ours_error",
)


class _Column(NamedTuple):
    title: str
    write: Callable[[Any], str]


def table(results: Sequence[Result], size: str = "size") -> str:
    """One table; columns that nothing was found for are left out, and the first has this title."""
    columns = {
        quantity: column
        for quantity, column in COLUMNS.items()
        if any(quantity in result.quantities for result in results)
    }
    lines = [
        _row([size, "function", *(column.title for column in columns.values())]),
        _row(["---", "---", *("---" for _ in columns)]),
    ]
    for operation, group in itertools.groupby(results, lambda result: result.operation):
        lines.append(_row([f"**{operation}**", "", *("" for _ in columns)]))
        before = None
        for result in group:
            cells = [
                column.write(result.quantities[quantity]) if quantity in result.quantities else ""
                for quantity, column in columns.items()
            ]
            lines.append(_row(["" if result.size == before else result.size, result.name, *cells]))
            before = result.size
    return "\n".join(lines)


def losses(results: Sequence[Result]) -> str:
    """A list of where ours needs more than a peer, the worst case of each."""
    worst: dict[tuple[str, ...], tuple[float, Result]] = {}
    for result in results:
        for quantity in OURS:
            ratio = _middle(result.quantities.get(quantity, 0.0))
            key = result.ours, result.name, quantity
            if _loses(ratio) and ratio > worst.get(key, (0.0,))[0]:
                worst[key] = ratio, result
    if not worst:
        return "Nowhere in this run."
    return "\n".join(
        f"- {ours} compared with {name}, {quantity.removeprefix('ours_')}: up to {_ratio(ratio)}× "
        f"({', '.join(filter(None, (result.operation, result.size)))})"
        for (ours, name, quantity), (ratio, result) in worst.items()
    )


def rows(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(_row(pair) for pair in pairs)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _middle(value: Spread | float) -> float:
    return value.median if isinstance(value, Spread) else value


def _loses(ratio: float) -> bool:
    """As it is written, with two digits behind the point."""
    return round(ratio, 2) > 1


def _number(value: float) -> str:
    """Three digits, but no more than two behind the point."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{float(f'{value:.3g}'):,.{digits}f}"


def _ratio(value: float) -> str:
    return _number(value) if value <= 100 else "more than 100"


_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def _with_unit(value: float) -> tuple[float, str]:
    """The unit that a number of seconds is best told in."""
    return next((unit for unit in _UNITS if value >= unit[0]), _UNITS[-1])


def _time(spread: Spread) -> str:
    unit, name = _with_unit(abs(spread.median))
    low, median, high = (_number(s / unit) for s in spread)
    return f"{median} {name} ({low}–{high})"


def _relative(spread: Spread) -> str:
    low, median, high = map(_number, spread)
    return median if low == high else f"{median} ({low}–{high})"


def _ours(value: Spread | float) -> str:
    number = _ratio(_middle(value))
    mark = f"**{number}**" if _loses(_middle(value)) else number
    return (
        f"{mark} ({_number(value.low)}–{_number(value.high)})"
        if isinstance(value, Spread)
        else mark
    )


def _seconds(value: float) -> str:
    unit, name = _with_unit(value)
    return f"{_number(value / unit)} {name}"


def _megabytes(value: float) -> str:
    return _number(value / 1e6)


def _count(value: int) -> str:
    return f"{value:,}"


def _by_kind(flops: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {_number(count / 1e9)}" for kind, count in sorted(flops.items()))


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _error(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


COLUMNS = {
    "time": _Column("time", _time),
    "beyond": _Column("beyond the first", _time),
    "relative": _Column("relative to the first", _relative),
    "share": _Column("of the limit", _percent),
    "estimate": _Column("estimated time", _seconds),
    "relative_estimate": _Column("relative to the first", _number),
    "kernels": _Column("kernels", _count),
    "launches": _Column("launches", _count),
    "waits": _Column("waits of the host", _count),
    "traffic": _Column("bytes moved, MB", _megabytes),
    "flops": _Column("matrix products, GFLOP", _by_kind),
    "memory": _Column("memory, MB", _megabytes),
    "compile": _Column("compile", _seconds),
    "error": _Column("worst error, ulp", _error),
    "ours_time": _Column("ours: time", _ours),
    "ours_estimate": _Column("ours: estimated time", _ours),
    "ours_traffic": _Column("ours: bytes", _ours),
    "ours_memory": _Column("ours: memory", _ours),
    "ours_compile": _Column("ours: compile", _ours),
    "ours_error": _Column("ours: error", _ours),
    "result": _Column("note", str),
}


def in_short(problem: Exception) -> str:
    """An error as a cell of a table."""
    text = " ".join(str(problem).split()).replace("|", "/")
    return f"{type(problem).__name__}: {text[:140]}"
