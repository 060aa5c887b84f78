"""Arrays that JAX itself shares among devices: the same answers, and no row is gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoftmax as jsm
from benchmarks.collectives import collectives
from jaxsoftmax import calibration
from tests.cases import FUNCTIONS, LOSSES, named
from tests.tools import jaxprs

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

ROWS, WIDTH = 8, 64


def mesh_of(sizes, kind=AxisType.Explicit):
    """A mesh of axes "a", "b" and "c"."""
    return jax.make_mesh(sizes, ("a", "b", "c")[: len(sizes)], axis_types=(kind,) * len(sizes))


# Both kinds of mesh in all three shapes, and where each has the rows and the columns.
MESHES = {
    "8": (mesh_of, (8,), (None, "a")),
    "4x2": (functools.partial(mesh_of, kind=AxisType.Auto), (4, 2), ("a", "b")),
    "2x2x2": (mesh_of, (2, 2, 2), ("a", ("b", "c"))),
}
OTHERS = {
    "8": (functools.partial(mesh_of, kind=AxisType.Auto), (8,), (None, "a")),
    "4x2": (mesh_of, (4, 2), ("a", "b")),
    "2x2x2": (functools.partial(mesh_of, kind=AxisType.Auto), (2, 2, 2), ("a", ("b", "c"))),
}
every_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
every_other_mesh = pytest.mark.parametrize("mesh", [*MESHES.values(), *OTHERS.values()])


def derivatives(fun, *args):
    """The value, a tangent and a pullback."""
    value, pull_back = jax.vjp(fun, *args)
    _, tangent = jax.jvp(fun, args, jax.tree.map(jnp.sin, args))

    def weights(x):
        numbers = np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        return numbers * jnp.ones_like(x)  # spread as the value is

    return value, tangent, pull_back(jax.tree.map(weights, value))


def float32(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def on_mesh(mesh, fun, args, specs):
    """What `fun` gives of arrays that are spread over a mesh, and what crosses devices."""
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(args, specs, strict=True)
        ]
        compiled = jax.jit(fun).lower(*placed).compile()
        return compiled(*placed), collectives(compiled.as_text())


def assert_equal(actual, expected):
    """To 1e-6 of the largest number."""

    def compare(x, y):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1, np.abs(y).max()))

    jax.tree.map(compare, actual, expected)


def assert_nothing_is_gathered(found, but=0):
    """No all-gather, or none of more than `but` numbers; nothing else moves what is in rows."""
    assert [c for c in found if c.kind != "all-reduce" and c.size > but] == []


@functools.cache
def expected_of(case):
    x = float32(np.random.default_rng(0), ROWS, WIDTH)
    return x, jax.jit(functools.partial(derivatives, case.fun))(x)


@pytest.mark.parametrize("case", **named(FUNCTIONS))
@every_mesh
def test_mappings(case, mesh):
    make, sizes, spec = mesh
    x, expected = expected_of(case)
    fun = functools.partial(derivatives, case.fun)
    actual, found = on_mesh(make(sizes), fun, [x], [P(*spec)])
    assert_equal(actual, expected)
    # What comes before a part of a row in order: a number for each row and device.
    assert_nothing_is_gathered(found, but=ROWS * 8 if case.in_order else 0)
    rows = case.gives == "row value"
    assert actual[0].sharding.is_equivalent_to(
        NamedSharding(actual[0].sharding.mesh, P(*spec[: 1 if rows else 2])), 1 if rows else 2
    )


def test_parameters_and_segments_on_an_explicit_mesh(rng):
    """One value per row, spread over the mesh as the rows are or on all devices."""
    x, t = rng.normal(size=(ROWS, WIDTH)), np.linspace(0.5, 1.5, ROWS)[:, None]
    ids = np.arange(WIDTH) // 7

    def several(x, t, alpha, sink):
        p = jsm.entmax(x, alpha, temperature=t, sink=sink)
        q = jsm.sinkhorn(x, num_iterations=2)
        return p, q, jsm.softmax(x, segment_ids=ids, num_segments=10)

    args = x, t, 1 + t, t[:1]
    specs = P("a", "b"), P("a"), P(), P()
    fun = functools.partial(derivatives, several)
    actual, found = on_mesh(mesh_of((4, 2)), fun, args, specs)
    assert_equal(actual, jax.jit(fun)(*args))
    # Only what is on all devices has a gradient that goes to all of them.
    assert_nothing_is_gathered(found, but=ROWS)


def test_hard_choices_on_an_explicit_mesh(rng):
    x = rng.normal(size=(ROWS, WIDTH))

    def several(x):
        hard = jsm.gumbel_softmax(jax.random.key(0), x, hard=True)
        return jsm.straight_through(jsm.entmax15)(x), hard

    fun = functools.partial(derivatives, several)
    actual, _ = on_mesh(mesh_of((4, 2)), fun, [x], [P("a", "b")])
    assert_equal(actual, jax.jit(fun)(x))
    assert actual[0][0].sharding.spec == P("a", "b")


def test_masks_by_order_on_an_explicit_mesh(rng):
    """Whole rows are gathered; the masks are spread as the scores are."""
    x, where = rng.normal(size=(ROWS, WIDTH)), rng.random((ROWS, WIDTH)) < 0.8

    def masks(x, where):
        ordered = jsm.top_k_mask(x, 3, where=where), jsm.top_p_mask(x, 0.7, where=where)
        return *ordered, jsm.top_k_mask(x, jnp.array(2)), jsm.min_p_mask(x, 0.1)

    actual, _ = on_mesh(mesh_of((4, 2)), masks, [x, where], [P("a", "b")] * 2)
    for mask, expected in zip(actual, masks(x, where), strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert mask.sharding.spec == P("a", "b")


def test_measures_and_draws_on_an_explicit_mesh(rng):
    """Examples are gathered to be sorted into bins; so are the scores of a row, to be ordered."""
    p, labels = rng.dirichlet(np.ones(WIDTH), size=ROWS), rng.integers(WIDTH, size=ROWS)
    key = jax.random.key(0)
    line, beta = calibration.fit_isotonic(p, labels), calibration.fit_beta_scaling(p, labels)

    def measured(p, labels):
        mass = calibration.expected_calibration_error(p, labels, binning="mass")
        decomposed = calibration.brier_decomposition(p, labels)
        return (
            calibration.expected_calibration_error(p, labels),
            mass,
            calibration.classwise_calibration_error(p, labels),
            calibration.smooth_calibration_error(p, labels),
            decomposed,
            calibration.reliability_curve(p, labels).count,
            calibration.negative_log_likelihood(p, labels),
            calibration.fit_isotonic(p, labels),
            calibration.fit_beta_scaling(p, labels, penalty=0.1),
            calibration.fit_temperature(jnp.log(p), labels, class_weights=1.0 + np.arange(WIDTH)),
            jax.value_and_grad(lambda p: jnp.sum(calibration.isotonic(p, *line) ** 2))(p),
            jax.value_and_grad(lambda p: jnp.sum(calibration.beta_scaling(p, *beta) ** 2))(p),
            jsm.sample(key, p, shape=(3, ROWS), replace=False),
        )

    for spec in (P("a", None), P("a", "b")):
        actual, _ = on_mesh(mesh_of((4, 2)), measured, [p, labels], [spec, P("a")])
        assert_equal(actual, jax.jit(measured)(p, labels))


def test_calibration_of_rows_whose_second_axis_is_spread(rng):
    """As the lengths of sequences are; the classes, too."""
    p, labels = rng.dirichlet(np.ones(4), size=(4, 6)), rng.integers(4, size=(4, 6))
    weights, where = rng.uniform(0.2, 1, size=(4, 6)), rng.random((4, 6)) < 0.8
    beta = 0.5 + rng.random((3, 4))

    def several(p, labels, weights, where):
        args = p, labels, where
        scores = 2 * jnp.log(p)
        return (
            calibration.brier_score(*args, weights=weights, reduction="none"),
            calibration.expected_calibration_error(*args, weights=weights),
            calibration.fit_isotonic(*args, weights=weights),
            calibration.fit_temperature(scores, labels, where, weights=weights),
            calibration.fit_vector_scaling(scores, labels, where, weights=weights, penalty=0.1),
            calibration.fit_matrix_scaling(scores, p, where, weights=weights, penalty=0.1),
            calibration.beta_scaling(p, *beta),
        )

    args, row = (p, labels, weights, where), P(None, "a")
    with jax.numpy_dtype_promotion("standard"):
        actual, _ = on_mesh(mesh_of((2, 2)), several, args, [P(None, "a", "b"), row, row, row])
        expected = jax.jit(several)(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)
    assert actual[-1].sharding.spec == P(None, "a", "b")


@pytest.mark.parametrize("case", **named(LOSSES))
@every_mesh
def test_losses(case, mesh, rng):
    make, sizes, spec = mesh
    scores, labels = float32(rng, ROWS, WIDTH), rng.integers(WIDTH, size=ROWS)
    dense = rng.dirichlet(np.ones(WIDTH), size=ROWS).astype(np.float32)

    def both(scores, dense, labels):
        of_class = derivatives(lambda s: case.fun(s, labels), scores)
        return of_class, derivatives(case.fun, scores, dense)

    args = scores, dense, labels
    actual, found = on_mesh(make(sizes), both, args, [P(*spec), P(*spec), P(spec[0])])
    assert_equal(actual, jax.jit(both)(*args))
    assert_nothing_is_gathered(found)


def test_what_is_beside_scores_is_spread_alone(rng):
    """Targets, and parameters of rows, on an explicit mesh; the scores on all devices."""
    scores, labels = float32(rng, ROWS, WIDTH), rng.integers(WIDTH, size=ROWS)
    dense = rng.dirichlet(np.ones(WIDTH), size=ROWS).astype(np.float32)
    shares = rng.uniform(size=(ROWS, 1)).astype(np.float32)
    hidden, weight = float32(rng, ROWS, 4), float32(rng, 4, WIDTH)

    def losses(dense, shares):
        return (
            jsm.cross_entropy(scores, dense),
            jsm.sparsemax_loss(scores, dense),
            jsm.cross_entropy(scores, labels, label_smoothing=shares, z_loss=shares),
            jsm.softmax(scores, temperature=shares),
            jsm.linear_cross_entropy(
                hidden, weight, labels, weights=shares[:, 0], reduction="none"
            ),
        )

    actual, _ = on_mesh(mesh_of((4, 2)), losses, [dense, shares], [P("a", "b"), P("a")])
    assert_equal(actual, jax.jit(losses)(dense, shares))


@pytest.mark.leaks_in_jax
@every_other_mesh
def test_linear_cross_entropy(mesh, rng):
    make, sizes, (in_rows, in_classes) = mesh
    hidden, weight = float32(rng, 32, 16), float32(rng, 16, WIDTH)
    bias, labels, where = float32(rng, WIDTH), rng.integers(WIDTH, size=32), rng.random(32) > 0.2

    def losses(hidden, weight, bias, labels, where):
        def mean_and_each(hidden, weight, bias):
            loss = functools.partial(jsm.linear_cross_entropy, bias=bias, where=where, chunk_size=2)
            mean = loss(hidden, weight, labels)
            return mean, loss(hidden, weight, labels, reduction="none")

        return derivatives(mean_and_each, hidden, weight, bias)

    specs = P(in_rows), P(None, in_classes), P(in_classes), P(in_rows), P(in_rows)
    args = hidden, weight, bias, labels, where
    actual, found = on_mesh(make(sizes), losses, args, specs)
    assert_equal(actual, jax.jit(losses)(*args))
    assert_nothing_is_gathered(found)


@pytest.mark.leaks_in_jax
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_linear_loss_of_sequences(kind, rng):
    """Two axes of rows, both spread, and a loss with parameters of its own."""
    hidden, weight, labels = (
        float32(rng, 4, 8, 16),
        float32(rng, 16, WIDTH),
        rng.integers(64, size=(4, 8)),
    )

    def grads(hidden, weight, labels, alpha):
        def loss(hidden, weight, alpha):
            own = functools.partial(jsm.entmax_loss, alpha=alpha)
            return jsm.linear_cross_entropy(
                hidden, weight, labels, loss=own, logits_soft_cap=10 * alpha, chunk_size=2
            )

        return jax.grad(loss, (0, 1, 2))(hidden, weight, alpha)

    args = hidden, weight, labels, np.float32(1.4)
    specs = P("a", "b"), P(None, "c"), P("a", "b"), P()
    actual, found = on_mesh(mesh_of((2, 2, 2), kind), grads, args, specs)
    assert_equal(actual, jax.jit(grads)(*args))
    assert_nothing_is_gathered(found)


# Where queries, and where keys and values are: batch, length, heads.
ATTENTION = {
    "keys": ((8,), P(), P(None, "a")),
    "queries": ((8,), P(None, "a"), P()),
    "batch and keys": ((4, 2), P("a"), P("a", "b")),
    "heads and keys": ((2, 2, 2), P("a", None, "b"), P("a", "c", "b")),
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param("keys", AxisType.Explicit, marks=pytest.mark.leaks_in_jax),
        ("queries", AxisType.Explicit),
        ("queries", AxisType.Auto),
        ("batch and keys", AxisType.Auto),
        pytest.param("heads and keys", AxisType.Explicit, marks=pytest.mark.leaks_in_jax),
        ("keys", AxisType.Auto),
        ("heads and keys", AxisType.Auto),
        pytest.param("batch and keys", AxisType.Explicit, marks=pytest.mark.leaks_in_jax),
    ],
)
def test_attention(layout, kind, rng):
    sizes, in_queries, in_keys = ATTENTION[layout]
    query, key, value = float32(rng, 3, 4, 16, 2, 8)
    bias, lengths = float32(rng, 1, 2, 16, 16), np.array([16, 9, 3, 12])

    def attention(query, key, value, bias, lengths):
        attend = functools.partial(
            jsm.dot_product_attention,
            normalizer=jsm.sparsemax,
            bias=bias,
            is_causal=True,
            key_value_seq_lengths=lengths,
            block_size=4,
        )
        return derivatives(attend, query, key, value)

    args = query, key, value, bias, lengths
    actual, found = on_mesh(
        mesh_of(sizes, kind), attention, args, [in_queries, in_keys, in_keys, P(), P()]
    )
    assert_equal(actual, jax.jit(attention)(*args))
    assert_nothing_is_gathered(found)
    wanted = NamedSharding(actual[0].sharding.mesh, in_queries)
    assert actual[0].sharding.is_equivalent_to(wanted, 4)


@pytest.mark.parametrize("spread", [P(), P("a")], ids=["replicated", "spread"])
def test_what_losses_hold_per_class_on_an_explicit_mesh(spread, rng):
    """Classes that are spread, and weights and masks of them in the loss, with their gradients."""
    mesh, (hidden, weight) = mesh_of((4,)), (float32(rng, 8, 4), float32(rng, 4, 12))
    labels, weights = np.arange(8), float32(rng, 12) ** 2
    where, prior = np.arange(12) != 9, float32(rng, 12)

    def own(scores, labels, prior):
        """Takes the number of classes, and gathers from what it holds."""
        log_p = jax.nn.log_softmax(scores + prior[None])
        smooth = log_p.sum(-1) / scores.shape[-1]
        return -prior[labels] * (log_p[jnp.arange(len(labels)), labels] + smooth)

    def losses(hidden, weight, weights, where, prior):
        held = (
            functools.partial(jsm.cross_entropy, class_weights=weights, where=where),
            functools.partial(own, prior=prior),
        )
        return jnp.stack([jsm.linear_cross_entropy(hidden, weight, labels, loss=x) for x in held])

    args = hidden, weight, weights, where, prior
    derivatives = jax.jacrev(losses, (0, 1, 2, 4))
    actual, _ = on_mesh(mesh, derivatives, args, [P(), P(None, "a"), spread, spread, spread])
    assert_equal(actual, jax.jit(derivatives)(*args))
    part = functools.partial(jsm.cross_entropy, class_weights=weights[:3])
    with pytest.raises(ValueError, match=r"one value per class, shape \(12,\), got shape \(3,\)"):
        on_mesh(
            mesh,
            lambda hidden, weight: jsm.linear_cross_entropy(hidden, weight, labels, loss=part),
            (hidden, weight),
            [P(), P(None, "a")],
        )


@pytest.mark.parametrize("spec", [P(None, "a"), P(None, None, "a")], ids=["queries", "heads"])
def test_attention_is_spread_as_queries_where_keys_are_spread_by_batch(spec, rng):
    args = rng.normal(size=(3, 4, 8, 4, 2))
    wanted = jax.jit(functools.partial(derivatives, jsm.dot_product_attention))(*args)
    attend = functools.partial(derivatives, jsm.dot_product_attention)
    found, _ = on_mesh(mesh_of((4,)), attend, args, [spec, P("a"), P("a")])
    assert_close(found, wanted)
    assert jax.typeof(found[0]).sharding.spec[: len(spec)] == tuple(spec)


@pytest.mark.parametrize("spread", [0, 1])
def test_labels_and_weights_that_are_spread_where_scores_are_not(spread, rng):
    """Everything is as on one device; gradients are spread as what they are of."""
    hidden, weight = rng.normal(size=(8, 5)), rng.normal(size=(5, 4))
    labels, weights = np.arange(8) % 4, rng.uniform(size=8)

    def losses(hidden, weight, labels, weights):
        some = functools.partial(jsm.linear_cross_entropy, hidden, weight, labels)
        each = jsm.cross_entropy(hidden @ weight, labels, temperature=1 + weights[:, None])
        return jnp.stack(
            [
                some(),
                some(weights=weights),
                some(where=weights > 0.3, ignore_index=1),
                jnp.sum(jnp.sin(some(where=weights > 0.3, reduction="none"))),
                jnp.sum(jnp.sin(each + jsm.sparsemax_loss(hidden @ weight, labels))),
            ]
        )

    def everything(hidden, weight, labels, weights):
        def of_numbers(hidden, weight, weights):
            return losses(hidden, weight, labels, weights)

        return derivatives(of_numbers, hidden, weight, weights)

    specs = [P(), P(), P(), P()]
    specs[2 + spread] = P("a")
    args = hidden, weight, labels, weights
    found, _ = on_mesh(mesh_of((4,)), everything, args, specs)
    assert_close(found, jax.jit(everything)(*args))


@pytest.mark.parametrize(
    "spec", [P("a", None, "b"), P("a", "b"), P(None, ("a", "b"))], ids=["heads", "keys", "all keys"]
)
def test_normalizers_of_ones_own_see_all_heads_and_keys_of_an_explicit_mesh(spec, rng):
    inputs, rates = rng.normal(size=(3, 2, 8, 4, 3)), np.linspace(0.5, 1.5, 4)[:, None, None]

    def own(scores, axis, where, rates):
        of_heads = jnp.linspace(1.0, 2.0, scores.shape[1])[None, :, None, None]
        scores = scores * rates[None] / of_heads
        weights = jax.nn.softmax(scores, axis, where=where)
        return weights + jnp.where(where, jax.nn.relu(scores), 0) / scores.shape[-1]

    def everything(query, key, value, rates):
        def attend(query, key, value, rates):
            normalizer = functools.partial(own, rates=rates)
            return jsm.dot_product_attention(
                query, key, value, normalizer=normalizer, is_causal=True
            )

        return derivatives(attend, query, key, value, rates)

    args = *inputs, rates
    found, _ = on_mesh(mesh_of((2, 2)), everything, args, [spec] * 3 + [P()])
    assert_close(found, jax.jit(everything)(*args))
    assert jax.typeof(jax.tree.leaves(found)[0]).sharding.spec[:3] == (*spec, None, None)[:3]


@pytest.mark.leaks_in_jax
def test_what_partials_hold_on_an_explicit_mesh(rng):
    """Arrays in functions of one's own: those of partials get gradients, others a sentence."""
    mesh, rows = mesh_of((4,)), P("a")
    query, labels = float32(rng, 4, 4, 2, 8), np.array([0, 3, 4, 7])
    slopes = np.float32([0.5, 0.25])

    def of_scores(score, b, n, i, j, slopes):
        return score - slopes[n] * abs(i - j).astype(score.dtype)

    def of_rows(scores, axis, where, slopes):
        return jsm.softmax(scores * slopes[None, :, None, None], axis, where)

    def of_classes(scores, labels, slopes):
        return jsm.cross_entropy(scores * slopes[0] - slopes[1] * scores**2, labels)

    def results(query, labels, slopes, hold=functools.partial):
        attend = functools.partial(jsm.dot_product_attention, query, query, query)
        hidden = query.mean((1, 2))
        return (
            jnp.sum(attend(score_mod=hold(of_scores, slopes=slopes)) ** 2),
            jnp.sum(attend(normalizer=hold(hold(of_rows), slopes=slopes)) ** 2),
            jsm.linear_cross_entropy(
                hidden, jnp.eye(8, dtype=jnp.float32), labels, loss=hold(of_classes, slopes=slopes)
            ),
        )

    args, specs = (query, labels, slopes), (rows, rows, P())
    actual, _ = on_mesh(mesh, jax.jacrev(results, 2), args, specs)
    assert_equal(actual, jax.jit(jax.jacrev(results, 2))(*args))

    def hidden_in(function, slopes=None):
        return lambda score, *places, **options: function(score, *places, **options, slopes=slopes)

    message = "must not close over arrays on a mesh with explicit axes.*functools.partial"
    for some in ({"score_mod": of_scores}, {"normalizer": of_rows}):

        def closed(query, slopes, some=some):
            hidden = {name: hidden_in(x, slopes=slopes) for name, x in some.items()}
            return jsm.dot_product_attention(query, query, query, **hidden)

        with pytest.raises(NotImplementedError, match=message):
            on_mesh(mesh, closed, (query, slopes), (rows, P()))


