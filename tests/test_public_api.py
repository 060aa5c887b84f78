"""Every public name is documented, its example runs, and importing it imports little else."""

import doctest
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsoftmax as jsm
from jaxsoftmax.attention._options import Options
from tests.calls import public_functions

HIDDEN_MODULES = (
    *("sklearn", "matplotlib", "tqdm", "scipy.optimize", "mpmath", "chex", "flax"),
    *("optax", "torch", "entmax"),
)


PUBLIC_MODULES = (jsm, jsm.calibration, jsm.plots, jsm.testing)


def public_objects():
    """All names of the package, and what its public module defines."""
    for module in PUBLIC_MODULES:
        for name, value in vars(module).items():
            is_ours = getattr(value, "__module__", "").startswith(module.__name__)
            if is_ours and not name.startswith("_") and callable(value):
                yield pytest.param(name, value, id=f"{module.__name__}.{name}")


OBJECTS = list(public_objects())
FUNCTIONS = [p for p in OBJECTS if p.values[0] not in ("ReliabilityCurve", "BrierDecomposition")]


def test_public_objects_are_found():
    found = {p.values[0] for p in OBJECTS}
    assert {name.removeprefix("calibration.") for name in public_functions()} <= found


@pytest.mark.parametrize(("name", "value"), OBJECTS)
def test_is_documented(name, value):
    doc = inspect.getdoc(value) or ""
    assert doc, f"{name} has no docstring"
    first = doc.splitlines()[0]
    assert first.endswith((".", "?"))
    if isinstance(value, type) and issubclass(value, tuple):
        for field in value._fields:
            assert f"{field}:" in doc
        return
    for heading in ("Args:", "Example:", "References:"):
        assert f"\n{heading}\n" in doc, f"{name} has no section {heading}"
    if not isinstance(value, type):
        returns = inspect.signature(value).return_annotation not in (None, "None")
        assert ("\nReturns:\n" in doc) == returns
        assert "\nRaises:\n" in doc
    arguments = doc.split("\nArgs:\n")[1].split("\n\n")[0]
    for parameter in inspect.signature(value).parameters:
        assert f"  {parameter}: " in arguments, f"{name} does not say what {parameter} is"


@pytest.mark.parametrize(("name", "value"), FUNCTIONS)
def test_example_is_found(name, value):
    """What is decorated can escape doctest, unless it looks like a function of its module."""
    home = sys.modules[value.__module__]
    found = [test for test in doctest.DocTestFinder().find(home) if test.examples]
    assert f"{home.__name__}.{value.__name__}" in [test.name for test in found]
    (example,) = [test for test in found if test.name.endswith(f".{value.__name__}")]
    calls = "".join(e.source for e in example.examples)
    assert name in calls
    assert any(e.want for e in example.examples), "an example that shows nothing"


def test_pytest_collects_the_examples(request):
    """The configuration of the tests asks for them."""
    root = pathlib.Path(request.config.rootpath)
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-n",
            "0",
            "jaxsoftmax",
            "--ignore=jaxsoftmax/_demo",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for parameter in FUNCTIONS:
        _, value = parameter.values
        assert f"::{value.__module__}.{value.__qualname__}\n" in out


@pytest.mark.parametrize("module", PUBLIC_MODULES, ids=lambda module: module.__name__)
def test_a_shell_completes_public_names_alone(module):
    public = {name for p in OBJECTS if (name := p.values[0]) in vars(module)}
    public = {name for name in public if vars(module)[name].__module__.startswith(module.__name__)}
    if module is jsm:
        public |= {"calibration", "plots", "testing"}
    assert sorted(public) == sorted(module.__all__)
    assert set(dir(module)) - {"__version__"} == public
    assert all(hasattr(module, name) for name in dir(module))


@pytest.mark.parametrize("module", PUBLIC_MODULES[:2], ids=lambda module: module.__name__)
def test_help_tells_of_each_public_name_in_a_line(module):
    listed = re.findall(r"^    (\w+) {2,}\S", module.__doc__, re.M)
    results = {"ReliabilityCurve", "BrierDecomposition"}  # what functions return
    values = set(module.__all__) - results
    told = set(listed) | set(re.findall(r"apply `(\w+)`", module.__doc__))
    assert told == values
    assert len(listed) == len(set(listed))


def test_attention_can_be_typed_with_each_of_its_options():
    parameters = inspect.signature(jsm.dot_product_attention).parameters.values()
    by_keyword = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert by_keyword == {*Options.__annotations__, "return_residual"}


def test_import_is_light():
    code = f"import sys, jaxsoftmax; print([m for m in {HIDDEN_MODULES} if m in sys.modules])"
    run = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_import_runs_nothing():
    """No device is looked for, and no array made, before the first call."""
    code = "import jaxsoftmax; from jax._src import xla_bridge as b; print(b._backends)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "{}"


def test_names_are_those_of_the_contract():
    expected = {
        "custom_vjp",
        "calibration",
        "softmax",
        "log_softmax",
        "logsumexp",
        "sparsemax",
        "entmax15",
        "hardmax",
        "cross_entropy",
        "sparsemax_loss",
        "entmax_loss",
        "gumbel_softmax",
        "sample",
        "straight_through",
        "plots",
        "fenchel_young_loss",
        "linear_cross_entropy",
        "dot_product_attention",
        "attention_fn",
    }
    assert expected <= {name for name in vars(jsm) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("softmax", "(x, axis, where, *, temperature)"),
        ("log_softmax", "(x, axis, where, *, temperature)"),
        ("logsumexp", "(x, axis, where, *, temperature)"),
        ("sparsemax", "(x, axis, where, *, temperature)"),
        ("entmax15", "(x, axis, where, *, temperature)"),
        ("hardmax", "(x, axis, where)"),
        ("sample", "(key, x, axis, where, *, temperature)"),
        ("gumbel_softmax", "(key, x, axis, where, *, temperature, hard)"),
        ("straight_through", "(mapping, hard)"),
        (
            "cross_entropy",
            "(scores, targets, axis, where, *, temperature, label_smoothing, z_loss)",
        ),
        ("sparsemax_loss", "(scores, targets, axis, where, *, temperature)"),
        ("entmax_loss", "(scores, targets, alpha, axis, where, *, temperature)"),
        ("fenchel_young_loss", "(mapping, entropy)"),
        (
            "linear_cross_entropy",
            "(hidden, weight, labels, *, bias, loss, reduction, where, logits_soft_cap, "
            "chunk_size, vocab_axis_name)",
        ),
        ("dot_product_attention", "(query, key, value, bias, mask, *, normalizer, scale)"),
    ],
)
def test_signatures_begin_as_in_the_contract(name, signature):
    parameters = inspect.signature(getattr(jsm, name)).parameters.values()
    names = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(p.name)
    assert f"({', '.join(names)})".startswith(signature[:-1])


def test_one_module_alone_uses_what_jax_does_not_promise():
    """Internals, and what has changed before: jaxprs, lowering, types of `shard_map`."""
    package = pathlib.Path(jsm.__file__).parent
    unstable = re.compile(
        r"jax\._src|jax\.(interpreters|extend)|from jax import (interpreters|extend)|ClosedJaxpr"
        r"|\.(vma|manual_axis_type)\b|default_backend|_primitive_batchers|def_abstract_eval"
    )
    users = {p.name for p in package.rglob("*.py") if unstable.search(p.read_text("utf-8"))}
    assert users == {"_jax.py"}
    assert len((package / "_jax.py").read_text("utf-8").splitlines()) < 350
