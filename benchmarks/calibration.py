"""Calibration: fits of a temperature that is known, and measures of calibration."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

import jaxsoftmax as jsm
from benchmarks.charts import Growth, Ratios
from benchmarks.command import Topic, main
from benchmarks.measuring import Comparison, Entry, Missing
from benchmarks.peers import peer
from jaxsoftmax import calibration

OURS = "jsm.calibration"
FIT = "fit of a temperature"
FIT_OTHERS = "fit of other temperatures"
SCALING = "fit of a scale and a bias per class"
MEASURES = "measures"
SAMPLING = "sampling"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      rows: how many examples.
      classes: of the fits of a temperature.
      temperatures: that labels are drawn at.
      of_others: classes of the rest, and the most that peers fit a temperature to.
      scalings: the other fits.
    """

    rows: int = 100_000
    classes: Sequence[int] = (10, 100, 1000)
    temperatures: Sequence[float] = (0.25, 1.0, 4.0)
    of_others: int = 100
    scalings: Sequence[str] = ("fit_vector_scaling", "fit_matrix_scaling")


TINY = Sizes(200, (10,), (1.0,), 10, ("fit_vector_scaling",))


def synthetic(rows: int, classes: int, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Logits of spread 5, and labels drawn from their softmax at the temperature."""
    keys = jax.random.split(jax.random.key(classes))
    logits = 5 * jax.random.normal(keys[0], (rows, classes))
    return logits, jsm.sample(keys[1], logits, temperature=temperature)


@jax.jit
def _exact_loss(log_t: jax.Array, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean negative log-likelihood in float64, by blocks of rows."""

    def of_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        z = block[0].astype(jnp.float64) / jnp.exp(log_t)
        true = jnp.take_along_axis(z, block[1][:, None], 1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(z, -1) - true)

    blocks = logits.reshape(100, -1, logits.shape[1]), labels.reshape(100, -1)
    return jnp.sum(jax.lax.map(of_block, blocks)) / len(labels)


def excess(temperature: float, near: float, logits: jax.Array, labels: jax.Array) -> float:
    """By how much the loss is above the least that SciPy finds in float64, starting near one."""
    with jax.enable_x64(True):

        def loss(log_t: float) -> float:
            return float(_exact_loss(jnp.float64(log_t), logits, labels))

        bracket = np.log(near) - 0.05, np.log(near) + 0.05
        best = scipy.optimize.minimize_scalar(loss, bracket=bracket, tol=1e-7)
        return loss(np.log(temperature)) - float(best.fun)


def of_fit(sizes: Sizes, classes: int, temperature: float) -> Comparison:
    """A temperature is fitted; peers fit one of them, to fewer classes, for they are slow."""
    args = functools.cache(functools.partial(synthetic, sizes.rows, classes, temperature))

    def quality(fitted: jax.Array) -> str:
        off = f"off by {abs(float(fitted) / temperature - 1):.2%}"
        if temperature != 1 and classes > sizes.of_others:
            return off  # the least loss would take too long
        above = excess(float(fitted), temperature, *args())
        return f"{off}, loss above SciPy's in float64 by {above:.0e}"

    ours = f"{OURS}.fit_temperature"
    entries: dict[str, Entry | Missing] = {ours: Entry(calibration.fit_temperature, result=quality)}
    if temperature == 1 and classes <= sizes.of_others:
        entries |= {
            "scipy minimize_scalar": Entry(
                _fit_by_scipy, ours, jit=False, prepare=_in_numpy, result=quality
            ),
            "sklearn CalibratedClassifierCV": peer(
                ("sklearn.calibration", "sklearn.frozen", "sklearn.base"),
                _fit_by_sklearn,
                ours,
                jit=False,
                prepare=_in_numpy,
                result=quality,
            ),
        }
    size = f"{sizes.rows} × {classes}, drawn at {temperature}"
    if temperature != 1:  # it takes as long
        return Comparison(FIT_OTHERS, size, classes, entries, args, rounds=1, seconds=0)
    return Comparison(FIT, size, classes, entries, args)


def _in_numpy(*args: jax.Array) -> Sequence[np.ndarray]:
    return tuple(map(np.array, args))


def _fit_by_scipy(logits: np.ndarray, labels: np.ndarray) -> float:
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        z = logits * np.float32(np.exp(-log_t))
        return float(np.mean(scipy.special.logsumexp(z, axis=1) - z[rows, labels]))

    return np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3, 3)).x)


def _fit_by_sklearn(sklearn_calibration: Any, frozen: Any, base: Any) -> Callable[..., float]:
    class Given(base.ClassifierMixin, base.BaseEstimator):
        """A classifier whose scores are what it is given."""

        def fit(self, x: np.ndarray, y: np.ndarray) -> Any:
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return self.classes_[x.argmax(1)]

    def fit(logits: np.ndarray, labels: np.ndarray) -> float:
        estimator = frozen.FrozenEstimator(Given().fit(logits, labels))
        whole = sklearn_calibration.CalibratedClassifierCV(
            estimator, method="temperature", ensemble=False
        ).fit(logits, labels)
        return 1 / whole.calibrated_classifiers_[0].calibrators[0].beta_

    return fit


