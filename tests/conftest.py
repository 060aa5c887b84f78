"""What holds in every test: JAX on the CPU, float64, and no silent promotion of any kind."""

import contextlib
import functools
import gc
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for meshes

import jax  # (after the platform is set)
import jax._src.compiler
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from tests import tools

# What every change has to pass: the same examples each time, in a minute or two. And an hour.
settings.register_profile(
    "ci",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors],
)
settings.register_profile(
    "deep", settings.get_profile("ci"), max_examples=4000, derandomize=False, print_blob=True
)
settings.load_profile("ci")

# Tracing makes many small objects: to look for cycles among them as often as Python does by itself
# takes a tenth of the time.
gc.set_threshold(50_000, 20, 100)

# A quarter of the time, and the same operations: code that is written down as it comes.
AS_IT_COMES = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def pytest_addoption(parser):
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile the tests marked compiled_as_it_comes as users do; twice the time",
    )
    parser.addoption("--jax-mode", choices=tuple(MODES))


def float32(_):
    """Without x64, as most users have it."""
    return jax.enable_x64(False)


# What JAX can check on its way, too slow or too strict to be always on, and what else it can be.
MODES = {
    "debug_nans": jax.debug_nans,
    "check_tracer_leaks": jax.check_tracer_leaks,
    "float32": float32,
}
# The mark of the tests that a mode leaves alone, or skips.
LEFT_ALONE = {
    "debug_nans": "asks_for_nan",
    "check_tracer_leaks": "leaks_in_jax",
    "float32": "asks_for_x64",
}


@pytest.fixture(autouse=True)
def strict_float64(request):
    """Not set globally: the doctests of the package show what users see, in float32.

    Promotion of ranks and types is strict in every mode.
    """
    name = request.config.getoption("jax_mode")
    mode = MODES.get(name, contextlib.nullcontext)
    if request.node.get_closest_marker(LEFT_ALONE.get(name, "")):
        if mode is float32:
            pytest.skip("needs 64 bits")  # not with x64 in one process: see `fixed`
        mode = contextlib.nullcontext
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        mode(True),
    ):
        yield


def pytest_configure(config):
    """Makes the tests of float64 those of float32, in that mode."""
    if config.getoption("jax_mode") == "float32":
        tools.FLOAT = np.float32
        np.testing.assert_allclose = as_float32_can(np.testing.assert_allclose)
        # As an error, it crashes JAX, which converts to float32 what is in float64.
        config.addinivalue_line("filterwarnings", "ignore:overflow encountered in cast")


def as_float32_can(assert_allclose):
    """With the tolerance that float32 needs."""

    def assert_close(actual, desired, rtol=1e-7, atol=0, **options):
        return assert_allclose(actual, desired, max(rtol, 1e-4), max(atol, 1e-5), **options)

    return assert_close


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips, without x64, what asks for 64 bits by name."""
    try:
        return (yield)
    except UserWarning as warning:
        by_name = re.search("requested dtype u?(float|int|complex)(64|128)", str(warning))
        if item.config.getoption("jax_mode") != "float32" or not by_name:
            raise
        pytest.skip(str(warning))


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """What is compiled holds on to memory maps, and a process may have only so many of them."""
    yield
    jax.clear_caches()


@functools.cache
def options_as_it_comes():
    """Those that this version of XLA knows."""

    def is_known(option):
        jitted = jax.jit(lambda x: x + 1, compiler_options=dict([option]))
        try:
            jitted.lower(1.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return dict(filter(is_known, AS_IT_COMES.items()))


@pytest.fixture(scope="module")
def compiled_as_it_comes(request):
    """For modules that test rules and shapes; not for last digits, memory or what XLA makes of it.

    Most of the time of the tests goes into compiling, and most of that into making code fast.
    """
    compiler = jax._src.compiler  # the options of a jit do not reach what is called within a test
    original = compiler.get_compile_options

    def cheap(*args, env_options_overrides=None, **kwargs):
        options = options_as_it_comes() | (env_options_overrides or {})
        return original(*args, env_options_overrides=options, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("optimize"):
            options_as_it_comes()  # before the patch: it compiles
            patch.setattr(compiler, "get_compile_options", cheap)
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
