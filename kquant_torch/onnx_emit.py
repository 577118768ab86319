"""The integer model as ONNX in Q/DQ form: float ops between Q and DQ nodes, which onnxruntime fuses.

What moves, compares or looks up codes works on the uint8 tensors themselves. Weights are int8 with a scale per output
channel, biases int32 in units of `s_in * s_w`, as the fused integer kernels take them. Names are those of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kquant.core.affine import Affine, bias_codes
from kquant.core.errors import ExportError, UnsupportedError
from kquant.core.fold import check_bias
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.target import Accumulator, Target
from kquant.core.widen import gain_for_bias
from kquant_torch.emit import SHIFT_OF_CODES, unsigned
from kquant_torch.target import ONEDNN, PORTABLE

OPSET = 18
IR_VERSION = 9
# The fused kernels of onnxruntime add an int32 bias to the sum, so it must fit.
ONNX: Target = replace(ONEDNN, name="onnx", accumulator=Accumulator(bias_limit=2.0**30, widest=PORTABLE))

Writer = Callable[["OnnxEmitter", IntOp], str]
WRITERS: dict[str, Writer] = {}


def writes(*kinds: str) -> Callable[[Writer], Writer]:
    """Enter the function that writes some op kinds and returns the name of the result."""

    def enter(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(kinds, function))
        return function

    return enter


def onnx_module() -> Any:
    """The onnx package.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError("export_onnx", "the package onnx", "not installed", 'pip install "kquant[onnx]"') from error
    return onnx


