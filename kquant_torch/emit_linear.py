"""TorchScript for ops with weights: plain int8 kernels in the file, prepacked for the backend when it is loaded."""

from __future__ import annotations

import numpy as np

from kquant.core.affine import bias_error, bias_unit, round_half_up
from kquant.core.fold import check_bias
from kquant.core.integer import IntOp, IntWeight
from kquant.core.parity import TIE
from kquant.core.widen import gain_for_bias
from kquant_torch.emit import Emitter, literal, unsigned, writes


def needs_clamp(e: Emitter, op: IntOp) -> bool:
    """Whether an op has limits that neither a ReLU nor the saturation to uint8 gives."""
    (low, high), zero_point = e.bounds(op), e.grid(op.outputs[0])[1]
    return high < 255 or low not in (0, zero_point)


def arrays(e: Emitter, op: IntOp, codes: np.ndarray) -> tuple[str, str, str]:
    """A kernel in the file: its codes, scales and bias."""
    weight = op.weight
    assert weight is not None
    gain = gain_for_bias(weight, e.affine(op.inputs[0]), e.affine(op.outputs[0]), e.backend.target.accumulator)
    kernel = e.array(f"{op.id}/kernel", codes * np.int8(gain))
    scale = e.array(f"{op.id}/scale", weight.scale / np.float32(gain))
    return kernel, scale, e.array(f"{op.id}/bias", held_bias(e, op, gain).astype(np.float32))


def held_bias(e: Emitter, op: IntOp, gain: int) -> np.ndarray:
    """The bias as a multiple of `s_in * s_w`, as integer kernels hold it, so that every artifact gives the same codes.

    Where that unit is so coarse that rounding to it would show, a kernel that takes a float is given the bias as it is.
    """
    weight = op.weight
    assert weight is not None
    unit = bias_unit(e.affine(op.inputs[0]), weight.scale) / gain
    takes_float = e.backend.target.accumulator.bias_limit == float("inf")
    if takes_float and bias_error(weight.bias, unit, e.affine(op.outputs[0])) > TIE:
        return weight.bias
    check_bias(weight.bias, unit, op.outputs[0], e.affine(op.outputs[0]))
    rounded: np.ndarray = round_half_up(weight.bias / unit) * unit
    return rounded


def kernel_shape(e: Emitter, op: IntOp) -> list[int]:
    """The shape of an op's input with a batch of one."""
    return [1 if s is None else int(s) for s in e.model.tensors[op.inputs[0]].shape]


@writes("conv2d")
def _conv(e: Emitter, op: IntOp) -> str:
    assert op.weight is not None
    a = op.attrs
    return e.backend.convolution(
        e, op, e.read(op.inputs[0]), op.weight.codes, a["stride"], a["padding"], a["dilation"], a["groups"]
    )


@writes("conv2d_transpose")
def _transposed(e: Emitter, op: IntOp) -> str:
    """An ordinary convolution with the mirrored kernel over the input with `stride - 1` zeros between its elements."""
    assert op.weight is not None
    a, rank = op.attrs, op.attrs["rank"]
    codes = op.weight.codes if a["groups"] > 1 else op.weight.codes[None]  # (groups, in, out, *window)
    window = codes.shape[3:]
    codes = np.flip(codes.swapaxes(1, 2), tuple(range(3, 3 + rank))).reshape(-1, codes.shape[1], *window)
    reach = [d * (k - 1) - p for d, k, p in zip(a["dilation"], window, a["padding"], strict=True)]
    after = [r + o for r, o in zip(reach, a["output_padding"], strict=True)]
    source = e.read(op.inputs[0])
    grown = [max(r, 0) for r in reach], [max(r, 0) for r in after]
    wide = e.call("spread", source[0], source[2], list(a["stride"]), *grown)
    for axis, (first, last) in enumerate(zip(reach, after, strict=True)):
        if first < 0 or last < 0:  # more padding than the kernel reaches: the border is cut off
            end = "None" if last >= 0 else literal(last)
            wide = f"torch.slice({wide}, {axis + 2}, {max(-first, 0)}, {end}, 1)"
    ones, given = [1] * rank, kernel_shape(e, op)
    sizes = zip(given[2:], a["stride"], reach, after, strict=True)
    shape = [*given[:2], *((n - 1) * s + 1 + before + behind for n, s, before, behind in sizes)]
    kernel = np.ascontiguousarray(codes)
    return e.backend.convolution(
        e, op, [wide, *source[1:]], kernel, ones, [0] * rank, a["dilation"], a["groups"], shape
    )


@writes("dense")
def _dense(e: Emitter, op: IntOp) -> str:
    return e.backend.dense(e, op)


@writes("channel_affine")
def _channel_affine(e: Emitter, op: IntOp) -> str:
    """A 1x1 depthwise kernel with one code per channel; the factor is its scale."""
    assert op.weight is not None
    if e.rank(op.inputs[0]) != 4 or op.attrs["axis"] != 1:
        return e.backend.channel_affine(e, op)
    codes = op.weight.codes.reshape(-1, 1, 1, 1)
    return e.backend.convolution(e, op, e.read(op.inputs[0]), codes, (1, 1), (0, 0), (1, 1), codes.size)


@writes("avg_pool2d")
def _average(e: Emitter, op: IntOp) -> str:
    """A depthwise kernel of ones whose scale divides by the size of the window."""
    a = op.attrs
    channels = int(e.model.tensors[op.inputs[0]].shape[1])
    count = int(np.prod(a["kernel_size"]))
    codes = np.ones((channels, 1, *a["kernel_size"]), np.int8)
    scale = np.full(channels, 1.0 / count, np.float32)
    made = IntOp(**{**vars(op), "weight": IntWeight(codes, scale, 8, np.zeros(channels))})
    ones = [1] * a["rank"]
    return e.backend.convolution(e, made, e.read(op.inputs[0]), codes, a["stride"], a["padding"], ones, channels)


@writes("embedding")
def _embedding(e: Emitter, op: IntOp) -> str:
    table = e.array(f"{op.id}/table", unsigned(op.attrs["constant"]))
    ids = e.codes(op.inputs[0])
    found = f"torch.index_select({table}, 0, torch.reshape({ids}, [-1]))"
    return f"torch.reshape({found}, torch.add(torch.size({ids}), {literal([op.attrs['constant'].shape[1]])}))"