# Queries and keys over the same devices: keys go round.


def in_ring(fun, sizes=(4,), **specs):
    """`fun` of queries, keys and values, all spread along their length."""
    mesh = mesh_of(sizes, AxisType.Auto)
    spread = P(None, "a")
    in_specs = [spread] * 3 + list(specs.values())
    return jax.shard_map(fun, mesh=mesh, in_specs=tuple(in_specs), out_specs=spread)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["softmax", "entmax"])
def test_ring_with_all_options(name, rng):
    """The value, a tangent, a pullback and a Hessian-vector product, in every argument."""
    query, (key, value) = rng.normal(size=(2, 16, 4, 4)), rng.normal(size=(2, 2, 16, 2, 4))
    bias = rng.normal(size=(1, 4, 16, 16))
    segments, lengths = np.repeat([[0, 1]] * 2, [6, 10], 1), np.array([16, 11])

    def attention(query, key, value, bias, temperature, slope, segments, **names):
        alpha = {"alpha": 1.2 + temperature} if name == "entmax" else {}
        return jsm.dot_product_attention(
            query,
            key,
            value,
            bias,
            normalizer=functools.partial(getattr(jsm, name), temperature=temperature, **alpha),
            score_mod=lambda score, b, n, i, j: score - slope * abs(i - j).astype(float),
            sink=slope,
            is_causal=True,
            local_window_size=(9, 0),
            logits_soft_cap=temperature * 5,
            key_value_seq_lengths=lengths,
            query_seq_lengths=lengths,
            query_segment_ids=segments,
            key_value_segment_ids=segments,
            **names,
        )

    ring = in_ring(
        functools.partial(attention, kv_axis_name="a", query_axis_name="a", block_size=2),
        bias=P(None, None, "a"),
        temperature=P(),
        slope=P(),
        segments=P(None, "a"),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def all_derivatives(attend, *args):
        def scalar(*args):
            return jnp.sum(jnp.sin(attend(*args, segments)))

        tangents = jax.tree.map(jnp.cos, args)
        hvp = jax.jvp(jax.grad(scalar, range(len(args))), args, tangents)
        return jax.jvp(lambda *args: attend(*args, segments), args, tangents), hvp

    args = query, key, value, bias, np.asarray(0.8), np.asarray(0.1)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11),
        all_derivatives(ring, *args),
        all_derivatives(attention, *args),
    )


