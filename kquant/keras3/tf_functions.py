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
from kquant.keras_common.read_patches import blocks_of_pixels
from kquant.keras_common.tf_symbols import TABLE, bound, not_taken, symbol_of

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
    "Pad": (
        lambda x, width, mode, value: ops.pad(x, width, mode, value or None),
        ("pad_width", "mode", "constant_values"),
    ),
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


def _product(a: Any, b: Any, *turned: bool) -> Any:
    """`turned` are transpose_a, transpose_b, adjoint_a, adjoint_b; of real numbers both forms are the same."""
    a = ops.swapaxes(a, -1, -2) if turned[0] or turned[2] else a
    b = ops.swapaxes(b, -1, -2) if turned[1] or turned[3] else b
    return ops.matmul(a, b)


def _split(x: Any, sizes: Any, axis: int) -> Any:
    return ops.split(x, sizes if np.ndim(sizes) == 0 else np.cumsum(sizes)[:-1].tolist(), axis)


def _wide(x: Any, block: int) -> Any:
    _, height, width, channels = x.shape
    return blocks_of_pixels(ops, x, (height, width, channels), int(block))


def _convolution(operation: Callable) -> Callable:
    def convolve(x: Any, kernel: Any, strides: Any, padding: Any, dilation_rate: Any) -> Any:
        if not isinstance(padding, str):
            raise UnreadError("a convolution with explicit padding is read as a tf.pad in front of it only")
        return operation(x, kernel, strides, padding.lower(), dilation_rate=dilation_rate)

    return convolve


CONVOLUTION = ("inputs", "kernel", "strides", "padding", "dilation_rate")

# Those that take other arguments than a tensor first, with the names of all that they take.
OTHER: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "AddN": (lambda xs: functools.reduce(ops.add, xs), ("inputs",)),
    "Concatenate": (lambda xs, axis: ops.concatenate(list(xs), axis), ("xs", "axis")),
    "Conv": (_convolution(ops.conv), CONVOLUTION),
    "DepthwiseConv": (_convolution(ops.depthwise_conv), CONVOLUTION),
    "DepthToSpace": (_wide, ("input", "block_size")),
    "Einsum": (lambda equation, xs: ops.einsum(equation, *xs), ("subscripts", "inputs")),
    "Matmul": (_product, ("x1", "x2", "transpose_a", "transpose_b", "adjoint_a", "adjoint_b")),
    "Normalize": (lambda x, axis: keras.layers.UnitNormalization(axis=axis)(x), ("x", "axis")),
    "SpaceToDepth": (lambda x, block: ops.image.extract_patches(x, int(block)), ("input", "block_size")),
    "Split": (_split, ("value", "num_or_size_splits", "axis")),
    "Stack": (lambda xs, axis: ops.stack(list(xs), axis), ("values", "axis")),
    "Tensordot": (ops.tensordot, ("x1", "x2", "axes")),
    "Where": (ops.where, ("condition", "x1", "x2")),
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
    if name in ONE:
        call, more = ONE[name]
        first, *_ = values
        taken, given = (first, *more), [values[first], *(_plain(values[k]) for k in more)]
    elif name in TWO or name in OTHER:
        call, taken = OTHER.get(name) or (TWO[name], ("x1", "x2"))
        given = [np.float32(v) if name in TWO and isinstance(v, (list, tuple)) else v for v in map(values.get, taken)]
    else:
        return NotImplemented
    lost = not_taken(symbol, function, args, kwargs, taken)
    if lost:
        raise UnreadError(f"tf.{symbol} is not read with {', '.join(lost)} other than by default")
    return call(*given)


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
