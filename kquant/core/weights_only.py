"""The weights-only form of a quantized model: integer kernels in the file, float arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kquant.core.fold import folded_codes
from kquant.core.graph import Graph
from kquant.core.integer import IntegerModel, IntOp, IntTensor, IntWeight
from kquant.core.stages import Stage, stages

KINDS = ("conv2d", "depthwise_conv2d", "conv2d_transpose", "dense")
REASON = "weights_only=True: integer weights, float arithmetic"


def weights_only(graph: Graph) -> IntegerModel:
    """The model with the trained weight codes and everything else in float; activation quantizers are left out."""
    alias: dict[str, str] = {t: t for t in graph.tensors}
    tensors = {n: IntTensor(n, graph.tensors[n].shape, graph.tensors[n].dtype) for n in graph.inputs}
    tensors |= {
        t.id: IntTensor(t.id, t.shape, str(t.constant.dtype), None, t.constant)
        for t in graph.tensors.values()
        if t.constant is not None
    }
    ops: list[IntOp] = []
    floats: dict[str, str] = {}

    def add(op: IntOp) -> None:
        ops.append(op)
        floats[op.id] = REASON
        tensors.update({t: IntTensor(t, graph.tensors[t].shape, "float32") for t in op.outputs})

    for stage in stages(graph, lambda op: op.kind != "relu" or op.attrs.get("max") in (None, 6.0)):
        anchor = stage.anchor
        if anchor.kind in ("fake_quant", "identity"):
            alias[anchor.output] = alias[anchor.inputs[0]]
        elif anchor.kind == "parameter":
            value = np.asarray(anchor.call([])[0], np.float32)
            ops.append(IntOp(anchor.output, "parameter", (), anchor.outputs, parts=stage.ops))
            tensors[anchor.output] = IntTensor(anchor.output, value.shape, "float32", None, value)
        elif anchor.kind in KINDS and "codes" in anchor.attrs:
            add(_weighted(stage, alias))
        else:
            for part in stage.ops:
                inputs = tuple(alias[t] for t in part.inputs)
                add(IntOp(part.id, "float", inputs, part.outputs, {"reason": REASON}, parts=(part,)))
    outputs = tuple(alias[t] for t in graph.outputs)
    return IntegerModel(
        tuple(ops), tensors, graph.inputs, outputs, graph.input_names, graph.output_names, floats, alias, graph.name
    )


def without_activation_quantizers(graph: Graph) -> Graph:
    """The graph with its activation quantizers as identities: the trained weights in float arithmetic."""

    def passed(values: Any, float_weights: bool = False) -> list[Any]:
        return [values[0]]

    ops = tuple(replace(op, kind="identity", call=passed) if op.kind == "fake_quant" else op for op in graph.ops)
    return graph.replace(ops=ops)


def _weighted(stage: Stage, alias: dict[str, str]) -> IntOp:
    anchor, relu = stage.anchor, stage.relu
    codes, scale, bits, bias = folded_codes(stage)
    weight = IntWeight(codes.astype(np.int8), scale.astype(np.float32), bits, bias)
    return IntOp(
        stage.output, anchor.kind, tuple(alias[t] for t in anchor.inputs), (stage.output,), anchor.attrs, weight,
        relu=relu is not None, relu_max=relu.attrs.get("max") if relu else None, parts=stage.ops,
    )  # fmt: skip