RELU = jsm.Form(
    weight=lambda u: jnp.maximum(u, 0), score=lambda p: p, slope=lambda p: jnp.sign(p), tau=-0.3
)
SOFTPLUS = jsm.Form(
    weight=lambda u, width=0.5: width * jax.nn.softplus(u / width),
    score=lambda p, width=0.5: width * jnp.log(jnp.expm1(p / width)),
)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "normalizer",
    [
        jsm.sparsemax,
        jsm.entmax15,
        functools.partial(jsm.entmax, alpha=np.array([1.2, 2.4])[:, None, None]),
        functools.partial(jsm.entmax, alpha=1.0),
        jsm.threshold_mapping(RELU),
        functools.partial(jsm.threshold_mapping(SOFTPLUS), width=0.3, temperature=0.7),
    ],
    ids=["sparsemax", "entmax15", "alpha of a head", "alpha 1", "fixed tau", "form"],
)
def test_ring_of_any_form(normalizer, rng):
    """Values and derivatives, where the last query of each device sees nothing."""
    query, key, value = rng.normal(size=(3, 1, 12, 2, 4)) * [[[[3]]]]

    def attend(*args, **names):
        mask = jnp.arange(12)[:, None] % 3 < 2
        if names:
            mask = jax.lax.dynamic_slice_in_dim(mask, jax.lax.axis_index("a") * 3, 3)
        return jsm.dot_product_attention(*args, mask=mask, normalizer=normalizer, **names)

    ring = in_ring(functools.partial(attend, kv_axis_name="a", query_axis_name="a"))

    @functools.partial(jax.jit, static_argnums=0)
    def with_derivatives(attend, *args):
        def gradients(*args):
            return jax.grad(lambda *args: jnp.sum(jnp.sin(attend(*args))), (0, 1, 2))(*args)

        return attend(*args), jax.jvp(gradients, args, jax.tree.map(jnp.cos, args))

    args = query, key, value
    actual = with_derivatives(ring, *args)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11),
        actual,
        with_derivatives(attend, *args),
    )
    assert np.all(np.asarray(actual[0])[:, 2::3] == 0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("devices", "options", "offsets"),
    [
        (4, {"is_causal": True}, (0, 5, 16, -3)),
        (8, {"is_causal": True}, (5, np.array([16, 3]))),
        (4, {"local_window_size": (4, 2)}, (7, np.array([-3, 9]))),
    ],
    ids=["known", "of each sequence", "window"],
)
def test_ring_of_queries_that_begin_anywhere(devices, options, offsets, rng):
    """Half as many queries as keys; some see none. Values, residuals and all gradients."""
    query, (key, value) = rng.normal(size=(2, 8, 4, 4)), rng.normal(size=(2, 2, 16, 2, 4))
    attend = functools.partial(jsm.dot_product_attention, return_residual=True, **options)

    def with_gradients(fun, *args):
        (out, log_sum), pull_back = jax.vjp(fun, *args)
        return out, jnp.exp(log_sum), pull_back((jnp.cos(out), jnp.zeros_like(log_sum)))

    for offset in offsets:
        ring = in_ring(
            functools.partial(attend, query_offset=offset, kv_axis_name="a", query_axis_name="a"),
            (devices,),
        )
        here = functools.partial(attend, query_offset=offset)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
            jax.jit(functools.partial(with_gradients, ring))(query, key, value),
            jax.jit(functools.partial(with_gradients, here))(query, key, value),
        )


