"""TFLite ops with weights: layouts, int4 storage, biases, and one-dimensional forms."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.affine import INT16_MAX, bias_codes, bias_unit
from kquant.core.errors import UnsupportedError
from kquant.core.fold import check_bias
from kquant.core.int8_spec import INT4_SHIFT, RESIZED, ROWS
from kquant.core.integer import IntOp
from kquant.core.target import TFLITE
from kquant.core.widen import BIAS_LIMIT, most_gain
from kquant.tflite.emit import Emitter, fused, lowers, padding

INT4_VERSION = {"CONV_2D": 7, "DEPTHWISE_CONV_2D": 6, "FULLY_CONNECTED": 10}


def stored(e: Emitter, op: IntOp) -> tuple[int, int]:
    """The bits in which a kernel is stored, and the factor by which its codes are multiplied (and its scale divided).

    The built-in kernels round twice (gemmlowp's rounding-doubling high multiply, then a rounding shift by r bits),
    which adds an error of up to 2^-r / 2 codes and, on ties of the first step, a bias of as much. Small codes make r
    small, so low-bit codes are spread over their storage: the same weights, a finer accumulator. int4, which only those
    kernels run, is used where r is at least `INT4_SHIFT`; elsewhere the codes lie in int8 and run on exact kernels.
    """
    weight = op.weight
    source = e.affine(op.inputs[0])
    gain4 = most_gain(weight, source, 7, BIAS_LIMIT / 16)  # XNNPACK's int4 kernels keep their biases times 16
    multiplier = bias_unit(source, weight.scale).max() / np.float64(e.affine(op.outputs[0]).scale)
    narrow = weight.storage_bits == 4 and source.bits != 16 and gain4 >= 1
    if narrow and multiplier / gain4 < 2.0**-INT4_SHIFT:
        return 4, gain4
    return 8, max(most_gain(weight, source, TFLITE.accumulator.widest), 1)


def weights(e: Emitter, op: IntOp, codes: np.ndarray, axis: int) -> tuple[int, int, int]:
    """The kernel (already in the target's layout, output channels on `axis`), the bias, and the op's version."""
    if e.is_float(op.inputs[0]):
        return _float_weights(e, op, codes, axis)
    bits, gain = stored(e, op)
    channels = op.weight.scale.size
    own = op.weight.scale[:1] if op.weight.per_tensor else op.weight.scale
    scale = (own / np.float32(gain)).astype(np.float32)
    kernel = e.constant(
        f"{op.id}/kernel", codes * np.int8(gain), dtype=f"int{bits}", scale=scale,
        zero_point=np.zeros(scale.size, np.int64), axis=axis,
    )  # fmt: skip
    source = e.affine(op.inputs[0])
    data, unit = bias_codes(op.weight.bias, source, scale)
    check_bias(op.weight.bias, unit, op.outputs[0], e.affine(op.outputs[0]))
    if source.bits == 16:
        _check_accumulator(op, np.moveaxis(codes, axis, -1).reshape(-1, channels) * gain, data)
    bias = e.constant(f"{op.id}/bias", data, scale=unit, zero_point=np.zeros(unit.size, np.int64))
    return kernel, bias, INT4_VERSION[ROWS[op.kind].target] if bits == 4 else e.version(op)


def _check_accumulator(op: IntOp, codes: np.ndarray, bias: np.ndarray) -> None:
    """Beside 16-bit inputs an int32 bias makes the kernel sum in 32 bits, which is exact if no sum can leave them.

    With an int64 bias the kernel keeps only 15 bits of the multiplier, and is up to a code and a half off (measured).
    """
    largest = np.abs(codes.astype(np.int64)).sum(axis=0) * (INT16_MAX + 1) + np.abs(bias.astype(np.int64))
    if (largest >= 2**31).any():
        raise UnsupportedError(
            f"layer {op.parts[0].layer if op.parts else op.id!r}",
            "with 16-bit inputs every sum must fit 32 bits, or the kernel does not keep its bound",
            f"channel {int(largest.argmax())} can reach 2^{np.log2(float(largest.max())):.1f}",
            "Give this layer 8-bit inputs, or fewer weight bits",
        )


def bias_type(e: Emitter, op: IntOp) -> dict[str, int]:
    """The option that says that the bias is int32 beside 16-bit inputs (TensorType INT32 of the schema)."""
    tensor = e.model.tensors[op.inputs[0]]
    return {"quantizedBiasType": 2} if tensor.dtype == "int16" else {}


def _float_weights(e: Emitter, op: IntOp, codes: np.ndarray, axis: int) -> tuple[int, int, int]:
    """Weights-only: an integer kernel that is dequantized in the file, beside a float bias."""
    scale = op.weight.scale
    kernel = e.constant(f"{op.id}/kernel", codes, scale=scale, zero_point=np.zeros(scale.size, np.int64), axis=axis)
    wide = e.helper(f"{op.id}/kernel_float", codes.shape, "float32")
    e.op("DEQUANTIZE", [kernel], [wide], 5 if scale.size > 1 else 2, ("DequantizeOptions", {}))
    return wide, e.constant(f"{op.id}/bias", op.weight.bias.astype(np.float32)), 1


def lifted(e: Emitter, op: IntOp, rank: int) -> tuple[int, int, Any]:
    """Input and output as 4-D tensors `[N, 1, T, C]` for one spatial axis; and what closes the op."""
    source, target = e.tensor(op.inputs[0]), e.tensor(op.outputs[0])
    if rank == 2:
        return source, target, lambda: None
    in_shape, out_shape = e.shape(op.inputs[0]), e.shape(op.outputs[0])
    tall = e.reshape(source, f"{op.id}/in4d", (in_shape[0], 1, *in_shape[1:]), op.inputs[0])
    result = e.inner(f"{op.id}/out4d", (out_shape[0], 1, *out_shape[1:]), op.outputs[0])
    return tall, result, lambda: e.reshape_into(result, target, out_shape, f"{op.id}/flat")


def both(values: Any, rank: int) -> tuple[int, int]:
    """(height, width) of a setting; one spatial axis is the width."""
    return (1, int(values[0])) if rank == 1 else (int(values[0]), int(values[1]))


def _convolution_fields(op: IntOp) -> dict:
    rank = op.attrs["rank"]
    (stride_h, stride_w), (dilation_h, dilation_w) = both(op.attrs["strides"], rank), both(op.attrs["dilation"], rank)
    return {
        "padding": padding(op), "strideH": stride_h, "strideW": stride_w, "dilationHFactor": dilation_h,
        "dilationWFactor": dilation_w, "fusedActivationFunction": fused(op),
    }  # fmt: skip


def _causal(e: Emitter, op: IntOp, source: int) -> tuple[int, dict]:
    """A causal convolution pads the past with zeros, that is with the zero point."""
    fields = _convolution_fields(op)
    if op.attrs["padding"] != "causal":
        return source, fields
    reach = op.attrs["dilation"][0] * (op.weight.codes.shape[0] - 1)
    shape = e.shape(op.inputs[0])
    length = None if shape[1] is None else shape[1] + reach
    padded = e.inner(f"{op.id}/padded", (shape[0], 1, length, shape[2]), op.inputs[0])
    pads = e.ints(f"{op.id}/paddings", [[0, 0], [0, 0], [reach, 0], [0, 0]])
    e.op("PAD", [source, pads], [padded], 2, ("PadOptions", {}))
    return padded, fields


@lowers("conv2d")
def _conv2d(e: Emitter, op: IntOp) -> None:
    codes = op.weight.codes if op.attrs["rank"] == 2 else op.weight.codes[None]
    kernel, bias, version = weights(e, op, np.ascontiguousarray(codes.transpose(3, 0, 1, 2)), 0)
    source, target, close = lifted(e, op, op.attrs["rank"])
    source, fields = _causal(e, op, source)
    e.op("CONV_2D", [source, kernel, bias], [target], version, ("Conv2DOptions", {**fields, **bias_type(e, op)}))
    close()


@lowers("depthwise_conv2d")
def _depthwise(e: Emitter, op: IntOp) -> None:
    codes = op.weight.codes if op.attrs["rank"] == 2 else op.weight.codes[None]
    source, target, close = lifted(e, op, op.attrs["rank"])
    _depthwise_op(e, op, codes, source, target, _convolution_fields(op))
    close()


def _depthwise_op(e: Emitter, op: IntOp, codes: np.ndarray, source: int, target: int, fields: dict) -> None:
    """DEPTHWISE_CONV_2D; beside 16-bit inputs, whose kernel there is coarse, CONV_2D with a group per input channel."""
    height, width, channels, multiplier = codes.shape
    flat = codes.reshape(1, height, width, channels * multiplier)
    if bias_type(e, op):
        kernel, bias, _ = weights(e, op, np.ascontiguousarray(flat.transpose(3, 1, 2, 0)), 0)
        options = ("Conv2DOptions", {**fields, **bias_type(e, op)})
        e.op("CONV_2D", [source, kernel, bias], [target], ROWS["conv2d"].version16, options)
        return
    kernel, bias, version = weights(e, op, flat, 3)
    options = ("DepthwiseConv2DOptions", {**fields, "depthMultiplier": multiplier})
    e.op("DEPTHWISE_CONV_2D", [source, kernel, bias], [target], version, options)


@lowers("channel_affine")
def _channel_affine(e: Emitter, op: IntOp) -> None:
    """A 1x1 depthwise convolution: one code of full magnitude per channel, so the factor is exact."""
    in_shape, channels = e.shape(op.inputs[0]), op.weight.codes.size
    codes = op.weight.codes.reshape(1, 1, channels, 1)
    fields = {
        "padding": 1, "strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1,
        "fusedActivationFunction": fused(op),
    }  # fmt: skip
    source, target = e.tensor(op.inputs[0]), e.tensor(op.outputs[0])
    if len(in_shape) == 4:
        _depthwise_op(e, op, codes, source, target, fields)
        return
    inner = in_shape[1:-1]
    middle = [1] * (2 - len(inner)) + list(inner) if len(inner) < 2 else [1, int(np.prod(inner))]
    shape = (in_shape[0], *middle, channels)
    tall = e.reshape(source, f"{op.id}/in4d", shape, op.inputs[0])
    result = e.inner(f"{op.id}/out4d", shape, op.outputs[0])
    _depthwise_op(e, op, codes, tall, result, fields)
    e.reshape_into(result, target, in_shape, f"{op.id}/flat")


@lowers("dense")
def _dense(e: Emitter, op: IntOp) -> None:
    count = op.attrs.get("contracted", 1)
    codes = op.weight.codes
    features = int(np.prod(codes.shape[:count]))
    units = codes.size // features
    kernel, bias, version = weights(e, op, np.ascontiguousarray(codes.reshape(features, units).T), 0)
    source, target = e.tensor(op.inputs[0]), e.tensor(op.outputs[0])
    in_shape, out_shape = e.shape(op.inputs[0]), e.shape(op.outputs[0])
    if count > 1:
        in_shape = (*in_shape[: len(in_shape) - count], features)
        source = e.reshape(source, f"{op.id}/in_flat", in_shape, op.inputs[0])
    wide = (*in_shape[:-1], units)
    result = target if wide == tuple(out_shape) else e.inner(f"{op.id}/out_flat", wide, op.outputs[0])
    fields = {"fusedActivationFunction": fused(op), "weightsFormat": 0, "keepNumDims": len(wide) != 2}
    e.op(
        "FULLY_CONNECTED",
        [source, kernel, bias],
        [result],
        version,
        ("FullyConnectedOptions", {**fields, **bias_type(e, op)}),
    )
    if result != target:
        e.reshape_into(result, target, out_shape, f"{op.id}/split")


@lowers("conv2d_transpose")
def _transpose_conv(e: Emitter, op: IntOp) -> None:
    rank = op.attrs["rank"]
    codes = op.weight.codes if rank == 2 else op.weight.codes[None]
    kernel, bias, _ = weights(e, op, np.ascontiguousarray(codes.transpose(2, 0, 1, 3)), 0)
    source, target, close = lifted(e, op, rank)
    out_shape = e.shape(op.outputs[0])
    out_shape = out_shape if rank == 2 else (out_shape[0], 1, *out_shape[1:])
    stride_h, stride_w = both(op.attrs["strides"], rank)
    fields = {"padding": padding(op), "strideH": stride_h, "strideW": stride_w, "fusedActivationFunction": fused(op)}
    shape = _output_shape(e, op, source, out_shape)
    e.op(
        "TRANSPOSE_CONV", [shape, kernel, source, bias], [target], 4 if op.relu else 3, ("TransposeConvOptions", fields)
    )
    close()


def _output_shape(e: Emitter, op: IntOp, source: int, shape: Any) -> int:
    """The int32 output shape: a constant, or with the batch of the input where that is dynamic."""
    if None not in shape:
        return e.ints(f"{op.id}/output_shape", shape)
    if None in shape[1:]:
        raise UnsupportedError(f"layer {op.id!r}", RESIZED, shape, "State the size as integers")
    whole = e.helper(f"{op.id}/input_shape", (4,), "int32")
    batch = e.helper(f"{op.id}/batch", (1,), "int32")
    result = e.helper(f"{op.id}/output_shape", (4,), "int32")
    e.op("SHAPE", [source], [whole], 1, ("ShapeOptions", {"outType": 2}))
    bounds = [e.ints(f"{op.id}/{n}", [v]) for n, v in (("begin", 0), ("end", 1), ("step", 1))]
    e.op("STRIDED_SLICE", [whole, *bounds], [batch], 1, ("StridedSliceOptions", {}))
    rest = e.ints(f"{op.id}/output_rest", [int(s) for s in shape[1:]])
    e.op("CONCATENATION", [batch, rest], [result], 1, ("ConcatenationOptions", {"axis": 0}))
    return result


@lowers("embedding")
def _embedding(e: Emitter, op: IntOp) -> None:
    table = e.constant(f"{op.id}/table", op.attrs["constant"], e.affine(op.outputs[0]))
    fields = {"axis": 0, "batchDims": 0}
    e.op("GATHER", [table, e.tensor(op.inputs[0])], [e.tensor(op.outputs[0])], 2, ("GatherOptions", fields))
