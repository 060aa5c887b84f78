"""The table on screen: plain text, at most 80 columns wide."""

from jaxsoftmax._demo.evaluation import Judgement, Result
from jaxsoftmax._demo.wording import INFINITY, infinity_notes

_HEADINGS = (
    ("", "mapping"),
    ("test", "accuracy"),
    ("negative", "log-likelihood"),
    ("expected", "calibration error"),
    ("fitted", "temp."),
    ("classes", "above zero"),
)


def table(results: list[Result]) -> str:
    """Lays the results out in aligned columns; `a -> b` is before and after the temperature.

    Args:
      results: One row each.

    Returns:
      The table, and below it a note for every infinite entry.
    """
    rows = [*map(list, zip(*_HEADINGS, strict=True)), *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(len(_HEADINGS[0]), ["-" * width for width in widths])
    lines = [_line(row, widths) for row in rows]
    notes = infinity_notes(results)
    if notes:
        lines += ["", INFINITY, *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _cells(result: Result) -> list[str]:
    before, after = result.before, result.after
    return [
        result.model.name,
        f"{result.accuracy:.2%}",
        f"{_likelihood(before)} -> {_likelihood(after)}",
        f"{before.calibration_error:.2%} -> {after.calibration_error:.2%}",
        f"{result.temperature:.3f}",
        f"{before.support:.2f} -> {after.support:.2f}",
    ]


def _likelihood(judgement: Judgement) -> str:
    return f"{judgement.likelihood.mean:.3f}"


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = (
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
