"""What crosses devices: counted in compiled programs, beside the formulas of docs/scaling.md.

Run it as `python -m benchmarks.scaling`; with `--write` it writes the tables into the guide. It
needs no accelerator: eight CPU devices are enough to compile for.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from benchmarks.collectives import Collective, collectives

GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"
COUNTED_ON = (2, 4, 8)
# Rows and classes, features; small, since only shapes are compiled for.
_ROWS, _CLASSES, _FEATURES = 6, 64, 16
_BATCH, _QUERIES, _KEYS, _HEADS = 1, 4, 16, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A function on several devices, and what its collectives should give to each of them.

    Attributes:
      name: what it is called in the guide.
      formula: the same as text, in R rows of scores, D features, K rows of keys, n devices.
      numbers: how many numbers, given the number of devices, but for what solvers tell.
      in_loop: the same for each pass of a solver, if there is one.
      compiled: the text of the program for a number of devices.
    """

    name: str
    formula: str
    numbers: Callable[[int], int]
    compiled: Callable[[int], str]
    in_loop: Callable[[int], int] = lambda n: 0

    def counted(self, devices: int) -> tuple[int, int]:
        """What the compiled program has: numbers in all, and numbers per pass of the loop."""
        found = collectives(self.compiled(devices))
        return (
            sum(_given(c) * c.passes for c in found if c.passes is not None),
            sum(_given(c) for c in found if c.passes is None),
        )


def _given(collective: Collective) -> int:
    if collective.kind not in ("all-reduce", "collective-permute"):
        raise ValueError(f"the guide has no {collective.kind}, and here is one.")
    return collective.size


def _on_mesh(fun: Callable, specs: tuple, out: P, *shapes: tuple[int, ...]) -> Callable[[int], str]:
    """The text of `fun` on a mesh of one axis, "i"; integers where a shape is of rows alone."""

    def text(devices: int) -> str:
        mesh = jax.make_mesh((devices,), ("i",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=out)
        args = [
            jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else jnp.float32)
            for shape in shapes
        ]
        return jax.jit(mapped).lower(*args).compile().as_text()

    return text


def _of_scores(fun: Callable) -> Callable[[int], str]:
    spec = P(None, "i")
    return _on_mesh(fun, (spec,), spec, (_ROWS, _CLASSES))


def _softmax_and_gradient(x):
    p, pull_back = jax.vjp(lambda x: jsm.softmax(x, (-1, "i")), x)
    return pull_back(x * p)[0]


def _linear(hidden, weight, labels):
    def loss(hidden, weight):
        return jsm.linear_cross_entropy(hidden, weight, labels, vocab_axis_name="i")

    return jax.grad(loss, (0, 1))(hidden, weight)


def _attention(query, key, value):
    return jsm.dot_product_attention(query, key, value, kv_axis_name="i")


def _ring(query, key, value):
    return jsm.dot_product_attention(query, key, value, kv_axis_name="i", query_axis_name="i")


def _ring_gradient(query, key, value):
    out, pull_back = jax.vjp(_ring, query, key, value)
    return pull_back(out)


def _solved(name: str, sums: int, mapping: Callable[..., jax.Array]) -> Case:
    """Of a mapping whose threshold is searched for, by so many sums a pass."""
    return Case(
        f"`{name}`",
        f"R, and {sums} R a pass",
        lambda n: _ROWS,
        _of_scores(lambda x: mapping(x, axis=(-1, "i"))),
        in_loop=lambda n: sums * _ROWS,
    )


_SPREAD = P(None, "i")
_QKV = ((_BATCH, _QUERIES, _HEADS, _FEATURES), *[(_BATCH, _KEYS, _HEADS, _FEATURES)] * 2)
_SCORE_ROWS = _BATCH * _HEADS * _QUERIES
_KEY_ROWS = _BATCH * _HEADS * _KEYS
CASES = [
    Case(
        "`softmax`",
        "2 R",
        lambda n: 2 * _ROWS,
        _of_scores(lambda x: jsm.softmax(x, (-1, "i"))),
    ),
    Case(
        "`softmax` and its gradient", "4 R", lambda n: 4 * _ROWS, _of_scores(_softmax_and_gradient)
    ),
    Case(
        "`log_softmax`",
        "3 R",
        lambda n: 3 * _ROWS,
        _of_scores(lambda x: jsm.log_softmax(x, (-1, "i"))),
    ),
    _solved("sparsemax", 2, jsm.sparsemax),
    _solved("entmax15", 2, jsm.entmax15),
    _solved("entmax", 3, functools.partial(jsm.entmax, alpha=1.3)),
    Case(
        "`linear_cross_entropy`, both gradients",
        "4 R + R D",
        lambda n: 4 * _ROWS + _ROWS * _FEATURES,
        _on_mesh(
            _linear,
            (P(), P(None, "i"), P()),
            (P(), P(None, "i")),
            (_ROWS, _FEATURES),
            (_FEATURES, _CLASSES),
            (_ROWS,),
        ),
    ),
    Case(
        "`dot_product_attention`, keys spread",
        "2 R + R D",
        lambda n: 2 * _SCORE_ROWS + _SCORE_ROWS * _FEATURES,
        _on_mesh(_attention, (P(), _SPREAD, _SPREAD), P(), *_QKV),
    ),
    Case(
        "`dot_product_attention`, ring",
        "2 K D (n - 1) / n",
        lambda n: 2 * _KEY_ROWS * _FEATURES * (n - 1) // n,
        _on_mesh(_ring, (_SPREAD,) * 3, _SPREAD, *[_QKV[1]] * 3),
    ),
    Case(
        "the same and its gradient",
        "6 K D",
        lambda n: 6 * _KEY_ROWS * _FEATURES,
        _on_mesh(_ring_gradient, (_SPREAD,) * 3, (_SPREAD,) * 3, *[_QKV[1]] * 3),
    ),
]


