"""Draws the pictures of the README and the docs: `python docs/pictures.py`."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import jaxsoftmax as jsm
from jaxsoftmax import calibration

HERE = pathlib.Path(__file__).parent / "images"
COLORS = ("#0072B2", "#D55E00", "#009E73")
MAPPINGS = {
    "softmax": jsm.softmax,
    "entmax15": jsm.entmax15,
    "sparsemax": jsm.sparsemax,
    "sparsemax, sink=1": functools.partial(jsm.sparsemax, sink=1.0),
}


def mappings() -> None:
    """What mappings make of three scores, one of which grows, and of the scores of attention."""
    figure = _figure(10, 4.5)
    top, bottom = figure.subplots(2, len(MAPPINGS), height_ratios=(1, 1.15))
    for (name, mapping), above, below in zip(MAPPINGS.items(), top, bottom, strict=True):
        _draw_probabilities(above, mapping)
        image = _draw_attention(below, mapping)
        above.set_title(name, fontsize=11)
    for ax in (*top[1:], *bottom[1:]):
        ax.set_yticklabels([])
    top[0].set_ylabel("probability")
    bottom[0].set_ylabel("query")
    handles, labels = top[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc=(0.885, 0.72))
    bar = figure.colorbar(image, ax=list(bottom), pad=0.015, aspect=14)
    bar.set_label("weight (white: exactly 0)", fontsize=9)
    # The space beside the upper row is that of the color bar below.
    figure.colorbar(image, ax=list(top), pad=0.015, aspect=14).ax.set_visible(False)
    figure.savefig(HERE / "mappings.png")


def _draw_probabilities(ax: Axes, mapping) -> None:
    first = jnp.linspace(-3, 3, 301)
    scores = jnp.stack([first, jnp.full_like(first, 0.5), jnp.full_like(first, -0.2)], 1)
    for k, (p, color) in enumerate(zip(mapping(scores).T, COLORS, strict=True)):
        label = ("score t", "score 0.5", "score -0.2")[k]
        # An exact zero is no line at all.
        ax.plot(first, jnp.where(p > 0, p, jnp.nan), color=color, lw=2.2, label=label)
    ax.set(xlabel="t", ylim=(-0.04, 1.04))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def _draw_attention(ax: Axes, mapping, length: int = 24):
    steps = jnp.arange(length)
    query, key = (_features(steps, seed)[None, :, None] for seed in (0, 1))
    # With the identity as values, the outputs are the weights.
    value = jnp.eye(length)[None, :, None]
    weights = jsm.dot_product_attention(query, key, value, normalizer=mapping, is_causal=True)
    weights = weights[0, :, 0]
    blues = LinearSegmentedColormap.from_list("blues", ["#cfe3f2", "#0072B2", "#00263d"])
    blues.set_bad("white")
    ax.set(xlabel="key", xticks=[0, 10, 20], yticks=[0, 10, 20])
    return ax.imshow(jnp.where(weights > 0, weights, jnp.nan), cmap=blues, vmin=0, vmax=1)


def _features(steps, seed):
    """Some that are near where positions are, and some at random."""
    waves = jnp.concatenate(
        [f(steps[:, None] / jnp.array([2.0, 5.0, 9.0])) for f in (jnp.sin, jnp.cos)], 1
    )
    return 1.4 * waves + 0.9 * jax.random.normal(jax.random.key(seed), waves.shape)


def calibration_curves() -> None:
    """The predictions of docs/calibration.md, but more of them, before and after."""
    logits = 4 * jax.random.normal(jax.random.key(0), (40_000, 5))
    labels = jsm.sample(jax.random.key(1), logits, temperature=2.0)
    fitted = calibration.fit_temperature(logits[::2], labels[::2])
    figure = _figure(8, 3.8)
    titles = {1.0: "as predicted", float(fitted): f"at the fitted temperature, {fitted:.2f}"}
    for ax, (t, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        probs = jsm.softmax(logits[1::2], temperature=t)
        jsm.plots.reliability_diagram(
            calibration.reliability_curve(probs, labels[1::2], num_bins=10), ax
        )
        ax.set_title(title, fontsize=11)
    figure.savefig(HERE / "calibration.png")


def plots() -> None:
    """One of each of `jaxsoftmax.plots`."""
    figure = _figure(11, 3.6)
    left, middle, right = figure.subplots(1, 3)
    logits = 2 * jax.random.normal(jax.random.key(0), (5000, 10))
    labels = jsm.sample(jax.random.key(1), logits, temperature=1.5)
    curve = calibration.reliability_curve(jsm.softmax(logits), labels, num_bins=10)
    jsm.plots.reliability_diagram(curve, left)
    jsm.plots.simplex_plot(jsm.entmax15, middle, labels=("a", "b", "c"))
    jsm.plots.support_plot([jsm.softmax, jsm.entmax15, jsm.sparsemax], logits, right)
    names = ("reliability_diagram", "simplex_plot", "support_plot")
    for ax, name in zip((left, middle, right), names, strict=True):
        ax.set_title(name, fontsize=11, pad=14)
    figure.savefig(HERE / "plots.png")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    return figure


if __name__ == "__main__":
    mappings()
    calibration_curves()
    plots()
