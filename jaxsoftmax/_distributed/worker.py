"""One process of several, here or on a cluster."""

import functools
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType

from jaxsoftmax._distributed import model, text

# How far the losses of many devices may be from those of one, relative to the first of them.
TOLERANCE = 1e-5
# How long a process that says nothing is taken for alive, and how long others are waited for.
HEARTBEAT_SECONDS, START_SECONDS = 10, 60


def run(coordinator: str, process_id: int, num_processes: int, num_steps: int) -> None:
    """Trains with the other processes; the first one prints the losses and compares them.

    Raises:
      RuntimeError: if the others cannot be reached, or are gone, or if losses differ.
    """
    say = _speaker() if process_id == 0 else lambda _: None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    devices = jax.device_count()
    # Classes within a process, where devices are near to each other; rows over the processes.
    shape = num_processes, devices // num_processes
    mesh = jax.make_mesh(shape, ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)
    say(
        f"{num_processes} processes, {devices} devices: rows over {shape[0]}, classes over "
        f"{shape[1]}."
    )
    corpus = text.load()
    num_classes = model.num_classes(corpus, shape[1])
    losses = []
    for step, loss in enumerate(model.losses_on_mesh(mesh, corpus, num_classes, num_steps)):
        losses.append(loss)
        if step % max(1, num_steps // 10) == 0 or step == num_steps - 1:
            say(f"step {step:4d}  loss {loss:.6f}")
    if process_id == 0:
        say(_comparison(losses, list(model.losses_on_one_device(corpus, num_classes, num_steps))))
    jax.distributed.shutdown()


def _comparison(losses: list[float], on_one_device: list[float]) -> str:
    worst = float(np.max(np.abs(np.subtract(losses, on_one_device)))) / on_one_device[0]
    if not worst <= TOLERANCE:
        raise RuntimeError(f"losses differ by {worst:.1e}, wanted at most {TOLERANCE:.0e}.")
    return f"Equal to the losses of one device, the largest difference is {worst:.1e} of the first."


def _speaker() -> Callable[[str], None]:
    """Prints to the screen, while all else that is printed goes where errors go: Gloo's chatter."""
    screen = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return functools.partial(print, file=screen, flush=True)
