"""The boundary of an artifact: float32, int8 or uint8 inputs and outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kquant.core.affine import Affine
from kquant.core.errors import ExportError, check_choice
from kquant.core.integer import IntegerModel, IntOp, IntTensor

TYPES = ("float32", "int8", "uint8", "int16")


def with_boundary(model: IntegerModel, input_type: str, output_type: str) -> IntegerModel:
    """The model with its inputs and outputs in the wanted types.

    Float inputs are quantized by a QUANTIZE op at entry, float outputs come from a DEQUANTIZE; uint8 has the same scale
    and a zero point 128 higher. Ids and float results of an allowed float op stay as they are.
    """
    for name, value in (("input_type", input_type), ("output_type", output_type)):
        check_choice(name, value, TYPES, ExportError)
    tensors = dict(model.tensors)
    ops = list(model.ops)
    inputs = [_input(t, input_type, tensors, ops) for t in model.inputs]
    outputs = [
        _output(t, name, output_type, tensors, ops) for t, name in zip(model.outputs, model.output_names, strict=True)
    ]
    return replace(model, ops=tuple(ops), tensors=tensors, inputs=tuple(inputs), outputs=tuple(outputs))


def _input(name: str, wanted: str, tensors: dict[str, IntTensor], ops: list[IntOp]) -> str:
    if wanted == "float32" or tensors[name].dtype != "float32":
        return name
    readers = [op for op in ops if name in op.inputs]
    if not readers or any(op.kind != "quantize" for op in readers):
        raise ExportError(
            f"input {name!r}", f"it must be quantized to be {wanted}", "a float op reads it", "Use input_type='float32'"
        )
    first = readers[0]
    inner = tensors[first.outputs[0]]
    position = ops.index(first)
    ops.remove(first)
    if wanted == inner.dtype:
        return inner.id
    shifted = _as_unsigned(name, inner, wanted)
    tensors[name] = shifted
    ops.insert(position, replace(first, kind="requantize", inputs=(name,), parts=()))
    return name


def _output(tensor: str, name: str, wanted: str, tensors: dict[str, IntTensor], ops: list[IntOp]) -> str:
    source = tensors[tensor]
    if source.affine is None or wanted == source.dtype:
        return tensor
    result = f"{tensor}/output"
    if wanted == "float32":
        tensors[result] = IntTensor(result, source.shape, "float32")
        kind = "dequantize"
    else:
        tensors[result] = replace(_as_unsigned(result, source, wanted), id=result)
        kind = "requantize"
    if not any(op.id == result for op in ops):
        ops.append(IntOp(result, kind, (tensor,), (result,)))
    return result


def _as_unsigned(name: str, tensor: IntTensor, wanted: str) -> IntTensor:
    if wanted != "uint8" or tensor.dtype != "int8":
        raise ExportError(
            f"tensor {name!r}",
            f"a boundary of type {wanted}",
            f"the model quantizes it to {tensor.dtype}",
            f"Use float32 or {tensor.dtype}",
        )
    affine = tensor.affine
    assert affine is not None
    shifted = Affine(np.float32(affine.scale), affine.zero_point + 128, affine.bits)
    return IntTensor(name, tensor.shape, "uint8", shifted)
