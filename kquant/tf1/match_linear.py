"""Ops with a kernel, with their bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kquant.core.graph import Weight
from kquant.core.weights import weight_formula
from kquant.tf1 import marks
from kquant.tf1.match import Found, Kernel, Matcher, matches

NOT_CHANNELS_LAST = "the target's kernels are channels-last, and the op has data_format 'NCHW'"
COMPUTED_KERNEL = "its kernel is computed from data, and the target's kernels are constant"


def text(op: Any, attribute: str) -> str:
    """A string attribute."""
    return str(op.get_attr(attribute).decode())


def why_not(op: Any, m: Matcher, kernel: Any) -> str:
    """Why an op with a kernel has no integer form, or an empty string."""
    if not m.is_parameter(kernel):
        return COMPUTED_KERNEL
    if "data_format" in op.node_def.attr and text(op, "data_format") != "NHWC":
        return NOT_CHANNELS_LAST
    if None in kernel.shape.as_list():
        return "the shape of its kernel is not known"
    if "padding" in op.node_def.attr and text(op, "padding") == "EXPLICIT":
        return "explicit padding has no kernel on the target; use tf.pad and padding='VALID'"
    return ""


def geometry(op: Any) -> dict[str, Any]:
    """Strides, padding and dilation of a convolution."""
    return {
        "strides": tuple(op.get_attr("strides")[1:3]),
        "padding": text(op, "padding").lower(),
        "dilation": tuple(op.get_attr("dilations")[1:3]),
        "rank": 2,
    }


def weighted(m: Matcher, kind: str, op: Any, source: Any, kernel: Kernel, attrs: dict[str, Any]) -> Found:
    """A weighted op; in a quantized graph with its formula and a reader of its codes."""
    mark = marks.of(kernel.tensor.op, marks.WEIGHT)
    seen = kernel.seen
    master = kernel.tensor if mark is None else m.tensor(mark["kernel"])
    axes = kernel.seen_axes()
    if axes is not None:
        attrs = {**attrs, "kernel_axes": axes}
    if mark is not None:
        names = [mark["codes"], mark["scale"]]
        formula = weight_formula(mark["quantizer"], mark["bits"], None if mark["axes"] is None else tuple(mark["axes"]))
        codes = {"codes": lambda: tuple(map(seen, m.evaluator.run({}, names)))}
        attrs = {**attrs, **codes, "formula": formula, "folds_norm": mark.get("folds_norm", False)}
    shape = seen(np.empty(master.shape.as_list())).shape
    weight = Weight(shape, lambda: seen(m.reader(master)()))
    return Found(kind, (source,), op.outputs[0], op, attrs, {"kernel": weight}, kernel)


@matches("Conv2D")
def conv2d(m: Matcher, op: Any, index: int) -> Found | str:
    """A convolution, grouped where its kernel takes fewer channels than there are."""
    x, kernel = op.inputs
    reason = why_not(op, m, kernel)
    if reason:
        return reason
    if not m.channels(x):
        return "the number of input channels is not known"
    attrs = {**geometry(op), "groups": int(x.shape[-1]) // int(kernel.shape[2])}
    return weighted(m, "conv2d", op, x, Kernel(op, 1, kernel, (0, 1, 2)), attrs)


@matches("DepthwiseConv2dNative")
def depthwise(m: Matcher, op: Any, index: int) -> Found | str:
    """A depthwise convolution."""
    x, kernel = op.inputs
    reason = why_not(op, m, kernel)
    return reason or weighted(m, "depthwise_conv2d", op, x, Kernel(op, 1, kernel, (0, 1)), geometry(op))


@matches("BatchToSpaceND")
def dilated(m: Matcher, op: Any, index: int) -> Found | str:
    """A dilated convolution, written as one on every n-th position: `SpaceToBatchND`, convolution, `BatchToSpaceND`."""
    reason = "it is read only as the end of a dilated convolution"
    inner = m.behind(op.inputs[0])
    found = None if m.is_parameter(inner) else m.match(inner)
    if found is None or found.kernel is None or found.anchor.type not in ("Conv2D", "DepthwiseConv2dNative"):
        return reason
    rank, (tall,), block = found.attrs["rank"], found.sources, m.static(op.inputs[1])
    if tall.op.type != "SpaceToBatchND" or block is None or len(block) != rank:
        return reason
    x = tall.op.inputs[0]
    once = len([r for r in tall.consumers() if m.readers(r)]) == 1 and m.is_read_once(op.inputs[0], op)
    plain = set(found.attrs["strides"]) == set(found.attrs["dilation"]) == {1}
    spans = [(int(k) - 1) * int(d) for k, d in zip(found.kernel.tensor.shape[2 - rank : 2], block, strict=True)]
    sizes, after = x.shape.as_list()[1:-1], op.outputs[0].shape.as_list()[1:-1]
    if not once or not plain or None in (*sizes, *after):
        return reason
    padding = "same" if sizes == after else "valid"
    if padding == "valid" and after != [n - s for n, s in zip(sizes, spans, strict=True)]:
        return reason
    attrs = {k: v for k, v in found.attrs.items() if k not in ("codes", "formula", "kernel_axes")}
    attrs |= {"padding": padding, "dilation": tuple(int(d) for d in block)}
    return weighted(m, found.kind, found.anchor, x, found.kernel, attrs).then(op)


@matches("Conv2DBackpropInput")
def transposed(m: Matcher, op: Any, index: int) -> Found | str:
    """A transposed convolution."""
    _, kernel, x = op.inputs
    reason = why_not(op, m, kernel)
    if not reason and set(op.get_attr("dilations")) != {1}:
        reason = "a dilated transposed convolution has no kernel on the target"
    if not reason and None in op.outputs[0].shape.as_list()[1:]:
        reason = "the output size of a transposed convolution must be known; set_shape() states it"
    return reason or weighted(m, "conv2d_transpose", op, x, Kernel(op, 1, kernel, (0, 1, 3)), geometry(op))


@matches("MatMul")
def matmul(m: Matcher, op: Any, index: int) -> Found | str:
    """A product with a matrix of weights."""
    a, b = op.inputs
    if not m.is_parameter(b) or op.get_attr("transpose_a"):
        return "a matrix product over the batch axis has no counterpart in the artifact"
    return why_not(op, m, b) or _dense(m, op, a, b, op.get_attr("transpose_b"))


def _dense(m: Matcher, op: Any, x: Any, kernel: Any, turned: bool) -> Found:
    return weighted(
        m, "dense", op, x, Kernel(op, 1, kernel, (1,) if turned else (0,), "transposed" if turned else ""), {}
    )


@matches("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def batch_matmul(m: Matcher, op: Any, index: int) -> Found | str:
    """A product of two tensors, or with a matrix of weights."""
    a, b = op.inputs
    adj_x, adj_y = op.get_attr("adj_x"), op.get_attr("adj_y")
    if m.is_parameter(a):
        return "a product whose left operand is constant has no kernel; exchange the operands"
    if not m.is_parameter(b):
        return Found("batch_matmul", (a, b), op.outputs[0], op, {"adj_x": adj_x, "adj_y": adj_y})
    if b.shape.rank != 2 or adj_x:
        return "a product with a stack of constant matrices has no kernel"
    return why_not(op, m, b) or _dense(m, op, a, b, adj_y)


@matches("GatherV2", "Gather", "ResourceGather")
def look_up(m: Matcher, op: Any, index: int) -> Found | str:
    """An embedding, or a constant selection along an axis."""
    table, ids = op.inputs[:2]
    axis = 0 if op.type != "GatherV2" else int(m.static(op.inputs[2]))
    if "batch_dims" in op.node_def.attr and op.get_attr("batch_dims"):
        return "a look-up with batch_dims has other indices for each sample, and the target's has the same for all"
    if m.is_parameter(table) and axis == 0 and not m.is_parameter(ids):
        return weighted(m, "embedding", op, ids, Kernel(op, 0, m.value_of(table), None), {})
    indices = m.static(ids)
    if m.is_parameter(table) or indices is None:
        return "a look-up needs a constant table, or constant indices on an axis other than the batch"
    axis %= table.shape.rank
    if not axis:
        return "a selection along the batch axis has no counterpart in the artifact"
    return Found("gather", (table,), op.outputs[0], op, {"axis": axis, "indices": np.asarray(indices, np.int32)})


# -- what is part of a kernel's op ----------------------------------------------------------------------------------


def with_bias(m: Matcher, op: Any, x: Any, bias: Any) -> Found | None:
    """The op behind `x` with a bias, if it is a weighted op that can still take one."""
    inner = m.behind(x)
    found = m.match(inner) if not m.is_parameter(inner) else None
    if found is None or found.kernel is None or "bias" in found.weights or found.kind == "embedding":
        return None
    if not m.is_read_once(x, op) or found.output is not inner:
        return None
    shape = bias.shape.as_list() if bias.shape.is_fully_defined() else [0]
    size = int(np.prod(shape))  # a number of its own is the bias of an op with one channel
    if size != m.channels(x) or (shape and shape[-1] != size):
        return None
    return found.then(op, weights={**found.weights, "bias": m.weight(bias, (size,))})


def tensordot(m: Matcher, op: Any) -> Found | None:
    """`tf.tensordot` over the last axis: a reshape to rows, a product, a reshape back; read as one dense op."""
    rows = m.behind(op.inputs[0])
    if rows.op.type != "MatMul" or m.is_parameter(rows) or not m.is_read_once(op.inputs[0], op):
        return None
    found = m.match(rows)
    flat = rows.op.inputs[0]
    if found.kind != "dense" or flat.op.type != "Reshape" or not m.is_read_once(flat, rows.op):
        return None
    x = flat.op.inputs[0]
    if x.op.type == "Transpose" and _keeps_order(m, x.op) and m.is_read_once(x, flat.op):
        x = x.op.inputs[0]
    shape, result = x.shape.as_list(), op.outputs[0].shape.as_list()
    fits = len(shape) == len(result) and shape[:-1] == result[:-1] and shape[-1] == found.weights["kernel"].shape[0]
    return replace(found.then(op), sources=(x,)) if fits and result[-1] is not None else None


def over_one_axis(m: Matcher, op: Any) -> Found | None:
    """`tf.nn.conv1d` and its like: a new axis, a convolution over two axes, and that axis dropped again."""
    inner = m.behind(op.inputs[0])
    if m.is_parameter(inner) or inner.op.type not in _CONVOLUTIONS or not m.is_read_once(op.inputs[0], op):
        return None
    found = m.match(inner)
    if found.kernel is None or found.output is not inner or "bias" in found.weights:
        return None
    (tall,) = found.sources
    flat = tall.op.inputs[0] if tall.op.type in ("ExpandDims", "Reshape") and m.is_read_once(tall, inner.op) else None
    shapes = [None if t is None else t.shape.as_list() for t in (flat, tall, inner, op.outputs[0])]
    if None in shapes or any(s[1] != 1 for s in shapes[1:3]) or found.kernel.tensor.shape[0] != 1:
        return None
    if shapes[0] != [shapes[1][0], *shapes[1][2:]] or shapes[3] != [shapes[2][0], *shapes[2][2:]]:
        return None
    row = weighted(m, found.kind, inner.op, flat, replace(found.kernel, view="row"), _along_width(found.attrs))
    return row.then(op)


_CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput")


def _along_width(attrs: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in attrs.items() if k not in ("codes", "formula", "kernel_axes")}
    return {**own, "rank": 1, "strides": attrs["strides"][1:], "dilation": attrs["dilation"][1:]}


def _keeps_order(m: Matcher, op: Any) -> bool:
    order = m.static(op.inputs[1])
    return order is not None and list(order) == list(range(len(order)))
