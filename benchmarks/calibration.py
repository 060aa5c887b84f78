"""Fits of a temperature that is known: how near, how good, how fast; and speed of the rest."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import jaxsoftmax as jsm
from benchmarks.timing import medians

ROWS = 100_000
CLASSES = (10, 100, 1000)
TEMPERATURES = (0.25, 1.0, 4.0)


def synthetic(classes: int, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Logits of spread 5, and labels drawn from their softmax at the temperature."""
    keys = jax.random.split(jax.random.key(classes))
    logits = 5 * jax.random.normal(keys[0], (ROWS, classes))
    return logits, jsm.sample(keys[1], logits, temperature=temperature)


@jax.jit
def exact_loss(log_t: jax.Array, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean negative log-likelihood in float64, by blocks of rows."""

    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        z = block[0].astype(jnp.float64) / jnp.exp(log_t)
        true = jnp.take_along_axis(z, block[1][:, None], 1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(z, -1) - true)

    blocks = logits.reshape(100, -1, logits.shape[1]), labels.reshape(100, -1)
    return jnp.sum(jax.lax.map(of_block, blocks)) / len(labels)


def best_loss(logits: jax.Array, labels: jax.Array) -> float:
    """The optimum, as SciPy finds it in float64."""
    with jax.enable_x64(True):
        found = scipy.optimize.minimize_scalar(
            lambda log_t: float(exact_loss(jnp.float64(log_t), logits, labels)),
            bounds=(-3, 3),
            options={"xatol": 1e-7},
        )
    return float(found.fun)


def main() -> None:
    """Prints a table of fits, and one of times."""
    print(f"{ROWS:,} rows, float32, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| classes | temperature | off by | loss over SciPy's | first call | seconds |")
    print("|---" * 6 + "|")
    for classes in CLASSES:
        for temperature in TEMPERATURES:
            logits, labels = jax.block_until_ready(synthetic(classes, temperature))
            start = time.perf_counter()
            fitted = float(jsm.calibration.fit_temperature(logits, labels))
            first = time.perf_counter() - start
            fit = jsm.calibration.fit_temperature
            seconds = medians({"fit": fit}, logits, labels, rounds=3)["fit"]
            with jax.enable_x64(True):
                loss = float(exact_loss(jnp.log(jnp.float64(fitted)), logits, labels))
            above = loss - best_loss(logits, labels)
            off = abs(fitted / temperature - 1)
            print(
                f"| {classes} | {temperature} | {off:.2%} | {above:.1e} | {first:.1f} | "
                f"{seconds:.2f} |"
            )
    logits, labels = synthetic(100, 1.0)
    probs = jsm.softmax(logits)
    key = jax.random.key(0)
    functions = {
        "softmax": lambda: jsm.softmax(logits),
        "jax.random.categorical": lambda: jax.random.categorical(key, logits),
        "sample": lambda: jsm.sample(key, logits),
        "gumbel_softmax": lambda: jsm.gumbel_softmax(key, logits),
        "expected_calibration_error": lambda: jsm.calibration.expected_calibration_error(
            probs, labels
        ),
        "classwise_calibration_error": lambda: jsm.calibration.classwise_calibration_error(
            probs, labels
        ),
        "smooth_calibration_error": lambda: jsm.calibration.smooth_calibration_error(probs, labels),
        "brier_score": lambda: jsm.calibration.brier_score(probs, labels),
        "fit_vector_scaling": lambda: jsm.calibration.fit_vector_scaling(logits, labels),
    }
    print("\n| 100,000 x 100 | seconds |\n|---|---|")
    for name, seconds in medians(functions, rounds=5).items():
        print(f"| {name} | {seconds:.4f} |")
    # What NumPy makes of the same in float64.
    confidence = np.asarray(probs, np.float64).max(1)
    right = np.asarray(probs).argmax(1) == np.asarray(labels)
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    gaps = np.bincount(bins, right - confidence, 15)
    error = float(jsm.calibration.expected_calibration_error(probs, labels))
    print(f"\nECE less NumPy's in float64: {error - np.abs(gaps).sum() / ROWS:.1e}")


if __name__ == "__main__":
    main()
