"""TensorFlow's functions, under the names and arguments that they have in `keras.ops`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from tensorflow.python.util import tf_export

from kquant.keras_common.arguments import Arguments

BINARY = {"x": "x1", "y": "x2"}
REDUCE = {"input_tensor": "x", "keep_dims": "keepdims"}
CONV = {"input": "inputs", "filters": "kernel", "filter": "kernel", "dilations": "dilation_rate"}

# TensorFlow's symbol -> the operation, and its arguments' names there. A `compat.v1.` in front makes no difference.
TABLE: dict[str, tuple[str, dict[str, str]]] = {
    "__operators__.add": ("Add", BINARY),
    "__operators__.getitem": ("GetItem", {}),
    "broadcast_to": ("BroadcastTo", {"input": "x"}),
    "cast": ("Cast", {}),
    "clip_by_value": ("Clip", {"clip_value_min": "x_min", "clip_value_max": "x_max"}),
    "concat": ("Concatenate", {"values": "xs"}),
    "convert_to_tensor": ("Identity", {}),
    "einsum": ("Einsum", {"equation": "subscripts"}),
    "expand_dims": ("ExpandDims", {}),
    "gather": ("Take", {"params": "x"}),
    "identity": ("Identity", {}),
    "image.resize": ("Resize", {"method": "interpolation"}),
    "image.extract_patches": ("ExtractPatches", {}),
    "linalg.l2_normalize": ("Normalize", {}),
    "linalg.matrix_transpose": ("Swapaxes", {}),
    "linalg.matmul": ("Matmul", {"a": "x1", "b": "x2"}),
    "math.abs": ("Abs", {}),
    "math.add": ("Add", BINARY),
    "math.add_n": ("AddN", {}),
    "math.divide": ("Divide", BINARY),
    "math.l2_normalize": ("Normalize", {}),
    "math.exp": ("Exp", {}),
    "math.maximum": ("Maximum", BINARY),
    "math.minimum": ("Minimum", BINARY),
    "math.multiply": ("Multiply", BINARY),
    "math.reduce_logsumexp": ("Logsumexp", REDUCE),
    "math.reduce_max": ("Max", REDUCE),
    "math.reduce_mean": ("Mean", REDUCE),
    "math.reduce_min": ("Min", REDUCE),
    "math.reduce_std": ("Std", REDUCE),
    "math.reduce_sum": ("Sum", REDUCE),
    "math.reduce_variance": ("Var", REDUCE),
    "math.sigmoid": ("Sigmoid", {}),
    "math.softplus": ("Softplus", {}),
    "math.sqrt": ("Sqrt", {}),
    "math.square": ("Square", {}),
    "math.squared_difference": ("SquaredDifference", BINARY),
    "math.subtract": ("Subtract", BINARY),
    "math.tanh": ("Tanh", {}),
    "math.truediv": ("Divide", BINARY),
    "nn.conv2d": ("Conv", CONV),
    "nn.depthwise_conv2d": ("DepthwiseConv", CONV),
    "nn.bias_add": ("Add", {"value": "x1", "bias": "x2"}),
    "nn.depth_to_space": ("DepthToSpace", {}),
    "nn.l2_normalize": ("Normalize", {}),
    "nn.space_to_depth": ("SpaceToDepth", {}),
    "nn.gelu": ("Gelu", {}),
    "nn.relu": ("Relu", {}),
    "nn.relu6": ("Relu6", {}),
    "nn.softmax": ("Softmax", {}),
    "pad": ("Pad", {"paddings": "pad_width"}),
    "repeat": ("Repeat", {"input": "x"}),
    "reshape": ("Reshape", {}),
    "reverse": ("Flip", {"tensor": "x"}),
    "roll": ("Roll", {"input": "x"}),
    "shape": ("Shape", {}),
    "split": ("Split", {}),
    "squeeze": ("Squeeze", {}),
    "stack": ("Stack", {}),
    "stop_gradient": ("StopGradient", {}),
    "tensordot": ("Tensordot", {"a": "x1", "b": "x2"}),
    "tile": ("Tile", {"multiples": "repeats"}),
    "transpose": ("Transpose", {"perm": "axes"}),
    "unstack": ("Unstack", {"value": "x"}),
    "where": ("Where", {"x": "x1", "y": "x2"}),
}


def symbol_of(function: Any) -> str:
    """The public name of a TensorFlow function, or ""."""
    name = tf_export.get_canonical_name_for_symbol(function, api_name="tensorflow", add_prefix_to_v1_names=True)
    return (name or "").removeprefix("compat.v1.")


def bound(symbol: str, function: Callable, args: tuple, kwargs: dict) -> tuple[str, Arguments]:
    """The operation that a call of the function with this symbol is, and the arguments by their names there."""
    name, renamed = TABLE[symbol]
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    values: dict[str, Any] = {}
    for old, value in given.arguments.items():
        new = renamed.get(old, old)
        # Some functions take an argument by an old name too, which is None where the new one is given.
        if old != "name" and (value is not None or new not in values):
            values[new] = value
    defaults = {renamed.get(k, k): p.default for k, p in signature.parameters.items() if p.default is not p.empty}
    return name, Arguments(FIXES.get(name, lambda values: values)(values), defaults)


def not_taken(symbol: str, function: Callable, args: tuple, kwargs: dict, taken: Collection[str]) -> list[str]:
    """The arguments of a call that are neither as by default nor among those `taken`, the names of the operation's."""
    signature, renamed = inspect.signature(function), TABLE[symbol][1]
    left = {k: v for k, v in signature.bind(*args, **kwargs).arguments.items() if renamed.get(k, k) not in taken}
    defaults = {k: p.default for k, p in signature.parameters.items() if p.default is not p.empty and k != "name"}
    usual = {**defaults, "data_format": "NHWC"}  # which None stands for where it is the default
    return [k for k, v in left.items() if k in defaults and v is not None and v not in (defaults[k], usual[k])]


