"""Layers and models of a user's own code that makes arrays for the sizes of its input: exported as they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from keras_generation import IS_KERAS3, keras, layers, ops

import kquant
from keras_templates.bad_input import refused
from keras_templates.composed import computed
from keras_templates.edges import exported
from kquant.api import quantize_model
from kquant.core.errors import UnsupportedError

RNG = np.random.default_rng(4)
LENGTH, WIDTH = 6, 4
X = RNG.normal(size=(32, LENGTH, WIDTH)).astype(np.float32)
IDS = RNG.integers(0, 20, (32, LENGTH)).astype(np.int32)
IMAGES = RNG.uniform(size=(16, 12, 12, 3)).astype(np.float32)


def sizes(x: Any) -> Any:
    return ops.shape(x) if IS_KERAS3 else tf.shape(x)


def counted(n: Any) -> Any:
    return ops.arange(start=0, stop=n, step=1) if IS_KERAS3 else tf.range(start=0, limit=n, delta=1)


class Positions(layers.Layer):
    """An embedding of the positions, added to what the layer is given; `table` makes of it an embedding of ids."""

    def __init__(self, longest: int, width: int, ids: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        self.settings = {"longest": longest, "width": width, "ids": ids}
        self.table = layers.Embedding(ids, width, name="table") if ids else None
        self.places = layers.Embedding(longest, width, name="places")

    def call(self, x: Any) -> Any:
        places = self.places(counted(sizes(x)[1]))
        return (self.table(x) if self.table is not None else x) + places

    def get_config(self) -> dict:
        return {**super().get_config(), **self.settings}


class ClassToken(layers.Layer):
    """A trained token before those of each sample, and a trained array added to all of them."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(name="token", shape=(1, 1, shape[-1]), initializer="normal")
        self.places = self.add_weight(name="places", shape=(1, shape[1] + 1, shape[-1]), initializer="normal")
        super().build(shape)

    def call(self, x: Any) -> Any:
        batch = sizes(x)[0]
        if IS_KERAS3:
            return ops.concatenate([ops.broadcast_to(self.token, (batch, 1, WIDTH)), x], axis=1) + self.places
        return tf.concat([tf.tile(self.token, (batch, 1, 1)), x], axis=1) + self.places


class PositionsAlone(layers.Layer):
    """Positions for the caller to add; its result has nothing of the values that it is given."""

    def build(self, shape: Any) -> None:
        self.places = self.add_weight(name="places", shape=(9, shape[-1]), initializer="normal")
        super().build(shape)

    def call(self, x: Any) -> Any:
        rows = self.places[: x.shape[1]]
        return ops.broadcast_to(rows, sizes(x)) if IS_KERAS3 else tf.broadcast_to(rows, sizes(x))


class Patches(layers.Layer):
    """Patches of images as a sequence, reshaped with the size of the batch."""

    def __init__(self, size: int = 4, **kwargs: Any):
        super().__init__(**kwargs)
        self.size = size

    def call(self, images: Any) -> Any:
        if IS_KERAS3:
            batch, height, width, channels = ops.shape(images)
            patches = ops.image.extract_patches(images, size=self.size)
            count = (height // self.size) * (width // self.size)
            return ops.reshape(patches, (batch, count, self.size * self.size * channels))
        sides, ones = [1, self.size, self.size, 1], [1, 1, 1, 1]
        patches = tf.image.extract_patches(images, sizes=sides, strides=sides, rates=ones, padding="VALID")
        return tf.reshape(patches, [tf.shape(images)[0], -1, patches.shape[-1]])

    def get_config(self) -> dict:
        return {**super().get_config(), "size": self.size}


class Unsaid(layers.Layer):
    """A block that does not say how it is made again."""

    def __init__(self, make: Callable, **kwargs: Any):
        super().__init__(**kwargs)
        self.first, self.second = make(), layers.Dense(WIDTH, name="second")

    def call(self, x: Any) -> Any:
        return x + self.second(self.first(x))


def unsaid() -> layers.Layer:
    return Unsaid(lambda: layers.Dense(8, activation="relu", name="first"))


OWN: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "tokens_and_positions": (IDS, lambda x: layers.Dense(3)(Positions(9, WIDTH, ids=20)(x))),
    "positions": (X, lambda x: layers.Dense(3)(Positions(LENGTH, WIDTH)(x))),
    "class_token": (X, lambda x: layers.Dense(3)(ClassToken()(x))),
    "positions_alone": (X, lambda x: layers.Dense(3)(x + PositionsAlone()(x))),
    "patches": (IMAGES, lambda x: layers.Dense(3)(Positions(9, 48)(Patches()(x)))),
    "unsaid": (X, lambda x: layers.Dense(3)(unsaid()(x))),
}


