"""Calibration: does what is predicted with probability 0.8 come true 8 times in 10?

Fits, on held-out examples
    fit_temperature               one number; use it as `softmax(logits, temperature=t)`
    fit_vector_scaling            a scale and a bias per class; Platt scaling for one column
    fit_matrix_scaling            a matrix and a bias per class
    fit_beta_scaling              three numbers per class, for probabilities; apply `beta_scaling`
    fit_isotonic                  an increasing curve per class; apply `isotonic`

Measures of probabilities and labels
    smooth_calibration_error      how far confidence is from accuracy; has no bins to choose
    expected_calibration_error    the same over bins (ECE)
    maximum_calibration_error     the worst bin
    classwise_calibration_error   all classes, not only the predicted one
    reliability_curve             confidence and accuracy per bin, to plot
    negative_log_likelihood       a proper score: calibration and sharpness together
    brier_score                   another proper score
    brier_decomposition           the parts of the Brier score
"""

from jaxsoftmax.calibration._bins import ReliabilityCurve as ReliabilityCurve
from jaxsoftmax.calibration._bins import reliability_curve as reliability_curve
from jaxsoftmax.calibration._errors import (
    classwise_calibration_error as classwise_calibration_error,
)
from jaxsoftmax.calibration._errors import expected_calibration_error as expected_calibration_error
from jaxsoftmax.calibration._errors import maximum_calibration_error as maximum_calibration_error
from jaxsoftmax.calibration._one_by_one import beta_scaling as beta_scaling
from jaxsoftmax.calibration._one_by_one import fit_beta_scaling as fit_beta_scaling
from jaxsoftmax.calibration._one_by_one import fit_isotonic as fit_isotonic
from jaxsoftmax.calibration._one_by_one import isotonic as isotonic
from jaxsoftmax.calibration._proper import BrierDecomposition as BrierDecomposition
from jaxsoftmax.calibration._proper import brier_decomposition as brier_decomposition
from jaxsoftmax.calibration._proper import brier_score as brier_score
from jaxsoftmax.calibration._proper import negative_log_likelihood as negative_log_likelihood
from jaxsoftmax.calibration._scaling import fit_matrix_scaling as fit_matrix_scaling
from jaxsoftmax.calibration._scaling import fit_vector_scaling as fit_vector_scaling
from jaxsoftmax.calibration._smooth import smooth_calibration_error as smooth_calibration_error
from jaxsoftmax.calibration._temperature import fit_temperature as fit_temperature

__all__ = [
    "BrierDecomposition",
    "ReliabilityCurve",
    "beta_scaling",
    "brier_decomposition",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "fit_beta_scaling",
    "fit_isotonic",
    "fit_matrix_scaling",
    "fit_temperature",
    "fit_vector_scaling",
    "isotonic",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "reliability_curve",
    "smooth_calibration_error",
]


def __dir__() -> list[str]:
    return list(__all__)
