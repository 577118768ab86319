"""TensorFlow's functions on symbolic tensors, which tf_keras makes layers of: read op by op, and as trained."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras_templates.layers import check
from keras_templates.snippets import IMAGE, STEEP, TOKENS, Snippet, randomize
from tf_keras import layers

import kquant


def conv(x):
    """A range of its own, signed."""
    return layers.Conv2D(4, 1)(x)


# name: (builder, output codes that a flipped code in the middle may move the output by)
FUNCTIONS = {
    "arithmetic": (lambda x: [conv(x) + 1.5, 2.0 - conv(x), conv(x) * 0.3, conv(x) / 2.0, -conv(x)], 2),
    "power": (lambda x: conv(x) ** 2, STEEP),
    "add_n": (lambda x: tf.add_n([conv(x), conv(x), conv(x)]), 3),
    "bias_add": (lambda x: tf.nn.bias_add(conv(x), tf.constant([0.1, -0.2, 0.3, 0.4])), 1),
    "activations": (lambda x: [f(conv(x)) for f in (tf.nn.relu, tf.nn.relu6, tf.sigmoid, tf.tanh, tf.nn.silu)], STEEP),
    "more_activations": (
        lambda x: [f(conv(x)) for f in (tf.nn.gelu, tf.nn.elu, tf.nn.leaky_relu, tf.nn.softplus, tf.nn.softmax)],
        STEEP,
    ),
    "keras_activations": (
        lambda x: [tf_keras.activations.relu(conv(x)), tf_keras.activations.relu(conv(x), max_value=2.0)],
        STEEP,
    ),
    "elementwise": (lambda x: [f(conv(x)) for f in (tf.abs, tf.square, tf.sin, tf.math.erf)], STEEP),
    "clip": (lambda x: [tf.clip_by_value(conv(x), 0.0, 1.0), tf.clip_by_value(conv(x), -0.5, 0.7)], STEEP),
    "reductions": (
        lambda x: [
            tf.reduce_mean(conv(x), [1, 2]), tf.reduce_mean(conv(x), axis=-1, keepdims=True),
            tf.reduce_sum(conv(x), 3), tf.reduce_max(conv(x), 1), tf.reduce_min(conv(x), axis=(1, 2)),
        ],
        3,
    ),
    "concat_and_split": (lambda x: tf.concat(tf.split(conv(x), 2, axis=-1)[::-1], -1), 1),
    "uneven_split": (lambda x: tf.split(conv(x), [1, 3], axis=3)[1], 1),
    "stack": (lambda x: tf.stack([conv(x), conv(x)], axis=2), 1),
    "reshape": (lambda x: tf.reshape(conv(x), [-1, 40]), 1),
    "reshape_by_shape": (lambda x: tf.reshape(conv(x), [tf.shape(x)[0], 400]), 1),
    "squeeze": (lambda x: tf.squeeze(tf.expand_dims(conv(x), 1), axis=[1]), 1),
    "transpose": (lambda x: [tf.transpose(conv(x), [0, 3, 1, 2]), tf.transpose(conv(x), perm=(0, 2, 1, 3))], 1),
    "pad": (
        lambda x: [tf.pad(conv(x), [[0, 0], [1, 2], [0, 1], [0, 0]]), tf.pad(conv(x), [[0, 0], [1, 1]] + [[0, 0]] * 2,
                                                                                "REFLECT")],
        1,
    ),
    "slices": (lambda x: [conv(x)[:, 1:-1, ::2], conv(x)[..., 0], conv(x)[:, 3:4]], 1),
    "gather": (lambda x: tf.gather(conv(x), [3, 0], axis=3), 1),
    "tile": (lambda x: tf.tile(conv(x), [1, 2, 1, 1]), 1),
    "resize": (lambda x: [tf.image.resize(conv(x), (5, 15)), tf.image.resize(conv(x), (20, 20), method="nearest")], 1),
    "cast_and_identity": (lambda x: tf.identity(tf.cast(conv(x), tf.float32)), 1),
    "maximum": (lambda x: [tf.maximum(conv(x), conv(x)), tf.minimum(conv(x), conv(x))], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, tmp_path):
    build, travels = FUNCTIONS[name]
    snippet = Snippet(name, IMAGE, build, travels=travels)
    check(snippet.model(), snippet, None, 8, tmp_path / "model.tflite")


def _attend(x):
    q, k = layers.Dense(5)(x), layers.Dense(5)(x)
    return [tf.matmul(q, k, transpose_b=True), tf.einsum("bqc,bkc->bqk", q, k)]


def test_products(tmp_path):
    snippet = Snippet("products", TOKENS, _attend, travels=2)
    check(snippet.model(), snippet, None, 8, tmp_path / "model.tflite")


def test_what_has_no_integer_form_is_named():
    x = tf_keras.Input(IMAGE)
    model = tf_keras.Model(x, tf.sort(layers.Conv2D(4, 1)(x)))
    with pytest.raises(kquant.UnsupportedError, match=r"sort.*exclude"):
        kquant.quantize_model(model)


def test_a_sequential_built_by_a_batch_takes_any_batch(tmp_path):
    """tf_keras binds it to the size of the first batch; the quantized model is not bound."""
    model = tf_keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()])
    x = np.random.default_rng(0).normal(size=(24, *IMAGE)).astype("f4")
    model(x[:3])
    randomize(model)
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    qmodel = kquant.quantize_model(model, calibration_data=x)
    assert qmodel.input_shape == (None, *IMAGE)
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert kquant.verify(qmodel, tmp_path / "m.tflite", x).ok
    assert nodes[0] >= 1


class Scaled(layers.Layer):
    """A layer with a weight in plain arithmetic."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="factor")

    def call(self, x):
        return tf.nn.relu(x * self.factor)


def test_reading_a_layer_of_ones_own_warns_of_nothing(caplog):
    x = tf_keras.Input(IMAGE)
    model = tf_keras.Model(x, Scaled()(layers.Conv2D(4, 1)(x)))
    qmodel = kquant.quantize_model(model)
    assert caplog.records == []
    assert [v.name for v in qmodel.trainable_weights if "scale" in v.name]  # its weight trains on


def test_a_model_of_ids_need_not_be_serializable(tmp_path):
    """Its integer input is no reason to make a float32 copy, which a function without a name could not survive."""
    ids = tf_keras.Input((6,), dtype="int32")
    y = layers.Activation(lambda x: x * tf.sigmoid(1.5 * x))(layers.Embedding(11, 4)(ids))
    model = tf_keras.Model(ids, layers.Dense(3)(y))
    data = np.random.default_rng(0).integers(0, 11, (32, 6)).astype("int32")
    qmodel = kquant.quantize_model(model, calibration_data=data)
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert kquant.verify(qmodel, tmp_path / "m.tflite", data).ok
