"""Losses against optax, closed forms and their definition; exactness, edges and derivatives."""

import functools

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import mpmath
import numpy as np
import optax
import pytest
import scipy.special
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxsoftmax as jsm
from tests.cases import LOSSES, SCORES, entmax_by_bisection, named, project_by_sorting
from tests.tools import IN_FLOAT64, exact_log_softmax, operations

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

every_loss = pytest.mark.parametrize("case", **named(LOSSES))
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
LABELS = np.array([1, 3])
MASK = np.array([[True, True, True, False], [False, True, True, True]])


def one_hot(labels, length):
    return np.eye(length)[labels]


# Values.


@every_loss
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_equals_its_definition(case, scale, rng):
    scores = scale * rng.normal(size=(6, 9))
    for targets in (rng.dirichlet(np.ones(9), size=6), one_hot(rng.integers(9, size=6), 9)):
        close(case.fun(scores, targets), case.reference(scores, targets), atol=1e-12)


def test_cross_entropy_equals_optax(rng):
    scores, labels = rng.normal(size=(6, 9)), rng.integers(9, size=6)
    targets = rng.dirichlet(np.ones(9), size=6)
    close(
        jsm.cross_entropy(scores, labels),
        optax.softmax_cross_entropy_with_integer_labels(scores, labels),
    )
    close(jsm.cross_entropy(scores, targets), optax.softmax_cross_entropy(scores, targets))
    theirs = jax.grad(lambda s: jnp.sum(optax.softmax_cross_entropy(s, targets)))(scores)
    close(jax.grad(lambda s: jnp.sum(jsm.cross_entropy(s, targets)))(scores), theirs)


def test_sparsemax_loss_equals_optax():
    s = np.linspace(-4, 4, 81)
    scores = np.stack([s / 2, -s / 2], -1)
    close(
        jsm.sparsemax_loss(scores, np.zeros(81, int)),
        optax.losses.sparsemax_loss(s, np.ones(81)),
    )


@every_loss
def test_two_classes(case):
    s = np.linspace(-6, 6, 121)
    scores = np.stack([s - 3, np.full_like(s, -3)], -1)
    close(case.fun(scores, np.zeros(121, int)), case.of_margin(s), atol=2e-15)
    close(case.fun(scores, np.ones(121, int)), case.of_margin(-s), atol=2e-15)


@every_loss
def test_classes_are_one_hot_distributions(case, rng):
    scores, labels = 3 * rng.normal(size=(4, 5, 6)), rng.integers(6, size=(4, 5))
    dense = case.fun(scores, one_hot(labels, 6))
    for dtype in ("int8", "int32", "int64", "uint8"):
        close(case.fun(scores, labels.astype(dtype)), dense)


@every_loss
def test_axes(case, rng):
    scores, labels = rng.normal(size=(3, 4, 5)), rng.integers(4, size=(3, 5))
    expected = case.reference(scores.swapaxes(1, 2), one_hot(labels, 4))
    close(case.fun(scores, labels, axis=1), expected)
    close(case.fun(scores, labels, axis=-2), expected)
    close(case.fun(scores, one_hot(labels, 4).swapaxes(1, 2), axis=1), expected)
    targets = rng.dirichlet(np.ones(20), size=3).reshape(3, 4, 5)
    expected = case.reference(scores.reshape(3, 20), targets.reshape(3, 20))
    close(case.fun(scores, targets, axis=(-1, 1)), expected)
    total = case.fun(scores, targets / 3, axis=None)
    close(total, case.reference(scores.ravel(), targets.ravel() / 3))
    assert total.shape == ()


@every_loss
def test_temperature_divides_the_scores(case, rng):
    scores, labels = rng.normal(size=(4, 5)), rng.integers(5, size=4)
    t = rng.uniform(0.5, 2, size=(4, 1))
    close(case.fun(scores, labels, temperature=t), case.fun(scores / t, labels))
    close(case.fun(scores, labels, temperature=0.3), case.fun(scores / 0.3, labels))


@every_loss
def test_masking_is_removal(case, rng):
    scores, where = rng.normal(size=(4, 5)), np.array([True, False, True, True, False])
    labels = np.array([0, 2, 3, 0])
    kept = np.cumsum(where) - 1
    hidden = np.where(where, scores, np.array([0, np.nan, 0, 0, np.inf]))
    expected = case.fun(scores[:, where], kept[labels])
    close(case.fun(hidden, labels, where=where), expected)
    close(case.fun(hidden, one_hot(labels, 5), where=where), expected)
    # With a mask per row: only the gradient of what takes part.
    gradient = jax.grad(lambda s: jnp.sum(case.fun(s, labels, where=where)))(hidden)
    assert np.all(np.asarray(gradient)[:, ~where] == 0)
    assert np.all(np.isfinite(gradient))


@every_loss
def test_a_mask_of_classes_is_not_taken_for_one_of_rows(case, rng):
    """As many rows as classes: what each shape means, and an error for that which is either."""
    scores, labels = rng.normal(size=(4, 4)), np.array([0, 2, 3, 0])
    some = np.array([True, False, True, True])
    with pytest.raises(
        ValueError,
        match=r"where must have the axes of scores, shape \(1, 4\) to exclude classes or \(4, 1\) "
        r"to exclude rows, since \(4,\) could mean either, got shape \(4,\)",
    ):
        case.fun(scores, labels, where=some)
    expected = case.fun(scores[:, some], np.cumsum(some)[labels] - 1)
    close(case.fun(scores, labels, where=some[None]), expected)
    close(case.fun(scores[:3], labels[:3], where=some), expected[:3])
    by_row = case.fun(scores, labels, where=some[:, None])
    close(by_row[some], case.fun(scores, labels)[some])
    # Nothing takes part, not even the label. (In optax it is 0.)
    assert by_row[1] == np.inf
    gradient = jax.grad(lambda s: jnp.sum(case.fun(s, labels, where=some[:, None])))(scores)
    np.testing.assert_array_equal(gradient[1], np.zeros(4))
    with pytest.raises(ValueError, match=r"\(3, 3\) could mean either"):
        case.fun(np.zeros((3, 3, 3)), np.zeros((3, 3), int), where=np.ones((3, 3), bool))
    assert case.fun(scores[0], 2, where=some) > 0  # one row alone
    one = np.ones(1, bool)  # one class in one row: either is the same
    close(case.fun(np.ones((1, 1)), [0], where=one), [0])
    assert case.fun(np.ones((1, 1)), [0], where=~one) == np.inf


