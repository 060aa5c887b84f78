"""Timing that a noisy machine cannot fool: everything in one run, in turn, and compared."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def medians(
    functions: Mapping[str, Callable[..., Any]], *args: Any, rounds: int = 15
) -> dict[str, float]:
    """Median seconds of each function on the same arguments, measured in random turns."""
    for function in functions.values():
        jax.block_until_ready(function(*args))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    for _ in range(rounds):
        random.shuffle(order)
        for name, function in order:
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def ratios(times: Mapping[str, float], base: str) -> dict[str, float]:
    """Times relative to that of `base`."""
    return {name: seconds / times[base] for name, seconds in times.items()}
