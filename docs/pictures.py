"""Draws the pictures of the README and the docs: `python docs/pictures.py`."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import jaxsoftmax as jsm
from jaxsoftmax import calibration
from jaxsoftmax._demo import figures, theme

HERE = pathlib.Path(__file__).parent / "images"
COLORS = tuple(map(theme.light, ("blue", "orange", "green")))
MAPPINGS = {
    "softmax": jsm.softmax,
    "entmax15": jsm.entmax15,
    "sparsemax": jsm.sparsemax,
    "sparsemax,\nsink=1": functools.partial(jsm.sparsemax, sink=1.0),
}


def mappings() -> None:
    """What mappings make of three scores, one of which grows, and of the scores of attention."""
    figure = _figure(5.4, 3.7)
    top, bottom = figure.subplots(2, len(MAPPINGS), height_ratios=(1, 1.1))
    for (name, mapping), above, below in zip(MAPPINGS.items(), top, bottom, strict=True):
        _draw_probabilities(above, *_of_three_scores(mapping))
        _draw_attention(below, mapping)
        above.set_title(name, fontsize=9, linespacing=1)
        above.set(xlabel="score t", xticks=[-2, 0, 2], yticks=[0, 0.5, 1])
        above.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    for ax in (*top[1:], *bottom[1:]):
        ax.set_yticklabels([])
    top[0].set_ylabel("probability")
    bottom[0].set_ylabel("query")
    handles = top[0].get_lines()
    labels = ("score t", "score 0.5", "score −0.2")
    figure.legend(handles, labels, ncols=3, loc="outside lower center", handlelength=1.5)
    _save(figure, "mappings")


def each_mapping() -> None:
    """A small picture of each mapping, to stand beside its name."""
    for name, (x, p) in {
        **{name: _of_three_scores(getattr(jsm, name)) for name in _WITHOUT_PARAMETERS},
        "entmax": _of_three_scores(functools.partial(jsm.entmax, alpha=1.25)),
        "normmax": _of_three_scores(jsm.normmax),
        "budget_sparsemax": _of_three_scores(functools.partial(jsm.budget_sparsemax, budget=1.5)),
        "sinkhorn": _of_three_scores(_sinkhorn_of_first_row),
        "logsumexp": _of_three_scores(lambda x: jsm.logsumexp(x)[:, None]),
    }.items():
        figure = _figure(1.25, 0.7)
        ax = figure.subplots()
        _draw_probabilities(ax, x, p, width=1.6)
        ax.set(xticks=[], yticks=[])
        if name in ("log_softmax", "logsumexp"):
            ax.set_ylim(-4, 4)
        _save(figure, f"mappings/{name}")


_WITHOUT_PARAMETERS = (
    *("softmax", "log_softmax", "entmax15", "sparsemax", "softpick", "stick_breaking", "hardmax"),
)


def _of_three_scores(mapping) -> tuple[jax.Array, jax.Array]:
    """The first score, which grows, and what a mapping makes of it and of two others."""
    first = jnp.linspace(-3, 3, 301)
    return first, mapping(jnp.stack([first, jnp.full_like(first, 0.5), 0 * first - 0.2], 1))


def _sinkhorn_of_first_row(scores):
    """Three scores are the first row of a matrix whose other scores are 0."""
    return jsm.sinkhorn(jnp.pad(scores[:, None], ((0, 0), (0, 2), (0, 0))))[:, 0]


def _draw_probabilities(ax: Axes, x, p, width: float = 2.0) -> None:
    for values, color in zip(p.T, COLORS, strict=False):
        # An exact zero is no line at all.
        ax.plot(x, jnp.where(values != 0, values, jnp.nan), color=color, lw=width)
    ax.set_ylim(-0.04, 1.04)


def _draw_attention(ax: Axes, mapping, length: int = 24) -> None:
    steps = jnp.arange(length)
    query, key = (_features(steps, seed)[None, :, None] for seed in (0, 1))
    # With the identity as values, the outputs are the weights.
    value = jnp.eye(length)[None, :, None]
    weights = jsm.dot_product_attention(query, key, value, normalizer=mapping, is_causal=True)
    weights = np.asarray(weights[0, :, 0])
    # A blue that is seen on light and on dark paper; where the weight is 0, there is only paper.
    image = np.empty((*weights.shape, 4))
    image[..., :3] = to_rgb("#2f8fd0")
    image[..., 3] = np.where(weights > 0, 0.15 + 0.85 * weights, 0)
    ax.set(xlabel="key", xticks=[0, 10, 20], yticks=[0, 10, 20])
    ax.grid(visible=False)
    ax.imshow(image, interpolation="nearest")


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
    figure = _figure(5.4, 3.3)
    titles = {1.0: "before", float(fitted): f"after, temperature {fitted:.2f}"}
    for ax, (t, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        probs = jsm.softmax(logits[1::2], temperature=t)
        jsm.plots.reliability_diagram(
            calibration.reliability_curve(probs, labels[1::2], num_bins=8), ax
        )
        ax.set_title(title, fontsize=9)
    _save(figure, "calibration")


def plots() -> None:
    """One of each of `jaxsoftmax.plots`."""
    logits = 2 * jax.random.normal(jax.random.key(0), (5000, 10))
    labels = jsm.sample(jax.random.key(1), logits, temperature=1.5)
    curve = calibration.reliability_curve(jsm.softmax(logits), labels, num_bins=10)
    for name, draw in {
        "reliability_diagram": lambda ax: jsm.plots.reliability_diagram(curve, ax),
        "simplex_plot": lambda ax: jsm.plots.simplex_plot(
            jsm.entmax15, ax, labels=("a", "b", "c"), colors=COLORS
        ),
        "support_plot": lambda ax: jsm.plots.support_plot(
            [jsm.softmax, jsm.entmax15, jsm.sparsemax], logits, ax
        ),
    }.items():
        figure = _figure(3.8, 3.4)
        draw(figure.subplots())
        _save(figure, f"plots/{name}")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, name: str) -> None:
    path = HERE / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figures.svg(figure))


if __name__ == "__main__":
    with matplotlib.rc_context(figures.STYLE):
        mappings()
        each_mapping()
        calibration_curves()
        plots()
