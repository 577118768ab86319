"""Write the integer model as TFLite ops: the builder, and one lowering function where an op needs more than its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kquant.core.affine import Affine
from kquant.core.errors import UnsupportedError
from kquant.core.int8_spec import NATIVE, ROWS
from kquant.core.integer import IntegerModel, IntOp, IntTensor
from kquant.tflite.flatbuffer import FileModel, FileOp, FileTensor
from kquant.tflite.versions import least_runtime

Lowerer = Callable[["Emitter", IntOp], None]
LOWERERS: dict[str, Lowerer] = {}


def lowers(*kinds: str) -> Callable[[Lowerer], Lowerer]:
    """Enter a lowering function for some op kinds."""

    def enter(function: Lowerer) -> Lowerer:
        LOWERERS.update(dict.fromkeys(kinds, function))
        return function

    return enter


class Emitter:
    """Collects the tensors and ops of one file."""

    def __init__(self, model: IntegerModel, description: str = "kquant"):
        self.model, self.description = model, description
        self.tensors: list[FileTensor] = []
        self.index: dict[str, int] = {}
        self.ops: list[FileOp] = []

    # -- tensors --------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> int:
        """The file's index of a tensor of the integer model."""
        if name not in self.index:
            self._append(name, *self._described(self.model.tensors[name]))
        return self.index[name]

    def _described(self, tensor: IntTensor) -> tuple:
        return tensor.shape, tensor.dtype, tensor.constant, tensor.affine

    def _append(self, name: str, shape: Any, dtype: str, data: Any, affine: Affine | None, **more: Any) -> int:
        concrete = tuple(1 if s is None else int(s) for s in shape)
        signature = tuple(-1 if s is None else int(s) for s in shape)
        if affine is not None:
            more["scale"] = np.array([affine.scale], np.float32)
            more["zero_point"] = np.array([affine.zero_point], np.int64)
        self.tensors.append(
            FileTensor(name, concrete, dtype, data, signature=signature if signature != concrete else None, **more)
        )
        self.index[name] = len(self.tensors) - 1
        return self.index[name]

    def shape(self, name: str) -> tuple:
        """The shape of a tensor, None where it is dynamic."""
        return self.model.tensors[name].shape

    def affine(self, name: str) -> Affine:
        """The quantization of a quantized tensor."""
        affine = self.model.tensors[name].affine
        assert affine is not None
        return affine

    def is_float(self, name: str) -> bool:
        """Whether a tensor is float, as in a weights-only file."""
        return self.model.tensors[name].affine is None

    def inner(self, name: str, shape: Any, like: str) -> int:
        """A tensor between the parts of one op, quantized like a tensor of the model."""
        tensor = self.model.tensors[like]
        return self._append(name, shape, tensor.dtype, None, tensor.affine)

    def helper(self, name: str, shape: Any, dtype: str) -> int:
        """A tensor between the parts of one op that holds indices or sizes."""
        return self._append(name, shape, dtype, None, None)

    def constant(self, name: str, data: np.ndarray, affine: Affine | None = None, **more: Any) -> int:
        """A constant tensor."""
        return self._append(name, data.shape, more.pop("dtype", str(data.dtype)), data, affine, **more)

    def ints(self, name: str, values: Any) -> int:
        """An int32 constant."""
        return self.constant(name, np.asarray(values, np.int32))

    # -- ops ------------------------------------------------------------------------------------------------------

    def op(self, code: str, inputs: Sequence[int], outputs: Sequence[int], version: int, options: Any = None) -> None:
        """Append an op."""
        self.ops.append(FileOp(code, tuple(inputs), tuple(outputs), version, options))

    def row_op(self, op: IntOp, inputs: Sequence[int], fields: dict, version: int | None = None) -> None:
        """Append the op that the row names, with its options."""
        row = ROWS[op.kind]
        if row.target in ("ADD", "SUB"):
            fields = {**fields, "potScaleInt16": False}
        options = (row.options, fields) if row.options else None
        self.op(row.target, inputs, [self.tensor(t) for t in op.outputs], version or self.version(op), options)

    def version(self, op: IntOp) -> int:
        """The op version that the row states for the op's activations."""
        row = ROWS[op.kind]
        wide = any(self.model.tensors[t].dtype == "int16" for t in op.outputs)
        return row.version16 if wide and row.version16 else row.version

    def reshape(self, source: int, name: str, shape: Any, like: str) -> int:
        """A reshape to `shape`, in which None is a dynamic size; returns the new tensor, quantized like `like`."""
        target = self.inner(name, shape, like)
        self.reshape_into(source, target, shape, name)
        return target

    def reshape_into(self, source: int, target: int, shape: Any, name: str) -> None:
        """A reshape into an existing tensor."""
        wanted = [-1 if s is None else int(s) for s in shape]
        if wanted.count(-1) > 1:
            self._move_one(source, target, wanted, name)
            return
        self.op(
            "RESHAPE",
            [source, self.ints(f"{name}/shape", wanted)],
            [target],
            1,
            ("ReshapeOptions", {"newShape": wanted}),
        )

    def _move_one(self, source: int, target: int, wanted: list[int], name: str) -> None:
        """A reshape with several dynamic sizes, which has an op only where one axis of size 1 comes or goes."""
        tensor = self.tensors[source]
        given = list(tensor.signature or tensor.shape)
        if (axis := _inserted(given, wanted)) is not None:
            operands = [source, self.ints(f"{name}/axis", [axis])]
            self.op("EXPAND_DIMS", operands, [target], 1, ("ExpandDimsOptions", {}))
        elif (axis := _inserted(wanted, given)) is not None:
            self.op("SQUEEZE", [source], [target], 1, ("SqueezeOptions", {"squeezeDims": [axis]}))
        else:
            fix = "Give the model a fixed input size"
            raise UnsupportedError(f"tensor {name!r}", "a reshape needs all sizes but one", tuple(wanted), fix)

    def build(self) -> FileModel:
        """The file as plain data."""
        for name in self.model.inputs:
            self.tensor(name)
        for op in self.model.ops:
            LOWERERS.get(op.kind, _plain)(self, op)
        outputs = tuple(self.tensor(t) for t in self.model.outputs)
        least = least_runtime((op.opcode, op.version) for op in self.ops)
        inputs = tuple(self.tensor(t) for t in self.model.inputs)
        return FileModel(
            self.tensors, self.ops, inputs, outputs, self.model.input_names, self.model.output_names,
            {"min_runtime_version": least.encode().ljust(16, b"\0")}, self.description,
        )  # fmt: skip


