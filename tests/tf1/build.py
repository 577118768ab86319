"""A description (`tests/descriptions.py`) as a TensorFlow 1 graph, written in `tf.nn`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from descriptions import Description, Node

v1 = tf.compat.v1


class Builder:
    """Builds the graph of one description, in the current default graph."""

    def __init__(self, description: Description):
        self.description = description
        self.made: dict[tuple[str, str], Any] = {}
        dtype = tf.int32 if description.vocabulary else tf.float32
        self.x = v1.placeholder(dtype, [None, *description.shape], name="input")

    def build(self) -> list[Any]:
        """The outputs."""
        tensors = [self.x]
        for node in self.description.nodes:
            with tf.name_scope(node.name):
                y = NODES[node.kind](self, node, *[tensors[i] for i in node.inputs])
            assert tuple(y.shape[1:]) == node.shape, (node, y.shape)
            tensors.append(y)
        return [tensors[i] for i in self.description.outputs]

    def weight(self, node: Node, role: str, shape: Any, name: str = "") -> Any:
        """A variable of a layer; a layer that is called again has it already."""
        key = (node.name, name or role)
        if key not in self.made:
            value = self.description.weight(node.name + key[1], role, tuple(shape))
            self.made[key] = v1.Variable(
                value, name=f"{node.name}/{key[1]}", use_resource=self.description.seed % 2 == 0,
                trainable=role not in ("mean", "variance"),
            )  # fmt: skip
        return self.made[key].value() if self.description.seed % 2 == 0 else self.made[key]

    def tail(self, node: Node, y: Any) -> Any:
        """Bias and activation of a layer."""
        if node.args["bias"]:
            y = tf.nn.bias_add(y, self.weight(node, "bias", y.shape[-1:]))
        return FUNCTIONS[node.args["activation"]](y)


NODES: dict[str, Callable[..., Any]] = {}


def builds(*kinds: str) -> Callable:
    """Enter a function `(builder, node, *inputs) -> output` for some kinds."""

    def enter(function: Callable) -> Callable:
        NODES.update(dict.fromkeys(kinds, function))
        return function

    return enter


FUNCTIONS: dict[str | None, Callable[[Any], Any]] = {
    None: lambda x: x,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "sigmoid": tf.sigmoid,
    "tanh": tf.tanh,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.3),
    "elu": tf.nn.elu,
    "selu": tf.nn.selu,
    "silu": tf.nn.silu,
    "gelu": tf.nn.gelu,
    "hard_silu": lambda x: x * tf.nn.relu6(x + 3.0) / 6.0,
    "hard_sigmoid": lambda x: tf.nn.relu6(x + 3.0) / 6.0,
    "mish": lambda x: x * tf.tanh(tf.nn.softplus(x)),
    "softplus": tf.nn.softplus,
    "softsign": tf.nn.softsign,
    "softmax": tf.nn.softmax,
    "exponential": tf.exp,
    "absolute": tf.abs,
    "square": tf.square,
    "negative": tf.negative,
    "sin": tf.sin,
    "cos": tf.cos,
    "erf": tf.math.erf,
    "arctan": tf.atan,
    "clip": lambda x: tf.clip_by_value(x, -0.75, 1.5),
    "clip_positive": lambda x: tf.clip_by_value(x, 0.0, 1.25),
}


# -- layers with a kernel ---------------------------------------------------------------------------------------------


def _convolve(x: Any, kernel: Any, args: Any) -> Any:
    one = len(args["kernel"]) == 1
    how = tf.nn.conv1d if one else tf.nn.conv2d
    strides = args["strides"][0] if one else list(args["strides"])
    dilation = args["dilation"][0] if one else list(args["dilation"])
    return how(x, kernel, strides, args["padding"].upper(), dilations=dilation)


def _depth(x: Any, kernel: Any, args: Any) -> Any:
    if len(args["kernel"]) == 2:
        strides = [1, *args["strides"], 1]
        return tf.nn.depthwise_conv2d(x, kernel, strides, args["padding"].upper(), dilations=list(args["dilation"]))
    (stride,), (dilation,) = args["strides"], args["dilation"]
    y = tf.nn.depthwise_conv2d(
        tf.expand_dims(x, 1), tf.expand_dims(kernel, 0), [1, stride, stride, 1], args["padding"].upper(),
        dilations=[1, dilation],
    )  # fmt: skip
    return tf.squeeze(y, [1])


@builds("conv")
def _conv(b: Builder, node: Node, x: Any) -> Any:
    shape = (*node.args["kernel"], x.shape[-1] // node.args["groups"], node.args["filters"])
    return b.tail(node, _convolve(x, b.weight(node, "kernel", shape), node.args))


@builds("depthwise")
def _depthwise(b: Builder, node: Node, x: Any) -> Any:
    shape = (*node.args["kernel"], x.shape[-1], node.args["multiplier"])
    return b.tail(node, _depth(x, b.weight(node, "kernel", shape), node.args))


@builds("separable")
def _separable(b: Builder, node: Node, x: Any) -> Any:
    args, channels = node.args, x.shape[-1] * node.args["multiplier"]
    y = _depth(x, b.weight(node, "kernel", (*args["kernel"], x.shape[-1], args["multiplier"]), "depthwise"), args)
    ones = (1,) * len(args["kernel"])
    point = {"kernel": ones, "strides": ones, "dilation": ones, "padding": "same"}
    return b.tail(node, _convolve(y, b.weight(node, "kernel", (*ones, channels, args["filters"]), "pointwise"), point))


@builds("conv_transpose")
def _transpose(b: Builder, node: Node, x: Any) -> Any:
    args, one = node.args, len(node.args["kernel"]) == 1
    kernel = b.weight(node, "kernel", (*args["kernel"], args["filters"], x.shape[-1]))
    shape = tf.stack([tf.shape(x)[0], *node.shape])
    how = tf.nn.conv1d_transpose if one else tf.nn.conv2d_transpose
    strides = args["strides"][0] if one else list(args["strides"])
    y = how(x, kernel, shape, strides, args["padding"].upper())
    y.set_shape([None, *node.shape])
    return b.tail(node, y)


@builds("dense")
def _dense(b: Builder, node: Node, x: Any) -> Any:
    kernel = b.weight(node, "kernel", (x.shape[-1], node.args["units"]))
    return b.tail(node, tf.matmul(x, kernel) if x.shape.rank == 2 else tf.tensordot(x, kernel, 1))


@builds("einsum_dense")
def _einsum(b: Builder, node: Node, x: Any) -> Any:
    """As reshapes around a product: over both axes, or to two new ones."""
    units = math.prod(node.args["units"])
    flat = tf.reshape(x, [-1, math.prod(x.shape[1:])]) if node.args["length"] is None else x
    kernel = b.weight(node, "kernel", (flat.shape[-1], units))
    y = tf.matmul(flat, kernel) if flat.shape.rank == 2 else tf.tensordot(flat, kernel, 1)
    return tf.reshape(b.tail(node, y), [-1, *node.shape])


@builds("embedding")
def _embedding(b: Builder, node: Node, x: Any) -> Any:
    return tf.gather(b.weight(node, "kernel", (node.args["vocabulary"], node.args["units"])), x)


@builds("attention")
def _attention(b: Builder, node: Node, query: Any, value: Any) -> Any:
    """Each head's projections, products and softmax; the heads side by side into the last projection."""
    args, heads = node.args, []
    size = args["value_dim"] or args["key_dim"]

    def project(x: Any, name: str, units: int) -> Any:
        y = tf.tensordot(x, b.weight(node, "kernel", (x.shape[-1], units), name), 1)
        return tf.nn.bias_add(y, b.weight(node, "bias", (units,), f"{name}_bias"))

    for head in range(args["heads"]):
        q, k = project(query, f"query{head}", args["key_dim"]), project(value, f"key{head}", args["key_dim"])
        scores = tf.nn.softmax(tf.matmul(q, k, transpose_b=True) * (args["key_dim"] ** -0.5))
        heads.append(tf.matmul(scores, project(value, f"value{head}", size)))
    return project(tf.concat(heads, -1) if len(heads) > 1 else heads[0], "output", node.shape[-1])


