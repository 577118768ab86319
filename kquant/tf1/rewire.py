"""Where the tensors of the neutral graph are read in the TensorFlow graph, and how their readers are changed."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kquant.core.errors import ModelError
from kquant.tf1.flags import CONDITIONALS, evaluated
from kquant.tf1.match import Found

Slot = tuple[Any, int]  # an op and the index of one of its inputs


def slots(found: Found, depends: set[str]) -> list[list[Slot]]:
    """For every source of an op, the inputs of graph ops that read it as part of that op.

    A tensor that is an operand twice (`x + x`) is read at as many inputs as operands, one for each.
    """
    between = parts(found, depends)
    names = [s.name if isinstance(s, tf.Tensor) else None for s in found.sources]
    result: list[list[Slot]] = []
    for index, name in enumerate(names):
        if name is None:
            result.append([])
            continue
        places = [(op, i) for op in between for i, t in enumerate(op.inputs) if t.name == name]
        times = names.count(name)
        if times > 1:
            if len(places) != times:
                raise ModelError(
                    f"op {found.anchor.name!r}",
                    f"{times} reads of {name!r}",
                    len(places),
                    "Build the graph anew: it changed while it was read",
                )
            places = [places[names[:index].count(name)]]
        result.append(places)
    return result


def parts(found: Found, depends: set[str]) -> list[Any]:
    """The graph ops between an op's sources and its output, in the order of the graph."""
    stop = {s.name for s in found.sources if isinstance(s, tf.Tensor)}
    todo, seen = [found.output.op], {}
    while todo:
        op = todo.pop()
        if op.name not in seen:
            seen[op.name] = op
            todo += [t.op for t in op.inputs if t.name in depends and t.name not in stop]
            if op.type in CONDITIONALS:
                chosen = [evaluated(t) for t in op.outputs if t.name in depends]
                todo += [t.op for t in chosen if t is not None and t.name not in stop]
    return sorted(seen.values(), key=lambda op: op._id)


def readers(tensor: Any) -> list[Slot]:
    """All inputs of graph ops that read a tensor."""
    return [(op, i) for op in dict.fromkeys(tensor.consumers()) for i, t in enumerate(op.inputs) if t is tensor]


def redirect(places: list[Slot], tensor: Any) -> None:
    """Let inputs read another tensor."""
    for op, index in places:
        op._update_input(index, tensor)