class OnnxEmitter:
    """Collects the nodes and initializers of one file."""

    def __init__(self, model: IntegerModel):
        self.onnx, self.model = onnx_module(), model
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}

    # -- pieces ---------------------------------------------------------------------------------------------------

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node; returns its output."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def array(self, name: str, values: np.ndarray) -> str:
        """An initializer."""
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def ints(self, name: str, values: Any) -> str:
        """An int64 initializer."""
        return self.array(name, np.asarray(values, np.int64))

    def codes(self, tensor: str) -> str:
        """The uint8 tensor of a tensor of the model."""
        held = self.model.tensors[tensor]
        if held.constant is not None and held.affine is not None:
            self.array(tensor, unsigned(held.constant))
        return tensor

    def grid(self, tensor: str) -> list[str]:
        """Names of the scale and zero point of a tensor."""
        affine = self.affine(tensor)
        scale = self.array(f"{tensor}/scale", np.asarray(affine.scale, np.float32))
        return [scale, self.array(f"{tensor}/zero_point", np.asarray(affine.zero_point + SHIFT_OF_CODES, np.uint8))]

    def affine(self, tensor: str) -> Affine:
        """The quantization of a tensor."""
        affine = self.model.tensors[tensor].affine
        assert affine is not None
        return affine

    def real(self, tensor: str) -> str:
        """A tensor dequantized, anew for each reader, as the fusion wants it."""
        held = self.model.tensors[tensor]
        if held.constant is not None and held.affine is None:
            return self.array(tensor, held.constant)
        name = f"{tensor}/real:{len(self.nodes)}"
        return self.node("DequantizeLinear", [self.codes(tensor), *self.grid(tensor)], name)

    def weight(self, op: IntOp, codes: np.ndarray, axis: int) -> tuple[str, str]:
        """The dequantized kernel, output channels on `axis`, and bias of an op."""
        assert op.weight is not None
        source, target = (self.affine(t) for t in (op.inputs[0], op.outputs[0]))
        gain = gain_for_bias(op.weight, source, target, ONNX.accumulator)
        scales = op.weight.scale / np.float32(gain)
        data, unit = bias_codes(op.weight.bias, source, scales)
        check_bias(op.weight.bias, unit, op.outputs[0], target)
        scale = self.array(f"{op.id}/kernel/scale", scales)
        zero = self.array(f"{op.id}/kernel/zero_point", np.zeros(op.weight.scale.size, np.int8))
        kernel = self.array(f"{op.id}/kernel", codes * np.int8(gain))
        made = self.node("DequantizeLinear", [kernel, scale, zero], f"{op.id}/kernel/real", axis=axis)
        bias = [self.array(f"{op.id}/bias", data), self.array(f"{op.id}/bias/scale", unit)]
        bias.append(self.array(f"{op.id}/bias/zero_point", np.zeros(data.size, np.int32)))
        return made, self.node("DequantizeLinear", bias, f"{op.id}/bias/real", axis=0)

    def quantized(self, op: IntOp, real: str, output: str = "") -> str:
        """A real result clamped to what the op may give, and quantized; `output` names it before it is moved."""
        tensor, affine = op.outputs[0], self.affine(op.outputs[0])
        low = affine.zero_point if op.relu else affine.qmin
        if op.relu and affine.zero_point >= affine.qmin and op.relu_max is None:
            real = self.node("Relu", [real], f"{op.id}/relu")
        elif low > -SHIFT_OF_CODES or op.relu_max is not None:
            floor = np.float32((max(low, affine.qmin) - affine.zero_point) * affine.scale)
            ceiling = np.float32(op.relu_max if op.relu_max is not None else (127 - affine.zero_point) * affine.scale)
            limits = [self.array(f"{op.id}/low", floor), self.array(f"{op.id}/high", ceiling)]
            real = self.node("Clip", [real, *limits], f"{op.id}/clip")
        return self.node("QuantizeLinear", [real, *self.grid(tensor)], output or tensor)

    # -- the file -------------------------------------------------------------------------------------------------

    def build(self) -> bytes:
        """The file's bytes."""
        for op in self.model.ops:
            if op.kind not in WRITERS:
                raise UnsupportedError(
                    f"op {op.id!r}", "an op that the ONNX export has a form for", op.kind, "Use export_torchscript"
                )
            WRITERS[op.kind](self, op)
        helper = self.onnx.helper
        outputs = [self._port(t) for t in self.model.outputs]
        inputs = [self._port(t) for t in self.model.inputs]
        graph = helper.make_graph(self.nodes, self.model.name, inputs, outputs, list(self.initializers.values()))
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="kquant")
        self.onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))

    def _port(self, tensor: str) -> Any:
        held = self.model.tensors[tensor]
        dtype = "uint8" if held.affine is not None else held.dtype
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        sizes = ["batch" if s is None else int(s) for s in held.shape]
        return self.onnx.helper.make_tensor_value_info(tensor, kind, sizes)


@writes("quantize")
def _quantize(e: OnnxEmitter, op: IntOp) -> str:
    return e.quantized(op, op.inputs[0])


@writes("dequantize")
def _dequantize(e: OnnxEmitter, op: IntOp) -> str:
    return e.node("DequantizeLinear", [op.inputs[0], *e.grid(op.inputs[0])], op.outputs[0])


@writes("table")
def _table(e: OnnxEmitter, op: IntOp) -> str:
    assert op.table is not None
    table = e.array(f"{op.id}/table", unsigned(op.table))
    index = e.node("Cast", [e.codes(op.inputs[0])], f"{op.id}/index", to=e.onnx.TensorProto.INT32)
    shape = op.attrs.get("offsets")
    if shape is not None:
        start = 256 * np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
        index = e.node("Add", [index, e.array(f"{op.id}/start", start)], f"{op.id}/moved")
    return e.node("Gather", [table, index], op.outputs[0], axis=0)


@writes("conv2d")
def _conv(e: OnnxEmitter, op: IntOp) -> str:
    assert op.weight is not None
    a = op.attrs
    kernel, bias = e.weight(op, op.weight.codes, 0)
    window = {"strides": a["stride"], "dilations": a["dilation"], "pads": [*a["padding"], *a["padding"]]}
    real = e.node("Conv", [e.real(op.inputs[0]), kernel, bias], f"{op.id}/sum", group=a["groups"], **window)
    return e.quantized(op, real)


