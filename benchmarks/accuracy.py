"""Errors in units in the last place, against the exact answer in 50 digits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import jaxsoftmax as jsm
from tests.tools import exact_log_softmax, ulp_error

SCALES = (1, 10, 30, 100)
LENGTHS = (10, 1000, 100_000)


def main() -> None:
    """Prints one table per function."""
    rng = np.random.default_rng(0)
    for name, ours, theirs, finish in (
        ("softmax", jsm.softmax, jax.nn.softmax, mpmath.exp),
        ("log_softmax", jsm.log_softmax, jax.nn.log_softmax, lambda v: v),
    ):
        print(f"| {name}, float32: scale, length | jaxsoftmax | jax.nn |\n|---|---|---|")
        for length in LENGTHS:
            for scale in SCALES:
                worst = [0.0, 0.0]
                for _ in range(max(1, 2000 // length)):
                    row = (rng.normal(size=length) * scale).astype(np.float32)
                    with mpmath.workdps(50):
                        exact = [finish(v) for v in exact_log_softmax(row)]
                        for i, f in enumerate((ours, theirs)):
                            worst[i] = max(worst[i], ulp_error(f(jnp.asarray(row)), exact))
                print(f"| {scale}, {length} | {worst[0]:.2f} | {worst[1]:.2f} |")
        print()
    print("| log_softmax, one class ahead by | jaxsoftmax | jax.nn | exact |\n|---|---|---|---|")
    for lead in (20.0, 45.0, 80.0):
        row = np.array([lead, 0.0], np.float32)
        got = [float(f(jnp.asarray(row))[0]) for f in (jsm.log_softmax, jax.nn.log_softmax)]
        with mpmath.workdps(50):
            exact = float(exact_log_softmax(row)[0])
        print(f"| {lead:.0f} | {got[0]:.6g} | {got[1]:.6g} | {exact:.6g} |")


if __name__ == "__main__":
    main()
