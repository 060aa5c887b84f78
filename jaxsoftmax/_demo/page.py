"""The page: one self-contained HTML file that tells the whole story."""

from html import escape
from importlib import resources

import numpy as np

from jaxsoftmax._demo import figures, gallery
from jaxsoftmax._demo.digits import Digits, Split
from jaxsoftmax._demo.embedding import data_uri, svg_image
from jaxsoftmax._demo.evaluation import NUM_BINS, Judgement, Result
from jaxsoftmax._demo.models import MODELS
from jaxsoftmax._demo.wording import (
    INFINITY,
    infinity_notes,
    temperature_verdict,
    vector_verdict,
)

_COLUMNS = (
    "Mapping",
    "Scaling",
    "Test accuracy",
    "Negative log-likelihood",
    "Expected calibration error",
    "Smooth calibration error",
    "Brier score",
    "Classes above zero",
)
_TEMPERATURES = 10 * np.linspace(0, 1, 201, dtype=np.float32) ** 2  # more where more happens


def page(results: list[Result], digits: Digits, *, epochs: int, seed: int) -> str:
    """Builds the page.

    Args:
      results: The models, in the order in which they appear.
      digits: The splits.
      epochs: How long each model was trained.
      seed: The seed of this run.

    Returns:
      A whole HTML document, with its style and pictures inside.
    """
    style = resources.files("jaxsoftmax._demo").joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>How sure is it? · jaxsoftmax</title>
<style>
{style}</style>
</head>
<body>
{_opening(results, digits, epochs)}
<main>
{_numbers(results, digits.test.size)}
{_learning(results, digits)}
{_calibration(results, digits)}
{_temperature(results, digits.test)}
{_hard_digits(results, digits)}
</main>
{_closing(results, epochs, seed)}
</body>
</html>
"""


def _opening(results: list[Result], digits: Digits, epochs: int) -> str:
    total = digits.train.size + digits.validation.size + digits.test.size
    models = "".join(
        f'<li style="--colour:{result.model.colour}"><strong>{escape(result.model.name)}</strong> '
        f"{escape(result.model.blurb)}</li>"
        for result in results
    )
    return f"""<header>
<div class="opening">
<div>
<p class="eyebrow">jaxsoftmax</p>
<h1>How sure is it?</h1>
<p class="lead">A small network looks at a handwritten digit and gives each of the ten classes a
score. Its last step turns the scores into probabilities, and there is more than one way to take
that step. Here the same network learns once for each way: how often is it right, and can its
confidence be believed?</p>
<p class="facts">{total:,} scanned digits: {digits.train.size} to learn from,
{digits.validation.size} to fit the scalings on, {digits.test.size} to judge by. Each model
went through its training digits {_times(epochs)}.</p>
</div>
<figure>{gallery.example(results, digits.test)}<figcaption>One hard test digit, and the probability
that each model gives to the ten classes. A grey dot is exactly zero.</figcaption></figure>
</div>
<ul class="models">{models}</ul>
</header>"""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _numbers(results: list[Result], test_size: int) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    body = "".join(
        _row(result, scaling, judgement)
        for result in results
        for scaling, judgement in result.judgements.items()
    )
    return f"""<section>
<h2>The numbers</h2>
<p>All of them are measured on the {test_size} test digits, which neither training nor any
scaling has seen. Each model is judged by its scores as they are, by its scores over a fitted
temperature T, and after vector scaling.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
{_notes(results)}
<dl>
<div><dt>Negative log-likelihood</dt><dd>The average surprise at the true class; lower is better. It
is infinite as soon as one true class gets probability exactly 0. A sparse mapping can do that: it
is the price of saying a plain no.</dd></div>
<div><dt>Expected calibration error</dt><dd>How far confidence and accuracy lie apart on average, in
{NUM_BINS} bins of equal width; 0 is perfect.</dd></div>
<div><dt>Smooth calibration error</dt><dd>The same distance without bins: smoothed with a kernel as
wide as the error itself, so that no digit can fall on the wrong side of an edge.</dd></div>
<div><dt>Brier score</dt><dd>The squared distance of the ten probabilities from what the digit is;
lower is better. It stays finite whatever is said no to.</dd></div>
<div><dt>Temperature</dt><dd>One number that divides all scores before the mapping, fitted with the
model's own loss. The most probable class stays the same, so accuracy does too.</dd></div>
<div><dt>Vector scaling</dt><dd>A scale and a bias for each class, twenty numbers, fitted in the
same way but for a penalty that keeps them close to the temperature. It can change which class is
most probable.</dd></div>
<div><dt>Classes above zero</dt><dd>How many of the ten classes keep any probability, on
average.</dd></div>
</dl>
</section>"""


def _notes(results: list[Result]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in infinity_notes(results))
    return f'<div class="notes"><p>{INFINITY}</p><ul>{items}</ul></div>' if items else ""


def _row(result: Result, scaling: str, judgement: Judgement) -> str:
    values = (
        scaling,
        f"{judgement.accuracy:.2%}",
        _likelihood(judgement),
        f"{judgement.calibration_error:.2%}",
        f"{judgement.smooth_error:.2%}",
        f"{judgement.brier:.4f}",
        f"{judgement.support:.2f}",
    )
    cells = "".join(
        f'<td data-label="{column}"><span>{value}</span></td>'
        for column, value in zip(_COLUMNS[1:], values, strict=True)
    )
    return (
        f'<tr style="--colour:{result.model.colour}">'
        f'<th scope="row">{escape(result.model.name)}</th>{cells}</tr>'
    )


def _likelihood(judgement: Judgement) -> str:
    return "∞" if judgement.likelihood.zeros else f"{judgement.likelihood.mean:.3f}"


def _change(before: str, after: str) -> str:
    return f'{before} <span class="arrow">→</span> {after}'


def _learning(results: list[Result], digits: Digits) -> str:
    names = _and([result.model.name for result in results])
    accuracy_end = _and(
        [f"{result.model.name} {result.trained.epochs[-1].accuracy:.1%}" for result in results]
    )
    accuracy = svg_image(
        figures.accuracy_curves(results),
        f"Validation accuracy by epoch. At the end: {escape(accuracy_end)}.",
    )
    loss = svg_image(figures.loss_curves(results), f"Training loss by epoch, of {escape(names)}.")
    return f"""<section>
