"""The code that does the same in a program of the reader's own."""

from jaxsoftmax._demo.evaluation import PENALTY
from jaxsoftmax._demo.verdict import Candidate

_HEAD = """import jaxsoftmax as jsm
from jaxsoftmax import calibration

# Train with this loss.
loss = jsm.{loss}(scores, labels).mean()
"""
_NONE = """
# No scaling: a temperature of {temperature:.3f} gained nothing.
probs = jsm.{mapping}(new_scores)
"""
_BRIER = """

# Fit the scaling to held-out examples.
def brier(scores, labels):
    return calibration.brier_score(
        jsm.{mapping}(scores), labels, reduction="none"
    )

"""
_TEMPERATURE = """
temperature = calibration.fit_temperature(
    held_out_scores, held_out_labels, loss=brier
)  # here: {temperature:.3f}
probs = jsm.{mapping}(new_scores, temperature=temperature)
"""
_VECTOR = """
scale, bias = calibration.fit_vector_scaling(
    held_out_scores,
    held_out_labels,
    penalty={penalty},
    loss=brier,
)
probs = jsm.{mapping}(new_scores * scale + bias)

# Or, simpler, fit one number. Here it was {temperature:.3f}.
temperature = calibration.fit_temperature(
    held_out_scores, held_out_labels, loss=brier
)
simpler = jsm.{mapping}(new_scores, temperature=temperature)
"""
_PARTS = {
    "none": _HEAD + _NONE,
    "temperature": _HEAD + _BRIER + _TEMPERATURE,
    "vector": _HEAD + _BRIER + _VECTOR,
}


def code(candidate: Candidate) -> str:
    """Writes the code for one model with one scaling.

    Args:
      candidate: The model and the scaling.

    Returns:
      Python that takes `scores`, `labels`, `held_out_scores`, `held_out_labels` and `new_scores`,
      and makes `loss` and `probs`.
    """
    model = candidate.result.model
    return _PARTS[candidate.scaling].format(
        mapping=model.mapping.__name__,
        loss=model.loss.__name__,
        temperature=candidate.result.temperature,
        penalty=PENALTY,
    )
