"""The data: 1,797 scanned digits of 8 x 8 pixels, which ship inside scikit-learn."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_CLASSES = 10
VALIDATION_SHARE = 0.25
TEST_SHARE = 0.25
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
    """The three splits: one to learn from, one to fit the temperature on, one to judge by."""

    train: Split
    validation: Split
    test: Split


def load(seed: int) -> Digits:
    """Loads the digits and splits them, every split with the same share of each class.

    Calibration is measured on mistakes, and there are few: so validation and test are large.

    Args:
      seed: Decides which digit goes where.

    Returns:
      The three splits, which share no digit.
    """
    images, labels = load_digits(return_X_y=True)
    rows = np.arange(len(labels))

    def divide(rows: np.ndarray, share: float) -> Sequence[Any]:
        return train_test_split(rows, test_size=share, random_state=seed, stratify=labels[rows])

    def split(rows: np.ndarray) -> Split:
        pixels = images[rows].reshape(-1, 8, 8) / _BRIGHTEST
        return Split(jnp.asarray(pixels, jnp.float32), jnp.asarray(labels[rows], jnp.int32))

    rest, test = divide(rows, TEST_SHARE)
    train, validation = divide(rest, VALIDATION_SHARE / (1 - TEST_SHARE))
    return Digits(split(train), split(validation), split(test))
