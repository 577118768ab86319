"""`export_program`: the same integer model as a `.pt2` file of `torch.export`, in Q/DQ form."""

from __future__ import annotations

import io
import json
import os
import time
from typing import Any

import numpy as np
import torch

from kquant.core.boundary import with_boundary
from kquant.core.errors import ArtifactError, ExportError, check_choice
from kquant.core.files import save
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.parameters import Found, Grid, compare_grids, compare_weight
from kquant.core.ready import check_integer
from kquant.core.reports import ExportReport
from kquant_torch.audit import LEAST_TORCH
from kquant_torch.calls import undisturbed
from kquant_torch.emit import SHIFT_OF_CODES
from kquant_torch.export import BOUNDARY, check_inputs, integer_model, quantized_graph
from kquant_torch.faithful import check_export
from kquant_torch.qdq import QDQ, QuantizedProgram
from kquant_torch.run import as_codes, as_fed
from kquant_torch.target import ONEDNN

FACTS = "kquant.json"


@undisturbed
def export_program(
    qmodel: Any,
    path: str | os.PathLike,
    *,
    example_inputs: Any,
    input_type: str = "float32",
    output_type: str = "float32",
) -> ExportReport:
    """Write a trained quantized model as a `.pt2` file in Q/DQ form, for compilers that take it from there.

    A process that loads it imports `torch.ao.quantization.fx._decomposed` first, which registers the Q/DQ ops.

    Args:
        qmodel: a model from `wrap` or a quantizer.
        path: the file to write; it is replaced only if the export succeeds.
        example_inputs: one batch, as `wrap` takes it; its size may be any afterwards.
        input_type, output_type: `"float32"` or `"uint8"`.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: float ops, ranges never set, a model of target `"onednn_fused"`, or a path that cannot be written.

    Example:
        >>> kquant_torch.export_program(qmodel, "model.pt2", example_inputs=x)  # doctest: +SKIP
    """
    for name, value in (("input_type", input_type), ("output_type", output_type)):
        check_choice(name, value, BOUNDARY, ExportError)
    start = time.perf_counter()
    graph = quantized_graph(qmodel)
    check_inputs(graph, example_inputs)
    model = integer_model(graph)
    check_integer(model)
    check_export(qmodel, graph, example_inputs)
    model = with_boundary(model, BOUNDARY[input_type], BOUNDARY[output_type])
    samples = _samples(model)
    program = _traced(QuantizedProgram(model), samples)
    results = _traced(QuantizedProgram(model, every=True), samples).graph.output_node().args[0]
    nodes = {op.outputs[0]: node.name for op, node in zip(model.ops, results, strict=True)}
    arrays = QuantizedProgram(model).names
    facts = {"nodes": nodes, "inputs": list(model.inputs), "arrays": arrays}
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    data = buffer.getvalue()
    save(data, path)
    seconds = time.perf_counter() - start
    return ExportReport(str(path), len(data), True, len(model.ops), {}, LEAST_TORCH, seconds, "torch")


def _samples(model: IntegerModel) -> tuple[torch.Tensor, ...]:
    """Inputs of a batch of two, which `torch.export` does not take for a constant."""
    made = []
    for name in model.inputs:
        tensor = model.tensors[name]
        dtype = torch.uint8 if tensor.affine is not None else getattr(torch, tensor.dtype)
        made.append(torch.zeros([2 if s is None else int(s) for s in tensor.shape], dtype=dtype))
    return tuple(made)


def _traced(module: QuantizedProgram, samples: tuple[torch.Tensor, ...]) -> Any:
    """The exported program without what names files of this machine."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in samples)
    program = torch.export.export(module.eval(), samples, dynamic_shapes=(shapes,))
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack"):
            node.meta.pop(key, None)
    return program


class ProgramFile:
    """A `.pt2` file for `kquant.core.verification`."""

    def __init__(self, content: bytes, where: str, model: IntegerModel):
        self.model, extra = model, {FACTS: ""}
        try:
            self.program = torch.export.load(io.BytesIO(content), extra_files=extra)
            self.facts = json.loads(extra[FACTS])
        except Exception as error:
            raise ArtifactError(
                where,
                "a file of kquant_torch.export_program",
                str(error).strip()[:200],
                "Give the path of a file that kquant_torch wrote: it is truncated, damaged or of another kind",
            ) from error
        self.names = {*self.facts["nodes"], *self.facts["inputs"]}
        self.arrays = {n: v.numpy() for n, v in self.program.state_dict.items()}

    def run(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Every quantized tensor by its id."""
        module, values = self.program.module(), as_fed(values, self.facts["inputs"], self.model)
        kept: dict[str, np.ndarray] = {}
        wanted = {name: tensor for tensor, name in self.facts["nodes"].items()}

        class Keeping(torch.fx.Interpreter):
            def run_node(self, node: Any) -> Any:
                result = super().run_node(node)
                if node.name in wanted:
                    kept[wanted[node.name]] = as_codes(result.numpy())
                return result

        with torch.no_grad():
            Keeping(module).run(*(torch.from_numpy(np.ascontiguousarray(v)) for v in values))
        return {**dict(zip(self.facts["inputs"], map(as_codes, values), strict=True)), **kept}

    def bias_slack(self, op: IntOp) -> float:
        """A float32 bias has no unit."""
        return 0.0

    def second_rounding(self, op: IntOp) -> float:
        """Every kernel rounds once."""
        return 0.0

    def class_axis(self, rank: int) -> int:
        """The channels of an image, else the last axis."""
        return 1 if rank >= 4 else -1

    def compare(self) -> tuple[list[str], int]:
        """What in the file is not as trained, in words, and how many arrays were compared."""
        grids: dict[str, set[Grid | None]] = {}
        tensors = {name: tensor for tensor, name in self.facts["nodes"].items()}
        for node in self.program.graph.nodes:
            if node.target == QDQ.quantize_per_tensor.default and node.name in tensors:
                grids.setdefault(tensors[node.name], set()).add(_grid(node))
            elif node.target == QDQ.dequantize_per_tensor.default and node.args[0].name in tensors:
                grids.setdefault(tensors[node.args[0].name], set()).add(_grid(node))
        problems, checked = compare_grids(self.model, grids)
        for op in self.model.ops:
            if op.weight is not None:
                problems += compare_weight(op, self._found(op), self.model, ONEDNN.accumulator)
                checked += 2
        return problems, checked

    def _found(self, op: IntOp) -> Found:
        name = self.facts["arrays"][op.id]
        codes, scale, bias = (self.arrays[f"{name}_{role}"] for role in ("kernel", "scale", "bias"))
        if op.kind == "conv2d_transpose":
            grouped = codes if op.attrs["groups"] > 1 else codes[None]
            codes = grouped.swapaxes(1, 2).reshape(-1, grouped.shape[1], *grouped.shape[3:])
        return Found(codes.reshape(codes.shape[0], -1).T, scale, bias.astype(np.float64), None)


def _grid(node: Any) -> Grid:
    return np.float32(node.args[1]), int(node.args[2]) - SHIFT_OF_CODES
