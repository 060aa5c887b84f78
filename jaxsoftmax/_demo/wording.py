"""Sentences that depend on the numbers, so that screen and page say the same and say it right."""

from jaxsoftmax._demo.evaluation import Judgement, Result

INFINITY = "Infinite means that the true class of at least one digit got probability 0:"


def infinity_notes(results: list[Result]) -> list[str]:
    """Says of each infinite negative log-likelihood what lies behind it; follows `INFINITY`."""
    return [
        f"{result.model.name} ({_SCALINGS.get(scaling, scaling)}): {_zeros(judgement)}"
        for result in results
        for scaling, judgement in result.judgements.items()
        if judgement.likelihood.zeros
    ]


_SCALINGS = {"none": "unscaled"}


def vector_verdict(result: Result) -> str:
    """Says what the many numbers of vector scaling are worth beside the one temperature."""
    what = "Vector scaling, a scale and a bias for each class,"
    one, many = (f"{judgement.brier:.4f}" for judgement in (result.after, result.vector))
    if one == many:
        return f"{what} comes out the same by the Brier score, {many}."
    if many < one:
        return f"{what} does better by the Brier score: {many}, where the temperature has {one}."
    return (
        f"{what} does worse by the Brier score: {many}, where the temperature has {one}. "
        "Twenty numbers also fit what is peculiar to the validation digits."
    )


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
