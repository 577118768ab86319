"""Marks: what kquant has put into a graph, written as an attribute of the ops themselves.

A mark travels with the graph through `GraphDef` and `MetaGraphDef`, so that a graph that was saved and imported again
is still known to be quantized. TensorFlow keeps attributes whose names begin with an underscore and ignores them.
"""

from __future__ import annotations

import json
from typing import Any

from tensorflow.core.framework import attr_value_pb2

ATTRIBUTE = "_kquant"

# The kinds of marks, each on the identity op that ends what was inserted:
FAKE_QUANT = "fake_quant"  # a fake quantization of an activation
WEIGHT = "weight"  # a fake-quantized kernel
GRADIENT = "gradient"  # an identity whose gradient is quantized
BATCH_NORM = "batch_norm"  # a batch norm whose statistics can be frozen
STATISTIC = "statistic"  # a batch statistic that can be frozen
LOOK_UP = "look_up"  # a look-up in a fake-quantized table, in the place of one in a variable
WRITTEN_OUT = "written_out"  # what is computed by several ops in the place of one
# and on other ops:
PART = "part"  # one of the ops that another one was written out in
CONDITIONAL = "conditional"  # one with a flag, whose branch for evaluation was inlined beside it
EVALUATION = "evaluation"  # an op of such a branch
PREDICATE = "predicate"  # what a conditional of a batch norm that can be frozen sees of its flag

FLOORED = "floored"  # the training form of a kernel that holds its batch norm

# Those that stand for the tensor behind them: they change how it is trained and not what it is.
TRANSPARENT = (GRADIENT, BATCH_NORM, FLOORED)
# Those that compute anew the tensor that they stand for.
REPLACING = (LOOK_UP, WRITTEN_OUT)


def put(op: Any, kind: str, **facts: Any) -> None:
    """Mark an op."""
    text = json.dumps({"kind": kind, **facts}, sort_keys=True)
    op._set_attr(ATTRIBUTE, attr_value_pb2.AttrValue(s=text.encode()))


def of(op: Any, kind: str | None = None) -> dict[str, Any] | None:
    """The mark of an op, or None; with `kind`, only a mark of that kind."""
    try:
        found: dict[str, Any] = json.loads(op.get_attr(ATTRIBUTE))
    except ValueError:
        return None
    return found if kind is None or found["kind"] == kind else None


def are_in(graph: Any) -> bool:
    """Whether kquant has been at a graph."""
    return any(of(op) is not None for op in graph.get_operations() if op.type == "Identity")


def standing_for(graph: Any, kinds: tuple[str, ...] = (*TRANSPARENT, *REPLACING)) -> dict[str, str]:
    """For the name of every tensor that stands for another, the name of that one."""
    found = {}
    for op in graph.get_operations():
        mark = of(op) if op.type == "Identity" else None
        if mark is not None and mark["kind"] in kinds:
            found[op.outputs[0].name] = mark["input"]
    return found
