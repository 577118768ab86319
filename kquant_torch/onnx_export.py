"""`export_onnx`: the same integer model as an ONNX file, and how onnxruntime runs it for `verify`."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from kquant.core.affine import bias_error, bias_unit
from kquant.core.boundary import with_boundary
from kquant.core.errors import ArtifactError, ExportError, check_choice
from kquant.core.files import save
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.parameters import Found, Grid, compare_grids, compare_weight
from kquant.core.parity import TIE
from kquant.core.ready import check_integer
from kquant.core.reports import ExportReport
from kquant_torch.calls import undisturbed
from kquant_torch.emit import SHIFT_OF_CODES
from kquant_torch.export import BOUNDARY, check_inputs, integer_model, quantized_graph
from kquant_torch.faithful import check_export
from kquant_torch.onnx_emit import ONNX, OPSET, OnnxEmitter, onnx_module
from kquant_torch.run import as_codes, as_fed

PRODUCER = "kquant"


@undisturbed
def export_onnx(
    qmodel: Any,
    path: str | os.PathLike,
    *,
    example_inputs: Any,
    input_type: str = "float32",
    output_type: str = "float32",
) -> ExportReport:
    """Write a trained quantized model as ONNX in the Q/DQ form that onnxruntime fuses into integer kernels.

    Args:
        qmodel: a model from `wrap` or a quantizer.
        path: the file to write; it is replaced only if the export succeeds.
        example_inputs: one batch, as `wrap` takes it.
        input_type, output_type: `"float32"` or `"uint8"`.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: float ops, ranges never set, a model of target `"onednn_fused"`, the package onnx missing, or a
            path that cannot be written.
        UnsupportedError: an op without a form in ONNX, by name.

    Example:
        >>> kquant_torch.export_onnx(qmodel, "model.onnx", example_inputs=x)  # doctest: +SKIP
    """
    for name, value in (("input_type", input_type), ("output_type", output_type)):
        check_choice(name, value, BOUNDARY, ExportError)
    start = time.perf_counter()
    graph = quantized_graph(qmodel)
    check_inputs(graph, example_inputs)
    model = integer_model(graph, ONNX)
    check_integer(model)
    check_export(qmodel, graph, example_inputs)
    data = OnnxEmitter(with_boundary(model, BOUNDARY[input_type], BOUNDARY[output_type])).build()
    save(data, path)
    return ExportReport(
        str(path), len(data), True, len(model.ops), {}, f"opset {OPSET}", time.perf_counter() - start, "ONNX"
    )  # fmt: skip


class OnnxFile:
    """An ONNX file for `kquant.core.verification`."""

    def __init__(self, content: bytes, where: str, model: IntegerModel):
        onnx = onnx_module()
        self.model = model
        try:
            self.file = onnx.load_model_from_string(content)
        except Exception as error:
            raise ArtifactError(
                where,
                "a whole ONNX file",
                str(error)[:200],
                "Give the path of a file that kquant_torch wrote: it is truncated, damaged or of another kind",
            ) from error
        self.where = where
        if self.file.producer_name != PRODUCER:
            raise ArtifactError(
                where,
                "a file of kquant_torch.export_onnx",
                repr(self.file.producer_name),
                "Give the path of a file that kquant_torch wrote",
            )
        read = onnx.numpy_helper.to_array
        self.arrays = {i.name: read(i) for i in self.file.graph.initializer}
        self.names = {o for n in self.file.graph.node for o in n.output} | {i.name for i in self.file.graph.input}

    def session(self, every: bool) -> Any:
        """An onnxruntime session, with every quantized tensor as an output if wanted."""
        import onnxruntime

        onnx = onnx_module()
        file = onnx.ModelProto()
        file.CopyFrom(self.file)
        if every:
            known = {o.name for o in file.graph.output}
            shaped = onnx.shape_inference.infer_shapes(file).graph.value_info
            file.graph.output.extend(v for v in shaped if v.name not in known and self._holds_codes(v))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _holds_codes(self, value: Any) -> bool:
        """Codes, or ids on their way to an embedding."""
        held = self.model.tensors.get(value.name)
        is_ids = held is not None and held.affine is None and held.constant is None and held.dtype != "float32"
        return is_ids or value.type.tensor_type.elem_type == onnx_module().TensorProto.UINT8

    def run(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Every quantized tensor by its id."""
        session = self.session(every=True)
        inputs = [i.name for i in session.get_inputs()]
        feeds = dict(zip(inputs, as_fed(values, inputs, self.model), strict=True))
        names = [o.name for o in session.get_outputs()]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        return {n: as_codes(v) for n, v in {**feeds, **found}.items()}

    def bias_slack(self, op: IntOp) -> float:
        """What rounding the trained bias to its unit shifts, in output codes, where a kernel's own rounding is less."""
        unit, affine = self.arrays.get(f"{op.id}/bias/scale"), self.model.tensors[op.outputs[0]].affine
        if unit is None or op.weight is None or affine is None:
            return 0.0
        error = bias_error(op.weight.bias, unit, affine)
        return error if error > TIE else 0.0

    def second_rounding(self, op: IntOp) -> float:
        """Every kernel rounds once."""
        return 0.0

    def class_axis(self, rank: int) -> int:
        """The channels of an image, else the last axis."""
        return 1 if rank >= 4 else -1

    def compare(self) -> tuple[list[str], int]:
        """What in the file is not as trained, in words, and how many arrays were compared."""
        model = self.model
        grids: dict[str, set[Grid | None]] = {}
        for tensor in model.tensors:
            if f"{tensor}/scale" in self.arrays:
                zero_point = int(self.arrays[f"{tensor}/zero_point"]) - SHIFT_OF_CODES
                grids[tensor] = {(np.float32(self.arrays[f"{tensor}/scale"]), zero_point)}
        problems, checked = compare_grids(model, grids)
        for op in model.ops:
            if op.weight is not None and f"{op.id}/kernel" in self.arrays:
                problems += compare_weight(op, self._found(op), model, ONNX.accumulator)
                checked += 2
        return problems, checked

    def _found(self, op: IntOp) -> Found:
        codes = self.arrays[f"{op.id}/kernel"]
        if op.kind == "conv2d_transpose" and op.attrs["groups"] == 1:
            codes = codes.swapaxes(0, 1)
        scale, stated = self.arrays[f"{op.id}/kernel/scale"], self.arrays[f"{op.id}/bias/scale"]
        source = self.model.tensors[op.inputs[0]].affine
        unit = stated.astype(np.float64) if source is None else bias_unit(source, scale)
        if (unit.astype(np.float32) != stated).any():  # else it states that unit, as closely as float32 can
            unit = stated.astype(np.float64)
        bias = self.arrays[f"{op.id}/bias"] * unit
        return Found(codes.reshape(codes.shape[0], -1).T, scale, bias, unit)
