"""TensorFlow's functions on symbolic tensors of Keras 3, as operations of `keras.ops`, while a user's code is read.

Keras runs such code on its TensorFlow backend, but only on tensors: a symbolic one is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kquant.keras_common.concrete import UnreadError
from kquant.keras_common.tf_symbols import TABLE, bound, symbol_of

# The operations whose function takes the tensor, and then these of the arguments.
ONE: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "Abs": (ops.abs, ()),
    "BroadcastTo": (ops.broadcast_to, ("shape",)),
    "Cast": (ops.cast, ("dtype",)),
    "Clip": (ops.clip, ("x_min", "x_max")),
    "Exp": (ops.exp, ()),
    "ExpandDims": (ops.expand_dims, ("axis",)),
    "ExtractPatches": (ops.image.extract_patches, ("size", "strides", "dilation_rate", "padding")),
    "Flip": (ops.flip, ("axis",)),
    "Gelu": (ops.gelu, ("approximate",)),
    "Identity": (lambda x: x, ()),
    "Logsumexp": (ops.logsumexp, ("axis", "keepdims")),
    "Max": (ops.max, ("axis", "keepdims")),
    "Mean": (ops.mean, ("axis", "keepdims")),
    "Min": (ops.min, ("axis", "keepdims")),
    "Pad": (ops.pad, ("pad_width", "mode")),
    "Relu": (ops.relu, ()),
    "Relu6": (ops.relu6, ()),
    "Repeat": (ops.repeat, ("repeats", "axis")),
    "Reshape": (ops.reshape, ("shape",)),
    "Resize": (ops.image.resize, ("size", "interpolation", "antialias")),
    "Roll": (ops.roll, ("shift", "axis")),
    "Sigmoid": (ops.sigmoid, ()),
    "Softmax": (ops.softmax, ("axis",)),
    "Softplus": (ops.softplus, ()),
    "Sqrt": (ops.sqrt, ()),
    "Square": (ops.square, ()),
    "Squeeze": (ops.squeeze, ("axis",)),
    "Std": (ops.std, ("axis", "keepdims")),
    "StopGradient": (ops.stop_gradient, ()),
    "Sum": (ops.sum, ("axis", "keepdims")),
    "Swapaxes": (ops.swapaxes, ("axis1", "axis2")),
    "Take": (ops.take, ("indices", "axis")),
    "Tanh": (ops.tanh, ()),
    "Tile": (ops.tile, ("repeats",)),
    "Transpose": (ops.transpose, ("axes",)),
    "Unstack": (ops.unstack, ("num", "axis")),
    "Var": (ops.var, ("axis", "keepdims")),
}
TWO: dict[str, Callable] = {
    "Add": ops.add,
    "Divide": ops.divide,
    "Maximum": ops.maximum,
    "Minimum": ops.minimum,
    "Multiply": ops.multiply,
    "SquaredDifference": lambda a, b: ops.square(ops.subtract(a, b)),
    "Subtract": ops.subtract,
}


# Those of other names, and those that take more than the tensor, in the same order.
SAME: dict[str, Callable] = {
    "math.pow": ops.power,
    "nn.leaky_relu": lambda x, slope=0.2: ops.leaky_relu(x, float(slope)),
}


def _turned(x: Any, wanted: bool) -> Any:
    return ops.swapaxes(x, -1, -2) if wanted else x


def _split(args: dict) -> Any:
    sizes = args["num_or_size_splits"]
    return ops.split(args["value"], sizes if np.ndim(sizes) == 0 else np.cumsum(sizes)[:-1].tolist(), args["axis"])


def _unit(args: dict) -> Any:
    return keras.layers.UnitNormalization(axis=args["axis"])(args["x"])


def _deep(args: dict) -> Any:
    block = int(args["block_size"])
    return ops.image.extract_patches(args["input"], block)


def _wide(args: dict) -> Any:
    """Channels become blocks of pixels."""
    block, (_, height, width, channels) = int(args["block_size"]), args["input"].shape
    x = ops.reshape(args["input"], (-1, height, width, block, channels // block))
    x = ops.transpose(x, (0, 1, 3, 2, 4))
    return ops.reshape(x, (-1, height * block, width * block, channels // block**2))


OTHER: dict[str, Callable[[dict], Any]] = {
    "AddN": lambda a: functools.reduce(ops.add, a["inputs"]),
    "Concatenate": lambda a: ops.concatenate(list(a["xs"]), a["axis"]),
    "DepthToSpace": _wide,
    "Einsum": lambda a: ops.einsum(a["subscripts"], *a["inputs"]),
    "Matmul": lambda a: ops.matmul(_turned(a["x1"], a["transpose_a"]), _turned(a["x2"], a["transpose_b"])),
    "Normalize": _unit,
    "SpaceToDepth": _deep,
    "Split": _split,
    "Stack": lambda a: ops.stack(list(a["values"]), a["axis"]),
    "Tensordot": lambda a: ops.tensordot(a["x1"], a["x2"], a["axes"]),
    "Where": lambda a: ops.where(a["condition"], a["x1"], a["x2"]),
}


def _plain(value: Any) -> Any:
    """An argument that is not data, as Keras writes it: numbers for small arrays, and names for dtypes."""
    if isinstance(value, tf.DType):
        return value.name
    if isinstance(value, (tf.Tensor, np.ndarray)):
        return np.asarray(value).tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return value.lower() if isinstance(value, str) else value


def _operation(symbol: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    if symbol == "shape":
        x = args[0] if args else kwargs["input"]
        if None in x.shape:
            raise UnreadError("the size of a batch is known only when a model runs")
        return tf.constant(x.shape, tf.int32)
    if symbol not in TABLE:  # functions of one tensor have the same names
        module, _, name = symbol.rpartition(".")
        same = SAME.get(symbol) or (getattr(ops, name, None) if module in ("math", "nn") else None)
        given = [*args, *(v for k, v in kwargs.items() if k != "name")]
        given = given[: -1 if given[-1] is None else None]  # the name, where arguments come by place
        return same(*given) if same and (symbol in SAME or len(given) == 1) else NotImplemented
    name, values = bound(symbol, function, args, kwargs)
    if name in TWO:
        return TWO[name](values["x1"], values["x2"])
    if name in OTHER:
        return OTHER[name](values)
    if name not in ONE:
        return NotImplemented
    call, more = ONE[name]
    return call(next(iter(values.values())), *(_plain(values[k]) for k in more))


class Functions(tf.__internal__.dispatch.GlobalOpDispatcher):
    """What TensorFlow asks where a function cannot take its arguments. It answers while `reading`, and only then."""

    def __init__(self) -> None:
        self.reading = False
        self.unknown = ""

    def handle(self, op: Callable, args: tuple, kwargs: dict) -> Any:
        values = keras.tree.flatten((args, kwargs))
        if not self.reading or not any(isinstance(v, keras.KerasTensor) for v in values):
            return self.NOT_SUPPORTED
        symbol = symbol_of(op)
        made = _operation(symbol, op, args, kwargs)
        if made is NotImplemented:
            self.unknown = symbol or self.unknown
            return self.NOT_SUPPORTED
        return made

    @contextmanager
    def as_operations(self) -> Iterator[None]:
        """While TensorFlow's functions take symbolic tensors."""
        before, self.reading, self.unknown = self.reading, True, ""
        try:
            yield
        except (TypeError, ValueError) as error:
            if not self.unknown:
                raise
            raise UnreadError(f"tf.{self.unknown} is not among the functions that are read") from error
        finally:
            self.reading = before


FUNCTIONS = Functions()
FUNCTIONS.register()
