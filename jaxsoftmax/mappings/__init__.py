"""Mappings from scores to probabilities.

Unless their docstrings say otherwise, all are `mapping(x, axis=-1, where=None, ...)` and keep these
promises: the dtype that came goes out, half precision being computed in float32 and rounded once;
what `where` excludes and what is -inf has probability exactly 0 and gradient exactly 0; entries of
+inf share their row; a row in which nothing takes part is all 0; NaN among what takes part makes
its row NaN, and so does a negative temperature that is traced; temperature 0 is `hardmax`, or what
is left of it beside a sink, and temperatures below 1e-30 are taken as 0; what a temperature below 1
makes too large for the dtype is infinite.
"""

from jaxsoftmax.mappings._budget import budget_sparsemax as budget_sparsemax
from jaxsoftmax.mappings._entmax import entmax as entmax
from jaxsoftmax.mappings._entmax import entmax15 as entmax15
from jaxsoftmax.mappings._entmax import sparsemax as sparsemax
from jaxsoftmax.mappings._hardmax import hardmax as hardmax
from jaxsoftmax.mappings._log_softmax import log_softmax as log_softmax
from jaxsoftmax.mappings._log_softmax import logsumexp as logsumexp
from jaxsoftmax.mappings._normmax import normmax as normmax
from jaxsoftmax.mappings._sinkhorn import log_sinkhorn as log_sinkhorn
from jaxsoftmax.mappings._sinkhorn import sinkhorn as sinkhorn
from jaxsoftmax.mappings._sinkhorn import sinkhorn_residual as sinkhorn_residual
from jaxsoftmax.mappings._softmax import softmax as softmax
from jaxsoftmax.mappings._softpick import softpick as softpick
from jaxsoftmax.mappings._stick_breaking import stick_breaking as stick_breaking
