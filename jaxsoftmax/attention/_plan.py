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

from jaxsoftmax.attention import _products
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
class Ones:
    """The keys and the values of a group `with_ones`, for all its bands.

    Attributes:
      operands: how blocks are cut from the two; none, if blocks are to make their own.
      arrays: the two.
    """

    operands: Sequence[Operand] = ()
    arrays: Sequence[Array] = ()

    def cut(self, again: Again | None, band: Band, first_row: Any) -> Again | None:
        """How a block makes its scores again, given what it sees of them."""
        if again is None or not self.arrays:
            return again
        pairs = zip(self.operands, self.arrays, strict=True)
        key, value = (functools.partial(op.cut, x, band, first_row) for op, x in pairs)
        return dataclasses.replace(again, key=key, value=value)


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

    def ones(self, cuts: Cuts, again: Sequence[Again | None], arrays: Sequence[Array]) -> Ones:
        """The keys and the values of a group `with_ones`, where several bands make scores again.

        Each would write what it sees of them, while XLA for GPU cuts in the kernel that multiplies.
        """
        if len(again) == 1 or None in again:
            return Ones()
        block = self.blocks[cuts.groups, cuts.forward[0]]
        places = block.key, block.value
        with_ones = [_products.with_ones(arrays[i]) for i in places]
        return Ones([self.operands[i] for i in places], with_ones)


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
