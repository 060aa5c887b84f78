"""What holds in doctests too."""

import os
import tempfile

import numpy as np
import pytest

# Most of the time goes into compiling, and much of that into programs that another test, module or
# process has compiled before. Set the variable yourself and the next run finds them too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxsoftmax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name  # the workers inherit it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True)
def own_print_options():
    """An example that sets print options sets them for itself."""
    with np.printoptions():
        yield
