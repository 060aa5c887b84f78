"""The hard test digits, each with the probabilities that every model gives it."""

from html import escape

import numpy as np

from jaxsoftmax._demo import figures
from jaxsoftmax._demo.digits import NUM_CLASSES, Split
from jaxsoftmax._demo.embedding import data_uri
from jaxsoftmax._demo.evaluation import Result
from jaxsoftmax._demo.theme import variable

SIZE = 12


def gallery(results: list[Result], test: Split) -> str:
    """Builds the cards of the hardest test digits, hardest first.

    Args:
      results: The models; their probabilities after temperature are shown.
      test: The digits they were judged on.

    Returns:
      The HTML of all cards.
    """
    return "".join(_card(results, test, row) for row in _hardest(results, test))


def example(results: list[Result], test: Split) -> str:
    """Builds the one card, among the hardest, on which the models differ most.

    Args:
      results: As in `gallery`.
      test: As in `gallery`.

    Returns:
      The HTML of the card.
    """
    rows = _hardest(results, test)
    probs = np.stack([result.after.probs[rows] for result in results])
    disagreement = np.sum(np.var(probs, axis=0), axis=-1)
    return _card(results, test, rows[np.argmax(disagreement)])


def most_ambiguous(results: list[Result]) -> int:
    """Finds the digit whose two most probable classes are closest, on average over the models."""
    probs = np.mean([result.after.probs for result in results], axis=0)
    second, first = np.sort(probs, axis=-1)[:, -2:].T
    return int(np.argmin(first - second))


def _hardest(results: list[Result], test: Split) -> list[int]:
    """Finds the digits to whose true class the models, on average, give the least probability."""
    everyone = np.arange(test.size), np.asarray(test.labels)
    of_true_class = np.mean([result.after.probs[everyone] for result in results], axis=0)
    return np.argsort(of_true_class, kind="stable")[:SIZE].tolist()


def _card(results: list[Result], test: Split, row: int) -> str:
    label = int(test.labels[row])
    picture = data_uri(figures.digit(np.asarray(test.images[row])), "image/png")
    readings = "".join(_reading(result, result.after.probs[row], label) for result in results)
    classes = "".join(
        f"<b>{index}</b>" if index == label else f"<span>{index}</span>"
        for index in range(NUM_CLASSES)
    )
    return (
        '<article class="card"><header>'
        f'<img src="{picture}" width="72" height="72" alt="A handwritten {label}">'
        f"<p><strong>This is a {label}</strong><br>{_tally(results, row, label)}</p></header>"
        f'{readings}<div class="classes" aria-hidden="true">{classes}</div></article>\n'
    )


def _tally(results: list[Result], row: int, label: int) -> str:
    total = len(results)
    wrong = sum(_guess(result.after.probs[row]) != label for result in results)
    if total == 1:
        return "misread" if wrong else "read correctly"
    if wrong in (0, total):
        return f"{'misread' if wrong else 'read correctly'} by all {total}"
    return f"misread by {wrong} of {total}"


def _reading(result: Result, probs: np.ndarray, label: int) -> str:
    name = escape(result.model.name)
    guess = _guess(probs)
    mark, verdict = ("✓", "right") if guess == label else ("✗", "wrong")
    spoken = ", ".join(f"{index}: {_percent(prob)}" for index, prob in enumerate(probs) if prob > 0)
    return (
        f'<div class="reading" style="--colour:{variable(result.model.colour)}">'
        f'<p><span class="name">{name}</span>'
        f'<span class="{verdict}">{guess} at {_percent(probs[guess])} {mark}</span></p>'
        f'<div class="bars" role="img" aria-label="{name}: {spoken}">'
        f"{''.join(map(_bar, probs))}</div></div>"
    )


def _bar(prob: float) -> str:
    if prob == 0:
        return '<i class="none"></i>'
    return f'<i style="height:{100 * prob:.1f}%"></i>'


def _guess(probs: np.ndarray) -> int:
    return int(np.argmax(probs))


def _percent(prob: float) -> str:
    # Neither 0% nor 100% is said of what is only nearly so.
    if 0 < prob < 0.005:
        return "under 1%"
    if 0.995 <= prob < 1:
        return "over 99%"
    return f"{prob:.0%}"
