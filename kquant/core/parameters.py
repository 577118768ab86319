"""Compare the kernels and biases of an artifact with the trained ones, whatever the artifact's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kquant.core.fold import channel_floors
from kquant.core.graph import Op
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.target import Accumulator

WEIGHT_TOLERANCE = 2e-6  # relative, on code * scale: the float32 scale and the float32 batch norm factor
BIAS_TOLERANCE = 0.5 + 1e-3  # units: rounding to the nearest one, in float64 of float32 values
FLOAT_UNIT = 1e-6  # of a bias that is a float32: its unit, relative to its value


@dataclass(frozen=True)
class Found:
    """A kernel as an artifact holds it.

    Args:
        codes: (products, output channels).
        scale: one per output channel.
        bias: real values, one per output channel.
        unit: of the bias, one per output channel; None for a float32 bias.
    """

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    unit: np.ndarray | None


Grid = tuple[np.float32, int]


def compare_grids(model: IntegerModel, found: Mapping[str, set[Grid | None]]) -> tuple[list[str], int]:
    """What in an artifact is not on the trained grid, in words, and how many tensors were compared.

    Args:
        model: the integer model of the trained one.
        found: by tensor id, each scale and zero point (of int8 codes) that the artifact states for it.
    """
    problems, checked = [], 0
    for tensor in model.tensors.values():
        if tensor.affine is None or tensor.id not in found:
            continue
        checked += 1
        want = (np.float32(tensor.affine.scale), tensor.affine.zero_point)
        problems += [
            f"tensor {tensor.id!r}: scale and zero point {have}, trained {want}"
            for have in found[tensor.id]
            if have != want
        ]
    return problems, checked


def compare_weight(op: IntOp, found: Found, model: IntegerModel, holds: Accumulator) -> list[str]:
    """What is not as trained in the kernel and the bias of an op, in words."""
    assert op.weight is not None
    trained = op if op.parts else _with_parts(op, model)
    want, want_bias = trained_kernel(trained)
    source, target = (model.tensors[t].affine for t in (op.inputs[0], op.outputs[0]))
    if found.codes.shape != want.shape:
        return [f"op {op.id!r}: its kernel has the shape {found.codes.shape}, the trained one {want.shape}"]
    codes, scale = found.codes.astype(np.float64), found.scale.astype(np.float64)
    problems = []
    # Half a code of slack only where a nearly dead channel's scale was raised so that its bias fits. The file's own
    # scale does not tell: its codes may be spread, with the scale divided by as much.
    largest = np.abs(want).max(axis=0)
    floor = np.zeros(largest.size)
    if source is not None and target is not None:
        floor = channel_floors(trained.parts[0], want_bias, largest, source, target, holds)
    raised = op.weight.scale <= floor * 1.001
    slack = WEIGHT_TOLERANCE * np.abs(want) + np.where(raised, 0.5 * floor, 0.0)
    error = np.abs(codes * scale - want) - slack - 1e-30
    tiny = raised & (largest < op.weight.scale)  # a channel whose largest weight is below one code of the raised scale
    if (error[:, ~tiny] > 0).any():
        channel = int(np.argmax(error.max(axis=0)))
        problems.append(f"op {op.id!r}: the kernel of channel {channel} is not the trained one")
    unit = np.abs(want_bias) * FLOAT_UNIT + 1e-30 if found.unit is None else found.unit
    off = np.abs(found.bias - want_bias) / unit
    if (off > BIAS_TOLERANCE).any():
        problems.append(f"op {op.id!r}: the bias of channel {int(off.argmax())} is {off.max():.2f} units off")
    return problems


def trained_kernel(op: IntOp) -> tuple[np.ndarray, np.ndarray]:
    """The trained fake-quantized kernel with the batch norm factor in it (channels last, flattened), and the bias."""
    anchor = op.parts[0]
    if anchor.kind == "fake_quant":  # an identity kernel that requantizes
        channels = op.weight.scale.size if op.weight is not None else 0
        return np.ones((1, channels)), np.zeros(channels)
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


def _with_parts(op: IntOp, model: IntegerModel) -> IntOp:
    """The trained parts of an op whose clamp stands behind it."""
    for other in model.ops:
        if op.outputs[0] in other.inputs and other.parts:
            return other
    return op