@builds("batch_norm")
def _batch_norm(b: Builder, node: Node, x: Any) -> Any:
    size = x.shape[-1:]
    gamma = b.weight(node, "gamma", size) if node.args["scale"] else tf.ones(size)
    beta = b.weight(node, "beta", size) if node.args["center"] else tf.zeros(size)
    mean, variance = b.weight(node, "mean", size), b.weight(node, "variance", size)
    if x.shape.rank == 4:
        return v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, 1e-3, is_training=False)[0]
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3)


@builds("prelu")
def _prelu(b: Builder, node: Node, x: Any) -> Any:
    """With a slope per channel: the one that has a form in single ops."""
    slope = b.weight(node, "slope", x.shape[-1:])
    return tf.nn.relu(x) - tf.nn.relu(-x) * slope


# -- arithmetic -------------------------------------------------------------------------------------------------------


@builds("activation", "function")
def _activation(b: Builder, node: Node, x: Any) -> Any:
    return FUNCTIONS[node.args["function"]](x)


def _chain(pair: Callable) -> Callable:
    def merge(b: Builder, node: Node, *xs: Any) -> Any:
        total = xs[0]
        for x in xs[1:]:
            total = pair(total, x)
        return total

    return merge


for _kind, _pair in {
    "add": tf.add, "subtract": tf.subtract, "multiply": tf.multiply, "maximum": tf.maximum, "minimum": tf.minimum,
}.items():  # fmt: skip
    NODES[_kind] = _chain(_pair)


