"""A form from outside the package, and the contract that it and ours are checked by."""

import contextlib
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxsoftmax as jsm
from jaxsoftmax import testing
from jaxsoftmax._public import Fixed, Positive, public
from tests.cases import ARCTAN, LIFTED, MAPPINGS, SQUAREPLUS, entmax_by_bisection, named

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

ours = [c for c in MAPPINGS if c.simplex and c.gives == "probabilities" and c.smooth != "nowhere"]


@pytest.mark.thorough
@pytest.mark.parametrize("case", **named(ours))
def test_ours_keep_the_contract(case):
    testing.check_mapping(case.fun, case.reference)


def softmax_by_formula(x):
    return scipy.special.softmax(x, -1)


def softmax(x, axis=-1, where=None, temperature=1.0):
    return jsm.softmax(x, axis, where, temperature=temperature)


def _in_place_of_softmax(change):
    return lambda x, axis=-1, where=None, temperature=1.0: change(x, axis, where, temperature)


@jax.custom_jvp
def _half(x):
    return x


_half.defjvp(lambda primals, tangents: (primals[0], 0.5 * tangents[0]))

FAULTS = {
    "values": lambda x, a, w, t: jsm.sparsemax(x, a, w, temperature=t),
    "dtype": lambda x, a, w, t: softmax(jnp.asarray(x, jnp.float32), a, w, t),
    "values of integers": lambda x, a, w, t: jnp.where(
        jnp.issubdtype(jnp.result_type(x), jnp.integer), 0, softmax(x, a, w, t)
    ),
    "axis=0": lambda x, a, w, t: softmax(x, -1, w, t),
    "where": lambda x, a, w, t: softmax(x, a, None, t),
    "NaN that where excludes": lambda x, a, w, t: softmax(
        x if w is None else jnp.where(w, x, x - jnp.inf), a, None, t
    ),
    "temperature=0.5": lambda x, a, w, t: softmax(x, a, w),
    "temperature=0": lambda x, a, w, t: softmax(x, a, w, jnp.maximum(t, 0.1)),
    "rows of extreme scores": lambda x, a, w, t: softmax(jnp.nan_to_num(x, nan=0.0), a, w, t),
    "derivatives in reverse mode": lambda x, a, w, t: softmax(_half(x), a, w, t),
    "where and temperature": lambda x, a, w, t: softmax(x, a, w, 1.0 if w is not None else t),
    "derivatives in temperature in forward mode": lambda x, a, w, t: softmax(
        x, a, w, jax.lax.stop_gradient(t)
    ),
    # In reverse mode the quotient multiplies 0 by NaN.
    "derivatives in temperature beside where in reverse mode": lambda x, a, w, t: (
        softmax(x, a, w, t) if isinstance(t, float) and t == 0 else softmax(x / t, a, w)
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    with pytest.raises(AssertionError, match=f"^{name}"):
        testing.check_mapping(_in_place_of_softmax(FAULTS[name]), softmax_by_formula)


SINK_FAULTS = {
    "where and sink": lambda where, t, sink: (where, t, sink if where is None else None),
    "temperature and sink": lambda where, t, sink: (where, t, None if sink is None else sink / t),
    "derivatives in sink": lambda where, t, sink: (where, t, jax.lax.stop_gradient(sink)),
}


@pytest.mark.parametrize("name", SINK_FAULTS)
def test_faults_of_sinks_are_found(name):
    @public
    def faulty(x, axis=-1, where=None, temperature=1.0, sink=None):
        if isinstance(temperature, Fixed):
            return jsm.softmax(x, axis, where, temperature=temperature.value, sink=sink)
        t = temperature.value if isinstance(temperature, Positive) else temperature
        where, t, sink = SINK_FAULTS[name](where, t, sink)
        return jsm.softmax(x, axis, where, temperature=t, sink=sink)

    with pytest.raises(AssertionError, match=f"^{name}"):
        testing.check_mapping(faulty, softmax_by_formula)


def _partial(p, rate):
    return jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)) / rate, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("times", [0, 1, 1.01, 3])
