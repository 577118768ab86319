"""A description (`tests/descriptions.py`) as a Keras model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from descriptions import Description, Node
from keras_generation import IS_KERAS3, activation, keras, layers, ops, path

# The last words of Keras' variable paths, as the roles that a description has arrays for.
ROLES = {
    "kernel": "kernel",
    "depthwise_kernel": "kernel",
    "pointwise_kernel": "kernel",
    "embeddings": "kernel",
    "bias": "bias",
    "gamma": "gamma",
    "scale": "gamma",
    "beta": "beta",
    "moving_mean": "mean",
    "moving_variance": "variance",
    "alpha": "slope",
}


def build(description: Description) -> keras.Model:
    """The float model of a description, with its weights."""
    dtype = "int32" if description.vocabulary else "float32"
    tensors = [keras.Input(description.shape, dtype=dtype, name="input")]
    made: dict[str, layers.Layer] = {}
    for node in description.nodes:
        inputs = [tensors[i] for i in node.inputs]
        if node.kind in OPERATIONS:
            y = OPERATIONS[node.kind](*inputs, **node.args)
        else:
            if node.name not in made:
                made[node.name] = LAYERS[node.kind](node, len(inputs[0].shape) - 2)
            y = made[node.name](*inputs) if node.kind == "attention" else made[node.name](_one_or_all(inputs))
        assert y.shape[1:] == node.shape, (node, y.shape)
        tensors.append(y)
    model = keras.Model(tensors[0], _one_or_all([tensors[i] for i in description.outputs]))
    for name, layer in made.items():
        for variable in layer.weights:
            role = path(variable).removeprefix(layer.path if IS_KERAS3 else layer.name).lstrip("/")
            if role.split("/")[-1] in ROLES:
                shape = tuple(variable.shape)
                variable.assign(description.weight(name + role, ROLES[role.split("/")[-1]], shape))
    return model


def _one_or_all(values: list) -> Any:
    return values[0] if len(values) == 1 else values


# -- layers -----------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[Node, int], layers.Layer]] = {}


def _plain(kind: str, cls: type, **fixed: Any) -> None:
    """A kind whose arguments are the layer's."""
    LAYERS[kind] = lambda node, rank: cls(name=node.name, **fixed, **node.args)


PLAIN = {
    "add": layers.Add,
    "subtract": layers.Subtract,
    "multiply": layers.Multiply,
    "maximum": layers.Maximum,
    "minimum": layers.Minimum,
    "average": layers.Average,
    "concat": layers.Concatenate,
    "flatten": layers.Flatten,
    "permute": layers.Permute,
    "prelu": layers.PReLU,
    "rescaling": layers.Rescaling,
    "batch_norm": layers.BatchNormalization,
    "layer_norm": layers.LayerNormalization,
    "rms_norm": layers.RMSNormalization if IS_KERAS3 else layers.LayerNormalization,  # tf_keras has none
    "unit_norm": layers.UnitNormalization,
    "group_norm": layers.GroupNormalization,
}
for _kind, _class in PLAIN.items():
    _plain(_kind, _class)
_plain("dropout", layers.Dropout, rate=0.3)
_plain("noise", layers.GaussianNoise, stddev=0.1)


def layer(function: Callable) -> Callable:
    """Enter a maker of a layer: (common arguments, node's arguments, number of spatial axes) -> layer."""

    def make(node: Node, rank: int) -> layers.Layer:
        common = {"name": node.name}
        if "bias" in node.args:
            common |= {"use_bias": node.args["bias"], "activation": activation(node.args["activation"])}
        if "strides" in node.args:
            common |= {"strides": node.args["strides"], "padding": node.args["padding"]}
        if "dilation" in node.args:
            common |= {"dilation_rate": node.args["dilation"]}
        return function(common, node.args, rank)

    LAYERS[function.__name__.strip("_")] = make
    return function


@layer
def _conv(common: dict, args: dict, rank: int) -> layers.Layer:
    cls = layers.Conv1D if rank == 1 else layers.Conv2D
    return cls(args["filters"], args["kernel"], groups=args["groups"], **common)


@layer
def _depthwise(common: dict, args: dict, rank: int) -> layers.Layer:
    cls = layers.DepthwiseConv1D if rank == 1 else layers.DepthwiseConv2D
    return cls(args["kernel"], depth_multiplier=args["multiplier"], **common)


@layer
def _separable(common: dict, args: dict, rank: int) -> layers.Layer:
    cls = layers.SeparableConv1D if rank == 1 else layers.SeparableConv2D
    return cls(args["filters"], args["kernel"], depth_multiplier=args["multiplier"], **common)


@layer
def _conv_transpose(common: dict, args: dict, rank: int) -> layers.Layer:
    cls = layers.Conv1DTranspose if rank == 1 else layers.Conv2DTranspose
    return cls(args["filters"], args["kernel"], **common)


