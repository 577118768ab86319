"""Stages: the groups of ops that one integer kernel computes (op, folded batch norm, fused sum, fused activation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kquant.core.graph import Graph, Op
from kquant.core.int8_spec import Row
from kquant.core.target import TFLITE, Target


@dataclass(frozen=True)
class Stage:
    """What one integer kernel computes.

    Args:
        anchor: the op whose kernel runs.
        norm: the per-channel affine op (batch norm) folded into its weights.
        relu: the ReLU family op fused into its output.
        ops: all of these and the identity ops between them, in order.
        output: the tensor after the last of them (for an anchor with one output).
        row: the anchor's row in the target's table.
        add: the sum that the kernel computes before it rounds, on targets that have such kernels.
    """

    anchor: Op
    norm: Op | None
    relu: Op | None
    ops: tuple[Op, ...]
    output: str
    row: Row
    add: Op | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the kernel reads: the anchor's inputs, and the other operand of its sum."""
        if self.add is None:
            return self.anchor.inputs
        inside = {t for op in self.ops for t in op.outputs}
        return (*self.anchor.inputs, *(t for t in self.add.inputs if t not in inside))


def stages(graph: Graph, may_fuse: Callable[[Op], bool] = lambda op: True, target: Target = TFLITE) -> list[Stage]:
    """Group the ops of a graph into stages, in an order in which each reads what those before it give.

    A batch norm, a sum or an activation joins the op before it if it is that op's only reader, no model output cuts it
    off, and `may_fuse` allows it. A batch norm must also scale the axis of the kernel's output channels, where the
    front end states the axes. Identity ops (dropout) in between do not separate them. A sum joins the first of its
    operands that can take it, which then stands at the sum's own place, behind the other.
    """
    consumers = graph.consumers()
    taken: set[str] = set()
    found = []
    for op in graph.ops:
        if op.id not in taken:
            stage = _grow(op, target.row(op.kind), graph, consumers, lambda o: o.id not in taken and may_fuse(o))
            taken.update(o.id for o in stage.ops)
            found.append(stage)
    places = {op.id: i for i, op in enumerate(graph.ops)}
    return sorted(found, key=lambda stage: places[(stage.add or stage.anchor).id])


def _grow(
    anchor: Op, row: Row, graph: Graph, consumers: dict[str, list[tuple[Op, int]]], may_fuse: Callable[[Op], bool]
) -> Stage:
    parts: dict[str, Op] = {}
    ops, pending = [anchor], []
    output = tensor = anchor.outputs[0]
    fusable = (row.fuses_norm or row.fuses_relu) and may_fuse(anchor)
    while fusable and "relu" not in parts:
        readers = consumers[tensor]
        if len(readers) != 1 or tensor in graph.outputs:
            break
        nxt = readers[0][0]
        if nxt.kind == "identity":
            pending.append(nxt)
            tensor = nxt.output
            continue
        role = _role(row, anchor, nxt, parts, graph)
        if role is None or not may_fuse(nxt):
            break
        parts[role] = nxt
        ops += [*pending, nxt]
        pending, output = [], nxt.output
        tensor = output
    return Stage(anchor, parts.get("norm"), parts.get("relu"), tuple(ops), output, row, parts.get("add"))


def _role(row: Row, anchor: Op, nxt: Op, parts: dict[str, Op], graph: Graph) -> str | None:
    """What `nxt` would be in the stage: `norm`, `add`, `relu`, or None if it cannot join."""
    if nxt.kind == "channel_affine" and row.fuses_norm and not parts:
        return "norm" if nxt.attrs.get("axis") == anchor.attrs.get("channel_axis") else None
    if nxt.kind == "relu" and row.fuses_relu:
        return "relu"
    if nxt.kind == "add" and row.sums_axes and "add" not in parts:
        operands = [graph.tensors[t] for t in nxt.inputs]
        fits = all(len(t.shape) == row.sums_axes and t.shape == operands[0].shape for t in operands)
        return "add" if fits and all(t.constant is None for t in operands) else None
    return None
