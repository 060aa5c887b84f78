"""The models the demonstration compares: each is a mapping with the loss that belongs to it."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

import jaxsoftmax as jsm


@dataclasses.dataclass(frozen=True)
class Model:
    """A mapping and its loss, and how the page shows them.

    Attributes:
      name: What the command line and the page call it.
      mapping: `mapping(scores, temperature=...)` gives probabilities.
      loss: `loss(scores, labels)` gives one value per row; training uses it.
      colour: The name of its colour everywhere on the page.
      dashes: Its line style, so that colour is not the only sign.
      blurb: What sets it apart, in one plain sentence.
    """

    name: str
    mapping: Callable[..., Array]
    loss: Callable[..., Array]
    colour: str
    dashes: str
    blurb: str


MODELS = (
    Model(
        name="softmax",
        mapping=jsm.softmax,
        loss=jsm.cross_entropy,
        colour="blue",
        dashes="solid",
        blurb="Every class gets a probability above zero. Trained with cross-entropy.",
    ),
    Model(
        name="entmax15",
        mapping=jsm.entmax15,
        loss=jsm.entmax_loss,
        colour="orange",
        dashes="dashed",
        blurb="Very unlikely classes get exactly zero. Trained with the loss that belongs to it.",
    ),
    Model(
        name="sparsemax",
        mapping=jsm.sparsemax,
        loss=jsm.sparsemax_loss,
        colour="green",
        dashes="dashdot",
        blurb="More classes get exactly zero. Trained with the loss that belongs to it.",
    ),
)
