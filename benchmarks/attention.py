"""Attention: every derivative, causal or not, with several normalizers, by length."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxsoftmax as jsm
from benchmarks import limits
from benchmarks.charts import Growth, time_and_memory
from benchmarks.command import Topic, main
from benchmarks.measuring import Comparison, Entry, Missing
from benchmarks.peers import peer, torch_peer
from benchmarks.transforms import (
    forward,
    gradient_of_jvp,
    hessian_product,
    jvp,
    value_and_gradient,
)

Attention = Callable[..., jax.Array]
Function = Callable[..., Any]

HEADS, FEATURES = 8, 64
THEIRS, OURS, CHUNKED, TORCH = "jax.nn", "jsm", "tokamax xla_chunked", "torch"


def output(attention: Attention) -> Function:
    """What attention gives."""
    return lambda qkv, weights: attention(*qkv)


def loss(attention: Attention) -> Function:
    """A sum of its outputs."""
    return lambda qkv, weights: jnp.sum(attention(*qkv) * weights)


def curved_loss(attention: Attention) -> Function:
    """A sum of functions of its outputs, so that second derivatives in the outputs count too."""
    return lambda qkv, weights: jnp.sum(jnp.sin(attention(*qkv)) * weights)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is done with attention.

    Attributes:
      what: the derivative.
      of: what of attention it is the derivative of.
      products: how many matrix products of all queries with all keys it takes at least.
    """

    what: Callable[[Function], Function]
    of: Callable[[Attention], Function]
    products: int | None = None

    def __call__(self, attention: Attention) -> Function:
        """A function of (queries, keys, values), tangents of them, and weights of the outputs."""
        return self.what(self.of(attention))


FORWARD, GRADIENT = "forward", "value and gradient"
OPERATIONS = {
    FORWARD: Operation(forward, output, 2),
    GRADIENT: Operation(value_and_gradient, loss, 6),
    "jvp": Operation(jvp, output, 6),
    "Hessian-vector product": Operation(hessian_product, curved_loss),
    "gradient of the jvp": Operation(gradient_of_jvp, loss),
}
FULL, CAUSAL, BY_LENGTH = "not causal", "causal", "by length, not causal"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      full: the length of the sequence for all operations.
      causal: that of a causal one.
      by_length: lengths that are measured.
      compiled: lengths that are compiled only, for all the scores may not fit.
      derivatives: all operations.
      operations: those that are done with all variants of attention.
    """

    full: int = 2048
    causal: int = 4096
    by_length: Sequence[int] = (128, 512, 2048)
    compiled: Sequence[int] = (8192,)
    derivatives: Sequence[str] = tuple(OPERATIONS)
    operations: Sequence[str] = (FORWARD, GRADIENT)


TINY = Sizes(16, 16, (16,), (), (FORWARD, "gradient of the jvp"), (GRADIENT,))


def inputs(length: int) -> tuple[Any, ...]:
    """Queries, keys and values, tangents of them, and weights of the outputs."""
    keys = jax.random.split(jax.random.key(0), 7)
    q, k, v, dq, dk, dv, weights = (
        jax.random.normal(key, (1, length, HEADS, FEATURES)) for key in keys
    )
    return (q, k, v), (dq, dk, dv), weights


def entries(operation: Operation, causal: bool) -> dict[str, Entry | Missing]:
    """Softmax attention of ours and of others."""
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    ours = functools.partial(jsm.dot_product_attention, is_causal=causal)
    found: dict[str, Entry | Missing] = {
        THEIRS: Entry(operation(theirs), OURS),
        OURS: Entry(operation(ours)),
    }
    if operation in (OPERATIONS[FORWARD], OPERATIONS[GRADIENT]):
        found[CHUNKED] = by_tokamax(operation, causal)
        found[TORCH] = by_torch(operation, causal)
    else:
        found[CHUNKED] = Missing("has no forward mode")
    return found


def by_tokamax(operation: Operation, causal: bool) -> Entry | Missing:
    """The same in chunks."""

    def make(tokamax: Any, flags: Any) -> Function:
        flags.FLAGS.mark_as_parsed()  # or it would read our command line
        attention = functools.partial(
            tokamax.dot_product_attention, implementation="xla_chunked", is_causal=causal
        )
        return operation(attention)

    return peer(("tokamax", "absl.flags"), make, OURS)


def by_torch(operation: Operation, causal: bool) -> Entry | Missing:
    """PyTorch's, which is fused by hand."""

    def make(torch: Any) -> Function:
        attention = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=causal
        )

        def in_their_layout(x: Any) -> Any:
            return x.transpose(1, 2)

        def output(qkv: Any, *_: Any) -> Any:
            with torch.no_grad():
                return attention(*map(in_their_layout, qkv))

        def gradient(qkv: Any, _: Any, weights: Any) -> Any:
            qkv = [in_their_layout(x).detach().requires_grad_() for x in qkv]
            value = (attention(*qkv) * in_their_layout(weights)).sum()
            return value.detach(), torch.autograd.grad(value, qkv)

        return output if operation is OPERATIONS[FORWARD] else gradient

    return torch_peer(("torch",), make, OURS)


