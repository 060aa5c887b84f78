"""What holds in every test: JAX on the CPU, float64, and no silent promotion of any kind."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for meshes

import jax  # (after the platform is set)
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict_float64():
    """Not set globally: the doctests of the package show what users see, in float32."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """What is compiled holds on to memory maps, and a process may have only so many of them."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