def of_scaling(sizes: Sizes) -> Comparison:
    """The fits with more parameters."""
    rows, classes = sizes.rows, sizes.classes[0]
    entries = {f"{OURS}.{name}": Entry(getattr(calibration, name)) for name in sizes.scalings}
    args = functools.partial(synthetic, rows, classes, 1.0)
    return Comparison(SCALING, f"{rows} × {classes}", classes, entries, args)


def of_measures(rows: int, classes: int) -> Comparison:
    """Measures of calibration, on probabilities."""

    def args() -> tuple[jax.Array, jax.Array]:
        logits, labels = synthetic(rows, classes, 1.5)
        return jsm.softmax(logits), labels

    def ours(f: Callable[..., jax.Array]) -> dict[str, Entry | Missing]:
        return {f"{OURS}.{f.__name__}": Entry(f, result=_value)}

    def theirs(module: str, name: str, same: str, make: Callable) -> dict[str, Entry | Missing]:
        options = {"jit": False, "prepare": _in_numpy, "result": _value}
        return {name: peer((module,), make, f"{OURS}.{same}", **options)}

    ece, mce = "expected_calibration_error", "maximum_calibration_error"
    brier, nll = "brier_score", "negative_log_likelihood"
    entries = (
        ours(calibration.expected_calibration_error)
        | theirs("netcal.metrics", "netcal ECE", ece, lambda m: m.ECE(15).measure)
        | ours(calibration.maximum_calibration_error)
        | theirs("netcal.metrics", "netcal MCE", mce, lambda m: m.MCE(15).measure)
        | ours(calibration.classwise_calibration_error)
        | ours(calibration.smooth_calibration_error)
        | theirs("relplot", "relplot smECE", "smooth_calibration_error", _relplot_smooth)
        | ours(calibration.brier_score)
        | theirs("sklearn.metrics", "sklearn brier_score_loss", brier, _sklearn_brier)
        | ours(calibration.negative_log_likelihood)
        | theirs("sklearn.metrics", "sklearn log_loss", nll, _sklearn_log_loss)
    )
    return Comparison(MEASURES, f"{rows} × {classes}", classes, entries, args, seconds=0.5)


def _value(value: Any) -> str:
    return f"gives {float(value):.7f}"


def _relplot_smooth(relplot: Any) -> Callable[..., float]:
    return lambda probs, labels: relplot.smECE(
        probs.max(1), (probs.argmax(1) == labels).astype(float)
    )


def _sklearn_brier(metrics: Any) -> Callable[..., float]:
    return lambda probs, labels: metrics.brier_score_loss(
        labels, probs, labels=np.arange(probs.shape[1])
    )


def _sklearn_log_loss(metrics: Any) -> Callable[..., float]:
    return lambda probs, labels: metrics.log_loss(labels, probs, labels=np.arange(probs.shape[1]))


def of_sampling(rows: int, classes: int) -> Comparison:
    """Draws from a softmax."""
    entries: dict[str, Entry | Missing] = {
        "jax.random.categorical": Entry(jax.random.categorical, "jsm.sample"),
        "jsm.sample": Entry(jsm.sample),
        "jsm.gumbel_softmax": Entry(jsm.gumbel_softmax),
    }

    def args() -> tuple[jax.Array, jax.Array]:
        return jax.random.key(0), synthetic(rows, classes, 1.0)[0]

    return Comparison(SAMPLING, f"{rows} × {classes}", classes, entries, args)


def steps(quick: bool) -> list[Comparison]:
    """All comparisons."""
    sizes = TINY if quick else Sizes()
    fits = [of_fit(sizes, classes, t) for t in sizes.temperatures for classes in sizes.classes]
    few = sizes.rows, sizes.of_others
    return [
        *sorted(fits, key=lambda fit: fit.operation),
        of_scaling(sizes),
        of_measures(*few),
        of_sampling(*few),
    ]


NOTES = """
- Calibration errors spend nine tenths of their time on finding the most probable class of each row.
  For this, XLA on a CPU looks at one number at a time, and NumPy looks at several at once. (Ours
  work under `jit` and `vmap`, and on any device.)
- `sample` and `gumbel_softmax` draw noise with twice as many bits as `jax.random.categorical`. With
  fewer, entries with a probability below one in a million are drawn too often.
- A fit takes seconds to compile, once per shape: L-BFGS and its line search are loops within loops.
  For a single small set of examples, scikit-learn is faster.
"""

TOPIC = Topic(
    "calibration",
    "Calibration and sampling",
    """
The labels are drawn at a known temperature, and each fit has to find it from float32 logits. The
fits are compared with scikit-learn, and with a minimization by SciPy in NumPy. The tables say how
far each temperature is from the known one, and by how much its loss is above the smallest. The
measures are compared with netcal, relplot and scikit-learn, and sampling with
`jax.random.categorical`.
""",
    steps,
    (
        Growth("Fit of a temperature to 100,000 rows", FIT, "time", "classes", "ms"),
        Ratios(
            "jaxsoftmax relative to its peers (less is better)",
            "{name}",
            "{size}",
            ("ours_time",),
            "time, relative",
        ),
    ),
    NOTES,
)

if __name__ == "__main__":
    main([TOPIC])
