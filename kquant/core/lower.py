"""Lowering: from a quantized model's graph, with its fake-quantization markers, to the integer model.

Codes come from the trained quantizers and parameters from their ranges; nothing is derived a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kquant.core.affine import Affine
from kquant.core.constants import check_limits, constant_codes
from kquant.core.fold import check_finite, fold
from kquant.core.graph import Graph, Op, Shape
from kquant.core.int8_spec import WEIGHTS_ONLY, Placement
from kquant.core.integer import IntegerModel, IntOp, IntTensor, IntWeight
from kquant.core.padding import check_filler, filler
from kquant.core.stages import Stage, stages
from kquant.core.tables import function_table, slope_table
from kquant.core.target import TFLITE, Target
from kquant.core.widen import room

COARSE_UNIT = 0.02  # output codes: half of it is what a bias may be off by


def known(affine: Affine | None) -> Affine:
    """The parameters of a tensor that the pass knows to be quantized."""
    assert affine is not None
    return affine


@dataclass(frozen=True)
class _State:
    """What is known of a tensor in the pass: codes (an affine), float, ids, or waiting for its fake quantization."""

    tensor: str
    affine: Affine | None = None
    pending: Stage | None = None
    is_float: bool = False


def affine_of(quantizer: Any, name: str) -> Affine:
    """The parameters of a trained activation quantizer (`range()` and `bits`)."""
    low, high = (np.float32(v) for v in quantizer.range())
    return Affine.of_range(low, high, quantizer.bits, name)


class Lowering:
    """One pass over a graph. Use `lower`."""

    def __init__(self, graph: Graph, target: Target):
        self.graph, self.target = graph, target
        self.states: dict[str, _State] = {}
        self.tensors: dict[str, IntTensor] = {}
        self.ops: list[IntOp] = []
        self.floats: dict[str, str] = {}
        self.consumers = graph.consumers()

    def run(self) -> IntegerModel:
        """The integer model; float ops are in it as such, with their reasons in `floats`."""
        for name in self.graph.inputs:
            self._input(name)
        for stage in stages(self.graph, target=self.target):
            self._stage(stage)
        outputs = tuple(self._result(t) for t in self.graph.outputs)
        graph = self.graph
        return IntegerModel(
            tuple(self.ops), self.tensors, graph.inputs, outputs, graph.input_names, graph.output_names,
            self.floats, {t: s.tensor for t, s in self.states.items()}, graph.name,
        )  # fmt: skip

    # -- tensors --------------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        tensor = self.graph.tensors[name]
        is_ids = tensor.dtype != "float32"
        self.tensors[name] = IntTensor(name, tensor.shape, tensor.dtype)
        self.states[name] = _State(name, is_float=not is_ids)

    def _add(self, op: IntOp, affines: list[Affine | None], shapes: list[Any]) -> None:
        self.ops.append(op)
        for tensor, affine, shape in zip(op.outputs, affines, shapes, strict=True):
            dtype = "float32" if affine is None else affine.dtype
            self.tensors[tensor] = IntTensor(tensor, tuple(shape), dtype, affine)
            self.states[tensor] = _State(tensor, affine, is_float=affine is None)

    def _shape(self, tensor: str) -> Shape:
        return self.graph.tensors[tensor].shape

    def _operand(self, tensor: str, bits: int = 8) -> str:
        """The id under which an operand is read; constants are quantized here."""
        value = self.graph.tensors[tensor].constant
        if value is None:
            return self.states[tensor].tensor
        if tensor not in self.tensors:
            affine, codes = constant_codes(value, tensor, bits)
            self.tensors[tensor] = IntTensor(tensor, value.shape, affine.dtype, affine, codes)
        return tensor

    def _result(self, tensor: str) -> str:
        return self.states[tensor].tensor

    # -- stages ---------------------------------------------------------------------------------------------------

    def _stage(self, stage: Stage) -> None:
        op = stage.anchor
        if op.kind == "identity":
            self.states[op.output] = self.states[op.inputs[0]]
        elif op.kind == "fake_quant":
            self._fake_quant(op)
        else:
            reason = self._why_float(stage)
            if reason:
                self._float(stage, reason)
            elif self._waits(stage):
                self.states[stage.output] = _State(stage.output, pending=stage)
            else:
                self._shared(stage)

    def _why_float(self, stage: Stage) -> str:
        op, row = stage.anchor, stage.row
        if row.placement is Placement.OPAQUE:
            return str(op.attrs.get("reason", "it has no integer form"))
        if row.placement is Placement.STORED:
            return WEIGHTS_ONLY
        readers = [o for o, _ in self.consumers[stage.output]]
        if any(reader.attrs.get("boundary") for reader in readers):
            return "the config leaves it in float"
        for tensor in stage.inputs:
            state = self.states.get(tensor)
            if state is not None and (state.is_float or state.pending is not None):
                return "its input is not quantized"
        if row.weighted and op.kind != "channel_affine" and "codes" not in op.attrs:
            return "the config leaves its weight in float"
        if self._waits(stage) and [o.kind for o, _ in self.consumers[stage.output]] != ["fake_quant"]:
            return "the config leaves its output in float"
        return ""

    def _waits(self, stage: Stage) -> bool:
        """Whether the stage's output parameters are given by the fake quantization after it."""
        if stage.row.placement is not Placement.SHARED:
            return True
        readers = self.consumers[stage.output]
        if stage.anchor.kind != "relu" or [o.kind for o, _ in readers] != ["fake_quant"]:
            return False
        affine = affine_of(readers[0][0].attrs["quantizer"], stage.output)
        return affine != self.states[stage.anchor.inputs[0]].affine

    def _float(self, stage: Stage, reason: str) -> None:
        if stage.anchor.kind == "parameter":
            self._parameter(stage, None)
            return
        for op in stage.ops:
            self.floats[op.id] = reason
            inputs = tuple(self._operand_float(t) for t in op.inputs)
            shapes = [self._shape(t) for t in op.outputs]
            self._add(
                IntOp(op.id, "float", inputs, op.outputs, {"reason": reason}, parts=(op,)), [None] * len(shapes), shapes
            )

    def _operand_float(self, tensor: str) -> str:
        value = self.graph.tensors[tensor].constant
        if value is not None:
            self.tensors[tensor] = IntTensor(tensor, value.shape, str(value.dtype), None, value)
            return tensor
        state = self.states.get(tensor)
        if state is None or state.affine is None:
            return tensor if state is None else state.tensor
        name = f"{state.tensor}/float"
        if name not in self.tensors:
            op = IntOp(name, "dequantize", (state.tensor,), (name,))
            self._add(op, [None], [self.tensors[state.tensor].shape])
        return name

    def _fake_quant(self, op: Op) -> None:
        state = self.states[op.inputs[0]]
        affine = affine_of(op.attrs["quantizer"], op.inputs[0])
        if state.pending is not None:
            self._finish(state.pending, affine)
            self.states[op.output] = self.states[op.inputs[0]]
        elif state.affine is None:
            self._quantize_float(op, state, affine)
        elif state.affine == affine:
            self.states[op.output] = state
        else:
            self._requantize(op, state, affine)

    def _quantize_float(self, op: Op, state: _State, affine: Affine) -> None:
        kind = "quantize"
        name = f"{state.tensor}/quantized"
        self._clamped(IntOp(name, kind, (state.tensor,), (name,), parts=(op,)), affine, self._shape(op.output), False)
        self.states[op.output] = self.states[name]

    def _requantize(self, op: Op, state: _State, affine: Affine) -> None:
        name = f"{op.inputs[0]}/requantized:{op.attrs['spec']}"
        shape = self._shape(op.output)
        if affine.bits == 16 or known(state.affine).bits == 16:
            self._add(IntOp(name, "requantize", (state.tensor,), (name,), parts=(op,)), [affine], [shape])
        elif self.target.requantize_by_kernel and affine.bits == 8 and shape[-1] is not None:
            # An identity depthwise kernel rounds exactly; the int8-to-int8 QUANTIZE kernel is up to a step off.
            channels = int(shape[-1])
            ones = IntWeight(
                np.full(channels, 127, np.int8), np.full(channels, 1 / 127, np.float32), 8, np.zeros(channels)
            )
            made = IntOp(name, "channel_affine", (state.tensor,), (name,), weight=ones, parts=(op,))
            self._add(made, [affine], [shape])
        else:
            codes = np.arange(-128, 128, dtype=np.int8)
            table = affine.quantize(known(state.affine).dequantize(codes))
            self._add(IntOp(name, "table", (state.tensor,), (name,), table=table, parts=(op,)), [affine], [shape])
        self.states[op.output] = self.states[name]

    def _shared(self, stage: Stage) -> None:
        op = stage.anchor
        affine = next((a for a in map(self._affine, op.inputs) if a is not None), None)
        if affine is None:
            self._ids(op)
            return
        check_filler(filler(op, self.consumers), affine, stage.output)
        shapes = [self._shape(t) for t in op.outputs]
        outputs = (stage.output, *op.outputs[1:])
        relu_max = None if stage.relu is None else stage.relu.attrs.get("max")
        made = IntOp(
            stage.output, op.kind, tuple(self._operand_as(op.kind, t, affine) for t in op.inputs), outputs, op.attrs,
            relu=stage.relu is not None or op.kind == "relu",
            relu_max=op.attrs.get("max") if op.kind == "relu" else relu_max, parts=stage.ops,
        )  # fmt: skip
        self._clamped(made, affine, shapes, True)

    def _ids(self, op: Op) -> None:
        """An op that moves ids, which have no grid."""
        self.ops.append(IntOp(op.id, op.kind, op.inputs, op.outputs, op.attrs, parts=(op,)))
        for tensor in op.outputs:
            self.tensors[tensor] = IntTensor(tensor, self._shape(tensor), self.graph.tensors[tensor].dtype)
            self.states[tensor] = _State(tensor)

    def _affine(self, tensor: str) -> Affine | None:
        state = self.states.get(tensor)
        return None if state is None else state.affine

    def _operand_as(self, kind: str, tensor: str, affine: Affine) -> str:
        """An operand of a Shared op; a constant is written on the grid of the others."""
        value = self.graph.tensors[tensor].constant
        if value is None or value.dtype.kind != "f":
            return self._operand(tensor)
        check_limits(kind, value, affine, tensor)
        self.tensors[tensor] = IntTensor(tensor, value.shape, affine.dtype, affine, affine.quantize(value))
        return tensor

    # -- stages whose output parameters are known -----------------------------------------------------------------

    def _finish(self, stage: Stage, affine: Affine) -> None:
        op = stage.anchor
        if op.kind in ("elementwise", "relu", "sigmoid", "tanh", "prelu"):
            self._function(stage, affine)
            return
        if op.kind == "parameter":
            self._parameter(stage, affine)
            return
        weight, attrs = None, op.attrs
        bits = 16 if affine.bits == 16 else 8
        inputs = tuple(self._operand(t, bits) for t in stage.inputs)
        if op.kind == "embedding":
            codes, scale = (np.asarray(a) for a in op.attrs["codes"]())
            check_finite(op, table=codes * scale)
            attrs = {**attrs, "constant": affine.quantize(codes * scale)}
        elif stage.row.weighted:
            weight = self._fold(stage, inputs[0], affine)
            if self._is_coarse(inputs[0], weight, affine):
                inputs = (self._spread(inputs[0]), *inputs[1:])
                weight = self._fold(stage, inputs[0], affine)
        made = IntOp(
            stage.output, op.kind, inputs, (stage.output,), attrs, weight,
            relu=stage.relu is not None, relu_max=stage.relu.attrs.get("max") if stage.relu else None, parts=stage.ops,
        )  # fmt: skip
        self._clamped(made, affine, self._shape(stage.output), False)

    def _parameter(self, stage: Stage, affine: Affine | None) -> None:
        value = np.asarray(stage.anchor.call([])[0], np.float32)
        check_finite(stage.anchor, value=value)
        self._add(
            IntOp(stage.output, "parameter", (), (stage.output,), parts=stage.ops),
            [affine],
            [self._shape(stage.output)],
        )
        codes = value if affine is None else affine.quantize(value)
        self.tensors[stage.output] = replace(self.tensors[stage.output], constant=codes)

    def _fold(self, stage: Stage, source: str, affine: Affine) -> IntWeight:
        return fold(stage, known(self.tensors[source].affine), affine, self.target.accumulator)

    def _is_coarse(self, tensor: str, weight: IntWeight, target: Affine) -> bool:
        """Whether the bias of a low-bit input's reader has a unit of many output codes, so that its rounding shows."""
        if self.target.accumulator.bias_limit == float("inf"):  # a float bias has no unit
            return False
        source = known(self.tensors[tensor].affine)
        gain = max(room(weight, self.target.accumulator.widest), 1)
        return source.bits < 8 and float(source.scale * weight.scale.max() / target.scale) / gain > COARSE_UNIT

    def _spread(self, tensor: str) -> str:
        """A low-bit tensor on every n-th code of int8, with the scale divided by n: the same values, a finer unit."""
        name, source = f"{tensor}/spread", known(self.tensors[tensor].affine)
        if name not in self.tensors:
            step = 255 // (2**source.bits - 1)
            wide = Affine(np.float32(source.scale / step), step * (source.zero_point - source.qmin) - 128, 8)
            codes = np.clip(step * (np.arange(-128, 128) - source.qmin) - 128, -128, 127).astype(np.int8)
            self._add(IntOp(name, "table", (tensor,), (name,), table=codes), [wide], [self.tensors[tensor].shape])
        return name

    def _native(self, stage: Stage, source: Affine, target: Affine) -> bool:
        if stage.row.placement is Placement.FIXED:
            return self.target.fixed_kernels and target == stage.row.fixed and source.bits != 16
        known_function = stage.anchor.attrs.get("fn") in self.target.functions
        return known_function and target.bits == 8 and source.bits <= 8

    def _function(self, stage: Stage, affine: Affine) -> None:
        """An elementwise function: the native kernel where the row's contract holds, else the exact table."""
        op = stage.anchor
        source = self.states[op.inputs[0]]
        common = (source.tensor,), (stage.output,)
        if self._native(stage, known(source.affine), affine):
            made = IntOp(stage.output, op.kind, *common, op.attrs, parts=stage.ops)
        elif op.kind == "prelu":
            table, shape = slope_table(op, known(source.affine), affine)
            made = IntOp(stage.output, "table", *common, {"offsets": shape}, table=table, parts=stage.ops)
        else:
            table = function_table(op, known(source.affine), affine)
            made = IntOp(stage.output, "table", *common, table=table, parts=stage.ops)
        self._add(made, [affine], [self._shape(stage.output)])

    def _clamped(self, made: IntOp, affine: Affine, shape: Any, shared: bool) -> None:
        """Add an op, and behind it the clamps that neither saturation nor a fused ReLU gives."""
        shapes = shape if shared else [shape]
        if self.target.clamps:
            self._add(made, [affine] * len(shapes), shapes)
            return
        low = high = None
        if affine.bits < 8 and not shared and not (made.relu and affine.zero_point == affine.qmin):
            low = affine.qmin
        if made.relu_max is not None:
            top = int(affine.quantize(np.asarray(made.relu_max, np.float32)))
            fused = made.relu_max == 6.0
            high = top if top < affine.qmax and not fused else None
        if low is None and high is None:
            self._add(made, [affine] * len(shapes), shapes)
            return
        inner = f"{made.id}/unclamped"
        self._add(replace(made, id=inner, outputs=(inner,), parts=()), [affine], shapes[:1])
        clamp = IntOp(made.id, "clamp", (inner,), made.outputs[:1], {"low": low, "high": high}, parts=made.parts)
        self._add(clamp, [affine], shapes[:1])


def lower(graph: Graph, target: Target = TFLITE) -> IntegerModel:
    """The integer model of a quantized model that was read, for a target.

    Raises:
        RangeError: a range that the kernels cannot hold, by tensor name.
    """
    return Lowering(graph, target).run()