@every_loss
def test_classes_along_several_axes_are_counted_in_the_order_given(case, rng):
    scores, labels = rng.normal(size=(2, 3, 4)), np.array([11, 3])
    flat = scores.reshape(2, 12)
    close(case.fun(scores, labels, axis=(1, 2)), case.fun(flat, labels))
    turned = scores.swapaxes(1, 2).reshape(2, 12)
    close(case.fun(scores, labels, axis=(-1, 1)), case.fun(turned, labels))
    close(case.fun(scores, np.array(23), axis=None), case.fun(scores.ravel(), np.array(23)))
    gradient = jax.grad(lambda s: jnp.sum(case.fun(s, labels, axis=(1, 2))))(scores)
    close(gradient.reshape(2, 12), jax.grad(lambda s: jnp.sum(case.fun(s, labels)))(flat))


@every_loss
def test_targets_that_broadcast_and_one_hot_integers(case, rng):
    scores, labels = rng.normal(size=(3, 4)), np.array([2, 0, 3])
    close(case.fun(scores, one_hot(labels, 4).astype(int)), case.fun(scores, labels))
    shared = rng.dirichlet(np.ones(4), size=1)
    expected = case.fun(scores, np.repeat(shared, 3, 0))
    close(case.fun(scores, shared), expected)
    gradient = jax.grad(lambda y: jnp.sum(case.fun(scores, y)))(shared)
    whole = jax.grad(lambda y: jnp.sum(case.fun(scores, y)))(np.repeat(shared, 3, 0))
    close(gradient, np.sum(whole, 0, keepdims=True), rtol=1e-10)
    close(case.fun(scores, np.array([2])), case.fun(scores, np.array([2, 2, 2])))
    # Floats that may be classes, and classes with an axis too many, are neither.
    for wrong in (np.array([2.0, 0.0, 3.0]), np.array([0.25] * 4), np.array([[2], [0], [3]])):
        with pytest.raises(ValueError, match=r"targets must (be integer|have the shape of scores)"):
            case.fun(scores, wrong)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_ignored_classes(smoothing, rng):
    """By the formula of PyTorch's `cross_entropy` with `reduction="none"`."""
    scores, labels = rng.normal(size=(5, 6)), np.array([0, 5, -100, 2, 1])
    dense = rng.dirichlet(np.ones(6), size=5)
    weights = np.array([1.0, 0.5, 0.0, 2.0, 3.0, 1.5])
    log_p = scipy.special.log_softmax(scores, -1)
    counts = labels != -100
    one = one_hot(np.where(counts, labels, 0), 6)
    for targets, y in ((labels, one * counts[:, None]), (dense, dense)):
        spread = (1 - smoothing) * y + smoothing / 6 * y.sum(-1, keepdims=True)
        expected = -np.sum(weights * spread * log_p, -1)
        slope = np.exp(log_p) * np.sum(weights * spread, -1, keepdims=True) - weights * spread
        ignored = -100 if targets is labels else None

        @jax.jit
        def loss(s, w, targets=targets, ignored=ignored):
            options = {"class_weights": w, "ignore_index": ignored}
            return jsm.cross_entropy(s, targets, label_smoothing=smoothing, **options)

        close(loss(scores, weights), expected)
        close(jax.grad(lambda s, f=loss: jnp.sum(f(s, weights)))(scores), slope)
        by_weight = jax.grad(lambda w, f=loss: jnp.sum(f(scores, w)))(weights)
        close(by_weight, -np.sum(spread * log_p, 0))
    turned = jsm.cross_entropy(scores.T, labels, 0, class_weights=weights, ignore_index=-100)
    close(turned, jsm.cross_entropy(scores, labels, class_weights=weights, ignore_index=-100))
    # An ignored class that no label can be, and one that is a class as any other.
    options = {"label_smoothing": smoothing, "z_loss": 0.1}
    some = np.uint8([0, 5, 2])
    plain = jsm.cross_entropy(scores[:3], some, **options)
    close(jsm.cross_entropy(scores[:3], some, ignore_index=-100, **options), plain)
    out = jsm.cross_entropy(scores[:3], some, ignore_index=5, **options)
    close(out, np.where(some == 5, 0, plain))


@pytest.mark.asks_for_nan
def test_ignored_rows_may_hold_anything():
    scores = np.array([[1.0, 2, 3], [np.nan] * 3, [np.inf, 0, -np.inf]])

    def loss(scores, temperature):
        options = {"ignore_index": -100, "temperature": temperature, "z_loss": 0.1}
        return jsm.cross_entropy(scores, np.array([0, -100, -100]), **options)

    log_sum = scipy.special.logsumexp(scores[0])
    close(loss(scores, 1.0), [log_sum - 1 + 0.1 * log_sum**2, 0, 0])
    gradients = jax.grad(lambda *args: jnp.sum(loss(*args)), (0, 1))(scores, 1.0)
    scores[1:] = 0
    wanted = jax.grad(lambda *args: jnp.sum(loss(*args)), (0, 1))(scores, 1.0)
    close(gradients[0][0], wanted[0][0])
    np.testing.assert_array_equal(gradients[0][1:], 0)
    close(gradients[1], wanted[1])


def test_class_weights_over_several_axes(rng):
    """In the shape of the axes, or one after the other, as classes are counted."""
    scores, weights = rng.normal(size=(3, 2, 4)), rng.uniform(size=8)
    flat = jsm.cross_entropy(scores.reshape(3, 8), np.array([5, 0, 7]), class_weights=weights)
    for w in (weights, weights.reshape(2, 4)):
        close(jsm.cross_entropy(scores, np.array([5, 0, 7]), (1, 2), class_weights=w), flat)
    turned = jsm.cross_entropy(
        scores.swapaxes(1, 2), np.array([5, 0, 7]), (2, 1), class_weights=weights
    )
    close(turned, flat)


@pytest.mark.parametrize("name", ["label_smoothing", "class_weights", "targets"])
def test_what_multiplies_an_infinite_loss_that_is_left_out(name, rng):
    """It has the gradient of the other rows, and not NaN."""
    scores, labels = rng.normal(size=(2, 3)), np.array([2, 1])
    mask = np.array([True, True, False])
    given = {"label_smoothing": 0.1, "class_weights": np.array([0.5, 1.0, 2.0])}
    x = jnp.asarray((given | {"targets": one_hot(labels, 3)})[name])

    def losses(x, rows):
        options = {"targets": labels[rows], "where": mask}
        return jsm.cross_entropy(scores[rows], **options | {name: x})

    def left_out(x):
        return jnp.sum(losses(x, slice(None)), where=np.array([False, True]))

    def others(x):
        return jnp.sum(losses(x[1:] if name == "targets" else x, slice(1, None)))

    assert losses(x, slice(None))[0] == np.inf
    close(left_out(x), others(x))
    close(jax.grad(left_out)(x), jax.grad(others)(x))
    close(jax.jacfwd(left_out)(x), jax.grad(others)(x))


