"""Functions of other libraries, where these are installed."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.measuring import Entry, Missing


def peer(
    modules: Sequence[str], make: Callable[..., Callable[..., Any]], ours: str, **options: Any
) -> Entry | Missing:
    """An entry made of modules that may be missing.

    Args:
      modules: their names.
      make: takes the modules, gives the function.
      ours: the name of our function that does the same.
      **options: of the `Entry`.
    """
    try:
        found = [importlib.import_module(name) for name in modules]
    except ImportError as error:
        return Missing(f"not measured: {error.name or modules[0]} is not installed")
    return Entry(make(*found), ours, **options)


def torch_peer(
    modules: Sequence[str], make: Callable[..., Callable[..., Any]], ours: str
) -> Entry | Missing:
    """An entry of PyTorch, or of what builds on it, on the CPU.

    Args:
      modules: the names of modules that may be missing.
      make: takes the modules, gives a function of tensors.
      ours: the name of our function that does the same.
    """
    if jax.default_backend() != "cpu":
        return Missing("not measured: PyTorch is compared on the CPU only")
    return peer(modules, make, ours, jit=False, prepare=_tensors)


def _tensors(*args: Any) -> Sequence[Any]:
    import torch

    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), args)
