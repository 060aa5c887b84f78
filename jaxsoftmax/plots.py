"""Pictures of probabilities, on axes of matplotlib. Needs the extra `plots`.

Each function draws on the axes that it is given, or on new ones of `matplotlib.pyplot`, and returns
them. None shows, saves or clears anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Real

from jaxsoftmax.calibration import ReliabilityCurve
from jaxsoftmax.measures import support_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["reliability_diagram", "simplex_plot", "support_plot"]

_GREY = "#6b7380"
# Of a palette made for color-blind readers too.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_STYLES = ("solid", "dashed", "dashdot", "dotted")


def reliability_diagram(
    curve: ReliabilityCurve,
    ax: Axes | None = None,
    *,
    color: str = _COLORS[0],
    label: str | None = None,
    unit: str = "count",
) -> Axes:
    """Draws how often predictions come true for each confidence, with counts and intervals.

    Each dot is a bin; it is larger if the bin holds more predictions. On the dashed diagonal,
    confidence and accuracy are equal. Above it, predictions are not confident enough. Below it,
    they are too confident. The pale bar behind a dot is the interval of the accuracy. The columns
    underneath count the predictions in each bin. Their heights grow with the square root, so that
    small bins can be seen next to large ones.

    Args:
      curve: what `reliability_curve` returns.
      ax: the axes to draw on. Default: new axes. The counts take the lowest fifth of the space.
      color: the color of dots and columns.
      label: what a legend calls the dots.
      unit: what the columns are called.

    Returns:
      The axes, with the counts in `ax.child_axes[-1]`.

    Raises:
      TypeError: if `curve` is not a `ReliabilityCurve`.
      ValueError: if it has more than one axis, as from `vmap`.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> probs = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (200, 4)))
      >>> labels = jsm.sample(jax.random.key(1), jnp.log(probs), temperature=1.5)
      >>> curve = jsm.calibration.reliability_curve(probs, labels, num_bins=10)
      >>> jsm.plots.reliability_diagram(curve).get_xlabel()
      'confidence'

    References:
      Niculescu-Mizil & Caruana, 2005: Predicting good probabilities with supervised learning.
    """
    if not isinstance(curve, ReliabilityCurve):
        raise TypeError(f"curve must be a ReliabilityCurve, got {type(curve).__name__}.")
    if np.ndim(curve.count) != 1:
        raise ValueError(f"curve must have one axis, the bins, got shape {np.shape(curve.count)}.")
    ax = _axes_or_new(ax)
    confidence, accuracy, count, lower, upper = (np.asarray(x) for x in curve)
    ax.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.vlines(confidence, lower, upper, color=color, linewidth=5, alpha=0.2, zorder=2)
    largest = max(count.max(initial=0), 1)
    sizes = 12 + 88 * np.sqrt(count / largest)
    ax.scatter(confidence, accuracy, s=sizes, color=color, label=label, zorder=3)
    ax.set(ylim=(-0.03, 1.03), ylabel="accuracy")
    counts = ax.inset_axes((0, -0.26, 1, 0.22), sharex=ax)
    _draw_counts(counts, count, np.sqrt(count / largest), color)
    counts.set(xlabel="confidence", ylabel=unit)
    for axes in (ax.xaxis, ax.yaxis, counts.xaxis):
        axes.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    ax.tick_params(labelbottom=False)
    ax.set(xlim=(-0.03, 1.03))
    # Where one looks for it, though it is the axes below that show it.
    ax.set_xlabel("confidence").set_visible(False)
    return ax


def _draw_counts(ax: Axes, count: np.ndarray, heights: np.ndarray, color: str) -> None:
    centres = (np.arange(len(count)) + 0.5) / len(count)
    ax.bar(centres, heights, width=0.8 / len(count), color=color, alpha=0.55)
    for x, height, number in zip(centres, heights, count, strict=True):
        if number:
            ax.annotate(
                f"{number:.0f}",
                (x, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7 if len(count) <= 12 else 6,
            )
    ax.set(ylim=(0, 1.6), yticks=[])
    ax.grid(visible=False)
    ax.spines[["left", "right", "top"]].set_visible(False)


def simplex_plot(
    mapping: Callable[[Array], Array],
    ax: Axes | None = None,
    *,
    scale: float = 4.0,
    resolution: int = 301,
    labels: Sequence[str] = ("class 1", "class 2", "class 3"),
    colors: Sequence[str] = _COLORS[:3],
) -> Axes:
    """Draws the probabilities of three classes over a triangle of scores.

    At a corner, one score is `scale` and the two others are 0. In between, the scores are mixed.
    The colors of the classes are mixed by their probabilities: a color is pure where its class has
    probability 1. If the mapping is sparse, a class has probability 0 beyond a white line. On the
    dark lines, the most probable class has probability 0.5, 0.7 and 0.9.

    Args:
      mapping: a function of scores (n, 3) that returns probabilities of that shape. Use
        `functools.partial` to set options.
      ax: the axes to draw on. Default: new axes.
      scale: how far the scores of a corner are apart.
      resolution: how many points a side has.
      labels: the names of the classes.
      colors: their colors.

    Returns:
      The axes.

    Raises:
      ValueError: if `mapping` returns another shape, or there are not three labels and colors, or
        `resolution` is below 2.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jaxsoftmax as jsm
      >>> jsm.plots.simplex_plot(jsm.sparsemax).get_title()
      'sparsemax'

    References:
      Martins & Astudillo, 2016: From softmax to sparsemax (arXiv:1602.02068).
    """
    for name, names in (("labels", labels), ("colors", colors)):
        if len(names) != 3:
            raise ValueError(f"{name} must be three, one per class, got {len(names)}.")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, got {resolution}.")
    ax = _axes_or_new(ax)
    from matplotlib.colors import to_rgb

    x, y, shares = _over_the_triangle(resolution)
    points = jnp.asarray(scale * shares.reshape(-1, 3), jnp.float32)
    p = np.asarray(mapping(points), np.float64)
    if p.shape != points.shape:
        raise ValueError(f"mapping must return shape {points.shape}, got shape {p.shape}.")
    p = p.reshape(shares.shape)
    triangle = ax.fill(*_CORNERS.T, facecolor="none", edgecolor=_GREY, linewidth=0.6)[0]
    mixed = np.clip(p @ np.array([to_rgb(color) for color in colors]), 0, 1)
    image = ax.imshow(mixed, extent=(0, 1, 0, _HEIGHT), origin="lower", interpolation="bilinear")
    drawn = [ax.contour(x, y, p.max(-1), [0.5, 0.7, 0.9], colors="#00000066", linewidths=0.8)]
    for one in np.moveaxis(p, -1, 0):
        if np.any(one == 0) and np.any(one > 0):
            # Between the last point with none and the first with some. On the edge rounding may
            # leave a trace, which would dent the line.
            some = np.where(one > 1e-6, 1.0, 0.0)
            drawn.append(ax.contour(x, y, some, [0.5], colors="white", linewidths=1.6))
    for artist in (image, *drawn):
        artist.set_clip_path(triangle)
    for corner, text, side in zip(_CORNERS, labels, ("left", "right", "center"), strict=True):
        up = corner[1] > 0
        offset, va = ((0, 4), "bottom") if up else ((0, -4), "top")
        ax.annotate(text, corner, offset, textcoords="offset points", ha=side, va=va)
    # Above there is place for the label, so that any title is clear of it.
    ax.set(aspect="equal", xlim=(-0.01, 1.01), ylim=(-0.01, _HEIGHT + 0.12))
    ax.set_title(_name(mapping))
    ax.set_axis_off()
    return ax


# Where the three classes are: an equilateral triangle.
_HEIGHT = 0.75**0.5
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, _HEIGHT]])


def _over_the_triangle(resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the rectangle around the triangle, and their barycentric coordinates."""
    x, y = np.meshgrid(np.linspace(0, 1, resolution), np.linspace(0, _HEIGHT, resolution))
    third = y / _HEIGHT
    second = x - third / 2
    return x, y, np.stack([1 - second - third, second, third], -1)


