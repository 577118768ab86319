"""How single ops are written out, each as a function of the op that makes the same of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

Make = Callable[[], Any]
Form = Callable[[Any], "Make | None"]
FORMS: dict[str, Form] = {}
OF_DATA = ("RealDiv",)  # those that are written out only where both operands depend on data


def writes(*types: str) -> Callable[[Form], Form]:
    """Enter a function `(op) -> what makes its result anew, or None where it cannot be written out`."""

    def enter(form: Form) -> Form:
        FORMS.update(dict.fromkeys(types, form))
        return form

    return enter


def _sizes(tensor: Any) -> list[int] | None:
    """The sizes of all axes but the first; None where one is not known, or where they are no floats."""
    known = tensor.dtype == tf.float32 and tensor.shape.rank and None not in tensor.shape.as_list()[1:]
    return tensor.shape.as_list()[1:] if known else None


@writes("AddN")
def add_n(op: Any) -> Make | None:
    """A sum of many: each partial sum is a tensor with a range of its own."""

    def make() -> Any:
        total = op.inputs[0]
        for term in op.inputs[1:]:
            total = tf.raw_ops.AddV2(x=total, y=term)
        return total

    return make if op.outputs[0].dtype == tf.float32 and op.outputs[0].shape.rank else None


@writes("Pack")
def pack(op: Any) -> Make | None:
    """`tf.stack`: a concatenation along a new axis."""
    axis = op.get_attr("axis")
    if _sizes(op.outputs[0]) is None or not axis % op.outputs[0].shape.rank:
        return None
    return lambda: tf.concat([tf.expand_dims(t, axis) for t in op.inputs], axis)


@writes("SquaredDifference")
def squared_difference(op: Any) -> Make | None:
    """`(a - b)²` of two tensors."""
    if not op.outputs[0].shape.rank or op.outputs[0].dtype != tf.float32:
        return None

    def make() -> Any:
        difference = tf.subtract(*op.inputs)
        return tf.multiply(difference, difference)

    return make


@writes("LogSoftmax")
def log_softmax(op: Any) -> Make | None:
    """`x - max(x) - log(sum(exp(x - max(x))))`; the target's kernel has a step of 1/16 whatever the values are."""
    x = op.inputs[0]
    if _sizes(x) is None or x.shape.rank < 2:
        return None

    def make() -> Any:
        shifted = x - tf.reduce_max(x, -1, keepdims=True)
        return shifted - tf.math.log(tf.reduce_sum(tf.exp(shifted), -1, keepdims=True))

    return make


@writes("LRN")
def local_response(op: Any) -> Make | None:
    """Local response normalization: `x / (bias + alpha * sum of x² over near channels)^beta` (Krizhevsky et al. 2012).

    The sum is a product with a band of ones.
    """
    x = op.inputs[0]
    if _sizes(x) is None:
        return None
    bias, alpha, beta = (op.get_attr(name) for name in ("bias", "alpha", "beta"))
    places = np.arange(int(x.shape[-1]))
    band = np.abs(places[:, None] - places) <= op.get_attr("depth_radius")

    def make() -> Any:
        total = tf.nn.conv2d(x * x, band.astype(np.float32)[None, None], 1, "SAME")
        return x * tf.pow(alpha * total + bias, -beta)

    return make


@writes("RealDiv")
def quotient(op: Any) -> Make | None:
    """A tensor divided by one with fewer elements, as a deviation or a norm is: times its reciprocal."""
    x, divisor = op.inputs
    sizes = [_sizes(t) for t in op.inputs]
    if sizes[0] is None or sizes[1] is None or math.prod(sizes[1]) >= math.prod(sizes[0]):
        return None

    def make() -> Any:
        if divisor.op.type == "Sqrt":
            return tf.multiply(x, tf.math.rsqrt(divisor.op.inputs[0]))
        return tf.multiply(x, tf.math.reciprocal(divisor))

    return make


@writes("Conv2D", "DepthwiseConv2dNative")
def explicitly_padded(op: Any) -> Make | None:
    """A convolution with stated padding: the padding, and one without."""
    if op.get_attr("padding") != b"EXPLICIT" or op.get_attr("data_format") != b"NHWC":
        return None
    pairs = np.reshape(op.get_attr("explicit_paddings"), (4, 2))
    kinds = {"Conv2D": tf.raw_ops.Conv2D, "DepthwiseConv2dNative": tf.raw_ops.DepthwiseConv2dNative}
    settings = {name: op.get_attr(name) for name in ("strides", "dilations")}

    def make() -> Any:
        padded = tf.pad(op.inputs[0], pairs)
        return kinds[op.type](input=padded, filter=op.inputs[1], padding="VALID", **settings)

    return make