def model_of(name: str) -> tuple[Any, np.ndarray]:
    data, build = OWN[name]
    keras.utils.set_random_seed(3)
    x = keras.Input(data.shape[1:], dtype=data.dtype.name, name="x")
    return keras.Model(x, build(x), name=name), data


def close(qmodel: Any, model: Any, data: np.ndarray) -> None:
    expected, got = (m.predict(data, verbose=0) for m in (model, qmodel))
    # Weights and at most four tensors before the output are rounded to 8 bits; a wrong position is off by far more.
    assert np.abs(got - expected).max() < 6 * np.ptp(expected) / 255


@pytest.mark.parametrize("name", OWN)
def test_own_code_is_exported_as_it_computes(name, tmp_path):
    model, data = model_of(name)
    before = model.get_weights()
    qmodel, _ = exported(model, data, tmp_path / "m.tflite")
    close(qmodel, model, data)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["tokens_and_positions", "class_token", "positions_alone"])
def test_what_it_computes_from_its_weights_alone_is_trained(name):
    model, data = model_of(name)
    qmodel = quantize_model(model, calibration_data=data)
    qmodel.compile("sgd", "mse")
    arrays = [w for w in qmodel.trainable_weights if "operand" in w.path or "affine" in w.path] if IS_KERAS3 else [
        w for w in qmodel.trainable_weights if "operand" in w.name or "affine" in w.name
    ]  # fmt: skip
    assert arrays
    before = [w.numpy() for w in arrays]
    qmodel.fit(data, np.ones((len(data), *qmodel.output_shape[1:])), verbose=0)
    assert all(np.abs(w.numpy() - b).max() > 0 for w, b in zip(arrays, before, strict=True))


class Doubled(layers.Layer):
    """A product with something that is computed from a weight; that of today would no longer be trained."""

    def build(self, shape: Any) -> None:
        self.raw = self.add_weight(name="raw", shape=(shape[-1],), initializer="ones")
        super().build(shape)

    def call(self, x: Any) -> Any:
        return x * (ops.softplus(self.raw * 1.0))


if IS_KERAS3:
    PATCHES = {
        "side_by_side": lambda x: ops.image.extract_patches(x, 3),
        "not_even": lambda x: ops.image.extract_patches(x, (5, 4)),
        "overlapping": lambda x: ops.image.extract_patches(x, (3, 2), strides=(2, 1)),
        "same": lambda x: ops.image.extract_patches(x, 4, strides=3, padding="same"),
        "dilated": lambda x: ops.image.extract_patches(x, 3, strides=1, dilation_rate=2, padding="same"),
    }
else:
    PATCHES = {
        "side_by_side": lambda x: tf.image.extract_patches(x, [1, 3, 3, 1], [1, 3, 3, 1], [1] * 4, "VALID"),
        "same": lambda x: tf.image.extract_patches(x, [1, 4, 4, 1], [1, 3, 3, 1], [1] * 4, "SAME"),
        "dilated": lambda x: tf.image.extract_patches(x, [1, 3, 3, 1], [1, 2, 2, 1], [1, 2, 2, 1], "VALID"),
        "to_depth": lambda x: tf.nn.space_to_depth(x, 3),
        "to_space": lambda x: tf.nn.depth_to_space(tf.concat([x] * 4, -1), 2),
        "unit": lambda x: tf.math.l2_normalize(x + 1.0, axis=-1),
        "turned": lambda x: tf.linalg.matrix_transpose(x),
        "stretched": lambda x: tf.broadcast_to(x[:, :1], tf.shape(x)),
    }


