"""What of a graph behind a model belongs to a loss or a metric, though every op of it has an integer form.

A loss goes on from the model with ops that models are made of too: `log(p + epsilon)`, `max(x, 0)`, `square(y - x)`.
So that a graph gives the same outputs whether it was built with its loss or without, such ops are told from the model
by where they lead: only to labels or to reductions over the batch, past no further kernel.
"""

from __future__ import annotations

from typing import Any

from kquant.tf1 import marks
from kquant.tf1.match import Matcher
from kquant.tf1.write_out import written_out

_LOGARITHMS = ("Log", "Log1p", "LogSoftmax")
_DISTANCES = ("Square", "SquaredDifference", "Abs", "Sub", "Neg")
# Around a logarithm, with one tensor in them: its epsilon, `1 - p`, the clipping of p; in a softplus written out, more.
_AROUND = ("Add", "AddV2", "Sub", "Maximum", "Minimum", "Identity", "IdentityN", "Exp", "Neg", "Abs")
# On logits that are themselves compared with labels: the terms of a cross entropy that are free of labels.
_TERMS = (*_LOGARITHMS, *_DISTANCES, *_AROUND, "Relu", "Softplus", "Select", "SelectV2")
_REDUCTIONS = ("Mean", "Sum", "Max", "Min")
_NOT_DATA = ("string", "int32", "int64", "bool")


class Losses:
    """Tells the tensors of losses from those of the model.

    Args:
        m: the matcher.
        foreign: names of the tensors that depend on other data than the model's, such as labels.
    """

    def __init__(self, m: Matcher, foreign: set[str]):
        self.m, self.foreign = m, foreign
        parts = [marks.of(op, marks.PART) for op in m.evaluator.graph.get_operations()]
        # An op that was written out is still there; what it was written out in is read in its place.
        self.originals = {mark["of"] for mark in parts if mark is not None}
        self._leads: dict[str, bool] = {}
        self._lost: set[str] = set()
        self._in_logarithms: set[str] = set()

    def among(self, tensors: dict[str, Any]) -> set[str]:
        """The names of those of some tensors (by name) that belong to a loss."""
        for tensor in sorted(tensors.values(), key=lambda t: -t.op._id):  # what reads a tensor comes before it
            if self._leads_to_a_loss(tensor) and self._is_lost(tensor):
                self._lost.add(tensor.name)
        return self._lost

    # -- where a tensor leads -------------------------------------------------------------------------------------

    def _results(self, tensor: Any) -> list[Any]:
        """What is computed from a tensor, but for its shape, its summaries, and comparisons."""
        ops = [op for op in tensor.consumers() if op.name not in self.originals]
        return [t for op in ops for t in op.outputs if t.dtype.name not in _NOT_DATA or t.name in self.foreign]

    def _leads_to_a_loss(self, tensor: Any) -> bool:
        """Whether all that a tensor leads to meets labels or is reduced over the batch, before any kernel."""
        if tensor.name not in self._leads:
            self._leads[tensor.name] = True  # in a loop of the graph the other ways decide
            results = self._results(tensor)
            leads = bool(results) and not self._has_weights(tensor)
            self._leads[tensor.name] = leads and all(
                t.name in self.foreign or self._reduces(t) or self._leads_to_a_loss(t) for t in results
            )
        return self._leads[tensor.name]

    def _has_weights(self, tensor: Any) -> bool:
        found = self.m.match(tensor) if tensor.name in self.m.depends else None
        return found is not None and bool(found.weights)

    def _reduces(self, tensor: Any) -> bool:
        """Whether a tensor is reduced over the batch."""
        if tensor.op.type not in _REDUCTIONS or not tensor.op.inputs[0].shape.rank:
            return False
        axes = self.m.static(tensor.op.inputs[1])
        return axes is not None and (0 in axes.ravel() or -tensor.op.inputs[0].shape.rank in axes.ravel())

    # -- what it is -----------------------------------------------------------------------------------------------

    def _original(self, op: Any) -> Any:
        """The op that one is a part of, if it was written out."""
        mark = marks.of(op, marks.PART)
        name = written_out(op) if mark is None else mark["of"]
        return op if name is None else self._original(op.graph.get_operation_by_name(name))

    def _is_lost(self, tensor: Any) -> bool:
        op = self._original(tensor.op)
        results = self._results(tensor)
        if self._original(results[0].op) is op:  # in the middle of what an op was written out in
            return any(t.name in self._lost for t in results)
        data = [t for t in op.inputs if not self.m.is_parameter(t)]
        near = len(data) <= 1 and op.type in _AROUND and any(t.name in self._in_logarithms for t in results)
        if op.type in _LOGARITHMS or near:
            self._in_logarithms.add(tensor.name)
            return True
        if op.type in _TERMS and data and all(self._is_compared(t) for t in data):
            return True
        ends = all(self._reduces(t) or t.name in self._lost for t in results)
        if op.type in _REDUCTIONS:
            return ends and self._original(op.inputs[0].op).type in _DISTANCES
        return ends and op.type in _DISTANCES

    def _is_compared(self, tensor: Any) -> bool:
        return any(t.name in self.foreign for t in self._results(tensor))
