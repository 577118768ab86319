"""Stages: the groups of ops that one integer kernel computes (op, folded batch norm, fused activation)."""

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
    """

    anchor: Op
    norm: Op | None
    relu: Op | None
    ops: tuple[Op, ...]
    output: str
    row: Row


def stages(graph: Graph, may_fuse: Callable[[Op], bool] = lambda op: True, target: Target = TFLITE) -> list[Stage]:
    """Group the ops of a graph into stages, in topological order of their anchors.

    A batch norm or an activation joins the op before it if it is that op's only reader, is not cut off by a model
    output, and `may_fuse` allows it. A batch norm must also scale the axis of the kernel's output channels, where the
    front end states the axes. Identity ops (dropout) in between do not separate them.
    """
    consumers = graph.consumers()
    taken: set[str] = set()
    found = []
    for op in graph.ops:
        if op.id not in taken:
            stage = _grow(op, target.row(op.kind), graph, consumers, may_fuse)
            taken.update(o.id for o in stage.ops)
            found.append(stage)
    return found


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
        role = _role(row, anchor, nxt, parts)
        if role is None or not may_fuse(nxt):
            break
        parts[role] = nxt
        ops += [*pending, nxt]
        pending, output = [], nxt.output
        tensor = output
    return Stage(anchor, parts.get("norm"), parts.get("relu"), tuple(ops), output, row)


def _role(row: Row, anchor: Op, nxt: Op, parts: dict[str, Op]) -> str | None:
    """What `nxt` would be in the stage: `norm`, `relu`, or None if it cannot join."""
    if nxt.kind == "channel_affine" and row.fuses_norm and "norm" not in parts:
        return "norm" if nxt.attrs.get("axis") == anchor.attrs.get("channel_axis") else None
    if nxt.kind == "relu" and row.fuses_relu:
        return "relu"
    return None
