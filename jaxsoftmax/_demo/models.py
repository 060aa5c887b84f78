"""The models the demonstration compares: each is a mapping with the loss that belongs to it."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

import jaxsoftmax as jsm


@dataclasses.dataclass(frozen=True)
class Model:
    """A way to turn scores into probabilities, and how it looks on the page.

    Attributes:
      name: What the command line and the page call it.
      mapping: `mapping(scores, temperature=...)` gives probabilities.
      loss: `loss(scores, labels)` gives one value per row; training and temperature use it.
      colour: Its colour everywhere on the page, of a palette made for colour-blind readers too.
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
        colour="#0072b2",
        dashes="solid",
        blurb="Every class keeps a share, however small. Trained with cross-entropy.",
    ),
    Model(
        name="entmax15",
        mapping=jsm.entmax15,
        loss=jsm.entmax_loss,
        colour="#d55e00",
        dashes="dashed",
        blurb="Clearly unlikely classes get exactly zero. Trained with its own loss.",
    ),
    Model(
        name="sparsemax",
        mapping=jsm.sparsemax,
        loss=jsm.sparsemax_loss,
        colour="#009e73",
        dashes="dashdot",
        blurb="Unlikely classes get exactly zero, and soonest of all. Trained with its own loss.",
    ),
)
