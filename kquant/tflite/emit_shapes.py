"""TFLite ops that move, pool, reduce or resize."""

from __future__ import annotations

import numpy as np

from kquant.core.errors import UnsupportedError
from kquant.core.int8_spec import RESIZED, ROWS
from kquant.core.integer import IntOp
from kquant.tflite.emit import Emitter, fused, lowers, padding
from kquant.tflite.emit_linear import both, lifted


@lowers("max_pool2d", "avg_pool2d")
def _pool(e: Emitter, op: IntOp) -> None:
    rank = op.attrs["rank"]
    (height, width), (stride_h, stride_w) = both(op.attrs["pool"], rank), both(op.attrs["strides"], rank)
    fields = {
        "padding": padding(op), "strideH": stride_h, "strideW": stride_w, "filterHeight": height, "filterWidth": width,
        "fusedActivationFunction": fused(op),
    }  # fmt: skip
    source, target, close = lifted(e, op, rank)
    row = ROWS[op.kind]
    e.op(row.target, [source], [target], e.version(op), (row.options, fields))
    close()


@lowers("mean", "sum", "reduce_max", "reduce_min")
def _reduce(e: Emitter, op: IntOp) -> None:
    axes = e.ints(f"{op.id}/axes", list(op.attrs["axes"]))
    e.row_op(op, [e.tensor(op.inputs[0]), axes], {"keepDims": op.attrs["keepdims"]})


@lowers("softmax")
def _softmax(e: Emitter, op: IntOp) -> None:
    """The kernel works on the last axis; another one is moved there and back."""
    shape = e.shape(op.inputs[0])
    axis = op.attrs.get("axis", -1) % len(shape)
    fields = {"beta": float(op.attrs.get("beta", 1.0))}
    if axis == len(shape) - 1:
        e.row_op(op, [e.tensor(op.inputs[0])], fields)
        return
    order = list(range(len(shape)))
    order[axis], order[-1] = order[-1], order[axis]
    moved = tuple(shape[i] for i in order)
    perm = e.ints(f"{op.id}/perm", order)
    before = e.inner(f"{op.id}/moved", moved, op.inputs[0])
    after = e.inner(f"{op.id}/softmax", moved, op.outputs[0])
    e.op("TRANSPOSE", [e.tensor(op.inputs[0]), perm], [before], 2, ("TransposeOptions", {}))
    e.op("SOFTMAX", [before], [after], ROWS["softmax"].version, ("SoftmaxOptions", fields))
    e.op("TRANSPOSE", [after, perm], [e.tensor(op.outputs[0])], 2, ("TransposeOptions", {}))


@lowers("concat")
def _concat(e: Emitter, op: IntOp) -> None:
    e.row_op(op, [e.tensor(t) for t in op.inputs], {"axis": op.attrs["axis"], "fusedActivationFunction": 0})


@lowers("reshape")
def _reshape(e: Emitter, op: IntOp) -> None:
    e.reshape_into(e.tensor(op.inputs[0]), e.tensor(op.outputs[0]), e.shape(op.outputs[0]), op.id)


@lowers("transpose")
def _transpose(e: Emitter, op: IntOp) -> None:
    e.row_op(op, [e.tensor(op.inputs[0]), e.ints(f"{op.id}/perm", list(op.attrs["perm"]))], {})


@lowers("pad")
def _pad(e: Emitter, op: IntOp) -> None:
    """PAD writes the zero point, which is the value zero; another value needs PADV2."""
    pads = e.ints(f"{op.id}/paddings", [list(p) for p in op.attrs["paddings"]])
    value = op.attrs.get("value", 0.0)
    if value == 0.0:
        e.row_op(op, [e.tensor(op.inputs[0]), pads], {})
        return
    affine = e.affine(op.outputs[0])
    filler = e.constant(f"{op.id}/value", affine.quantize(np.array([value], np.float32)), affine)
    e.op("PADV2", [e.tensor(op.inputs[0]), pads, filler], [e.tensor(op.outputs[0])], 2, ("PadV2Options", {}))


@lowers("mirror_pad")
def _mirror_pad(e: Emitter, op: IntOp) -> None:
    pads = e.ints(f"{op.id}/paddings", [list(p) for p in op.attrs["paddings"]])
    e.row_op(op, [e.tensor(op.inputs[0]), pads], {"mode": 0 if op.attrs["mode"] == "reflect" else 1})


@lowers("strided_slice")
def _strided_slice(e: Emitter, op: IntOp) -> None:
    """`begin`, `end` (None: to the end) and `strides` per axis; `shrink` drops axes of size one."""
    begin, end = op.attrs["begin"], op.attrs["end"]
    masks = {
        "beginMask": sum(1 << i for i, b in enumerate(begin) if b is None),
        "endMask": sum(1 << i for i, b in enumerate(end) if b is None),
        "shrinkAxisMask": sum(1 << i for i in op.attrs.get("shrink", ())),
        "ellipsisMask": 0,
        "newAxisMask": 0,
    }
    bounds = [
        e.ints(f"{op.id}/begin", [b or 0 for b in begin]),
        e.ints(f"{op.id}/end", [b or 0 for b in end]),
        e.ints(f"{op.id}/strides", list(op.attrs["strides"])),
    ]
    e.row_op(op, [e.tensor(op.inputs[0]), *bounds], masks)


@lowers("tile")
def _tile(e: Emitter, op: IntOp) -> None:
    source, shape = e.tensor(op.inputs[0]), e.shape(op.inputs[0])
    if "expand" in op.attrs:
        axis = op.attrs["expand"]
        source = e.reshape(source, f"{op.id}/expanded", (*shape[:axis], 1, *shape[axis:]), op.inputs[0])
    e.row_op(op, [source, e.ints(f"{op.id}/repeats", list(op.attrs["repeats"]))], {})


@lowers("gather")
def _gather(e: Emitter, op: IntOp) -> None:
    indices = e.ints(f"{op.id}/indices", op.attrs["indices"])
    e.row_op(op, [e.tensor(op.inputs[0]), indices], {"axis": op.attrs["axis"], "batchDims": 0})


@lowers("resize_bilinear", "resize_nearest")
def _resize(e: Emitter, op: IntOp) -> None:
    rank = op.attrs["rank"]
    source, target, close = lifted(e, op, rank)
    shape = e.shape(op.outputs[0])
    size = (1, shape[1]) if rank == 1 else shape[1:3]
    if None in size:
        raise UnsupportedError(f"layer {op.id!r}", RESIZED, shape, "State the size as integers")
    fields = {
        "alignCorners": op.attrs.get("align_corners", False),
        "halfPixelCenters": op.attrs.get("half_pixel", True),
    }
    row = ROWS[op.kind]
    e.op(row.target, [source, e.ints(f"{op.id}/size", list(size))], [target], row.version, (row.options, fields))
    close()


@lowers("batch_matmul")
def _batch_matmul(e: Emitter, op: IntOp) -> None:
    fields = {
        "adjX": op.attrs.get("adj_x", False),
        "adjY": op.attrs.get("adj_y", False),
        "asymmetricQuantizeInputs": False,
    }
    e.row_op(op, [e.tensor(t) for t in op.inputs], fields)
