"""The pictures on the page: SVG that stays sharp at any size, and PNG for the digits."""

import io
import logging
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import image as mpl_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from jaxsoftmax import plots
from jaxsoftmax._demo import theme
from jaxsoftmax._demo.evaluation import Result
from jaxsoftmax._demo.theme import INK, LINE, MUTE, SOFT
from jaxsoftmax._demo.training import Epoch
from jaxsoftmax.calibration import ReliabilityCurve

# A notice about building its font cache would break the silence of --quiet.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

_CURVES_SIZE = (4.0, 2.7)
_RELIABILITY_SIZE = (3.4, 3.7)
_PANEL_SIZE = (3.6, 2.8)
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    # The same results give the same bytes, and text stays text.
    "svg.hashsalt": "jaxsoftmax",
    "svg.fonttype": "none",
}


def accuracy_curves(results: list[Result]) -> bytes:
    """Draws accuracy on the validation digits, epoch by epoch."""

    def draw(axes: Axes) -> None:
        _draw_curves(axes, results, lambda epoch: epoch.accuracy)
        worst_end = min(result.trained.epochs[-1].accuracy for result in results)
        axes.set_ylim(0.7 if worst_end > 0.8 else 0.0, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="lower right", handlelength=2.6)

    return _curves(draw)


def loss_curves(results: list[Result]) -> bytes:
    """Draws each model's own training loss, epoch by epoch, on a logarithmic scale."""

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        _draw_curves(axes, results, lambda epoch: epoch.loss or np.nan)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="upper right", handlelength=2.6)

    return _curves(draw)


def reliability_diagram(curve: ReliabilityCurve, colour: str) -> bytes:
    """Draws how often the answers are right for each confidence.

    Args:
      curve: The reliability curve.
      colour: The name of the model's colour.

    Returns:
      An SVG picture: above, a dot per bin with its 95% interval; below, how many digits the bin
      holds.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_RELIABILITY_SIZE, layout="constrained")
        axes = plots.reliability_diagram(
            curve, figure.subplots(), color=theme.light(colour), unit="digits"
        )
        axes.set_ylabel("share of right answers")
        return svg(figure)


def temperature_panel(result: Result, row: int, temperatures: np.ndarray) -> bytes:
    """Draws the probabilities of one digit as the temperature goes up.

    Args:
      result: The model.
      row: Which test digit.
      temperatures: From low to high; 0 is fine.

    Returns:
      An SVG picture: a line per class, which ends where the probability is exactly 0. The most
      probable class has the model's colour, the second has it in dashes, and the others are grey. A
      mark is at the fitted temperature.
    """
    probs = panel_probabilities(result, row, temperatures)
    leaders = np.argsort(-probs[0] - probs.mean(0), kind="stable")[:2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_PANEL_SIZE, layout="constrained")
        axes = figure.subplots()
        looks = dict(zip(leaders, ("solid", (0, (3, 1.5))), strict=True))
        for digit, line in enumerate(np.where(probs > 0, probs, np.nan).T):
            if digit not in looks:
                axes.plot(temperatures, line, color=MUTE, linewidth=1)
        for digit, dashes in looks.items():
            line = np.where(probs[:, digit] > 0, probs[:, digit], np.nan)
            colour = theme.light(result.model.colour)
            axes.plot(temperatures, line, color=colour, ls=dashes, lw=2, label=f"a {digit}")
        if temperatures[0] <= result.temperature <= temperatures[-1]:
            axes.axvline(result.temperature, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        axes.set(xlim=(temperatures[0], temperatures[-1]), ylim=(-0.02, 1.02))
        axes.set(xlabel="temperature", ylabel="probability")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="upper right", handlelength=1.6)
        return svg(figure)


def panel_probabilities(result: Result, row: int, temperatures: np.ndarray) -> np.ndarray:
    """Computes what `temperature_panel` draws: (temperatures, classes)."""
    scores = np.broadcast_to(result.scores[row], (len(temperatures), result.scores.shape[1]))
    return np.asarray(result.model.mapping(scores, temperature=temperatures[:, None]))


def digit(pixels: np.ndarray) -> bytes:
    """Turns an (8, 8) image into a PNG of as many pixels, dark ink on white paper."""
    buffer = io.BytesIO()
    mpl_image.imsave(buffer, pixels, cmap="gray_r", vmin=0.0, vmax=1.0, format="png")
    return buffer.getvalue()


def _curves(draw: Callable[[Axes], None]) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_CURVES_SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("epoch")
        return svg(figure)


def _draw_curves(axes: Axes, results: list[Result], value: Callable[[Epoch], float]) -> None:
    for result in results:
        epochs = result.trained.epochs
        axes.plot(
            range(1, len(epochs) + 1),
            [value(epoch) for epoch in epochs],
            color=theme.light(result.model.colour),
            linestyle=result.model.dashes,
            linewidth=1.6,
            marker="o" if len(epochs) == 1 else "",
            label=result.model.name,
        )


def svg(figure: Figure) -> bytes:
    """Makes a picture that follows the reader's system, of a figure drawn in `STYLE`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return theme.themed(buffer.getvalue().replace("'DejaVu Sans'", _FONTS)).encode()