def test_ring_of_half_precision_that_jax_does_not_check(rng):
    """Also where no query sees a whole part, and where one sees nothing at all."""
    arrays = [jnp.asarray(rng.normal(size=(1, 8, 2, 4)), jnp.bfloat16) for _ in range(3)]
    options = {
        "is_causal": True,
        "mask_mod": lambda b, n, i, j: j > 0,
        "dropout_rate": 0.2,
        "dropout_key": jax.random.key(0),
        "return_residual": True,
    }
    mesh, spread = mesh_of((4,), AxisType.Auto), P(None, "a")
    ring = jax.shard_map(
        functools.partial(
            jsm.dot_product_attention, kv_axis_name="a", query_axis_name="a", **options
        ),
        mesh=mesh,
        in_specs=spread,
        out_specs=spread,
        check_vma=False,
    )
    (actual, log_sum), wanted = (
        jax.jit(ring)(*arrays),
        jsm.dot_product_attention(*arrays, **options),
    )
    assert actual.dtype == jnp.bfloat16
    close = functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-2)
    close(np.asarray(actual, float), np.asarray(wanted[0], float))
    np.testing.assert_allclose(log_sum, wanted[1], rtol=1e-5)
    assert np.all(np.asarray(log_sum[:, 0]) == -np.inf)