@pytest.mark.parametrize("name", PATCHES)
def test_pixels_are_moved_as_the_operation_moves_them(name, tmp_path):
    x = keras.Input(IMAGES.shape[1:], name="x")
    model = keras.Model(x, PATCHES[name](x))
    qmodel, _ = exported(model, IMAGES, tmp_path / "m.tflite")
    expected, got = (m.predict(IMAGES, verbose=0) for m in (model, qmodel))
    # One rounding of values between 0 and 1; a norm has a square, a root and a product more.
    assert np.abs(got - expected).max() < (6 if name == "unit" else 0.6) / 255


def test_arithmetic_with_weights_alone_is_refused():
    x = keras.Input((LENGTH, WIDTH), name="x")
    refused(UnsupportedError, ("'own'", "raw"), quantize_model, keras.Model(x, Doubled(name="own")(x)))


# -- TensorFlow's functions in a layer's call, which Keras 3 runs on its TensorFlow backend ----------------------------


def _gated(x: Any) -> Any:
    gate = tf.sigmoid(tf.reduce_mean(x, axis=1, keepdims=True))
    return tf.nn.leaky_relu(x * gate, 0.3) + tf.abs(x) * 0.5 - tf.square(x) / 3.0


def _cut(x: Any) -> Any:
    first, second = tf.split(x, [2, 4], axis=1)
    y = tf.concat([tf.nn.relu6(first), second[:, 1:], tf.zeros((tf.shape(x)[0], 1, WIDTH))], axis=1)
    y = tf.pad(tf.expand_dims(y, -1), [[0, 0], [1, 0], [0, 0], [0, 0]])
    return tf.reshape(tf.transpose(y, [0, 2, 1, 3]), [tf.shape(x)[0], WIDTH, -1])


def _multiplied(x: Any) -> Any:
    y = tf.matmul(x, x, transpose_b=True)
    y = tf.nn.softmax(y / 8.0) + tf.einsum("bij,bkj->bik", x, x)
    return tf.stack([y, tf.tile(y[:, :1], [1, LENGTH, 1])], axis=1)


def _elementwise(x: Any) -> Any:
    y = tf.math.sin(x) + tf.math.rsqrt(tf.pow(x, 2.0) + 1.0) + tf.nn.elu(x) + tf.clip_by_value(x, -1.0, 0.5)
    return tf.maximum(y, 0.1 * y) + tf.math.squared_difference(x, tf.cast(tf.reverse(x, [1]), tf.float32))


def _image(x: Any) -> Any:
    y = tf.image.resize(tf.reshape(x, (-1, 3, 2, WIDTH)), (6, 4), method="nearest")
    y = tf.nn.depth_to_space(y, 2)
    return tf.gather(y, [0, 2, 5], axis=1) + tf.math.reduce_max(y, axis=[1, 2], keepdims=True)


def _units(x: Any) -> Any:
    return tf.nn.l2_normalize(tf.nn.relu(x) + 1.0, axis=-1) * tf.constant([1.0, 2.0, 0.5, -1.0])


def _taken_apart(x: Any) -> Any:
    """Queries, keys and values from one tensor, as code of image transformers has it, and a part of a part."""
    y = tf.transpose(tf.reshape(x, (tf.shape(x)[0], 2, 3, 2, 2)), (2, 0, 3, 1, 4))
    first, second, third = y[0], y[1, :, 1:], tf.unstack(y, axis=0)[2]
    return tf.matmul(first, third, transpose_b=True) + tf.reduce_mean(second, axis=3, keepdims=True)


FUNCTIONS = (_gated, _cut, _multiplied, _elementwise, _image, _units, _taken_apart)


