"""How large the pieces are that attention is computed in, for each platform, and why."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxsoftmax._platforms import constants
from jaxsoftmax._reductions import is_known


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How attention is cut. Sizes are numbers of scores.

    Attributes:
      forward: those of a block of query rows, of all heads that are taken together.
      backward: the same for the reverse rule, which holds several arrays of them.
      group: those of all rows of a few heads, or of half of them, if rows do not see all keys;
        None: all heads are taken together.
      rows: the fewest and the most rows that a block has.
      bands: into how many stretches of blocks a causal mask or a window is cut. A stretch sees the
        keys that one of its queries can reach, and each is a program of its own.
      products_again: whether a product takes less time than to write its result and read it: then
        scores are made again rather than read, and what is written is rounded as the inputs are.
    """

    forward: int
    backward: int
    group: int | None
    rows: tuple[int, int]
    bands: int
    products_again: bool = False

    def block_rows(self, queries: int, row_size: int, scores: int) -> int:
        """How many rows a block should have; all of them, where their number is a symbol.

        Args:
          queries: how many query rows there are.
          row_size: how many scores there are to a row, over the batch and the heads.
          scores: how many scores a block should have.
        """
        if not is_known(queries):
            return queries
        fewest, most = self.rows
        if not is_known(row_size):
            row_size = scores
        most = min(max(scores // max(row_size, 1), fewest), most)
        if queries <= most:
            return queries
        # A number that leaves no rest, if there is one that is not much smaller.
        for rows in range(most, most // 2, -1):
            if queries % rows == 0:
                return rows
        return math.ceil(queries / math.ceil(queries / most))

    def again(self, dtype: Any) -> bool:
        """Whether to make scores again; not in a dtype that cannot hold all that float32 can."""
        return self.products_again and dtype in (jnp.bfloat16, jnp.float32)

    def group_sizes(self, batch: int, key_heads: int, row_size: int, rows: int) -> tuple[int, int]:
        """How many entries of the batch, and how many heads of the keys, to take together.

        One, where it is not known how many there are, or how large each is.

        Args:
          batch: how many entries there are.
          key_heads: how many heads.
          row_size: how many scores there are to a row, for one of the heads.
          rows: how many rows count.
        """
        if self.group is None:
            return batch, key_heads
        most = 1
        if is_known(row_size) and is_known(rows):
            most = max(self.group // (row_size * min(rows, self.rows[1])), 1)
        if not is_known(key_heads) or most < key_heads:
            return 1, _divisor(key_heads, most)
        return _divisor(batch, most // key_heads), key_heads


def _divisor(n: int, most: int) -> int:
    if not is_known(n):
        return 1
    return next(m for m in range(min(n, most), 0, -1) if n % m == 0)


# GPU, as compiled for H100: scores go to the memory, so a block has no more than leave a fifth of
# what all take; whole heads, or all of dK and dV would be rewritten for each block of rows. To
# make scores again takes 46 us a block, to read them 80. A kernel that multiplies reads a mask that
# is a state of the loop around it, but makes none: one more kernel for that would take longer than
# to read the scores. In the same way it multiplies cotangents by weights that the step before made
# for all bands: a sixth of the time of the reverse rule. Under a causal mask, with 8 heads in 4
# bands, it takes less time than with 16 heads, or 4, which makes more of such steps; and 4 bands
# take less than 2, 3, 6 or 8, in bfloat16 a tenth and more. Other platforms take this, too.
TILING = Tiling(2**26, 2**26, 2**26, (64, 4096), 4, products_again=True)
# Those of platforms that have their own.
TILINGS = {platform: Tiling(**sizes) for platform, sizes in constants("ATTENTION").items()}