def test_faults_of_parameters_are_found(times):
    mapping = functools.partial(sharpened(lambda p, rate: (times * _partial(p, rate),)), rate=2.0)
    wrong = pytest.raises(AssertionError, match=r"^derivatives in rate in forward mode")
    with contextlib.nullcontext() if times == 1 else wrong:
        testing.check_mapping(mapping, lambda x: softmax_by_formula(2 * x))


def test_the_edge_of_a_parameter():
    """Where there are no differences of values, nothing is compared with them."""
    testing.check_mapping(functools.partial(jsm.entmax, alpha=1.0), softmax_by_formula)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scores": [[1.0, 2.0]]}, "scores must be rows of three or more, got shape (1, 2)"),
        ({"scores": np.zeros((0, 4))}, "scores must be rows of three or more, got shape (0, 4)"),
        ({"scores": "a"}, "scores must be rows of numbers, got 'a'"),
        ({"scores": [[1.0, np.inf, 0.0]]}, "scores must be finite, got inf"),
        ({"mapping": None}, "mapping must be a function, got NoneType"),
        ({"reference": None}, "reference must be a function, got NoneType"),
        ({"tolerance": "a"}, "tolerance must be a positive number, got 'a'"),
        ({"tolerance": True}, "tolerance must be a positive number, got True"),
        ({"tolerance": math.nan}, "tolerance must be a positive number, got nan"),
        ({"tolerance": 0}, "tolerance must be a positive number, got 0"),
        (
            {"reference": lambda x: scipy.special.softmax(x)[None]},
            "reference must return the shape of its scores, (4,), got shape (1, 4)",
        ),
        (
            {"reference": lambda x: jax.nn.softmax(x.astype(np.float32))},
            "reference must return float64, since it is the truth that the mapping is compared "
            "with, got float32",
        ),
        ({"reference": lambda x: None}, "reference must return float64"),
        (
            {"reference": lambda x: x * np.nan},
            "reference must return finite numbers of finite scores, also of huge ones, got nan",
        ),
    ],
)
def test_wrong_arguments(arguments, sentence):
    arguments = {"mapping": jsm.softmax, "reference": softmax_by_formula, **arguments}
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}"):
        testing.check_mapping(**arguments)


def weight(u, alpha):
    """That of entmax, with the edge of the support at 0."""
    return jnp.where(u > 0, jnp.where(u > 0, (alpha - 1) * u, 1) ** (1 / (alpha - 1)), 0)


def sharpened(partials):
    """Softmax of `rate * x`, its derivative in the rate as given."""
    form = jsm.Form(
        weight=lambda u, rate: jnp.exp(rate * u),
        score=lambda p, rate: jnp.log(p) / rate,
        partials=partials,
    )
    return jsm.threshold_mapping(form, name="sharpened")


power = jsm.threshold_mapping(
    jsm.Form(weight, lambda p, alpha: p ** (alpha - 1) / (alpha - 1)), name="power"
)


@pytest.mark.thorough
def test_parameters_of_a_form(rng):
    """Those of entmax, whose derivatives are written by hand."""
    x, ct = rng.normal(size=(2, 3, 40))
    alpha = np.array([[1.2], [1.5], [1.9]])
    ours, pull_back = jax.vjp(jsm.entmax, x, alpha)
    theirs, theirs_back = jax.vjp(power, x, alpha)
    np.testing.assert_allclose(theirs, ours, atol=1e-12)
    for found, wanted in zip(theirs_back(ct), pull_back(ct), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)
    hessian = jax.jacfwd(jax.grad(lambda a: jnp.sum(ct * power(x, a))))(1.7)
    ours = jax.jacfwd(jax.grad(lambda a: jnp.sum(ct * jsm.entmax(x, a))))(1.7)
    np.testing.assert_allclose(hessian, ours, rtol=1e-7)
    np.testing.assert_allclose(power(x, 1.3, 0), jsm.entmax(x, 1.3, 0), atol=1e-12)
    testing.check_mapping(
        functools.partial(power, alpha=1.4), lambda x: entmax_by_bisection(x, 1.4)
    )


def test_parameters_are_not_compiled_for():
    count = 0

    def counted(u, rate):
        nonlocal count
        count += 1
        return jnp.exp(rate * u)

    mapping = jsm.threshold_mapping(jsm.Form(counted, lambda p, rate: jnp.log(p) / rate))
    x = jnp.arange(3.0)
    mapping(x, 1.0)
    traced = count
    np.testing.assert_allclose(mapping(x, 3.0), jsm.softmax(3 * x), rtol=1e-6)
    assert count == traced