@pytest.mark.parametrize(
    "normalizer", [jsm.softmax, pytest.param(jsm.entmax15, marks=pytest.mark.thorough)]
)
def test_ring_in_forward_mode_of_half_precision(normalizer, rng):
    """What the tangents of a row's scores have in common is large, and changes nothing."""
    arrays, tangents = (rng.normal(size=(3, 1, 32, 2, 8)) for _ in range(2))
    arrays[0][..., 0] = 1
    tangents[1][..., 0] = 512
    halves = [[jnp.asarray(x, jnp.bfloat16) for x in xs] for xs in (arrays, tangents)]
    attend = functools.partial(jsm.dot_product_attention, normalizer=normalizer)
    ring = in_ring(functools.partial(attend, kv_axis_name="a", query_axis_name="a"))
    tangent = jax.jit(lambda args, tangents: jax.jvp(ring, args, tangents)[1])(*halves)
    _, wanted = jax.jvp(attend, *([np.asarray(x, float) for x in xs] for xs in halves))
    np.testing.assert_allclose(np.asarray(tangent, float), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "normalizer", [jsm.softmax, pytest.param(jsm.entmax15, marks=pytest.mark.thorough)]
)
def test_gradient_of_a_scale_in_a_ring_of_half_precision(normalizer, rng):
    """What the scores of a row have in common is large, and changes nothing."""
    query, key, value, ct = rng.normal(size=(4, 1, 32, 2, 8))
    key += 20 * rng.normal(size=(2, 8))
    value += 4
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value, ct)]
    attend = functools.partial(jsm.dot_product_attention, normalizer=normalizer)

    def whole(query, key, value, scale, **names):
        return attend(query, key, value, scale=scale, **names)

    def of_scale(attend, scale, *qkv, ct):
        return jax.vjp(lambda scale: attend(*qkv, scale), scale)[1](ct)[0]

    ring = in_ring(functools.partial(whole, kv_axis_name="a", query_axis_name="a"), scale=P())
    found = jax.jit(functools.partial(of_scale, ring))(np.float32(0.3), *halves[:3], ct=halves[3])
    exact = [np.asarray(x, float) for x in halves]
    wanted = of_scale(whole, np.float64(0.3), *exact[:3], ct=exact[3])
    np.testing.assert_allclose(found, wanted, rtol=0.01)


@pytest.mark.parametrize("normalizer", [jsm.softmax, jsm.entmax15])
def test_ring_of_infinite_scores(normalizer, rng):
    """Several of +inf, on two devices, share their row; the query that has none is as ever."""
    query, key, value = rng.normal(size=(3, 1, 8, 1, 4))
    infinite = np.zeros((8, 8), bool)
    infinite[0, [1, 2, 7]] = infinite[5, 6] = True

    def attend(query, key, value, bias, **names):
        options = {"normalizer": normalizer, "return_residual": normalizer is jsm.softmax}
        found = jsm.dot_product_attention(query, key, value, bias, **options, **names)
        return found if isinstance(found, tuple) else (found, found[..., 0])

    def with_gradients(attend, query, key, value):
        def total(*args):
            return jnp.sum(jnp.sin(attend(*args, np.where(infinite, np.inf, 0.0))[0]))

        bias = np.where(infinite, np.inf, 0.0)
        return attend(query, key, value, bias), jax.grad(total, (0, 1, 2))(query, key, value)

    ring = in_ring(
        functools.partial(attend, kv_axis_name="a", query_axis_name="a"), bias=P("a", None)
    )
    actual, wanted = (
        jax.jit(functools.partial(with_gradients, f))(query, key, value) for f in (ring, attend)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    jax.tree.map(close, actual, wanted)
    close(actual[0][0][0, 0, 0], value[0, [1, 2, 7], 0].mean(0))


@pytest.mark.parametrize(
    ("kind", "normalizer"),
    [("grad", jsm.softmax), ("hvp", jsm.softmax), ("grad", jsm.entmax15)],
    ids=["grad", "hvp", "grad of entmax15"],
)
def test_ring_in_linear_memory(kind, normalizer):
    """Less than the scores of a device's queries, of which there are 256 to a key."""
    length, block = 2048, 16
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    attend = functools.partial(
        jsm.dot_product_attention,
        normalizer=normalizer,
        kv_axis_name="a",
        query_axis_name="a",
        block_size=block,
    )
    ring = in_ring(attend, (8,))
    grad = jax.grad(lambda *args: jnp.sum(ring(*args) ** 2), (0, 1, 2))
    funs = {"grad": grad, "hvp": lambda *args: jax.jvp(grad, args, args)}
    compiled = jax.jit(funs[kind]).lower(x, x, x).compile()
    scores = 4 * length * length // 8
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
    moved = [c for c in collectives(compiled.as_text()) if c.kind != "collective-permute"]
    # One number tells whether any row of any device is still searched for.
    assert all(c.kind == "all-reduce" and c.size == 1 for c in moved)


def test_ring_sends_while_it_works():
    """In a turn, what is sent is what came: nothing that the turn computes is waited for."""
    x = jax.ShapeDtypeStruct((1, 16, 2, 4), jnp.float32)
    attend = functools.partial(jsm.dot_product_attention, kv_axis_name="a", query_axis_name="a")

    def loss(*args):
        return jnp.sum(in_ring(attend)(*args) ** 2)

    def hvp(*args):
        return jax.jvp(jax.grad(loss, (0, 1, 2)), args, args)

    def sent(jaxpr):
        return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "ppermute"]

    everything = jaxprs(jax.make_jaxpr(hvp)(x, x, x))
    scans = [e for j in everything for e in j.eqns if e.primitive.name == "scan"]
    turns = [turn for scan in scans for turn in jaxprs(scan.params["jaxpr"]) if sent(turn)]
    assert len(turns) >= 4  # the output, its tangents, and what is pulled back of both
    for turn in turns:
        assert all(set(eqn.invars) <= set(turn.invars) for eqn in sent(turn))


