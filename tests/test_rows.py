"""Every kind of row: with a sink, as segments of an axis, over the devices of a mesh.

Each is held against the same function on plain rows, differentiated by JAX through the detour.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxsoftmax as jsm
from jaxsoftmax._reductions import Rows
from tests.cases import FUNCTIONS, Mapping, named
from tests.tools import on_mesh

pytestmark = pytest.mark.usefixtures("compiled_as_it_comes")

# With what the table fixes as one more argument to differentiate in.
PARAMETERS = {
    "entmax": (jsm.entmax, "alpha", 1.3),
    "normmax": (jsm.normmax, "alpha", 1.5),
    "budget_sparsemax": (jsm.budget_sparsemax, "budget", 1.85),
}
CASES = [
    Mapping(c.name, PARAMETERS[c.name][0], c.reference, gives=c.gives, in_order=c.in_order)
    if c.name in PARAMETERS
    else c
    for c in FUNCTIONS
]


def taking(option):
    return pytest.mark.parametrize("case", **named([c for c in CASES if c.takes(option)]))


def options_of(case, shape=()):
    """A value for each argument of its own, and the temperature, one per row or fewer."""
    values = {"temperature": 0.8}
    if case.name in PARAMETERS:
        _, name, value = PARAMETERS[case.name]
        values[name] = value
    steps = np.linspace(1, 1.1, int(np.prod(shape))).reshape(shape)
    return {name: value * steps for name, value in values.items() if case.takes(name)}


@functools.partial(jax.jit, static_argnums=0)
def derivatives(fun, *args):
    """Values, a tangent, a pullback and a Hessian-vector product."""
    tangents = jax.tree.map(jnp.cos, args)

    def scalar(*args):
        out = fun(*args)
        weights = jnp.sin(1.0 + jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(jnp.where(jnp.isfinite(out), weights * jnp.exp(out), 0))

    positions = tuple(range(len(args)))
    return (
        jax.jvp(fun, args, tangents),
        *jax.jvp(jax.grad(scalar, positions), args, tangents),
    )


def agree(actual, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), actual, expected
    )


@taking("sink")
@pytest.mark.parametrize("per_row", [False, True])
def test_a_sink_is_one_more_score_that_is_dropped(case, per_row, rng):
    x = rng.normal(size=(3, 4))
    shape = (3, 1) if per_row else ()
    sink = np.reshape(0.4, (1,) * len(shape)) * np.ones(shape)

    def joined(x, sink, options):
        options = dict(options)
        z = x / options.pop("temperature")
        column = jnp.broadcast_to(sink, (3, 1))
        out = case.fun(jnp.concatenate([z, column], -1), **options)
        return out if case.gives == "row value" else out[:, :-1]

    def with_sink(x, sink, options):
        return case.fun(x, sink=sink, **options)

    args = x, sink, options_of(case, shape)
    agree(derivatives(with_sink, *args), derivatives(joined, *args))


def test_softmax_one():
    x = np.array([[1.0, -2.0, 0.5], [-800.0, -900.0, -np.inf]])
    p = jsm.softmax(x, sink=0.0)
    np.testing.assert_allclose(p, np.exp(x) / (1 + np.exp(x).sum(-1, keepdims=True)), rtol=1e-14)
    np.testing.assert_allclose(jsm.logsumexp(x, sink=0.0)[1], 0, atol=1e-300)


@taking("sink")
def test_edges_of_sinks(case):
    x = np.array([[1.0, 0.5, -1.0], [-np.inf, -np.inf, -np.inf]])
    without = case.fun(x)
    np.testing.assert_allclose(case.fun(x, sink=-np.inf), without, rtol=1e-15)
    with_all = case.probabilities(x, sink=np.inf)
    if case.gives != "row value":
        np.testing.assert_array_equal(with_all, np.zeros_like(x))
        np.testing.assert_array_equal(case.probabilities(x, sink=0.0)[1], np.zeros(3))
        excluded = case.probabilities(x, where=np.array([True, False, True]), sink=0.3)
        assert np.all(excluded[:, 1] == 0)
    for junk in (np.nan, np.inf):
        x[0, 1] = junk
        gradient = jax.grad(
            lambda s: jnp.sum(case.fun(x, where=np.array([True, False, True]), sink=s)[0])
        )
        assert np.isfinite(gradient(0.3)) or case.gives == "logarithms"
    with pytest.raises(ValueError, match=r"sink must broadcast to one value per row, shape \(2, 1"):
        case.fun(x, sink=np.zeros(3))


# Ids out of order, one segment without entries, some out of range on either side.
IDS = np.array([2, 0, -1, 2, 0, 7, 3, 2])
NUM_SEGMENTS = 5


@pytest.mark.thorough
@taking("segment_ids")
@pytest.mark.parametrize(("axis", "sink"), [(0, False), (1, True)])
def test_a_segment_is_a_row(case, axis, sink, rng):
    x = rng.normal(size=(8, 3) if axis == 0 else (3, 8))
    per_segment = (NUM_SEGMENTS, 1) if axis == 0 else (1, NUM_SEGMENTS)
    options = options_of(case, per_segment)
    if sink:
        options["sink"] = np.linspace(-1, 1, NUM_SEGMENTS).reshape(per_segment)
    absent = -jnp.inf if case.gives == "logarithms" else 0.0

    def looped(x, options):
        rows = jnp.moveaxis(x, axis, -1)
        out = jnp.full_like(rows, absent)
        totals = []
        for segment in range(NUM_SEGMENTS):
            members = np.flatnonzero(np.equal(IDS, segment))
            own = {name: jnp.ravel(value)[segment] for name, value in options.items()}
            result = case.fun(rows[:, members], **own)
            if case.gives == "row value":
                totals.append(result)
            else:
                out = out.at[:, members].set(result)
        return jnp.moveaxis(jnp.stack(totals, -1) if totals else out, -1, axis)

    def segmented(x, options):
        return case.fun(x, axis=axis, segment_ids=IDS, num_segments=NUM_SEGMENTS, **options)

    agree(derivatives(segmented, x, options), derivatives(looped, x, options))


@taking("segment_ids")
def test_segments_under_masks_and_transformations(case, rng):
    x = rng.normal(size=(4, 8))
    where = np.array([True, True, True, False, False, True, True, True])
    out = case.fun(x, where=where, segment_ids=IDS, num_segments=NUM_SEGMENTS)
    hidden = np.where(where, IDS, -1)
    expected = case.fun(x, segment_ids=hidden, num_segments=NUM_SEGMENTS)
    np.testing.assert_array_equal(out, expected)
    counted = case.fun(x, segment_ids=np.array([0, 0, 1, 1, 1, 3, 3, 0]))
    assert counted.shape == ((4, 4) if case.gives == "row value" else (4, 8))

    def row(x, ids):
        return case.fun(x, segment_ids=ids, num_segments=NUM_SEGMENTS)

    ids = np.stack([rng.permutation(IDS) for _ in range(4)])
    batched = jax.vmap(row)(x, ids)
    np.testing.assert_allclose(batched, [row(*pair) for pair in zip(x, ids, strict=True)], 1e-13)


@taking("segment_ids")
def test_wrong_segments(case):
    x = np.ones((2, 3))
    ids = np.array([0, 0, 1])
    for kwargs, error, message in [
        (
            {"segment_ids": np.float32(ids)},
            TypeError,
            "segment_ids must be integers, got dtype float32",
        ),
        ({"segment_ids": ids[:2]}, ValueError, r"segment_ids must have shape \(3,\).* got shape"),
        ({"num_segments": 2}, ValueError, "num_segments goes with segment_ids, got no"),
        ({"segment_ids": ids, "axis": None}, ValueError, "axis must be one array axis"),
    ]:
        with pytest.raises(error, match=message):
            case.fun(x, **kwargs)
    with pytest.raises(ValueError, match="num_segments must be given if segment_ids is traced"):
        jax.jit(lambda ids: case.fun(x, segment_ids=ids))(ids)


@pytest.mark.thorough
@pytest.mark.leaks_in_jax
@pytest.mark.parametrize("case", **named([c for c in CASES if not c.in_order]))
def test_rows_over_the_devices_of_a_mesh(case, rng):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
    x = rng.normal(size=(4, 6))
    options = options_of(case)
    if case.takes("sink"):
        options["sink"] = np.asarray(0.3)
    spec = PartitionSpec("rows", "columns")

    def sharded(x, options):
        return jax.shard_map(
            lambda x, options: case.fun(x, axis=(-1, "columns"), **options),
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=PartitionSpec("rows") if case.gives == "row value" else spec,
        )(x, options)

    def whole(x, options):
        return case.fun(x, **options)

    agree(derivatives(sharded, x, options), derivatives(whole, x, options))


@pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if not c.in_order]))
def test_a_mesh_axis_alone(case, rng):
    """One score of each row per device."""
    x = rng.normal(size=(3, 4))
    out = () if case.gives == "row value" else ("i",)
    alone = on_mesh(lambda x: case.fun(x[:, 0], axis="i"), (None, "i"), out)(x)
    expected = case.fun(x)
    np.testing.assert_allclose(alone, expected if out == () else expected.T.ravel(), rtol=1e-13)


def test_digits_survive_on_every_kind_of_row():
    """Where one score dominates, all digits are in the others, wherever these are."""
    x = np.array([[45.0, 0.0, 1.0, -2.0]])
    exact = -np.log1p(np.exp(x[:, 1:] - 45).sum())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-14)

    def loss(x, axis):
        return jsm.cross_entropy(x, jnp.zeros(1, int), axis)

    close(jsm.log_softmax(x)[0, 0], exact)
    close(loss(x, -1), [-exact])
    over_devices = on_mesh(lambda x: jsm.log_softmax(x, (-1, "i")), (None, "i"))
    close(over_devices(x)[0, 0], exact)
    close(on_mesh(lambda x: loss(x, (-1, "i")), (None, "i"), ())(x), [-exact])
    segments = jsm.log_softmax(x, segment_ids=np.zeros(4, int), num_segments=1)
    close(segments[0, 0], exact)
    mesh = jax.make_mesh((4,), ("i",))
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(None, "i")))
        close(np.asarray(jax.jit(jsm.log_softmax)(spread))[0, 0], exact)


def test_a_sink_stays_what_it_is_as_the_temperature_falls():
    x = np.array([[2.0, 1.0], [-2.0, -3.0], [2.0, 2.0], [0.0, -1.0]])
    for mapping in (jsm.softmax, jsm.sparsemax, jsm.entmax15):
        limit = mapping(x, sink=0.0, temperature=1e-6)
        np.testing.assert_allclose(limit, [[1, 0], [0, 0], [0.5, 0.5], [0.5, 0]], atol=1e-15)
        for zero in (0.0, jnp.asarray(0.0)):
            np.testing.assert_array_equal(mapping(x, sink=0.0, temperature=zero), limit)


@pytest.mark.parametrize("fun", [jsm.softmax, jsm.log_softmax, jsm.sparsemax, jsm.entmax15])
def test_no_segment_has_anything(fun):
    """All ids are out of range, or there are none."""
    nothing = -np.inf if fun is jsm.log_softmax else 0.0
    out = fun(np.ones(3), segment_ids=np.array([-1, -1, -1]))
    np.testing.assert_array_equal(out, np.full(3, nothing))
    np.testing.assert_array_equal(
        jsm.logsumexp(np.ones(2), segment_ids=np.array([-1, -1])), -np.inf
    )
    assert fun(np.ones(0), segment_ids=np.zeros(0, int)).shape == (0,)
    assert jsm.logsumexp(np.ones(0), segment_ids=np.zeros(0, int)).shape == (0,)


@pytest.mark.asks_for_nan
@pytest.mark.parametrize(
    ("row", "top", "others"),
    [
        ([45, 0], 45, math.exp(-45)),
        ([0, -45, -46], 0, math.exp(-45) + math.exp(-46)),
        ([1, 1, 1], 1, 2),
        ([-1000, -1001], -1000, math.exp(-1)),
        ([math.inf, 1, math.inf], math.inf, 1),
        ([-math.inf, 3], 3, 0),
        ([-math.inf, -math.inf], -math.inf, 1),
        ([], -math.inf, -1),
        ([1, math.nan], math.nan, math.nan),
        ([math.inf, math.nan], math.nan, math.nan),
    ],
)
def test_the_largest_and_the_exponentials_of_the_others(row, top, others):
    """As accelerators take them in one pass, which no CPU does by itself."""
    row = np.array(row, float)
    found = Rows((0,)).top_and_others((row,))
    np.testing.assert_allclose(np.ravel(found), [top, others], rtol=1e-14)
    if len(row) > 1:  # the last entry as a sink
        found = Rows((0,)).top_and_others((row[:-1], row[-1:]))
        np.testing.assert_allclose(np.ravel(found), [top, others], rtol=1e-14)


def test_the_largest_and_the_exponentials_of_the_others_over_devices():
    row = np.array([3.0, -40.0, 3.0, -1.0])
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = Rows((0,), ("a",))
    spread = jax.shard_map(
        lambda x: rows.top_and_others((x,)),
        mesh=mesh,
        in_specs=PartitionSpec("a"),
        out_specs=PartitionSpec(),
    )
    others = 1 + math.exp(-4) + math.exp(-43)
    np.testing.assert_allclose(np.ravel(spread(row)), [3, others], rtol=1e-14)


@pytest.mark.parametrize(("dtype", "count"), [(np.uint8, 256), (np.int8, 128)])
def test_segments_of_few_bits(dtype, count):
    ids = np.arange(count, dtype=dtype)
    np.testing.assert_array_equal(jsm.softmax(jnp.zeros(count), segment_ids=ids), 1)
