"""`export_tflite`: a trained quantized model becomes a `.tflite` file, whole or not at all."""

from __future__ import annotations

import os
import time
from typing import Any

from kquant.core.boundary import with_boundary
from kquant.core.errors import ExportError, ModelError
from kquant.core.files import save
from kquant.core.graph import Graph
from kquant.core.integer import IntegerModel
from kquant.core.lower import lower
from kquant.core.ready import check_integer, check_ranges, check_started
from kquant.core.reports import ExportReport
from kquant.core.weights_only import weights_only as weights_only_form
from kquant.tflite import emit_linear, emit_shapes, islands  # noqa: F401  entering their lowering functions
from kquant.tflite.audit import audit_bytes
from kquant.tflite.emit import Emitter
from kquant.tflite.flatbuffer import encode

WEIGHTS_ONLY = "kquant, weights only"


def quantized_graph(qmodel: Any, inputs: Any = None, outputs: Any = None) -> Graph:
    """The graph of a quantized model, in float32; `inputs` and `outputs` select it in a TensorFlow 1 graph.

    Raises:
        ModelError: a float model, or not a model that kquant reads.
    """
    from kquant.api import front_end, selected

    front = front_end(qmodel)
    qmodel = selected(qmodel, inputs=inputs, outputs=outputs)
    graph = front.read(front.as_float32(qmodel))
    if not any(op.kind == "fake_quant" or "codes" in op.attrs for op in graph.ops):
        raise ModelError(
            f"model {graph.name!r}", "a quantized model", "a float model", "Call kquant.quantize_model(model) first"
        )
    return graph


def integer_model(qmodel: Any, inputs: Any = None, outputs: Any = None) -> IntegerModel:
    """The integer model of a trained quantized model."""
    graph = quantized_graph(qmodel, inputs, outputs)
    check_started(graph)
    check_ranges(graph)
    return lower(graph)


def export_tflite(
    qmodel: Any,
    path: str | os.PathLike,
    *,
    input_type: str = "float32",
    output_type: str = "float32",
    allow_float: bool = False,
    weights_only: bool = False,
    inputs: Any = None,
    outputs: Any = None,
) -> ExportReport:
    """Write a trained quantized model as an integer `.tflite` file.

    Every weight, scale and zero point is the trained one; codes of few bits may be multiplied, and their scale divided.
    The same model gives the same bytes.

    Args:
        qmodel: a model from `quantize_model` or a quantizer; or a session on a TensorFlow 1 graph that one rewrote,
            of which only variables are read.
        path: the file to write; it is replaced only if the export succeeds.
        input_type, output_type: `"float32"` (quantized at entry and exit), `"int8"` or `"uint8"`.
        allow_float: write float ops where the model has them, instead of refusing.
        weights_only: integer weights with float arithmetic.
        inputs, outputs: of a TensorFlow 1 graph, the tensors (or names) between which the model lies; those that were
            quantized if they are not given.

    Returns:
        An `ExportReport`: what was written, whether it is fully integer, the size and the time.

    Raises:
        ExportError: float ops that were not allowed, ranges never set, or a path that cannot be written.
        ModelError: a float model.
        RangeError: a range that the kernels cannot hold.
    """
    start = time.perf_counter()
    for name, value in (("allow_float", allow_float), ("weights_only", weights_only)):
        if not isinstance(value, bool):
            raise ExportError(name, "True or False", repr(value), "Pass a bool")
    if weights_only:
        model, allow_float = weights_only_form(quantized_graph(qmodel, inputs, outputs)), True
    else:
        model = integer_model(qmodel, inputs, outputs)
    if not allow_float:
        check_integer(model)
    description = WEIGHTS_ONLY if weights_only else "kquant"
    data = encode(Emitter(with_boundary(model, input_type, output_type), description).build())
    report = audit_bytes(data, str(path))
    if not report.fully_integer and not allow_float:
        raise ExportError(
            f"model {model.name!r}",
            "a fully integer file",
            str(report.float_ops),
            "Name these ops in an entry of config_list, or pass allow_float=True",
        )
    save(data, path)
    return ExportReport(
        str(path),
        len(data),
        report.fully_integer,
        len(report.ops),
        dict(model.floats),
        report.least_runtime,
        time.perf_counter() - start,
    )
