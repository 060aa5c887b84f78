"""The same inputs give the same bits: run after run, and compiled anew."""

import jax
import numpy as np
import pytest

from tests.calls import CALLS, value_and_gradients


@pytest.fixture(autouse=True)
def compiled_anew():
    """What is compiled is not looked up anywhere."""
    with jax.enable_x64(False), jax.enable_compilation_cache(False):
        yield


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", CALLS)
def test_run_after_run_and_jit_after_jit(name):
    fun, args = CALLS[name]
    compiled = [jax.jit(lambda *args: value_and_gradients(fun)(*args)) for _ in range(2)]
    first, second, anew = (bits(f(*args)) for f in (compiled[0], *compiled))
    assert first == second
    assert first == anew
