"""The rooms of platforms: what is in them could be deleted without a wrong number."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import jaxsoftmax
from jaxsoftmax import _platforms

PACKAGE = pathlib.Path(jaxsoftmax.__file__).parent
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jaxsoftmax as jsm

rng = np.random.default_rng(0)
x = np.float32(3 * rng.normal(size=(8, 2000)))
q, k, v = np.float32(rng.normal(size=(3, 2, 96, 4, 8)))
hidden, weight = np.float32(rng.normal(size=(600, 8))), np.float32(rng.normal(size=(8, 50)))
labels = rng.integers(50, size=600)
functions = {
    **{f.__name__: (f, (x,)) for f in (jsm.softmax, jsm.log_softmax, jsm.logsumexp, jsm.sparsemax)},
    "entmax15": (jsm.entmax15, (x,)),
    "stick_breaking": (jsm.stick_breaking, (x,)),
    "entmax": (jsm.entmax, (x, 1.3)),
    "budget_sparsemax": (jsm.budget_sparsemax, (x, 2.5)),
    "cross_entropy": (lambda x: jsm.cross_entropy(x, np.arange(8)), (x,)),
    "attention": (
        lambda *qkv: jsm.dot_product_attention(*qkv, is_causal=True, normalizer=jsm.entmax15),
        (q, k, v),
    ),
    "linear": (
        lambda h, w: jsm.linear_cross_entropy(h, w, labels, chunk_size=50, reduction="none"),
        (hidden, weight),
    ),
}
found = {}
for name, (f, args) in functions.items():
    out, back = jax.vjp(f, *map(jnp.asarray, args))
    ct = np.float32(np.random.default_rng(1).normal(size=out.shape))
    for i, a in enumerate((out, *back(jnp.asarray(ct)))):
        found[f"{name} {i}"] = np.asarray(a)
np.savez(sys.argv[1], **found)
"""


def results(package, out):
    environment = {**os.environ, "PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"}
    environment = {name: x for name, x in environment.items() if not name.startswith("JAX_ENABLE")}
    command = [sys.executable, "-c", PROGRAM, str(out)]
    subprocess.run(command, env=environment, cwd=package, check=True)
    with np.load(out) as found:
        return dict(found)


@pytest.mark.parametrize("room", ["cpu"])
def test_a_room_can_be_deleted(room, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "jaxsoftmax")
    rooms = tmp_path / "jaxsoftmax" / "_platforms"
    (rooms / f"_{room}.py").unlink()
    listed = (rooms / "__init__.py").read_text()
    left = listed.replace(f"_{room}, ", "", 1).replace(f'"{room}": _{room}, ', "", 1)
    assert left.count(f"_{room}") == 0
    (rooms / "__init__.py").write_text(left)
    without = results(tmp_path, tmp_path / "without.npz")
    with_room = results(PACKAGE.parent, tmp_path / "with.npz")
    assert len(without) == 27
    for name in without:
        np.testing.assert_allclose(without[name], with_room[name], rtol=2e-5, atol=2e-6)


def test_each_room_holds_what_is_asked_for():
    """What no one asks for is in no room."""
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    asked = set(re.findall(r'(?:chosen\(|constants\(|by_platform,)\s*"(\w+)"', source))
    held = set()
    for room in _platforms.ROOMS.values():
        for name, x in vars(room).items():
            if getattr(x, "__module__", room.__name__) == room.__name__ and name[0] != "_":
                held.add(name)
    imported = {"functools", "jax", "jnp", "lax", "Any", "Callable", "Sequence"}
    assert held - {"LOCAL"} - imported == asked
