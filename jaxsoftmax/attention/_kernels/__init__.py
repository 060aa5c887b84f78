"""Attention as Pallas kernels, for TPUs and GPUs. Imported when a call asks for kernels."""

from jaxsoftmax.attention._kernels._choice import by_kernels as by_kernels
