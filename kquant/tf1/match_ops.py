"""Ops that pass on, pool, reduce, move and resize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.tf1.match import Found, Matcher, is_symbolic, matches, unchanged
from kquant.tf1.match_linear import NOT_CHANNELS_LAST, over_one_axis, tensordot, text

BATCH = "has no counterpart in the artifact, which has samples on the first axis"


@matches("Identity", "StopGradient", "PreventGradient", "CheckNumerics", "Snapshot", "PlaceholderWithDefault")
def identity(m: Matcher, op: Any, index: int) -> Found:
    """Ops that hand their input on."""
    return Found("identity", (op.inputs[0],), op.outputs[0], op, call=unchanged)


@matches("IdentityN")
def identities(m: Matcher, op: Any, index: int) -> Found:
    """What a function with a gradient of its own leaves in the graph: its outputs, handed on."""
    return Found("identity", (op.inputs[index],), op.outputs[index], op, call=unchanged)


@matches("Cast")
def cast(m: Matcher, op: Any, index: int) -> Found | str:
    """Pixels, or ids, in another dtype."""
    if op.inputs[0].dtype.is_floating and not op.outputs[0].dtype.is_floating:
        return "a cast to integers is not a quantizable op"
    return Found("identity", (op.inputs[0],), op.outputs[0], op, call=unchanged)


@matches("Softmax")
def softmax(m: Matcher, op: Any, index: int) -> Found:
    """Softmax over the last axis."""
    return Found("softmax", (op.inputs[0],), op.outputs[0], op, {"axis": -1})


# -- pools and reductions -------------------------------------------------------------------------------------------


@matches("MaxPool", "AvgPool")
def pool(m: Matcher, op: Any, index: int) -> Found | str:
    """A windowed pool; an average over one window that is everything is a mean, with a range of its own."""
    x = op.inputs[0]
    if text(op, "data_format") != "NHWC":
        return NOT_CHANNELS_LAST
    window, strides = op.get_attr("ksize"), op.get_attr("strides")
    if {window[0], window[3], strides[0], strides[3]} != {1} or text(op, "padding") == "EXPLICIT":
        return "a pool over samples or channels, or with explicit padding, has no kernel on the target"
    if op.type == "AvgPool" and window[1:3] == x.shape.as_list()[1:3] and op.outputs[0].shape.as_list()[1:3] == [1, 1]:
        return Found("mean", (x,), op.outputs[0], op, {"axes": (1, 2), "keepdims": True})
    padding = text(op, "padding").lower()
    attrs = {"pool": tuple(window[1:3]), "strides": tuple(strides[1:3]), "padding": padding, "rank": 2}
    return Found("max_pool2d" if op.type == "MaxPool" else "avg_pool2d", (x,), op.outputs[0], op, attrs)


REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "reduce_max", "Min": "reduce_min"}


@matches(*REDUCTIONS)
def reduce(m: Matcher, op: Any, index: int) -> Found | str:
    """A reduction over axes other than the batch."""
    x = op.inputs[0]
    axes = m.static(op.inputs[1])
    if axes is None:
        return "the axes of a reduction must be constant"
    axes = tuple(sorted(int(a) % x.shape.rank for a in np.ravel(axes)))
    if 0 in axes:
        return f"a reduction over the batch {BATCH}"
    return Found(REDUCTIONS[op.type], (x,), op.outputs[0], op, {"axes": axes, "keepdims": op.get_attr("keep_dims")})


# -- shapes ---------------------------------------------------------------------------------------------------------


@matches("Reshape")
def reshape(m: Matcher, op: Any, index: int) -> Found | str:
    """A reshape to sizes of which one may be unknown."""
    return tensordot(m, op) or over_one_axis(m, op) or _reshaped(m, op)


@matches("Squeeze")
def squeeze(m: Matcher, op: Any, index: int) -> Found | str:
    """Axes of size one dropped; the last part of a convolution over one axis."""
    return over_one_axis(m, op) or _reshaped(m, op)


@matches("ExpandDims")
def _reshaped(m: Matcher, op: Any, *_: Any) -> Found | str:
    """Ops that change the shape only."""
    shape = op.outputs[0].shape
    if shape.rank is None or shape.as_list().count(None) > 1:
        return "the sizes of its output must be known but for one; set_shape() states them"
    known = [-1 if n is None else n for n in shape.as_list()]

    def call(values: Any, float_weights: bool = False) -> list[Any]:
        return [tf.reshape(values[0], known) if is_symbolic(values[0]) else np.reshape(values[0], known)]

    return Found("reshape", (op.inputs[0],), op.outputs[0], op, call=call)


@matches("Transpose")
def transpose(m: Matcher, op: Any, index: int) -> Found | str:
    """A permutation of axes that leaves the batch in its place."""
    perm = m.static(op.inputs[1])
    if perm is None or int(perm[0]) != 0:
        return f"a transpose that moves the batch axis {BATCH}"
    perm = tuple(int(p) for p in perm)
    found = Found("transpose", (op.inputs[0],), op.outputs[0], op, {"perm": perm})
    return found if perm != tuple(range(len(perm))) else replace(found, kind="identity", attrs={}, call=unchanged)


@matches("ConcatV2")
def concat(m: Matcher, op: Any, index: int) -> Found | str:
    """A concatenation of any number of tensors."""
    *parts, axis = op.inputs
    where = m.static(axis)
    if where is None or any(m.is_parameter(t) for t in parts):
        return "a concatenation with constants has no integer form"
    return Found("concat", tuple(parts), op.outputs[0], op, {"axis": int(where) % parts[0].shape.rank})


@matches("Pad", "PadV2", "MirrorPad")
def pad(m: Matcher, op: Any, index: int) -> Found | str:
    """Padding with a number, or mirrored."""
    paddings = m.static(op.inputs[1])
    value = m.static(op.inputs[2]) if op.type == "PadV2" else 0.0
    if paddings is None or value is None or np.any(paddings[0]):
        return "a padding must be constant, and none on the batch axis"
    pairs = tuple((int(a), int(b)) for a, b in paddings)
    if op.type == "MirrorPad":
        attrs = {"paddings": pairs, "mode": text(op, "mode").lower()}
        return Found("mirror_pad", (op.inputs[0],), op.outputs[0], op, attrs)
    return Found("pad", (op.inputs[0],), op.outputs[0], op, {"paddings": pairs, "value": float(value)})


@matches("Tile")
def tile(m: Matcher, op: Any, index: int) -> Found | str:
    """Repeats along axes other than the batch."""
    repeats = m.static(op.inputs[1])
    if repeats is None or int(repeats[0]) != 1:
        return f"a tile along the batch axis, or by computed numbers, {BATCH}"
    return Found("tile", (op.inputs[0],), op.outputs[0], op, {"repeats": tuple(int(r) for r in repeats)})


@matches("StridedSlice")
def strided_slice(m: Matcher, op: Any, index: int) -> Found | str:
    """A slice with constant limits."""
    x = op.inputs[0]
    limits = [m.static(t) for t in op.inputs[1:]]
    mask = {k: op.get_attr(f"{k}_mask") for k in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    if any(v is None for v in limits) or mask["new_axis"]:
        return "a slice with computed limits, or with a new axis, has no integer form"
    bounds = _spread(limits, mask, x.shape.rank)
    begin, end, strides, shrink = ([part[i] for part in bounds] for i in range(4))
    if (begin[0], end[0], strides[0]) != (None, None, 1):
        return f"a slice of the batch axis {BATCH}"
    attrs = {
        "begin": tuple(begin), "end": tuple(end), "strides": tuple(strides),
        "shrink": tuple(i for i, s in enumerate(shrink) if s),
    }  # fmt: skip
    return Found("strided_slice", (x,), op.outputs[0], op, attrs)


def _spread(limits: list[Any], mask: dict[str, int], rank: int) -> list[tuple]:
    """(begin, end, stride, whether the axis is dropped) of every axis, with an ellipsis written out."""
    whole = (None, None, 1, False)
    bounds: list[tuple] = []
    for i, (begin, end, stride) in enumerate(zip(*limits, strict=True)):
        bit = 1 << i
        if mask["ellipsis"] & bit:
            bounds += [whole] * (rank - len(limits[0]) + 1)
            continue
        drop = bool(mask["shrink_axis"] & bit)
        low = None if mask["begin"] & bit and not drop else int(begin)
        high = (int(begin) + 1 or None) if drop else None if mask["end"] & bit else int(end)
        bounds.append((low, high, int(stride), drop))
    return bounds + [whole] * (rank - len(bounds))


@matches("Slice")
def slice_(m: Matcher, op: Any, index: int) -> Found | str:
    """A slice by begin and size."""
    x = op.inputs[0]
    begin, size = (m.static(t) for t in op.inputs[1:])
    if begin is None or size is None or begin[0] or int(size[0]) not in (-1, x.shape[0] or -1):
        return f"a slice of the batch axis, or with computed limits, {BATCH}"
    ends = [None if int(n) == -1 else int(b + n) for b, n in zip(begin, size, strict=True)]
    attrs = {"begin": (None, *map(int, begin[1:])), "end": (None, *ends[1:]), "strides": (1,) * len(ends)}
    return Found("strided_slice", (x,), op.outputs[0], op, attrs)


@matches("ReverseV2")
def reverse(m: Matcher, op: Any, index: int) -> Found | str:
    """Axes other than the batch from their end, as for channels in another order: a slice with a step of -1."""
    x, axes = op.inputs[0], m.static(op.inputs[1])
    turned = None if axes is None else {int(a) % x.shape.rank for a in np.ravel(axes)}
    if turned is None or 0 in turned:
        return f"a reversal of the batch axis, or of computed axes, {BATCH}"
    whole = (None,) * x.shape.rank
    attrs = {"begin": whole, "end": whole, "strides": tuple(-1 if i in turned else 1 for i in range(x.shape.rank))}
    return Found("strided_slice", (x,), op.outputs[0], op, attrs)


@matches("Split", "SplitV", "Unpack")
def split(m: Matcher, op: Any, index: int) -> Found | str:
    """One part of a tensor that is split: a slice."""
    x = op.inputs[1] if op.type == "Split" else op.inputs[0]
    if op.type == "Unpack":
        axis, sizes = op.get_attr("axis"), [1] * len(op.outputs)
    else:
        axis = m.static(op.inputs[0 if op.type == "Split" else 2])
        sizes = [t.shape.as_list()[int(axis)] for t in op.outputs] if axis is not None else [None]
    if axis is None or None in sizes or not int(axis) % x.shape.rank:
        return f"a split of the batch axis, or into unknown sizes, {BATCH}"
    axis, rank = int(axis) % x.shape.rank, x.shape.rank
    begin, end = [None] * rank, [None] * rank
    begin[axis], end[axis] = int(sum(sizes[:index])), int(sum(sizes[: index + 1]))
    shrink = (axis,) if op.type == "Unpack" else ()
    attrs = {"begin": tuple(begin), "end": tuple(end), "strides": (1,) * rank, "shrink": shrink}
    return Found("strided_slice", (x,), op.outputs[index], op, attrs)


RESIZES = {"ResizeBilinear": "resize_bilinear", "ResizeNearestNeighbor": "resize_nearest"}


@matches(*RESIZES)
def resize(m: Matcher, op: Any, index: int) -> Found | str:
    """Resizing to a constant size."""
    if m.static(op.inputs[1]) is None and None in op.outputs[0].shape.as_list()[1:3]:
        return "the size of a resize must be constant"
    attrs = {
        "rank": 2,
        "align_corners": op.get_attr("align_corners"),
        "half_pixel": op.get_attr("half_pixel_centers"),
    }
    return Found(RESIZES[op.type], (op.inputs[0],), op.outputs[0], op, attrs)
