"""What the types of arrays tell of how JAX shares them among devices."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxsoftmax._jax import is_of_closure

Names = tuple[str, ...]


def explicit(x: Array) -> Any:
    """How `x` is spread over an explicit mesh, None where it is not."""
    sharding = jax.typeof(x).sharding
    return None if all(names is None for names in sharding.spec) else sharding


def first_explicit(arrays: Iterable[Array]) -> Any:
    """How the first of the arrays is spread that is on an explicit mesh, None if none is."""
    found = map(explicit, arrays)
    return next((sharding for sharding in found if sharding is not None), None)


def axes_of(mesh: Any, wanted: AxisType) -> set[str]:
    """The axes of a mesh that are of a kind."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == wanted}


def explicit_names(x: Array, axis: int) -> Names:
    """The explicit mesh axes that an array axis is spread over."""
    return _names(jax.typeof(x).sharding.spec[axis])


def _names(entry: Any) -> Names:
    """The mesh axes of an entry of a spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def share_like(x: Array, other: Array) -> Array:
    """`x`, spread over an explicit mesh as `other` is, along the axes of the same length.

    Outside of a custom rule, since the cotangent is to be spread as `x` was.
    """
    sharding = explicit(other)
    if sharding is None:
        return x
    pairs = zip(sharding.spec, x.shape, other.shape, strict=True)
    spec = [names if n == m else None for names, n, m in pairs]
    return jax.sharding.reshard(x, sharding.update(spec=spec))


def placed_like(x: Array, spec: Sequence[Any]) -> Array:
    """`x`, if it is spread over an explicit mesh, with its first axes spread as a spec says."""
    sharding = explicit(x)
    if sharding is None:
        return x
    taken = set(jax.tree.leaves(tuple(spec)))
    others = [None if taken & {*_names(e)} else e for e in sharding.spec[len(spec) :]]
    wanted = PartitionSpec(*spec, *others)
    return x if sharding.spec == wanted else jax.sharding.reshard(x, sharding.update(spec=wanted))


def gathered(x: Array, *axes: int) -> Array:
    """`x`, whose `axes`, or all of them if none is named, are not spread over an explicit mesh."""
    spec = list(jax.typeof(x).sharding.spec)
    for axis in axes or range(x.ndim):
        spec[axis] = None
    return placed_like(x, spec)


def joinable(x: Array, count: int) -> Array:
    """`x`, of whose first axes so many can be made one: explicit meshes split only the leading."""
    spec = jax.typeof(x).sharding.spec[:count]
    whole = next((i for i, names in enumerate(spec) if names is None), count)
    later = [i for i in range(whole, len(spec)) if spec[i] is not None]
    return gathered(x, *later) if later else x


def parts_of(x: Array, axis: int) -> int:
    """Into how many equal parts XLA may have split an axis, as far as types tell; 1 if none."""
    mesh = jax.typeof(x).sharding.mesh
    names = {*explicit_names(x, axis), *axes_of(mesh, AxisType.Auto)}
    parts = math.prod(mesh.shape[name] for name in names)
    return parts if x.shape[axis] % parts == 0 else 1


def parts_in_all(x: Array) -> int:
    """Into how many parts XLA may split `x` of its own accord, as far as types tell."""
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[name] for name in axes_of(mesh, AxisType.Auto))


def on_each_device(
    fun: Callable[..., Any],
    sharding: NamedSharding,
    in_axes: Sequence[Sequence[Names]],
    out_specs: Any,
) -> Callable[..., Any]:
    """`fun` of each device's parts of arrays on an explicit mesh.

    Args:
      fun: the function.
      sharding: that of any array on the mesh.
      in_axes: for each argument, a pytree of arrays, the mesh axes that each of their axes is to be
        spread over.
      out_specs: the specs of what it returns.

    Raises:
      NotImplementedError: if `fun` calls a function that closes over an array of the mesh, which
        JAX cannot pass on; see `_without_closures`.
    """
    mesh: Any = sharding.mesh
    names = axes_of(mesh, AxisType.Explicit)
    if len(names) == len(mesh.axis_names):
        names = set()  # all but those that `vmap` has taken, which only JAX knows
    specs = [spec_of(axes) for axes in in_axes]
    if AxisType.Manual in mesh.axis_types:
        # JAX cannot pass what such a `shard_map` within another keeps for its gradient (0.10 to
        # 0.12): only arguments are kept.
        fun = jax.checkpoint(fun)
    mapped = jax.shard_map(
        fun, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs, axis_names=names
    )

    def of_placed(*args: Any) -> Any:
        pairs = zip(args, specs, strict=True)
        placed = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in pairs]
        return mapped(*placed)

    return _without_closures(of_placed)


def as_a_whole(
    fun: Callable[..., Any], sharding: NamedSharding, out_specs: Any
) -> Callable[..., Any]:
    """`fun` of whole arrays on an explicit mesh, which XLA shares of its own accord.

    Args:
      fun: the function.
      sharding: that of any array on the mesh.
      out_specs: the specs of what it returns.

    Raises:
      NotImplementedError: if `fun` calls a function that closes over an array of the mesh, which
        JAX cannot pass on; see `_without_closures`.
    """
    mesh: Any = sharding.mesh
    specs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
    names = tuple(sorted(axes_of(mesh, AxisType.Explicit)))
    return _without_closures(jax.sharding.auto_axes(fun, axes=names, out_sharding=specs))


def _without_closures(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, which says what to do where a function closes over an array of the mesh.

    An error is the right answer. Such a function has to be traced where axes are not explicit, and
    there JAX (0.10 to 0.12) has no way for an array whose type says that they are: it raises
    `NotImplementedError` or `ValueError`. Only an argument can be passed, and so a partial. This
    adds what to do, to the first kind; when JAX has such closures, they work, and this may go.
    """

    def called(*args: Any) -> Any:
        try:
            return fun(*args)
        except (NotImplementedError, ValueError) as error:
            if not is_of_closure(error):
                raise
            message = (
                "Functions of yours must not close over arrays on a mesh with explicit axes, nor "
                "be methods of what holds some: JAX cannot pass these on. Hold them in "
                "functools.partial(function, name=array)."
            )
            raise NotImplementedError(message) from error

    return called


def held(functions: Any) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
    """The arrays that partials hold, and the functions of others in their place.

    Args:
      functions: functions, and arrays beside them, in a pytree.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(_as_tree, functions))
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

    def of_arrays(arrays: Sequence[Array]) -> Any:
        merged = leaves.copy()
        for i, x in zip(places, arrays, strict=True):
            merged[i] = x
        return jax.tree.unflatten(tree, merged)

    return [leaves[i] for i in places], of_arrays


def _as_tree(x: Any) -> Any:
    if not isinstance(x, functools.partial):
        return x
    args, keywords = jax.tree.map(_as_tree, (x.args, x.keywords))
    return jax.tree_util.Partial(x.func, *args, **keywords)


def spec_of(axes: Sequence[Names]) -> PartitionSpec:
    """A spec of the mesh axes that each array axis is spread over."""
    return PartitionSpec(*(names or None for names in axes))