class OfTensorFlow(layers.Layer):
    """A layer of TensorFlow's functions."""

    def __init__(self, index: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.index = index

    def call(self, x: Any) -> Any:
        return FUNCTIONS[self.index](x)

    def get_config(self) -> dict:
        return {**super().get_config(), "index": self.index}


@pytest.mark.parametrize("index", range(len(FUNCTIONS)), ids=[f.__name__ for f in FUNCTIONS])
def test_functions_of_tensorflow_compute_what_they_do(index, tmp_path):
    x = keras.Input((LENGTH, WIDTH), name="x")
    model = keras.Model(x, OfTensorFlow(index, name="own")(x))
    found, expected = computed(model, [X]), model.predict(X, verbose=0)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 in another order
    exported(model, X, tmp_path / "m.tflite")


class BatchBehind(layers.Layer):
    """A transpose whose result is used whole."""

    def call(self, x: Any) -> Any:
        return tf.transpose(tf.nn.relu(tf.transpose(x, (1, 0, 2))), (1, 0, 2))


def test_a_batch_that_stays_behind_another_axis_is_refused():
    x = keras.Input((LENGTH, WIDTH), name="x")
    refused(UnsupportedError, ("'own'", "moves the batch"), quantize_model, keras.Model(x, BatchBehind(name="own")(x)))


class Spectrum(layers.Layer):
    """A function that has no counterpart."""

    def call(self, x: Any) -> Any:
        return tf.math.real(tf.signal.fft(tf.cast(x, tf.complex64)))


def test_a_function_of_tensorflow_that_is_not_read_is_refused():
    x = keras.Input((LENGTH, WIDTH), name="x")
    words = ("'own'", "tf.signal.fft" if IS_KERAS3 else "cast")
    refused(UnsupportedError, words, quantize_model, keras.Model(x, Spectrum(name="own")(x)))


def test_tensorflow_refuses_symbolic_tensors_elsewhere():
    """What is read of a user's code changes nothing of what Keras says of code outside of it."""
    x = keras.Input((LENGTH, WIDTH), name="x")
    quantize_model(keras.Model(x, OfTensorFlow(0, name="own")(x)))
    if IS_KERAS3:
        with pytest.raises(ValueError, match="KerasTensor"):
            tf.nn.relu(x)
    else:
        assert type(tf.nn.relu(x)).__name__ == "KerasTensor"


# -- classes that change nothing of what a layer computes -------------------------------------------------------------


@keras.utils.register_keras_serializable(package="kquant-tests")
class SameConv(layers.Conv2D):
    """Other defaults, as many code bases have them."""

    def __init__(self, filters, kernel_size=3, padding="same", **kwargs):
        super().__init__(filters, kernel_size, padding=padding, **kwargs)


@keras.utils.register_keras_serializable(package="kquant-tests")
class Norm(layers.BatchNormalization):
    pass


def test_a_layer_that_is_only_named_anew_is_the_layer(tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    y = Norm(name="norm")(SameConv(4, strides=2, activation="relu", name="conv")(image))
    model = keras.Model(image, layers.Dense(2, name="head")(layers.Flatten()(y)))
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    config = [{"q_bits": 8, "op_types": ["default"]}, {"q_bits": 4, "op_types": ["SameConv"]}]
    qmodel = kquant.quantize_model(model, config, calibration_data=x)
    rows = {row.layer: row.weight for row in kquant.plan(model, config).rows}
    assert rows["conv"] == "qat 4 bit" and rows["head"] == "qat 8 bit"
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert kquant.audit(tmp_path / "m.tflite").fully_integer
    assert kquant.verify(qmodel, tmp_path / "m.tflite", x).ok


def test_a_model_at_every_time_step(tmp_path):
    image = keras.Input((8, 8, 3))
    y = layers.GlobalAveragePooling2D()(layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(image)))
    frames = keras.Input((5, 8, 8, 3), name="frames")
    y = layers.TimeDistributed(keras.Model(image, y, name="each"), name="over_time")(frames)
    model = keras.Model(frames, layers.Dense(2, name="head")(layers.Flatten()(y)))
    x = np.random.default_rng(0).normal(size=(16, 5, 8, 8, 3)).astype("float32")
    qmodel = kquant.quantize_model(model, calibration_data=x)
    expected = np.asarray(model(x))
    # Five roundings to 8 bits on the way.
    np.testing.assert_allclose(np.asarray(qmodel(x)), expected, atol=5 * np.ptp(expected) / 255)
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert kquant.audit(tmp_path / "m.tflite").fully_integer
    assert kquant.verify(qmodel, tmp_path / "m.tflite", x).ok
