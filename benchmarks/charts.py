"""Results as pictures: how something grows, and how ours relates to peers.

What is ours is drawn solid, a peer dashed in the color of what it is compared with, and the limit
dotted.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measuring import Result, Spread

if TYPE_CHECKING:  # what only measures needs no matplotlib
    from matplotlib.axes import Axes

_INK, _FAINT, _GRID = "#1d2430", "#6b7380", "#e6e8ec"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#56B4E9", "#882255")
_MARKERS = "osD^v"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "figure.titlesize": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "legend.frameon": False,
}
# Inches; on a page of 700 points a letter is about 12 points high.
_WIDTH, _GROWTH_HEIGHT, _ROW_HEIGHT = 7.2, 3.0, 0.26
_DOTS_PER_INCH, _PALETTE = 150, 64
_UNITS = {"time": 1e3, "compile": 1e3, "memory": 1e-6, "error": 1.0}


@dataclasses.dataclass(frozen=True)
class Growth:
    """Lines: a quantity of every function by size, both axes logarithmic.

    Attributes:
      title: what is seen.
      operation: the operation of the results that are drawn.
      quantity: one of them, by its name in `tables.COLUMNS`.
      x_label: what grows.
      y_label: what is drawn, with its unit.
    """

    title: str
    operation: str
    quantity: str
    x_label: str
    y_label: str

    def height(self, results: Sequence[Result]) -> float:
        """In inches."""
        return _GROWTH_HEIGHT

    def draw(self, ax: "Axes", results: Sequence[Result]) -> None:
        """Draws it."""
        lines: dict[str, list[Result]] = {}
        for result in results:
            if result.operation == self.operation and self.quantity in result.quantities:
                lines.setdefault(result.name, []).append(result)
        colors = _colors([line[0] for line in lines.values()])
        ends = {}
        for name, line in lines.items():
            x = [result.x for result in line]
            values = [_spread(result.quantities[self.quantity]) for result in line]
            low, y, high = np.transpose(values) * _UNITS[self.quantity]
            style = {"color": colors[name], "ls": _line_style(line[0])}
            ax.plot(x, y, lw=1.8, marker="o", ms=3, **style)
            ax.fill_between(x, low, high, color=colors[name], alpha=0.15, lw=0)
            ends[name] = x[-1], y[-1]
        ax.set(xscale="log", yscale="log", xlabel=self.x_label, ylabel=self.y_label)
        sizes = sorted({result.x for line in lines.values() for result in line})
        ax.set_xticks(sizes, [f"{x:,.0f}" for x in sizes])
        ax.set_xticks([], minor=True)
        _plain_numbers(ax.yaxis)
        _name_ends(ax, ends, colors)


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Points: how ours, or a function, relates to another; 1 is a line.

    Attributes:
      title: what is seen.
      row: which results share a line, made of `{operation}`, `{size}`, `{name}` and `{ours}`.
      series: which results share a color, made of these and `{quantity}`.
      quantities: those drawn, by their names in `tables.COLUMNS`.
      x_label: what is drawn.
      operations: those drawn; all by default.
    """

    title: str
    row: str
    series: str
    quantities: Sequence[str]
    x_label: str
    operations: Sequence[str] = ()

    def height(self, results: Sequence[Result]) -> float:
        """In inches."""
        return 1.2 + _ROW_HEIGHT * len({row for row, *_ in self._points(results)})

    def draw(self, ax: "Axes", results: Sequence[Result]) -> None:
        """Draws it."""
        points = self._points(results)
        rows = list(dict.fromkeys(row for row, *_ in points))
        series = list(dict.fromkeys(name for _, name, _ in points))
        ending = shared_ending(series)
        for i, name in enumerate(series):
            mine = [(rows.index(row), value) for row, of, value in points if of == name]
            at = np.array([row for row, _ in mine])
            low, middle, high = np.transpose([value for _, value in mine])
            color = _COLORS[i % len(_COLORS)]
            ax.hlines(at, low, high, color=color, lw=1.2, alpha=0.6)
            marker, label = _MARKERS[i % len(_MARKERS)], name.removesuffix(ending)
            ax.plot(middle, at, marker, color=color, ms=5, label=label)
        ax.axvline(1, color=_INK, lw=1)
        ax.set(xscale="log", xlabel=self.x_label, ylim=(len(rows) - 0.4, -0.6))
        ax.set_yticks(range(len(rows)), rows, color=_INK)
        ax.tick_params(axis="y", length=0)
        _plain_numbers(ax.xaxis)
        if len(series) > 1:
            ax.get_figure().legend(
                loc="outside lower right",
                ncols=len(series),
                fontsize=8,
                handletextpad=0.2,
                columnspacing=1.2,
            )

    def _points(self, results: Sequence[Result]) -> list[tuple[str, str, Spread]]:
        return [
            (
                self._name(self.row, r, quantity),
                self._name(self.series, r, quantity),
                _spread(value),
            )
            for r in results
            for quantity in self.quantities
            if (not self.operations or r.operation in self.operations)
            and (value := r.quantities.get(quantity)) is not None
            and not r.is_limit
            and (quantity != "relative" or _spread(value) != Spread(1, 1, 1))  # itself
        ]

    def _name(self, pattern: str, r: Result, quantity: str) -> str:
        return pattern.format(
            operation=r.operation,
            size=r.size,
            name=r.name,
            ours=r.ours,
            quantity=quantity.removeprefix("ours_"),
        )