def test_class_weights_and_ignored_classes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"class_weights must have one value per class, shape"):
        jsm.cross_entropy(SCORES, LABELS, class_weights=np.ones(2))
    two_axes = r"one value per class, shape \(3, 4\) or \(12,\), got shape \(4,\)"
    with pytest.raises(ValueError, match=two_axes):
        jsm.cross_entropy(np.ones((2, 3, 4)), [0, 1], (1, 2), class_weights=np.ones(4))
    with pytest.raises(TypeError, match="ignore_index must be an integer, got float"):
        jsm.cross_entropy(SCORES, LABELS, ignore_index=1.0)
    with pytest.raises(ValueError, match="ignore_index goes with classes, got distributions"):
        jsm.cross_entropy(SCORES, np.ones_like(SCORES), ignore_index=1)


def test_focal_loss_of_the_guide(rng):
    """The recipe: `-(1 - p) ** gamma * log(p)`, with the digits where `p` is nearly 1."""
    scores, labels = rng.normal(size=(5, 6)), np.array([0, 5, 3, 2, 1])
    loss = jsm.cross_entropy(scores, labels)
    focal = (-jnp.expm1(-loss)) ** 2 * loss
    p = scipy.special.softmax(scores, -1)[np.arange(5), labels]
    close(focal, -((1 - p) ** 2) * np.log(p))


# What makes them losses.


@every_loss
def test_is_never_negative(case, rng):
    for dtype in ("float32", "float64"):
        scores = jnp.asarray(rng.normal(size=(300, 8)) * np.logspace(-6, 4, 300)[:, None], dtype)
        assert np.all(case.fun(scores, rng.integers(8, size=300)) >= 0)


@every_loss
@pytest.mark.asks_for_x64
def test_is_zero_from_its_margin_on(case):
    """For distributions as targets: at the scores that the mapping turns into them."""
    margin = min(case.margin, 800.0)
    scores = np.array([[margin, 0.0, -5.0], [margin + 1e-9, 0.0, 0.0]])
    np.testing.assert_array_equal(case.fun(scores, np.zeros(2, int)), np.zeros(2))
    below = case.fun(scores[:1] - np.array([1e-3 * margin, 0, 0]), np.zeros(1, int))
    assert np.isinf(case.margin) or below > 0


@pytest.mark.parametrize("name", ["sparsemax_loss", "entmax_loss"])
def test_is_zero_at_its_target(name, rng):
    case = next(case for case in LOSSES if case.name == name)
    scores = rng.normal(size=(20, 6))
    loss = case.fun(scores, case.mapping(scores))
    assert np.all(loss >= 0)
    close(loss, np.zeros(20), atol=1e-14)


def test_cross_entropy_is_the_entropy_at_its_target(rng):
    scores = rng.normal(size=(20, 6))
    p = np.asarray(jsm.softmax(scores))
    close(jsm.cross_entropy(scores, p), -np.sum(p * np.log(p), -1))


@every_loss
def test_gradient_is_prediction_minus_target(case, rng):
    scores, labels = rng.normal(size=(6, 5)), rng.integers(5, size=6)
    for targets in (labels, rng.dirichlet(np.ones(5), size=6)):
        y = one_hot(targets, 5) if targets.ndim == 1 else targets
        expected = case.mapping(scores) - y

        @jax.jit
        def scalar(s, y=targets, t=1.0):
            return jnp.sum(case.fun(s, y, temperature=t))

        close(jax.grad(scalar)(scores), expected)
        close(jax.jacfwd(scalar)(scores), expected)
        tempered = functools.partial(scalar, t=2.0)
        close(jax.grad(tempered)(scores), (case.mapping(scores / 2) - y) / 2)


def test_gradient_of_cross_entropy_for_targets_of_another_sum(rng):
    scores, targets = rng.normal(size=(3, 5)), rng.uniform(size=(3, 5))
    gradient = jax.grad(lambda s: jnp.sum(jsm.cross_entropy(s, targets)))(scores)
    p = np.asarray(jsm.softmax(scores))
    close(gradient, p * targets.sum(-1, keepdims=True) - targets)


def power_loss(scores, targets, alpha):
    """The entmax loss by its formula, in NumPy."""
    p = entmax_by_bisection(scores, alpha)
    change = np.sum(targets**alpha, -1) - np.sum(p**alpha, -1)
    return np.sum((p - targets) * scores, -1) + change / (alpha * (alpha - 1))


@pytest.mark.parametrize(("total", "top"), [(0.0, 1.0), (0.8, 1.0), (1.5, 7.0)])
def test_targets_of_another_sum(total, top):
    """The value is the formula, of all-zero rows of padding too, and the gradient its derivative.

    Far below 0 the formula is negative: Omega bounds it for distributions alone.
    """
    scores = np.array([[0.3, -0.2, 1.0]] * 2) - 1 + top
    targets = total * np.array([[0.5, 0.2, 0.3], [1.0, 0.0, 0.0]])
    p = project_by_sorting(scores)
    gini = (np.sum((targets - scores) ** 2, -1) - np.sum((p - scores) ** 2, -1)) / 2
    own = jsm.fenchel_young_loss(jsm.sparsemax, lambda p, axis: (1 - jnp.sum(p * p, axis)) / 2)
    losses = [
        (jsm.sparsemax_loss, gini, p, targets),
        (own, gini, p, targets),
        *(
            (
                functools.partial(jsm.entmax_loss, alpha=as_given(alpha)),
                power_loss(scores, targets, alpha),
                entmax_by_bisection(scores, alpha),
                targets ** (alpha - 1) / (alpha - 1),
            )
            for alpha in (1.3, 1.5, 2.0, 3.0)
            for as_given in (float, jnp.asarray)
        ),
    ]
    for loss, value, p, slope in losses:
        both = jax.value_and_grad(lambda *args, f=loss: jnp.sum(f(*args)), argnums=(0, 1))
        out, (of_scores, of_targets) = both(scores, targets)
        close(loss(scores, targets), value)
        close(out, np.sum(value))
        close(of_scores, p - targets)
        close(of_targets, slope - scores, rtol=1e-10, atol=1e-12)
    if total == 0 and top == 1:
        close(jsm.sparsemax_loss(scores, targets), [0.5225, 0.5225])
    if total == 1.5:
        assert np.max(gini) < 0