def support_plot(
    mappings: Callable[..., Array] | Sequence[Callable[..., Array]] | Mapping[str, Callable],
    scores: Real[ArrayLike, "rows classes"],
    ax: Axes | None = None,
    *,
    temperatures: Real[ArrayLike, " steps"] | None = None,
) -> Axes:
    """Draws how many classes have a probability above 0 at each temperature.

    The line of a mapping is the mean over the rows of scores. The band around it holds the middle
    half of the rows.

    Args:
      mappings: one mapping, several, or a dictionary of mappings by name. Each is called as
        `mapping(scores, temperature=...)`.
      scores: rows of scores.
      ax: the axes to draw on. Default: new axes.
      temperatures: positive and ascending. Default: 61 from 0.01 to 10, with equal ratios.

    Returns:
      The axes, with one line per mapping.

    Raises:
      ValueError: if `scores` does not have two axes, or a temperature is not positive.
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax, jaxsoftmax as jsm
      >>> scores = jax.random.normal(jax.random.key(0), (20, 10))
      >>> ax = jsm.plots.support_plot([jsm.softmax, jsm.sparsemax], scores)
      >>> [line.get_label() for line in ax.get_lines()]
      ['softmax', 'sparsemax']

    References:
      Peters, Niculae & Martins, 2019: Sparse sequence-to-sequence models (arXiv:1905.05702).
    """
    x = jnp.asarray(scores)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"scores must have shape (rows, classes), got shape {x.shape}.")
    steps = np.geomspace(0.01, 10, 61) if temperatures is None else np.asarray(temperatures)
    if steps.ndim != 1 or steps.size == 0 or not np.all(steps > 0):
        raise ValueError(f"temperatures must be positive numbers along one axis, got {steps}.")
    ax = _axes_or_new(ax)
    for i, (name, mapping) in enumerate(_named(mappings)):
        sizes = [support_size(mapping(x, temperature=t)) for t in steps.tolist()]
        low, high = np.quantile(sizes, [0.25, 0.75], axis=1)
        color = _COLORS[i % len(_COLORS)]
        line = {"linestyle": _STYLES[i % len(_STYLES)], "linewidth": 1.8}
        ax.plot(steps, np.mean(sizes, axis=1), label=name, color=color, **line)
        ax.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    ax.set(xscale="log", xlabel="temperature", ylabel="classes above 0", ylim=(0, None))
    ax.xaxis.set_major_formatter(lambda t, _: f"{t:g}")
    ax.legend(frameon=False)
    return ax


def _named(mappings: Any) -> list[tuple[str, Any]]:
    if isinstance(mappings, Mapping):
        return list(mappings.items())
    several = [mappings] if callable(mappings) else list(mappings)
    return [(_name(mapping), mapping) for mapping in several]


def _name(mapping: Any) -> str:
    while hasattr(mapping, "func"):  # functools.partial
        mapping = mapping.func
    return getattr(mapping, "__name__", type(mapping).__name__)


def _axes_or_new(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "jaxsoftmax.plots needs matplotlib, which is not installed: "
            'pip install "jaxsoftmax[plots]"'
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def __dir__() -> list[str]:
    return list(__all__)
