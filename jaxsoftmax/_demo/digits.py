"""The data: 1,797 scanned digits of 8 x 8 pixels, which ship inside scikit-learn."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_CLASSES = 10
# So few to train on that networks make mistakes and are too sure of themselves.
TRAIN_SIZE = 150
VALIDATION_SIZE = 600
_BRIGHTEST = 16.0


class Split(NamedTuple):
    """Digits that are used together.

    Attributes:
      images: from 0 (paper) to 1 (ink).
      labels: the digit that each image shows.
    """

    images: Float[Array, "n 8 8"]
    labels: Int[Array, " n"]

    @property
    def size(self) -> int:
        """How many digits there are."""
        return self.labels.shape[0]


class Digits(NamedTuple):
    """The three splits: one to train on, one to fit the scalings on, one to judge by."""

    train: Split
    validation: Split
    test: Split


def load(seed: int) -> Digits:
    """Loads the digits and splits them, every split with the same share of each class.

    Args:
      seed: Decides which digit goes where.

    Returns:
      The three splits, which share no digit.
    """
    images, labels = load_digits(return_X_y=True)
    rows = np.arange(len(labels))

    def divide(rows: np.ndarray, size: int) -> Sequence[Any]:
        return train_test_split(rows, train_size=size, random_state=seed, stratify=labels[rows])

    def split(rows: np.ndarray) -> Split:
        pixels = images[rows].reshape(-1, 8, 8) / _BRIGHTEST
        return Split(jnp.asarray(pixels, jnp.float32), jnp.asarray(labels[rows], jnp.int32))

    train, rest = divide(rows, TRAIN_SIZE)
    validation, test = divide(rest, VALIDATION_SIZE)
    return Digits(split(train), split(validation), split(test))