def test_targets_of_another_sum_with_a_learned_alpha():
    """Number and array agree at all alpha, and the derivative in alpha is the formula's."""
    targets = np.array([[0.5, 0.2, 0, 0.1], [0, 0, 0, 0]])
    for alpha in (1.0, 1.5, 2.0):
        as_number = jax.value_and_grad(lambda *a: jnp.sum(jsm.entmax_loss(*a)), (0, 1))
        for ours, theirs in zip(
            jax.tree.leaves(as_number(SCORES, targets, alpha)),
            jax.tree.leaves(as_number(SCORES, targets, jnp.asarray(alpha))),
            strict=True,
        ):
            close(ours, theirs)
    loss = jax.jit(lambda s, y, a: jsm.entmax_loss(s, y, a))
    inside = targets + np.array([[0.1], [0.2]])
    check_grads(loss, (SCORES, inside, np.array([[1.3], [2.2]])), order=2, modes=("fwd", "rev"))


@pytest.mark.thorough
@every_loss
def test_first_and_second_derivatives_equal_finite_differences(case):
    """In the scores, in distributions as targets and in the temperature, under a mask."""
    temperature = np.array([[0.7], [1.3]])
    targets = np.where(MASK, 0.4, 0) * np.array([1.0, 0.5, 1.5, 1.0])
    targets /= targets.sum(-1, keepdims=True)

    @jax.jit
    def loss(scores, targets, temperature):
        # What is excluded has no share in the target, nor may it get one.
        return case.fun(scores, jnp.where(MASK, targets, 0), where=MASK, temperature=temperature)

    check_grads(loss, (SCORES, targets, temperature), order=1, modes=("fwd", "rev"))
    check_grads(loss, (SCORES, targets, temperature), order=2, modes=("rev",))


@every_loss
def test_derivatives_for_classes(case):
    loss = jax.jit(lambda scores: case.fun(scores, LABELS))
    check_grads(loss, (SCORES,), order=2, modes=("fwd", "rev"))
    by_row = jax.jit(jax.vmap(jax.hessian(case.fun)))(SCORES, LABELS)
    whole = jax.jit(jax.hessian(lambda s: jnp.sum(case.fun(s, LABELS))))(SCORES)
    close(by_row[0], whole[0, :, 0])
    close(by_row[1], whole[1, :, 1])


@every_loss
@pytest.mark.asks_for_x64
def test_convex_in_the_scores(case):
    hessian = jax.jit(jax.vmap(jax.hessian(case.fun)))(SCORES, LABELS)
    assert np.min(np.linalg.eigvalsh(hessian)) >= -1e-14


# Exactness.


@pytest.mark.parametrize("scores", [[45.0, 0.0], [20.0, 1.0, 0.0]])
def test_second_derivatives_of_cross_entropy_of_what_is_nearly_certain(scores):
    """`diag(p) - p p^T`, whose every row sums to 0: that of the class is the sum of all others."""
    p = scipy.special.softmax(scores)
    wanted = -np.outer(p, p)
    np.fill_diagonal(wanted, 0)
    np.fill_diagonal(wanted, -wanted.sum(1))
    scores = np.float32(scores)
    for outer in (jax.jacfwd, jax.jacrev):
        hessian = outer(jax.grad(lambda x: jsm.cross_entropy(x, 0)))(scores)
        np.testing.assert_allclose(hessian, wanted, rtol=1e-5)


def test_cross_entropy_of_what_is_nearly_certain():
    scores = jnp.array([[70.0, 0.0], [0.0, 70.0]], jnp.float32)
    loss = jsm.cross_entropy(scores, np.array([0, 1]))
    np.testing.assert_allclose(loss.astype(float), np.exp(-70.0), rtol=2e-7)
    assert np.all(loss < 1e-30)
    far = jsm.cross_entropy(np.array([600.0, 0.0]), np.array(0))
    np.testing.assert_allclose(far, np.exp(-600.0), rtol=1e-14)


@every_loss
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_float32(case, dtype, rng):
    scores = jnp.asarray(rng.normal(size=(200, 7)), dtype)
    labels = rng.integers(7, size=200)
    loss = case.fun(scores, labels)
    assert loss.dtype == np.float32
    exact = case.reference(np.asarray(scores, float), one_hot(labels, 7))
    np.testing.assert_allclose(np.asarray(loss, float), exact, rtol=1e-6, atol=3e-7)
    # Also of targets in another precision. Gradients are in that of the scores.
    dense = np.float32(rng.dirichlet(np.ones(7), size=200))
    loss, gradient = jax.value_and_grad(lambda s: jnp.sum(case.fun(s, dense)))(scores)
    exact = case.reference(np.asarray(scores, float), np.float64(dense))
    assert (loss.dtype, gradient.dtype) == (np.float32, dtype)
    np.testing.assert_allclose(float(loss), exact.sum(), rtol=1e-5)


@every_loss
@pytest.mark.asks_for_x64
def test_large_scores_keep_their_digits(case):
    scores = np.array([[1e8, 1e8 - 0.5], [-1e8, -1e8 - 0.5]])
    close(case.fun(scores, np.zeros(2, int)), np.full(2, case.of_margin(0.5)), rtol=1e-7)


# Edges.

TOO_LONG = pytest.param(2**32 + 1, marks=pytest.mark.asks_for_x64)


@every_loss
@pytest.mark.parametrize("bad", [-1, 4, 100, -4, TOO_LONG])
@pytest.mark.asks_for_nan
def test_class_out_of_range_is_nan_without_gradient(case, bad):
    scores = np.array([[1.0, 2.0, 0.5, -1.0]] * 2)
    labels = np.array([bad, 0])
    loss, gradient = jax.value_and_grad(lambda s: jnp.nansum(case.fun(s, labels)))(scores)
    out = case.fun(scores, labels)
    assert np.isnan(out[0])
    close(out[1], loss)
    np.testing.assert_array_equal(gradient[0], np.zeros(4))
    assert np.any(gradient[1] != 0)
    # Also where its NaN is not left out of the sum.
    (gradient,) = jax.vjp(lambda s: case.fun(s, labels), scores)[1](jnp.ones(2))
    np.testing.assert_array_equal(gradient[0], np.zeros(4))


