"""Every transformation of JAX, applied to every function in the table."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests.calls import CALLS, value_and_gradients
from tests.cases import FUNCTIONS, MAPPINGS, RULES, SCORES, named
from tests.tools import primitives

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

every_function = pytest.mark.parametrize("case", **named(FUNCTIONS))
every_rule = pytest.mark.parametrize("case", **named(RULES))
every_mapping = pytest.mark.parametrize("case", **named(MAPPINGS))

# No subset of these rows is without an entry, and none touches the edge of a support.
MASK = np.array([[True, False, True, True], [True, True, True, False]])
TEMPERATURES = np.array([[0.7], [1.3]])

close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-14)


def weigh(case, **kwargs):
    """A scalar function of the scores whose gradient meets every entry of the Jacobian."""

    def scalar(x, *args):
        out = case.fun(x, *args, **kwargs)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(jnp.where(jnp.isfinite(out), weights * out, 0))

    return scalar


# Order 2 checks order 1 on its way.
@every_function
def test_first_and_second_derivatives_equal_finite_differences(case):
    check_grads(case.fun, (SCORES,), order=2, modes=("fwd", "rev"))


@every_function
def test_derivatives_under_mask_and_temperature(case):
    # A logarithm is -inf outside the mask, where differences are NaN: 0 stands for it.
    @jax.jit
    def masked(x, temperature):
        kwargs = {"temperature": temperature} if case.takes("temperature") else {}
        out = case.fun(x, where=MASK, **kwargs)
        return jnp.where(MASK, out, 0) if case.gives == "logarithms" else out

    check_grads(masked, (SCORES, TEMPERATURES), order=1, modes=("fwd", "rev"))
    check_grads(masked, (SCORES, TEMPERATURES), order=2, modes=("rev",))


@every_function
def test_jacobians_by_both_modes(case):
    forward = jax.jacfwd(case.fun)(SCORES)
    close(forward, jax.jacrev(case.fun)(SCORES))
    assert np.any(forward != 0) == (case.smooth != "nowhere")


@every_function
def test_jacobian_of_one_row_is_symmetric(case):
    jacobian = jax.jacfwd(case.fun)(SCORES[0])
    if case.gives == "probabilities" and case.shifts:
        close(jacobian, jacobian.T)
        close(jacobian.sum(0), np.zeros(4))
    elif case.gives == "logarithms":  # I - 1 p^T
        close(jacobian, np.eye(4) - np.exp(case.fun(SCORES[0])))


@every_rule
def test_hessians_by_all_orders_of_modes(case):
    scalar = weigh(case)
    hessian = jax.jit(jax.hessian(scalar))(SCORES)  # jacfwd of jacrev
    for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2):
        if (outer, inner) != (jax.jacfwd, jax.jacrev):
            other = jax.jit(outer(inner(scalar)))(SCORES)
            close(other, hessian, atol=1e-13)
    close(hessian, hessian.transpose(2, 3, 0, 1), atol=1e-13)
    # Rows do not know of each other.
    close(hessian[0, :, 1], np.zeros((4, 4)))


@every_rule
def test_third_derivatives_by_both_modes(case):
    def along(direction):
        return lambda f: lambda x: jax.jvp(f, (x,), (direction,))[1]

    def against(direction):
        return lambda f: lambda x: jnp.vdot(jax.grad(f)(x), direction)

    direction = jnp.asarray(np.linspace(-1, 1, 8).reshape(2, 4))
    results = []
    for mode in (along(direction), against(direction)):
        results.append(jax.jit(mode(mode(mode(weigh(case)))))(SCORES))
    close(results[0], results[1], rtol=1e-11)
    assert np.isfinite(results[0])


@every_rule
def test_linearize_is_jvp_and_transposes_to_vjp(case):
    tangent = np.linspace(-1, 1, 8).reshape(2, 4)
    out, linear = jax.linearize(case.fun, SCORES)
    out_of_jvp, along = jax.jvp(case.fun, (SCORES,), (tangent,))
    close(out, out_of_jvp)
    close(linear(tangent), along)
    out, pull_back = jax.vjp(case.fun, SCORES)
    cotangent = np.cos(np.arange(out.size)).reshape(out.shape)
    (transposed,) = jax.linear_transpose(linear, tangent)(cotangent)
    close(transposed, pull_back(cotangent)[0])
    close(np.vdot(along, cotangent), np.vdot(tangent, transposed))


@every_rule
def test_vmap_over_any_axis_with_masks_and_temperatures(case, rng):
    x = rng.normal(size=(2, 3, 4))
    mask = rng.random((3, 4)) < 0.7
    temperature = rng.uniform(0.5, 2, size=3)

    def row(x, mask, temperature):
        kwargs = {"temperature": temperature} if case.takes("temperature") else {}
        return case.fun(x, where=mask, **kwargs)

    batched = jax.vmap(jax.vmap(row), in_axes=(0, None, None))(x, mask, temperature)
    for i in range(2):
        for j in range(3):
            close(batched[i, j], row(x[i, j], mask[j], temperature[j]))
    along_last = jax.vmap(jax.vmap(row, in_axes=(0, None, None)), in_axes=(1, 0, 0), out_axes=1)
    close(along_last(x, mask, temperature), batched)


@every_rule
def test_vmap_of_derivatives(case, rng):
    x = rng.normal(size=(3, 4))
    for derivative in (jax.jacfwd, jax.hessian):  # and so jacrev
        of_row = jax.jit(derivative(case.fun))
        close(jax.jit(jax.vmap(of_row))(x), np.stack([of_row(row) for row in x]), atol=1e-13)


@every_rule
def test_scan_and_checkpoint_change_nothing(case):
    scalar = weigh(case)
    plain = jax.value_and_grad(scalar)(SCORES)
    tangent = np.ones_like(SCORES)

    def scanned(x):
        _, rows = jax.lax.scan(lambda carry, row: (carry, case.fun(row)), (), x)
        weights = jnp.cos(jnp.arange(rows.size, dtype=rows.dtype)).reshape(rows.shape)
        return jnp.sum(weights * rows)

    for changed in (jax.checkpoint(scalar), jax.checkpoint(scanned)):
        gradient = jax.jit(jax.value_and_grad(changed))
        chex.assert_trees_all_close(gradient(SCORES), plain, rtol=1e-12)
        along = jax.jit(lambda x, f=changed: jax.jvp(f, (x,), (tangent,))[1])(SCORES)
        close(along, jnp.vdot(plain[1], tangent), atol=1e-13)


@every_rule
def test_hessian_of_a_scan(case):
    """Scan moves its body about while it differentiates; no rule may be lost in this."""

    def scanned(x):
        return jax.lax.scan(lambda carry, row: (carry, case.fun(row)), (), x)[1]

    second = jax.jit(jax.hessian(lambda x: jnp.sum(jnp.cos(scanned(x)))))(SCORES)
    direct = jax.jit(jax.hessian(lambda x: jnp.sum(jnp.cos(case.fun(x)))))(SCORES)
    close(second, direct, atol=1e-13)


@every_rule
@pytest.mark.asks_for_x64
def test_vmap_of_jacfwd_of_a_recurrence(case, rng):
    """The carry of a scan runs through the mapping again and again."""

    def recurrence(x):
        def step(carry, _):
            out = case.fun(3.0 * carry)
            return jnp.sin(carry) + out, None  # a row value is shared by the row

        return jax.lax.scan(step, x, length=3)[0]

    x = rng.normal(size=(2, 4))
    forward = jax.jit(jax.vmap(jax.jacfwd(recurrence)))(x)
    close(forward, jax.jit(jax.vmap(jax.jacrev(recurrence)))(x), rtol=1e-11, atol=1e-12)
    eps, direction = 1e-6, np.linspace(-1, 1, 4)
    moved = [jax.jit(jax.vmap(recurrence))(x + s * eps * direction) for s in (1, -1)]
    close(forward @ direction, (moved[0] - moved[1]) / (2 * eps), rtol=1e-6, atol=1e-6)


@every_rule
def test_axes_of_vmap_that_nothing_is_mapped_over(case):
    """Each row is then three times the same scores, alone, inside of a gradient or of a tangent."""
    x = SCORES[0]

    def shared(x):
        return case.fun(x, axis=(0, "i"))

    out, along, gradient = jax.vmap(
        lambda _: (
            shared(x),
            jax.jvp(shared, (x,), (np.cos(x),))[1],
            jax.grad(lambda x: jnp.sum(jnp.sin(shared(x))))(x),
        ),
        axis_name="i",
    )(np.arange(3.0))
    spread = jax.vmap(shared, axis_name="i", out_axes=0)
    whole = np.stack([x] * 3)
    close(out, spread(whole))
    close(along, jax.jvp(spread, (whole,), (np.cos(whole),))[1], rtol=1e-10, atol=1e-12)
    pulled = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(shared(x)))), axis_name="i")(whole)
    close(gradient, pulled, rtol=1e-10, atol=1e-12)
    if case.gives == "probabilities" and not case.in_order:
        together = case.fun(whole, axis=(0, 1))
        close(out, together)


@every_rule
def test_eager_and_compiled_agree(case):
    compiled = jax.value_and_grad(weigh(case))(SCORES)
    with jax.disable_jit():
        eager = jax.value_and_grad(weigh(case))(SCORES)
    chex.assert_trees_all_close(eager, compiled, rtol=1e-13)


# Those of `calibration` have tests of their own.
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("calibration")])
def test_nothing_is_nan_on_the_way(name):
    """With every operation on its own and looked at, as one does who looks for his own NaN."""
    fun, args = CALLS[name]
    with jax.enable_x64(False), jax.disable_jit(), jax.debug_nans(True):
        fun(*args)
        value_and_gradients(fun)(*args)


@pytest.mark.parametrize(
    "fun",
    [
        functools.partial(jsm.softmax, temperature=np.float64([[0.0], [0.5]])),
        functools.partial(jsm.sparsemax, where=MASK, temperature=0.0),
        functools.partial(jsm.entmax, alpha=np.float64([[1.2], [3.0]]), where=MASK),
        functools.partial(jsm.normmax, alpha=np.float64(1.5), where=MASK),
        functools.partial(jsm.budget_sparsemax, budget=np.float64([[2.0], [3.0]]), where=MASK),
        functools.partial(jsm.sinkhorn, temperature=np.float64(0.5)),
    ],
    ids=lambda f: f.func.__name__,
)
def test_nothing_is_nan_on_the_way_with_options(fun):
    with jax.disable_jit(), jax.debug_nans(True):
        jax.vjp(fun, SCORES)[1](np.cos(SCORES))


ODD = np.float32([[np.inf, 0, np.inf, -np.inf], [-np.inf] * 4, [1, np.nan, 3, -np.inf]])
SEEN = np.array([[True] * 4, [True] * 4, [True, False, True, True]])
CALLS_OF_ODD_ROWS = {
    **{case.name: functools.partial(case.fun, where=SEEN) for case in FUNCTIONS},
    **{
        loss.__name__: lambda x, loss=loss: loss(x, np.array([0, 1, 2]), where=SEEN)
        for loss in (jsm.cross_entropy, jsm.sparsemax_loss, jsm.entmax_loss)
    },
    "sinkhorn": functools.partial(jsm.sinkhorn, where=SEEN, tol=1e-3),
    "attention": lambda x: jsm.dot_product_attention(
        *np.ones((3, 1, 3, 1, 4), np.float32), bias=jnp.where(SEEN, x, 0)[:, :3], mask=SEEN[:, :3]
    ),
}


@pytest.mark.parametrize("name", CALLS_OF_ODD_ROWS)
def test_no_false_alarm_of_nan(name):
    """Infinite scores, rows of which nothing takes part, and NaN that does not, are valid."""
    fun = CALLS_OF_ODD_ROWS[name]

    def with_pullback(x):
        value, pull_back = jax.vjp(fun, x)
        return value, pull_back(jnp.ones_like(value))

    with jax.enable_x64(False), jax.debug_nans(True):
        for call in (fun, with_pullback, jax.jit(with_pullback)):
            jax.block_until_ready(call(ODD))


@every_rule
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_derivatives_in_lower_precision(case, dtype):
    @jax.jit
    def derivatives(x, tangent, cotangent):
        out, along = jax.jvp(case.fun, (x,), (tangent,))
        return out, along, jax.vjp(case.fun, x)[1](cotangent)[0]

    x = jnp.asarray(SCORES, dtype)
    tangent = jnp.linspace(-1, 1, x.size).reshape(x.shape).astype(dtype)
    cotangent = tangent[:, 0] if case.gives == "row value" else tangent
    out, along, gradient = derivatives(x, tangent, cotangent)
    assert out.dtype == gradient.dtype == along.dtype == dtype
    _, exact_along, exact = derivatives(*(a.astype(float) for a in (x, tangent, cotangent)))
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gradient.astype(float), exact, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(along.astype(float), exact_along, rtol=tolerance, atol=tolerance)


@every_mapping
def test_jaxpr_holds_a_rule_of_its_own(case):
    assert "custom_jvp_call" in primitives(jax.make_jaxpr(case.fun)(SCORES))


class TestVariants(chex.TestCase):
    """With and without jit, and with and without placement on a device."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    @parameterized.named_parameters((case.name, case) for case in RULES)
    def test_value_and_gradient(self, case):
        for fun in (case.fun, jax.grad(weigh(case))):
            out = self.variant(fun)(jnp.asarray(SCORES))
            np.testing.assert_allclose(out, fun(SCORES), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(
            self.variant(case.fun)(SCORES), case.reference(SCORES), rtol=1e-13
        )
