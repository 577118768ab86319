"""The generation of Keras that this process tests; the templates in `keras_templates` are written in these names.

`keras_choice` says which.
"""

from __future__ import annotations

import importlib
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
        abs=tf.abs, absolute=tf.abs, arctan=tf.math.atan, cast=tf.cast, clip=tf.clip_by_value, cos=tf.cos,
        erf=tf.math.erf,
        matmul=tf.matmul, max=tf.reduce_max, maximum=tf.maximum, mean=tf.reduce_mean, min=tf.reduce_min,
        minimum=tf.minimum, negative=tf.negative, relu=tf.nn.relu, relu6=tf.nn.relu6, reshape=tf.reshape,
        sigmoid=tf.sigmoid, silu=tf.nn.silu, sin=tf.sin, softmax=tf.nn.softmax, softplus=tf.nn.softplus, split=_split,
        sqrt=tf.sqrt, square=tf.square, stack=tf.stack, sum=tf.reduce_sum, tanh=tf.tanh, tile=tf.tile,
        elu=tf.nn.elu, gelu=tf.nn.gelu, leaky_relu=tf.nn.leaky_relu, selu=tf.nn.selu, softsign=tf.nn.softsign,
        pad=lambda x, paddings, mode="constant": tf.pad(x, paddings, mode.upper()),
        take=lambda x, indices, axis: tf.gather(x, indices, axis=axis),
        transpose=lambda x, axes: tf.transpose(x, perm=axes),
    )  # fmt: skip

# How often `fit` is traced: in tf_keras once more, when the optimizer has made its variables.
TRACES = 1 if IS_KERAS3 else 2
FORMATS = (".keras",) if IS_KERAS3 else (".keras", ".h5", "")  # of a saved model; none is a folder
layers = keras.layers
IMPORT = "keras" if IS_KERAS3 else "tf_keras as keras"  # what comes behind `import` in a program
own = importlib.import_module("kquant.keras3.layers" if IS_KERAS3 else "kquant.keras2.layers")


def path(variable: Any) -> str:
    """Where a variable lies: `layer/kernel`."""
    return variable.path if IS_KERAS3 else variable.name.removesuffix(":0")


def _hard_silu(x: Any) -> Any:
    return x * tf.nn.relu6(x + 3.0) / 6.0


def activation(name: str | None) -> Any:
    """An activation function by its name in Keras 3, as this generation takes it."""
    return _hard_silu if name == "hard_silu" and not IS_KERAS3 else name


def dtype_name(variable: Any) -> str:
    """The dtype of a variable."""
    return keras.backend.standardize_dtype(variable.dtype) if IS_KERAS3 else variable.dtype.name


def watched(variable: Any) -> Any:
    """What a gradient tape knows a variable by."""
    return variable.value if IS_KERAS3 else variable


def operations(model: Any) -> list:
    """The layers and operations of a model."""
    return model.operations if IS_KERAS3 else model.layers


def has_activation(name: str) -> bool:
    """Whether this generation knows an activation function by name."""
    try:
        layers.Activation(name)(np.zeros((1, 2), np.float32))
    except ValueError:
        return False
    return True


def policy() -> Any:
    """The dtype policy of new layers."""
    return keras.config.dtype_policy() if IS_KERAS3 else keras.mixed_precision.global_policy()


def set_policy(name: Any) -> None:
    """Set the dtype policy of new layers."""
    (keras.config.set_dtype_policy if IS_KERAS3 else keras.mixed_precision.set_global_policy)(name)


def apply_gradients(optimizer: Any, gradients: Any, variables: Any) -> None:
    """One step of an optimizer."""
    optimizer.apply(gradients, variables) if IS_KERAS3 else optimizer.apply_gradients(
        zip(gradients, variables, strict=True)
    )