@every_loss
def test_excluded_class_is_infinitely_far(case):
    out = case.fun(np.array([1.0, 2.0, 3.0]), np.array(0), where=np.array([False, True, True]))
    assert out == np.inf
    out = case.fun(np.array([-np.inf, 2.0, 3.0]), np.array(0))
    assert out == np.inf


@every_loss
@pytest.mark.asks_for_nan
def test_nan_and_infinite_scores(case):
    scores = np.array([[np.nan, 0.0, 1.0], [-np.inf, 0.0, 1.0], [0.3, 0.0, 1.0]])
    labels = np.array([1, 1, 1])
    loss, pull_back = jax.vjp(lambda s: case.fun(s, labels), scores)
    assert np.isnan(loss[0])
    close(loss[1], case.fun(np.array([0.0, 1.0]), np.array(0)))
    (gradient,) = pull_back(jnp.ones(3))
    assert np.all(np.isfinite(gradient[1:]))
    assert gradient[1, 0] == 0
    by_temperature = jax.grad(lambda t: jnp.sum(case.fun(scores[1:], labels[1:], temperature=t)))
    assert np.isfinite(by_temperature(1.5))


@every_loss
@pytest.mark.asks_for_nan
def test_class_beside_an_infinite_score(case):
    """It takes part, and so the gradient is still `p - y`."""
    loss, gradient = jax.value_and_grad(case.fun)(np.array([np.inf, 0.0, 0.0]), np.array(1))
    assert loss == np.inf
    np.testing.assert_array_equal(gradient, [1, -1, 0])


@every_loss
def test_no_rows(case):
    out = case.fun(np.zeros((0, 40)), np.zeros(0, int))
    assert out.shape == (0,)
    assert case.fun(np.zeros((2, 3)), np.zeros((2, 3))).shape == (2,)


@every_loss
def test_integer_scores(case):
    close(case.fun(np.array([2, 0]), np.array(1)), case.fun(np.array([2.0, 0.0]), np.array(1)))


@every_loss
def test_batches_jit_and_vmap_agree(case, rng):
    scores, labels = rng.normal(size=(3, 4, 5)), rng.integers(5, size=(3, 4))
    out = case.fun(scores, labels)
    assert out.shape == (3, 4)
    close(jax.vmap(case.fun)(scores, labels), out)
    close(jax.vmap(case.fun, in_axes=(1, 1), out_axes=1)(scores, labels), out)
    close(jax.jit(case.fun)(scores, labels), out)
    close(case.fun(scores[1, 2], labels[1, 2]), out[1, 2])


def test_entmax_losses_equal_those_of_torch(rng):
    """Values and gradients, against deep-spin/entmax."""
    torch = pytest.importorskip("torch")
    entmax = pytest.importorskip("entmax")
    scores, labels = 3 * rng.normal(size=(6, 9)), rng.integers(9, size=6)
    for ours, theirs in (
        (jsm.sparsemax_loss, entmax.sparsemax_loss),
        (jsm.entmax_loss, entmax.entmax15_loss),
        (
            functools.partial(jsm.entmax_loss, alpha=1.3),
            functools.partial(entmax.entmax_bisect_loss, alpha=1.3, n_iter=80),
        ),
    ):
        x = torch.tensor(scores, requires_grad=True)
        expected = theirs(x, torch.tensor(labels))
        expected.sum().backward()
        loss, gradient = jax.value_and_grad(lambda s, f=ours: jnp.sum(f(s, labels)))(scores)
        np.testing.assert_allclose(loss, expected.sum().detach().numpy(), rtol=1e-9)
        np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-9)


# Two softmaxes.


def exact_divergence(x, z):
    log_p, log_q = (exact_log_softmax(row) for row in (x, z))
    return mpmath.fsum(mpmath.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))


@pytest.mark.parametrize("dtype", ["float32", IN_FLOAT64])
def test_kl_divergence(dtype, rng):
    """Also where one is sure, and where both are nearly equal."""
    eps = float(jnp.finfo(dtype).eps)
    x = (3 * rng.normal(size=(5, 9))).astype(dtype)
    z = x + (np.array([[0], [1e-3], [1], [30], [300]]) * rng.normal(size=(5, 9))).astype(dtype)
    ours = np.asarray(jsm.kl_divergence(x, z), float)
    exact = np.array([float(exact_divergence(*pair)) for pair in zip(x, z, strict=True)])
    assert np.all(ours >= 0)
    # A difference of logarithms is as exact as they are, and as `expm1` is in float64.
    np.testing.assert_allclose(ours, exact, rtol=20 * eps, atol=eps)
    optax_loss = optax.losses.kl_divergence(jax.nn.log_softmax(x[1:3]), jax.nn.softmax(z[1:3]))
    np.testing.assert_allclose(ours[1:3], optax_loss, rtol=1e-5, atol=1e-6)
    as_target = jsm.cross_entropy(x, jsm.softmax(z)) - jsm.shannon_entropy(jsm.softmax(z))
    np.testing.assert_allclose(ours, as_target, rtol=1e-4, atol=1e-6)


def test_derivatives_of_kl_divergence(rng):
    x, z, t = rng.normal(size=(2, 4)), rng.normal(size=(2, 4)), np.array([[0.7], [1.3]])
    p, q = jsm.softmax(x / t), jsm.softmax(z / t)

    @jax.jit
    def loss(x, z, t):
        return jsm.kl_divergence(x, z, where=MASK, temperature=t)

    gradient = jax.grad(lambda x: jnp.sum(jsm.kl_divergence(x, z, temperature=t)))(x)
    close(gradient, (p - q) / t)
    check_grads(loss, (x, z, t), order=2, modes=("fwd", "rev"))
    same = jax.grad(lambda *a: jnp.sum(jsm.kl_divergence(*a)), (0, 1))(x, x)
    np.testing.assert_array_equal(same, np.zeros((2, 2, 4)))


def test_kl_divergence_of_excluded_classes_makes_no_nan():
    x, z = np.array([1.0, 2.0, 0.5]), np.array([0.0, 1.0, 2.0])
    with jax.disable_jit(), jax.debug_nans(True):
        found = jsm.kl_divergence(x, z, where=np.array([True, True, False]))
    np.testing.assert_allclose(found, jsm.kl_divergence(x[:2], z[:2]), rtol=1e-12, atol=1e-16)


