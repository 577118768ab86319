"""Compare the parameters in a file with the trained ones: kernels, biases, scales and zero points."""

from __future__ import annotations

import numpy as np

from kquant.core.fold import scale_floor
from kquant.core.graph import Op
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.target import TFLITE
from kquant.tflite.flatbuffer import FileModel, FileTensor

WEIGHT_TOLERANCE = 2e-6  # relative, on code * scale: the float32 scale and the float32 batch norm factor
BIAS_TOLERANCE = 0.5 + 1e-3  # units of s_in * s_w: rounding to the nearest code, in float64 of float32 values
LAYOUTS = {  # from the file's layout to the neutral one, the channel axis last
    "conv2d": lambda k, shape: k.transpose(1, 2, 3, 0),
    "depthwise_conv2d": lambda k, shape: k[0],
    "conv2d_transpose": lambda k, shape: k.transpose(1, 2, 3, 0),
    "dense": lambda k, shape: k.T,
    "channel_affine": lambda k, shape: k.reshape(1, -1),
}


def compare_parameters(model: IntegerModel, file: FileModel) -> tuple[list[str], int]:
    """What in the file is not as trained, in words, and how many arrays were compared."""
    tensors = {t.name: t for t in file.tensors}
    problems, checked = [], 0
    for tensor in model.tensors.values():
        found = tensors.get(tensor.id)
        if found is None or tensor.affine is None or found.dtype == "float32":
            continue
        checked += 1
        want = (np.float32(tensor.affine.scale), tensor.affine.zero_point + (128 if found.dtype == "uint8" else 0))
        have = (np.float32(found.scale[0]), int(found.zero_point[0])) if found.scale is not None else None
        if have != want:
            problems.append(f"tensor {tensor.id!r}: scale and zero point {have}, trained {want}")
    for op in model.ops:
        if op.weight is not None and op.kind in LAYOUTS:
            problems += _compare_weights(op, tensors, model)
            checked += 2
    return problems, checked


def trained_kernel(op: IntOp) -> tuple[np.ndarray, np.ndarray]:
    """The trained fake-quantized kernel with the batch norm factor in it (channels last, flattened), and the bias."""
    anchor = op.parts[0]
    if anchor.kind == "fake_quant":  # an identity kernel that requantizes
        return np.ones((1, op.weight.scale.size)), np.zeros(op.weight.scale.size)
    if anchor.kind == "channel_affine":
        return _values(anchor, "scale").reshape(1, -1), _values(anchor, "offset")
    codes, scale = (np.asarray(a, np.float64) for a in anchor.attrs["codes"]())
    kernel = codes * scale
    axes = anchor.attrs["kernel_axes"]
    kept = [i for i in range(kernel.ndim) if i not in axes]
    flat = kernel.transpose(*axes, *kept).reshape(int(np.prod([kernel.shape[a] for a in axes])), -1)

    def spread(op: Op, role: str) -> np.ndarray:
        values = _values(op, role)
        whole = values if values.size == flat.shape[1] else np.broadcast_to(values, [kernel.shape[i] for i in kept])
        return whole.reshape(-1)

    bias = spread(anchor, "bias") if "bias" in anchor.weights else np.zeros(flat.shape[1])
    norm = next((p for p in op.parts[1:] if p.kind == "channel_affine"), None)
    if norm is None:
        return flat, bias
    factor = spread(norm, "scale")
    return flat * factor, bias * factor + spread(norm, "offset")


def _values(op: Op, role: str) -> np.ndarray:
    return np.asarray(op.weights[role].read(), np.float64)


def _compare_weights(op: IntOp, tensors: dict[str, FileTensor], model: IntegerModel) -> list[str]:
    name = next((n for n in (op.id, f"{op.id}/unclamped") if f"{n}/kernel" in tensors), op.id)
    kernel, bias = tensors.get(f"{name}/kernel"), tensors.get(f"{name}/bias")
    if kernel is None or bias is None:
        return [f"op {op.id!r}: its kernel or bias is not in the file"]
    want, want_bias = trained_kernel(op if op.parts else _with_parts(op, model))
    wide = model.tensors[op.inputs[0]].dtype == "int16"  # there every convolution is written as CONV_2D
    layout = LAYOUTS["conv2d" if wide and kernel.data.ndim == 4 else op.kind]
    codes = layout(kernel.data.astype(np.float64), want.shape)
    codes = codes.reshape(-1, codes.shape[-1])
    scale = kernel.scale.astype(np.float64)
    source = model.tensors[op.inputs[0]].affine
    problems = []
    # Half a code of slack only where a nearly dead channel's scale was raised so that its bias fits. The file's own
    # scale does not tell: its codes may be spread, with the scale divided by as much.
    target = model.tensors[op.outputs[0]].affine
    largest = np.abs(want).max(axis=0)
    holds = TFLITE.accumulator
    floor = np.zeros(scale.size) if source is None else scale_floor(want_bias, largest, source, target, holds)
    slack = WEIGHT_TOLERANCE * np.abs(want) + np.where(op.weight.scale <= floor * 1.001, 0.5 * floor, 0.0)
    error = np.abs(codes * scale - want) - slack - 1e-30
    tiny = (
        np.abs(want).max(axis=0) < op.weight.scale
    )  # a channel whose largest weight is below one code of the raised scale
    if (error[:, ~tiny] > 0).any():
        channel = int(np.argmax(error.max(axis=0)))
        problems.append(f"op {op.id!r}: the kernel of channel {channel} is not the trained one")
    # Without input codes the bias is float32 and must be the trained one to an ulp.
    unit = np.abs(want_bias) * 1e-6 + 1e-30 if source is None else np.float64(source.scale) * scale
    values = bias.data * (1.0 if source is None else unit)
    off = np.abs(values - want_bias) / unit
    if (off > BIAS_TOLERANCE).any():
        problems.append(f"op {op.id!r}: the bias of channel {int(off.argmax())} is {off.max():.2f} units off")
    return problems


def _with_parts(op: IntOp, model: IntegerModel) -> IntOp:
    """The trained parts of an op whose clamp stands behind it."""
    for other in model.ops:
        if op.outputs[0] in other.inputs and other.parts:
            return other
    return op
