"""Pure JAX functions that turn scores into probabilities.

    >>> import jax.numpy as jnp, jaxsoftmax as jsm
    >>> jsm.sparsemax(jnp.array([1.0, 0.5, -1.0]))
    Array([0.75, 0.25, 0.  ], dtype=float32)

A mapping is called as `mapping(x, axis=-1, where=None, *, temperature=1.0)`. All functions work
under `jax.jit`, `jax.vmap` and the other transformations, and have derivatives in both modes.
`help(jaxsoftmax.softmax)` shows one function with its formula, arguments, errors and an example.

Mappings: from scores to probabilities
    softmax               the default: every entry gets something
    log_softmax           its logarithm, exact also where one entry dominates
    logsumexp             the logarithm of the denominator of softmax: one value per row
    entmax15              sparse, with smooth edges; between softmax and sparsemax
    sparsemax             sparser; probabilities are linear in the scores
    entmax                `alpha` from 1 (softmax) over 2 (sparsemax) upwards; can be learned
    normmax               sparse; the larger `alpha`, the more evenly the entries share
    budget_sparsemax      entries from 0 to 1 that sum to a budget: choose several
    softpick              scores below 0 get nothing, and a row may sum to less than 1
    stick_breaking        each entry takes a share of what the entries before it left
    sinkhorn              soft assignment: rows and columns have given sums
    log_sinkhorn          its logarithm, also where a probability is too small for a float
    sinkhorn_residual     how far the sums of its rows and columns are from those
    hardmax               everything to the largest score; ties share

A mapping of your own
    Form                  its equations, entry by entry
    threshold_mapping     makes a mapping of them, with all that those above have
    testing               checks such a mapping

Losses: from scores and targets to one value per row
    cross_entropy         of softmax; with label smoothing, z-loss and class weights
    entmax_loss           of entmax and entmax15
    sparsemax_loss        of sparsemax
    kl_divergence         of two softmaxes, from the scores of both
    fenchel_young_loss    of your own mapping
    linear_cross_entropy  any of these for a large last layer, without holding all scores

Attention with any mapping
    dot_product_attention  the signature of `jax.nn`; memory is linear in the sequence
    attention_fn           the same for Flax's `MultiHeadAttention`

Choosing and sampling
    top_k_mask            the k largest scores, as a mask for `where`
    top_p_mask            the most probable entries that together reach p (nucleus)
    min_p_mask            the entries that reach p times the largest probability
    sample                random indices
    gumbel_softmax        random one-hot rows, hard or soft, with a gradient
    straight_through      one-hot forward, the derivatives of a mapping

Measures: one value per row of probabilities
    shannon_entropy       how uncertain
    tsallis_entropy       the same for other `alpha`
    support_size          how many entries are above 0

Modules and tools
    calibration           do probabilities match frequencies? measures, and fits that correct them
    plots                 pictures of the above; needs matplotlib
    custom_vjp            `jax.custom_vjp` whose functions also have forward mode
"""

import importlib as _importlib
import typing as _typing

from jaxsoftmax._differentiation import custom_vjp as custom_vjp
from jaxsoftmax._form import Form as Form
from jaxsoftmax._threshold_mapping import threshold_mapping as threshold_mapping
from jaxsoftmax.attention import attention_fn as attention_fn
from jaxsoftmax.attention import dot_product_attention as dot_product_attention
from jaxsoftmax.linear_loss import linear_cross_entropy as linear_cross_entropy
from jaxsoftmax.losses import cross_entropy as cross_entropy
from jaxsoftmax.losses import entmax_loss as entmax_loss
from jaxsoftmax.losses import fenchel_young_loss as fenchel_young_loss
from jaxsoftmax.losses import kl_divergence as kl_divergence
from jaxsoftmax.losses import sparsemax_loss as sparsemax_loss
from jaxsoftmax.mappings import budget_sparsemax as budget_sparsemax
from jaxsoftmax.mappings import entmax as entmax
from jaxsoftmax.mappings import entmax15 as entmax15
from jaxsoftmax.mappings import hardmax as hardmax
from jaxsoftmax.mappings import log_sinkhorn as log_sinkhorn
from jaxsoftmax.mappings import log_softmax as log_softmax
from jaxsoftmax.mappings import logsumexp as logsumexp
from jaxsoftmax.mappings import normmax as normmax
from jaxsoftmax.mappings import sinkhorn as sinkhorn
from jaxsoftmax.mappings import sinkhorn_residual as sinkhorn_residual
from jaxsoftmax.mappings import softmax as softmax
from jaxsoftmax.mappings import softpick as softpick
from jaxsoftmax.mappings import sparsemax as sparsemax
from jaxsoftmax.mappings import stick_breaking as stick_breaking
from jaxsoftmax.masks import min_p_mask as min_p_mask
from jaxsoftmax.masks import top_k_mask as top_k_mask
from jaxsoftmax.masks import top_p_mask as top_p_mask
from jaxsoftmax.measures import shannon_entropy as shannon_entropy
from jaxsoftmax.measures import support_size as support_size
from jaxsoftmax.measures import tsallis_entropy as tsallis_entropy
from jaxsoftmax.sampling import gumbel_softmax as gumbel_softmax
from jaxsoftmax.sampling import sample as sample
from jaxsoftmax.sampling import straight_through as straight_through

__version__ = "0.1.0"

__all__ = [
    "Form",
    "attention_fn",
    "budget_sparsemax",
    "calibration",
    "cross_entropy",
    "custom_vjp",
    "dot_product_attention",
    "entmax",
    "entmax15",
    "entmax_loss",
    "fenchel_young_loss",
    "gumbel_softmax",
    "hardmax",
    "kl_divergence",
    "linear_cross_entropy",
    "log_sinkhorn",
    "log_softmax",
    "logsumexp",
    "min_p_mask",
    "normmax",
    "plots",
    "sample",
    "shannon_entropy",
    "sinkhorn",
    "sinkhorn_residual",
    "softmax",
    "softpick",
    "sparsemax",
    "sparsemax_loss",
    "stick_breaking",
    "straight_through",
    "support_size",
    "testing",
    "threshold_mapping",
    "top_k_mask",
    "top_p_mask",
    "tsallis_entropy",
]

if _typing.TYPE_CHECKING:
    from jaxsoftmax import calibration as calibration
    from jaxsoftmax import plots as plots
    from jaxsoftmax import testing as testing

# Imported when they are first asked for: few programs need them.
_LATER = ("calibration", "plots", "testing")


def __getattr__(name: str) -> _typing.Any:
    if name in _LATER:
        return _importlib.import_module(f"jaxsoftmax.{name}")
    raise AttributeError(f"module 'jaxsoftmax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
