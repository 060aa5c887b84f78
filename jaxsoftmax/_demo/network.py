"""The classifier: two small convolutions and two dense layers, as pure functions of a dict."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxsoftmax._demo.digits import NUM_CLASSES

Params = dict[str, Array]

_KERNEL = 3
_CHANNELS = (16, 32)
_HIDDEN = 64
_SIDE_AFTER_POOLING = 4


@jax.jit
def init(key: PRNGKeyArray) -> Params:
    """Draws the first weights (He initialization); biases start at zero."""
    shapes = {
        "conv1": (_KERNEL, _KERNEL, 1, _CHANNELS[0]),
        "conv2": (_KERNEL, _KERNEL, *_CHANNELS),
        "dense": (_SIDE_AFTER_POOLING**2 * _CHANNELS[1], _HIDDEN),
        "scores": (_HIDDEN, NUM_CLASSES),
    }
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(shapes))
    params: Params = {}
    for layer_key, (name, shape) in zip(keys, shapes.items(), strict=True):
        params[f"{name}/weight"] = draw(layer_key, shape)
        params[f"{name}/bias"] = jnp.zeros(shape[-1])
    return params


def apply(params: Params, images: Float[Array, "n 8 8"]) -> Float[Array, "n classes"]:
    """Scores images.

    Args:
      params: What `init` draws and training improves.
      images: as in `Split`.

    Returns:
      One score for each class.
    """
    x = jax.nn.relu(_convolve(params, "conv1", images[..., None]))
    x = _max_pool(jax.nn.relu(_convolve(params, "conv2", x)))
    x = jax.nn.relu(_dense(params, "dense", x.reshape(len(x), -1)))
    return _dense(params, "scores", x)


def _dense(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}/weight"] + params[f"{name}/bias"]


def _convolve(params: Params, name: str, x: Array) -> Array:
    # One product with all nine shifted copies side by side. On a CPU, XLA's own convolution is
    # some 30 times slower inside a scan.
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, row : row + height, column : column + width]
        for row in range(_KERNEL)
        for column in range(_KERNEL)
    ]
    weight = params[f"{name}/weight"]
    kernel = weight.reshape(-1, weight.shape[-1])
    return jnp.concatenate(shifted, axis=-1) @ kernel + params[f"{name}/bias"]


def _max_pool(x: Array) -> Array:
    count, height, width, channels = x.shape
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