def counts() -> str:
    """The table of what compiled programs have, as text."""
    lines = [
        "| function | numbers, by formula | " + " | ".join(f"n = {n}" for n in COUNTED_ON) + " |",
        "|---|---|" + "---|" * len(COUNTED_ON),
    ]
    for case in CASES:
        cells = []
        for devices in COUNTED_ON:
            numbers, in_loop = case.counted(devices)
            wanted = case.numbers(devices), case.in_loop(devices)
            if (numbers, in_loop) != wanted:
                raise ValueError(
                    f"{case.name} on {devices} devices has {numbers} numbers and {in_loop} a pass, "
                    f"by the formula {wanted[0]} and {wanted[1]}."
                )
            cells.append(f"{numbers} + {in_loop} a pass" if in_loop else f"{numbers}")
        lines.append(f"| {case.name} | {case.formula} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


DEVICES = (8, 64, 512, 4096)


def _table(first: str, rows: dict[str, Callable[[int], float]]) -> str:
    lines = [f"| {first} | " + " | ".join(f"{n:,} devices" for n in DEVICES) + " |"]
    lines.append("|---|" + "---|" * len(DEVICES))
    for name, value in rows.items():
        lines.append(f"| {name} | " + " | ".join(_bytes(value(n)) for n in DEVICES) + " |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def all_reduce(count: float, devices: int) -> float:
    """Bytes that a device sends in an all-reduce of `count` bytes, at best."""
    return 2 * (devices - 1) / devices * count


def vocabulary(rows: int = 8192, features: int = 4096) -> str:
    """Bytes of a step of `linear_cross_entropy` in bfloat16, whose sums are in float32."""

    def of_loss(devices: int) -> float:
        return all_reduce(rows * (3 * 4 + features * 2), devices)

    table: dict[str, Callable[[int], float]] = {"any vocabulary, sent": of_loss}
    for classes in (2**17, 2**18, 2**19, 2**20):
        name = f"{classes // 1024}k"

        def gathered(devices: int, classes: int = classes) -> float:
            return (devices - 1) / devices * rows * classes * 2

        def kept(devices: int, classes: int = classes) -> float:
            return features * classes * 2 / devices

        table[f"{name}: gathered scores would be"] = gathered
        table[f"{name}: weights kept"] = kept
    return _table("per device and step", table)


def sequence(length: int = 2**20, heads: int = 32, key_heads: int = 8, features: int = 128) -> str:
    """Bytes of attention over a long sequence in bfloat16."""

    def keys_spread(devices: int) -> float:
        return all_reduce(length * heads * (2 * 4 + features * 4), devices)

    def ring(devices: int) -> float:
        return (devices - 1) / devices * length * key_heads * 2 * features * 2

    def scores(devices: int) -> float:
        return length * length * heads * 2 / devices

    return _table(
        "per device and layer, forward",
        {
            "keys spread, queries on all devices: sent": keys_spread,
            "ring: sent": ring,
            "ring: queries, keys and values kept": lambda n: (
                length * (heads + 2 * key_heads) * features * 2 / n
            ),
            "all scores would be": scores,
        },
    )


TABLES = {"counts": counts, "vocabulary": vocabulary, "sequence": sequence}


def written(guide: str) -> str:
    """The guide with its tables made anew."""
    for name, table in TABLES.items():
        before, begin, rest = guide.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not begin or not end:
            raise ValueError(f"docs/scaling.md has no place for the table {name!r}.")
        guide = f"{before}{begin}{table()}\n{end}{after}"
    return guide


def main() -> None:
    """Prints the tables, or writes them into the guide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the tables into the guide")
    if parser.parse_args().write:
        GUIDE.write_text(written(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, table in TABLES.items():
        print(f"\n{name}\n\n{table()}")


if __name__ == "__main__":
    main()
