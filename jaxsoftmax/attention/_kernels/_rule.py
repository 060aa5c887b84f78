"""The derivatives of attention by kernels: the first in reverse mode is theirs, others XLA's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsoftmax._closed import is_smooth
from jaxsoftmax._differentiation import custom_vjp
from jaxsoftmax._linear_pair import linear_pair
from jaxsoftmax._reductions import sum_to
from jaxsoftmax._scores import with_ndim
from jaxsoftmax.attention._blocks import Wanted, instantiated
from jaxsoftmax.attention._kernels._tiles import F32, Call
from jaxsoftmax.attention._prepared import OF_NORMALIZER, of_normalizer

Arrays = Mapping[str, Array]


class Kernels(NamedTuple):
    """Those of one platform; what is kept is theirs alone.

    Arrays go by name: queries are (B, N, T, H), keys (B, K, H, S), values (B, K, V, S).

    Attributes:
      forward: `(call, arrays, keep) -> (output, kept)`: the output, (B, N, T, V), and what `keep`
        says whether to keep.
      backward: `(call, arrays, kept, ct, wanted) -> cotangents`, of what is `wanted`, given that of
        the output. Those of numbers are one for each query, (B, N, T, 1), still to be summed.
    """

    forward: Callable[..., tuple[Array, dict[str, Array]]]
    backward: Callable[..., dict[str, Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """All that is known while tracing.

    Attributes:
      kernels: what computes it.
      call: what kernels know.
      reference: the same by XLA, of the arrays by name.
      params: gives the parameters of the form, given the arrays of the normalizer by name.
      temperature: divides the scores: a number; None: 1, or an array of the normalizer.
    """

    kernels: Kernels
    call: Call
    reference: Callable[[Arrays], Array]
    params: Callable[[dict[str, Array]], tuple[Array, ...]]
    temperature: float | None = None

    def arrays(self, given: Arrays) -> dict[str, Array]:
        """What kernels read, by the names that they have for it; differentiable."""
        own, arrays = of_normalizer(given)
        arrays |= {f"param {i}": x.astype(F32) for i, x in enumerate(self.params(own))}
        temperature = own.get("temperature", self.temperature)
        if temperature is not None:
            arrays["temperature"] = with_ndim(jnp.asarray(temperature), 4).astype(F32)
        return arrays

    def forward(self, given: Arrays, keep: bool) -> tuple[Array, dict[str, Array]]:
        """The output, and what is kept."""
        return self.kernels.forward(self.call, self.arrays(given), keep)

    def pull_back(self, wanted: Sequence[str], point: tuple[Arrays, Any], ct: Array) -> list[Array]:
        """The cotangents of what is wanted."""
        given, kept = point

        def arrays_of(*args: Array) -> dict[str, Array]:
            found = self.arrays({**given, **dict(zip(wanted, args, strict=True))})
            return {name: x for name, x in found.items() if is_smooth(x)}

        arrays, pullback = jax.vjp(arrays_of, *(given[name] for name in wanted))
        names = {n for n in wanted if n in arrays}
        if any(name.startswith(OF_NORMALIZER) for name in wanted):
            names |= {n for n in arrays if n == "temperature" or n.startswith("param")}
        found = self.kernels.backward(self.call, self.arrays(given), kept, ct, sorted(names))
        return list(pullback({n: _like(found.get(n), x) for n, x in arrays.items()}))

    def pull_reference(
        self, wanted: Sequence[str], point: tuple[Arrays, Any], ct: Array
    ) -> list[Array]:
        """The same by XLA, of which derivatives can be taken."""
        given, _ = point
        _, pullback = jax.vjp(self._of(wanted, given), *(given[name] for name in wanted))
        return list(pullback(ct))

    def push_forward(
        self, wanted: Sequence[str], point: tuple[Arrays, Any], tangents: Sequence[Array]
    ) -> Array:
        """The tangent of the output, given those of what is wanted."""
        given, _ = point
        primals = [given[name] for name in wanted]
        return jax.jvp(self._of(wanted, given), primals, list(tangents))[1]

    def _of(self, wanted: Sequence[str], given: Arrays) -> Callable[..., Array]:
        return lambda *args: self.reference({**given, **dict(zip(wanted, args, strict=True))})


def _like(ct: Array | None, x: Array) -> Array:
    """A cotangent of `x`, summed to its shape."""
    return jnp.zeros_like(x) if ct is None else sum_to(ct, x.shape).astype(x.dtype)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def attend(attention: Attention, arrays: dict[str, Array]) -> Array:
    """Attention of the arrays, (B, N, T, V), in float32."""
    return attention.forward(arrays, keep=False)[0]


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _attend_and_keep(attention: Attention, arrays: dict[str, Array]) -> tuple[Array, Any]:
    """The same, and what is kept, which has no derivatives of its own."""
    return attention.forward(arrays, keep=True)


def _attend_fwd(attention: Attention, primals: dict[str, Any]) -> tuple[Any, Any]:
    arrays = {name: primal.value for name, primal in primals.items()}
    wanted = (n for n, x in arrays.items() if primals[n].perturbed and is_smooth(x))
    out, kept = _attend_and_keep(attention, arrays)
    return out, (Wanted(tuple(wanted)), arrays, kept)


def _attend_and_keep_fwd(attention: Attention, primals: dict[str, Any]) -> tuple[Any, Any]:
    out, residuals = _attend_fwd(attention, primals)
    return (out, residuals[-1]), residuals


def _attend_bwd(attention: Attention, residuals: Any, ct: Any) -> tuple[dict[str, Any]]:
    wanted, arrays, kept = residuals
    ct = instantiated(ct, arrays["query"])
    found = linear_pair(
        functools.partial(attention.pull_back, wanted.which),
        functools.partial(attention.push_forward, wanted.which),
        (arrays, kept),
        ct,
        reference=functools.partial(attention.pull_reference, wanted.which),
    )
    return (dict.fromkeys(arrays) | dict(zip(wanted.which, found, strict=True)),)


def _attend_and_keep_bwd(attention: Attention, residuals: Any, ct: Any) -> tuple[dict[str, Any]]:
    return _attend_bwd(attention, residuals, ct[0])


attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_and_keep.defvjp(_attend_and_keep_fwd, _attend_and_keep_bwd, symbolic_zeros=True)
