"""Errors in units in the last place, against the exact answer in 50 digits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import jaxsoftmax as jsm

SCALES = (1, 10, 30, 100)
LENGTHS = (10, 1000, 100_000)


def exact_log_softmax(row: np.ndarray) -> list[mpmath.mpf]:
    """Log-softmax of one row in 50 digits."""
    with mpmath.workdps(50):
        scores = [mpmath.mpf(float(v)) for v in row]
        top = max(scores)
        # The maximum apart, or log1p has nothing to work on.
        gaps = [v - top for v in scores]
        gaps.remove(0)
        log_sum = mpmath.log1p(mpmath.fsum(mpmath.exp(g) for g in gaps))
        return [v - top - log_sum for v in scores]


def ulps(got: np.ndarray, exact: list[mpmath.mpf]) -> float:
    """The largest error in units of the last place, among answers that are normal numbers."""
    tiny = np.finfo(got.dtype).tiny
    worst = 0.0
    for value, truth in zip(got, exact, strict=True):
        rounded = got.dtype.type(float(truth))
        if abs(rounded) > 2 * tiny:
            error = abs(mpmath.mpf(float(value)) - truth) / mpmath.mpf(
                float(np.spacing(abs(rounded)))
            )
            worst = max(worst, float(error))
    return worst


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
                            worst[i] = max(worst[i], ulps(np.asarray(f(jnp.asarray(row))), exact))
                print(f"| {scale}, {length} | {worst[0]:.2f} | {worst[1]:.2f} |")
        print()
    print("| log_softmax, one class ahead by | jaxsoftmax | jax.nn | exact |\n|---|---|---|---|")
    for lead in (20.0, 45.0, 80.0):
        row = np.array([lead, 0.0], np.float32)
        got = [float(f(jnp.asarray(row))[0]) for f in (jsm.log_softmax, jax.nn.log_softmax)]
        exact = float(exact_log_softmax(row)[0])
        print(f"| {lead:.0f} | {got[0]:.6g} | {got[1]:.6g} | {exact:.6g} |")


if __name__ == "__main__":
    main()