def _inserted(short: list[int], long: list[int]) -> int | None:
    """The axis of size 1 without which `long` is `short`, if there is one."""
    axes = [i for i, size in enumerate(long) if size == 1 and [*long[:i], *long[i + 1 :]] == short]
    return axes[0] if axes else None


def fused(op: IntOp) -> int:
    """The fused activation: ActivationFunctionType NONE, RELU or RELU6 of the schema."""
    if not op.relu:
        return 0
    return 3 if op.relu_max == 6.0 else 1


def padding(op: IntOp) -> int:
    """Padding SAME (0) or VALID (1) of the schema."""
    return 0 if op.attrs["padding"] == "same" else 1


def _plain(e: Emitter, op: IntOp) -> None:
    """An op with tensor inputs only and at most a fused activation."""
    fields = {"fusedActivationFunction": fused(op)} if ROWS[op.kind].fuses_relu else {}
    e.row_op(op, [e.tensor(t) for t in op.inputs], fields)


@lowers("quantize", "requantize")
def _quantize(e: Emitter, op: IntOp) -> None:
    version = 1 if e.model.tensors[op.inputs[0]].dtype == "float32" else 2
    e.op("QUANTIZE", [e.tensor(op.inputs[0])], [e.tensor(op.outputs[0])], version, ("QuantizeOptions", {}))


@lowers("parameter")
def _parameter(e: Emitter, op: IntOp) -> None:
    """No op: a constant tensor."""
    e.tensor(op.outputs[0])


@lowers("dequantize")
def _dequantize(e: Emitter, op: IntOp) -> None:
    e.op("DEQUANTIZE", [e.tensor(op.inputs[0])], [e.tensor(op.outputs[0])], 2, ("DequantizeOptions", {}))


@lowers("table")
def _table(e: Emitter, op: IntOp) -> None:
    """BITCAST to uint8, CAST to int32, GATHER from 256 codes rotated by 128: exact for any function."""
    shape, name = e.shape(op.outputs[0]), op.id
    rotated = np.roll(op.table.reshape(-1, 256), -128, axis=1).reshape(-1)
    unsigned = e.helper(f"{name}/unsigned", shape, "uint8")
    index = e.helper(f"{name}/index", shape, "int32")
    table = e.constant(f"{name}/table", rotated, e.affine(op.outputs[0]))
    e.op("BITCAST", [e.tensor(op.inputs[0])], [unsigned], 1, ("BitcastOptions", {}))
    e.op("CAST", [unsigned], [index], 1, ("CastOptions", {"inDataType": 3, "outDataType": 2}))
    index = _offset(e, op, index)
    e.op("GATHER", [table, index], [e.tensor(op.outputs[0])], 2, ("GatherOptions", {"axis": 0, "batchDims": 0}))


def _offset(e: Emitter, op: IntOp, index: int) -> int:
    """With several tables, each element's index is moved to the table of its slope."""
    shape = op.attrs.get("offsets")
    if shape is None:
        return index
    starts = e.ints(f"{op.id}/starts", 256 * np.arange(int(np.prod(shape))).reshape(1, *shape))
    moved = e.helper(f"{op.id}/moved", e.shape(op.outputs[0]), "int32")
    e.op("ADD", [index, starts], [moved], 1, ("AddOptions", {"potScaleInt16": False}))
    return moved


@lowers("clamp")
def _clamp(e: Emitter, op: IntOp) -> None:
    """MAXIMUM and MINIMUM with a one-element constant of the same scale: exact in all kernels."""
    affine, source = e.affine(op.outputs[0]), e.tensor(op.inputs[0])
    steps = [
        (code, op.attrs[key]) for code, key in (("MAXIMUM", "low"), ("MINIMUM", "high")) if op.attrs[key] is not None
    ]
    for i, (code, limit) in enumerate(steps):
        last = i == len(steps) - 1
        target = (
            e.tensor(op.outputs[0])
            if last
            else e.inner(f"{op.id}/{code.lower()}", e.shape(op.outputs[0]), op.outputs[0])
        )
        constant = e.constant(f"{op.id}/{code.lower()}_limit", np.array([limit], affine.dtype), affine)
        e.op(code, [source, constant], [target], 2, ("MaximumMinimumOptions", {}))
        source = target


@lowers("elementwise")
def _native_function(e: Emitter, op: IntOp) -> None:
    kernel = NATIVE[op.attrs["fn"]]
    options = (kernel.options, dict(kernel.fields)) if kernel.options else None
    e.op(kernel.target, [e.tensor(op.inputs[0])], [e.tensor(op.outputs[0])], kernel.version, options)


@lowers("relu")
def _relu(e: Emitter, op: IntOp) -> None:
    code = "RELU6" if op.relu_max == 6.0 else "RELU"
    e.op(code, [e.tensor(op.inputs[0])], [e.tensor(op.outputs[0])], e.version(op))