@writes("conv2d_transpose")
def _transposed(e: OnnxEmitter, op: IntOp) -> str:
    assert op.weight is not None
    a, codes = op.attrs, op.weight.codes
    if a["groups"] == 1:
        kernel, bias = e.weight(op, codes, 1)
    else:  # the output channels of all groups lie on one axis while they are scaled, and then on two
        count, inside, outside, *window = codes.shape
        rows = codes.swapaxes(1, 2).reshape(count * outside, inside, *window)
        scaled, bias = e.weight(op, rows, 0)
        shape = e.ints(f"{op.id}/kernel/groups", [count, outside, inside, *window])
        apart = e.node("Reshape", [scaled, shape], f"{op.id}/kernel/apart")
        order = [0, 2, 1, *range(3, 3 + len(window))]
        moved = e.node("Transpose", [apart], f"{op.id}/kernel/moved", perm=order)
        whole = e.ints(f"{op.id}/kernel/shape", [count * inside, outside, *window])
        kernel = e.node("Reshape", [moved, whole], f"{op.id}/kernel/whole")
    window = {
        "strides": a["stride"], "dilations": a["dilation"], "pads": [*a["padding"], *a["padding"]],
        "output_padding": a["output_padding"], "group": a["groups"],
    }  # fmt: skip
    return e.quantized(op, e.node("ConvTranspose", [e.real(op.inputs[0]), kernel, bias], f"{op.id}/sum", **window))


@writes("dense")
def _dense(e: OnnxEmitter, op: IntOp) -> str:
    """Gemm over rows, which has an integer kernel with a bias; codes are reshaped around it."""
    assert op.weight is not None
    units, features = op.weight.codes.shape
    kernel, bias = e.weight(op, op.weight.codes, 0)
    x, rank = op.inputs[0], len(e.model.tensors[op.inputs[0]].shape)
    if rank == 2:
        return e.quantized(op, e.node("Gemm", [e.real(x), kernel, bias], f"{op.id}/sum", transB=1))
    rows = e.node("Reshape", [e.codes(x), e.ints(f"{op.id}/rows_shape", [-1, features])], f"{op.id}/rows")
    real = e.node("DequantizeLinear", [rows, *e.grid(x)], f"{op.id}/rows/real")
    made = e.node("Gemm", [real, kernel, bias], f"{op.id}/sum", transB=1)
    flat = e.quantized(op, made, f"{op.id}/units")
    lead = [-1 if s is None else int(s) for s in e.model.tensors[x].shape[:-1]]
    return e.node("Reshape", [flat, e.ints(f"{op.id}/shape", [-1, *lead[1:], units])], op.outputs[0])


@writes("channel_affine")
def _channel_affine(e: OnnxEmitter, op: IntOp) -> str:
    assert op.weight is not None
    shape = [1] * len(e.model.tensors[op.inputs[0]].shape)
    shape[op.attrs["axis"]] = -1
    factor = (op.weight.codes.reshape(-1) * op.weight.scale.astype(np.float64)).astype(np.float32).reshape(shape)
    offset = op.weight.bias.astype(np.float32).reshape(shape)
    scaled = e.node("Mul", [e.real(op.inputs[0]), e.array(f"{op.id}/factor", factor)], f"{op.id}/scaled")
    return e.quantized(op, e.node("Add", [scaled, e.array(f"{op.id}/offset", offset)], f"{op.id}/sum"))


@writes("embedding")
def _embedding(e: OnnxEmitter, op: IntOp) -> str:
    table = e.array(f"{op.id}/table", unsigned(op.attrs["constant"]))
    return e.node("Gather", [table, op.inputs[0]], op.outputs[0], axis=0)


