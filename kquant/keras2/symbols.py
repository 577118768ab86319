"""TensorFlow's functions, under the names and arguments that they have in `keras.ops`.

tf_keras makes a layer of each function that is called on a symbolic tensor. `TABLE` says which operation of
`keras.ops` it is, so that `kquant.keras_common.read_ops` reads both generations; `OPS` is the way back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow.python.util import tf_export

from kquant.keras_common.generation import Call

# What composite layers are written in.
OPS = SimpleNamespace(
    add=tf.add,
    concatenate=tf.concat,
    einsum=tf.einsum,
    expand_dims=tf.expand_dims,
    matmul=tf.matmul,
    exp=tf.exp,
    log=tf.math.log,
    max=lambda x, axis=None, keepdims=False: tf.reduce_max(x, axis=axis, keepdims=keepdims),
    mean=lambda x, axis=None, keepdims=False: tf.reduce_mean(x, axis=axis, keepdims=keepdims),
    multiply=tf.multiply,
    pad=lambda x, pad_width: tf.pad(x, pad_width),
    reciprocal=tf.math.reciprocal,
    reshape=tf.reshape,
    sqrt=tf.sqrt,
    sum=lambda x, axis=None, keepdims=False: tf.reduce_sum(x, axis=axis, keepdims=keepdims),
    tile=lambda x, repeats: tf.tile(x, repeats),
    take=lambda x, indices, axis: tf.gather(x, indices, axis=axis),
    transpose=lambda x, axes: tf.transpose(x, perm=axes),
)

FUNCTIONS: dict[Any, str] = {
    tf.nn.relu: "relu",
    tf.nn.relu6: "relu6",
    tf.nn.softmax: "softmax",
    tf.nn.log_softmax: "log_softmax",
    tf.sigmoid: "sigmoid",
    tf.tanh: "tanh",
    tf.nn.silu: "silu",
    tf_keras.activations.swish: "silu",
    tf.nn.gelu: "gelu",
    tf.nn.elu: "elu",
    tf.nn.selu: "selu",
    tf.nn.softplus: "softplus",
    tf.nn.softsign: "softsign",
    tf.exp: "exponential",
}


def known_function(function: Any) -> str | None:
    """The name in `keras.activations` of an activation function of tf_keras or of TensorFlow."""
    try:
        if function in FUNCTIONS:
            return FUNCTIONS[function]
    except TypeError:  # a callable that cannot be hashed
        return None
    name = getattr(function, "__name__", type(function).__name__)
    return name if getattr(tf_keras.activations, name, None) is function else None


BINARY = {"x": "x1", "y": "x2"}
REDUCE = {"input_tensor": "x", "keep_dims": "keepdims"}

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
    "math.subtract": ("Subtract", BINARY),
    "math.tanh": ("Tanh", {}),
    "math.truediv": ("Divide", BINARY),
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
ACTIVATIONS = {"relu": "Relu", "relu6": "Relu6", "sigmoid": "Sigmoid", "tanh": "Tanh", "softmax": "Softmax"}


def symbol_of(function: Any) -> str:
    """The public name of a TensorFlow function, or ""."""
    name = tf_export.get_canonical_name_for_symbol(function, api_name="tensorflow", add_prefix_to_v1_names=True)
    return (name or "").removeprefix("compat.v1.")


def translated(call: Call, generation: Any) -> tuple[str, dict]:
    """The operation that a call of a TensorFlow function is, and its arguments; an empty name where none is known."""
    values = generation.tree.flatten((call.args, call.kwargs))
    symbol = (call.layer.symbol or "").removeprefix("compat.v1.")
    if symbol not in TABLE:
        known = ACTIVATIONS.get(known_function(call.layer.function) or "", "")
        return (known, {"axis": -1}) if len(values) == 1 else ("", {})
    name, renamed = TABLE[symbol]
    bound = inspect.signature(call.layer.function).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    args = {renamed.get(k, k): v for k, v in bound.arguments.items() if k != "name"}
    return name, FIXES.get(name, lambda args: args)(args)


# -- arguments that are written differently ----------------------------------------------------------------------------


def _key(args: dict) -> dict:
    """Slices, which tf_keras writes as dicts."""
    parts = args["slice_spec"]
    parts = parts if isinstance(parts, (tuple, list)) else (parts,)
    key = tuple(slice(p["start"], p["stop"], p["step"]) if isinstance(p, dict) else p for p in parts)
    return {"key": key}


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


FIXES: dict[str, Callable[[dict], dict]] = {
    "ExtractPatches": _patches,
    "Normalize": lambda args: {**args, "order": 2},
    "Swapaxes": lambda args: {**args, "axis1": -2, "axis2": -1},
    "GetItem": _key,
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