# -- arguments that are written differently ----------------------------------------------------------------------------


def _axis(default: int | None) -> Callable[[dict], dict]:
    def fix(args: dict) -> dict:
        axis = args.get("axis")
        return {**args, "axis": default if axis is None else axis}

    return fix


def _reduction(args: dict) -> dict:
    axis = args.get("axis")
    axis = axis if axis is None or isinstance(axis, int) else tuple(int(a) for a in axis)
    return {**args, "axis": axis, "keepdims": bool(args.get("keepdims"))}


def _patches(args: dict) -> dict:
    inner = {k: tuple(int(n) for n in args[k][1:3]) for k in ("sizes", "strides", "rates")}
    return {**args, "size": inner["sizes"], "strides": inner["strides"], "dilation_rate": inner["rates"]}


def _convolution(args: dict) -> dict:
    spatial = len(args["kernel"].shape) - 2
    return {**args, **{k: _along(args[k], spatial) for k in ("strides", "dilation_rate")}}


def _along(value: Any, spatial: int) -> int | tuple[int, ...]:
    """A stride or rate per spatial axis, which TensorFlow also takes with those of the batch and the channels."""
    sizes = [1] if value is None else [int(n) for n in np.ravel(value)]
    return sizes[0] if len(sizes) == 1 else tuple(sizes[1:-1] if len(sizes) > spatial else sizes)


FIXES: dict[str, Callable[[dict], dict]] = {
    "Conv": _convolution,
    "DepthwiseConv": _convolution,
    "ExtractPatches": _patches,
    "Normalize": lambda args: {**args, "order": 2},
    "Swapaxes": lambda args: {**args, "axis1": -2, "axis2": -1},
    "Logsumexp": _reduction,
    "Max": _reduction,
    "Mean": _reduction,
    "Min": _reduction,
    "Pad": lambda args: {**args, "mode": args["mode"].lower()},
    "Softmax": _axis(-1),
    "Std": _reduction,
    "Sum": _reduction,
    "Take": _axis(0),
    "Tile": lambda args: {**args, "repeats": tuple(int(n) for n in args["repeats"])},
    "Var": _reduction,
}