@writes("DepthToSpace", "SpaceToDepth")
def block(op: Any) -> Make | None:
    """Blocks of pixels to channels, or back: a permutation of axes between two reshapes."""
    x, y, size = op.inputs[0], op.outputs[0], op.get_attr("block_size")
    if op.get_attr("data_format") != b"NHWC" or _sizes(x) is None or _sizes(y) is None:
        return None
    (height, width, channels), result = _sizes(x), _sizes(y)
    if op.type == "DepthToSpace":
        split = [height, width, size, size, channels // size**2]
        order = [0, 1, 3, 2, 4, 5]
    else:
        split = [height // size, size, width // size, size, channels]
        order = [0, 1, 3, 2, 4, 5]
    return lambda: tf.reshape(tf.transpose(tf.reshape(x, [-1, *split]), order), [-1, *result])


@writes("Reshape")
def with_vector(op: Any) -> Make | None:
    """`tf.tensordot` with a vector, as an attention has it: that with a matrix of one column, which is then dropped."""
    product, x = op.inputs[0].op, None
    if product.type == "MatMul" and product.inputs[0].op.type == "Reshape":
        x, column = product.inputs[0].op.inputs[0], product.inputs[1]
        if x.op.type == "Transpose":
            order = tf.get_static_value(x.op.inputs[1])
            x = x.op.inputs[0] if order is not None and list(order) == list(range(len(order))) else None
    if x is None or _sizes(x) is None or x.shape.rank < 3 or column.shape.as_list() != [x.shape[-1], 1]:
        return None
    if op.outputs[0].shape.as_list() != x.shape.as_list()[:-1] or product.get_attr("transpose_b"):
        return None
    return lambda: tf.squeeze(tf.tensordot(x, column, 1), [-1])


# -- products by letters ----------------------------------------------------------------------------------------------


@writes("Einsum")
def einsum(op: Any) -> Make | None:
    """A product with a kernel, or of two tensors with the samples on the first axis; or a permutation of axes."""
    terms, result = op.get_attr("equation").decode().split("->")
    letters = terms.split(",")
    if "." in terms or any(len(set(t)) != len(t) for t in (*letters, result)) or _sizes(op.outputs[0]) is None:
        return None
    if len(letters) == 1:
        (x,) = letters
        return (lambda: _ordered(op.inputs[0], x, result)) if set(x) == set(result) else None
    operands = list(zip(letters, op.inputs, strict=True))
    if len(operands) != 2 or set(letters[0]) | set(letters[1]) < set(result):
        return None
    for one, two in (operands, operands[::-1]):
        if one[0][0] == result[0] and _sizes(one[1]) is not None and _is_product(one[0], two[0], result):
            return lambda one=one, two=two: _product(one, two, result)
    return None


def _is_product(a: str, b: str, result: str) -> bool:
    """Whether every letter is summed over both operands, or kept; and samples, if both have them, come first."""
    if any((c in a) != (c in b) for c in set(a + b) - set(result)) or not set(a) & set(b):
        return False
    return result[0] not in b or b[0] == result[0]


def _product(one: tuple[str, Any], two: tuple[str, Any], result: str) -> Any:
    """As a matrix product over merged axes: (shared, rows, summed) times (shared, summed, columns)."""
    (a, x), (b, y) = one, two
    sizes = dict(zip(b, y.shape.as_list(), strict=True)) | dict(zip(a, x.shape.as_list(), strict=True))
    shared = "".join(c for c in result if c in a and c in b)
    rows = "".join(c for c in a if c in result and c not in shared)
    columns = "".join(c for c in b if c in result and c not in shared)
    summed = "".join(c for c in a if c not in result)
    split = shared + rows + columns
    if shared:
        left = _merged(_ordered(x, a, shared + rows + summed), [*shared, rows, summed], sizes)
        right = _merged(_ordered(y, b, shared + summed + columns), [*shared, summed, columns], sizes)
        product = tf.matmul(left, right)
    else:  # with a kernel
        left = _merged(_ordered(x, a, rows + summed), [*rows, summed], sizes)
        kernel = tf.reshape(_ordered(y, b, summed + columns), [_size(summed, sizes), _size(columns, sizes)])
        product = tf.tensordot(left, kernel, 1) if len(rows) > 1 else tf.matmul(left, kernel)
    if product.shape.rank != len(split) or len(columns) != 1:
        product = tf.reshape(product, [-1, *(sizes[c] for c in split[1:])])
    return _ordered(product, split, result)


def _size(letters: str, sizes: dict[str, int]) -> int:
    return math.prod(sizes[c] for c in letters)


def _ordered(x: Any, letters: str, wanted: str) -> Any:
    """The axes in another order."""
    return x if letters == wanted else tf.transpose(x, [letters.index(c) for c in wanted])


def _merged(x: Any, groups: list[str], sizes: dict[str, int]) -> Any:
    """Neighbouring axes merged to one for each group; an empty group is an axis of one element."""
    if all(len(g) == 1 for g in groups):
        return x
    return tf.reshape(x, [-1, *(_size(g, sizes) for g in groups[1:])])
