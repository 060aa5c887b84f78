"""One call of every public function that computes: small arrays, float32, what users pass."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from jaxsoftmax import calibration
from tests.cases import entmax43

# Long enough that sums go by lanes and attention has several blocks.
ROWS, LENGTH = 4, 130
_RNG = np.random.default_rng(0)
X = np.float32(3 * _RNG.normal(size=(ROWS, LENGTH)))
P = np.float32(_RNG.dirichlet(np.ones(LENGTH), size=ROWS))
LABELS = np.int32([0, 129, 3, 64])
KEY = np.uint32([0, 7])
QUERY = np.float32(_RNG.normal(size=(1, 40, 4, 8)))
PAIR = np.float32(_RNG.normal(size=(2, 1, 40, 2, 8)))
LOGITS = X[:, :5].repeat(4, 0) + np.float32(_RNG.normal(size=(16, 5)))
PROBS = np.float32(_RNG.dirichlet(np.ones(5), size=16))
CLASSES = np.int32(_RNG.integers(5, size=16))


@jsm.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (_sine(x), x), lambda x, ct: (ct * jnp.cos(x),))

CALLS = {
    "custom_vjp": (_sine, (X,)),
    "softmax": (lambda x, t, s: jsm.softmax(x, temperature=t, sink=s), (X, X[:, :1] ** 2, X[0, 0])),
    "log_softmax": (jsm.log_softmax, (X,)),
    "logsumexp": (jsm.logsumexp, (X,)),
    "sparsemax": (jsm.sparsemax, (X,)),
    "entmax": (jsm.entmax, (X, np.float32(1.3))),
    "entmax15": (jsm.entmax15, (X,)),
    "normmax": (jsm.normmax, (X, np.float32(1.5))),
    "budget_sparsemax": (jsm.budget_sparsemax, (X, np.float32(2.5))),
    "softpick": (jsm.softpick, (X,)),
    "stick_breaking": (jsm.stick_breaking, (X,)),
    "hardmax": (jsm.hardmax, (X,)),
    "sinkhorn": (jsm.sinkhorn, (X,)),
    "log_sinkhorn": (
        lambda x, a, tol: jsm.log_sinkhorn(x, row_sums=a, tol=tol),
        (X, X[:, 0] ** 2, np.float32(0.1)),
    ),
    "sinkhorn_residual": (jsm.sinkhorn_residual, (P,)),
    "shannon_entropy": (jsm.shannon_entropy, (P,)),
    "tsallis_entropy": (jsm.tsallis_entropy, (P, np.float32(1.5))),
    "support_size": (jsm.support_size, (P,)),
    "cross_entropy": (jsm.cross_entropy, (X, LABELS)),
    "sparsemax_loss": (jsm.sparsemax_loss, (X, LABELS)),
    "entmax_loss": (jsm.entmax_loss, (X, P)),
    "kl_divergence": (jsm.kl_divergence, (X, X[::-1])),
    "threshold_mapping": (entmax43, (X,)),
    "fenchel_young_loss": (
        jsm.fenchel_young_loss(jsm.sparsemax, functools.partial(jsm.tsallis_entropy, alpha=2.0)),
        (X, LABELS),
    ),
    "linear_cross_entropy": (jsm.linear_cross_entropy, (X[:, :8], X[:1] * X[0, :8, None], LABELS)),
    "dot_product_attention": (
        functools.partial(jsm.dot_product_attention, is_causal=True, block_size=16),
        (QUERY, *PAIR),
    ),
    "attention_fn": (functools.partial(jsm.attention_fn, normalizer=jsm.entmax15), (QUERY, *PAIR)),
    "top_k_mask": (functools.partial(jsm.top_k_mask, k=3), (X,)),
    "top_p_mask": (jsm.top_p_mask, (X, np.float32(0.9))),
    "min_p_mask": (jsm.min_p_mask, (X, np.float32(0.1))),
    "sample": (jsm.sample, (KEY, X)),
    "gumbel_softmax": (functools.partial(jsm.gumbel_softmax, hard=True), (KEY, X)),
    "straight_through": (jsm.straight_through(jsm.sparsemax), (X,)),
    "calibration.fit_temperature": (calibration.fit_temperature, (LOGITS, CLASSES)),
    "calibration.fit_vector_scaling": (calibration.fit_vector_scaling, (LOGITS, CLASSES)),
    "calibration.fit_matrix_scaling": (calibration.fit_matrix_scaling, (LOGITS, CLASSES)),
    "calibration.beta_scaling": (calibration.beta_scaling, (PROBS, *np.ones((3, 5), "float32"))),
    "calibration.isotonic": (
        calibration.isotonic,
        (PROBS, *np.linspace([0, 0.1], [1, 0.9], 4, axis=1, dtype="float32")[:, None].repeat(5, 1)),
    ),
    **{
        f"calibration.{name}": (getattr(calibration, name), (PROBS, CLASSES))
        for name in (
            "expected_calibration_error",
            "maximum_calibration_error",
            "classwise_calibration_error",
            "smooth_calibration_error",
            "brier_score",
            "brier_decomposition",
            "negative_log_likelihood",
            "reliability_curve",
            "fit_beta_scaling",
            "fit_isotonic",
        )
    },
}
NAMES = [
    # Its empty bins are NaN.
    pytest.param(name, marks=pytest.mark.asks_for_nan if name.endswith("reliability_curve") else ())
    for name in CALLS
]


def public_functions():
    """The names of all public functions but those that draw."""
    for prefix, module in (("", jsm), ("calibration.", calibration)):
        for name, value in vars(module).items():
            is_result = isinstance(value, type) and issubclass(value, (tuple, jsm.Form))
            is_module = isinstance(value, types.ModuleType)
            if not name.startswith("_") and not is_result and not is_module:
                yield prefix + name


def value_and_gradients(fun):
    """What `fun` gives, and the gradients of all of it in every argument of floats."""

    def both(*args):
        floats = [i for i, x in enumerate(args) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]

        def of_floats(*values):
            merged = list(args)
            for i, value in zip(floats, values, strict=True):
                merged[i] = value
            return fun(*merged)

        out, pull_back = jax.vjp(of_floats, *(args[i] for i in floats))
        return out, pull_back(jax.tree.map(_cotangent, out))

    return both


def _cotangent(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return np.zeros(x.shape, jax.dtypes.float0)
    return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
