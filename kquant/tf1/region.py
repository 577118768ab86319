"""Find the model in a graph that holds more than a model: its inputs and outputs, beside losses, metrics, summaries.

The inputs are the data that reaches an op with a kernel. The model goes on from those ops for as long as every op has a
counterpart in the artifact and depends on no other data, such as labels; where it ends are its outputs.
"""

from __future__ import annotations

from typing import Any

from kquant.core.errors import ModelError, UnsupportedError
from kquant.core.int8_spec import row_of
from kquant.tf1 import marks
from kquant.tf1.flags import SWITCHES, value_in_evaluation
from kquant.tf1.losses import Losses
from kquant.tf1.match import Matcher
from kquant.tf1.statistics import dependents

SOURCES = (
    "Placeholder", "PlaceholderV2", "PlaceholderWithDefault", "IteratorGetNext", "IteratorV2", "QueueDequeueV2",
    "QueueDequeueManyV2", "QueueDequeueUpToV2", "FIFOQueueV2", "ReaderReadV2", "_Arg",
)  # fmt: skip
_KERNELS = (
    "Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3",
    "GatherV2", "Gather", "ResourceGather",
)  # fmt: skip

_LABELS = ("OnesLike", "ZerosLike")


def find(m: Matcher, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs and outputs of the model in a graph, those that are not given.

    Raises:
        ModelError: no op with a kernel, or no data that reaches one.
        UnsupportedError: none whose kernel the target has.
    """
    graph = m.evaluator.graph
    kernels = [op for op in graph.get_operations() if op.type in _KERNELS and op.outputs[0].name in m.depends]
    unread = _written_for(graph)
    kernels = [op for op in kernels if op.name not in unread]
    anchors = [op for op in kernels if m.match(op.outputs[0]).kernel is not None]
    if kernels and not anchors and not outputs:
        op, reason = kernels[0], m.match(kernels[0].outputs[0]).attrs["reason"]
        fix = "Build it in a form that the target has, such as channels-last; or name outputs=, and leave it in float"
        raise UnsupportedError(f"op {op.name!r} ({op.type})", reason, fix=fix)
    if not anchors and not outputs:
        fix = "Name the ends of the model with inputs= and outputs="
        raise ModelError("graph", "a graph with at least one op that has a trainable weight", "none", fix)
    ends = [op.outputs[0] for op in anchors] or list(outputs)
    reached = _behind(m, list(outputs) or ends)
    if not inputs:
        inputs = tuple(t for t in _sources(graph) if t.name in reached)
    if not inputs:
        raise ModelError("graph", "data that reaches an op with a weight (a placeholder)", "none", "Give inputs=")
    return inputs, outputs or _outputs(m, ends, reached, {t.name for t in inputs})


def _written_for(graph: Any) -> set[str]:
    """The names of the ops that others were written for, and of those that only they read."""
    parts = [marks.of(op, marks.PART) for op in graph.get_operations()]
    found = {mark["of"] for mark in parts if mark is not None}
    todo = [graph.get_operation_by_name(name) for name in found]
    while todo:
        for op in (t.op for t in todo.pop().inputs):
            if op.name not in found and all(r.name in found for t in op.outputs for r in t.consumers()):
                found.add(op.name)
                todo.append(op)
    return found


def _sources(graph: Any) -> list[Any]:
    """Data that can come in: not flags and rates, which are single values."""
    ops = [op for op in graph.get_operations() if op.type in SOURCES and marks.of(op, marks.EVALUATION) is None]
    tensors = [t for op in ops for t in op.outputs]
    return [t for t in tensors if t.dtype.name not in ("bool", "string", "resource", "variant") and t.shape.rank != 0]


def _behind(m: Matcher, tensors: list[Any]) -> set[str]:
    """Names of the tensors of the neutral graph that these depend on, themselves included."""
    found, todo = set(), list(tensors)
    while todo:
        tensor = todo.pop()
        if tensor.name not in found:
            found.add(tensor.name)
            if tensor.op.type not in SOURCES:
                todo += [t for t in m.match(tensor).sources if hasattr(t, "op")]
    return found


def _outputs(m: Matcher, anchors: list[Any], reached: set[str], inputs: set[str]) -> tuple[Any, ...]:
    # A placeholder of unknown shape beside the inputs is a rate or a flag, not data.
    others = [t for t in _sources(m.evaluator.graph) if t.name not in inputs and t.shape.rank is not None]
    # What is made like a tensor of the model, with the same number everywhere, are labels.
    others += [t for op in m.evaluator.graph.get_operations() if op.type in _LABELS for t in op.outputs]
    foreign = dependents(others)
    inside = set(reached)
    order = {t.name: t for t in anchors}
    todo = list(anchors)
    while todo:
        for op in todo.pop().consumers():
            for tensor in _results(op):
                if tensor.name not in order and _belongs(m, tensor, foreign) and _reads_only(m, tensor, inside):
                    order[tensor.name] = tensor
                    inside.add(tensor.name)
                    todo.append(tensor)
    kernels = {tensor.name for tensor in anchors}
    lost = Losses(m, foreign).among({name: tensor for name, tensor in order.items() if name not in kernels})
    inside -= lost
    graph = m.evaluator.graph
    read = {s.name for n in inside - inputs for s in m.match(graph.get_tensor_by_name(n)).sources if hasattr(s, "op")}
    read |= {t.name for t in order.values() if any(r.name in inside for op in t.consumers() for r in op.outputs)}
    # What an op reads that was written out is not an end, though what it was written out in may read something else.
    kept = {mark["of"] for n in inside if (mark := marks.of(graph.get_tensor_by_name(n).op, marks.PART))}
    read |= {t.name for name in kept for t in graph.get_operation_by_name(name).inputs}
    unread = _written_for(graph)
    ends = (t for name, t in order.items() if name not in read and name not in lost and t.op.name not in unread)
    return tuple(sorted(ends, key=lambda t: t.op._id))


def _results(op: Any) -> list[Any]:
    """What an op makes of the model: in a conditional on a flag, what evaluation takes."""
    if marks.of(op, marks.EVALUATION) is not None:
        return []
    value = value_in_evaluation(op.inputs[1]) if op.type in SWITCHES else None
    if value is None:
        return list(op.outputs)
    taken = op.outputs[int(value)]
    return [taken] if taken.consumers() else []


def _belongs(m: Matcher, tensor: Any, foreign: set[str]) -> bool:
    """Whether a tensor behind the model still belongs to it."""
    if tensor.name in foreign or tensor.name not in m.depends or not tensor.dtype.is_floating:
        return False
    if tensor.op.type in ("Identity", "IdentityN") and not tensor.consumers() and _is_read(m, tensor):
        return False  # what a function with a gradient of its own hands on beside its result
    return row_of(m.match(tensor).kind).placement.value != "opaque"


def _reads_only(m: Matcher, tensor: Any, inside: set[str]) -> bool:
    """Whether all that makes a tensor belongs to the model; the second operand may be reached after the first."""
    return all(s.name in inside for s in m.match(tensor).sources if hasattr(s, "op") and not m.is_parameter(s))


def _is_read(m: Matcher, tensor: Any) -> bool:
    """Whether others go on from what an unread identity hands on."""
    found = m.match(tensor)
    if found.kind != "identity":
        return False
    (source,) = found.sources
    return any(op is not tensor.op for op in source.consumers())
