"""`verify` for `.tflite` files: every op as in `kquant.core.verification`, and every parameter in the file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kquant.core.affine import bias_error
from kquant.core.calibration import batches
from kquant.core.files import read_bytes
from kquant.core.int8_spec import second_rounding
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.lower import lower
from kquant.core.parity import TIE, ParityReport
from kquant.core.ready import check_ranges
from kquant.core.target import TFLITE
from kquant.core.verification import Verification, check_same
from kquant.core.weights_only import weights_only, without_activation_quantizers
from kquant.tflite.export import WEIGHTS_ONLY, quantized_graph
from kquant.tflite.flatbuffer import FileTensor, decode
from kquant.tflite.run import run_all
from kquant.tflite.verify_weights import compare_parameters


def verify(qmodel: Any, path: str | os.PathLike, data: Any, *, kernels: str = "default") -> ParityReport:
    """Compare an artifact with the trained model.

    Args:
        qmodel: the trained quantized model, or the session with the TensorFlow 1 graph.
        path: the `.tflite` file that was exported from it.
        data: samples or batches, as `calibration_data` of `quantize_model`.
        kernels: `"default"` (XNNPACK), `"builtin"` or `"reference"`.

    Returns:
        A `ParityReport`.

    Raises:
        ArtifactError: not a TFLite file, or one that lacks a tensor of this model.
        CalibrationError: data that does not fit the model.
    """
    from kquant.api import as_named

    content = read_bytes(path)
    where = f"artifact {os.fspath(path)!r}"
    file = decode(content, where)
    graph = quantized_graph(as_named(qmodel, file.input_names, file.output_names))
    if file.description == WEIGHTS_ONLY:
        model = weights_only(graph)
        graph = without_activation_quantizers(graph)
    else:
        check_ranges(graph)
        model = lower(graph)
    check_same(model, {t.name for t in file.tensors}, where)
    problems, checked = compare_parameters(model, file)
    run = Verification(graph, model, TFLITE, _File(model, content, where, kernels))
    for feeds in batches(data, graph):
        run.batch(feeds)
    return run.report(os.fspath(path), problems, checked)


class _File:
    """A `.tflite` file for `Verification`."""

    def __init__(self, model: IntegerModel, content: bytes, where: str, kernels: str):
        self.model, self.content, self.where, self.kernels = model, content, where, kernels
        self.tensors = {t.name: t for t in decode(content, where).tensors}

    def run(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        feeds = values if len(values) > 1 else values[0]
        return run_all(self.content, feeds, where=self.where, kernels=self.kernels)

    def _part(self, op: IntOp, role: str) -> FileTensor | None:
        return self.tensors.get(f"{op.id}/{role}") or self.tensors.get(f"{op.id}/unclamped/{role}")

    def second_rounding(self, op: IntOp) -> float:
        """int4 kernels, and transposed convolutions to a size found at run time, are not the delegate's."""
        kernel, bias, size = (self._part(op, role) for role in ("kernel", "bias", "output_shape"))
        affine = self.model.tensors[op.outputs[0]].affine
        undelegated = kernel is not None and (kernel.dtype == "int4" or (size is not None and size.data is None))
        if not undelegated or bias is None or bias.scale is None or affine is None:
            return 0.0
        return max(second_rounding(float(unit) / float(affine.scale)) for unit in bias.scale)

    def bias_slack(self, op: IntOp) -> float:
        """What rounding the trained bias to its unit shifts, in output codes, where a kernel's own rounding is less."""
        bias = self._part(op, "bias")
        affine = self.model.tensors[op.outputs[0]].affine
        weight = next((o.weight for o in self.model.ops if o.id in (op.id, f"{op.id}/unclamped")), None)
        if bias is None or bias.scale is None or affine is None or weight is None:
            return 0.0
        error = bias_error(weight.bias, bias.scale, affine)
        return error if error > TIE else 0.0

    def class_axis(self, rank: int) -> int:
        return -1
