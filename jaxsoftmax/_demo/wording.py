"""Sentences that depend on the numbers, so that screen and page say the same and say it right."""

from jaxsoftmax._demo.evaluation import Judgement, Result

INFINITY = "Infinite means that the true class of at least one digit got probability 0:"


def infinity_notes(results: list[Result]) -> list[str]:
    """Says of each infinite negative log-likelihood what lies behind it; follows `INFINITY`."""
    return [
        f"{result.model.name} {when}: {_zeros(judgement)}"
        for result in results
        for when, judgement in (("before", result.before), ("after", result.after))
        if judgement.likelihood.zeros
    ]


def temperature_verdict(result: Result) -> str:
    """Says what the fitted temperature does and what came of it on the test digits."""
    return f"{_effect(result.temperature)} {_outcome(result)}"


def _zeros(judgement: Judgement) -> str:
    zeros, count = judgement.likelihood.zeros, len(judgement.probs)
    return f"{zeros} of {count} digits; over the others {judgement.likelihood.mean_of_rest:.3f}"


def _effect(temperature: float) -> str:
    if f"{temperature:.2f}" == "1.00":
        return "A temperature of 1 changes nothing: the validation digits found nothing to mend."
    if temperature < 1:
        return "A temperature below 1 sharpens: on the validation digits the model was too modest."
    return "A temperature above 1 softens: on the validation digits the model was too sure."


def _outcome(result: Result) -> str:
    before, after = result.before.calibration_error, result.after.calibration_error
    if f"{before:.2%}" == f"{after:.2%}":
        return "On the test digits the calibration error stays as it was."
    if after < before:
        return "On the test digits the calibration error falls."
    return (
        "On the test digits the calibration error nevertheless rises: "
        "with so few mistakes to measure, chance moves it about as much as the temperature does."
    )