@writes("add", "sub", "mul", "batch_matmul")
def _binary(e: OnnxEmitter, op: IntOp) -> str:
    kind = {"add": "Add", "sub": "Sub", "mul": "Mul", "batch_matmul": "MatMul"}[op.kind]
    return e.quantized(op, e.node(kind, [e.real(t) for t in op.inputs], f"{op.id}/sum"))


@writes("mean", "sum")
def _reduce(e: OnnxEmitter, op: IntOp) -> str:
    axes = e.ints(f"{op.id}/axes", list(op.attrs["dim"]))
    kind, inputs = {"mean": "ReduceMean", "sum": "ReduceSum"}[op.kind], [e.real(op.inputs[0]), axes]
    return e.quantized(op, e.node(kind, inputs, f"{op.id}/sum", keepdims=int(op.attrs["keepdim"])))


@writes("softmax")
def _softmax(e: OnnxEmitter, op: IntOp) -> str:
    real, beta = e.real(op.inputs[0]), float(op.attrs.get("beta", 1.0))
    if beta != 1.0:
        real = e.node("Mul", [real, e.array(f"{op.id}/beta", np.float32(beta))], f"{op.id}/scaled")
    if "mask" in op.attrs:
        limits = [e.array(f"{op.id}/mask", op.attrs["mask"]), real, e.array(f"{op.id}/never", np.float32(-np.inf))]
        real = e.node("Where", limits, f"{op.id}/kept")
    return e.quantized(op, e.node("Softmax", [real], f"{op.id}/sum", axis=op.attrs["dim"]))


@writes("avg_pool2d")
def _average(e: OnnxEmitter, op: IntOp) -> str:
    a = op.attrs
    window = {"kernel_shape": a["kernel_size"], "strides": a["stride"], "pads": [*a["padding"], *a["padding"]]}
    return e.quantized(op, e.node("AveragePool", [e.real(op.inputs[0])], f"{op.id}/sum", count_include_pad=1, **window))


@writes("max_pool2d")
def _max_pool(e: OnnxEmitter, op: IntOp) -> str:
    a = op.attrs
    window = {"kernel_shape": a["kernel_size"], "strides": a["stride"], "dilations": a["dilation"]}
    pads, ceil = [*a["padding"], *a["padding"]], int(bool(a["ceil_mode"]))
    return e.node("MaxPool", [e.codes(op.inputs[0])], op.outputs[0], pads=pads, ceil_mode=ceil, **window)


@writes("relu")
def _relu(e: OnnxEmitter, op: IntOp) -> str:
    affine = e.affine(op.outputs[0])
    high = affine.qmax if op.relu_max is None else int(affine.quantize(np.asarray(op.relu_max, np.float32)))
    limits = [max(affine.qmin, affine.zero_point), high]
    names = [e.array(f"{op.id}/{n}", unsigned(np.asarray(v))) for n, v in zip(("low", "high"), limits, strict=True)]
    return e.node("Clip", [e.codes(op.inputs[0]), *names], op.outputs[0])


@writes("reduce_max", "reduce_min")
def _extreme(e: OnnxEmitter, op: IntOp) -> str:
    kind = "ReduceMax" if op.kind == "reduce_max" else "ReduceMin"
    inputs = [e.codes(op.inputs[0]), e.ints(f"{op.id}/axes", list(op.attrs["dim"]))]
    return e.node(kind, inputs, op.outputs[0], keepdims=int(op.attrs["keepdim"]))


@writes("maximum", "minimum")
def _compare(e: OnnxEmitter, op: IntOp) -> str:
    return e.node("Max" if op.kind == "maximum" else "Min", [e.codes(t) for t in op.inputs], op.outputs[0])


@writes("concat")
def _concat(e: OnnxEmitter, op: IntOp) -> str:
    return e.node("Concat", [e.codes(t) for t in op.inputs], op.outputs[0], axis=op.attrs["dim"])