def test_a_form_with_a_fixed_threshold(rng):
    """Entries that depend on their own score alone."""
    x = rng.normal(size=(2, 5))
    sigmoid = jsm.threshold_mapping(
        jsm.Form(jax.nn.sigmoid, lambda p: jnp.log(p) - jnp.log1p(-p), tau=0.0)
    )
    where = np.arange(5) < 4
    np.testing.assert_allclose(sigmoid(x, where=where), scipy.special.expit(x) * where)
    # Far out, where the score of the probability is infinite.
    far = jax.grad(jax.grad(lambda u: sigmoid(u[None])[0]))(20.0)
    np.testing.assert_allclose(far, jax.grad(jax.grad(jax.nn.sigmoid))(20.0), rtol=1e-6)
    jacobian = jax.jacrev(sigmoid)(x[0])
    np.testing.assert_allclose(jacobian, np.diag(jax.vmap(jax.grad(jax.nn.sigmoid))(x[0])))
    np.testing.assert_allclose(jax.jacfwd(sigmoid)(x[0]), jacobian)
    shifted = jsm.threshold_mapping(
        jsm.Form(lambda u: jnp.maximum(u / 2, 0) ** 2, lambda p: 2 * jnp.sqrt(p), tau=0.5)
    )
    np.testing.assert_allclose(shifted(x), np.maximum((x - 0.5) / 2, 0) ** 2)


@pytest.mark.parametrize(
    "form",
    [
        # No power, and no exponential: the bracket is used.
        jsm.Form(jax.nn.softplus, lambda p: jnp.log(jnp.expm1(p))),
        jsm.Form(
            lambda u: jnp.where(u < 0, 1 / jnp.where(u < 0, 1 - u, 1) ** 2, 1 + u),
            lambda p: jnp.where(p < 1, 1 - jnp.where(p < 1, p, 1) ** -0.5, p - 1),
        ),
        jsm.Form(lambda u: jnp.clip(u, 0, 1) ** 0.5, lambda p: p**2),
    ],
)
def test_any_increasing_function(form, rng):
    """Whatever it is: rows sum to 1, and are the function of scores less one number."""
    mapping = jsm.threshold_mapping(form)
    for scale, length in [(0.1, 3), (1.0, 200), (30.0, 2000)]:
        x = scale * rng.normal(size=(20, length))
        p = np.asarray(mapping(x))
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)
        inside = (p > 1e-9) & (p < 0.999)
        tau = x - form.score(np.where(inside, p, 0.5))
        most, least = (
            np.max(tau, -1, where=inside, initial=-1e9),
            np.min(tau, -1, where=inside, initial=1e9),
        )
        assert np.all(most - least < 1e-7)


@pytest.mark.parametrize("form", [SQUAREPLUS, ARCTAN, LIFTED])
def test_what_takes_no_part_has_no_weight(form, rng):
    """Whatever a form makes of -inf: the others are as they are without it."""
    mapping = jsm.threshold_mapping(form)
    x, takes_part = rng.normal(size=(3, 4)), np.arange(4) < 3
    wanted, jacobian = (f(x[:, :3]) for f in (mapping, jax.vmap(jax.jacrev(mapping))))
    for excluded in (0.5, np.inf, np.nan):
        x[:, 3] = excluded
        found = mapping(x, where=takes_part)
        np.testing.assert_allclose(found[:, :3], wanted, rtol=1e-12)
        assert np.all(found[:, 3] == 0)
        for derivative in (jax.jacrev, jax.jacfwd):
            found = jax.vmap(derivative(functools.partial(mapping, where=takes_part)))(x)
            np.testing.assert_allclose(found[:, :3, :3], jacobian, rtol=1e-9)
            assert np.all(found[:, 3] == 0)
            assert np.all(found[:, :, 3] == 0)
    x[:, 3] = -np.inf
    np.testing.assert_allclose(mapping(x), np.pad(wanted, ((0, 0), (0, 1))), rtol=1e-12)
    if form.tau is None:
        np.testing.assert_allclose(wanted.sum(-1), 1)