@pytest.mark.asks_for_nan
def test_edges_of_kl_divergence():
    inf = np.inf
    x = np.array([[1.0, 2, -inf], [1, 2, 0], [1, -inf, 0], [-inf] * 3, [np.nan, 0, 0]])
    z = np.array([[1.0, 0, -inf], [1, 0, -inf], [1, 0, -inf], [-inf] * 3, [0.0, 0, 0]])
    loss = jsm.kl_divergence(x, z)
    q = np.array([np.e, 1]) / (np.e + 1)
    p = [np.array([np.e, np.e**2]) / total for total in (np.e + np.e**2, np.e + np.e**2 + 1)]
    expected = np.sum(q * np.log(q / p), -1)
    close(loss[:2], expected)
    np.testing.assert_array_equal(loss[2:], [inf, 0, np.nan])
    gradient = jax.grad(lambda x: jsm.kl_divergence(x[1], z[1]))(x)
    assert np.all(np.isfinite(gradient))
    # Padding has no target.
    none, by_none = jax.value_and_grad(jsm.kl_divergence)(x[1], z[3])
    assert none == 0
    assert np.all(by_none == 0)
    with pytest.raises(ValueError, match=r"target_scores must have the shape of scores, \(5, 3\)"):
        jsm.kl_divergence(x, z[0])


@pytest.mark.parametrize("alpha", [1.001, 1.00001])
def test_second_derivatives_in_an_alpha_near_1_of_classes_and_distributions_agree(alpha, rng):
    """Where the regularizer's slope is infinite, and nothing comes of it."""
    scores = jnp.asarray(1.5 * rng.normal(size=4), jnp.float32)

    def loss(target, temperature, alpha):
        return jsm.entmax_loss(scores, target, alpha, temperature=temperature)

    numbers = jnp.float32(1), jnp.float32(alpha)
    of_class, of_one_hot = (
        np.stack(jax.hessian(functools.partial(loss, target), (0, 1))(*numbers))
        for target in (1, jnp.eye(4, dtype=jnp.float32)[1])
    )
    np.testing.assert_allclose(of_one_hot, of_class, rtol=1e-4)


# Label smoothing and z-loss.


def test_label_smoothing_equals_optax(rng):
    scores, labels = 3 * rng.normal(size=(6, 9)), rng.integers(9, size=6)
    dense = rng.dirichlet(np.ones(9), size=6)
    for targets, y in ((labels, one_hot(labels, 9)), (dense, dense)):
        smooth = optax.smooth_labels(jnp.asarray(y), 0.3)

        def ours(s, targets=targets):
            return jsm.cross_entropy(s, targets, label_smoothing=0.3)

        def theirs(s, smooth=smooth):
            return optax.softmax_cross_entropy(s, smooth)

        close(ours(scores), theirs(scores))
        gradients = [jax.grad(lambda s, f=f: jnp.sum(f(s)))(scores) for f in (ours, theirs)]
        close(*gradients)


def test_label_smoothing_spreads_over_what_takes_part(rng):
    scores, where = rng.normal(size=(4, 5)), np.array([True, False, True, True, False])
    labels = np.array([0, 2, 3, 0])
    expected = jsm.cross_entropy(
        scores[:, where], (np.cumsum(where) - 1)[labels], label_smoothing=0.2
    )
    close(jsm.cross_entropy(scores, labels, where=where, label_smoothing=0.2), expected)
    removed = np.where(where, scores, -np.inf)
    close(jsm.cross_entropy(removed, labels, label_smoothing=0.2), expected)


def test_z_loss_adds_the_square_of_logsumexp(rng):
    scores, labels, t = 3 * rng.normal(size=(6, 9)), rng.integers(9, size=6), 1.7

    def ours(s):
        return jsm.cross_entropy(s, labels, temperature=t, z_loss=0.1)

    def theirs(s):
        plain = optax.softmax_cross_entropy_with_integer_labels(s / t, labels)
        return plain + 0.1 * jax.nn.logsumexp(s / t, -1) ** 2

    close(ours(scores), theirs(scores))
    gradients = [jax.grad(lambda s, f=f: jnp.sum(f(s)))(scores) for f in (ours, theirs)]
    close(*gradients)


@pytest.mark.parametrize("cold", [0.0, np.zeros((2, 1)), np.array([[0.0], [1.0]])])
def test_smoothing_and_z_loss_at_temperature_0(cold):
    """As near to it: all classes that take part get a share, and the logsumexp is infinite."""
    scores, ties, labels = np.array([[1.0, 0.2, -0.5]] * 2), np.zeros((2, 3)), np.zeros(2, int)
    for options in ({"label_smoothing": 0.1}, {"z_loss": 0.1}):
        loss = functools.partial(jsm.cross_entropy, targets=labels, **options)
        close(loss(scores, temperature=cold), np.where(np.ravel(cold) > 0, loss(scores), np.inf))
        close(loss(ties, temperature=cold), loss(ties))


def test_smoothing_and_z_loss_are_numbers_or_row_values_and_differentiable():
    share, drift = np.array([[0.1], [0.4]]), np.array([[0.3], [0.0]])

    @jax.jit
    def loss(scores, share, drift):
        return jsm.cross_entropy(scores, LABELS, where=MASK, label_smoothing=share, z_loss=drift)

    out = loss(SCORES, share, drift)
    for i in range(2):
        row = jsm.cross_entropy(
            SCORES[i],
            LABELS[i],
            where=MASK[i],
            label_smoothing=share[i, 0],
            z_loss=drift[i, 0],
        )
        close(out[i], row)
    # Finite differences at 0 would take a step out of range.
    check_grads(loss, (SCORES, share, drift + 0.1), order=1, modes=("fwd", "rev"))


def test_row_in_which_nothing_takes_part_has_no_gradient():
    def loss(scores):
        options = {"where": np.zeros(3, bool), "label_smoothing": 0.1, "z_loss": 0.1}
        return jsm.cross_entropy(scores, np.zeros(3), **options)

    out, gradient = jax.value_and_grad(loss)(np.array([np.nan, 1.0, np.inf]))
    assert out == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must be from 0 to 1, got 1\.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be from 0 to 1, got -0\.1"),
        ({"z_loss": -1.0}, r"z_loss must be finite and not negative, got -1\.0"),
        ({"z_loss": np.ones(2)}, r"z_loss must broadcast to one value per row, shape \(2, 1\)"),
        ({"label_smoothing": np.ones((2, 4))}, "label_smoothing must broadcast to one value per"),
    ],
)
def test_bad_smoothing_and_z_loss_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jsm.cross_entropy(SCORES, LABELS, **options)


