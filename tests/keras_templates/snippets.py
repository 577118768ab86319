"""Layers that must work, as a table of small models: kernels, activations, arithmetic, pools and shapes.

`snippets_models.py` enters the rest; `layers.py` runs them all, for each generation of Keras.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras_generation import has_activation, keras, layers, ops, path

IMAGE, SEQUENCE, TOKENS, VECTOR = (10, 10, 8), (14, 6), (9, 12), (16,)
IDS = (6,)
VOCABULARY = 11
SAMPLES = 48


@dataclass(frozen=True)
class Snippet:
    """One model.

    Args:
        name: of the model.
        shape: of its input, without the batch.
        build: from the symbolic input to the output or outputs.
        data: what the input holds: `normal`, `pixels` (0..255) or `ids`.
        travels: output codes that one flipped code in the middle may move the output by, at 8 bits: 1 where only the
            last rounding can differ, more where later ops magnify a difference.
        low_bits: whether it also goes through the low-bit quantizers.
    """

    name: str
    shape: tuple[int, ...]
    build: Callable[[Any], Any]
    data: str = "normal"
    travels: int = 1
    low_bits: bool = False

    def model(self) -> keras.Model:
        """The float model; weights that Keras starts as all 0 or all 1 are drawn at random."""
        keras.utils.set_random_seed(1)
        x = keras.Input(self.shape, dtype="int32" if self.data == "ids" else "float32", name="x")
        model = keras.Model(x, self.build(x), name=self.name)
        randomize(model)
        return model

    def samples(self, seed: int = 0) -> np.ndarray:
        """`SAMPLES` samples of the input."""
        rng = np.random.default_rng(seed)
        size = (SAMPLES, *self.shape)
        if self.data == "ids":
            return rng.integers(0, VOCABULARY, size).astype(np.int32)
        return (rng.uniform(0, 255, size) if self.data == "pixels" else rng.normal(size=size)).astype(np.float32)


def _uneven(shape: tuple[int, ...]) -> np.ndarray:
    """A kernel: a dead channel, a nearly dead one, a constant one, a single weight, a huge one, then ordinary ones."""
    w = np.random.default_rng(3).normal(0, 0.3, shape)
    w[..., 0], w[..., 1], w[..., 2] = 0, w[..., 1] * 1e-9, 0.25
    w[..., 3] *= np.arange(w[..., 3].size).reshape(w[..., 3].shape) == 0
    w[..., 4] *= 30
    return w


DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "bias": lambda rng, n: rng.normal(0, 0.3, n),
    "beta": lambda rng, n: rng.normal(0, 0.3, n),
    "gamma": lambda rng, n: np.concatenate([[-0.7, 0.0], rng.normal(1, 0.3, n)])[:n],
    "moving_mean": lambda rng, n: rng.normal(0, 0.3, n),
    "moving_variance": lambda rng, n: rng.uniform(0.2, 2, n),
    "alpha": lambda rng, n: rng.uniform(-0.3, 0.5, n),
}


def randomize(model: keras.Model, seed: int = 2) -> None:
    """Draw biases, norms' scales (one of them negative and one zero) and statistics.

    A layer whose name begins with `uneven` gets `_uneven` kernels and large biases, one that begins with `dead` no
    weights but large biases, and one that begins with `zero` neither.
    """
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        where, shape, size = path(variable), tuple(variable.shape), int(np.prod(variable.shape))
        role, odd = where.split("/")[-1], next((w for w in ("uneven", "dead", "zero") if w in where), "")
        if odd and role.endswith("kernel"):
            channels = (*shape[:-2], shape[-2] * shape[-1]) if "depthwise" in where else shape
            variable.assign(_uneven(channels).reshape(shape) if odd == "uneven" else np.zeros(shape))
        elif odd and role == "bias":
            variable.assign(np.resize([2.0, -3.0, 0.0, 1e-3, 5.0, -0.5], shape) * (odd != "zero"))
        elif role in DRAWS:
            variable.assign(DRAWS[role](rng, size).reshape(shape))


SNIPPETS: dict[str, Snippet] = {}


def snippet(shape: tuple[int, ...], name: str = "", **more: Any) -> Callable:
    """Enter a function from symbolic input to outputs."""

    def enter(build: Callable) -> Callable:
        key = name or build.__name__.strip("_")
        assert key not in SNIPPETS, key
        SNIPPETS[key] = Snippet(key, shape, build, **more)
        return build

    return enter


# -- layers with a kernel, alone and with a batch norm behind them ----------------------------------------------------

KERNELS: dict[str, tuple[tuple[int, ...], Callable[..., layers.Layer]]] = {
    "conv1d": (SEQUENCE, lambda **a: layers.Conv1D(5, 3, dilation_rate=2, padding="causal", **a)),
    "conv2d": (IMAGE, lambda **a: layers.Conv2D(6, 3, strides=2, padding="same", **a)),
    "conv2d_grouped": (IMAGE, lambda **a: layers.Conv2D(8, (3, 2), groups=4, **a)),
    "depthwise1d": (SEQUENCE, lambda **a: layers.DepthwiseConv1D(3, padding="same", **a)),
    "depthwise2d": (IMAGE, lambda **a: layers.DepthwiseConv2D(3, depth_multiplier=3, dilation_rate=2, **a)),
    "separable1d": (SEQUENCE, lambda **a: layers.SeparableConv1D(8, 3, **a)),
    "separable2d": (IMAGE, lambda **a: layers.SeparableConv2D(6, 3, strides=2, padding="same", **a)),
    "transpose1d": (SEQUENCE, lambda **a: layers.Conv1DTranspose(5, 4, strides=2, padding="valid", **a)),
    "transpose2d": (IMAGE, lambda **a: layers.Conv2DTranspose(5, 3, strides=2, padding="same", **a)),
    "dense": (VECTOR, lambda **a: layers.Dense(7, **a)),
    "dense_on_rank_3": (TOKENS, lambda **a: layers.Dense(7, **a)),
    "einsum_dense": (
        TOKENS,
        lambda **a: layers.EinsumDense("abc,cde->abde", output_shape=(None, 3, 4), bias_axes="de", **a),
    ),
}
for _name, (_shape, _make) in KERNELS.items():
    snippet(_shape, _name, travels=2, low_bits=True)(lambda x, make=_make: make(activation="relu")(x))
    snippet(_shape, f"{_name}_norm", travels=2, low_bits=True)(
        lambda x, make=_make: layers.ReLU()(layers.BatchNormalization()(make()(x)))
    )


@snippet(IDS, data="ids", low_bits=True)
def embedding(x):
    return layers.Dense(5)(layers.GlobalAveragePooling1D()(layers.Embedding(VOCABULARY, 8)(x)))


@snippet(IDS, data="ids")
def embedding_norm(x):
    return layers.BatchNormalization()(layers.Embedding(VOCABULARY, 8)(x))


@snippet(VECTOR, travels=2, low_bits=True)
def two_dense_norm(x):
    return layers.BatchNormalization()(layers.Dense(4)(layers.Dense(8, activation="relu")(x)))


# -- batch norm elsewhere ---------------------------------------------------------------------------------------------


@snippet(IMAGE)
def norm_alone(x):
    return layers.BatchNormalization()(x)


@snippet(IMAGE)
def norm_before_conv(x):
    return layers.Conv2D(4, 3, padding="same")(layers.BatchNormalization()(x))


@snippet(IMAGE, low_bits=True)
def norm_relu_conv(x):  # a pre-activation block, whose norm has nothing before it to go into
    y = layers.Conv2D(8, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
    return layers.Add()([x, y])


# -- activations: as an argument, as Activation and as a function -----------------------------------------------------

ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "softmax", "silu", "gelu", "hard_silu", "hard_sigmoid",
    "mish", "softplus", "selu", "softsign", "exponential", "log_sigmoid", "celu", "tanh_shrink", "soft_shrink",
)  # fmt: skip


# Where a function is steepest, one code of its input is several of its output: for tanh 128 times the input's scale.
STEEP = 8


def _activation(x, name):
    argument = layers.Conv2D(6, 3, activation=name)(x)
    layer = layers.Activation(name)(layers.Dense(5)(x))
    function = getattr(ops, name, None)  # not all of them are public operations
    return [argument, layer, *([function(layers.Dense(4)(x))] if function else [])]


for _name in filter(has_activation, ACTIVATIONS):
    snippet(IMAGE, f"activation_{_name}", travels=STEEP, low_bits=_name in ("relu", "sigmoid", "gelu"))(
        lambda x, name=_name: _activation(x, name)
    )


@snippet(IMAGE, travels=STEEP, low_bits=True)
def activation_layers(x):
    y = layers.Conv2D(6, 3)(x)
    return [
        layers.ReLU()(y), layers.ReLU(6.0)(y), layers.ReLU(2.5)(y), layers.ReLU(negative_slope=0.1, threshold=0.2)(y),
        layers.LeakyReLU(0.2)(y), layers.ELU(0.8)(y), layers.Softmax()(y), layers.PReLU(shared_axes=[1, 2])(y),
    ]  # fmt: skip


@snippet(IMAGE)
def relu_with_limit_in_conv(x):
    return layers.ReLU(2.5)(layers.Conv2D(4, 1)(x))


@snippet(IMAGE, low_bits=True)
def prelu_behind_norm(x):
    return layers.PReLU(shared_axes=[1, 2])(layers.BatchNormalization()(layers.Conv2D(6, 3)(x)))


@snippet(IMAGE, travels=STEEP)
def lambda_function(x):
    return layers.Lambda(lambda t: t * ops.sigmoid(1.7 * t))(layers.Conv2D(4, 1)(x))


# -- merges and arithmetic --------------------------------------------------------------------------------------------


def _three(x):
    return (
        layers.Conv2D(4, 1, activation="relu")(x),
        layers.Conv2D(4, 1)(x),
        layers.Conv2D(4, 1, activation="tanh")(x),
    )


@snippet(IMAGE, travels=2, low_bits=True)
def merges(x):
    a, b, c = _three(x)
    return [
        layers.Add()([a, b]), layers.Subtract()([a, b]), layers.Multiply()([a, b]), layers.Average()([a, b]),
        layers.Maximum()([a, b]), layers.Minimum()([b, c]), layers.Concatenate()([b, c]),
    ]  # fmt: skip


@snippet(IMAGE, travels=3)
def merges_of_many(x):
    a, b, c = _three(x)
    return [
        layers.Add()([a, b, c]), layers.Multiply()([a, b, c]), layers.Average()([a, b, c, b]),
        layers.Maximum()([a, b, c]), layers.Minimum()([a, b, c]), layers.Concatenate(axis=1)([a, b, c]),
    ]  # fmt: skip


@snippet(IMAGE, low_bits=True)
def concat_of_fixed_ranges(x):
    return layers.Concatenate()(
        [layers.Conv2D(4, 1, activation="sigmoid")(x), layers.Conv2D(4, 1, activation="relu6")(x), x]
    )


@snippet(TOKENS, low_bits=True)
def dot(x):
    return [
        layers.Dot(axes=(2, 2))([layers.Dense(5)(x), layers.Dense(5)(x)]),
        layers.Dot(axes=1)([layers.Dense(5)(layers.Flatten()(x)), layers.Dense(5)(layers.Flatten()(x))]),
    ]


@snippet(TOKENS, travels=3)  # through two roots
def dot_of_unit_vectors(x):
    flat = layers.Flatten()(x)
    return [
        layers.Dot(axes=1, normalize=True)([layers.Dense(5)(flat), layers.Dense(5)(flat)]),
        layers.Dot(axes=(2, -1), normalize=True)([layers.Dense(5)(x), layers.Dense(5)(x)]),
    ]


@snippet(IMAGE, travels=3)
def operators(x):
    a, b, _ = _three(x)
    return [a + b, a - b, a * b, b * 2, b + 1, 1 - b, -b, b / 3, (b * 2 + 1) / 3]


@snippet(IMAGE)
def constant_vector(x):
    return layers.Conv2D(4, 1)(x) * np.float32([0.5, -1, 2, 0])


@snippet(IMAGE, travels=6)  # the quotient and the reciprocal are steep where their denominator is small
def division(x):
    a = layers.Conv2D(4, 1, activation="sigmoid")(x)
    return [a / (a + 1), 1 / (a + 1)]


@snippet(IMAGE, travels=STEEP, low_bits=True)  # the clip has a finer scale than its input
def keras_ops(x):
    a, b, _ = _three(x)
    first, second = ops.split(b, 2, axis=-1)
    return [
        ops.abs(b), ops.sqrt(ops.relu(b) + 1), ops.maximum(a, b), ops.clip(b, -0.5, 0.7), ops.square(b),
        ops.mean(b, axis=(1, 2)), ops.sum(b, axis=-1), ops.max(b, axis=1), ops.min(b, axis=1),
        ops.stack([first, second], axis=1), ops.transpose(b, (0, 2, 1, 3)), ops.reshape(b, (-1, 400)),
        ops.pad(b, ((0, 0), (1, 2), (0, 0), (0, 0))), ops.tile(b, (1, 1, 2, 1)), ops.softmax(b),
    ]  # fmt: skip


@snippet(IMAGE)
def slicing(x):
    y = layers.Conv2D(6, 1)(x)
    return [y[:, 1:-1, ::2], y[..., ::-1], y[:, 3], y[:, :, 2:5, :3]]


@snippet(TOKENS)
def matmul(x):
    y = layers.Dense(5)(x)
    return ops.matmul(y, ops.transpose(layers.Dense(5)(x), (0, 2, 1)))


# -- pools and shapes -------------------------------------------------------------------------------------------------


@snippet(IMAGE, low_bits=True)
def pools_2d(x):
    y = layers.Conv2D(4, 1)(x)
    return [
        layers.MaxPooling2D(2, padding="same")(y), layers.AveragePooling2D(3, 2, padding="same")(y),
        layers.AveragePooling2D(2)(y), layers.GlobalAveragePooling2D()(y), layers.GlobalMaxPooling2D()(y),
        layers.GlobalAveragePooling2D(keepdims=True)(y),
    ]  # fmt: skip


@snippet(SEQUENCE)
def pools_1d(x):
    y = layers.Conv1D(4, 1)(x)
    return [
        layers.MaxPooling1D(2)(y), layers.AveragePooling1D(3, 2, padding="same")(y),
        layers.GlobalAveragePooling1D()(y), layers.GlobalMaxPooling1D()(y),
    ]  # fmt: skip


@snippet(IMAGE, low_bits=True)
def resizes(x):
    y = layers.Conv2D(4, 1)(x)
    return [
        layers.UpSampling2D(2)(y), layers.UpSampling2D(2, interpolation="bilinear")(y), layers.Resizing(17, 13)(y),
        layers.Resizing(20, 20, interpolation="nearest")(y),
    ]  # fmt: skip


@snippet(IMAGE)
def shapes_2d(x):
    y = layers.Conv2D(4, 1)(x)
    y = layers.ZeroPadding2D(((1, 2), (0, 3)))(y)
    y = layers.Permute((2, 1, 3))(layers.Cropping2D(((1, 0), (2, 2)))(y))
    return [layers.Reshape((-1, 2))(y), layers.Flatten()(y)]


@snippet(SEQUENCE)
def shapes_1d(x):
    y = layers.Cropping1D(2)(layers.ZeroPadding1D(3)(layers.UpSampling1D(2)(x)))
    return [y, layers.RepeatVector(4)(layers.Dense(3)(layers.Flatten()(y)))]
