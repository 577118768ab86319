"""Compare the parameters in a file with the trained ones: kernels, biases, scales and zero points."""

from __future__ import annotations

import numpy as np

from kquant.core.affine import bias_unit
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.parameters import Found, Grid, compare_grids, compare_weight
from kquant.core.target import TFLITE
from kquant.tflite.flatbuffer import FileModel, FileTensor

LAYOUTS = {  # from the file's layout to the neutral one, the channel axis last
    "conv2d": lambda k: k.transpose(1, 2, 3, 0),
    "depthwise_conv2d": lambda k: k[0],
    "conv2d_transpose": lambda k: k.transpose(1, 2, 3, 0),
    "dense": lambda k: k.T,
    "channel_affine": lambda k: k.reshape(1, -1),
}


def compare_parameters(model: IntegerModel, file: FileModel) -> tuple[list[str], int]:
    """What in the file is not as trained, in words, and how many arrays were compared."""
    tensors = {t.name: t for t in file.tensors}
    grids = {t.name: {_grid(t)} for t in file.tensors if t.dtype != "float32"}
    problems, checked = compare_grids(model, grids)
    for op in model.ops:
        if op.weight is not None and op.kind in LAYOUTS:
            problems += _compare_weights(op, tensors, model)
            checked += 2
        elif op.kind == "parameter":
            found = tensors[op.outputs[0]].data
            if found is None or not np.array_equal(found, model.tensors[op.outputs[0]].constant):
                problems.append(f"array {op.outputs[0]!r}: its codes in the file are not the trained ones")
            checked += 1
    return problems, checked


def _grid(tensor: FileTensor) -> Grid | None:
    """Scale and zero point, the latter of int8 codes."""
    if tensor.scale is None:
        return None
    return np.float32(tensor.scale[0]), int(tensor.zero_point[0]) - (128 if tensor.dtype == "uint8" else 0)


def _compare_weights(op: IntOp, tensors: dict[str, FileTensor], model: IntegerModel) -> list[str]:
    name = next((n for n in (op.id, f"{op.id}/unclamped") if f"{n}/kernel" in tensors), op.id)
    kernel, bias = tensors.get(f"{name}/kernel"), tensors.get(f"{name}/bias")
    if kernel is None or bias is None:
        return [f"op {op.id!r}: its kernel or bias is not in the file"]
    wide = model.tensors[op.inputs[0]].dtype == "int16"  # there every convolution is written as CONV_2D
    codes = LAYOUTS["conv2d" if wide and kernel.data.ndim == 4 else op.kind](kernel.data)
    source = model.tensors[op.inputs[0]].affine
    # Without input codes the bias is float32.
    unit = None if source is None else bias_unit(source, kernel.scale)
    values = bias.data if unit is None else bias.data * unit
    found = Found(codes.reshape(-1, codes.shape[-1]), kernel.scale, values, unit)
    return compare_weight(op, found, model, TFLITE.accumulator)
