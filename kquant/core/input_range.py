"""The range of a model's input, chosen by what it does to the model's output on calibration data.

Inputs are not learned: they hold sentinel values (the log energy of digital silence, a code for "missing") that are far
outside of everything else, and a range that covers them spends most of its codes on nothing. Whether such a value
matters only the model can tell, so candidates that cut off tails are judged by the error of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kquant.core.affine import Affine
from kquant.core.errors import RangeError
from kquant.core.graph import Graph, Op, walk

SHARES = (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99)  # of the values that a candidate covers on the side that it cuts
WORTH = 0.75  # a candidate is tried only if it is this much narrower; less gains under 2.5 dB
BETTER = 0.8  # and taken only if it lowers the error of the outputs this much

Range = tuple[np.float32, np.float32]
Feeds = dict[str, np.ndarray]


def input_ranges(graph: Graph, feeds: Sequence[Feeds]) -> dict[str, Range]:
    """Ranges for the quantizers of model inputs that are better narrower than their data.

    Args:
        graph: a quantized model that was read.
        feeds: calibration batches.

    Returns:
        By the id of the `fake_quant` op, the float32 range; inputs that are best covered whole are not in it.
    """
    found: dict[str, Range] = {}
    for op in graph.ops:
        if op.kind == "fake_quant" and op.inputs[0] in graph.inputs and op.attrs["site"] is not None:
            best = _best(graph, op, feeds)
            if best is not None:
                found[op.id] = best
    return found


def _best(graph: Graph, op: Op, feeds: Sequence[Feeds]) -> Range | None:
    values = np.concatenate([np.asarray(f[op.inputs[0]], np.float32).ravel() for f in feeds])
    best = whole = (np.float32(min(values.min(), 0.0)), np.float32(max(values.max(), 0.0)))
    watched = _judged(graph)
    exact: list[list[np.ndarray]] = []
    least = first = float("inf")
    for side in (0, 1):  # the tails are unlike each other, so each is cut by itself
        for candidate in _cut(values, best, side):
            if not exact:
                exact = [_outputs(graph, batch, watched, op, None) for batch in feeds]
                least = first = _error(graph, op, feeds, exact, watched, whole)
            error = _error(graph, op, feeds, exact, watched, candidate)
            if error < BETTER * least:
                best, least = candidate, error
    return best if least < first else None


def _cut(values: np.ndarray, limits: Range, side: int) -> list[Range]:
    """Ranges with one tail cut off further and further, each narrower enough than the one before to be worth a try."""
    found: list[Range] = []
    width = limits[1] - limits[0]
    for share in SHARES:
        edge = np.float32(np.quantile(values, share if side else 1 - share))
        low, high = (limits[0], max(edge, np.float32(0))) if side else (min(edge, np.float32(0)), limits[1])
        if 0 < high - low < WORTH * width:
            found.append((low, high))
            width = high - low
    return found


def _judged(graph: Graph) -> tuple[str, ...]:
    """The tensors whose error is judged: the outputs, or what goes into a final softmax or sigmoid (the logits)."""
    producers = graph.producers()

    def before(tensor: str) -> str:
        op = producers.get(tensor)
        while op is not None and op.kind in ("fake_quant", "softmax", "sigmoid", "identity"):
            tensor, op = op.inputs[0], producers.get(op.inputs[0])
        return tensor

    return tuple(before(t) for t in graph.outputs)


def _error(
    graph: Graph, op: Op, feeds: Sequence[Feeds], exact: list[list[np.ndarray]], watched: tuple[str, ...], limits: Range
) -> float:
    """Squared error of the outputs when only this input is quantized."""
    try:
        affine = Affine.of_range(*limits, op.attrs["quantizer"].bits, op.inputs[0])
    except RangeError:
        return float("inf")
    total = 0.0
    for batch, wanted in zip(feeds, exact, strict=True):
        for mine, true in zip(_outputs(graph, batch, watched, op, affine), wanted, strict=True):
            total += float(((mine.astype(np.float64) - true) ** 2).sum())
    return total


def _outputs(graph: Graph, feeds: Feeds, watched: tuple[str, ...], quantized: Op, affine: Affine | None) -> list[Any]:
    kept: dict[str, np.ndarray] = {}

    def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
        result = outputs
        if op.kind == "fake_quant":
            result = inputs
            if op.id == quantized.id and affine is not None:
                result = [affine.dequantize(affine.quantize(np.asarray(inputs[0])))]
        kept.update({t: np.asarray(v) for t, v in zip(op.outputs, result, strict=True) if t in watched})
        return result

    walk(graph, feeds, visit)
    return [kept[t] for t in watched if t in kept]
