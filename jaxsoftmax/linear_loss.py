"""Losses of a linear layer with many outputs, without ever holding all of its scores.

The rows are taken a chunk at a time: its scores are computed, turned into losses, and dropped.
Where the losses are summed, all that their gradients lack is the one cotangent of the sum, and so
the gradients are formed in the same pass: three matrix products in all, as with all the scores.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from jaxsoftmax._differentiation import custom_vjp, hoist
from jaxsoftmax._reductions import on_local_cpu_or_else, vary_like
from jaxsoftmax._scores import (
    check_integers,
    check_mask,
    check_real,
    check_soft_cap,
    mesh_names,
    output_dtype,
    public,
    soft_cap,
    wide,
    with_ndim,
)
from jaxsoftmax._sharding import (
    explicit,
    explicit_names,
    on_each_device,
    parts_in_all,
    parts_of,
    spec_of,
)
from jaxsoftmax.losses import cross_entropy
from jaxsoftmax.losses._targets import check_known


def linear_cross_entropy(
    hidden: Float[ArrayLike, "*rows D"],
    weight: Float[ArrayLike, "D V"],
    labels: Int[ArrayLike, "*rows"],
    *,
    bias: Float[ArrayLike, " V"] | None = None,
    loss: Callable[..., Array] = cross_entropy,
    reduction: Literal["mean", "sum", "none"] = "mean",
    where: Bool[ArrayLike, "*#rows"] | None = None,
    logits_soft_cap: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""] | Float[Array, "*rows"]:
    r"""The loss of `hidden @ weight + bias`, without ever holding all of these scores.

    .. math:: \frac{1}{N} \sum_{n=1}^N \mathrm{loss}(h_n W + b, y_n)

    It equals the loss of all the scores at once, to rounding, and so do its derivatives of every
    order; in memory there is one chunk of rows at a time. For the reductions "mean" and "sum" a
    gradient costs three matrix products, as it does with all the scores: it is formed in the
    forward pass. For "none" the scores are computed once more.

    Args:
      hidden: what goes into the last layer, of shape (..., D).
      weight: the weights of that layer, of shape (D, V) for V classes.
      labels: integer classes, of the shape (...).
      bias: added to the scores, of shape (V,).
      loss: any function `loss(scores, labels)` of scores (rows, V) and integers (rows,) that gives
        one value per row, such as `sparsemax_loss`, or `cross_entropy` and `entmax_loss` with
        options by `functools.partial`. Numbers that it closes over, such as a learned `alpha`,
        have gradients. It is compiled once for each function object: make it once.
      reduction: "mean" and "sum" are over the rows that count; "none" gives each row its loss.
      where: the rows that count; a boolean mask that broadcasts to `labels`. The loss of others is
        0, and so is their gradient, whatever they hold.
      logits_soft_cap: a positive number `c`, to replace scores by `c * tanh(scores / c)`.
      chunk_size: rows per chunk, on each device; chosen from the sizes if it is None. Memory grows
        with it, time may fall.
      vocab_axis_name: inside `shard_map`, the mesh axis over which the classes are sharded, or a
        tuple of several. Then `weight` and `bias` are this device's, `labels` count across the
        devices, and the loss is called with `axis=(-1, vocab_axis_name)`. Nothing larger than a
        number per row crosses devices, but the gradient of `hidden`. Outside of `shard_map` there
        is nothing to name: rows and classes of arrays on a mesh stay where they are.

    Returns:
      A scalar, or for "none" losses of the shape of `labels`; 0 where no row counts. The dtype is
      that of the operands, or float32 if they are of half precision: so are then the scores, and
      all sums over rows. A label out of range gives NaN and no gradient, and an error under
      `jax.experimental.checkify`.

    Raises:
      TypeError: if `labels` are not integers, `where` not boolean, `loss` no function, or the
        others not real.
      ValueError: if shapes do not fit, that of what `loss` gives included; if `reduction` is
        unknown, or `chunk_size` or `logits_soft_cap` not positive.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxsoftmax as jsm
      >>> jnp.set_printoptions(precision=3, suppress=True)
      >>> hidden, weight = jnp.eye(3), jnp.array([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
      >>> labels = jnp.array([0, 1, 2])
      >>> print(f"{jsm.linear_cross_entropy(hidden, weight, labels):.4f}")
      0.9427
      >>> sparse = functools.partial(jsm.entmax_loss, alpha=1.5)
      >>> print(jsm.linear_cross_entropy(hidden, weight, labels, loss=sparse, reduction="none"))
      [0.    0.126 1.126]
      >>> print(jax.grad(jsm.linear_cross_entropy)(hidden, weight, labels).shape)
      (3, 3)

    References:
      Hsu et al., 2024: Liger Kernel (arXiv:2410.10989); Wijmans et al., 2024: Cut your losses in
      large-vocabulary language models (arXiv:2411.09009).
    """
    options = {
        "bias": bias,
        "reduction": reduction,
        "where": where,
        "logits_soft_cap": logits_soft_cap,
        "chunk_size": chunk_size,
        "vocab_axis_name": vocab_axis_name,
    }
    if _is_constant(loss):
        return _compiled(hidden, weight, labels, loss=loss, **options)
    return public(functools.partial(_linear_loss, loss=loss))(hidden, weight, labels, **options)


def _is_constant(loss: Any) -> bool:
    """Whether what is compiled may be kept for this loss: not if that holds what is traced."""
    try:
        hash(loss)
    except TypeError:
        return False
    held: list[Any] = []
    if isinstance(loss, functools.partial):
        held += [loss.args, loss.keywords]
        loss = loss.func
    for cell in getattr(loss, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # not filled yet
            held.append(cell.cell_contents)
    return not any(isinstance(x, core.Tracer) for x in jax.tree.leaves(held))


def _linear_loss(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None,
    loss: Callable[..., Array],
    reduction: str,
    where: ArrayLike | None,
    logits_soft_cap: Any,
    chunk_size: int | None,
    vocab_axis_name: str | tuple[str, ...] | None,
) -> Array:
    layer = _as_layer(hidden, weight, bias)
    shape, num_classes = layer.hidden.shape[:-1], layer.weight.shape[1]
    labels = _as_labels(labels, shape)
    if not callable(loss):
        raise TypeError(f"loss must be a function, got {type(loss).__name__}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    known_cap = check_soft_cap(logits_soft_cap)
    names = mesh_names("vocab_axis_name", vocab_axis_name)
    keep = jnp.broadcast_to(True if where is None else check_mask(where, shape), shape)
    _check_range(labels, keep, num_classes * math.prod(lax.axis_size(name) for name in names))
    how = _How(
        loss=loss,
        soft_cap=logits_soft_cap if known_cap is None else known_cap,
        names=names,
        chunk_size=_check_chunk_size(chunk_size),
        in_sum=reduction != "none",
    )
    # Zeros instead of what does not count, be it NaN.
    hidden = jnp.where(keep[..., None], layer.hidden, 0)
    losses = _on_explicit_mesh if _sharding(layer) is not None else _summed_or_each
    losses = losses(how, layer._replace(hidden=hidden), jnp.where(keep, labels, 0), keep)
    if reduction == "mean":
        return losses / jnp.maximum(jnp.sum(keep.astype(losses.dtype)), 1)
    return losses


@dataclasses.dataclass(frozen=True)
class _How:
    """What becomes of scores.

    Attributes:
      loss: the function that makes losses of them.
      soft_cap: bounds them, None: without bounds.
      names: the mesh axes that the classes are spread over.
      chunk_size: rows per chunk, None: as sizes suggest.
      in_sum: whether the losses are summed.
    """

    loss: Callable[..., Array]
    soft_cap: Any
    names: tuple[str, ...]
    chunk_size: int | None
    in_sum: bool

    def losses(self, scores: Array, labels: Array) -> Array:
        """One loss per row."""
        if self.soft_cap is not None:
            scores = soft_cap(scores, self.soft_cap)
        axis = {"axis": (-1, *self.names)} if self.names else {}
        return _check_losses(self.loss(scores, labels, **axis), labels, scores.dtype)


def _on_explicit_mesh(how: _How, layer: "_Layer", labels: Array, keep: Array) -> Array:
    """The losses, or their sum, where types tell which devices have which rows and classes."""
    in_rows = [explicit_names(layer.hidden, i) for i in range(labels.ndim)]
    row_names = tuple(itertools.chain.from_iterable(in_rows))
    # An axis that has rows has no classes: of the two, the weights are those to be gathered.
    classes = [name for name in explicit_names(layer.weight, 1) if name not in row_names]
    classes = () if how.names else tuple(classes)
    how = dataclasses.replace(how, names=how.names or classes)

    # JAX lets no function on a mesh close over what is on the mesh: parameters are passed.
    params, how_of = _parameters(how)

    def local(params: list[Array], labels: Array, keep: Array, *layer: Array) -> Array:
        layer_here = _Layer(*layer, *(None,) * (3 - len(layer)))
        losses = _summed_or_each(how_of(params), layer_here, labels, keep)
        return lax.psum(losses, row_names) if how.in_sum and row_names else losses

    layer_axes = ((*in_rows, ()), ((), classes), (classes,))
    given = [x for x in layer if x is not None]
    in_axes = ((), in_rows, in_rows, *layer_axes[: len(given)])
    out_specs = PartitionSpec() if how.in_sum else spec_of(in_rows)
    mapped = on_each_device(local, _sharding(layer), in_axes, out_specs)
    return mapped(params, labels, keep, *given)


def _parameters(how: _How) -> tuple[list[Array], Callable[[list[Array]], _How]]:
    """The arrays that a partial of a loss holds, and the soft cap; and how to put them back."""
    loss = functools.partial(how.loss)
    leaves, tree = jax.tree.flatten((loss.args, loss.keywords, how.soft_cap))
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def how_of(params: list[Array]) -> _How:
        merged = leaves.copy()
        for i, x in zip(places, params, strict=True):
            merged[i] = x
        args, keywords, cap = jax.tree.unflatten(tree, merged)
        return dataclasses.replace(
            how, loss=functools.partial(loss.func, *args, **keywords), soft_cap=cap
        )

    return [leaves[i] for i in places], how_of


def _sharding(layer: "_Layer") -> Any:
    found = (explicit(x) for x in layer if x is not None)
    return next((sharding for sharding in found if sharding is not None), None)


def _summed_or_each(how: _How, layer: "_Layer", labels: Array, keep: Array) -> Array:
    layer = _varying_alike(layer)
    chunks = _chunks_of(layer.hidden, how.chunk_size, layer.weight.shape[1])
    hidden, labels, keep = map(chunks.split, (layer.hidden, labels, keep))
    some = vary_like(
        jnp.zeros((*labels.shape[1:], layer.weight.shape[1]), wide(hidden.dtype)), hidden
    )
    losses_of = how.losses
    for _ in some.shape[2:]:
        losses_of = jax.vmap(losses_of)
    pure, params, rest = hoist(losses_of, some, labels[0])
    operands = _Operands(hidden, layer.weight, layer.bias, params)
    rows = _Rows(labels, keep, rest)
    if not how.in_sum:
        return chunks.join(_each(pure, operands, rows))
    # What the loss closes over may be shared by devices that have different rows. Its gradient is
    # then summed over them, and so the cotangents, which may differ, have to be met before that.
    if all(vary_like(x, hidden, but=how.names) is x for x in params):
        return _total(pure, operands, rows)
    return jnp.sum(_each(pure, operands, rows))


_compiled = public(_linear_loss)


class _Layer(NamedTuple):
    hidden: Array
    weight: Array
    bias: Array | None


def _as_layer(hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> _Layer:
    """The linear layer, checked, and brought to one dtype."""
    hidden, weight = jnp.asarray(hidden), jnp.asarray(weight)
    check_real("hidden", hidden)
    check_real("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (D, V), got shape {weight.shape}.")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"hidden must have shape (..., {weight.shape[0]}), to go with weight of shape "
            f"{weight.shape}, got shape {hidden.shape}."
        )
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(output_dtype(hidden), output_dtype(weight))
    if dtype == jnp.float16:  # too narrow for the gradients of scores
        dtype = jnp.dtype(jnp.float32)
    hidden, weight = hidden.astype(dtype), weight.astype(dtype)
    if bias is None:
        return _Layer(hidden, weight, None)
    bias = jnp.asarray(bias)
    check_real("bias", bias)
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must have shape {weight.shape[1:]}, got shape {bias.shape}.")
    return _Layer(hidden, weight, bias.astype(wide(dtype)))


def _varying_alike(layer: _Layer) -> _Layer:
    """The layer, brought to the same devices."""
    hidden = vary_like(layer.hidden, layer.weight)
    weight = vary_like(layer.weight, hidden)
    return _Layer(hidden, weight, None if layer.bias is None else vary_like(layer.bias, weight))


def _as_labels(labels: ArrayLike, wanted: tuple[int, ...]) -> Array:
    labels = jnp.asarray(labels)
    check_integers("labels", labels)
    if labels.shape != wanted:
        raise ValueError(
            f"labels must have the shape of hidden without its last axis, {wanted}, got shape "
            f"{labels.shape}."
        )
    return labels


def _check_range(labels: Array, keep: Array, length: int) -> None:
    check_known("labels", (labels >= 0) & (labels < length) | ~keep, length)


def _check_losses(losses: Any, labels: Array, dtype: Any) -> Array:
    if jnp.shape(losses) != labels.shape:
        raise ValueError(
            f"loss must give one value per row, shape {labels.shape}, got shape "
            f"{jnp.shape(losses)}."
        )
    return losses.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How rows are split into equal chunks; the last ones may be filled up.

    Attributes:
      shape: the axes of the rows.
      count: how many chunks.
      size: rows per chunk.
    """

    shape: tuple[int, ...]
    count: int
    size: int

    @staticmethod
    def of(shape: tuple[int, ...], size: int) -> "_Chunks":
        rows = math.prod(shape)
        count = max(1, math.ceil(rows / size))
        return _Chunks(shape, count, max(1, math.ceil(rows / count)))

    def split(self, x: Array) -> Array:
        """Rows to chunks of rows, (count, size, ...); what is filled up is 0."""
        rows = x.reshape(-1, *x.shape[len(self.shape) :])
        missing = self.count * self.size - rows.shape[0]
        if missing:
            rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(self.count, self.size, *rows.shape[1:])

    def join(self, x: Array) -> Array:
        """Chunks of rows to rows."""
        return x.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class _SharedChunks:
    """The same for rows that XLA shares among devices: each chunk has some of every device.

    Attributes:
      axis: the axis that is split.
      count: how many chunks; the index of a row along the axis, modulo the count, tells which.
    """

    axis: int
    count: int

    @staticmethod
    def of(hidden: Array, size: int) -> "_SharedChunks":
        *shape, _ = hidden.shape
        axis = shape.index(max(shape))
        parts = parts_of(hidden, axis)
        most = max(shape[axis] // parts, 1)
        wanted = math.ceil(math.prod(shape) / size)
        return _SharedChunks(
            axis, next(n for n in range(min(wanted, most), most + 1) if most % n == 0)
        )

    def split(self, x: Array) -> Array:
        """Rows to chunks of rows, (count, ...)."""
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        return jnp.moveaxis(x.reshape(*before, -1, self.count, *after), self.axis + 1, 0)

    def join(self, x: Array) -> Array:
        """Chunks of rows to rows."""
        x = jnp.moveaxis(x, 0, self.axis + 1)
        return x.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 2 :])


def _chunks_of(hidden: Array, size: int | None, num_classes: int) -> _Chunks | _SharedChunks:
    size = _chunk_size(num_classes) if size is None else size
    devices = parts_in_all(hidden)
    if devices == 1 or hidden.size == 0:
        return _Chunks.of(hidden.shape[:-1], size)
    return _SharedChunks.of(hidden, size * devices)


def _check_chunk_size(wanted: int | None) -> int | None:
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {wanted!r}.")
    return wanted


def _chunk_size(num_classes: int) -> int:
    # 256 rows keep the matrix products busy; where there are few classes, more rows still fit.
    return max(256, _SCORES // max(num_classes, 1))


# How many scores a chunk has that is large enough for any machine.
_SCORES = 2**23


class _Operands(NamedTuple):
    """What has a gradient: hidden in chunks, and what all chunks share."""

    hidden: Array
    weight: Array
    bias: Array | None
    params: list[Array]


class _Rows(NamedTuple):
    """What has none."""

    labels: Array
    keep: Array
    rest: list[Array]


Losses = Callable[..., Array]  # (params, rest, scores, labels) -> one loss per row


def _scores(hidden: Array, weight: Array, bias: Array | None) -> Array:
    scores = _dot(hidden, weight, ((hidden.ndim - 1,), (0,)))
    return scores if bias is None else scores + with_ndim(bias, scores.ndim)


def _dot(x: Array, y: Array, contracted: tuple[Sequence[int], Sequence[int]]) -> Array:
    return lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=wide(x.dtype))


def _losses(losses: Losses, operands: _Operands, rows: _Rows) -> Array:
    def step(_: None, chunk: tuple[Array, Array, Array]) -> tuple[None, Array]:
        hidden, labels, keep = chunk
        scores = _scores(hidden, operands.weight, operands.bias)
        values = losses(operands.params, rows.rest, scores, labels)
        return None, jnp.where(keep, values, 0)

    return lax.scan(jax.checkpoint(step), None, (operands.hidden, rows.labels, rows.keep))[1]


def _gradients(
    losses: Losses, operands: _Operands, rows: _Rows, ct: Array
) -> tuple[Array, _Operands]:
    """The losses, and their gradients under the cotangents `ct`, in one pass."""
    shared = operands.weight, operands.bias, operands.params

    def of_chunk(hidden: Array, labels: Array, keep: Array, ct: Array) -> Any:
        weight, bias, params = shared

        def of_scores(scores: Array, params: list[Array]) -> Array:
            return jnp.where(keep, losses(params, rows.rest, scores, labels), 0)

        values, pull_back = jax.vjp(of_scores, _scores(hidden, weight, bias), params)
        ct_scores, ct_params = pull_back(vary_like(ct, values))
        *of_rows, of_classes = range(ct_scores.ndim)
        ct_bias = None if bias is None else jnp.sum(ct_scores, of_rows)
        ct_scores = ct_scores.astype(hidden.dtype)
        ct_hidden = _dot(ct_scores, weight, ((of_classes,), (1,)))
        return values, ct_hidden, ct_scores, (ct_bias, ct_params)

    # Checkpointed, so that what is differentiated again keeps no scores.
    @jax.checkpoint
    def step(total: Any, chunk: Any) -> Any:
        total_weight, total_rest = total
        values, ct_hidden, ct_scores, ct_rest = of_chunk(*chunk)
        total_weight = _add_product(total_weight, chunk[0], ct_scores)
        return (total_weight, jax.tree.map(jnp.add, total_rest, ct_rest)), (values, ct_hidden)

    weight, *rest = jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, wide(x.dtype)), x), shared)
    chunks = operands.hidden, rows.labels, rows.keep, ct
    (weight, (bias, params)), (values, ct_hidden) = lax.scan(step, (weight, tuple(rest)), chunks)
    return values, _Operands(ct_hidden, weight, bias, params)


