"""Whether what is predicted with probability 0.8 comes true 8 times in 10, and how to mend it."""

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