@writes("reshape")
def _reshape(e: OnnxEmitter, op: IntOp) -> str:
    shape = e.ints(f"{op.id}/shape", [-1 if s is None else int(s) for s in op.attrs["shape"]])
    return e.node("Reshape", [e.codes(op.inputs[0]), shape], op.outputs[0])


@writes("transpose")
def _transpose(e: OnnxEmitter, op: IntOp) -> str:
    return e.node("Transpose", [e.codes(op.inputs[0])], op.outputs[0], perm=list(op.attrs["dims"]))


@writes("pad", "mirror_pad")
def _pad(e: OnnxEmitter, op: IntOp) -> str:
    pads = list(op.attrs["paddings"])
    flat = e.ints(f"{op.id}/pads", [int(p[0]) for p in pads] + [int(p[1]) for p in pads])
    inputs = [e.codes(op.inputs[0]), flat]
    if op.kind == "mirror_pad":
        return e.node("Pad", inputs, op.outputs[0], mode="reflect")
    value = e.affine(op.outputs[0]).quantize(np.asarray(op.attrs.get("value", 0.0), np.float32))
    return e.node("Pad", [*inputs, e.array(f"{op.id}/value", unsigned(value))], op.outputs[0])


@writes("strided_slice")
def _slice(e: OnnxEmitter, op: IntOp) -> str:
    a, last = op.attrs, np.iinfo(np.int64).max
    axes = list(range(len(a["begin"])))
    bounds = [
        e.ints(f"{op.id}/begin", [b or 0 for b in a["begin"]]),
        e.ints(f"{op.id}/end", [last if n is None else n for n in a["end"]]),
        e.ints(f"{op.id}/axes", axes),
        e.ints(f"{op.id}/steps", list(a["strides"])),
    ]
    shrink = list(a.get("shrink", ()))
    made = e.node("Slice", [e.codes(op.inputs[0]), *bounds], f"{op.id}/slice" if shrink else op.outputs[0])
    return e.node("Squeeze", [made, e.ints(f"{op.id}/shrink", shrink)], op.outputs[0]) if shrink else made


@writes("gather")
def _gather(e: OnnxEmitter, op: IntOp) -> str:
    indices = e.ints(f"{op.id}/indices", op.attrs["indices"])
    return e.node("Gather", [e.codes(op.inputs[0]), indices], op.outputs[0], axis=op.attrs["dim"])


@writes("tile")
def _tile(e: OnnxEmitter, op: IntOp) -> str:
    return e.node("Tile", [e.codes(op.inputs[0]), e.ints(f"{op.id}/repeats", list(op.attrs["repeats"]))], op.outputs[0])


@writes("resize_nearest", "resize_bilinear")
def _resize(e: OnnxEmitter, op: IntOp) -> str:
    """To the output's size, in torch's coordinates."""
    nearest = op.kind == "resize_nearest"
    place = "align_corners" if op.attrs.get("align_corners") else "asymmetric" if nearest else "half_pixel"
    factors = op.attrs.get("scale_factor")
    if factors:
        scales = e.array(f"{op.id}/scales", np.array([1.0, 1.0, *factors], np.float32))
        to = ["", scales]
    else:
        to = ["", "", _whole_size(e, op)]
    options = {"mode": "nearest" if nearest else "linear", "coordinate_transformation_mode": place}
    if nearest:
        return e.node("Resize", [e.codes(op.inputs[0]), *to], op.outputs[0], nearest_mode="floor", **options)
    return e.quantized(op, e.node("Resize", [e.real(op.inputs[0]), *to], f"{op.id}/sum", **options))


def _whole_size(e: OnnxEmitter, op: IntOp) -> str:
    """Batch and channels of the input, then the size that was given."""
    shape = e.node("Shape", [e.codes(op.inputs[0])], f"{op.id}/lead", start=0, end=2)
    return e.node("Concat", [shape, e.ints(f"{op.id}/size", list(op.attrs["size"]))], f"{op.id}/sizes", axis=0)