def _add_product(total: Array, hidden: Array, ct_scores: Array) -> Array:
    """`total + hidden.T @ ct_scores`."""
    if hidden.ndim > 2:  # of rows that XLA shares among devices
        return _add_whole_product(total, hidden, ct_scores)
    return on_local_cpu_or_else(
        _add_product_in_blocks, _add_whole_product, total, hidden, ct_scores
    )


def _add_whole_product(total: Array, hidden: Array, ct_scores: Array) -> Array:
    of_rows = range(hidden.ndim - 1)
    return total + _dot(hidden, ct_scores, (of_rows, of_rows))


def _add_product_in_blocks(total: Array, hidden: Array, ct_scores: Array) -> Array:
    # XLA for CPU cannot add to what is there: the product would be one more array of the size of
    # the weights. Blocks of it stay in the cache.
    count = max(1, total.size // _BLOCK)
    width = total.shape[1] // count

    def step(total: Array, i: Array) -> tuple[Array, None]:
        block = _add_whole_product(
            lax.dynamic_slice_in_dim(total, i * width, width, 1),
            hidden,
            lax.dynamic_slice_in_dim(ct_scores, i * width, width, 1),
        )
        return lax.dynamic_update_slice_in_dim(total, block, i * width, 1), None

    total, _ = lax.scan(step, total, jnp.arange(count))
    done = count * width
    if done == total.shape[1]:
        return total
    last = _add_whole_product(total[:, done:], hidden, ct_scores[:, done:])
    return total.at[:, done:].set(last)


_BLOCK = 2**20


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _total(losses: Losses, operands: _Operands, rows: _Rows) -> Array:
    return jnp.sum(_losses(losses, operands, rows))


def _total_fwd(losses: Losses, operands: _Operands, rows: _Rows) -> tuple[Array, Any]:
    ones = jnp.ones(rows.labels.shape, wide(operands.weight.dtype))
    values, gradients = _gradients(losses, operands, rows, ones)
    return jnp.sum(values), (gradients, operands)


def _total_bwd(losses: Losses, residuals: Any, ct: Array) -> tuple[_Operands, None]:
    gradients, operands = residuals
    return jax.tree.map(lambda g, x: (ct * g).astype(x.dtype), gradients, operands), None


_total.defvjp(_total_fwd, _total_bwd)


def _total_batch(
    axis_size: int, batched: Any, losses: Losses, operands: _Operands, rows: _Rows
) -> Array | None:
    values = _each_batch(axis_size, batched, losses, operands, rows)
    return None if values is None else jnp.sum(values, range(1, values.ndim))


_total.defbatch(_total_batch)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _each(losses: Losses, operands: _Operands, rows: _Rows) -> Array:
    return _losses(losses, operands, rows)


def _each_fwd(losses: Losses, operands: _Operands, rows: _Rows) -> tuple[Array, Any]:
    return _each(losses, operands, rows), (operands, rows)


def _each_bwd(losses: Losses, residuals: Any, ct: Array) -> tuple[_Operands, None]:
    operands, rows = residuals
    _, gradients = _gradients(losses, operands, rows, ct)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands), None


