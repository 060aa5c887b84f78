"""Arrays that JAX itself shares among devices: the same answers, and no row is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsoftmax as jsm
from tests.cases import FUNCTIONS, named

# A prefix sum over devices is one that XLA gathers for.
gatherless = pytest.mark.parametrize("case", **named([c for c in FUNCTIONS if not c.in_order]))


@gatherless
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_nothing_is_gathered(case, kind, rng):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(kind, kind))
    x = rng.normal(size=(4, 256))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows", "columns")))

        def value_and_gradient(x):
            value, pull_back = jax.vjp(case.fun, x)
            return value, pull_back(jnp.cos(value))[0]

        compiled = jax.jit(value_and_gradient).lower(sharded).compile()
        assert "all-gather" not in compiled.as_text()
        value, gradient = compiled(sharded)
        if case.gives != "row value":
            assert value.sharding.spec == sharded.sharding.spec
    expected, expected_gradient = value_and_gradient(x)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["log_softmax", "logsumexp"])
def test_two_numbers_a_row_cross_devices(name, rng):
    mesh = jax.make_mesh((4,), ("columns",))
    with jax.set_mesh(mesh):
        spec = PartitionSpec(None, "columns")
        x = jax.device_put(rng.normal(size=(4, 256)), NamedSharding(mesh, spec))
        text = jax.jit(getattr(jsm, name)).lower(x).compile().as_text()
    assert sum(line.count(" all-reduce(") for line in text.splitlines()) == 2
