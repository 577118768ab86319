"""What is read of a model computes what the model computes, and no argument is read as its default in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from keras_generation import IS_KERAS3, keras, layers, ops

import kquant
from keras_templates.bad_input import refused
from keras_templates.edges import exported
from kquant.core.errors import ModelError, UnsupportedError
from kquant.keras_common.composite import EXPAND

RNG = np.random.default_rng(3)
SHAPE = (8, 9, 4)
VECTOR = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
X = RNG.normal(size=(16, *SHAPE)).astype(np.float32)
ROW = RNG.normal(size=(16, 4)).astype(np.float32)


def _relu(x: Any) -> Any:
    return layers.Lambda(keras.activations.relu, arguments={"max_value": 0.5})(x)


# name: what is made of an image, and of an image and a row
READ: dict[str, Any] = {
    "arguments of a function that has a name": lambda x, row: _relu(x),
    "a sum of unlike ranks": lambda x, row: layers.Add()([x, row]),
    "three of unlike ranks": lambda x, row: layers.Multiply()([row, x, row]),
    "a difference of unlike ranks": lambda x, row: layers.Subtract()([row, x]),
    "an average of unlike ranks": lambda x, row: layers.Average()([row, x]),
    "one channel times several": lambda x, row: x[..., :1] * VECTOR,
    "one channel plus several": lambda x, row: x[..., :1] + VECTOR,
    "rescaled by an array of four axes": lambda x, row: layers.Rescaling(VECTOR[None, None, None].tolist())(x),
    "reversed softmax": lambda x, row: layers.Lambda(ops.softmax, arguments={"axis": 1})(x),
}
if IS_KERAS3:
    READ |= {
        "indices from the end": lambda x, row: ops.take(x, [2, 0, -1], axis=-1),
        "attention with a gate": lambda x, row: layers.MultiHeadAttention(2, 3, use_gate=True)(x[:, 0], x[:, 1]),
    }
    LOST: dict[str, tuple[Any, tuple[str, ...]]] = {
        "initial": (lambda x: ops.max(x, axis=1, initial=0.5), ("Max", "initial")),
        "data_format": (
            lambda x: ops.image.resize(x, (5, 13), data_format="channels_first"),
            ("Resize", "data_format"),
        ),
    }
else:
    READ |= {"adjoint": lambda x, row: tf.matmul(x[:, 0], x[:, 1], adjoint_b=True)}
    LOST = {
        "batch_dims": (lambda x: tf.gather(x, [[0, 1]] * 16, batch_dims=1, axis=1), ("Take", "batch_dims")),
        "data_format": (lambda x: tf.nn.bias_add(x, tf.ones(8), data_format="NCHW"), ("Add", "data_format")),
    }


def model_of(function: Any) -> keras.Model:
    x, row = keras.Input(SHAPE, name="x"), keras.Input((4,), name="row")
    return keras.Model([x, row], [function(x, row), layers.Dense(2, name="head")(row)])


@pytest.mark.parametrize("name", READ)
def test_what_an_argument_says_is_in_the_file(name, tmp_path):
    """The quantized model against the float one, and the file against the quantized model."""
    keras.utils.set_random_seed(0)
    model = model_of(READ[name])
    qmodel, _ = exported(model, [X, ROW], tmp_path / "m.tflite")
    expected = np.asarray(model([X, ROW])[0])
    near = 0.05 * np.ptp(expected)  # at most six roundings to 8 bits on the way
    given = dict(zip(qmodel.output_names, kquant.load_artifact(tmp_path / "m.tflite")([X, ROW]), strict=True))
    np.testing.assert_allclose(np.asarray(qmodel([X, ROW])[0]), expected, atol=near)
    np.testing.assert_allclose(given[qmodel.output_names[0]], expected, atol=near)


@pytest.mark.parametrize("name", LOST)
def test_an_argument_that_nobody_reads_is_refused_by_its_name(name):
    function, words = LOST[name]
    x = keras.Input((8, 8, 4), batch_size=16, name="x")
    model = keras.Model(x, function(layers.Conv2D(4, 1)(x)))
    refused(UnsupportedError, (*words, "by default"), kquant.quantize_model, model)


@pytest.mark.skipif(not IS_KERAS3, reason="tf_keras has no such argument")
def test_a_normalization_that_is_two_in_one_is_refused():
    x = keras.Input((4,), name="x")
    with pytest.warns(UserWarning, match="rms_scaling"):
        layer = layers.LayerNormalization(rms_scaling=True, name="norm")
    model = keras.Model(x, layers.Dense(2)(layer(x)))
    refused(UnsupportedError, ("'norm'", "RMSNormalization"), kquant.quantize_model, model)


# -- graph and model side by side -------------------------------------------------------------------------------------


def test_a_layer_that_is_read_as_another_is_named(monkeypatch):
    """Whatever is read wrongly: here a normalization as nothing."""
    monkeypatch.setitem(EXPAND, "UnitNormalization", lambda g, layer, inputs, call: g.layers.Identity()(inputs[0]))
    x = keras.Input(SHAPE, name="x")
    y = layers.Conv2D(4, 1, name="conv")(x)
    y = layers.Dense(3, name="head")(layers.UnitNormalization(name="unit")(y))
    refused(ModelError, ("'unit' as the first", "largest value"), kquant.quantize_model, keras.Model(x, y))


class Doubled(keras.Model):
    """A functional model whose own call does more."""

    def call(self, x, training=None, mask=None):
        return super().call(x, training=training, mask=mask) * 2.0


def test_a_call_that_is_not_in_the_graph_is_refused():
    x = keras.Input((4,), name="x")
    model = Doubled(x, layers.Dense(3, name="dense")(x))
    refused(ModelError, ("a call() of its own", "overridden"), kquant.quantize_model, model)


def test_the_comparison_changes_no_state():
    """A layer that is called with training=True moves its averages in every call."""
    x = keras.Input(SHAPE, name="x")
    y = layers.BatchNormalization(name="moving")(layers.Conv2D(4, 1, name="conv")(x), training=True)
    model = keras.Model(x, layers.Dense(2, name="head")(y))
    before = model.get_weights()
    config = [{"q_bits": 8, "op_types": ["default"]}, {"op_names": ["moving"], "exclude": True}]
    kquant.quantize_model(model, config)
    for mine, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@keras.utils.register_keras_serializable(package="kquant-tests")
class Noisy(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


def test_what_computes_at_random_is_not_compared():
    """It stays in float where it is excluded, and that is all that can be said of it."""
    x = keras.Input(SHAPE, name="x")
    y = Noisy(name="noisy")(layers.Conv2D(4, 1, name="conv")(x))
    config = [{"q_bits": 8, "op_types": ["default"]}, {"op_names": ["noisy"], "exclude": True}]
    assert kquant.quantize_model(keras.Model(x, y), config).output_names


def test_half_precision_is_no_difference():
    policy = "mixed_bfloat16"
    x = keras.Input(SHAPE, name="x")
    y = x
    for _ in range(6):
        y = layers.LayerNormalization(dtype=policy)(layers.Dense(16, activation="gelu", dtype=policy)(y))
    kquant.quantize_model(keras.Model(x, y))
