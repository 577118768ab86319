"""Convolutions with arrays of one's own, in layers of one's own and as functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from keras_generation import IS_KERAS3, keras, layers, ops

from keras_templates.bad_input import refused
from keras_templates.composed import computed
from keras_templates.edges import exported
from kquant.api import quantize_model
from kquant.core.errors import UnsupportedError

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 9, 8, 4)).astype("float32")
ROWS = IMAGES[:, 0]
BLUR = np.einsum("i,j,c->ijc", *[[0.25, 0.5, 0.25]] * 2, np.ones(4)).astype("float32")[..., None]

KERNEL = np.ones((1, 1, 4, 2), np.float32)


class Convolution(layers.Layer):
    """A convolution with its own kernel and bias."""

    def __init__(self, function: Any, shape: tuple[int, ...], outputs: int, twice: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.function, self.kernel_shape, self.outputs, self.twice = function, shape, outputs, twice

    def build(self, shape: Any) -> None:
        self.w = self.add_weight(name="w", shape=self.kernel_shape, initializer="glorot_uniform")
        self.b = self.add_weight(name="b", shape=(self.outputs,), initializer="normal")
        super().build(shape)

    def call(self, x: Any) -> Any:
        y = self.function(x, self.w) + self.b
        return self.function(tf.nn.relu(y), self.w) if self.twice else tf.nn.relu(y)


def own(function: Any, *shape: int, outputs: int = 6, twice: bool = False) -> Any:
    return Convolution(function, shape, outputs, twice, name="own")


CASES = {
    "tf_conv2d": (IMAGES, own(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), 3, 3, 4, 6)),
    "tf_strides": (IMAGES, own(lambda x, w: tf.nn.conv2d(x, w, [1, 2, 3, 1], "VALID"), 3, 2, 4, 6)),
    "tf_dilated": (IMAGES, own(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME", dilations=[2, 1]), 3, 3, 4, 6)),
    "tf_depthwise": (
        IMAGES, own(lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, 2, 2, 1], "SAME"), 3, 3, 4, 2, outputs=8),
    ),
    "tf_twice": (IMAGES, own(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), 3, 3, 4, 4, outputs=4, twice=True)),
    "tf_blur": (IMAGES, lambda x: layers.Lambda(lambda v: tf.nn.depthwise_conv2d(v, BLUR, [1] * 4, "SAME"))(x)),
}  # fmt: skip
if IS_KERAS3:
    CASES |= {
        "conv": (IMAGES, own(lambda x, w: ops.conv(x, w, (2, 1), "same"), 3, 3, 4, 6)),
        "conv1d": (ROWS, own(lambda x, w: ops.conv(x, w, 1, "valid", dilation_rate=2), 3, 4, 6)),
        "depthwise": (IMAGES, own(lambda x, w: ops.depthwise_conv(x, w, 2, "same"), 3, 3, 4, 1, outputs=4)),
        "blur": (IMAGES, lambda x: ops.depthwise_conv(x, BLUR, 1, "same")),
    }
else:
    CASES["groups"] = (IMAGES, own(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), 3, 3, 2, 6))


def model_of(name: str) -> tuple[Any, np.ndarray]:
    data, build = CASES[name]
    keras.utils.set_random_seed(1)
    x = keras.Input(data.shape[1:], name="x")
    return keras.Model(x, build(x), name=name), data


@pytest.mark.parametrize("name", CASES)
def test_a_convolution_with_an_array_of_ones_own_is_a_layer(name, tmp_path):
    model, data = model_of(name)
    expected = model.predict(data, verbose=0)
    np.testing.assert_allclose(computed(model, [data]), expected, rtol=1e-4, atol=1e-5)  # float32 in another order
    qmodel, _ = exported(model, data, tmp_path / "m.tflite")
    # A weight, an input and at most two outputs are rounded to 8 bits.
    assert np.abs(qmodel.predict(data, verbose=0) - expected).max() < 6 * np.ptp(expected) / 255


@pytest.mark.parametrize("name", ["tf_conv2d", "tf_twice", "tf_depthwise"])
def test_its_kernel_is_one_and_is_trained(name):
    model, data = model_of(name)
    qmodel = quantize_model(model, calibration_data=data)
    kernels = [w for w in qmodel.trainable_weights if len(w.shape) == 4]
    assert [tuple(w.shape) for w in kernels] == [CASES[name][1].kernel_shape]
    before = kernels[0].numpy()
    qmodel.compile("sgd", "mse")
    qmodel.fit(data, np.ones((len(data), *qmodel.output_shape[1:])), verbose=0)
    assert np.abs(kernels[0].numpy() - before).max() > 0


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: tf.nn.conv2d(x, KERNEL, 1, [[0, 0], [1, 0], [0, 1], [0, 0]]), ("'own'", "padding")),
        (lambda x: tf.nn.conv3d(x[..., None], KERNEL[:, :, None, :1], [1] * 5, "SAME"), ("'own'", "conv3d")),
    ],
)
def test_other_convolutions_are_refused(function, words):
    x = keras.Input((8, 8, 4), name="x")
    refused(UnsupportedError, words, quantize_model, keras.Model(x, layers.Lambda(function, name="own")(x)))
