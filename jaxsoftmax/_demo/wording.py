"""Sentences that depend on the numbers: the screen and the page say the same."""

from jaxsoftmax._demo.evaluation import Judgement, Result
from jaxsoftmax._demo.verdict import LEVEL, Candidate, Estimate

INFINITY = "The log-likelihood is infinite if the true class of a digit got probability 0:"


def label(result: Result, scaling: str) -> str:
    """Names a scaling in a table."""
    return f"T={result.temperature:.3f}" if scaling == "temperature" else scaling


def full_name(candidate: Candidate) -> str:
    """Names a model with its scaling in a sentence."""
    scaling = {
        "none": "without scaling",
        "temperature": f"with a temperature of {candidate.result.temperature:.3f}",
        "vector": "with vector scaling",
    }
    return f"{candidate.result.model.name} {scaling[candidate.scaling]}"


def verdict(ranking: list[Candidate]) -> list[str]:
    """Says which candidate is best, and which others may be as good."""
    best, *others = ranking
    equal = [candidate for candidate in others if candidate.may_be_as_good]
    first = (
        f"Here {full_name(best)} is best: its Brier score is {best.brier.mean:.4f} "
        f"({LEVEL:.0%} interval {interval(best.brier)})."
    )
    if not equal:
        return [first, "All others are worse by more than chance explains."]
    names = in_words([full_name(candidate) for candidate in equal])
    beyond = len(others) - len(equal)
    rest = f" The other {beyond} are worse by more than chance explains." if beyond > 1 else ""
    rest = " The other one is worse by more than chance explains." if beyond == 1 else rest
    return [first, f"By chance alone, {names} could be as good.{rest}"]


def interval(estimate: Estimate) -> str:
    """Writes an interval."""
    return f"{estimate.low:.4f} to {estimate.high:.4f}".replace("-", "−")


def infinity_notes(results: list[Result]) -> list[str]:
    """Says of each infinite negative log-likelihood how many digits cause it."""
    return [
        f"{result.model.name}, {label(result, scaling)}: {_zeros(judgement)}"
        for result in results
        for scaling, judgement in result.judgements.items()
        if judgement.likelihood.zeros
    ]


def scaling_effect(result: Result) -> str:
    """Says what both scalings do to the calibration error on the test digits."""
    before, after, vector = (
        f"{judgement.calibration_error:.2%}" for judgement in result.judgements.values()
    )
    if before == after:
        change = f"stays at {before}"
    else:
        falls = result.after.calibration_error < result.before.calibration_error
        change = f"{'falls' if falls else 'rises'} from {before} to {after}"
    return (
        f"A temperature of {result.temperature:.3f} {_effect(result.temperature)}, and the "
        f"calibration error {change}. With vector scaling, it is {vector}."
    )


def in_words(words: list[str]) -> str:
    """Joins words as a sentence does."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _zeros(judgement: Judgement) -> str:
    zeros, count = judgement.likelihood.zeros, len(judgement.probs)
    rest = f"{judgement.likelihood.mean_of_rest:.3f}"
    return f"{zeros} of {count:,} digits; the mean over the others is {rest}"


def _effect(temperature: float) -> str:
    if f"{temperature:.2f}" == "1.00":
        return "changes nothing"
    return "sharpens the probabilities" if temperature < 1 else "softens the probabilities"
