"""A small model of characters, and how it is trained: on one device, or spread over a mesh.

Rows of a batch go over the mesh axis "data", the classes of the last layer over "vocab". Everything
else is on all devices.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxsoftmax._distributed.text import CONTEXT, Text
from jaxsoftmax.linear_loss import linear_cross_entropy

Parameters = dict[str, Array]
Step = Callable[..., tuple[Parameters, Any, Array]]

_WIDTH, _BATCH = 64, 64
_SPECS = {"embedding": P(), "inner": P(), "outer": P(None, "vocab"), "bias": P("vocab")}
_OPTIMIZER = optax.adam(3e-3)


def losses_on_one_device(text: Text, num_classes: int, num_steps: int) -> Iterator[float]:
    """The loss of each step, with nothing spread over anything."""
    step = _step(functools.partial(_loss, name=None))
    parameters = jax.tree.map(jnp.asarray, _parameters(num_classes))
    return _train(text, num_steps, step, parameters, jnp.asarray)


def losses_on_mesh(mesh: Mesh, text: Text, num_classes: int, num_steps: int) -> Iterator[float]:
    """The same, with rows and classes spread over the devices of all processes."""

    def local(parameters: Parameters, contexts: Array, labels: Array) -> Array:
        return jax.lax.pmean(_loss(parameters, contexts, labels, name="vocab"), "data")

    def place(x: np.ndarray, spec: P) -> Array:
        # Every process has the whole array and gives its own devices their parts.
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    specs = (_SPECS, P("data"), P("data"))
    step = _step(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    parameters = {k: place(x, _SPECS[k]) for k, x in _parameters(num_classes).items()}
    return _train(text, num_steps, step, parameters, lambda x: place(x, P("data")))


def num_classes(text: Text, vocab_devices: int) -> int:
    """The characters of the text, and some more, so that all devices have as many."""
    return -(-text.num_characters // vocab_devices) * vocab_devices


def _parameters(num_classes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    return {
        "embedding": normal(num_classes, _WIDTH // 2),
        "inner": normal(CONTEXT * _WIDTH // 2, _WIDTH),
        "outer": normal(_WIDTH, num_classes),
        "bias": np.zeros(num_classes, np.float32),
    }


def _loss(parameters: Parameters, contexts: Array, labels: Array, name: str | None) -> Array:
    features = parameters["embedding"][contexts].reshape(len(contexts), -1)
    hidden = jnp.tanh(features @ parameters["inner"])
    return linear_cross_entropy(
        hidden, parameters["outer"], labels, bias=parameters["bias"], vocab_axis_name=name
    )


def _step(loss: Callable[..., Array]) -> Step:
    @jax.jit
    def step(parameters: Parameters, state: Any, contexts: Array, labels: Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(parameters, contexts, labels)
        updates, state = _OPTIMIZER.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, value

    return step


def _train(
    text: Text, num_steps: int, step: Step, parameters: Parameters, place: Callable[..., Array]
) -> Iterator[float]:
    state = jax.jit(_OPTIMIZER.init)(parameters)
    for number in range(num_steps):
        batch = (place(x) for x in text.batch(number, _BATCH))
        parameters, state, value = step(parameters, state, *batch)
        yield float(value)
