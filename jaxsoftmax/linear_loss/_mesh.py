"""Rows and classes that an explicit mesh spreads over devices."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxsoftmax._configured import Configured, arrays_in
from jaxsoftmax._sharding import (
    Names,
    as_a_whole,
    explicit_names,
    first_explicit,
    held,
    on_each_device,
    spec_of,
)
from jaxsoftmax.linear_loss._layer import Layer
from jaxsoftmax.linear_loss._losses import How, summed_or_each


def on_explicit_mesh(
    how: How, layer: Layer, labels: Array, keep: Array, weights: Array | None
) -> Array:
    """The losses, or their sum, where types tell which devices have which rows and classes.

    A loss that is not ours gets the scores of all classes, which XLA shares among the devices.
    """
    in_rows = [explicit_names(layer.hidden, i) for i in range(keep.ndim)]
    row_names = tuple(itertools.chain.from_iterable(in_rows))
    # An axis that has rows has no classes: of the two, the weights are those to be gathered.
    classes = [name for name in explicit_names(layer.weight, 1) if name not in row_names]
    classes = () if how.names else tuple(classes)
    out_specs = PartitionSpec() if how.in_sum else spec_of(in_rows)

    # JAX lets no function on a mesh close over what is on the mesh: parameters are passed.
    params, of_params = held((how.loss, how.soft_cap))

    def here(params: Sequence[Array], *args: Any) -> Array:
        loss, soft_cap = of_params(params)
        return summed_or_each(dataclasses.replace(how, loss=loss, soft_cap=soft_cap), *args)

    if classes and not isinstance(how.loss, Configured):
        whole = as_a_whole(here, sharding_of(layer), out_specs)
        return whole(params, layer, labels, keep, weights)

    how = dataclasses.replace(how, names=how.names or classes)
    count = layer.weight.shape[1]
    if classes:
        _check_classes(how.loss, count)

    def local(labels: Array, keep: Array, *others: Array) -> Array:
        params, others = others[: len(params_axes)], others[len(params_axes) :]
        *layer, weights = others if weights_given else (*others, None)
        layer_here = Layer(*layer, *(None,) * (3 - len(layer)))
        losses = here(params, layer_here, labels, keep, weights)
        return lax.psum(losses, row_names) if how.in_sum and row_names else losses

    weights_given = weights is not None
    layer_axes = ((*in_rows, ()), ((), classes), (classes,))
    given = [x for x in layer if x is not None]
    params_axes = [_axes_of(x, count, classes) for x in params]
    of_labels = (*in_rows, classes)[: labels.ndim]
    in_axes = (of_labels, in_rows, *params_axes, *layer_axes[: len(given)])
    if weights is not None:
        in_axes, given = (*in_axes, in_rows), [*given, weights]
    mapped = on_each_device(local, sharding_of(layer), in_axes, out_specs)
    return mapped(labels, keep, *params, *given)


def _axes_of(param: Array, count: int, classes: Names) -> tuple[Names, ...]:
    """What a parameter of the loss is spread over: its classes, if it has one value for each."""
    if param.ndim == 0 or param.shape[-1] != count:
        return ()
    return (*[()] * (param.ndim - 1), classes)


def _check_classes(loss: Any, count: int) -> None:
    """Raises for what one of our losses holds per class, but not for all of so many."""
    for name, x in arrays_in(loss).items():
        if name in ("class_weights", "where") and x.ndim and x.shape[-1] not in (1, count):
            raise ValueError(
                f"{name} must have one value per class, shape {(count,)}, got shape {x.shape}."
            )


def sharding_of(layer: Layer) -> Any:
    """How the layer is spread over an explicit mesh, None where it is not."""
    return first_explicit(x for x in layer if x is not None)