def test_entmax_loss_at_1_of_what_is_nearly_certain():
    value, gradient = jax.value_and_grad(jsm.entmax_loss)(np.array([40.0, 0.0]), 0, 1.0)
    rest = np.exp(-40.0)
    np.testing.assert_allclose([value, *gradient], [rest, -rest, rest], rtol=1e-5)


def test_ties_at_the_top():
    scores = np.array([[3.0, 3.0, 3.0], [np.inf, np.inf, 0.0]])
    close(jsm.cross_entropy(scores, np.array([1, 1])), np.log([3.0, 2.0]))
    gradient = jax.grad(lambda s: jnp.sum(jsm.cross_entropy(s, np.array([1, 1]))))(scores)
    close(gradient, [[1 / 3, -2 / 3, 1 / 3], [0.5, -0.5, 0]])


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
@pytest.mark.parametrize("scores", [[np.inf, 2.0, 0.5], [1e200, 0.0, 0.0]], ids=str)
def test_options_of_0_that_are_arrays(option, scores):
    """They add nothing, as the number 0 does, also to what is infinite."""
    plain = jsm.cross_entropy(np.array(scores), 0)
    np.testing.assert_array_equal(
        jsm.cross_entropy(np.array(scores), 0, **{option: jnp.array(0.0)}), plain
    )


def test_excluded_targets_have_no_gradient():
    """Whether alpha is a number or an array."""
    scores, where = np.array([1.0, 2.0, 0.5]), np.array([True, True, False])
    for alpha in (1.3, 1.5, jnp.array(1.5)):
        gradient = jax.grad(
            lambda y, a=alpha: jsm.entmax_loss(scores, y, a, where=where)  # type: ignore[misc]
        )(jnp.array([0.5, 0.5, 0.0]))
        np.testing.assert_array_equal(gradient[2], 0)


# Labels out of range, checkified.


@every_loss
@pytest.mark.asks_for_nan
def test_checkify_finds_classes_out_of_range(case):
    good, bad = np.array([0, 3]), np.array([0, 4])
    scores = jnp.asarray(SCORES)
    for transform in (
        lambda f: f,
        jax.jit,
        jax.vmap,
        lambda f: jax.grad(lambda s, y: jnp.sum(f(s, y))),
        lambda f: lambda s, y: jax.lax.map(lambda row: f(*row), (s, y)),
    ):
        checked = checkify.checkify(transform(case.fun))
        assert checked(scores, good)[0].get() is None
        assert "targets must be classes from 0 to 3" in checked(scores, bad)[0].get()


@every_loss
def test_checks_of_classes_are_no_effects(case):
    """With effects, calls take longer and nothing can be exported to a file."""
    assert not jax.make_jaxpr(case.fun)(SCORES, np.array([0, 3])).effects


# The classes on several devices.


@every_loss
@pytest.mark.asks_for_nan
def test_sharded_classes(case, rng):
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    scores, labels = rng.normal(size=(6, 8)), np.array([0, 7, 3, 4, -1, 8])
    options = {"label_smoothing": 0.1, "z_loss": 0.1} if case.name == "cross_entropy" else {}

    def sharded(scores, targets):
        axis = (-1, "classes")
        return jnp.nan_to_num(case.fun(scores, targets, axis=axis, **options))

    rows, both = P("rows"), P("rows", "classes")
    dense = rng.dirichlet(np.ones(8), size=6)
    for targets, spec in ((labels, rows), (dense, both)):
        f = jax.shard_map(sharded, mesh=mesh, in_specs=(both, spec), out_specs=rows)
        loss, pull_back = jax.vjp(lambda s, f=f, y=targets: f(s, y), scores)
        expected, pull_back_here = jax.vjp(
            lambda s, y=targets: jnp.nan_to_num(case.fun(s, y, **options)), scores
        )
        close(loss, expected)
        ct = jnp.asarray(rng.normal(size=6))
        close(pull_back(ct)[0], pull_back_here(ct)[0])


# Anyone's own mapping.


def shannon(p, axis):
    return jsm.shannon_entropy(p, axis)


def binary(p, axis):
    return jnp.sum(jsp.special.entr(p) + jsp.special.entr(1 - p), axis)


def logistic(x, axis, where=None):
    p = jax.nn.sigmoid(x)
    return p if where is None else jnp.where(where, p, 0)


ENTMAX13 = functools.partial(jsm.entmax, alpha=1.3)


@pytest.mark.parametrize(
    ("mapping", "entropy", "loss"),
    [
        (jsm.softmax, shannon, jsm.cross_entropy),
        (jsm.sparsemax, functools.partial(jsm.tsallis_entropy, alpha=2.0), jsm.sparsemax_loss),
        (
            ENTMAX13,
            functools.partial(jsm.tsallis_entropy, alpha=1.3),
            functools.partial(jsm.entmax_loss, alpha=1.3),
        ),
        (
            functools.partial(jsm.softmax, temperature=0.5),
            lambda p, axis: jsm.shannon_entropy(p, axis) / 2,
            lambda *args, **kwargs: jsm.cross_entropy(*args, **kwargs, temperature=0.5) / 2,
        ),
    ],
)
@pytest.mark.asks_for_nan
def test_fenchel_young_loss_equals_the_known_ones(mapping, entropy, loss, rng):
    scores, labels = 2 * rng.normal(size=(5, 6)), np.array([0, 5, 2, 3, 1])
    ours = jsm.fenchel_young_loss(mapping, entropy)
    where = np.array([True, True, True, True, False, True])
    weights = np.arange(1.0, 6.0)
    for kwargs in ({}, {"where": where}):
        both = [
            jax.value_and_grad(lambda s, f=f, k=kwargs: jnp.sum(weights * f(s, labels, **k)))(
                scores
            )
            for f in (ours, loss)
        ]
        jax.tree.map(functools.partial(close, atol=1e-12), *both)
    assert np.isnan(ours(scores[0], np.array(6)))
    assert np.isinf(ours(scores[0], np.array(4), where=where))


def test_fenchel_young_loss_along_another_axis(rng):
    scores, labels = 2 * rng.normal(size=(5, 6)), np.array([0, 5, 2, 3, 1])
    loss = jsm.fenchel_young_loss(jsm.softmax, shannon)
    close(loss(scores.T, labels, axis=0), jsm.cross_entropy(scores, labels))


