"""Pictures: they show the numbers that they are given, and touch nothing else."""

import functools
import subprocess
import sys

import jax
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt

import jaxsoftmax as jsm
from jaxsoftmax import plots

pytestmark = pytest.mark.asks_for_nan  # of curves with empty bins

mpl.use("Agg")
PROBS = np.array([[0.9, 0.1], [0.95, 0.05], [0.3, 0.7], [0.4, 0.6]])
LABELS = np.array([0, 1, 1, 1])
SCORES = np.array([[2.0, 1.9, -1.0, 0.0], [0.5, 0.4, 0.3, 0.2], [3.0, 0.0, 0.0, 2.5]])


@pytest.fixture
def curve():
    return jsm.calibration.reliability_curve(PROBS, LABELS, num_bins=5)


@pytest.fixture(autouse=True)
def _no_figure_is_shown_or_left(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("shown"))
    yield
    plt.close("all")


DRAW = {
    "reliability_diagram": lambda ax=None: plots.reliability_diagram(
        jsm.calibration.reliability_curve(PROBS, LABELS), ax
    ),
    "simplex_plot": lambda ax=None: plots.simplex_plot(jsm.softmax, ax, resolution=20),
    "support_plot": lambda ax=None: plots.support_plot(jsm.sparsemax, SCORES, ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_draws_on_the_axes_that_it_is_given(name):
    axes = plt.subplots(1, 2)[1]
    assert DRAW[name](axes[1]) is axes[1]
    assert plt.get_fignums() == [1]
    assert not axes[0].get_children()[0].get_visible() or not axes[0].lines
    assert axes[1].has_data()
    axes[1].figure.canvas.draw()


@pytest.mark.parametrize("name", DRAW)
def test_makes_axes_of_its_own(name):
    before = plt.subplots()[1]
    ax = DRAW[name]()
    assert isinstance(ax, mpl.axes.Axes)
    assert ax.figure is not before.figure
    assert not before.has_data()
    ax.figure.canvas.draw()


def test_reliability_diagram_shows_the_curve(curve):
    ax = plots.reliability_diagram(curve, color="#123456", label="mine", unit="digits")
    dots = ax.collections[-1]
    offsets = np.ma.filled(dots.get_offsets(), np.nan)
    full = np.asarray(curve.count) > 0
    drawn = offsets[~np.isnan(offsets).any(1)]
    np.testing.assert_allclose(drawn, np.stack([curve.confidence, curve.accuracy], -1)[full])
    assert colors.same_color(dots.get_facecolor(), "#123456")
    assert ax.get_legend_handles_labels()[1] == ["mine"]
    intervals = [s[:, 1] for s in ax.collections[0].get_segments() if len(s) == 2]
    np.testing.assert_allclose(intervals, np.stack([curve.lower, curve.upper], -1)[full])
    (counts,) = ax.child_axes
    heights = np.array([bar.get_height() for bar in counts.patches])
    np.testing.assert_allclose(heights**2 * 2, curve.count)
    assert [text.get_text() for text in counts.texts] == ["1", "1", "2"]
    assert counts.get_ylabel() == "digits"
    assert counts.get_xlabel() == "confidence"
    ax.figure.canvas.draw()
    assert counts.xaxis.get_ticklabels()[-1].get_text().endswith("%")


def test_reliability_diagram_of_nothing():
    empty = jsm.calibration.reliability_curve(np.zeros((0, 2)), np.zeros(0, int))
    plots.reliability_diagram(empty).figure.canvas.draw()


def pixels(mapping, **options):
    """The colours at the corners, at their midpoints, and in the centre."""
    ax = plots.simplex_plot(mapping, resolution=101, **options)
    (image,) = ax.images
    data = image.get_array()
    at = {"1": (0, 0), "2": (0, 100), "3": (100, 50), "1-2": (0, 50), "centre": (33, 50)}
    return ax, {name: data[index] for name, index in at.items()}


def test_simplex_plot_mixes_colours_by_probability():
    red_green_blue = np.eye(3)
    ax, colour = pixels(jsm.softmax, scale=2.0, colors=["red", "#00ff00", "blue"])
    assert ax.get_title() == "softmax"
    corner = np.array([np.exp(2), 1, 1]) / (np.exp(2) + 2)
    np.testing.assert_allclose(colour["1"], corner, atol=1e-6)
    np.testing.assert_allclose(colour["2"], np.roll(corner, 1), atol=1e-6)
    np.testing.assert_allclose(colour["3"], np.roll(corner, 2), atol=1e-6)
    np.testing.assert_allclose(colour["centre"], [1 / 3] * 3, atol=0.02)
    plain = len(ax.collections)
    hot = functools.partial(jsm.sparsemax, temperature=0.5)
    ax, colour = pixels(hot, colors=["red", "#00ff00", "blue"], labels=("a", "b", "c"))
    assert ax.get_title() == "sparsemax"
    np.testing.assert_array_equal(colour["1"], red_green_blue[0])
    np.testing.assert_allclose(colour["1-2"], [0.5, 0.5, 0], atol=1e-6)
    assert len(ax.collections) == plain + 3  # where each class ends
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c"]


def test_simplex_plot_has_place_for_a_title():
    ax = plots.simplex_plot(jsm.softmax, resolution=51)
    ax.set_title("one's own")
    ax.figure.canvas.draw()
    corner, title = ax.texts[2].get_window_extent(), ax.title.get_window_extent()
    assert title.y0 > corner.y1


def test_edge_on_points_of_the_grid_is_straight():
    # Of two classes with scores 4 and 0, mixed, the second is left out below a quarter.
    ax = plots.simplex_plot(jsm.entmax15)
    corners = np.concatenate(
        [path.vertices for line in ax.collections for path in line.get_paths()]
    )
    low = corners[(corners[:, 1] < 0.1) & (abs(corners[:, 0] - 0.25) < 0.02)]
    assert len(low) > 0
    assert np.ptp(low[:, 0]) < 1e-3


def test_support_plot_counts_classes():
    temperatures = np.array([0.1, 1.0, 4.0])
    ax = plots.support_plot(
        {"sparse": jsm.sparsemax, "half": jsm.entmax15}, SCORES, temperatures=temperatures
    )
    assert [line.get_label() for line in ax.get_lines()] == ["sparse", "half"]
    for line, mapping in zip(ax.get_lines(), (jsm.sparsemax, jsm.entmax15), strict=True):
        x, y = line.get_data()
        np.testing.assert_array_equal(x, temperatures)
        wanted = [np.mean(np.sum(mapping(SCORES / t) > 0, -1)) for t in temperatures]
        np.testing.assert_allclose(y, wanted)
    assert ax.get_legend() is not None


def test_support_plot_of_mappings_with_one_name():
    several = [functools.partial(jsm.entmax, alpha=alpha) for alpha in (1.2, 2.0)]
    labels = [line.get_label() for line in plots.support_plot(several, np.eye(3)).get_lines()]
    assert labels == ["entmax", "entmax"]


def test_support_plot_of_one_or_several():
    names = [line.get_label() for line in plots.support_plot(jsm.entmax15, SCORES).get_lines()]
    assert names == ["entmax15"]
    ax = plots.support_plot([jsm.softmax, functools.partial(jsm.entmax, alpha=1.2)], SCORES)
    assert [line.get_label() for line in ax.get_lines()] == ["softmax", "entmax"]


CALLS = {
    "no curve": (lambda: plots.reliability_diagram(PROBS), TypeError, "curve must be a Reliab"),
    "several curves": (
        lambda: plots.reliability_diagram(
            jax.vmap(jsm.calibration.reliability_curve)(PROBS[None], LABELS[None])
        ),
        ValueError,
        r"curve must have one axis, the bins, got shape \(1, 15\)",
    ),
    "two labels": (
        lambda: plots.simplex_plot(jsm.softmax, labels=("a", "b")),
        ValueError,
        "labels must be three, one per class, got 2",
    ),
    "resolution": (
        lambda: plots.simplex_plot(jsm.softmax, resolution=1),
        ValueError,
        "resolution must be at least 2, got 1",
    ),
    "not a mapping": (
        lambda: plots.simplex_plot(jsm.logsumexp, resolution=5),
        ValueError,
        r"mapping must return shape \(25, 3\), got shape \(25,\)",
    ),
    "one row": (
        lambda: plots.support_plot(jsm.softmax, SCORES[0]),
        ValueError,
        r"scores must have shape \(rows, classes\), got shape \(4,\)",
    ),
    "temperature 0": (
        lambda: plots.support_plot(jsm.softmax, SCORES, temperatures=[0.0, 1.0]),
        ValueError,
        "temperatures must be positive numbers",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()
    assert name == "not a mapping" or not plt.get_fignums()


def test_without_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
import jaxsoftmax as jsm
try:
    jsm.plots.simplex_plot(jsm.softmax)
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = "jaxsoftmax.plots needs matplotlib, which is not installed: "
    assert out.stdout == f'{wanted}pip install "jaxsoftmax[plots]"\n'