_each.defvjp(_each_fwd, _each_bwd)


def _each_batch(
    axis_size: int, batched: Any, losses: Losses, operands: _Operands, rows: _Rows
) -> Array | None:
    """Under `vmap`: more rows, if that is all that there are more of, and no larger chunks."""
    batched_operands, batched_rows = batched
    of_rows = (batched_operands.hidden, batched_rows.labels, batched_rows.keep)
    if any(jax.tree.leaves((batched_operands[1:], batched_rows.rest))):
        return None  # other weights for other rows
    if rows.labels.ndim - batched_rows.labels != 2:
        return None  # chunks that XLA shares among devices

    def chunks_of(x: Array, is_batched: bool) -> Array:
        x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    arrays = (operands.hidden, rows.labels, rows.keep)
    hidden, labels, keep = map(chunks_of, arrays, of_rows)
    count, size = labels.shape
    # Small chunks are grouped, or each would be a matrix product of few rows.
    group = max(1, _chunk_size(operands.weight.shape[1]) // size)
    groups = _Chunks.of((count,), group)

    def of_group(params: list[Array], rest: list[Array], scores: Array, labels: Array) -> Array:
        by_chunk = [x.reshape(groups.size, size, *x.shape[1:]) for x in (scores, labels)]
        return jax.vmap(losses, in_axes=(None, None, 0, 0))(params, rest, *by_chunk).reshape(-1)

    def grouped(x: Array) -> Array:
        x = groups.split(x)
        return x.reshape(groups.count, groups.size * size, *x.shape[3:])

    operands = operands._replace(hidden=grouped(hidden))
    values = _each(of_group, operands, _Rows(grouped(labels), grouped(keep), rows.rest))
    return values.reshape(-1, size)[:count].reshape(axis_size, -1, size)


_each.defbatch(_each_batch)