def test_ring_of_arrays_on_an_explicit_mesh(rng):
    query, key, value = float32(rng, 3, 2, 16, 2, 8)
    bias = float32(rng, 2, 16, 16)

    def attention(query, key, value, bias):
        attend = functools.partial(jsm.dot_product_attention, bias=bias, is_causal=True)
        return derivatives(attend, query, key, value)

    args = query, key, value, bias
    where = P("a", "b")
    actual, found = on_mesh(mesh_of((2, 4)), attention, args, [where, where, where, P()])
    assert_equal(actual, jax.jit(attention)(*args))
    assert {c.kind for c in found} == {"collective-permute"}
    assert P(*actual[0].sharding.spec[:2]) == where


# What users get wrong.


def test_wrong_names_and_normalizers(rng):
    x = np.ones((1, 8, 2, 4))

    def attend(**options):
        return in_ring(functools.partial(jsm.dot_product_attention, **options), (4, 2))(x, x, x)

    for message, options in {
        "kv_axis_name must name mesh axes of a shard_map around the call, got 'z'": {
            "kv_axis_name": "z"
        },
        "query_axis_name must name other mesh axes than kv_axis_name but for": {
            "kv_axis_name": "a",
            "query_axis_name": "a",
            "normalizer": jsm.hardmax,
        },
        "query_axis_name must be kv_axis_name or name other mesh axes": {
            "kv_axis_name": ("a", "b"),
            "query_axis_name": "a",
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            attend(**options)
    with pytest.raises(TypeError, match="query_axis_name must be the name of a mesh axis"):
        attend(query_axis_name=1)
    with pytest.raises(ValueError, match="axis must name mesh axes of a shard_map around"):
        jsm.softmax(x, axis=(-1, "z"))
    with pytest.raises(ValueError, match="vocab_axis_name must name mesh axes of a shard_map"):
        jsm.linear_cross_entropy(x[0, 0], x[0, 0].T, np.zeros(2, int), vocab_axis_name="z")


def test_vmap_within_shard_map(rng):
    x = rng.normal(size=(3, 2, 8))
    mesh = mesh_of((4,), AxisType.Auto)
    mapped = jax.vmap(lambda x: jsm.entmax15(x, (-1, "a")))
    spread = jax.shard_map(
        mapped, mesh=mesh, in_specs=P(None, None, "a"), out_specs=P(None, None, "a")
    )
    np.testing.assert_allclose(jax.jit(spread)(x), jsm.entmax15(x), rtol=1e-13, atol=1e-15)


ROW, QKV = P("a", None, "b"), [(4, 2, 6, 2, 4)] * 3
# Functions, the shapes of what they are mapped over, and how it may be spread further.
MAPPED = {
    "softmax": (jsm.softmax, [(4, 3, 8)], ROW),
    "log_softmax": (jsm.log_softmax, [(4, 3, 8)], ROW),
    "entmax15": (jsm.entmax15, [(4, 3, 8)], ROW),
    "budget_sparsemax": (functools.partial(jsm.budget_sparsemax, budget=2.0), [(4, 3, 8)], ROW),
    "stick_breaking": (jsm.stick_breaking, [(4, 3, 8)], ROW),
    "sparsemax_loss": (lambda x: jsm.sparsemax_loss(x, np.arange(3)), [(4, 3, 8)], ROW),
    "linear_cross_entropy": (
        lambda x: jsm.linear_cross_entropy(x, np.sin(np.arange(40.0)).reshape(8, 5), np.arange(4)),
        [(4, 4, 8)],
        P("a", "b"),
    ),
    "sparsemax attention": (
        functools.partial(jsm.dot_product_attention, is_causal=True, normalizer=jsm.sparsemax),
        QKV,
        P("a", "b"),
    ),
    "attention in a ring": (functools.partial(jsm.dot_product_attention, is_causal=True), QKV, ROW),
    "attention of heads that share keys": (
        jsm.dot_product_attention,
        [(4, 2, 6, 4, 4), *[(4, 2, 6, 2, 4)] * 2],
        P("a", "b"),
    ),
}


@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_over_what_an_explicit_mesh_spreads(name, further, rng):
    """Of the function and its derivatives, which are on the mesh as the arrays are."""
    function, shapes, spec = MAPPED[name]
    args = [rng.normal(size=shape) for shape in shapes]

    def of_sines(*args):
        return jnp.sum(jnp.sin(jax.vmap(function)(*args)))

    def everything(*args):
        gradient = jax.grad(of_sines, tuple(range(len(args))))
        return jax.vmap(function)(*args), jax.jvp(gradient, args, tuple(map(jnp.cos, args)))

    mesh, spec = (mesh_of((2, 2)), spec) if further else (mesh_of((4,)), P("a"))
    wanted = jax.jit(everything)(*args)
    found, _ = on_mesh(mesh, everything, args, [spec] * len(args))
    assert_close(found, wanted)
    assert jax.typeof(found[0]).sharding.spec[0] == "a"


OTHERS_OF_ATTENTION = {
    "bias": ((4, 4, 8, 8), P("a")),
    "mask": ((4, 1, 8, 8), P("a")),
    "sink": ((4,), P("b")),
    "query_offset": ((4,), P("a")),
    "key_value_seq_lengths": ((4,), P("a")),
}


@pytest.mark.parametrize("name", OTHERS_OF_ATTENTION)
def test_options_of_attention_on_a_mesh_whose_devices_have_all_queries(name, rng):
    shape, spec = OTHERS_OF_ATTENTION[name]
    q, (k, v) = rng.normal(size=(4, 8, 4, 4)), rng.normal(size=(2, 4, 8, 2, 4))
    option = rng.integers(2, 8, size=shape) if len(shape) == 1 else rng.normal(size=shape)
    option = {"mask": option > -1, "sink": option.astype(float)}.get(name, option)

    def everything(q, k, v, option):
        return derivatives(
            lambda *args: jsm.dot_product_attention(*args, **{name: option}), q, k, v
        )

    wanted = jax.jit(everything)(q, k, v, option)
    found, _ = on_mesh(mesh_of((2, 2)), everything, (q, k, v, option), (P(), P(), P(), spec))
    assert_close(found, wanted)


def test_vmap_of_the_rings_derivatives(rng):
    arrays = rng.normal(size=(3, 2, 1, 8, 1, 2))  # two of each, one after the other

    def gradient(attend):
        def loss(query, key, value):
            return jnp.sum(jnp.sin(attend(query, key, value)))

        of_one = jax.grad(loss, (0, 1, 2))
        return jax.jit(jax.vmap(of_one, in_axes=(0, 0, None)))(*arrays[:2], arrays[2, 0])

    attend = functools.partial(jsm.dot_product_attention, is_causal=True)
    ring = in_ring(functools.partial(attend, kv_axis_name="a", query_axis_name="a"))
    for actual, wanted in zip(gradient(ring), gradient(attend), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-11, atol=1e-12)


# ---- values of rows that JAX does not know to be the same everywhere


LABELS = np.array([0, 3, 4, 7, 5])
OF_ROWS = {
    "logsumexp": jsm.logsumexp,
    "cross_entropy": lambda z, axis: jsm.cross_entropy(z, LABELS, axis=axis),
    "cross_entropy, options": lambda z, axis: jsm.cross_entropy(
        z, LABELS, axis=axis, z_loss=0.1, label_smoothing=0.1
    ),
    "sparsemax_loss": lambda z, axis: jsm.sparsemax_loss(z, LABELS, axis=axis),
    "entmax_loss": lambda z, axis: jsm.entmax_loss(z, LABELS, 1.3, axis=axis),
    "kl_divergence": lambda z, axis: jsm.kl_divergence(z, jnp.sin(z), axis=axis),
    "linear_cross_entropy": lambda z, axis: (
        jsm.linear_cross_entropy(
            np.eye(5), z, LABELS, vocab_axis_name=axis[1:] if isinstance(axis, tuple) else None
        )
        * np.ones(5)
    ),
}


SPREAD = P(None, "i")


def on_two_devices(fun, kind, out_spec=SPREAD):
    """`fun(part, *args)` of the halves of rows, on axes that JAX does not track.

    Where what it returns is the same on both devices, `out_spec` is `P()`.
    """
    if kind == "vmap":

        def mapped(x, *args):
            parts = x.reshape(*x.shape[:-1], 2, -1)
            found = jax.vmap(lambda part: fun(part, *args), x.ndim - 1, axis_name="i")(parts)
            if out_spec == P():
                return jax.tree.map(lambda y: y[1], found)  # the other one's has no cotangent
            return jax.tree.map(lambda y: jnp.concatenate([*y], -1), found)

        return mapped

    mesh = jax.make_mesh((2,), ("i",), (AxisType.Auto,), devices=jax.devices()[:2])

    def spread(x, *args):
        specs = P(*[None] * (x.ndim - 1), "i"), *(P() for _ in args)
        return jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False)(
            x, *args
        )

    return spread


def to_second_order(fun, args):
    """The value, a tangent, a gradient and a Hessian-vector product, in all arguments."""
    places, along = tuple(range(len(args))), jax.tree.map(jnp.cos, args)

    def scalar(*args):
        found = jax.tree.leaves(fun(*args))
        return sum(
            jnp.vdot(jnp.sin(y), jnp.arange(1.0, y.size + 1).reshape(y.shape)) for y in found
        )

    return jax.jvp(fun, args, along), jax.jvp(jax.grad(scalar, places), args, along)


def assert_close(found, wanted):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)
    jax.tree.map(compare, found, wanted)


