"""`verify` for torch models: every op as in `kquant.core.verification`, and every parameter in the file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kquant.core.affine import bias_error, bias_unit
from kquant.core.calibration import batches
from kquant.core.files import read_bytes
from kquant.core.graph import Graph
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.parameters import FLOAT_UNIT, Found, Grid, compare_grids, compare_weight
from kquant.core.parity import TIE, ParityReport
from kquant.core.target import Target
from kquant.core.verification import Verification, check_same
from kquant.core.widen import gain_for_bias
from kquant_torch.archive import Archive, decode
from kquant_torch.calls import undisturbed
from kquant_torch.emit import SHIFT_OF_CODES
from kquant_torch.export import integer_model, quantized_graph
from kquant_torch.onnx_emit import ONNX
from kquant_torch.program import Program, array_of, calls, dotted, parse
from kquant_torch.run import as_fed, facts, run_all
from kquant_torch.target import ONEDNN, TARGETS

ZIP = b"PK\x03\x04"
PROGRAM = b"/archive_format"  # a record that every file of torch.export has


@undisturbed
def verify(qmodel: Any, path: str | os.PathLike, data: Any) -> ParityReport:
    """Compare an artifact with the trained model.

    Args:
        qmodel: the trained quantized model.
        path: the file that was exported from it.
        data: samples or batches, as `calibration_data` of `wrap`.

    Returns:
        A `ParityReport`.

    Raises:
        ArtifactError: not a file of ours, or one that lacks a tensor of this model.
        CalibrationError: data that does not fit the model.
    """
    graph, content, where = quantized_graph(qmodel), read_bytes(path), f"artifact {os.fspath(path)!r}"
    if content[:4] != ZIP:
        from kquant_torch.onnx_export import OnnxFile

        return _verify_whole(graph, content, where, os.fspath(path), data, ONNX, OnnxFile)
    if PROGRAM in content:
        from kquant_torch.program_export import ProgramFile

        return _verify_whole(graph, content, where, os.fspath(path), data, ONEDNN, ProgramFile)
    return _verify_torchscript(graph, content, where, os.fspath(path), data)


def _verify_whole(
    graph: Graph, content: bytes, where: str, path: str, data: Any, target: Target, kind: Any
) -> ParityReport:
    """`verify` of a file whose class knows its names, parameters and how it runs."""
    model = integer_model(graph, target)
    file = kind(content, where, model)
    check_same(model, file.names, where)
    problems, checked = file.compare()
    run = Verification(graph, model, target, file)
    for feeds in batches(data, graph):
        run.batch(feeds)
    return run.report(path, problems, checked)


def _verify_torchscript(graph: Graph, content: bytes, where: str, path: str, data: Any) -> ParityReport:
    archive = decode(content, where)
    program, described = parse(archive, where), facts(archive, where)
    target = TARGETS[described["target"]]
    model = integer_model(graph, target)
    variables = {d["id"]: name for name, d in described["tensors"].items()}
    check_same(model, set(variables), where)
    problems, checked = compare_parameters(model, archive, program, variables, target)
    run = Verification(graph, model, target, _File(content, where, model, target))
    for feeds in batches(data, graph):
        run.batch(feeds)
    return run.report(path, problems, checked)


class _File:
    """A TorchScript artifact for `Verification`."""

    def __init__(self, content: bytes, where: str, model: IntegerModel, target: Target):
        self.content, self.where, self.model, self.target = content, where, model, target
        described = facts(decode(content, where), where)
        self.inputs = [described["tensors"][variable]["id"] for variable in described["inputs"].values()]

    def run(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        return run_all(self.content, as_fed(values, self.inputs, self.model), self.where)

    def bias_slack(self, op: IntOp) -> float:
        source, affine = (self.model.tensors[t].affine for t in (op.inputs[0], op.outputs[0]))
        if self.target.accumulator.bias_limit == float("inf") or op.weight is None or source is None or affine is None:
            return 0.0  # a float32 bias has no unit
        unit = bias_unit(source, op.weight.scale) / gain_for_bias(op.weight, source, affine, self.target.accumulator)
        error = bias_error(op.weight.bias, unit, affine)
        return error if error > TIE else 0.0

    def second_rounding(self, op: IntOp) -> float:
        """Every kernel rounds once."""
        return 0.0

    def class_axis(self, rank: int) -> int:
        return 1 if rank >= 4 else -1


def compare_parameters(
    model: IntegerModel, archive: Archive, program: Program, variables: dict[str, str], target: Target
) -> tuple[list[str], int]:
    """What in the file is not as trained, in words, and how many arrays and grids were compared."""
    stated = program.grids()
    grids: dict[str, set[Grid | None]] = {
        tensor: {(np.float32(scale), int(zero_point) - SHIFT_OF_CODES) for scale, zero_point in stated[name]}
        for tensor, name in variables.items()
        if name in stated
    }
    problems, checked = compare_grids(model, grids)
    expressions = {s.name: s.expression for s in program.statements}
    for op in model.ops:
        if op.weight is None:
            continue
        found = _found(op, program, archive, expressions.get(variables[op.outputs[0]]), model)
        checked += 2
        if isinstance(found, str):
            problems.append(f"op {op.id!r}: {found}")
        else:
            problems += compare_weight(op, found, model, target.accumulator)
    return problems, checked


def _found(op: IntOp, program: Program, archive: Archive, expression: Any, model: IntegerModel) -> Found | str:
    """The kernel that an op's statement runs, or what is wrong with it."""
    used = [c for c in calls(expression) if "kernel" in program.arguments(c)] if expression is not None else []
    if len(used) != 1:
        return "its kernel is not in the file"
    arguments, held = program.arguments(used[0]), program.weights(used[0])
    packed = program.arguments(program.packed[dotted(arguments["kernel"]).removeprefix("self.")])
    if "x_zero_point" in packed and any(
        np.float64(packed[n].value) != np.float64(arguments[n].value) for n in ("x_scale", "x_zero_point")
    ):
        return "its kernel was prepacked for another input grid"
    codes, scale, bias = (array_of(held[n], archive) for n in ("kernel", "kernel_scale", "bias"))
    codes = _by_channel(op, codes)
    source = model.tensors[op.inputs[0]].affine
    assert source is not None
    unit = bias_unit(source, scale)
    steps = bias / unit
    last_bits = 1e-7 * np.abs(steps)  # of a float32; where they are no less than the unit, there is no grid
    on_grid = (np.abs(steps - np.round(steps)) <= 1e-3 + last_bits) & (last_bits < 0.1)
    real = np.where(on_grid, np.round(steps) * unit, bias)
    return Found(codes, scale, real, np.where(on_grid, unit, np.abs(bias) * FLOAT_UNIT + 1e-30))


def _by_channel(op: IntOp, codes: np.ndarray) -> np.ndarray:
    """Codes as (products, output channels), in the order of the trained kernel."""
    if op.kind == "conv2d_transpose":
        codes = np.flip(codes, tuple(range(2, codes.ndim)))
    return codes.reshape(codes.shape[0], -1).T
