"""Losses: of a linear layer with many outputs, and of scores that are there."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax as jsm
from benchmarks import limits
from benchmarks.charts import Growth, time_and_memory
from benchmarks.command import Topic, main
from benchmarks.measuring import Comparison, Entry, Missing
from benchmarks.peers import torch_peer
from benchmarks.transforms import forward, hessian_product, jvp, value_and_gradient

Loss = Callable[..., jax.Array]

SCORES = "losses of scores"
BY_CLASSES = "linear layer, value and gradient, by classes"
BY_ROWS = "linear layer, value and gradient, by rows"
# What is done, how, and how many matrix products it takes at least.
LINEAR: dict[str, tuple[Callable[[Loss], Loss], int | None]] = {
    "linear layer, forward": (forward, 1),
    "linear layer, value and gradient": (value_and_gradient, 3),
    "linear layer, jvp": (jvp, 3),
    "linear layer, Hessian-vector product": (hessian_product, None),
}
OURS = "jsm.linear_cross_entropy"
OTHERS = {
    "label smoothing": functools.partial(jsm.cross_entropy, label_smoothing=0.1),
    "z-loss": functools.partial(jsm.cross_entropy, z_loss=1e-4),
    "sparsemax_loss": jsm.sparsemax_loss,
    "entmax_loss": jsm.entmax_loss,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows, their width and classes, and which other losses."""

    rows: int = 4096
    width: int = 256
    classes: int = 32768
    scores: tuple[int, int] = (4096, 1024)
    few_rows: int = 1024
    by_classes: Sequence[int] = (2048, 8192, 32768, 131072)
    by_rows: Sequence[int] = (1024, 8192, 65536)
    others: Sequence[str] = tuple(OTHERS)


TINY = Sizes(8, 4, 16, (8, 16), 8, (16,), (8,), ("sparsemax_loss",))


def all_scores(point: tuple[jax.Array, jax.Array], labels: jax.Array) -> jax.Array:
    """The loss that everything is compared to."""
    hidden, weight = point
    scores = (hidden @ weight).astype(jnp.float32)  # as training code has it
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def linear(loss: Loss = jsm.cross_entropy) -> Loss:
    """Ours."""
    return lambda point, labels: jsm.linear_cross_entropy(*point, labels, loss=loss)


def shapes(rows: int, width: int, classes: int) -> tuple[Any, ...]:
    """Hidden features and weights, a direction like them, and labels; not the arrays."""
    point = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((width, classes), jnp.float32),
    )
    return point, point, jax.ShapeDtypeStruct((rows,), jnp.int32)