either = pytest.mark.parametrize("kind", ["vmap", "shard_map"])


@pytest.mark.thorough
@either
@pytest.mark.parametrize("function", OF_ROWS.values(), ids=OF_ROWS)
def test_cotangents_of_row_values_are_summed(function, kind, rng):
    """Under `vmap` of a name, and where `shard_map` does not check what varies."""
    x, counts = jnp.asarray(rng.normal(size=(5, 8))), np.arange(1.0, 6)
    spread = on_two_devices(lambda part: function(part, axis=(-1, "i")), kind, P())

    def derivatives(f):
        tangent = jax.jvp(f, (x,), (jnp.cos(x),))[1]
        return f(x), tangent, jax.grad(lambda x: f(x) @ counts)(x)

    for found, wanted in zip(
        jax.jit(lambda: derivatives(spread))(),
        derivatives(lambda x: function(x, axis=-1)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_half_precision_where_some_axes_are_automatic(rng):
    """XLA for CPU cannot compare bfloat16 there."""
    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.bfloat16)
    mesh = mesh_of((2, 4), AxisType.Auto)

    def rows(x):
        return jsm.log_softmax(x, axis=(-1, "a")), jsm.logsumexp(x, axis=(-1, "a"))

    spread = jax.shard_map(
        rows, mesh=mesh, in_specs=P(None, "a"), out_specs=(P(None, "a"), P()), axis_names={"a"}
    )
    wanted = jsm.log_softmax(x), jsm.logsumexp(x)
    for one, other in zip(jax.jit(spread)(x), wanted, strict=True):
        np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (one, other)), rtol=1e-2)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_stick_beside_an_axis_that_is_automatic(reverse, rng):
    """Devices have parts of a row that XLA may split further."""
    x = rng.normal(size=(4, 16))
    mesh, spread = mesh_of((2, 4), AxisType.Auto), P(None, "a")
    function = functools.partial(jsm.stick_breaking, reverse=reverse)
    of_parts = jax.shard_map(
        functools.partial(function, axis=(-1, "a")),
        mesh=mesh,
        in_specs=spread,
        out_specs=spread,
        axis_names={"a"},
    )
    found, wanted = (jax.jit(functools.partial(derivatives, f))(x) for f in (of_parts, function))
    assert_close(found, wanted)


@pytest.mark.leaks_in_jax
@pytest.mark.parametrize("name", ["softmax", "sparsemax"])
def test_a_ring_beside_an_axis_that_is_automatic(name, rng):
    arrays, normalizer = rng.normal(size=(3, 2, 8, 2, 4)), getattr(jsm, name)
    attend = functools.partial(jsm.dot_product_attention, normalizer=normalizer, is_causal=True)
    ring = jax.shard_map(
        functools.partial(attend, kv_axis_name="a", query_axis_name="a"),
        mesh=mesh_of((2, 4), AxisType.Auto),
        in_specs=P(None, "a"),
        out_specs=P(None, "a"),
        axis_names={"a"},
    )
    found, wanted = (jax.jit(functools.partial(derivatives, f))(*arrays) for f in (ring, attend))
    assert_close(found, wanted)


@pytest.mark.leaks_in_jax
@pytest.mark.parametrize("names", [("a", None), ("a", "a"), (None, None)], ids=str)
def test_a_shard_map_beside_an_explicit_axis(names, rng):
    """Over some axes only; heads are on the others."""
    arrays, (keys, queries) = rng.normal(size=(3, 2, 8, 2, 4)), names
    attend = functools.partial(jsm.dot_product_attention, is_causal=True)
    row, column = (P(None, name) if keys else P("a") for name in (queries, keys))
    in_specs, mesh = (row, column, column), mesh_of((2, 2))
    spread = jax.shard_map(
        functools.partial(attend, kv_axis_name=keys, query_axis_name=queries),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=row,
        axis_names={"a"},
    )
    specs = [P(*spec, *[None] * (2 - len(spec)), "b") for spec in in_specs]
    found, _ = on_mesh(mesh, functools.partial(derivatives, spread), arrays, specs)
    assert_close(found, jax.jit(functools.partial(derivatives, attend))(*arrays))


