"""Verification: does an artifact compute what was trained? Op by op, and never against itself.

For each op the artifact's own integer inputs are dequantized, the trained op is run on them in float32, and its result
is compared with the artifact's output codes before rounding. What an artifact is, and how it runs, is its folder's
business: it hands over an `Artifact`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from kquant.core.errors import ArtifactError
from kquant.core.graph import Graph, Op, walk
from kquant.core.integer import IntegerModel, IntOp
from kquant.core.parity import MEAN_ERROR_LIMIT, TIE, OpTally, ParityReport, snr_db
from kquant.core.target import Target


class Artifact(Protocol):
    """An artifact as verification sees it."""

    def run(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Every tensor by its id, in codes of the integer model, for the model's inputs in order."""

    def bias_slack(self, op: IntOp) -> float:
        """What rounding the trained bias to its unit shifts, in output codes, where a kernel's own rounding is less."""

    def second_rounding(self, op: IntOp) -> float:
        """What the op's kernel adds to an error of half a code by rounding once more, in codes; 0 if it rounds once."""

    def class_axis(self, rank: int) -> int:
        """The axis of the classes in an output of this rank."""


def check_same(model: IntegerModel, names: set[str], where: str) -> None:
    """An artifact must hold every tensor that the model's plan names.

    Raises:
        ArtifactError: it does not.
    """
    missing = [t for op in model.ops if op.parts for t in op.outputs if t not in names]
    if missing:
        raise ArtifactError(
            where,
            f"every quantized tensor of model {model.name!r} must be in the file",
            f"no tensor named {', '.join(map(repr, missing[:4]))}",
            "Verify with the model that the file was exported from",
        )