@layer
def _dense(common: dict, args: dict, rank: int) -> layers.Layer:
    return layers.Dense(args["units"], **common)


@layer
def _einsum_dense(common: dict, args: dict, rank: int) -> layers.Layer:
    shape = args["units"] if args["length"] is None else (args["length"], *args["units"])
    bias = args["equation"].split("->")[1][-len(args["units"]) :] if common.pop("use_bias") else None
    return layers.EinsumDense(args["equation"], shape, bias_axes=bias, **common)


@layer
def _embedding(common: dict, args: dict, rank: int) -> layers.Layer:
    return layers.Embedding(args["vocabulary"], args["units"], **common)


@layer
def _activation(common: dict, args: dict, rank: int) -> layers.Layer:
    """As a layer of its own where Keras has one for the function, or as `Activation`."""
    own = {
        "relu": layers.ReLU,
        "relu6": lambda name: layers.ReLU(6.0, name=name),
        "leaky_relu": layers.LeakyReLU,
        "elu": layers.ELU,
        "softmax": layers.Softmax,
    }
    if args["form"] == "layer" and args["function"] in own:
        return own[args["function"]](**common)
    return layers.Activation(activation(args["function"]), **common)


@layer
def _attention(common: dict, args: dict, rank: int) -> layers.Layer:
    return layers.MultiHeadAttention(args["heads"], args["key_dim"], args["value_dim"], **common)


def _pool(kind: str, one: type, two: type) -> None:
    def maker(common: dict, args: dict, rank: int) -> layers.Layer:
        return (one if rank == 1 else two)(args["kernel"] if rank > 1 else args["kernel"][0], **common)

    def whole(node: Node, rank: int) -> layers.Layer:
        classes = {"max": (layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D)}
        pair = classes.get(kind, (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D))
        return pair[rank - 1](name=node.name, **node.args)

    maker.__name__ = f"{kind}_pool"
    layer(maker)
    LAYERS[f"global_{kind}_pool"] = whole


_pool("max", layers.MaxPooling1D, layers.MaxPooling2D)
_pool("average", layers.AveragePooling1D, layers.AveragePooling2D)


@layer
def _upsample(common: dict, args: dict, rank: int) -> layers.Layer:
    if rank == 1:
        return layers.UpSampling1D(args["size"][0], **common)
    return layers.UpSampling2D(args["size"], interpolation=args["interpolation"], **common)


@layer
def _resize(common: dict, args: dict, rank: int) -> layers.Layer:
    return layers.Resizing(*args["size"], interpolation=args["interpolation"], **common)


@layer
def _zero_pad(common: dict, args: dict, rank: int) -> layers.Layer:
    return (
        layers.ZeroPadding1D(args["padding"][0], **common)
        if rank == 1
        else layers.ZeroPadding2D(args["padding"], **common)
    )


@layer
def _crop(common: dict, args: dict, rank: int) -> layers.Layer:
    return (
        layers.Cropping1D(args["cropping"][0], **common) if rank == 1 else layers.Cropping2D(args["cropping"], **common)
    )


@layer
def _repeat(common: dict, args: dict, rank: int) -> layers.Layer:
    return layers.RepeatVector(args["count"], **common)


LAYERS["reshape"] = lambda node, rank: layers.Reshape(node.shape, name=node.name)

# -- operations -------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable] = {
    "clip": lambda x: ops.clip(x, -0.75, 1.5),
    "clip_positive": lambda x: ops.clip(x, 0.0, 1.25),
}
ARITHMETIC: dict[str, Callable] = {
    "add": lambda x, c: x + c,
    "multiply": lambda x, c: c * x,
    "divide": lambda x, c: x / c,
    "subtract": lambda x, c: x - c,
    "subtract_from": lambda x, c: c - x,
    "maximum": lambda x, c: ops.maximum(x, np.float32(c)),
    "minimum": lambda x, c: ops.minimum(x, np.float32(c)),
}
OPERATIONS: dict[str, Callable] = {
    "function": lambda x, function: (FUNCTIONS.get(function) or getattr(ops, function))(x),
    "arithmetic": lambda x, function, constant: ARITHMETIC[function](x, constant),
    "matmul": ops.matmul,
    "reduce": lambda x, function, axes, keepdims: getattr(ops, function)(x, axis=axes, keepdims=keepdims),
    "pad": lambda x, padding, mode: ops.pad(x, ((0, 0), *padding, (0, 0)), mode),
    "slice": lambda x, parts: x[(slice(None), *(slice(*p) for p in parts))],
    "take": lambda x, axis, indices: ops.take(x, np.array(indices), axis),
    "tile": lambda x, repeats: ops.tile(x, (1, *repeats)),
}
