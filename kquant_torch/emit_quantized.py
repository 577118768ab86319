"""TorchScript for torch's `quantized::` kernels, which every engine has (fbgemm, qnnpack, x86, onednn).

They read and write quantized tensors: uint8 codes that carry a scale and a zero point. A tensor stays one between two
such kernels; whatever else reads it takes its codes. What they lack of limits is a clamp of the codes, the same values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.integer import IntOp
from kquant_torch.emit import Emitter, literal
from kquant_torch.emit_add import add_codes
from kquant_torch.emit_linear import arrays, needs_clamp

PACKED = "__torch__.torch.classes.quantized"
CONVOLUTION_TYPES = {1: "Conv2dPackedParamsBase", 2: "Conv2dPackedParamsBase", 3: "Conv3dPackedParamsBase"}
# QNNPACK's sum refuses to be made where an input's scale divided by the output's is not in this range.
SUMMED = (2.0**-14, 2.0**8)


def _limited(e: Emitter, op: IntOp, kernel: str, arguments: list[str]) -> str:
    """A call whose result keeps to the limits of the op: by the kernel's ReLU, or by a clamp of the codes."""
    apart, (low, _) = needs_clamp(e, op), e.bounds(op)
    relu = "_relu" if low > 0 and not apart else ""
    written = list(map(literal, e.grid(op.outputs[0])))
    made = f"ops.quantized.{kernel}{relu}({', '.join([*arguments, *written])})"
    if not apart:
        return e.holding(op.outputs[0], made)
    return f"torch.clamp(torch.int_repr({made}), {', '.join(map(literal, e.bounds(op)))})"


def _packed(e: Emitter, op: IntOp, codes: np.ndarray, name: str, kind: str, *window: Any) -> str:
    return e.pack(f"{op.id}/packed", e.call(f"pack_{name}", *arrays(e, op, codes), *window), f"{PACKED}.{kind}")


def convolution(
    e: Emitter, op: IntOp, source: list[str], codes: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int,
    shape: list[int] | None = None,
) -> str:  # fmt: skip
    """One convolution kernel over `source` (value, scale, zero point); engines choose their layout without `shape`."""
    rank = codes.ndim - 2
    window = [list(stride), list(padding), list(dilation), groups]
    kernel = _packed(e, op, codes, f"conv{rank}d", CONVOLUTION_TYPES[rank], *window)
    return _limited(e, op, f"conv{rank}d", [e.quantized(source), kernel])


def dense(e: Emitter, op: IntOp) -> str:
    """A linear layer."""
    assert op.weight is not None
    kernel = _packed(e, op, op.weight.codes, "linear", "LinearPackedParamsBase")
    return _limited(e, op, "linear", [e.quantized(e.read(op.inputs[0])), kernel])


def channel_affine(e: Emitter, op: IntOp) -> str:
    """One factor per channel along any axis: a depthwise kernel over an image of one row."""
    assert op.weight is not None
    codes = op.weight.codes.reshape(-1, 1, 1, 1)
    kernel = _packed(e, op, codes, "conv2d", CONVOLUTION_TYPES[2], [1, 1], [0, 0], [1, 1], codes.size)
    source, grid = e.read(op.inputs[0]), e.grid(op.outputs[0])
    return e.call("channel_affine_quantized", *source, kernel, *grid, *e.bounds(op), op.attrs["axis"])


def add(e: Emitter, op: IntOp) -> str:
    """A sum of two tensors; a difference, or scales that a kernel refuses, in integer arithmetic."""
    ratios = [e.grid(t)[0] / e.grid(op.outputs[0])[0] for t in op.inputs]
    if op.kind == "sub" or not all(SUMMED[0] <= r < SUMMED[1] for r in ratios):
        return add_codes(e, op)
    return _limited(e, op, "add", [e.quantized(e.read(t)) for t in op.inputs])


def mul(e: Emitter, op: IntOp) -> str:
    """A product of two tensors."""
    return _limited(e, op, "mul", [e.quantized(e.read(t)) for t in op.inputs])