def time_and_memory(operations: Sequence[str]) -> Ratios:
    """Ours relative to its peers."""
    return Ratios(
        "jaxsoftmax relative to its peers (less is better)",
        "{operation}: {name}",
        "{quantity}",
        ("ours_time", "ours_memory"),
        "time and temporary memory, relative",
        operations,
    )


Panel = Growth | Ratios


def save(path: Path, panels: Sequence[Panel], results: Sequence[Result]) -> None:
    """Draws the panels, one below the other."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.rc_context(_STYLE):
        heights = [panel.height(results) for panel in panels]
        figure = Figure((_WIDTH, sum(heights)), dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for part, panel in zip(parts, panels, strict=True):
            ax = part.subplots()
            part.suptitle(panel.title, x=0.01, ha="left")
            panel.draw(ax, results)
        image = io.BytesIO()
        figure.savefig(image, facecolor="white")
    # Few colors make a file a third as large.
    Image.open(image).convert("RGB").quantize(_PALETTE).save(path, optimize=True)


def shared_ending(names: Sequence[str]) -> str:
    """What all names have behind their last comma; the title says it already."""
    _, comma, last = next(iter(names), "").rpartition(", ")
    ending = comma + last
    return ending if comma and all(name.endswith(ending) for name in names) else ""


def _spread(value: Spread | float) -> Spread:
    return value if isinstance(value, Spread) else Spread(value, value, value)


def _line_style(result: Result) -> str:
    return ":" if result.is_limit else "--" if result.ours else "-"


def _colors(results: Sequence[Result]) -> dict[str, str]:
    """A color for each of ours, the same for its peers, and gray for limits."""
    subjects = list(dict.fromkeys(r.ours or r.name for r in results if not r.is_limit))
    return {
        r.name: _FAINT if r.is_limit else _COLORS[subjects.index(r.ours or r.name) % len(_COLORS)]
        for r in results
    }


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    # One decade has room for numbers between.
    between = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axis.set_major_locator(LogLocator(subs=between, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_ends(ax: "Axes", ends: dict[str, tuple[float, float]], colors: dict[str, str]) -> None:
    """Writes names at the ends of lines, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    apart = (high / low) ** 0.07
    at = 0.0
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        at = max(y, at * apart)
        ax.annotate(
            name,
            (x, at),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colors[name],
            annotation_clip=False,
        )
