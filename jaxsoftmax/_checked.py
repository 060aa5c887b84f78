"""Errors of values, which `checkify` sees and nobody else."""

from collections.abc import Sequence
from typing import Any

from jaxsoftmax import _jax


def checked(x: Any, known: Any, message: str) -> Any:
    """`x` as it is; under `checkify`, an error if not all of `known` hold."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        x, known = primals
        return [checked(x, known, message)], [tangents[0]]

    return _jax.call(lambda x, _: [x], jvp, lambda *_: None, [x, known], message)[0]
