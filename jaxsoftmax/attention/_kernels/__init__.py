"""Attention as Pallas kernels for a TPU. Nothing imports this before a call asks for kernels."""

from jaxsoftmax.attention._kernels._choice import by_kernels as by_kernels
