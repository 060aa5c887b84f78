"""What holds in doctests too."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def own_print_options():
    """An example that sets print options sets them for itself."""
    with np.printoptions():
        yield
