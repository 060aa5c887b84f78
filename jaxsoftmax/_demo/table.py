"""The table on screen: plain text, at most 80 columns wide."""

from jaxsoftmax._demo.evaluation import Judgement, Result
from jaxsoftmax._demo.wording import INFINITY, infinity_notes, label

_HEADINGS = (
    ("", "mapping"),
    ("", "scaling"),
    ("test", "accuracy"),
    ("neg. log-", "likelihood"),
    ("expected", "cal. err."),
    ("smooth", "c. err."),
    ("Brier", "score"),
    ("classes", "above 0"),
)
_LEFT = 2  # columns of words


def table(results: list[Result]) -> str:
    """Writes the results in aligned columns.

    Args:
      results: One row each per scaling.

    Returns:
      The table, and below it a note for every infinite entry.
    """
    rows = [
        *map(list, zip(*_HEADINGS, strict=True)),
        *(
            _cells(result.model.name, label(result, scaling), judgement)
            for result in results
            for scaling, judgement in result.judgements.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(len(_HEADINGS[0]), ["-" * width for width in widths])
    lines = [_line(row, widths) for row in rows]
    notes = infinity_notes(results)
    if notes:
        lines += ["", INFINITY, *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def _cells(name: str, scaling: str, judgement: Judgement) -> list[str]:
    return [
        name,
        scaling,
        f"{judgement.accuracy:.2%}",
        f"{judgement.likelihood.mean:.3f}",
        f"{judgement.calibration_error:.2%}",
        f"{judgement.smooth_error:.2%}",
        f"{judgement.brier:.4f}",
        f"{judgement.support:.2f}",
    ]


def _line(cells: list[str], widths: list[int]) -> str:
    return "  ".join(
        cell.ljust(width) if column < _LEFT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