class Verification:
    """Gathers the comparison over batches."""

    def __init__(self, graph: Graph, model: IntegerModel, target: Target, artifact: Artifact):
        self.graph, self.model, self.target, self.artifact = graph, model, target, artifact
        self.tallies: dict[str, OpTally] = {}
        self.samples, self.agree, self.ranked = 0, 0, 0
        self.worst, self.differ, self.values = 0.0, 0, 0
        self.signal = self.noise = 0.0

    def batch(self, feeds: dict[str, np.ndarray]) -> None:
        """Compare one batch."""
        values = [feeds[n] for n in self.graph.inputs]
        raw = self.artifact.run(values) | self._held()
        reference = self._float_values(feeds)
        for op in self.model.ops:
            if op.parts and op.kind != "float":
                self._compare(op, raw, reference)
        self._end_to_end(feeds, values, raw, reference)
        self.samples += len(values[0])

    def _held(self) -> dict[str, np.ndarray]:
        """The codes of the trained arrays that are constants; that the artifact has the same is compared elsewhere."""
        names = [op.outputs[0] for op in self.model.ops if op.kind == "parameter"]
        constants = {n: self.model.tensors[n].constant for n in names}
        return {n: value for n, value in constants.items() if value is not None}

    def _float_values(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The float model's value of every tensor: quantizers off, float weights."""
        kept: dict[str, np.ndarray] = {}

        def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
            if op.kind == "fake_quant":
                return inputs
            kept.update({t: np.asarray(v) for t, v in zip(op.outputs, outputs, strict=True)})
            return None

        walk(self.graph, feeds, visit, float_weights=True)
        return kept

    def _real(self, tensor: str, raw: dict[str, np.ndarray]) -> np.ndarray | None:
        """The real values of a tensor of the graph, from the artifact's codes."""
        constant = self.graph.tensors[tensor].constant
        if constant is not None:
            return constant
        name = self.model.bound[tensor]
        affine = self.model.tensors[name].affine
        return raw[name] if affine is None else affine.dequantize(raw[name])

    def _compare(self, op: IntOp, raw: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> None:
        if op.kind == "quantize" and not _is_real(raw.get(op.inputs[0])):
            return  # the boundary takes codes, so nothing was quantized here
        values: dict[str, Any] = {}
        if op.kind == "clamp" and op.parts[0].kind == "fake_quant":
            entry, held = op.parts[0].inputs[0], self.model.tensors[op.inputs[0]].affine
            if entry in self.graph.inputs and held is not None and not _is_real(raw.get(entry)):
                values[entry] = held.dequantize(raw[op.inputs[0]])  # few bits clamp the codes that came in
        for part in op.parts:
            inputs = [values[t] if t in values else self._real(t, raw) for t in part.inputs]
            values.update(zip(part.outputs, part.call(inputs), strict=True))
        last = op.parts[-1]
        finals = (last.outputs[0], *op.parts[0].outputs[1:])
        for tensor, name in zip(finals, op.outputs, strict=True):
            affine = self.model.tensors[name].affine
            if affine is None:
                continue
            twice, slack = self.artifact.second_rounding(op), self.artifact.bias_slack(op)
            bound = max(self.target.row(op.kind).bound, 0.5 + twice + TIE)
            fresh = OpTally(name, _kind(op), bound, affine, slack, max(MEAN_ERROR_LIMIT, twice))
            tally = self.tallies.setdefault(name, fresh)
            real = _unquantized(last, values[tensor], inputs)
            tally.compare(raw[name], np.asarray(real))
            if tensor in reference:
                tally.against_float(affine.dequantize(raw[name]), reference[tensor])

    def _end_to_end(
        self,
        feeds: dict[str, np.ndarray],
        values: list[np.ndarray],
        raw: dict[str, np.ndarray],
        reference: dict[str, np.ndarray],
    ) -> None:
        trained: dict[str, np.ndarray] = {}

        def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> None:
            trained.update(
                {t: np.asarray(v) for t, v in zip(op.outputs, outputs, strict=True) if t in self.graph.outputs}
            )

        walk(self.graph, feeds, visit)
        for tensor, name in zip(self.graph.outputs, self.model.outputs, strict=True):
            affine = self.model.tensors[name].affine
            if tensor not in trained:
                continue
            theirs = trained[tensor]
            mine = raw[name] if affine is None else affine.dequantize(raw[name])
            # A float output has no codes: it is measured in steps of 1/127 of its own largest value.
            step = max(float(np.abs(theirs).max(initial=0.0)) / 127, 1e-30) if affine is None else affine.scale
            distance = np.abs(mine.astype(np.float64) - theirs) / np.float64(step)
            self.worst = max(self.worst, float(distance.max(initial=0.0)))
            self.differ += int((distance >= 0.5).sum())
            self.values += distance.size
            axis = self.artifact.class_axis(theirs.ndim)
            if theirs.ndim >= 2 and theirs.shape[axis] > 1:
                same = mine.argmax(axis) == theirs.argmax(axis)
                self.agree += int(same.sum())
                self.ranked += same.size
            source = self.model_tensor(tensor)
            if source in reference:
                self.signal += float((reference[source].astype(np.float64) ** 2).sum())
                self.noise += float(((mine - reference[source]) ** 2).sum())

    def model_tensor(self, tensor: str) -> str:
        """The tensor before its fake quantization."""
        producer = self.graph.producers().get(tensor)
        return producer.inputs[0] if producer is not None and producer.kind == "fake_quant" else tensor

    def report(self, path: str, problems: list[str], checked: int) -> ParityReport:
        """The finished report."""
        rows = [t.row() for t in self.tallies.values()]
        count = sum(t.count for t in self.tallies.values()) or 1
        problems = problems + [
            f"op {r.name!r} ({r.kind}): max_lsb {r.max_lsb:.3f} (bound {r.bound}), mean error {r.mean_error:+.4f} "
            f"(bound {r.mean_bound:.4f})"
            for r in rows
            if not r.ok
        ]
        return ParityReport(
            path, not problems, max((r.max_lsb for r in rows), default=0.0),
            sum(t.wrong for t in self.tallies.values()) / count,
            max((r.mean_error for r in rows), key=abs, default=0.0), self.worst, self.differ / max(self.values, 1),
            self.agree / self.ranked if self.ranked else None, snr_db(self.signal, self.noise), self.samples, checked,
            problems, rows,
        )  # fmt: skip


def _is_real(value: np.ndarray | None) -> bool:
    return value is not None and value.dtype.kind == "f"


def _kind(op: IntOp) -> str:
    own = op.parts[0].kind + (" + add" if len(op.inputs) > 1 and op.weight is not None else "")
    return own if op.parts[0].kind == op.kind else f"{own} by {op.kind}"


def _unquantized(last: Op, value: Any, inputs: list[Any]) -> Any:
    """A fake quantization is itself the op of a requantize: what it should round is its input."""
    return inputs[0] if last.kind == "fake_quant" else value
