"""The functions that tf_keras makes layers of, as the operations of `keras.ops` that they are, and the way back.

`kquant.keras_common.read_ops` so reads both generations.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tensorflow as tf
import tf_keras

from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call
from kquant.keras_common.tf_symbols import TABLE, bound

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


ACTIVATIONS = {"relu": "Relu", "relu6": "Relu6", "sigmoid": "Sigmoid", "tanh": "Tanh", "softmax": "Softmax"}


def translated(call: Call, generation: Any) -> tuple[str, Arguments]:
    """The operation that a call of a TensorFlow function is, and its arguments; an empty name where none is known."""
    values = generation.tree.flatten((call.args, call.kwargs))
    symbol = (call.layer.symbol or "").removeprefix("compat.v1.")
    if symbol not in TABLE:
        known = ACTIVATIONS.get(known_function(call.layer.function) or "", "")
        return (known, Arguments({"axis": -1}, {})) if len(values) == 1 else ("", Arguments({}, {}))
    name, args = bound(symbol, call.layer.function, call.args, call.kwargs)
    return name, Arguments(_key(args), {}) if name == "GetItem" else args


def _key(args: dict) -> dict:
    """Slices, which tf_keras writes as dicts."""
    parts = args["slice_spec"]
    parts = parts if isinstance(parts, (tuple, list)) else (parts,)
    key = tuple(slice(p["start"], p["stop"], p["step"]) if isinstance(p, dict) else p for p in parts)
    return {"key": key}
