"""The neutral graph: what every front end reads its model into.

A `Graph` is a list of typed ops in topological order over named tensors, in channels-last layout. An op's
`kind` is a row of `kquant.core.int8_spec`; its `call` runs the framework's own trained op on concrete values, which is
what calibration and verification use, so that the reference is always the model and never our reading of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kquant.core.errors import CalibrationError

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Tensor:
    """A value in the graph: `shape` with None for unknown sizes (the batch first), numpy dtype name, constant value."""

    id: str
    shape: Shape
    dtype: str = "float32"
    constant: np.ndarray | None = None


@dataclass(frozen=True)
class Weight:
    """A trainable array of an op: its shape and a function that reads its current float32 value."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def _no_call(values: Any, float_weights: bool = False) -> list[Any]:
    raise TypeError("this op was read for planning only and cannot run")


@dataclass(frozen=True)
class Op:
    """One op.

    Args:
        id: unique in the graph; it names the op's tensors in the artifact.
        kind: a row of the operator table.
        inputs, outputs: tensor ids.
        attrs: the op's settings (strides, padding, axis ...) as plain values.
        weights: arrays by role (`kernel`, `bias`, `gamma` ...).
        layer: the name that `op_names` matches.
        type_name: the name that `op_types` matches.
        call: `(inputs, float_weights=False)`: runs the op in inference mode on a list of arrays and returns the list of
            its outputs.
        source: what the front end needs to build the op again; nobody else looks at it.
    """

    id: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    layer: str = ""
    type_name: str = ""
    call: Callable[..., list[Any]] = field(default=_no_call, compare=False)
    source: Any = field(default=None, compare=False)

    @property
    def output(self) -> str:
        """The id of the op's only output."""
        (only,) = self.outputs
        return only


@dataclass(frozen=True)
class Graph:
    """Ops in topological order, tensors by id, and the ids of the model's inputs and outputs in order.

    `target` names what a quantized model was made for, where its front end has several.
    """

    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str = "model"
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    target: str = ""

    def consumers(self) -> dict[str, list[tuple[Op, int]]]:
        """For every tensor, the (op, input index) pairs that read it."""
        table: dict[str, list[tuple[Op, int]]] = {t: [] for t in self.tensors}
        for op in self.ops:
            for index, tensor in enumerate(op.inputs):
                table[tensor].append((op, index))
        return table

    def producers(self) -> dict[str, Op]:
        """For every tensor that an op writes, that op."""
        return {t: op for op in self.ops for t in op.outputs}

    def replace(self, **changes: Any) -> Graph:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def _run(op: Op, inputs: list[Any], float_weights: bool) -> list[Any]:
    try:
        return op.call(inputs, float_weights)
    except Exception as error:  # a user's layer, or the framework on values that it refuses: the op's name says where
        lines = str(error).strip().splitlines() or [""]
        raise CalibrationError(
            f"layer {op.layer!r} ({op.type_name})",
            "it must run on the data that were passed",
            f"{type(error).__name__}: {lines[0]}",
            "Call the float model on the same data: it must accept their shapes and dtypes",
        ) from error


def walk(
    graph: Graph,
    feeds: Mapping[str, Any],
    visit: Callable[[Op, list[Any], list[Any]], list[Any] | None],
    *,
    float_weights: bool = False,
) -> None:
    """Run the graph op by op on concrete values, dropping each value after its last use.

    Args:
        graph: the graph; every op needs its `call`.
        feeds: a value for every graph input.
        visit: called after each op with (op, input values, output values); what it returns, unless None, replaces the
            outputs for the ops that follow.
        float_weights: run the ops on their float master weights.

    Raises:
        CalibrationError: an op fails on these values.
    """
    last_use = {t: i for i, op in enumerate(graph.ops) for t in op.inputs}
    values: dict[str, Any] = {t.id: t.constant for t in graph.tensors.values() if t.constant is not None}
    values.update(feeds)
    for index, op in enumerate(graph.ops):
        inputs = [values[t] for t in op.inputs]
        outputs = _run(op, inputs, float_weights)
        changed = visit(op, inputs, outputs)
        values.update(zip(op.outputs, outputs if changed is None else changed, strict=True))
        for tensor in op.inputs:
            if last_use[tensor] == index:
                values.pop(tensor, None)
