"""What those who call wrongly are told: the argument, what came, what was wanted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as jsm
from jaxsoftmax import calibration as cal
from tests import tools
from tests.cases import FUNCTIONS, LOSSES, named

every_function = pytest.mark.parametrize("case", **named(FUNCTIONS))
every_loss = pytest.mark.parametrize("case", **named(LOSSES))
tempered = pytest.mark.parametrize(
    "case", **named([c for c in FUNCTIONS if c.takes("temperature")])
)

X = np.ones((2, 3), np.float32)
Y = np.zeros(2, int)
W = np.ones((3, 5))
IDS = np.array([0, 0, 1])
Q = np.ones((1, 4, 2, 8), np.float32)
KEY = np.array([0, 1], np.uint32)

# The whole sentence, and the call that gets it.
SENTENCES = [
    # Scores, axes and masks.
    (TypeError, "x must be an array, got str.", lambda: jsm.softmax("scores")),
    (TypeError, "x must be an array, got list.", lambda: jsm.log_softmax(["a", "b"])),
    (TypeError, "x must be an array, got NoneType.", lambda: jsm.softmax(None)),
    (
        TypeError,
        "labels must be numbers, got dtype <U1.",
        lambda: cal.fit_temperature(X, np.array(["a", "b"])),
    ),
    (
        TypeError,
        "key must be a key of jax.random.key, got dtype float32.",
        lambda: jsm.sample(X, jax.random.key(0)),
    ),
    (TypeError, "x must be an array, got list.", lambda: jsm.entmax15([1.0, 2.0])),
    (TypeError, "x must be real numbers, got dtype bool.", lambda: jsm.sparsemax(X > 0)),
    (TypeError, "x must be real numbers, got dtype complex64.", lambda: jsm.log_softmax(X * 1j)),
    (
        ValueError,
        "axis 2 is out of range for an array of 2 dimensions.",
        lambda: jsm.softmax(X, axis=2),
    ),
    (
        ValueError,
        "axis must not name an axis twice, got (0, -2).",
        lambda: jsm.sparsemax(X, axis=(0, -2)),
    ),
    (
        TypeError,
        "axis must be an int, a mesh axis name, a tuple of these or None, got 1.0.",
        lambda: jsm.entmax15(X, axis=1.0),
    ),
    (
        TypeError,
        "axis must be an int, a mesh axis name, a tuple of these or None, got True.",
        lambda: jsm.logsumexp(X, axis=True),
    ),
    (
        TypeError,
        "axis must be an int, a mesh axis name, a tuple of these or None, got ndarray.",
        lambda: jsm.softmax(X, X > 0),
    ),
    (
        ValueError,
        "num_segments must be a positive integer or None, got 2.0.",
        lambda: jsm.softmax(X, segment_ids=IDS, num_segments=2.0),
    ),
    (ValueError, "axis -1 is out of range for an array of 0 dimensions.", lambda: jsm.softmax(3.0)),
    (TypeError, "where must be boolean, got dtype float32.", lambda: jsm.softmax(X, where=X)),
    (
        ValueError,
        "where must broadcast to shape (2, 3), got shape (4,).",
        lambda: jsm.softpick(X, where=np.ones(4, bool)),
    ),
    (
        ValueError,
        "axis must be one array axis, got None.",
        lambda: jsm.stick_breaking(X, axis=None),
    ),
    (ValueError, "axes must be two axes, got (0,).", lambda: jsm.sinkhorn(X, axes=(0,))),
    (
        ValueError,
        "row_sums and column_sums must have the same total, got 2.0 and 3.0.",
        lambda: jsm.sinkhorn(X, row_sums=1, column_sums=1),
    ),
    (
        ValueError,
        "column_sums must broadcast to one value per column, shape (3,), got shape (2,).",
        lambda: jsm.sinkhorn(X, column_sums=np.ones(2)),
    ),
    (ValueError, "tol must not be negative or NaN, got -1.", lambda: jsm.sinkhorn(X, tol=-1)),
    (
        ValueError,
        "num_iterations must be at least 1, got 0.",
        lambda: jsm.sinkhorn(X, num_iterations=0),
    ),
    (
        TypeError,
        "num_iterations must be an integer, got float.",
        lambda: jsm.sinkhorn(X, num_iterations=2.0),
    ),
    (
        TypeError,
        "k must be an integer or an array of integers, got float.",
        lambda: jsm.top_k_mask(X, 1.5),
    ),
    (
        TypeError,
        "num_bins must be an integer, got str.",
        lambda: cal.expected_calibration_error(X, Y, num_bins="ten"),
    ),
    (
        TypeError,
        "axis must be an int, a mesh axis name, a tuple of these or None, got an array that is "
        "traced (with jax.jit, name it in static_argnames).",
        lambda: jax.jit(jsm.softmax)(X, 0),
    ),
    (
        TypeError,
        "axis must be an int, a mesh axis name, a tuple of these or None, got a tuple with an "
        "array that is traced (with jax.jit, name it in static_argnames).",
        lambda: jax.jit(jsm.softmax)(X, (0, 1)),
    ),
    (
        TypeError,
        "reduction must be known while tracing, got list.",
        lambda: jsm.linear_cross_entropy(X, W, Y, reduction=["mean"]),
    ),
    (TypeError, "probs must be an array, got str.", lambda: cal.brier_score("probs", Y)),
    (TypeError, "loss must be a function, got int.", lambda: cal.fit_temperature(X, Y, loss=3)),
    (TypeError, "key must be an array, got str.", lambda: jsm.dot_product_attention(Q, "k", Q)),
    (
        ValueError,
        "logits_soft_cap must be a number, got an array of shape (2,).",
        lambda: jsm.linear_cross_entropy(X, W, Y, logits_soft_cap=jnp.ones(2)),
    ),
    (
        TypeError,
        "normalizer must hold its options by name, for scores come first, got 1.5 by position.",
        lambda: jsm.dot_product_attention(Q, Q, Q, normalizer=functools.partial(jsm.entmax, 1.5)),
    ),
    (TypeError, "query must be an array, got list.", lambda: jsm.attention_fn([1.0], Q, Q)),
    # Options.
    (
        ValueError,
        "temperature must not be negative or NaN, got -1.0.",
        lambda: jsm.softmax(X, temperature=-1),
    ),
    (
        ValueError,
        "temperature must not be negative or NaN, got nan.",
        lambda: jsm.softmax(X, temperature=np.nan),
    ),
    (
        ValueError,
        "temperature must broadcast to one value per row, shape (2, 1), got shape (2,).",
        lambda: jsm.softmax(X, temperature=np.ones(2)),
    ),
    (
        TypeError,
        "temperature must be an array, got str.",
        lambda: jsm.softmax(X, temperature="warm"),
    ),
    (TypeError, "alpha must be an array, got str.", lambda: jsm.entmax(X, alpha="1.5")),
    (
        TypeError,
        "sink must be an array, got builtin_function_or_method.",
        lambda: jsm.softmax(X, sink=print),
    ),
    (
        ValueError,
        "temperature must be positive, got 0, which has no limit in sinkhorn.",
        lambda: jsm.sinkhorn(X, temperature=0),
    ),
    (
        ValueError,
        "sink must broadcast to one value per row, shape (2, 1), got shape (3,).",
        lambda: jsm.softmax(X, sink=np.zeros(3)),
    ),
    (ValueError, "alpha must be at least 1 and finite, got 0.5.", lambda: jsm.entmax(X, alpha=0.5)),
    (
        ValueError,
        "alpha must broadcast to one value per row, shape (2, 1), got shape (3,).",
        lambda: jsm.entmax(X, alpha=np.full(3, 1.5)),
    ),
    (ValueError, "alpha must be above 1 and finite, got 1.0.", lambda: jsm.normmax(X, alpha=1.0)),
    (
        ValueError,
        "budget must be from 0 to the number of entries in a row, 3, got 4.0.",
        lambda: jsm.budget_sparsemax(X, 4.0),
    ),
    (
        TypeError,
        "budget must be real numbers, got dtype complex64.",
        lambda: jsm.budget_sparsemax(X, np.complex64(1j)),
    ),
    (
        TypeError,
        "segment_ids must be integers, got dtype float32.",
        lambda: jsm.softmax(X, segment_ids=np.float32(IDS)),
    ),
    (
        ValueError,
        "segment_ids must have shape (3,), the length of the axis, got shape (2,).",
        lambda: jsm.softmax(X, segment_ids=IDS[:2]),
    ),
    (
        ValueError,
        "num_segments goes with segment_ids, got no segment_ids.",
        lambda: jsm.softmax(X, num_segments=2),
    ),
    (
        ValueError,
        "axis must be one array axis if segment_ids are given, got None.",
        lambda: jsm.softmax(X, axis=None, segment_ids=IDS),
    ),
    (
        ValueError,
        "num_segments must be given if segment_ids is traced, got None.",
        lambda: jax.jit(lambda ids: jsm.softmax(X, segment_ids=ids))(IDS),
    ),
    # Losses.
    (
        ValueError,
        "targets must have the shape of scores without axis 1, (2,), if they are classes, got "
        "shape (3,).",
        lambda: jsm.cross_entropy(X, np.zeros(3, int)),
    ),
    (
        ValueError,
        "targets must be integer classes, or distributions of the shape of scores (2, 3), or 1 "
        "instead of a size, got float32 of shape (2,).",
        lambda: jsm.cross_entropy(X, np.zeros(2, np.float32)),
    ),
    (TypeError, "targets must be an array, got str.", lambda: jsm.cross_entropy(X, "cat")),
    (
        ValueError,
        "targets must have the shape of scores without axes (0, 1), (), if they are classes, got "
        "shape (2,).",
        lambda: jsm.sparsemax_loss(X, np.zeros(2, int), None),
    ),
    (TypeError, "targets must be real numbers, got dtype bool.", lambda: jsm.entmax_loss(X, X > 0)),
    (
        ValueError,
        "alpha must be at least 1 and finite, got 0.5.",
        lambda: jsm.entmax_loss(X, Y, alpha=0.5),
    ),
    (
        ValueError,
        "label_smoothing must be from 0 to 1, got 1.5.",
        lambda: jsm.cross_entropy(X, Y, label_smoothing=1.5),
    ),
    (
        ValueError,
        "z_loss must be finite and not negative, got -1.0.",
        lambda: jsm.cross_entropy(X, Y, z_loss=-1.0),
    ),
    (
        TypeError,
        "mapping must be a function, got str.",
        lambda: jsm.fenchel_young_loss("softmax", jsm.shannon_entropy),
    ),
    (
        ValueError,
        "entropy must give one value per row, shape (2,), got shape ().",
        lambda: jsm.fenchel_young_loss(jsm.softmax, lambda p, axis: jnp.sum(p))(X, Y),
    ),
    (
        ValueError,
        "hidden must have shape (..., 4), to go with weight of shape (4, 5), got shape (2, 3).",
        lambda: jsm.linear_cross_entropy(X, np.ones((4, 5)), Y),
    ),
    (
        ValueError,
        "labels must have the shape of hidden without its last axis, (2,), got shape (3,).",
        lambda: jsm.linear_cross_entropy(X, W, np.zeros(3, int)),
    ),
    (
        ValueError,
        "bias must have shape (5,), got shape (3,).",
        lambda: jsm.linear_cross_entropy(X, W, Y, bias=np.ones(3)),
    ),
    (
        ValueError,
        "reduction must be 'mean', 'sum' or 'none', got 'max'.",
        lambda: jsm.linear_cross_entropy(X, W, Y, reduction="max"),
    ),
    (
        ValueError,
        "chunk_size must be a positive integer or None, got 0.",
        lambda: jsm.linear_cross_entropy(X, W, Y, chunk_size=0),
    ),
    (
        ValueError,
        "logits_soft_cap must be positive, got -2.0.",
        lambda: jsm.linear_cross_entropy(X, W, Y, logits_soft_cap=-2.0),
    ),
    # Attention.
    (
        ValueError,
        "query and key must have the shapes (B, T, N, H) and (B, S, K, H), H not 0, got "
        "(1, 4, 2, 8) and (1, 4, 2, 4).",
        lambda: jsm.dot_product_attention(Q, Q[..., :4], Q),
    ),
    (
        ValueError,
        "value must have the shape of key (1, 4, 2, 8) except for the last axis, got (1, 2, 2, 8).",
        lambda: jsm.dot_product_attention(Q, Q, Q[:, :2]),
    ),
    (
        TypeError,
        "value must have the dtype of query, float32, got float16.",
        lambda: jsm.dot_product_attention(Q, Q, Q.astype(np.float16)),
    ),
    (
        ValueError,
        "bias must broadcast to shape (1, 2, 4, 4), batch, heads, queries and keys, got shape "
        "(3, 4).",
        lambda: jsm.dot_product_attention(Q, Q, Q, np.ones((3, 4), np.float32)),
    ),
    (
        TypeError,
        "mask must be boolean, got dtype float32.",
        lambda: jsm.dot_product_attention(Q, Q, Q, mask=np.ones((4, 4), np.float32)),
    ),
    (
        TypeError,
        "normalizer must be a function, got float.",
        lambda: jsm.dot_product_attention(Q, Q, Q, normalizer=1.5),
    ),
    (
        ValueError,
        "local_window_size must be one or two ints, before and after, not negative, got (1, -1).",
        lambda: jsm.dot_product_attention(Q, Q, Q, local_window_size=(1, -1)),
    ),
    (
        ValueError,
        "local_window_size must be one or two ints, before and after, not negative, got an array "
        "that is traced (with jax.jit, name it in static_argnames).",
        lambda: jax.jit(lambda n: jsm.dot_product_attention(Q, Q, Q, local_window_size=(n, 0)))(1),
    ),
    (
        ValueError,
        "dropout_rate must be a number from 0 to less than 1, got an array that is traced (with "
        "jax.jit, name it in static_argnames).",
        lambda: jax.jit(lambda r: jsm.dot_product_attention(Q, Q, Q, dropout_rate=r))(0.5),
    ),
    (
        ValueError,
        "dropout_key must be given for a dropout_rate of 0.5, got None.",
        lambda: jsm.dot_product_attention(Q, Q, Q, dropout_rate=0.5),
    ),
    (
        ValueError,
        "return_residual needs the normalizer softmax, got sparsemax.",
        lambda: jsm.dot_product_attention(Q, Q, Q, return_residual=True, normalizer=jsm.sparsemax),
    ),
    # Choosing, sampling and measures.
    (ValueError, "k must not be negative, got -1.", lambda: jsm.top_k_mask(X, -1)),
    (ValueError, "p must be from 0 to 1, got 1.1.", lambda: jsm.top_p_mask(X, 1.1)),
    (ValueError, "p must be from 0 to 1, got -0.1.", lambda: jsm.min_p_mask(X, -0.1)),
    (ValueError, "axis must be one array axis, got None.", lambda: jsm.top_k_mask(X, 1, axis=None)),
    (
        TypeError,
        "key must be a key of jax.random.key, got dtype float32.",
        lambda: jsm.sample(np.float32(1), X),
    ),
    (
        ValueError,
        "key must be a single key, got keys of shape (2,).",
        lambda: jsm.sample(jax.random.split(jax.random.key(0)), X),
    ),
    (TypeError, "hard must be True or False, got int.", lambda: jsm.gumbel_softmax(KEY, X, hard=1)),
    (
        TypeError,
        "replace must be True or False, got str.",
        lambda: jsm.sample(KEY, X, replace="False"),
    ),
    (TypeError, "mapping must be a function, got int.", lambda: jsm.straight_through(3)),
    # None where a number belongs.
    (
        TypeError,
        "temperature must be an array, got NoneType.",
        lambda: jsm.softmax(X, temperature=None),
    ),
    (TypeError, "alpha must be an array, got NoneType.", lambda: jsm.entmax(X, None)),
    (
        TypeError,
        "segment_ids must be an array, got str.",
        lambda: jsm.softmax(X, segment_ids="a"),
    ),
    (
        TypeError,
        "normalizer must be a function, got NoneType.",
        lambda: jsm.dot_product_attention(Q, Q, Q, normalizer=None),
    ),
    (
        TypeError,
        "is_causal must be True or False, got str.",
        lambda: jsm.dot_product_attention(Q, Q, Q, is_causal="no"),
    ),
    (
        TypeError,
        "return_residual must be True or False, got int.",
        lambda: jsm.dot_product_attention(Q, Q, Q, return_residual=1),
    ),
    (
        TypeError,
        "score_mod must return a number per score, got booleans: mask_mod tells which scores take "
        "part.",
        lambda: jsm.dot_product_attention(Q, Q, Q, score_mod=lambda score, *_: score > 0),
    ),
    (
        ValueError,
        "mapping must have a parameter axis, got one with (x).",
        lambda: jsm.straight_through(lambda x: x),
    ),
    (
        ValueError,
        "hard must return the shape of the mapping (2, 3), got shape (1, 3).",
        lambda: jsm.straight_through(jsm.softmax, lambda x, axis: x[:1])(X),
    ),
    (
        ValueError,
        "alpha must be positive and finite, got -1.0.",
        lambda: jsm.tsallis_entropy(X, -1.0),
    ),
    (
        TypeError,
        "p must be real numbers, got dtype complex64.",
        lambda: jsm.shannon_entropy(X * 1j),
    ),
    # Calibration.
    (
        ValueError,
        "labels must have shape (2,) if they are classes, got shape (3,).",
        lambda: cal.fit_temperature(X, np.zeros(3, int)),
    ),
    (
        ValueError,
        "class_weights must have shape (3,), one per class, got shape (2,).",
        lambda: cal.fit_vector_scaling(X, Y, class_weights=np.ones(2)),
    ),
    (
        ValueError,
        "off_diagonal_penalty must be a number, got shape (2,).",
        lambda: cal.fit_matrix_scaling(X, Y, off_diagonal_penalty=np.ones(2)),
    ),
    (
        ValueError,
        "labels must have shape (3,), one per row of probs, got shape (2,).",
        lambda: cal.expected_calibration_error(X[0], Y),
    ),
    (
        ValueError,
        "norm must be a number from 1 to inf, got 0.5.",
        lambda: cal.expected_calibration_error(X, Y, norm=0.5),
    ),
    (
        ValueError,
        "num_bins must be at least 1, got 0.",
        lambda: cal.expected_calibration_error(X, Y, num_bins=0),
    ),
    (
        ValueError,
        'binning must be "width" or "mass", got \'equal\'.',
        lambda: cal.maximum_calibration_error(X, Y, binning="equal"),
    ),
    (
        TypeError,
        "labels must be integer classes, got dtype float32.",
        lambda: cal.brier_score(X, np.float32(Y)),
    ),
    (
        ValueError,
        "labels must have shape (2,), one per row of probs, got shape (3,).",
        lambda: cal.negative_log_likelihood(X, np.zeros(3, int)),
    ),
]


@pytest.mark.parametrize(
    ("error", "sentence", "call"), SENTENCES, ids=[sentence for _, sentence, _ in SENTENCES]
)
def test_sentence(error, sentence, call):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_sentences_are_many():
    assert len(SENTENCES) >= 40
    assert len({sentence.split()[0] for _, sentence, _ in SENTENCES}) >= 20


# Every function of the table, every loss.

WRONG_CALLS = {
    "axis too large": ({"axis": 2}, ValueError, "axis 2 is out of range for an array of 2 dim"),
    "axis too small": ({"axis": -3}, ValueError, "axis -3 is out of range for an array of 2 dim"),
    "one of several axes": ({"axis": (0, 5)}, ValueError, "axis 5 is out of range"),
    "axis twice": ({"axis": (0, -2)}, ValueError, r"axis must not name an axis twice, got \(0, -2"),
    "axis a float": ({"axis": 1.0}, TypeError, r"axis must be an int.* or None, got 1\.0"),
    "axis a boolean": ({"axis": True}, TypeError, "axis must be an int.* or None, got True"),
    "axis of floats": ({"axis": (0.5,)}, TypeError, r"axis must be an int.*, got \(0\.5,\)"),
    "axis nested": ({"axis": ((0,),)}, TypeError, "axis must be an int"),
    "where of floats": ({"where": X}, TypeError, "where must be boolean, got dtype float32"),
    "where of integers": (
        {"where": np.ones(3, "int32")},
        TypeError,
        "where must be boolean, got dtype int32",
    ),
    "where too long": (
        {"where": np.ones(4, bool)},
        ValueError,
        r"where must broadcast to shape \(2, 3\), got shape \(4,\)",
    ),
    "where too deep": (
        {"where": np.ones((1, 2, 3), bool)},
        ValueError,
        r"where must broadcast to shape \(2, 3\), got shape \(1, 2, 3\)",
    ),
    "x complex": ({"x": X * 1j}, TypeError, "x must be real numbers, got dtype complex64"),
    "x boolean": ({"x": X > 0}, TypeError, "x must be real numbers, got dtype bool"),
}
WRONG_TEMPERATURES = {
    "complex": (X * 1j, TypeError, "temperature must be real numbers, got dtype complex64"),
    "a Python complex": (
        1j,
        TypeError,
        f"temperature must be real numbers, got dtype {np.result_type(tools.FLOAT, 1j)}",
    ),
    "boolean": (np.array(True), TypeError, "temperature must be real numbers, got dtype bool"),
    "one per score": (
        np.ones((2, 3)),
        ValueError,
        r"temperature must broadcast to one value per row, shape \(2, 1\), got shape \(2, 3\)",
    ),
    "one per column": (
        np.ones(3),
        ValueError,
        r"temperature must broadcast to one value per row, shape \(2, 1\), got shape \(3,\)",
    ),
    "without the axis": (
        np.ones(2),
        ValueError,
        r"temperature must broadcast to one value per row, shape \(2, 1\), got shape \(2,\)",
    ),
}


@every_function
@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_wrong_call(case, wrong):
    kwargs, error, message = WRONG_CALLS[wrong]
    kwargs = {"x": X, **kwargs}
    with pytest.raises(error, match=message):
        case.fun(**kwargs)
    if "axis" not in kwargs:
        with pytest.raises(error, match=message):
            jax.jit(case.fun)(**kwargs)
        with pytest.raises(error, match=message):
            jax.eval_shape(case.fun, **kwargs)


@tempered
@pytest.mark.parametrize("wrong", WRONG_TEMPERATURES)
def test_wrong_temperature(case, wrong):
    temperature, error, message = WRONG_TEMPERATURES[wrong]
    with pytest.raises(error, match=message):
        case.fun(X, temperature=temperature)


@every_function
@pytest.mark.parametrize("x", ["scores", None, [1.0, 2.0], (1, 2), {"a": 1.0}, "a key"], ids=repr)
def test_x_that_is_no_array(case, x):
    x = jax.random.key(0) if x == "a key" else x
    with pytest.raises(TypeError, match=r"^x must be"):
        case.fun(x)


@every_function
def test_calls_that_python_refuses(case):
    with pytest.raises(TypeError, match="positional"):
        case.fun(X, -1, None, 2.0)  # temperature is for keywords
    with pytest.raises(TypeError, match="tau"):
        case.fun(X, tau=2.0)


def test_arguments_that_others_take_are_named_with_those_of_ours():
    for fun, name in ((jsm.logsumexp, "keepdims"), (jsm.logsumexp, "b"), (jsm.softmax, "dim")):
        message = rf"{fun.__name__} takes the arguments x, axis, where, temperature, .* got {name}"
        with pytest.raises(TypeError, match=message):
            fun(X, **{name: 1})


def test_alpha_below_1_is_named():
    with pytest.raises(ValueError, match=r"alpha must be at least 1 and finite, got 0\.5"):
        jsm.entmax(X, 0.5)


def test_hardmax_has_no_temperature():
    with pytest.raises(TypeError, match="temperature"):
        jsm.hardmax(X, temperature=2.0)


WRONG_LOSS_CALLS = {
    "a class too many": (
        (X, np.zeros(3, int)),
        ValueError,
        r"targets must have the shape of scores without axis 1, \(2,\), if they are classes, "
        r"got shape \(3,\)",
    ),
    "classes with the axis": ((X, np.ones((2, 1), int)), ValueError, "targets .* got shape .2, 1"),
    "classes as floats": (
        (X, np.zeros(2, np.float32)),
        ValueError,
        r"targets must be integer classes, or distributions of the shape of scores \(2, 3\), or 1 "
        r"instead of a size, got float32 of shape \(2,\)",
    ),
    "classes along two axes": (
        (X, np.zeros(2, int), None),
        ValueError,
        r"targets must have the shape of scores without axes \(0, 1\), \(\), .* got shape \(2,\)",
    ),
    "complex scores": ((X * 1j, np.zeros(2, int)), TypeError, "scores must be real numbers"),
    "complex targets": ((X, X * 1j), TypeError, "targets must be real numbers, got dtype complex"),
    "boolean targets": ((X, X > 0), TypeError, "targets must be real numbers, got dtype bool"),
    "axis": ((X, np.zeros(2, int), 7), ValueError, "axis 7 is out of range"),
}


@every_loss
@pytest.mark.parametrize("wrong", WRONG_LOSS_CALLS)
def test_wrong_call_of_a_loss(case, wrong):
    (scores, targets, *axis), error, message = WRONG_LOSS_CALLS[wrong]
    with pytest.raises(error, match=message):
        case.fun(scores, targets, **({"axis": axis[0]} if axis else {}))


@every_loss
def test_wrong_options_of_a_loss(case):
    targets = np.zeros(2, int)
    with pytest.raises(ValueError, match="temperature must not be negative or NaN, got -1"):
        case.fun(X, targets, temperature=-1)
    with pytest.raises(TypeError, match="where must be boolean"):
        case.fun(X, targets, where=X)
    with pytest.raises(ValueError, match="temperature must broadcast to one value per row"):
        case.fun(X, targets, temperature=X)


def test_alpha_of_entmax_loss():
    with pytest.raises(ValueError, match=r"alpha must be at least 1 and finite, got 0\.5"):
        jsm.entmax_loss(X, np.zeros(2, int), alpha=0.5)


@tempered
@pytest.mark.parametrize("t", [-1, -0.5, np.float32(-2), np.int32(-1), -np.inf, np.nan], ids=repr)
def test_negative_temperature(case, t):
    with pytest.raises(ValueError, match=r"temperature must not be negative or NaN, got -?[\d.in]"):
        case.fun(np.ones(3), temperature=t)
