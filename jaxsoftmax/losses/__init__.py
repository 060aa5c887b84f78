"""Losses: each belongs to a mapping, and returns one value per row of scores.

A mapping that maximizes `<p, z> - Omega(p)` has the Fenchel-Young loss

    L(z, y) = Omega*(z) + Omega(y) - <y, z> = (<p, z> - Omega(p)) - (<y, z> - Omega(y)),

It is 0 where the mapping returns the target, and positive elsewhere. It is convex in the scores,
and its gradient is `p - y`.
"""

from jaxsoftmax.losses._cross_entropy import cross_entropy as cross_entropy
from jaxsoftmax.losses._fenchel_young import fenchel_young_loss as fenchel_young_loss
from jaxsoftmax.losses._kl_divergence import kl_divergence as kl_divergence
from jaxsoftmax.losses._regularized import entmax_loss as entmax_loss
from jaxsoftmax.losses._regularized import sparsemax_loss as sparsemax_loss