def test_fenchel_young_loss_of_a_mapping_that_is_no_distribution(rng):
    """Sigmoids: each entry is a choice of its own, and the loss is the binary cross-entropy."""
    loss = jsm.fenchel_young_loss(logistic, binary)
    scores, targets = 3 * rng.normal(size=(5, 4)), (rng.uniform(size=(5, 4)) < 0.5) * 1.0
    expected = optax.sigmoid_binary_cross_entropy(scores, targets).sum(-1)
    close(loss(scores, targets), expected)
    gradient = jax.grad(lambda s: jnp.sum(loss(s, targets)))(scores)
    close(gradient, jax.nn.sigmoid(scores) - targets)
    targets = rng.uniform(0.1, 0.9, size=(5, 4))
    check_grads(jax.jit(loss), (scores, targets), order=1, modes=("fwd", "rev"))


def test_fenchel_young_loss_does_not_solve_twice(rng):
    """The mapping's reverse rule is not run for a gradient, and is for a second derivative."""
    runs = []

    @jsm.custom_vjp
    def softmax(x):
        return jax.nn.softmax(x)

    def bwd(p, ct):
        runs.append(1)
        return (p * (ct - jnp.sum(p * ct, -1, keepdims=True)),)

    softmax.defvjp(lambda x: (softmax(x),) * 2, bwd)
    loss = jsm.fenchel_young_loss(lambda x, axis: softmax(x), shannon)
    scores = rng.normal(size=(2, 3))
    gradient = jax.make_jaxpr(jax.grad(lambda s: jnp.sum(loss(s, np.array([0, 1])))))(scores)
    used = operations(gradient)
    plain = operations(jax.make_jaxpr(lambda s: loss(s, np.array([0, 1])))(scores))
    # Derived and dropped: what is left of the mapping is one evaluation.
    assert used["exp"] <= plain["exp"] + 1
    close(
        jax.hessian(lambda s: loss(s, np.array(0)))(scores[0]),
        jax.jacobian(jax.nn.softmax)(scores[0]),
    )
    assert runs


def test_fenchel_young_loss_with_a_learned_alpha():
    targets = np.array([[0.5, 0.5, 0, 0], [0, 0.1, 0.2, 0.7]])

    def own(scores, alpha):
        loss = jsm.fenchel_young_loss(
            functools.partial(jsm.entmax, alpha=alpha),
            functools.partial(jsm.tsallis_entropy, alpha=alpha),
        )
        return loss(scores, targets)

    def known(scores, alpha):
        return jsm.entmax_loss(scores, targets, alpha)

    def derivatives(f):
        alpha = np.full((2, 1), 1.3)
        first = jax.jacrev(f, argnums=(0, 1))
        return jax.jit(lambda s: (f(s, alpha), first(s, alpha), jax.jacfwd(first, 1)(s, alpha)))

    jax.tree.map(
        functools.partial(close, rtol=1e-10, atol=1e-11),
        derivatives(own)(SCORES),
        derivatives(known)(SCORES),
    )


@pytest.mark.asks_for_x64
def test_fenchel_young_loss_keeps_the_digits_of_large_scores():
    loss = jsm.fenchel_young_loss(jsm.softmax, shannon)
    scores = np.array([1e8, 1e8 - 0.5])
    close(loss(scores, np.array(0)), np.logaddexp(0, -0.5))


def test_fenchel_young_loss_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match="mapping must be a function, got str"):
        jsm.fenchel_young_loss("softmax", shannon)
    with pytest.raises(TypeError, match="entropy must be a function, got float"):
        jsm.fenchel_young_loss(jsm.softmax, 1.0)
    with pytest.raises(ValueError, match=r"mapping must give probabilities of the shape of scores"):
        jsm.fenchel_young_loss(lambda x, axis: x[:1], shannon)(SCORES, LABELS)
    with pytest.raises(ValueError, match=r"entropy must give one value per row, shape \(2,\)"):
        jsm.fenchel_young_loss(jsm.softmax, lambda p, axis: jnp.sum(p))(SCORES, LABELS)


@pytest.mark.asks_for_nan
def test_classes_sharded_over_an_explicit_mesh(rng):
    mesh = jax.make_mesh(
        (2, 2), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    scores, labels = rng.normal(size=(4, 6)), np.array([0, 5, 3, 6])
    expected = jsm.cross_entropy(scores, labels)
    with jax.set_mesh(mesh):
        for spec in (P("rows", "classes"), P(None, "classes"), P("rows")):
            placed = jax.device_put(scores, spec)
            ours = jsm.cross_entropy(placed, jax.device_put(labels, P(spec[0])))
            np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-12)


def test_integers_of_the_shape_of_scores_are_distributions_at_every_alpha(rng):
    x, targets = rng.normal(size=(4, 3)), np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [2, 0, 1]])
    for alpha in (1.0, 1.5, 2.0):
        found, wanted = (
            jax.value_and_grad(lambda x, y=y, a=alpha: jnp.sum(jsm.entmax_loss(x, y, a)))(x)
            for y in (targets, targets.astype(np.float64))
        )
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_integers_that_jax_would_cut_are_no_other_classes():
    """Without x64 JAX drops their upper bits: 2**32 + 1 would be 1."""
    x, labels = np.float32([[1, 2, 3]]), np.array([2**32 + 1])
    with jax.enable_x64(False):
        assert np.isnan(jsm.cross_entropy(x, labels))
        assert np.isnan(jsm.linear_cross_entropy(x, np.eye(3, dtype=np.float32), labels))
        with pytest.raises(ValueError, match="labels must be classes from 0 to 2"):
            jsm.calibration.negative_log_likelihood(jsm.softmax(x), labels)
        assert np.all(jsm.top_k_mask(x, np.array(2**32 + 1)))


def test_negative_class_weights_are_nan():
    assert np.isnan(jsm.cross_entropy(np.zeros(3), 1, class_weights=np.array([1.0, -1.0, 1.0])))
    assert np.isfinite(jsm.cross_entropy(np.zeros(3), 0, class_weights=np.array([1.0, 0.0, 1.0])))


@pytest.mark.asks_for_nan
@pytest.mark.parametrize(("name", "value"), [("label_smoothing", 1.5), ("z_loss", -1.0)])
def test_options_that_turn_out_to_be_out_of_range(name, value):
    def loss(value):
        return jsm.cross_entropy(np.eye(2, 3), np.array([0, 1]), **{name: value})

    assert np.all(np.isnan(jax.jit(loss)(value)))
    assert np.isnan(loss(np.array([[0.5], [value]]))).tolist() == [False, True]
    assert np.all(np.isfinite(jax.jit(loss)(0.5)))