def test_parameters_beside_what_takes_no_part(rng):
    """Where JAX finds derivatives, and where they are given: no NaN from -inf."""
    x, takes_part = rng.normal(size=4), np.arange(4) < 3

    def weight(u, rate):
        return jax.nn.sigmoid(rate * u)

    def score(p, rate):
        return (jnp.log(p) - jnp.log1p(-p)) / rate

    for slope in (None, lambda p, rate: rate * p * (1 - p)):
        gate = jsm.threshold_mapping(jsm.Form(weight, score, slope, tau=0.0))

        def loss(rate, where, gate=gate):
            return jnp.sum(jnp.where(takes_part, gate(x, rate, where=where), 0) ** 2)

        for derivative in (jax.grad, lambda f: jax.jacfwd(jax.grad(f))):
            found = derivative(lambda rate: loss(rate, takes_part))(1.3)
            np.testing.assert_allclose(found, derivative(lambda rate: loss(rate, None))(1.3))
    # Neither 0 as a score nor 1 as a probability is within reach of every form.
    pole = jsm.threshold_mapping(
        jsm.Form(lambda u, a: (-u) ** -a, lambda p, a: -(p ** (-1 / a)), tau=3.0)
    )
    gate = jsm.threshold_mapping(
        jsm.Form(
            weight,
            score,
            lambda p, rate: rate * p * (1 - p),
            lambda p, rate: (p * (1 - p) * (jnp.log(p) - jnp.log1p(-p)) / rate,),
            tau=0.0,
        )
    )
    for mapping in (pole, gate):
        third = jax.jacfwd(jax.jacfwd(jax.grad(lambda a, x, f=mapping: jnp.sum(f(x, a)))))
        found = third(1.3, jnp.array([2.0, 1.0, -jnp.inf]))
        np.testing.assert_allclose(found, third(1.3, jnp.array([2.0, 1.0])), rtol=1e-9)


def test_kernels_of_a_form_that_has_weight_at_infinity(rng):
    q, k, v = jnp.float32(rng.normal(size=(3, 1, 8, 1, 4)))
    attend = functools.partial(
        jsm.dot_product_attention, normalizer=jsm.threshold_mapping(SQUAREPLUS), is_causal=True
    )
    found = attend(q, k, v, implementation="pallas, interpreted")
    np.testing.assert_allclose(found, attend(q, k, v), atol=1e-5)


def test_forms_of_what_is_traced_are_refused():
    def logit(p):
        return jnp.log(p) - jnp.log1p(-p)

    def at(rate):
        form = jsm.Form(lambda u: jnp.exp(rate * u), lambda p: jnp.log(p) / rate)
        return jsm.threshold_mapping(form)(jnp.arange(3.0))[0]

    def beyond(tau):
        form = jsm.Form(jax.nn.sigmoid, logit, lambda p: p * (1 - p), tau=tau)
        return jsm.threshold_mapping(form)(jnp.arange(3.0))[0]

    for fun, part in ((at, "weight"), (beyond, "tau")):
        for of in (jax.grad(fun), jax.jit(jax.grad(fun))):
            with pytest.raises(TypeError, match=rf"form.{part} must not depend on .* traced"):
                of(2.0)
    # JAX finds the derivatives of what is not solved for.

    def shifted(tau):
        return jsm.threshold_mapping(jsm.Form(jax.nn.sigmoid, logit, tau=tau))(jnp.zeros(1))[0]

    np.testing.assert_allclose(jax.grad(shifted)(0.5), -jax.grad(jax.nn.sigmoid)(-0.5))


