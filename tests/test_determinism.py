"""The same inputs give the same bits: run after run, and compiled anew."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.calls import CALLS, NAMES, value_and_gradients

FEW = {"softmax", "entmax15", "cross_entropy", "dot_product_attention"}
SOME_THOROUGH = [
    name
    if name.values[0] in FEW
    else pytest.param(*name.values, marks=[*name.marks, pytest.mark.thorough], id=name.id)
    for name in NAMES
]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_looked_up():
    """A program that is compiled anew is not one that another test has left in the cache."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def float32():
    """As users call it."""
    with jax.enable_x64(False):
        yield


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", SOME_THOROUGH)
def test_run_after_run_and_jit_after_jit(name):
    fun, args = CALLS[name]
    compiled = [jax.jit(lambda *args: value_and_gradients(fun)(*args)) for _ in range(2)]
    first, second, anew = (bits(f(*args)) for f in (compiled[0], *compiled))
    assert first == second
    assert first == anew