def test_second_derivatives_beside_a_sink(rng):
    """Under `vmap` of a name, where JAX sums the shares of a sink that all devices have."""
    x, sink = jnp.asarray(rng.normal(size=(3, 2, 4))), jnp.array([0.3, -0.2])

    def spread(x, sink):
        def one(part, sink):
            return jsm.logsumexp(part, axis=(-1, "i"), sink=sink[:, None])

        return jnp.mean(jnp.sin(jax.vmap(one, (0, None), axis_name="i")(x, sink)), 0)

    def here(x, sink):
        rows = jnp.moveaxis(x, 0, 1).reshape(2, -1)
        return jnp.sin(jsm.logsumexp(rows, sink=sink[:, None]))

    def derivatives(f):
        gradient = jax.grad(lambda *args: jnp.sum(f(*args)), (0, 1))
        of_sines = jax.grad(lambda *args: jnp.sum(jnp.sin(gradient(*args)[1])), (0, 1))
        return jax.jvp(gradient, (x, sink), (jnp.cos(x), jnp.cos(sink)))[1], of_sines(x, sink)

    both = map(jax.tree.leaves, (derivatives(spread), derivatives(here)))
    for found, wanted in zip(*both, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-13)


def entries_with_parameters(x, shape, sink, temperature, axis):
    """What has rules that take row values, beside softmax."""
    return (
        jsm.entmax(x, 1 + shape, axis, sink=sink),
        jsm.log_softmax(x, axis, sink=sink, temperature=temperature),
        jsm.normmax(x, 1 + shape, axis, temperature=temperature),
        jsm.budget_sparsemax(x, 2 * shape, axis),
    )


def row_values_with_parameters(x, shape, sink, temperature, axis):
    return (
        jsm.logsumexp(x, axis, sink=sink, temperature=temperature),
        jsm.entmax_loss(x, LABELS[:3], 1 + shape, axis, temperature=temperature),
    )


@pytest.mark.parametrize(
    ("function", "kind", "out_spec"),
    [
        (entries_with_parameters, "vmap", SPREAD),
        (row_values_with_parameters, "shard_map", P()),
    ],
    ids=["entries", "row values"],
)
def test_derivatives_in_what_devices_share(function, kind, out_spec, rng):
    """A parameter or a sink that both devices have counts once."""
    shape = np.array([[0.4], [0.7], [0.9]])
    args = jnp.asarray(rng.normal(size=(3, 8))), shape, np.array(0.3), shape + 0.5
    spread = on_two_devices(functools.partial(function, axis=(-1, "i")), kind, out_spec)
    here = functools.partial(function, axis=-1)
    found, wanted = (jax.jit(functools.partial(to_second_order, f))(args) for f in (spread, here))
    assert_close(found, wanted)


@either
def test_derivatives_are_those_of_a_sum_by_jax(kind, rng):
    """Softmax as a user writes it, with `lax.psum`: also where the gradient is taken inside."""
    args = (*map(jnp.asarray, (rng.normal(size=(3, 8)), [[0.2], [0.0], [1.0]], 0.8)),)

    def ours(x, sink, temperature):
        return jsm.softmax(x, (-1, "i"), sink=sink, temperature=temperature)

    def by_jax(x, sink, temperature):
        weights = jnp.exp(x / temperature)
        total = jax.lax.psum(jnp.sum(weights, -1, keepdims=True), "i")
        return weights / (total + jnp.exp(sink))

    def derivatives(softmax):
        def gradients_inside(*args):
            def loss(*args):
                return jax.lax.psum(jnp.sum(jnp.sin(softmax(*args))), "i")

            of_part, *of_shared = jax.grad(loss, (0, 1, 2))(*args)
            return of_part, [jax.lax.psum(g, "i") * jnp.ones_like(of_part) for g in of_shared]

        outside = to_second_order(on_two_devices(softmax, kind), args)
        return outside, on_two_devices(gradients_inside, kind)(*args)

    found, wanted = (jax.jit(functools.partial(derivatives, f))() for f in (ours, by_jax))
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("normalizer", "kind"),
    [(jsm.softmax, "vmap"), (jsm.threshold_mapping(SOFTPLUS), "shard_map")],
    ids=["softmax", "form"],
)
def test_attention_to_keys_that_are_spread(normalizer, kind, rng):
    """Derivatives in the sink and in what the normalizer is given."""
    query, key, value = (jnp.asarray(x) for x in rng.normal(size=(3, 1, 4, 1, 4)))
    both = jnp.moveaxis(jnp.stack([key, value]), 2, -1)
    name = "temperature" if normalizer is jsm.softmax else "width"

    def attend(both, parameter, sink, **names):
        key, value = jnp.moveaxis(both, -1, 2)
        given = functools.partial(normalizer, **{name: parameter})
        return jsm.dot_product_attention(query, key, value, normalizer=given, sink=sink, **names)

    def derivatives(attend):
        def pulled_back(*args):
            out, pull_back = jax.vjp(attend, *args)
            return pull_back(jnp.cos(out))

        return jax.jvp(attend, args, jax.tree.map(jnp.cos, args)), pulled_back(*args)

    args = both, jnp.array(0.7), jnp.array([0.3])
    spread = on_two_devices(functools.partial(attend, kv_axis_name="i"), kind, P())
    found, wanted = (jax.jit(functools.partial(derivatives, f))() for f in (spread, attend))
    assert_close(found, wanted)


ON_DEVICES = {
    "entmax_loss": lambda x, y, t: jnp.mean(jsm.entmax_loss(x, y)),
    "temperature": lambda x, y, t: jnp.vdot(jsm.log_softmax(x, temperature=t), jnp.cos(x)),
    "linear": lambda x, y, t: jsm.linear_cross_entropy(x, jnp.sin(x.T @ x), y),
    "linear, each": lambda x, y, t: jnp.vdot(
        jsm.linear_cross_entropy(x, jnp.sin(x.T @ x), y, reduction="none"), t
    ),
    "linear, weights": lambda x, y, t: jsm.linear_cross_entropy(
        x, jnp.sin(x.T @ x), jnp.arange(ROWS) % 5, weights=t[:, 0]
    ),
}


@pytest.mark.parametrize("name", ON_DEVICES)
def test_cotangents_of_what_all_devices_share_are_summed(name, rng):
    """Scores that no device has of its own, with targets, temperatures or weights that each has."""
    x, y = rng.normal(size=(ROWS, 5)), rng.integers(5, size=4 * ROWS)
    temperature = rng.uniform(1, 2, size=(4 * ROWS, 1))
    on_device = ON_DEVICES[name]

    def derivatives(total):
        gradient = jax.grad(total)
        return jax.jit(lambda x, *rest: jax.jvp(lambda x: gradient(x, *rest), (x,), (jnp.sin(x),)))

    def one_by_one(x, y, t):
        shares = zip(jnp.split(y, 4), jnp.split(t, 4), strict=True)
        return sum(on_device(x, *share) for share in shares)

    specs = P(), P("a"), P("a")
    mesh = mesh_of((4,), AxisType.Auto)
    total = jax.shard_map(
        lambda *args: jax.lax.psum(on_device(*args), "a"), mesh=mesh, in_specs=specs, out_specs=P()
    )
    found = derivatives(total)(x, y, temperature)
    assert_close(found, derivatives(one_by_one)(x, y, temperature))