def test_attention_and_losses_of_a_form(rng):
    query, key, value = rng.normal(size=(3, 2, 12, 2, 4))
    form = jsm.Form(lambda u: jnp.maximum(u / 2, 0) ** 2, lambda p: 2 * jnp.sqrt(p))
    mapping = jsm.threshold_mapping(form)

    def attend(normalizer):
        def loss(*args):
            out = jsm.dot_product_attention(*args, is_causal=True, normalizer=normalizer)
            return jnp.sum(jnp.sin(3 * out))

        return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

    for found, wanted in zip(
        jax.tree.leaves(attend(mapping)), jax.tree.leaves(attend(jsm.entmax15)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)

    def entropy(p, axis):
        return jnp.sum((p - p**1.5) / 0.75, axis)

    loss = jsm.fenchel_young_loss(mapping, entropy)
    x, y = rng.normal(size=(3, 5)), np.array([0, 4, 2])
    np.testing.assert_allclose(loss(x, y), jsm.entmax_loss(x, y), atol=1e-9)
    learned = functools.partial(power, alpha=1.5)
    out = jsm.dot_product_attention(query, key, value, normalizer=learned)
    wanted = jsm.dot_product_attention(query, key, value, normalizer=jsm.entmax15)
    np.testing.assert_allclose(out, wanted, atol=1e-10)


def test_a_form_with_kinks(rng):
    """A step beyond a kink comes no nearer to 1, but is not the last."""

    def kinked(u, of):
        second, third = 0.351 + 0.2 * (u - 0.135), 0.744 + 0.6 * (u - 2.1)
        return of.where(u < 0.135, 2.6 * of.maximum(u, 0), of.where(u < 2.1, second, third))

    def score(p):
        second, third = 0.135 + (p - 0.351) / 0.2, 2.1 + (p - 0.744) / 0.6
        return jnp.where(p < 0.351, p / 2.6, jnp.where(p < 0.744, second, third))

    mapping = jsm.threshold_mapping(jsm.Form(lambda u: kinked(u, jnp), score))
    x = rng.normal(size=(2000, 8)).astype(np.float32)
    low, high = np.full((2000, 1), -10.0), np.full((2000, 1), 10.0)
    for _ in range(100):
        middle = (low + high) / 2
        enough = np.sum(kinked(x - middle, np), -1, keepdims=True) >= 1
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    np.testing.assert_allclose(mapping(x), kinked(x - low, np), rtol=0, atol=1e-5)


def test_wrong_forms():
    with pytest.raises(TypeError, match=r"form must be a jaxsoftmax\.Form, got function"):
        jsm.threshold_mapping(lambda u: u)
    for wrong in (lambda u, axis: u, lambda u, *rest: u, lambda u, *, rate: u):
        with pytest.raises(ValueError, match=r"form\.weight must name its parameters"):
            jsm.threshold_mapping(jsm.Form(wrong, lambda p: p))
    never_one = jsm.Form(jax.nn.sigmoid, lambda p: jnp.log(p) - jnp.log1p(-p))
    no_inverse = jsm.Form(jnp.exp, lambda p: p)
    for wrong in (never_one, no_inverse):
        with pytest.raises(ValueError, match=r"form\.weight must be the inverse of form\.score"):
            jsm.threshold_mapping(wrong)(np.ones(3))
    for falls in (lambda u: u**2, lambda u: jnp.exp(-u), lambda u: u):
        with pytest.raises(ValueError, match=r"form\.weight must be increasing"):
            jsm.threshold_mapping(jsm.Form(falls, lambda p: p))(np.ones(3))
    q = np.ones((1, 2, 1, 2))
    for call, sentence in [
        (
            lambda: jsm.dot_product_attention(q, q, q, normalizer=power),
            "power takes the parameter alpha, which has no default",
        ),
        (lambda: power(np.ones(3)), "missing a required argument: 'alpha'"),
        (lambda: power(np.ones(3), "x"), "alpha must be an array, got str"),
        (lambda: power(np.ones((2, 3)), np.ones(3)), "alpha must broadcast to one value per row"),
        (lambda: power(np.ones(3), 1.5, axes=1), "power takes the arguments x, alpha, axis, where"),
    ]:
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()


_WRONG_MEMBERS = [
    ({"weight": None}, "form.weight must be a function, got NoneType"),
    ({"weight": np.exp}, "form.weight must be a function in jax.numpy, got numpy.exp"),
    ({"weight": math.exp}, "form.weight must be written in jax.numpy for arrays, got an error"),
    ({"score": math.log}, "form.score must be "),  # has parameters since Python 3.13 only
    ({"weight": lambda u, rate="x": u}, "form.weight must have numbers as defaults, got rate='x'"),
    ({"weight": lambda: 1}, "form.weight must take u and the parameters"),
    ({"score": lambda: 1}, "form.score must take p and the parameters of form.weight, (p), got"),
    ({"score": lambda p: np.log(p)}, "form.score must be written in jax.numpy for arrays"),
    ({"score": lambda p: p.sum()}, "form.score must be elementwise, and return shape (2, 3)"),
    ({"slope": lambda p: p.sum()}, "form.slope must be elementwise, and return shape (2, 3)"),
    (
        {"weight": lambda u: jnp.cumsum(u, -1)},
        "form.weight must be elementwise, got a function that takes no number",
    ),
    ({"slope": lambda p: None}, "form.slope must return an array, got NoneType"),
    ({"slope": lambda p: p.astype(complex)}, "form.slope must be real numbers, got dtype complex"),
    ({"slope": [1]}, "form.slope must be a function or None, got list"),
    ({"slope": "a"}, "form.slope must be a function or None, got str"),
    ({"slope": 1.0}, "form.slope must be a function or None, got float"),
    ({"partials": 3}, "form.partials must be a function or None, got int"),
    ({"tau": "0"}, "form.tau must be a finite number or None, got '0'"),
    ({"tau": True}, "form.tau must be a finite number or None, got True"),
    ({"tau": 1j}, "form.tau must be a finite number or None, got 1j"),
    ({"tau": np.zeros(2)}, "form.tau must be a finite number or None, got an array of shape (2,)"),
    ({"tau": math.nan}, "form.tau must be a finite number or None, got nan"),
]


@pytest.mark.parametrize(("members", "sentence"), _WRONG_MEMBERS)
def test_wrong_members(members, sentence):
    given: Any = {"weight": jnp.exp, "score": jnp.log, **members}
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}"):
        jsm.threshold_mapping(jsm.Form(**given))