def arguments(rows: int, width: int, classes: int) -> tuple[Any, ...]:
    """The arrays; the direction is the point itself."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, width))
    weight = jax.random.normal(keys[1], (width, classes)) / width**0.5
    point = hidden, weight
    return point, point, jax.random.randint(keys[2], (rows,), 0, classes)


def of_linear_layer(operation: str, sizes: Sizes) -> Comparison:
    """One operation on the linear layer."""
    what, products = LINEAR[operation]
    size = sizes.rows, sizes.width, sizes.classes
    entries = linear_entries(what)
    if products:
        entries |= limits.products(products * flops(*size))
    args = functools.partial(arguments, *size)
    return Comparison(operation, in_words(*size), size[2], entries, args, seconds=1)


def of_other_losses(operation: str, sizes: Sizes) -> Comparison:
    """Losses that the linear layer may have, relative to the cross-entropy."""
    what, _ = LINEAR[operation]
    size = sizes.few_rows, sizes.width, sizes.classes
    entries: dict[str, Entry | Missing] = {OURS: Entry(what(linear()))}
    entries |= {f"{OURS}, {name}": Entry(what(linear(OTHERS[name]))) for name in sizes.others}
    args = functools.partial(arguments, *size)
    return Comparison(f"other losses of the {operation}", in_words(*size), size[2], entries, args)


def in_words(rows: int, width: int, classes: int) -> str:
    """The sizes of the linear layer."""
    return f"{rows} rows, {width} wide, {classes} classes"


def linear_entries(what: Callable[[Loss], Loss]) -> dict[str, Entry | Missing]:
    """Cross-entropy on all scores, and ours without them."""
    return {"optax, all scores": Entry(what(all_scores), OURS), OURS: Entry(what(linear()))}


def flops(rows: int, width: int, classes: int) -> float:
    """Of one matrix product of the layer."""
    return 2.0 * rows * width * classes


def growing(operation: str, rows: int, width: int, classes: int, x: int) -> Comparison:
    """The same for sizes that grow; by rows nothing is run, for all scores may not fit."""
    compile_only = operation == BY_ROWS
    entries = linear_entries(value_and_gradient)
    if not compile_only:
        entries |= limits.products(3 * flops(rows, width, classes))
    return Comparison(
        operation,
        in_words(rows, width, classes),
        x,
        entries,
        functools.partial(shapes if compile_only else arguments, rows, width, classes),
        seconds=1,
        compile_only=compile_only,
    )


def of_scores(rows: int, classes: int) -> Comparison:
    """Values and gradients of losses of scores that are there."""

    def args() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0))
        scores = jax.random.normal(keys[0], (rows, classes))
        return scores, scores, jax.random.randint(keys[1], (rows,), 0, classes)

    def mean(loss: Loss) -> Loss:
        return value_and_gradient(lambda *args: loss(*args).mean())

    entries = {
        "optax softmax_cross_entropy": Entry(
            mean(optax.softmax_cross_entropy_with_integer_labels), "jsm.cross_entropy"
        ),
        "jsm.cross_entropy": Entry(mean(jsm.cross_entropy)),
        "optax multiclass_sparsemax_loss": Entry(
            mean(optax.losses.multiclass_sparsemax_loss), "jsm.sparsemax_loss"
        ),
        "torch sparsemax_loss": torch_peer(
            ("entmax", "torch"),
            functools.partial(_torch_loss, "sparsemax_loss"),
            "jsm.sparsemax_loss",
        ),
        "jsm.sparsemax_loss": Entry(mean(jsm.sparsemax_loss)),
        "torch entmax15_loss": torch_peer(
            ("entmax", "torch"), functools.partial(_torch_loss, "entmax15_loss"), "jsm.entmax_loss"
        ),
        "jsm.entmax_loss": Entry(mean(jsm.entmax_loss)),
    }
    return Comparison(SCORES, f"{rows} × {classes}", classes, entries | limits.copy, args)


def _torch_loss(name: str, entmax: Any, torch: Any) -> Callable[..., Any]:
    def value_and_gradient(scores: Any, _: Any, labels: Any) -> Any:
        scores = scores.detach().requires_grad_()
        loss = getattr(entmax, name)(scores, labels.long()).mean()
        loss.backward()
        return loss.detach(), scores.grad

    return value_and_gradient


def steps(quick: bool) -> list[Comparison]:
    """All comparisons."""
    sizes = TINY if quick else Sizes()
    few, width = sizes.few_rows, sizes.width
    return [
        *(of_linear_layer(operation, sizes) for operation in LINEAR),
        of_other_losses("linear layer, value and gradient", sizes),
        *(growing(BY_CLASSES, few, width, classes, classes) for classes in sizes.by_classes),
        *(growing(BY_ROWS, rows, width, sizes.classes, rows) for rows in sizes.by_rows),
        of_scores(*sizes.scores),
    ]


NOTES = """
- The forward pass and the gradient compute the same as optax, but in chunks. If there are few
  scores, chunks save no memory and cost time.
- The tangent and the Hessian-vector product compute the scores of each chunk once more. Keeping
  them would take the memory that chunks save.
- `cross_entropy` of scores is right to 2 ulp even if one class dominates, where optax returns 0. It
  costs as much as it does in `log_softmax` ([mappings](mappings.md)).
- Compiling takes longer: there is a loop over chunks, and code for the rows that are left over.
"""

TOPIC = Topic(
    "losses",
    "Losses",
    """
`linear_cross_entropy` computes the loss of a linear layer with many outputs, without holding all
scores. It is compared with the same loss by optax on all scores, in float32. After that come losses
of given scores, with their gradients, compared with optax and with deep-spin's entmax on PyTorch.
The limit for the layer is the time of its matrix products, at the speed of one large product: 1
product in the forward pass, and 3 with the gradient or the tangent. The limit for given scores is a
copy, which reads the scores and writes the gradient.
""",
    steps,
    (
        time_and_memory([*LINEAR, SCORES]),
        Growth("Temporary memory by rows", BY_ROWS, "memory", "rows", "MB"),
        Growth("Temporary memory by classes", BY_CLASSES, "memory", "classes", "MB"),
        Growth("Time by classes", BY_CLASSES, "time", "classes (1024 rows)", "ms"),
    ),
    NOTES,
)

if __name__ == "__main__":
    main([TOPIC])
