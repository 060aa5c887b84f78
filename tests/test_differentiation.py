"""`jaxsoftmax.custom_vjp` itself: the interface of `jax.custom_vjp`, and forward mode."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests.tools import operations

X = np.array([0.3, -1.2, 2.0])
pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

close = functools.partial(np.testing.assert_allclose, rtol=1e-13)


def make_sine(custom_vjp, scale=1.0):
    """sin, with a rule that is wrong by a factor, so that whoever uses it can be told."""

    @custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, ct: (scale * ct * jnp.cos(x),))
    return sine


def make_mixed():
    """A function of a pytree with all that has no tangent in it."""

    @jsm.custom_vjp
    def mixed(tree, flag, key):
        noise = jax.random.normal(key, tree["a"].shape, tree["a"].dtype)
        total = tree["a"] * tree["n"].astype(tree["a"].dtype) + noise * tree["b"][0]
        return jnp.where(flag, total, -total), {"count": tree["n"] + 1, "none": None}

    def fwd(tree, flag, key):
        return mixed(tree, flag, key), (tree, flag, key)

    def bwd(residuals, cts):
        tree, flag, key = residuals
        ct, _ = cts
        ct = jnp.where(flag, ct, -ct)
        noise = jax.random.normal(key, tree["a"].shape, tree["a"].dtype)
        ct_a = ct * tree["n"].astype(ct.dtype)
        return {"a": ct_a, "b": [jnp.vdot(ct, noise), None], "n": None}, None, None

    mixed.defvjp(fwd, bwd)
    return mixed


TREE = {"a": X, "b": [np.array(0.5), None], "n": np.array([2, 3, -1])}


def of_floats(mixed):
    """The floats in, the floats out."""

    def fun(a, b, flag, key):
        return mixed({"a": a, "b": [b, None], "n": TREE["n"]}, flag, key)[0]

    return fun


def test_rule_is_used_by_both_modes():
    sine = make_sine(jsm.custom_vjp, scale=3.0)
    expected = 3 * np.cos(0.3)
    close(jax.grad(sine)(0.3), expected)
    close(jax.jvp(sine, (0.3,), (1.0,))[1], expected)
    close(jax.linearize(sine, 0.3)[1](1.0), expected)
    # Once more: the rule holds a cosine, which has no rule of its own.
    close(jax.grad(jax.grad(sine))(0.3), -3 * np.sin(0.3))
    close(jax.jacfwd(jax.jacfwd(sine))(0.3), -3 * np.sin(0.3))


def test_value_is_that_of_the_function():
    close(make_sine(jsm.custom_vjp, scale=3.0)(X), np.sin(X))


def test_orders_one_to_three_in_both_modes():
    check_grads(jax.jit(make_sine(jsm.custom_vjp)), (X,), order=3, modes=("fwd", "rev"))


def test_higher_orders_use_the_rule_again():
    """`fwd` calls the decorated function, so the second derivative meets the wrong factor too."""

    @jsm.custom_vjp
    def exponential(x):
        return jnp.exp(x)

    def fwd(x):
        y = exponential(x)
        return y, y

    exponential.defvjp(fwd, lambda y, ct: (2 * ct * y,))
    for first in (jax.jacfwd, jax.jacrev):
        for second in (jax.jacfwd, jax.jacrev):
            close(first(second(exponential))(0.5), 4 * np.exp(0.5))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: f], ids=["jit", "remat", "-"])
def test_wrapped(wrap):
    sine = wrap(make_sine(jsm.custom_vjp, scale=3.0))
    tangent = np.array([1.0, 0.0, -2.0])
    close(jax.jvp(sine, (X,), (tangent,))[1], 3 * np.cos(X) * tangent)
    close(jax.vjp(sine, X)[1](tangent)[0], 3 * np.cos(X) * tangent)
    close(jax.vmap(jax.grad(sine))(X), 3 * np.cos(X))
    close(jax.vmap(jax.jacfwd(sine))(X), 3 * np.cos(X))
    close(jax.hessian(sine)(0.3), -3 * np.sin(0.3))


def test_vmap_of_a_rule_with_a_batched_and_an_unbatched_argument():
    @jsm.custom_vjp
    def product(x, y):
        return jnp.sum(x * y)

    product.defvjp(
        lambda x, y: (product(x, y), (x, y)), lambda r, ct: (ct * r[1] * 3, ct * r[0] * 3)
    )
    xs = np.arange(6.0).reshape(2, 3)
    batched = jax.vmap(product, in_axes=(0, None))
    close(jax.grad(lambda y: jnp.sum(batched(xs, y)))(X), 3 * xs.sum(0))
    close(jax.jacfwd(lambda y: batched(xs, y))(X), 3 * xs)
    along = jax.vmap(lambda x, t: jax.jvp(product, (x, X), (t, X))[1], in_axes=(0, None))(xs, X)
    close(along, 3 * (X @ X + xs @ X))


def test_scan_with_carry_keeps_the_rule():
    sine = make_sine(jsm.custom_vjp, scale=3.0)

    def iterated(x, f=sine):
        return jax.lax.scan(lambda carry, _: (f(carry), None), x, length=3)[0]

    y1, y2 = np.sin(0.3), np.sin(np.sin(0.3))
    expected = 27 * np.cos(0.3) * np.cos(y1) * np.cos(y2)
    close(jax.grad(iterated)(0.3), expected)
    close(jax.jvp(iterated, (0.3,), (1.0,))[1], expected)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev], ids=["fwd", "rev"])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev], ids=["fwd", "rev"])
@pytest.mark.parametrize(
    "loop",
    [
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=3)[0],
        lambda f: lambda x: jax.lax.fori_loop(0, 3, lambda _, c: f(c), x),
        lambda f: lambda x: jax.lax.cond(x > 0, lambda x: f(f(f(x))), f, x),
    ],
    ids=["scan", "fori_loop", "cond"],
)
def test_second_derivatives_through_control_flow(outer, inner, loop):
    rule, plain = loop(make_sine(jsm.custom_vjp)), loop(jnp.sin)
    close(jax.jit(outer(inner(rule)))(0.3), jax.jit(outer(inner(plain)))(0.3))


def test_while_loop_has_forward_mode():
    sine = make_sine(jsm.custom_vjp, scale=3.0)

    def settle(x):
        return jax.lax.while_loop(lambda s: s[1] < 2, lambda s: (sine(s[0]), s[1] + 1), (x, 0))[0]

    close(jax.jvp(settle, (0.3,), (1.0,))[1], 9 * np.cos(0.3) * np.cos(np.sin(0.3)))


@pytest.mark.leaks_in_jax
def test_shard_map_with_a_rule_that_communicates():
    """Softmax over a mesh axis: maxima and sums cross devices in `fwd` and in `bwd`."""

    @jsm.custom_vjp
    def softmax(x):
        weights = jnp.exp(x - jax.lax.pmax(jnp.max(x), "d"))
        return weights / jax.lax.psum(jnp.sum(weights), "d")

    def fwd(x):
        p = softmax(x)
        return p, p

    softmax.defvjp(fwd, lambda p, ct: (p * (ct - jax.lax.psum(jnp.sum(p * ct), "d")),))
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    sharded = jax.jit(jax.shard_map(softmax, mesh=mesh, in_specs=spec, out_specs=spec))

    close(sharded(X), jsm.softmax(X))
    for derivative in (jax.jacfwd, jax.jacrev):
        close(derivative(sharded)(X), derivative(jsm.softmax)(X), atol=1e-15)
    for scalar in (lambda x: sharded(x)[1],):
        close(jax.hessian(scalar)(X), jax.hessian(lambda x: jsm.softmax(x)[1])(X), atol=1e-15)


@pytest.mark.parametrize("flag", [True, False])
def test_pytrees_with_all_that_has_no_tangent(flag):
    fun = of_floats(make_mixed())
    sign = 1 if flag else -1
    key = jax.random.key(0)
    noise = np.asarray(jax.random.normal(key, (3,), float))
    flag = np.array(flag)
    close(fun(X, 0.5, flag, key), sign * (X * TREE["n"] + 0.5 * noise))
    for derivative in (jax.jacfwd, jax.jacrev):
        by_a, by_b = derivative(fun, argnums=(0, 1))(X, 0.5, flag, key)
        close(by_a, sign * np.diag(TREE["n"]))
        close(by_b, sign * noise)
        # With a tangent for one leaf of the pytree and none for the other.
        close(jax.jit(derivative(fun, argnums=1))(X, 0.5, flag, key), sign * noise)


def test_tangents_of_what_has_none_are_float0():
    mixed = make_mixed()
    key, flag = jax.random.key(0), np.array(True)
    zero = functools.partial(np.zeros, dtype=jax.dtypes.float0)
    tangent = {"a": X, "b": [np.array(1.0), None], "n": zero(3)}
    out, along = jax.jvp(mixed, (TREE, flag, key), (tangent, zero(()), zero(())))
    chex.assert_trees_all_equal_structs(out, along)
    assert along[1]["count"].dtype == jax.dtypes.float0
    assert along[1]["none"] is None
    close(along[0], X * TREE["n"] + np.asarray(jax.random.normal(key, (3,), float)))


def test_vmap_over_keys_and_integers():
    fun = of_floats(make_mixed())
    keys = jax.random.split(jax.random.key(1), 4)
    flags = np.array([True, False, True, False])
    batched = jax.vmap(jax.jacfwd(fun, argnums=1), in_axes=(None, None, 0, 0))
    for i, row in enumerate(batched(X, 0.5, flags, keys)):
        close(row, jax.jacrev(fun, argnums=1)(X, 0.5, flags[i], keys[i]))


def test_integer_inputs_only():
    @jsm.custom_vjp
    def double(n):
        return 2 * n

    double.defvjp(lambda n: (double(n), None), lambda _, ct: (None,))
    assert double(3) == 6
    _, along = jax.jvp(double, (3,), (np.zeros((), jax.dtypes.float0),))
    assert along.dtype == jax.dtypes.float0


def test_outputs_of_integers_and_floats():
    @jsm.custom_vjp
    def top(x):
        return jnp.max(x), jnp.argmax(x)

    def fwd(x):
        value, index = top(x)
        return (value, index), (index, x)

    def bwd(residuals, cts):
        index, x = residuals
        return (jnp.zeros_like(x).at[index].set(5 * cts[0]),)

    top.defvjp(fwd, bwd)
    (value, index), (along, no_tangent) = jax.jvp(top, (X,), (np.array([1.0, 2.0, 3.0]),))
    assert (value, index, along) == (2.0, 2, 15.0)
    assert no_tangent.dtype == jax.dtypes.float0
    close(jax.grad(lambda x: top(x)[0])(X), [0, 0, 5])
    gradient, index = jax.jacfwd(top, has_aux=False)(X)[0], jax.jit(top)(X)[1]
    close(gradient, [0, 0, 5])
    assert index == 2


def test_several_outputs_of_which_one_is_used():
    @jsm.custom_vjp
    def both(x, y):
        return x * y, x + y

    both.defvjp(
        lambda x, y: (both(x, y), (x, y)),
        lambda r, cts: (cts[0] * r[1] + cts[1], cts[0] * r[0] + cts[1]),
    )
    for i, expected in enumerate([(3.0, 2.0), (1.0, 1.0)]):
        assert jax.grad(lambda x, y, i=i: both(x, y)[i], argnums=(0, 1))(2.0, 3.0) == expected
        along = jax.jvp(both, (2.0, 3.0), (1.0, 0.0))[1]
        assert along[i] == expected[0]
    check_grads(jax.jit(both), (np.array([2.0]), np.array([3.0])), order=2)


def test_second_derivative_in_one_argument_of_two():
    @jsm.custom_vjp
    def power(x, y):
        return x**y

    power.defvjp(
        lambda x, y: (power(x, y), (x, y)),
        lambda r, ct: (ct * r[1] * power(r[0], r[1] - 1), ct * power(*r) * jnp.log(r[0])),
    )
    check_grads(jax.jit(power), (np.array([1.7]), np.array([2.5])), order=2)
    mixed = jax.jacfwd(jax.grad(power, argnums=1), argnums=0)(1.7, 2.5)
    close(mixed, jax.grad(jax.jacfwd(power, argnums=0), argnums=1)(1.7, 2.5))


@pytest.mark.parametrize("as_decorator", [True, False])
@pytest.mark.parametrize("argnums", [(1, 3), (3, 1)], ids=str)
def test_nondiff_argnums(as_decorator, argnums):
    """Static arguments come first in `bwd`, in ascending order, as JAX has it."""

    def fun(x, f, y, name):
        assert name == "name"
        return f(x) * y

    if as_decorator:
        fun = functools.partial(jsm.custom_vjp, nondiff_argnums=argnums)(fun)
    else:
        fun = jsm.custom_vjp(fun, nondiff_argnums=argnums)

    def fwd(x, f, y, name):
        assert name == "name"
        return fun(x, f, y, name), (x, y)

    def bwd(f, name, residuals, ct):
        assert (f, name) == (jnp.sin, "name")
        x, y = residuals
        return 2 * ct * y * jnp.cos(x), 2 * ct * f(x)

    fun.defvjp(fwd, bwd)
    scalar = lambda x, y: fun(x, jnp.sin, y, "name")  # noqa: E731
    close(scalar(0.3, 2.0), 2 * np.sin(0.3))
    for derivative in (jax.jacfwd, jax.jacrev):
        close(derivative(scalar, argnums=0)(0.3, 2.0), 4 * np.cos(0.3))
        close(derivative(scalar, argnums=1)(0.3, 2.0), 2 * np.sin(0.3))
    close(jax.grad(jax.jit(fun, static_argnums=(1, 3)))(0.3, jnp.sin, 2.0, "name"), 4 * np.cos(0.3))


@pytest.mark.parametrize(
    "static", [{"nondiff_argnums": 0}, {"nondiff_argnames": "f"}, {"nondiff_argnames": ["f"]}]
)
def test_one_static_argument_by_number_and_by_name(static):
    fun = jsm.custom_vjp(lambda f, x: f(x), **static)
    fun.defvjp(lambda f, x: (fun(f, x), x), lambda f, x, ct: (7 * ct,))
    close(jax.jvp(functools.partial(fun, jnp.exp), (0.0,), (1.0,))[1], 7.0)
    close(jax.grad(functools.partial(fun, jnp.exp))(0.0), 7.0)


def test_traced_static_arguments_are_refused():
    scaled = jsm.custom_vjp(lambda x, n: n * x, nondiff_argnums=1)
    scaled.defvjp(lambda x, n: (scaled(x, n), None), lambda n, _, ct: (n * ct,))
    for of in (jax.grad(lambda n: scaled(1.0, n)), jax.jit(lambda n: scaled(1.0, n))):
        with pytest.raises(TypeError, match=r"argument 1 of .*, one of nondiff_argnums, must be"):
            of(2.0)
    scaled = jsm.custom_vjp(lambda x, ns: ns["n"] * x, nondiff_argnums=1)
    scaled.defvjp(lambda x, ns: (scaled(x, ns), None), lambda ns, _, ct: (ns["n"] * ct,))
    assert jax.grad(scaled)(1.0, {"n": 2.0}) == 2
    with pytest.raises(TypeError, match=r"argument 1 of .*, one of nondiff_argnums, must be"):
        jax.grad(lambda n: scaled(1.0, {"n": n}))(2.0)


def test_a_static_argument_that_there_is_not():
    with pytest.raises(ValueError, match=r"nondiff_argnames .* which are f, x, got g"):
        jsm.custom_vjp(lambda f, x: f(x), nondiff_argnames=("g",))


def test_keyword_and_default_arguments():
    @jsm.custom_vjp
    def scaled(x, factor=2.0):
        return x * factor

    scaled.defvjp(
        lambda x, factor=2.0: (scaled(x, factor), (x, factor)),
        lambda r, ct: (10 * ct * r[1], 10 * ct * r[0]),
    )
    assert scaled(3.0) == 6.0
    assert scaled(factor=4.0, x=3.0) == 12.0
    assert jax.grad(lambda x: scaled(x=x))(3.0) == 20.0
    assert jax.grad(lambda x: scaled(3.0, factor=x))(4.0) == 30.0
    assert jax.jvp(lambda x: scaled(x, factor=4.0), (3.0,), (1.0,)) == (12.0, 40.0)


def test_a_keyword_after_a_default():
    def powers(x, factor=2.0, n=1):
        return factor * x**n

    for fun in (jax.custom_vjp, jsm.custom_vjp):
        ours = fun(powers, nondiff_argnums=(2,))
        ours.defvjp(
            lambda x, factor, n: (powers(x, factor, n), (x, factor)),
            lambda n, r, ct: (10 * ct * r[1], None),
        )
        assert ours(3.0, n=2) == 18.0
        assert jax.grad(lambda x: ours(x, n=2))(3.0) == 20.0  # noqa: B023


def test_methods_are_bound():
    class Model:
        factor = 2.0

        @functools.partial(jsm.custom_vjp, nondiff_argnums=(0,))
        def apply(self, x):
            return self.factor * x

    Model.apply.defvjp(
        lambda self, x: (self.apply(x), None), lambda self, _, ct: (9 * self.factor * ct,)
    )
    assert Model().apply(3.0) == 6.0
    assert jax.grad(Model().apply)(3.0) == 18.0
    assert jax.jvp(Model().apply, (3.0,), (1.0,)) == (6.0, 18.0)


def test_keeps_name_and_documentation():
    def fun(x):
        """What it does."""
        return x

    wrapped = jsm.custom_vjp(fun)
    assert (wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__) == ("fun", fun.__doc__, fun)


def test_arguments_by_keyword_only_are_refused():
    """What has no position has no place in `bwd`."""

    @jsm.custom_vjp
    def scaled(x, *, by=2.0):
        return by * x

    scaled.defvjp(lambda x: (scaled(x), None), lambda _, ct: (2 * ct,))
    close(jax.grad(scaled)(1.0), 2)
    with pytest.raises(TypeError, match="scaled must be called with positional arguments, got"):
        scaled(1.0, by=5.0)


def test_call_without_a_rule_says_what_is_missing():
    lonely = jsm.custom_vjp(make_sine)
    with pytest.raises(
        AttributeError, match="no rule defined for custom_vjp function make_sine: call defvjp"
    ):
        lonely(1.0)


def test_symbolic_zeros_tell_which_arguments_are_differentiated():
    seen = []

    @jsm.custom_vjp
    def product(x, y):
        return x * y, x

    def fwd(x, y):
        seen.append((x.perturbed, y.perturbed))
        return product(x.value, y.value), (x.value, y.value)

    def bwd(residuals, cts):
        x, y = residuals
        ct = cts[0]
        if isinstance(ct, jax.custom_derivatives.SymbolicZero):
            return jnp.zeros_like(x), jnp.zeros_like(y)
        return 3 * ct * y, 3 * ct * x

    product.defvjp(fwd, bwd, symbolic_zeros=True)
    first = lambda x, y: product(x, y)[0]  # noqa: E731
    assert jax.grad(first)(2.0, 5.0) == 15.0
    assert jax.jvp(lambda y: first(2.0, y), (5.0,), (1.0,)) == (10.0, 6.0)
    assert seen == [(True, False), (False, True)]


@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        "bfloat16",
        "float32",
        "complex64",
        pytest.param("complex128", marks=pytest.mark.asks_for_x64),
    ],
)
def test_every_inexact_dtype(dtype):
    sine = make_sine(jsm.custom_vjp)
    x = jnp.asarray(X, dtype)
    tangent = jnp.ones_like(x)
    y, along = jax.jvp(sine, (x,), (tangent,))
    (gradient,) = jax.vjp(sine, x)[1](tangent)
    assert y.dtype == along.dtype == gradient.dtype == x.dtype
    chex.assert_trees_all_close(along, jnp.cos(x), rtol=4 * float(jnp.finfo(dtype).eps))
    chex.assert_trees_all_close(gradient, along)


def softmax_with(custom_vjp):
    """Softmax with its textbook rule."""

    @custom_vjp
    def softmax(x):
        weights = jnp.exp(x - jnp.max(x, -1, keepdims=True))
        return weights / jnp.sum(weights, -1, keepdims=True)

    def fwd(x):
        p = softmax(x)
        return p, p

    softmax.defvjp(fwd, lambda p, ct: (p * (ct - jnp.sum(p * ct, -1, keepdims=True)),))
    return softmax


def pulled_back(fun):
    return lambda x, ct: jax.vjp(fun, x)[1](ct)[0]


# Arithmetic, as opposed to what moves data about. Transposed twice, `a - b` is `a + (-b)`, which
# XLA simplifies: both count as one sum.
ARITHMETIC = ("exp", "log", "log1p", "mul", "div", "reduce_sum", "reduce_max", "while", "max")


def arithmetic(fun, *args):
    counts = operations(jax.make_jaxpr(fun)(*args))
    sums = counts["add"] + counts["add_any"] + counts["sub"]
    return {"sums": sums} | {name: counts[name] for name in ARITHMETIC}


@pytest.fixture
def operations_of_jax_are_seen():
    """A call of `jax.custom_vjp` is one operation where `jax_custom_vjp3` is on (jax 0.12)."""
    is_on = getattr(jax.config, "jax_custom_vjp3", False)
    if is_on:
        jax.config.update("jax_custom_vjp3", False)
    yield
    if is_on:
        jax.config.update("jax_custom_vjp3", True)


@pytest.mark.usefixtures("operations_of_jax_are_seen")
def test_gradient_costs_what_it_costs_with_jax():
    ours, jaxs = (softmax_with(f) for f in (jsm.custom_vjp, jax.custom_vjp))
    assert arithmetic(pulled_back(ours), X, X) == arithmetic(pulled_back(jaxs), X, X)


def test_gradient_of_softmax_costs_no_more_than_its_rule():
    """As lowered for a CPU, where one sum more keeps the gradient of the entry that dominates."""

    def rule(x, ct):
        p = jsm.softmax(x)
        ct = ct - jnp.sum(jnp.round(p) * ct, -1, keepdims=True)
        return p * (ct - jnp.sum(p * ct, -1, keepdims=True))

    def lowered(f):
        text = jax.jit(f).lower(X, X).compile().as_text()
        return {name: text.count(f" {name}(") for name in ("exponential", "divide", "reduce")}

    gradient, allowed = lowered(pulled_back(jsm.softmax)), lowered(rule)
    assert min(allowed["exponential"], allowed["reduce"]) > 0
    assert all(gradient[name] <= allowed[name] for name in allowed), (gradient, allowed)


def test_residuals_of_softmax_are_no_more_than_its_probabilities():
    """Memory: one array of the size of the scores, and row values."""
    x = np.linspace(-3, 3, 6 * 50).reshape(6, 50)
    _, pull_back = jax.vjp(jsm.softmax, x)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(pull_back)) <= x.size + 2 * len(x)


def test_effects_are_kept(capfd):
    """Printing in order, and checks, as within `jax.custom_vjp`."""

    @jsm.custom_vjp
    def sine(x):
        jax.debug.print("at {}", x, ordered=True)
        checkify.check(x > 0, "not above 0")
        return jnp.sin(x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, ct: (ct * jnp.cos(x),))
    for f in (sine, jax.grad(sine)):
        checked = jax.jit(checkify.checkify(jax.jit(f)))
        assert checked(1.0)[0].get() is None
        assert "not above 0" in checked(-1.0)[0].get()
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == ["at 1.0", "at -1.0"] * 2


def make_clipped(custom_vjp):
    """The identity, whose gradient is clipped: the usual reason for a rule that is not linear."""

    @custom_vjp
    def clipped(x):
        return x * 1.0

    clipped.defvjp(lambda x: (clipped(x), None), lambda _, ct: (jnp.clip(ct, -1.0, 1.0),))
    return clipped


@pytest.mark.parametrize("batch", [None, lambda *_: None], ids=["usual", "own batch"])
def test_tangents_may_be_numbers_of_python(batch):
    sine = jsm.custom_vjp(lambda x: jnp.sin(x))
    sine.defvjp(lambda x: (sine(x), x), lambda x, ct: (ct * jnp.cos(x),))
    if batch is not None:
        sine.defbatch(batch)

    def slope(x):
        return jax.jvp(sine, (x,), (1.0,))[1]

    close(slope(0.3), np.cos(0.3))
    close(jax.vmap(slope)(X), np.cos(X))
    close(jax.jvp(slope, (0.3,), (1.0,))[1], -np.sin(0.3))
    close(
        jax.jvp(lambda x: sine(x) + sine(2 * x), (0.3,), (1.0,))[1], np.cos(0.3) + 2 * np.cos(0.6)
    )


def test_rules_that_close_over_what_is_traced_serve_reverse_mode():
    def scaled(y):
        times_y = jsm.custom_vjp(lambda x: x * y)
        times_y.defvjp(lambda x: (x * y, None), lambda _, ct: (ct * y,))
        return times_y

    close(jax.vmap(lambda y: jax.grad(scaled(y))(2.0))(X), X)
    with pytest.raises(TypeError, match="must not close over a traced array in forward mode"):
        jax.vmap(lambda y: jax.jvp(scaled(y), (2.0,), (1.0,)))(X)


def test_rules_that_are_not_linear_serve_reverse_mode():
    clipped = make_clipped(jsm.custom_vjp)
    for wrap in (lambda f: f, jax.jit, jax.vmap, jax.checkpoint):
        close(jax.grad(lambda x, wrap=wrap: jnp.sum(5 * wrap(clipped)(x)))(X), np.ones(3))
    with pytest.raises(TypeError, match="bwd of clipped must be linear in the cotangent for"):
        jax.jvp(clipped, (X,), (X,))
    unit = jsm.custom_vjp(jnp.sin)
    unit.defvjp(lambda x: (x, None), lambda _, ct: (ct / jnp.linalg.norm(ct),))
    close(jax.grad(lambda x: jnp.sum(5 * unit(x)))(X), np.ones(3) / np.sqrt(3))
    with pytest.raises(TypeError, match="bwd of sin must be linear in the cotangent for"):
        jax.jvp(unit, (X,), (X,))


def test_parts_that_do_not_depend_on_the_cotangent_count_in_reverse_mode():
    @jsm.custom_vjp
    def with_penalty(x):
        return jnp.sum(x)

    with_penalty.defvjp(lambda x: (with_penalty(x), x), lambda x, ct: (ct + 2 * x,))
    close(jax.grad(with_penalty)(X), 1 + 2 * X)
    close(jax.jit(jax.grad(with_penalty))(X), 1 + 2 * X)

    @jsm.custom_vjp
    def given(x, g):
        return x

    given.defvjp(lambda x, g: (given(x, g), g), lambda g, ct: (g, None))
    close(jax.grad(given)(1.0, 6.0), 6.0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["-", "jit", "remat"])
@pytest.mark.parametrize(
    "second",
    [lambda x, y: y, lambda x, y: jnp.float64(3.0), lambda x, y: 2, lambda x, y: jnp.zeros((0,))],
    ids=["another argument", "constant", "integer", "empty"],
)
@pytest.mark.asks_for_x64
def test_vmap_of_outputs_that_do_not_depend_on_what_is_mapped(second, wrap):
    @jsm.custom_vjp
    def both(x, y):
        return jnp.sin(x), second(x, y)

    both.defvjp(
        lambda x, y: (both(x, y), x), lambda x, cts: (3 * cts[0] * jnp.cos(x), jnp.zeros(()))
    )
    mapped = wrap(jax.vmap(both, (0, None)))
    close(jax.grad(lambda x: jnp.sum(mapped(x, 1.0)[0]))(X), 3 * np.cos(X))
    close(jax.jvp(lambda x: mapped(x, 1.0)[0], (X,), (X,))[1], 3 * np.cos(X) * X)
    scanned = lambda x: jax.lax.scan(lambda c, _: (mapped(c, 1.0)[0], None), x, length=2)[0]  # noqa: E731
    close(jax.grad(lambda x: jnp.sum(scanned(x)))(X), 9 * np.cos(X) * np.cos(np.sin(X)))


def test_effects_of_bwd_are_kept(capfd):
    @jsm.custom_vjp
    def sine(x):
        return jnp.sin(x)

    def bwd(x, ct):
        jax.debug.print("pulled back at {}", x, ordered=True)
        checkify.check(x > 0, "bwd below 0")
        return (ct * jnp.cos(x),)

    sine.defvjp(lambda x: (sine(x), x), bwd)
    checked = jax.jit(checkify.checkify(jax.grad(sine)))
    assert checked(1.0)[0].get() is None
    assert "bwd below 0" in checked(-1.0)[0].get()
    jax.effects_barrier()
    assert capfd.readouterr().out.splitlines() == ["pulled back at 1.0", "pulled back at -1.0"]


def test_symbolic_zeros_of_cotangents():
    seen = []

    @jsm.custom_vjp
    def both(x):
        return jnp.sin(x), jnp.cos(x)

    def bwd(x, cts):
        zeros = [isinstance(ct, jax.custom_derivatives.SymbolicZero) for ct in cts]
        seen.append(zeros)
        return (cts[0] * jnp.cos(x) if zeros[1] else cts[0] * jnp.cos(x) - cts[1] * jnp.sin(x),)

    both.defvjp(lambda x: (both(x.value), x.value), bwd, symbolic_zeros=True)
    close(jax.grad(lambda x: both(x)[0])(0.3), np.cos(0.3))
    close(jax.vmap(jax.grad(lambda x: both(x)[0]))(X), np.cos(X))
    assert seen == [[False, True]] * 2
    close(jax.grad(lambda x: sum(both(x)))(0.3), np.cos(0.3) - np.sin(0.3))


def test_nothing_is_pulled_back_where_another_rule_returns_none():
    called = []

    @jsm.custom_vjp
    def sine(x):
        return jnp.sin(x)

    def bwd(x, ct):
        called.append(ct)
        return (ct * jnp.cos(x),)

    sine.defvjp(lambda x: (sine(x), x), bwd)

    @jsm.custom_vjp
    def first(x, y):
        return x

    first.defvjp(lambda x, y: (first(x, y), None), lambda _, ct: (ct, None))
    close(jax.jit(jax.grad(lambda x: first(x * x, sine(x))))(0.3), 0.6)
    assert not called
    close(jax.grad(lambda x: first(sine(x), x))(0.3), np.cos(0.3))
    assert called


def test_cotangents_of_another_dtype_become_that_of_the_argument():
    @jsm.custom_vjp
    def scaled(x):
        return x * 2

    scaled.defvjp(lambda x: (scaled(x), None), lambda _, ct: (2 * ct.astype(jnp.float32),))
    gradient = jax.grad(lambda x: jnp.sum(scaled(x)))(jnp.asarray(X, jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    close(gradient.astype(jnp.float32), 2 * np.ones(3))


def test_collectives_over_an_axis_that_nothing_is_mapped_over():
    @jsm.custom_vjp
    def shared(x):
        return jax.lax.psum(x, "i")

    shared.defvjp(lambda x: (shared(x), None), lambda _, ct: (jax.lax.psum(ct, "i"),))
    mapped = jax.vmap(lambda _, x: shared(x), (0, None), axis_name="i")
    close(mapped(X, 2.0), [6.0] * 3)


def test_eager_functions_are_called_as_they_are():
    """Python's `if` on values works where `jax.custom_vjp` has it work."""

    @jsm.custom_vjp
    def branch(x):
        return x if x > 0 else -x

    branch.defvjp(lambda x: (branch(x), x > 0), lambda up, ct: (ct if up else -ct,))
    assert branch(-2.0) == 2.0
    assert jax.grad(branch)(-2.0) == -1.0
    assert jax.jvp(branch, (-2.0,), (1.0,)) == (2.0, -1.0)
    with jax.disable_jit():
        close(jax.grad(make_sine(jsm.custom_vjp, 3.0))(0.3), 3 * np.cos(0.3))


@pytest.mark.parametrize(
    ("bwd", "error", "message"),
    [
        (lambda _, ct: ct, TypeError, "bwd of twice must return a tuple with the cotangents of"),
        (lambda _, ct: (ct, ct), TypeError, "of the structure .*, got"),
        (lambda _, ct: (jnp.zeros(2),), ValueError, r"got shape \(2,\) for one of shape \(3,\)"),
        (lambda _, ct: (ct.astype(complex),), TypeError, "real cotangents for real arguments, got"),
    ],
)
def test_wrong_cotangents_are_refused(bwd, error, message):
    @jsm.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (twice(x), None), bwd)
    with pytest.raises(error, match=message):
        jax.grad(lambda x: jnp.sum(twice(x)))(X)


def test_fwd_that_returns_no_pair_is_refused():
    double = jsm.custom_vjp(lambda x: 2 * x)
    double.defvjp(lambda x: x, lambda _, ct: (ct,))
    with pytest.raises(TypeError, match="must return a pair, the output and the residuals, got"):
        jax.grad(double)(1.0)
