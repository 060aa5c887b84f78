"""Pure JAX functions that turn scores into probabilities."""

import importlib as _importlib
import typing as _typing

from jaxsoftmax._differentiation import custom_vjp as custom_vjp
from jaxsoftmax.attention import attention_fn as attention_fn
from jaxsoftmax.attention import dot_product_attention as dot_product_attention
from jaxsoftmax.linear_loss import linear_cross_entropy as linear_cross_entropy
from jaxsoftmax.losses import cross_entropy as cross_entropy
from jaxsoftmax.losses import entmax_loss as entmax_loss
from jaxsoftmax.losses import fenchel_young_loss as fenchel_young_loss
from jaxsoftmax.losses import sparsemax_loss as sparsemax_loss
from jaxsoftmax.mappings import budget_sparsemax as budget_sparsemax
from jaxsoftmax.mappings import entmax as entmax
from jaxsoftmax.mappings import entmax15 as entmax15
from jaxsoftmax.mappings import hardmax as hardmax
from jaxsoftmax.mappings import log_softmax as log_softmax
from jaxsoftmax.mappings import logsumexp as logsumexp
from jaxsoftmax.mappings import normmax as normmax
from jaxsoftmax.mappings import sinkhorn as sinkhorn
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

if _typing.TYPE_CHECKING:
    from jaxsoftmax import calibration as calibration
    from jaxsoftmax import plots as plots

# Imported when they are first asked for: few programs need them.
_LATER = ("calibration", "plots")


def __getattr__(name: str) -> _typing.Any:
    if name in _LATER:
        return _importlib.import_module(f"jaxsoftmax.{name}")
    raise AttributeError(f"module 'jaxsoftmax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