<h2>Learning</h2>
<p>All models start from the same weights and see the same batches, so whatever differs comes from
the mapping and its loss.</p>
<div class="pair">
<figure><h3>Validation accuracy</h3>{accuracy}<figcaption>The share of the {digits.validation.size}
validation digits read correctly after each epoch. No model was chosen by it: the weights after the
last epoch are the ones that count.</figcaption></figure>
<figure><h3>Training loss</h3>{loss}<figcaption>Each model's own loss, on a logarithmic scale. The
losses have different units, so compare the shapes, not the heights. Those of the sparse mappings
reach exactly zero for a digit once its score leads by enough; cross-entropy only comes
near.</figcaption></figure>
</div>
</section>"""


def _calibration(results: list[Result], digits: Digits) -> str:
    rows = "".join(map(_calibration_row, results))
    return f"""<section>
<h2>Can its confidence be believed?</h2>
<p>Take all digits that a model reads with a confidence of about 80%. If the confidence can be
believed, about 80% of those readings are right. Each dot is one bin of digits with similar
confidence, larger the more digits it holds; on the dashed diagonal confidence and accuracy agree.
Above it a model is too modest, below it too sure.</p>
<p>The pale bar around a dot is the range (95%) in which the true share may lie, given how few
digits the bin holds: where it crosses the diagonal, the gap may be chance. The columns underneath
count the {digits.test.size} test digits bin by bin; their heights grow with the square root.</p>
{rows}
</section>"""


def _calibration_row(result: Result) -> str:
    name = escape(result.model.name)
    diagrams = "".join(
        f"<figure><h4>{when}</h4>{_diagram(result, judgement, when)}</figure>"
        for when, judgement in (
            ("Unscaled", result.before),
            (f"Temperature, T = {result.temperature:.3f}", result.after),
            ("Vector scaling", result.vector),
        )
    )
    change = _change(
        f"{result.before.calibration_error:.2%}", f"{result.after.calibration_error:.2%}"
    )
    return f"""<div class="calibration" style="--colour:{result.model.colour}">
<div><div><h3 class="name">{name}</h3>
<p class="merit">{change}</p>
<p class="label">expected calibration error, by the temperature</p></div>
<p>{temperature_verdict(result)} {vector_verdict(result)}</p></div>
{diagrams}
</div>"""


def _diagram(result: Result, judgement: Judgement, when: str) -> str:
    alt = (
        f"Reliability diagram of {escape(result.model.name)}. {when}: "
        f"expected calibration error {judgement.calibration_error:.2%}."
    )
    return svg_image(figures.reliability_diagram(judgement.curve, result.model.colour), alt)


def _temperature(results: list[Result], test: Split) -> str:
    row = gallery.most_ambiguous(results)
    label = int(test.labels[row])
    picture = data_uri(figures.digit(np.asarray(test.images[row])), "image/png")
    panels = "".join(
        f'<figure style="--colour:{result.model.colour}">'
        f'<h4 class="name">{escape(result.model.name)}</h4>{_panel(result, row)}</figure>'
        for result in results
    )
    return f"""<section>
<h2>Turning the knob</h2>
<div class="subject"><img src="{picture}" width="96" height="96" alt="A handwritten {label}">
<p>The models are most at odds with themselves about this digit, a {label}. Its scores stay as they
are, and the temperature goes from 0 to 10. At 0 every mapping gives all to the largest score; the
hotter, the more evenly they share. A line ends where its class gets exactly zero: a sparse mapping
says no for longer. The dotted line is at the fitted temperature.</p></div>
<div class="trio">{panels}</div>
</section>"""


def _panel(result: Result, row: int) -> str:
    probs = figures.panel_probabilities(result, row, _TEMPERATURES)
    shares = _and(
        [f"{digit} {share:.0%}" for digit, share in enumerate(probs[-1]) if share >= 0.005]
    )
    return svg_image(
        figures.temperature_panel(result, row, _TEMPERATURES),
        f"Probabilities of one digit under {escape(result.model.name)}, by temperature. At 0: "
        f"{probs[0].argmax()} 100%. At 10: {shares}.",
    )


def _hard_digits(results: list[Result], digits: Digits) -> str:
    return f"""<section>
<h2>The hardest digits</h2>
<p>These are the {gallery.SIZE} test digits whose true class got the least probability, averaged
over the models. Each row of bars is one model, after its temperature; the columns are the classes 0
to 9, and the true one is boxed. A sliver is a small probability. A grey dot is none at all: exactly
zero.</p>
<div class="gallery">{gallery.gallery(results, digits.test)}</div>
</section>"""


def _closing(results: list[Result], epochs: int, seed: int) -> str:
    chosen = [result.model for result in results]
    options = "" if chosen == list(MODELS) else "".join(f" --mapping {m.name}" for m in chosen)
    command = f"python -m jaxsoftmax --epochs {epochs} --seed {seed}{escape(options)}"
    return f"""<footer>
<p>Made by <code>{command}</code>. The same seed gives the same numbers.</p>
<p>Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998), as shipped
with scikit-learn.</p>
</footer>"""


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
