"""Judging a trained network on the test digits, as it is and after scaling its scores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsoftmax import calibration
from jaxsoftmax._demo import network
from jaxsoftmax._demo.digits import Digits
from jaxsoftmax._demo.models import Model
from jaxsoftmax._demo.training import Trained

NUM_BINS = 10
# Without it, twenty numbers would also fit what is peculiar to the validation digits.
PENALTY = 0.1


class Likelihood(NamedTuple):
    """The negative log-likelihood of the true classes, in nats per digit.

    Attributes:
      mean: Over all digits; infinite as soon as one true class has probability 0.
      zeros: How many digits have probability 0 for their true class.
      mean_of_rest: Over the other digits; NaN when there are none.
    """

    mean: float
    zeros: int
    mean_of_rest: float


class Judgement(NamedTuple):
    """What one set of probabilities is worth on the test digits.

    Attributes:
      probs: (N, 10), what the mapping gave.
      accuracy: The share of digits whose true class got the largest.
      likelihood: The negative log-likelihood of the true classes.
      calibration_error: The expected calibration error.
      smooth_error: The smooth calibration error.
      squares: (N,), the Brier score of each digit.
      support: The mean number of classes with a probability above 0.
      curve: The reliability curve.
    """

    probs: np.ndarray
    accuracy: float
    likelihood: Likelihood
    calibration_error: float
    smooth_error: float
    squares: np.ndarray
    support: float
    curve: calibration.ReliabilityCurve

    @property
    def brier(self) -> float:
        """The Brier score."""
        return float(np.mean(self.squares))


class Result(NamedTuple):
    """All that the table and the page tell about one model.

    Attributes:
      model: The model.
      trained: Its weights and history.
      scores: (N, 10), of the test digits.
      temperature: What was fitted on the validation digits.
      before: The judgement of the scores as they are.
      after: That of the scores over the temperature.
      vector: That after vector scaling.
    """

    model: Model
    trained: Trained
    scores: np.ndarray
    temperature: float
    before: Judgement
    after: Judgement
    vector: Judgement

    @property
    def judgements(self) -> dict[str, Judgement]:
        """The judgements by the name of the scaling."""
        return {"none": self.before, "temperature": self.after, "vector": self.vector}


def evaluate(model: Model, trained: Trained, digits: Digits) -> Result:
    """Fits both scalings on the validation digits and judges the model on the test digits.

    The scalings minimize the Brier score, which also decides in the end. Unlike the log-likelihood
    it is finite where a sparse mapping gives the true class 0.

    Args:
      model: The mapping.
      trained: The network's weights and history.
      digits: All splits; the training split is not looked at.

    Returns:
      The temperature, and a judgement without scaling and with either.
    """
    score = jax.jit(network.apply)
    held_out = score(trained.params, digits.validation.images), digits.validation.labels

    def brier(scores: Array, labels: Array) -> Array:
        return calibration.brier_score(model.mapping(scores), labels, reduction="none")

    temperature = calibration.fit_temperature(*held_out, loss=brier)
    scale, bias = calibration.fit_vector_scaling(*held_out, penalty=PENALTY, loss=brier)
    scores = score(trained.params, digits.test.images)
    labels = digits.test.labels
    return Result(
        model=model,
        trained=trained,
        scores=np.asarray(scores),
        temperature=float(temperature),
        before=_judge(model.mapping(scores), labels),
        after=_judge(model.mapping(scores, temperature=temperature), labels),
        vector=_judge(model.mapping(scores * scale + bias), labels),
    )


def _judge(probs: Float[Array, "n classes"], labels: Int[Array, " n"]) -> Judgement:
    error = calibration.expected_calibration_error(probs, labels, num_bins=NUM_BINS)
    return Judgement(
        probs=np.asarray(probs),
        accuracy=float(jnp.mean(jnp.argmax(probs, axis=-1) == labels)),
        likelihood=_likelihood(np.asarray(probs), np.asarray(labels)),
        calibration_error=float(error),
        smooth_error=float(calibration.smooth_calibration_error(probs, labels)),
        squares=np.asarray(calibration.brier_score(probs, labels, reduction="none"), np.float64),
        support=float(jnp.mean(jnp.sum(probs > 0, axis=-1))),
        curve=calibration.reliability_curve(probs, labels, num_bins=NUM_BINS),
    )


def _likelihood(probs: np.ndarray, labels: np.ndarray) -> Likelihood:
    of_true_class = probs[np.arange(len(labels)), labels].astype(np.float64)
    possible = of_true_class > 0
    zeros = int(np.sum(~possible))
    rest = float(np.mean(-np.log(of_true_class[possible]))) if possible.any() else np.nan
    return Likelihood(mean=np.inf if zeros else rest, zeros=zeros, mean_of_rest=rest)