@builds("average")
def _average(b: Builder, node: Node, *xs: Any) -> Any:
    return _chain(tf.add)(b, node, *xs) * (1.0 / len(xs))


@builds("arithmetic")
def _arithmetic(b: Builder, node: Node, x: Any) -> Any:
    c = np.float32(node.args["constant"])
    table = {
        "add": lambda: x + c, "multiply": lambda: c * x, "divide": lambda: x / c, "subtract": lambda: x - c,
        "subtract_from": lambda: c - x, "maximum": lambda: tf.maximum(x, c), "minimum": lambda: tf.minimum(x, c),
    }  # fmt: skip
    return table[node.args["function"]]()


@builds("rescaling")
def _rescaling(b: Builder, node: Node, x: Any) -> Any:
    return x * tf.constant([node.args["scale"]] * x.shape[-1]) + tf.constant([node.args["offset"]] * x.shape[-1])


@builds("matmul")
def _matmul(b: Builder, node: Node, x: Any, y: Any) -> Any:
    return tf.matmul(x, y)


def _standardized(x: Any, axes: list[int], center: bool = True, epsilon: float = 1e-3) -> Any:
    centered = x - tf.reduce_mean(x, axes, keepdims=True) if center else x
    return centered * tf.math.rsqrt(tf.reduce_mean(centered * centered, axes, keepdims=True) + epsilon)


@builds("layer_norm")
def _layer_norm(b: Builder, node: Node, x: Any) -> Any:
    size = x.shape[-1:]
    return _standardized(x, [-1]) * b.weight(node, "gamma", size) + b.weight(node, "beta", size)


@builds("rms_norm")
def _rms_norm(b: Builder, node: Node, x: Any) -> Any:
    return _standardized(x, [-1], center=False) * b.weight(node, "gamma", x.shape[-1:])


@builds("unit_norm")
def _unit_norm(b: Builder, node: Node, x: Any) -> Any:
    return x * tf.math.rsqrt(tf.maximum(tf.reduce_mean(x * x, -1, keepdims=True) * float(x.shape[-1]), 1e-12))


