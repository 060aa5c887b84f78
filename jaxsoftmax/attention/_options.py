"""The options of attention, by name: so that types tell what it returns."""

from collections.abc import Callable
from typing import Literal, TypedDict

from jaxtyping import Array, ArrayLike, Integer, Real

Normalizer = Callable[..., Array]
ScoreMod = Callable[[Array, Array, Array, Array, Array], Array]
MaskMod = Callable[[Array, Array, Array, Array], Array]
AxisName = str | tuple[str, ...]
Implementation = Literal["xla", "pallas", "cudnn"]


class Options(TypedDict, total=False):
    """What `dot_product_attention` takes by keyword, but for `return_residual`."""

    normalizer: Normalizer
    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: Integer[ArrayLike, " B"] | None
    key_value_seq_lengths: Integer[ArrayLike, " B"] | None
    local_window_size: int | tuple[int, int] | None
    query_segment_ids: Integer[ArrayLike, "*B T"] | None
    key_value_segment_ids: Integer[ArrayLike, "*B S"] | None
    logits_soft_cap: ArrayLike | None
    sink: Real[ArrayLike, "#N"] | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    dropout_rate: float
    dropout_key: Array | None
    kv_axis_name: AxisName | None
    block_size: int | None
    query_axis_name: AxisName | None
    query_offset: int | Integer[ArrayLike, " B"] | None
    implementation: Implementation | None