@pytest.mark.parametrize(
    ("partials", "sentence"),
    [
        (lambda p, rate: p, "one array per parameter, 1, got an array of shape (2, 3)"),
        (lambda p, rate: None, "one array per parameter, 1, got None"),
        (lambda p, rate: (p, p), "one array per parameter, 1, got 2"),
        (lambda p, rate: (), "one array per parameter, 1, got 0"),
        (lambda p, rate: (p[0],), "form.partials must be elementwise"),
        (lambda p: (p,), "form.partials must take p and the parameters of form.weight, (p, rate)"),
    ],
)
def test_wrong_partials(partials, sentence):
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        sharpened(partials)


def test_wrong_name():
    name: Any = 3
    with pytest.raises(TypeError, match="name must be a string, got int"):
        jsm.threshold_mapping(jsm.Form(jnp.exp, jnp.log), name=name)


def test_the_score_at_defaults():
    """A wrong score is found there, and nowhere else: other parameters are not known."""
    form = jsm.Form(lambda u, rate=2.0: jnp.exp(rate * u), lambda p, rate=2.0: jnp.log(p))
    mapping = jsm.threshold_mapping(form)
    with pytest.raises(
        ValueError, match=r"inverse of form\.score, got 0.0625 for the score of 0.25"
    ):
        mapping(np.ones(3))
    mapping(np.ones(3), 1.0)


def test_dtypes_of_a_form_follow_its_argument(rng):
    """Whatever its functions return: slopes in half precision, weights in double, a comparison."""
    x, ct = rng.normal(size=(2, 2, 5)).astype(np.float32)
    forms = [
        jsm.Form(lambda u: jnp.maximum(u, 0), lambda p: p, slope=lambda p: p > 0),
        jsm.Form(
            lambda u: jnp.maximum(u, 0).astype(float),
            lambda p: p.astype(float),
            slope=lambda p: jnp.sign(p).astype(jnp.bfloat16),
        ),
    ]
    wanted, wanted_back = jax.vjp(jsm.sparsemax, x)
    for form in forms:
        p, pull_back = jax.vjp(jsm.threshold_mapping(form), x)
        np.testing.assert_allclose(p, wanted, atol=1e-6)
        np.testing.assert_allclose(pull_back(ct)[0], wanted_back(ct)[0], atol=1e-6)
        assert p.dtype == pull_back(ct)[0].dtype == np.float32
