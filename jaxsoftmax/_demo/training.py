"""Training: AdamW, one compiled scan per epoch."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxsoftmax._demo import network
from jaxsoftmax._demo.digits import Digits, Split

Loss = Callable[..., Array]

BATCH_SIZE = 50
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-4


class Epoch(NamedTuple):
    """How one pass over the training digits went.

    Attributes:
      loss: The mean training loss during the pass, each model's own.
      accuracy: The share of validation digits read correctly after it.
    """

    loss: float
    accuracy: float


class Trained(NamedTuple):
    """A network and the way it came about."""

    params: network.Params
    epochs: list[Epoch]


class _State(NamedTuple):
    params: network.Params
    optimizer: optax.OptState


def train(
    loss: Loss,
    digits: Digits,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Trains one network.

    The same seed gives every loss the same first weights and batches.

    Args:
      loss: `loss(scores, labels)`, one value per row.
      digits: The training split is trained on; the accuracy is measured on the validation split.
      epochs: How many passes over the training digits, at least one.
      seed: Decides everything random.
      on_epoch: Called with each epoch when it ends.

    Returns:
      The trained weights and a record of every epoch.
    """
    init_key, training_key = jax.random.split(jax.random.key(seed))
    optimizer = _optimizer(epochs * (digits.train.size // BATCH_SIZE))
    params = network.init(init_key)
    state = _State(params, optimizer.init(params))
    record = []
    for key in jax.random.split(training_key, epochs):
        state, *measured = _run_epoch(loss, optimizer, state, key, digits.train, digits.validation)
        record.append(Epoch(*map(float, measured)))
        on_epoch(record[-1])
    return Trained(state.params, record)


@functools.cache  # The very same one for the same number of steps, or all is compiled anew.
def _optimizer(steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(_LEARNING_RATE, steps)
    return optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_epoch(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: _State,
    key: PRNGKeyArray,
    train_split: Split,
    validation: Split,
) -> tuple[_State, Array, Array]:
    def step(state: _State, rows: Array) -> tuple[_State, Array]:
        images, labels = train_split.images[rows], train_split.labels[rows]

        def batch_loss(params: network.Params) -> Array:
            return jnp.mean(loss(network.apply(params, images), labels))

        value, gradient = jax.value_and_grad(batch_loss)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = cast(network.Params, optax.apply_updates(state.params, updates))
        return _State(params, optimizer_state), value

    state, losses = jax.lax.scan(step, state, _batches(key, train_split.size))
    guesses = jnp.argmax(network.apply(state.params, validation.images), axis=-1)
    return state, jnp.mean(losses), jnp.mean(guesses == validation.labels)


def _batches(key: PRNGKeyArray, count: int) -> Array:
    """Shuffles row numbers into (batches, BATCH_SIZE); the few left over sit this epoch out."""
    batches = count // BATCH_SIZE
    return jax.random.permutation(key, count)[: batches * BATCH_SIZE].reshape(batches, BATCH_SIZE)
