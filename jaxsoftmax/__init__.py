"""Pure JAX functions that turn scores into probabilities."""

from jaxsoftmax import calibration as calibration
from jaxsoftmax._differentiation import custom_vjp as custom_vjp
from jaxsoftmax.losses import cross_entropy as cross_entropy
from jaxsoftmax.losses import entmax_loss as entmax_loss
from jaxsoftmax.losses import sparsemax_loss as sparsemax_loss
from jaxsoftmax.mappings import entmax as entmax
from jaxsoftmax.mappings import entmax15 as entmax15
from jaxsoftmax.mappings import hardmax as hardmax
from jaxsoftmax.mappings import log_softmax as log_softmax
from jaxsoftmax.mappings import logsumexp as logsumexp
from jaxsoftmax.mappings import softmax as softmax
from jaxsoftmax.mappings import sparsemax as sparsemax
