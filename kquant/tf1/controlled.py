"""What the controls act on in a quantized graph."""

from __future__ import annotations

from typing import Any

from kquant.core.controls import Controlled
from kquant.tf1 import marks
from kquant.tf1.flagged import behind
from kquant.tf1.graphs import as_model
from kquant.tf1.read import NAME, complete, read_with_source


def controlled(value: Any) -> Controlled | None:
    """The moving ranges of a graph, and its batch norms that normalize by their batch; None without a quantizer.

    Raises:
        ModelError: not a graph, or a session on one.
    """
    model = as_model(value)
    if not marks.are_in(model.graph):
        return None
    graph, reader = read_with_source(complete(model))
    ranges = [state for state in reader.ranges.values() if state.fixed is None]
    norms = dict.fromkeys(op.attrs["batch_norm"] for op in graph.ops if "batch_norm" in op.attrs)
    affine = [op for op in graph.ops if op.kind == "channel_affine" and "batch_norm" not in op.attrs]
    beyond = [op.layer for op in affine if behind(reader.matcher, op.source).decided]
    return Controlled(NAME, ranges, list(norms), beyond)