def comparison(name: str, length: int, causal: bool = False) -> Comparison:
    """One operation of all attentions, beside the matrix products that it takes."""
    operation = OPERATIONS[name]
    limit = limit_of(operation, length, causal)
    return Comparison(
        f"{CAUSAL if causal else FULL}, {name}",
        f"T = {length}",
        length,
        entries(operation, causal) | limit,
        functools.partial(inputs, length),
        seconds=1,
    )


def limit_of(operation: Operation, length: int, causal: bool = False) -> dict[str, Entry]:
    """The matrix products that an operation takes, if that is known."""
    if operation.products is None:
        return {}
    flops = 2.0 * HEADS * FEATURES * length**2 / (2 if causal else 1)
    return limits.products(operation.products * flops)


def normalizers(name: str, length: int) -> Comparison:
    """Ours with sparse normalizers, relative to ours with softmax."""
    found: dict[str, Entry | Missing] = {
        f"{OURS}, {normalizer.__name__}": Entry(
            OPERATIONS[name](functools.partial(jsm.dot_product_attention, normalizer=normalizer))
        )
        for normalizer in (jsm.softmax, jsm.entmax15, jsm.sparsemax)
    }
    theirs = {THEIRS: Entry(OPERATIONS[name](jax.nn.dot_product_attention))}
    return Comparison(
        f"normalizers, {name}",
        f"T = {length}",
        length,
        found | theirs,
        functools.partial(inputs, length),
        seconds=1,
    )


def growing(name: str, length: int, compile_only: bool) -> Comparison:
    """Ours, JAX's and tokamax's at one of several lengths."""
    operation = OPERATIONS[name]
    sparse = functools.partial(jsm.dot_product_attention, normalizer=jsm.entmax15)
    found = {
        THEIRS: Entry(operation(jax.nn.dot_product_attention), OURS),
        OURS: Entry(operation(jsm.dot_product_attention)),
        f"{OURS}, entmax15": Entry(operation(sparse)),
        CHUNKED: by_tokamax(operation, False),
    }
    if not compile_only:
        found |= limit_of(operation, length)
    return Comparison(
        f"{BY_LENGTH}, {name}",
        f"T = {length}",
        length,
        found,
        functools.partial(inputs, length),
        seconds=0.5,
        compile_only=compile_only,
    )


def steps(quick: bool) -> list[Comparison]:
    """All comparisons."""
    sizes = TINY if quick else Sizes()
    return [
        *(comparison(name, sizes.causal, causal=True) for name in sizes.operations),
        *(comparison(name, sizes.full) for name in sizes.derivatives),
        *(normalizers(name, sizes.full) for name in sizes.operations),
        *(
            growing(name, length, name == FORWARD or length in sizes.compiled)
            for name in sizes.operations
            for length in (*sizes.by_length, *sizes.compiled)
        ),
    ]


NOTES = """
- PyTorch's attention is written by hand for this kind of processor. It keeps a tile of scores in
  the cache from one product to the next. Ours is code for XLA, which writes a block of scores to
  memory between two products. In return, it takes any normalizer and has derivatives of every
  order.
- Causal attention takes longer to compile, because each band of queries is a loop of its own.
- A sequence of a few hundred tokens is a single block. All its scores are held, together with the
  transposed queries, keys and values, so no memory is saved. In a long sequence, only the
  transposed arrays grow with its length.
"""

TOPIC = Topic(
    "attention",
    "Attention",
    f"""
`dot_product_attention` on float32 queries, keys and values of shape (1, T, {HEADS}, {FEATURES}),
compared with that of `jax.nn`, with tokamax's chunked attention for XLA, and with PyTorch's
`scaled_dot_product_attention`. The limit is the time of the matrix products that every method
needs, at the speed of one large product: 2 products in the forward pass, 6 with the gradient or the
tangent, and half of that work for causal attention.
""",
    steps,
    (
        time_and_memory([f"{kind}, {name}" for kind in (CAUSAL, FULL) for name in OPERATIONS]),
        *(
            Growth(
                f"{title}, value and gradient, by length",
                f"{BY_LENGTH}, {GRADIENT}",
                quantity,
                "length of the sequence T",
                unit,
            )
            for title, quantity, unit in (
                ("Time", "time", "ms"),
                ("Temporary memory", "memory", "MB"),
                ("Time to compile", "compile", "ms"),
            )
        ),
    ),
    NOTES,
)

if __name__ == "__main__":
    main([TOPIC])
