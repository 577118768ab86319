"""`export_torchscript`: a trained quantized model becomes a TorchScript file, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from kquant.core.boundary import with_boundary
from kquant.core.errors import ExportError, ModelError, check_choice
from kquant.core.files import save
from kquant.core.graph import Graph
from kquant.core.integer import IntegerModel
from kquant.core.lower import lower
from kquant.core.ready import check_integer, check_ranges, check_started, check_sums
from kquant.core.reports import ExportReport
from kquant.core.target import Target
from kquant_torch.archive import encode
from kquant_torch.audit import audit_bytes
from kquant_torch.backends import CHOICES, backend_for
from kquant_torch.calls import undisturbed
from kquant_torch.emit import Backend, Emitter
from kquant_torch.faithful import check_export
from kquant_torch.target import ONEDNN, PORTABLE, TARGETS

OTHER_TARGET = 'Use export_torchscript with backend="onednn", or wrap the float model with target="onednn"'
# uint8 codes are those of the integer model plus 128; inside, both are the same tensor.
BOUNDARY = {"float32": "float32", "uint8": "int8"}


def quantized_graph(qmodel: Any) -> Graph:
    """The graph of a quantized model.

    Raises:
        ModelError: a float model, or not a torch module.
    """
    from kquant_torch.read import read

    graph = read(qmodel)
    if not any(op.kind == "fake_quant" or "codes" in op.attrs for op in graph.ops):
        raise ModelError(
            f"model {graph.name!r}", "a quantized model", "a float model", "Call kquant_torch.wrap(model) first"
        )
    return graph


def integer_model(graph: Graph, target: Target = ONEDNN) -> IntegerModel:
    """The integer model of a trained quantized graph, for torch's kernels or another target."""
    check_started(graph)
    check_ranges(graph)
    if graph.target:
        check_sums(graph, TARGETS[graph.target], target, OTHER_TARGET)
    return lower(graph, target)


def is_portable(model: IntegerModel) -> bool:
    """Whether no kernel's sums of pairs can leave int16, so that CPUs without VNNI give the same codes.

    An embedding and a factor per channel multiply no pairs.
    """
    weights = [op.weight for op in model.ops if op.weight is not None and op.kind != "channel_affine"]
    return all(int(np.abs(w.codes.astype(np.int16)).max(initial=0)) <= PORTABLE for w in weights)


@undisturbed
def export_torchscript(
    qmodel: Any,
    path: str | os.PathLike,
    *,
    example_inputs: Any,
    backend: str = "onednn",
    input_type: str = "float32",
    output_type: str = "float32",
    allow_float: bool = False,
) -> ExportReport:
    """Write a trained quantized model as a TorchScript file of integer kernels.

    Every weight, scale and zero point is the trained one; codes of few bits may be multiplied, and their scale divided.
    The file loads with `torch.jit.load` where nothing but torch is installed, and with libtorch in C++. The same model
    gives the same bytes.

    Args:
        qmodel: a model from `wrap` or a quantizer.
        path: the file to write; it is replaced only if the export succeeds.
        example_inputs: one batch, as `wrap` takes it.
        backend: `"onednn"`: plain integer tensors and oneDNN kernels. `"quantized"`: torch's `quantized::` kernels, for
            builds without oneDNN, with the engine (`torch.backends.quantized.engine`) of the process that loads it.
        input_type, output_type: `"float32"` (quantized at entry and exit) or `"uint8"`.
        allow_float: write float ops where the model has them, instead of refusing.

    Returns:
        An `ExportReport`: what was written, whether it is fully integer, portable, the size and the time.

    Raises:
        ExportError: float ops that were not allowed, ranges never set, a model of target `"onednn_fused"` for another
            backend than `"onednn"`, or a path that cannot be written.
        ModelError: a float model, or example inputs that do not fit it.
        RangeError: a range that the kernels cannot hold.
        UnsupportedError: on the example inputs the model computes something else than its ops do; it has a hook that
            changes values, for instance.
    """
    for name, value, choices in (
        ("backend", backend, tuple(CHOICES)), ("input_type", input_type, tuple(BOUNDARY)),
        ("output_type", output_type, tuple(BOUNDARY)),
    ):  # fmt: skip
        check_choice(name, value, choices, ExportError)
    start = time.perf_counter()
    graph = quantized_graph(qmodel)
    check_inputs(graph, example_inputs)
    chosen = backend_for(backend, graph.target)
    model = integer_model(graph, chosen.target)
    check_export(qmodel, graph, example_inputs)
    return write(model, chosen, path, input_type, output_type, allow_float, start)


def write(
    model: IntegerModel, backend: Backend, path: Any, input_type: str, output_type: str, allow_float: bool, start: float
) -> ExportReport:
    """Write an integer model; what `export_torchscript` does once the model is read."""
    if not allow_float:
        check_integer(model)
    archive = Emitter(with_boundary(model, BOUNDARY[input_type], BOUNDARY[output_type]), backend).build()
    data = encode(archive)
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
        str(path), len(data), report.fully_integer, len(report.ops), dict(model.floats), report.least_runtime,
        time.perf_counter() - start, report.runtime, is_portable(model),
    )  # fmt: skip


def _check_values(name: str, value: Any) -> None:
    found = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if found.size == 0 or (found.dtype.kind == "f" and not np.isfinite(found).all()):
        received = f"shape {found.shape}" if found.size == 0 else "NaN or infinity"
        fix = "Pass a batch of samples as the model is given them"
        raise ModelError(f"example_inputs, {name!r}", "finite values of at least one sample", received, fix)


def check_inputs(graph: Graph, example_inputs: Any) -> None:
    """Refuse example inputs that the graph does not take: another number, rank, or dtype.

    Raises:
        ModelError: naming the input.
    """
    named = isinstance(example_inputs, Mapping)
    if named and set(example_inputs) == set(graph.input_names):
        values = [example_inputs[name] for name in graph.input_names]
    else:
        values = list(example_inputs) if isinstance(example_inputs, list | tuple) else [example_inputs]
    if len(values) != len(graph.inputs) or (named and set(example_inputs) != set(graph.input_names)):
        received = sorted(map(str, example_inputs)) if named else len(values)
        raise ModelError(
            "example_inputs",
            f"{len(graph.inputs)} tensors: {list(graph.input_names)}",
            received,
            "Pass them in that order, or as a dict by name",
        )
    for name, value in zip(graph.inputs, values, strict=True):
        expected = graph.tensors[name]
        _check_values(name, value)
        shape, dtype = tuple(getattr(value, "shape", ())), str(getattr(value, "dtype", type(value).__name__))
        if len(shape) != len(expected.shape) or dtype.removeprefix("torch.") != expected.dtype:
            raise ModelError(
                f"example_inputs, {name!r}",
                f"a tensor of {len(expected.shape)} axes and dtype {expected.dtype}",
                f"shape {shape}, dtype {dtype}",
                "Pass inputs like those that the model was wrapped with",
            )
