"""Attention with any normalizer, in memory linear in the sequence, differentiable every way."""

from jaxsoftmax.attention._attention import dot_product_attention as dot_product_attention
from jaxsoftmax.attention._flax import attention_fn as attention_fn
