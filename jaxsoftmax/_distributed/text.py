"""What the model reads: the sources of this package, which are wherever it is installed."""

import dataclasses
import pathlib

import numpy as np

CONTEXT = 8  # how many characters the model sees of what came before
_LENGTH = 100_000


@dataclasses.dataclass(frozen=True)
class Text:
    """Numbered characters.

    Attributes:
      windows: every stretch of `CONTEXT + 1` characters, by number.
      num_characters: how many different ones there are.
    """

    windows: np.ndarray
    num_characters: int

    def batch(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Contexts and the characters that follow; the same in every process."""
        rows = np.random.default_rng(step).integers(len(self.windows), size=size)
        chosen = self.windows[rows]
        return chosen[:, :-1], chosen[:, -1]


def load() -> Text:
    """The first 100,000 characters of the sources, in the order of their names."""
    paths = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)[:_LENGTH]
    alphabet, numbers = np.unique(list(text), return_inverse=True)
    numbers = numbers.astype(np.int32)
    return Text(np.lib.stride_tricks.sliding_window_view(numbers, CONTEXT + 1), len(alphabet))
