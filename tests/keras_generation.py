"""The generation of Keras that this process tests; the templates in `keras_templates` are written in these names.

`keras_choice` says which.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from keras_choice import chosen

IS_KERAS3 = chosen() == "keras"

if IS_KERAS3:
    import keras
    from keras import ops
else:
    import tensorflow as tf
    import tf_keras as keras

    def _split(x: Any, sections: int, axis: int = 0) -> Any:
        return tf.split(x, sections, axis=axis)

    ops = SimpleNamespace(
        abs=tf.abs, absolute=tf.abs, arctan=tf.math.atan, clip=tf.clip_by_value, cos=tf.cos, erf=tf.math.erf,
        matmul=tf.matmul, max=tf.reduce_max, maximum=tf.maximum, mean=tf.reduce_mean, min=tf.reduce_min,
        minimum=tf.minimum, negative=tf.negative, relu=tf.nn.relu, relu6=tf.nn.relu6, reshape=tf.reshape,
        sigmoid=tf.sigmoid, silu=tf.nn.silu, sin=tf.sin, softmax=tf.nn.softmax, softplus=tf.nn.softplus, split=_split,
        sqrt=tf.sqrt, square=tf.square, stack=tf.stack, sum=tf.reduce_sum, tanh=tf.tanh, tile=tf.tile,
        elu=tf.nn.elu, gelu=tf.nn.gelu, leaky_relu=tf.nn.leaky_relu, selu=tf.nn.selu, softsign=tf.nn.softsign,
        pad=lambda x, paddings, mode="constant": tf.pad(x, paddings, mode.upper()),
        take=lambda x, indices, axis: tf.gather(x, indices, axis=axis),
        transpose=lambda x, axes: tf.transpose(x, perm=axes),
    )  # fmt: skip

layers = keras.layers


def path(variable: Any) -> str:
    """Where a variable lies: `layer/kernel`."""
    return variable.path if IS_KERAS3 else variable.name.removesuffix(":0")


def has_activation(name: str) -> bool:
    """Whether this generation knows an activation function by name."""
    try:
        layers.Activation(name)(np.zeros((1, 2), np.float32))
    except ValueError:
        return False
    return True
