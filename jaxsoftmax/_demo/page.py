"""The page: one HTML file that needs nothing else."""

from html import escape
from importlib import resources

import numpy as np

from jaxsoftmax._demo import figures, gallery, theme, usage
from jaxsoftmax._demo.digits import Digits, Split
from jaxsoftmax._demo.embedding import data_uri, svg_image
from jaxsoftmax._demo.evaluation import NUM_BINS, Judgement, Result
from jaxsoftmax._demo.models import MODELS
from jaxsoftmax._demo.theme import variable
from jaxsoftmax._demo.verdict import LEVEL, Candidate
from jaxsoftmax._demo.wording import (
    INFINITY,
    in_words,
    infinity_notes,
    interval,
    label,
    scaling_effect,
    verdict,
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
_SCALINGS = {"none": "no scaling", "temperature": "temperature", "vector": "vector scaling"}
_TEMPERATURES = 10 * np.linspace(0, 1, 201, dtype=np.float32) ** 2  # more where more happens


def page(
    results: list[Result], ranking: list[Candidate], digits: Digits, *, epochs: int, seed: int
) -> str:
    """Builds the page.

    Args:
      results: The models, in the order in which they appear.
      ranking: The same with each scaling, the best first.
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
{theme.style()}{style}</style>
</head>
<body>
{_opening(results, digits, epochs)}
<main>
{_verdict(ranking, digits.test.size)}
{_numbers(results)}
{_learning(results, digits)}
{_calibration(results)}
{_temperature(results, digits.test)}
{_hard_digits(results, digits)}
</main>
{_closing(results, epochs, seed)}
</body>
</html>
"""


def _opening(results: list[Result], digits: Digits, epochs: int) -> str:
    models = "".join(
        f'<li style="--colour:{variable(result.model.colour)}">'
        f"<strong>{escape(result.model.name)}</strong> {escape(result.model.blurb)}</li>"
        for result in results
    )
    return f"""<header>
<div class="opening">
<div>
<p class="eyebrow">jaxsoftmax</p>
<h1>How sure is it?</h1>
<p class="lead">A small network looks at a handwritten digit and gives a score to each of the ten
classes. A mapping turns the scores into probabilities. Here the same network is trained once with
each mapping. Which mapping gives the best probabilities, and does it help to scale the scores
first?</p>
<p class="facts">Each network was trained on {digits.train.size} digits, {_times(epochs)} on each.
With so few, it makes mistakes, and it may be too sure of itself. The scalings were fitted on
{digits.validation.size} other digits. Everything else on this page was measured on the
{digits.test.size:,} digits that are left.</p>
</div>
<figure>{gallery.example(results, digits.test)}<figcaption>One of the hardest test digits, and the
probability that each model gives to the ten classes. A grey dot is exactly
zero.</figcaption></figure>
</div>
<ul class="models">{models}</ul>
</header>"""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _verdict(ranking: list[Candidate], test_size: int) -> str:
    first, second = verdict(ranking)
    span = max(candidate.excess.high for candidate in ranking) or 1
    lowest = min(candidate.excess.low for candidate in ranking)
    rows = "".join(_ranked(candidate, lowest, span) for candidate in ranking)
    return f"""<section>
<h2>The verdict</h2>
<p class="answer">{escape(first)}</p>
<p>{escape(second)}</p>
<div class="halves">
<div>
<h3>How much worse than the best</h3>
<ol class="ranking">{rows}</ol>
<p class="facts">The number is the Brier score: the squared distance between the ten probabilities
and the truth. Lower is better, and no other probabilities than the true ones have a lower one on
average. The dot is the difference from the best, and the bar is its {LEVEL:.0%} bootstrap interval.
A candidate whose bar reaches the
vertical line may be as good as the best. The interval tells how much may be due to these
{test_size:,} test digits. The best is also chosen on them, so its score is a little too good. What
another training would change, the interval does not tell: for that, try another
<code>--seed</code>.</p>
</div>
<div>
<h3>Use this in your code</h3>
<pre><code>{escape(usage.code(ranking[0]))}</code></pre>
</div>
</div>
</section>"""


def _ranked(candidate: Candidate, lowest: float, highest: float) -> str:
    low, middle, high = (
        100 * (value - lowest) / (highest - lowest)
        for value in (candidate.excess.low, candidate.excess.mean, candidate.excess.high)
    )
    model = candidate.result.model
    zero = 100 * -lowest / (highest - lowest)
    return (
        f'<li style="--colour:{variable(model.colour)};--low:{low:.1f}%;--middle:{middle:.1f}%;'
        f'--high:{high:.1f}%;--zero:{zero:.1f}%">'
        f'<span class="name">{escape(model.name)}</span> '
        f"<span>{_SCALINGS[candidate.scaling]}</span> <b>{candidate.brier.mean:.4f}</b> "
        f'<span class="track" role="img" aria-label="{candidate.excess.mean:.4f} more than the '
        f'best, interval {interval(candidate.excess)}"><i></i></span></li>\n'
    )


def _numbers(results: list[Result]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    body = "".join(
        _row(result, label(result, scaling), judgement)
        for result in results
        for scaling, judgement in result.judgements.items()
    )
    return f"""<section>
<h2>The numbers</h2>
<p>Each model is measured without scaling, with its scores divided by a fitted temperature T, and
with vector scaling.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
{_notes(results)}
<dl>
<div><dt>Temperature</dt><dd>One number that divides all scores. The most probable class stays the
same, so the accuracy does, too.</dd></div>
<div><dt>Vector scaling</dt><dd>A scale and a bias for each class, twenty numbers. A penalty keeps
them close to the temperature. It may change which class is the most probable.</dd></div>
<div><dt>Negative log-likelihood</dt><dd>Minus the mean logarithm of the probability of the true
class. Lower is better. It is infinite as soon as one true class gets probability 0, as a sparse
mapping may give.</dd></div>
<div><dt>Expected calibration error</dt><dd>The mean distance between confidence and accuracy, in
{NUM_BINS} bins of equal width. 0 is perfect.</dd></div>
<div><dt>Smooth calibration error</dt><dd>The same distance without bins. A kernel smooths it, which
is as wide as the error itself.</dd></div>
<div><dt>Classes above zero</dt><dd>How many of the ten classes have a probability above zero, on
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
        f'<tr style="--colour:{variable(result.model.colour)}">'
        f'<th scope="row">{escape(result.model.name)}</th>{cells}</tr>'
    )


def _likelihood(judgement: Judgement) -> str:
    return "∞" if judgement.likelihood.zeros else f"{judgement.likelihood.mean:.3f}"


def _learning(results: list[Result], digits: Digits) -> str:
    names = in_words([result.model.name for result in results])
    accuracy_end = in_words(
        [f"{result.model.name} {result.trained.epochs[-1].accuracy:.1%}" for result in results]
    )
    accuracy = svg_image(
        figures.accuracy_curves(results),
        f"Validation accuracy by epoch. At the end: {escape(accuracy_end)}.",
    )
    loss = svg_image(figures.loss_curves(results), f"Training loss by epoch, of {escape(names)}.")
    return f"""<section>
<h2>Training</h2>
<p>All models start from the same weights and see the same batches. So every difference comes from
the mapping and its loss.</p>
<div class="pair">
<figure><h3>Validation accuracy</h3>{accuracy}<figcaption>The share of the {digits.validation.size}
validation digits that are read correctly after each epoch. The weights after the last epoch are
used.</figcaption></figure>
<figure><h3>Training loss</h3>{loss}<figcaption>The loss of each model, on a logarithmic scale. Each
has its own loss, so compare the shapes of the lines and not their heights. A sparse loss is
exactly zero once the score of the true class leads by enough, and its line ends where it is zero.
Cross-entropy never reaches zero.</figcaption></figure>
</div>
</section>"""


def _calibration(results: list[Result]) -> str:
    rows = "".join(map(_calibration_row, results))
    return f"""<section>
<h2>Can its confidence be believed?</h2>
<p>Take all digits that a model reads with a confidence of about 80%. If its confidence can be
believed, it is right about 80% of them. Each dot stands for the digits of similar confidence.
On the dashed diagonal, confidence and accuracy are equal. Below it, the model is too sure. Above
it, the model is not sure enough. A temperature above 1 makes it less sure, and one below 1 makes it
more sure.</p>
<p>The pale bar around a dot is the 95% interval of the accuracy. If it crosses the diagonal, the
distance may be chance. The columns below say how many test digits there are; their heights grow
with the square root.</p>
{rows}
</section>"""


def _calibration_row(result: Result) -> str:
    name = escape(result.model.name)
    diagrams = "".join(
        f"<figure><h4>{when}</h4>{_diagram(result, judgement, when)}</figure>"
        for when, judgement in (
            ("No scaling", result.before),
            (f"Temperature, T = {result.temperature:.3f}", result.after),
            ("Vector scaling", result.vector),
        )
    )
    return f"""<div class="calibration" style="--colour:{variable(result.model.colour)}">
<div><h3 class="name">{name}</h3><p>{scaling_effect(result)}</p></div>
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
        f'<figure style="--colour:{variable(result.model.colour)}">'
        f'<h4 class="name">{escape(result.model.name)}</h4>{_panel(result, row)}</figure>'
        for result in results
    )
    return f"""<section>
<h2>What the temperature does</h2>
<div class="subject"><img src="{picture}" width="96" height="96" alt="A handwritten {label}">
<p>This is a {label}. Of all test digits, it is the one whose two most probable classes are closest.
Its scores stay the same, and the temperature goes from 0 to 10. At 0, every mapping gives
everything to the largest score. The higher the temperature, the more evenly the classes share. A
line ends where its class gets exactly zero. The dotted line is at the fitted temperature.</p></div>
<div class="trio">{panels}</div>
</section>"""


def _panel(result: Result, row: int) -> str:
    probs = figures.panel_probabilities(result, row, _TEMPERATURES)
    shares = in_words(
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
<p>These are the {gallery.SIZE} test digits whose true class gets the least probability, averaged
over the models. Each row of bars is one model with its temperature. The columns are the classes 0
to 9, and the true class is boxed. A grey dot is exactly zero.</p>
<div class="gallery">{gallery.gallery(results, digits.test)}</div>
</section>"""


def _closing(results: list[Result], epochs: int, seed: int) -> str:
    chosen = [result.model for result in results]
    options = "" if chosen == list(MODELS) else "".join(f" --mapping {m.name}" for m in chosen)
    command = f"python -m jaxsoftmax --epochs {epochs} --seed {seed}{escape(options)}"
    return f"""<footer>
<p>Made by <code>{command}</code>. The same seed gives the same results.</p>
<p>Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998), part of
scikit-learn.</p>
</footer>"""
