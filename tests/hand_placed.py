"""Graphs written by hand, and their plans."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.config import Candidate, match, parse
from kquant.core.graph import Graph, Op, Tensor, Weight
from kquant.core.int8_spec import ROWS
from kquant.core.placement import place
from kquant.core.plan import Plan, Spec
from kquant.core.target import TFLITE, Target

TYPES = {
    "conv2d": "Conv2D",
    "dense": "Dense",
    "relu": "ReLU",
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
    "lstm": "LSTM",
}
DEFAULT = {"q_bits": 8, "op_types": ["default"]}


def graph(*ops: tuple, outputs: tuple[str, ...] = ()) -> Graph:
    """A graph from `(name, kind, inputs[, attrs])`; an op's output has its name, and `x` is the model's input."""
    made = []
    for name, kind, inputs, *attrs in ops:
        weighted = kind in ROWS and ROWS[kind].weighted
        kernel = {"kernel": Weight((3, 4), lambda: np.ones((3, 4), np.float32))} if weighted else {}
        settings = {"kernel_axes": (0,)} if weighted else {}
        settings |= attrs[0] if attrs else {}
        made.append(Op(name, kind, tuple(inputs), (name,), settings, kernel, name, TYPES.get(kind, kind)))
    tensors = {t: Tensor(t, (None, 4)) for t in ("x", *(op.id for op in made))}
    return Graph(tuple(made), tensors, ("x",), outputs or (made[-1].id,))


def placed(graph: Graph, *config: dict[str, Any], target: Target = TFLITE) -> Plan:
    candidates = [Candidate(f"input:{name}", (name,), "InputLayer", False) for name in graph.inputs]
    candidates += [
        Candidate(op.id, (op.layer,), op.type_name, op.kind in ROWS or op.kind == "lstm") for op in graph.ops
    ]
    return place(graph, match(parse(list(config) or None), candidates), target)


def site(plan: Plan, tensor: str) -> Any:
    """The place where a tensor is fake-quantized (the last, where there are several in a row)."""
    found = plan.sites[tensor]
    return found[-1] if isinstance(found, tuple) else found


def spec(plan: Plan, tensor: str) -> Spec:
    return plan.specs[site(plan, tensor).spec]
