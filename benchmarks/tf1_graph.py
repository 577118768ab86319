"""A Keras model of ordinary layers written again in `tf.nn`, as a TensorFlow 1 graph with variables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1


@dataclass(frozen=True)
class Net:
    """A graph that computes what a model does.

    Args:
        graph: the graph.
        x, labels: placeholders.
        logits, outputs: what goes into a last softmax, and what comes out.
        loss: cross entropy.
    """

    graph: tf.Graph
    x: Any
    labels: Any
    logits: Any
    outputs: Any
    loss: Any


def written_in_tf(model: Any, training: bool) -> Net:
    """The graph of a model of the layers in `LAYERS`; its variables start with the model's weights."""
    graph = tf.Graph()
    layers = [_Layer(layer) for layer in model.layers]
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, *model.inputs[0].shape[1:]], name="x")
        labels = v1.placeholder(tf.int64, [None], name="labels")
        known: dict[str, Any] = {layers[0].name: x}
        logits = y = x
        for layer in layers[1:]:
            inputs = layer.input if isinstance(layer.input, list) else [layer.input]
            values = [known[t._keras_history.operation.name] for t in inputs]
            with v1.variable_scope(layer.name):
                kind = type(layer.layer).__name__
                y = LAYERS[kind](layer, values, training)
                activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
                if activation == "softmax" or kind == "Softmax":
                    logits = y if kind != "Softmax" else values[0]
                y = FUNCTIONS[activation](y)
            known[layer.name] = y
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
    return Net(graph, x, labels, logits, y, loss)


def _variable(name: str, value: Any, trainable: bool = True) -> Any:
    return v1.get_variable(name, initializer=value, trainable=trainable)


class _Layer:
    """A layer whose variables are arrays: Keras cannot read them inside a graph."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.arrays = {v.name: np.asarray(v) for v in layer.weights}

    def __getattr__(self, name: str) -> Any:
        return self.arrays[name] if name in self.arrays else getattr(self.layer, name)


def _biased(layer: Any, y: Any) -> Any:
    return tf.nn.bias_add(y, _variable("bias", layer.bias)) if layer.use_bias else y


def _conv(layer: Any, xs: list[Any], training: bool) -> Any:
    kernel = _variable("kernel", layer.kernel)
    return _biased(layer, tf.nn.conv2d(xs[0], kernel, list(layer.strides), layer.padding.upper()))


def _depthwise(layer: Any, xs: list[Any], training: bool) -> Any:
    kernel = _variable("kernel", layer.kernel)
    strides = [1, *layer.strides, 1]
    return _biased(layer, tf.nn.depthwise_conv2d(xs[0], kernel, strides, layer.padding.upper()))


def _dense(layer: Any, xs: list[Any], training: bool) -> Any:
    return _biased(layer, tf.matmul(xs[0], _variable("kernel", layer.kernel)))


def _batch_norm(layer: Any, xs: list[Any], training: bool) -> Any:
    gamma, beta = _variable("gamma", layer.gamma), _variable("beta", layer.beta)
    mean, variance = _variable("mean", layer.moving_mean, False), _variable("variance", layer.moving_variance, False)
    if not training:
        return v1.nn.fused_batch_norm(xs[0], gamma, beta, mean, variance, layer.epsilon, is_training=False)[0]
    y, *batch = v1.nn.fused_batch_norm(xs[0], gamma, beta, epsilon=layer.epsilon, is_training=True)
    for moving, now in zip((mean, variance), batch, strict=True):
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign_sub(moving, (moving - now) * (1.0 - layer.momentum)))
    return y


def _pool(layer: Any, xs: list[Any], training: bool) -> Any:
    return tf.nn.avg_pool2d(xs[0], list(layer.pool_size), list(layer.strides), layer.padding.upper())


LAYERS: dict[str, Callable[[Any, list[Any], bool], Any]] = {
    "Conv2D": _conv,
    "DepthwiseConv2D": _depthwise,
    "Dense": _dense,
    "BatchNormalization": _batch_norm,
    "Activation": lambda layer, xs, training: xs[0],
    "ReLU": lambda layer, xs, training: tf.nn.relu(xs[0]),
    "Softmax": lambda layer, xs, training: tf.nn.softmax(xs[0]),
    "Add": lambda layer, xs, training: tf.add(*xs),
    "Dropout": lambda layer, xs, training: tf.nn.dropout(xs[0], layer.rate) if training else xs[0],
    "AveragePooling2D": _pool,
    "GlobalAveragePooling2D": lambda layer, xs, training: tf.reduce_mean(xs[0], [1, 2]),
    "Flatten": lambda layer, xs, training: tf.reshape(xs[0], [-1, int(np.prod(xs[0].shape[1:]))]),
    "Reshape": lambda layer, xs, training: tf.reshape(xs[0], [-1, *layer.target_shape]),
}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "linear": tf.identity,
    "relu": tf.nn.relu,
    "softmax": tf.nn.softmax,
}
