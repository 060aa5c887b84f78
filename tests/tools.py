"""What several tests need: errors in ulp, operations in a jaxpr, a mesh."""

import collections

import jax
import jax.extend
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

IN_FLOAT64 = pytest.param("float64", marks=pytest.mark.asks_for_x64)
# What scores are in where a test does not say: float32 with `--jax-mode=float32`.
FLOAT = np.float64


def huge():
    """So large that a sum of a few, or a product with a small number, is still finite."""
    return {np.float64: 1e300, np.float32: 1e36}[FLOAT]


def ulp_error(actual, exact):
    """The largest error in units of the last place of `exact`, itself of any precision.

    XLA flushes to zero what is below the smallest normal number: there, that number is the unit.
    """
    finfo = jnp.finfo(actual.dtype)
    worst = 0.0
    for value, truth in zip(np.ravel(actual), np.ravel(exact), strict=True):
        unit = mpmath.mpf(float(finfo.tiny))
        if abs(truth) >= unit:
            unit = mpmath.ldexp(1, int(mpmath.floor(mpmath.log(abs(truth), 2))) - finfo.nmant)
        error = float(abs(mpmath.mpf(float(value)) - truth) / unit)
        if not error <= worst:  # a NaN must not pass
            worst = error
    return worst


def exact_log_softmax(row):
    """Log-softmax of a row of floats, as numbers of `mpmath`; no digits are lost to 1 - p."""
    top, rest = top_and_rest(row)
    return [(mpmath.mpf(float(z)) - top) - rest for z in row]


def top_and_rest(row):
    """The largest number of a row, and by how much its log-sum-exp is larger than that."""
    row = sorted(mpmath.mpf(float(z)) for z in row)
    top = row.pop()
    return top, mpmath.log1p(mpmath.fsum(mpmath.exp(z - top) for z in row))


def on_mesh(f, spec, out=None):
    """`f` on four devices in a row, "i"."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(*spec)
    out = spec if out is None else PartitionSpec(*out)
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out))


def operations(closed_jaxpr):
    """How often each primitive is used, calls looked into rather than counted."""
    eqns = [eqn for jaxpr in jaxprs(closed_jaxpr) for eqn in jaxpr.eqns]
    return collections.Counter(eqn.primitive.name for eqn in eqns if not jaxprs(eqn.params))


def primitives(closed_jaxpr):
    """The names of all primitives, those that hold others included."""
    return {eqn.primitive.name for jaxpr in jaxprs(closed_jaxpr) for eqn in jaxpr.eqns}


def jaxprs(value):
    """The jaxprs in `value`, and all in those."""
    if isinstance(value, jax.extend.core.Jaxpr):  # since jax 0.11 closed ones, too
        return [value, *(sub for eqn in value.eqns for sub in jaxprs(eqn.params))]
    for holder in ("jaxpr", "func", "function"):  # what is closed, a partial, one of ours
        if hasattr(value, holder):
            return jaxprs(getattr(value, holder))
    if isinstance(value, dict):
        return jaxprs(tuple(value.values()))
    if isinstance(value, tuple | list):
        return [sub for item in value for sub in jaxprs(item)]
    return []
