"""Draws the pictures of the README: `python docs/pictures.py`."""

import pathlib

import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import jaxsoftmax as jsm

HERE = pathlib.Path(__file__).parent / "images"
MAPPINGS = (jsm.softmax, jsm.entmax15, jsm.sparsemax)
COLORS = ("#0072B2", "#D55E00", "#009E73")


def mappings() -> None:
    """The probabilities of three classes while the score of the first grows."""
    first = jnp.linspace(-3, 3, 301)
    scores = jnp.stack([first, jnp.full_like(first, 0.5), jnp.full_like(first, -0.2)], 1)
    figure = Figure(figsize=(9, 2.7), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MAPPINGS), sharey=True)
    for ax, mapping in zip(axes, MAPPINGS, strict=True):
        for k, (p, color) in enumerate(zip(mapping(scores).T, COLORS, strict=True)):
            label = ("score t", "score 0.5", "score -0.2")[k]
            # An exact zero is no line at all.
            ax.plot(first, jnp.where(p > 0, p, jnp.nan), color=color, lw=2.2, label=label)
        ax.set_title(mapping.__name__, fontsize=11)
        ax.set_xlabel("t, the score of the first class")
        ax.set_ylim(-0.04, 1.04)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("probability")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(HERE / "mappings.png")


if __name__ == "__main__":
    mappings()
