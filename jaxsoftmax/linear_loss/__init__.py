"""Losses of a linear layer with many outputs, without ever holding all of its scores."""

from jaxsoftmax.linear_loss._linear_cross_entropy import (
    linear_cross_entropy as linear_cross_entropy,
)