@builds("group_norm")
def _group_norm(b: Builder, node: Node, x: Any) -> Any:
    groups, size = node.args["groups"], x.shape[-1:]
    count = math.prod(x.shape[1:-1])
    y = _standardized(tf.reshape(x, [-1, count, groups, x.shape[-1] // groups]), [1, 3])
    return tf.reshape(y, [-1, *x.shape[1:]]) * b.weight(node, "gamma", size) + b.weight(node, "beta", size)


# -- pools, sizes, shapes ---------------------------------------------------------------------------------------------


@builds("max_pool", "average_pool")
def _pool(b: Builder, node: Node, x: Any) -> Any:
    how = tf.nn.max_pool2d if node.kind == "max_pool" else tf.nn.avg_pool2d
    one = len(node.args["kernel"]) == 1
    if one:
        how = tf.nn.max_pool1d if node.kind == "max_pool" else tf.nn.avg_pool1d
    return how(x, list(node.args["kernel"]), list(node.args["strides"]), node.args["padding"].upper())


@builds("global_max_pool", "global_average_pool")
def _global(b: Builder, node: Node, x: Any) -> Any:
    how = tf.reduce_max if node.kind == "global_max_pool" else tf.reduce_mean
    return how(x, list(range(1, x.shape.rank - 1)), keepdims=node.args["keepdims"])


@builds("reduce")
def _reduce(b: Builder, node: Node, x: Any) -> Any:
    how = {"mean": tf.reduce_mean, "sum": tf.reduce_sum, "max": tf.reduce_max, "min": tf.reduce_min}
    return how[node.args["function"]](x, list(node.args["axes"]), keepdims=node.args["keepdims"])


@builds("upsample", "resize")
def _resize(b: Builder, node: Node, x: Any) -> Any:
    tall = x if x.shape.rank == 4 else tf.expand_dims(x, 1)
    size = node.shape[:2] if x.shape.rank == 4 else (1, node.shape[0])
    kind = tf.raw_ops.ResizeBilinear if node.args["interpolation"] == "bilinear" else tf.raw_ops.ResizeNearestNeighbor
    y = kind(images=tall, size=list(size), half_pixel_centers=True)
    return y if x.shape.rank == 4 else tf.squeeze(y, [1])


@builds("zero_pad", "pad")
def _pad(b: Builder, node: Node, x: Any) -> Any:
    return tf.pad(x, [(0, 0), *node.args["padding"], (0, 0)], node.args.get("mode", "constant").upper())


@builds("crop")
def _crop(b: Builder, node: Node, x: Any) -> Any:
    parts = [slice(low, n - high) for n, (low, high) in zip(x.shape[1:-1], node.args["cropping"], strict=True)]
    return x[(slice(None), *parts)]


@builds("slice")
def _slice(b: Builder, node: Node, x: Any) -> Any:
    return x[(slice(None), *(slice(*p) for p in node.args["parts"]))]


@builds("reshape", "flatten")
def _reshape(b: Builder, node: Node, x: Any) -> Any:
    return tf.reshape(x, [-1, *node.shape])


@builds("permute")
def _permute(b: Builder, node: Node, x: Any) -> Any:
    return tf.transpose(x, [0, *node.args["dims"]])


@builds("repeat")
def _repeat(b: Builder, node: Node, x: Any) -> Any:
    return tf.tile(tf.expand_dims(x, 1), [1, node.args["count"], 1])


@builds("take")
def _take(b: Builder, node: Node, x: Any) -> Any:
    return tf.gather(x, np.array(node.args["indices"]), axis=node.args["axis"])


@builds("tile")
def _tile(b: Builder, node: Node, x: Any) -> Any:
    return tf.tile(x, [1, *node.args["repeats"]])


@builds("concat")
def _concat(b: Builder, node: Node, *xs: Any) -> Any:
    return tf.concat(xs, node.args["axis"])


@builds("dropout")
def _dropout(b: Builder, node: Node, x: Any) -> Any:
    return tf.nn.dropout(x, 0.3)


@builds("noise")
def _noise(b: Builder, node: Node, x: Any) -> Any:
    return x + tf.random.normal(tf.shape(x), stddev=0.1)
