"""How attention is cut into blocks on each platform, and what is computed for them.

All of it is known while tracing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxsoftmax.attention._bands import Band
from jaxsoftmax.attention._block import Again, Block
from jaxsoftmax.attention._groups import Groups
from jaxsoftmax.attention._operands import Operand
from jaxsoftmax.attention._prepared import First


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How attention is cut into blocks.

    Attributes:
      groups: of the batch and the heads.
      forward: the blocks of query rows, of each group.
      backward: those of the reverse rule, which may be smaller.
      again: whether to make scores again rather than read them: see `Tiling`.
    """

    groups: Groups
    forward: tuple[Band, ...]
    backward: tuple[Band, ...]
    again: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """All that is known while tracing.

    Attributes:
      default: how attention is cut.
      cuts: how it is cut on platforms that have a way of their own.
      blocks: what is computed for each block of a band, where so many groups are made.
      operands: how blocks are cut from each array.
    """

    default: Cuts
    cuts: dict[str, Cuts]
    blocks: dict[tuple[Groups, Band], Block]
    operands: tuple[Operand, ...]

    def on_each_platform(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(cuts, *args)`, with the cuts of the platform that a program is lowered for."""
        default = functools.partial(function, self.default)
        of = {name: functools.partial(function, cuts) for name, cuts in self.cuts.items()}
        return lax.platform_dependent(*args, default=default, **of) if of else default(*args)

    def again(
        self, cuts: Cuts, bands: Sequence[Band], arrays: Sequence[Array]
    ) -> list[Again | None]:
        """How the scores of each band are made again, if they are.

        A mask of places is made before the loop over groups, for all of them. Where there is no
        such loop, masked scores are read: see `TILING`.
        """
        if not cuts.again:
            return [None for _ in bands]

        def mask(band: Band) -> Array | None:
            if band.blocks > 1 or cuts.groups == Groups():
                return None
            pairs = zip(self.operands, arrays, strict=True)
            group = [cuts.groups.cut(operand, x, (0, 0)) for operand, x in pairs]
            parts = first_parts(self.operands, group, band)
            return self.blocks[cuts.groups, band].where(first_of((0, 0), band.start), parts)

        return [Again(mask(band)) for band in bands]


def first_of(start: tuple[Any, Any], row: Any) -> First:
    """Where a block begins, given the first batch and head of its group and its first row."""
    batch, head, row = (jnp.asarray(x, jnp.int32) for x in (*start, row))
    return batch, head, row


def group_start(arrays: Sequence[Array], place: Any) -> tuple[Any, Any]:
    """The first batch and head of a group, as the queries count them: the first operand."""
    batch, heads, *_ = arrays[0].shape
    return place[0] * batch, place[1] * heads


def first_parts(operands: Sequence[Operand], arrays: Sequence[Array], band: Band) -> list[Array]:
    """What the first block of a band sees of each array."""
    pairs = zip(operands, arrays, strict=True)
    return [operand.cut(x, band, band.start) for operand, x in pairs]
