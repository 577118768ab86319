"""Placement: from a graph and a config to a plan. The rules stand in the operator table; this file applies them.

`kquant.core.demands` says what the entries ask of a stage, `kquant.core.needs` which tensors share a range.

Free outputs get a range of their own, Fixed ones the kernel's parameters, and the tensors around a Shared op are joined
into one range (union-find). Where a Fixed, a Shared or a differently sized tensor meet, a requantize is inserted on
that edge, which the trained model simulates like every other fake quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kquant.core.config import Entry
from kquant.core.demands import Demands
from kquant.core.errors import UnsupportedError
from kquant.core.graph import Graph, Op
from kquant.core.int8_spec import Placement
from kquant.core.needs import Classes, Need
from kquant.core.padding import filler
from kquant.core.plan import Plan, PlanRow, Site, Spec, WeightSpec
from kquant.core.signs import is_nonneg
from kquant.core.stages import Stage, stages
from kquant.core.target import TFLITE, Target


class Placer:
    """Makes a plan for one graph. Use `place`."""

    def __init__(self, graph: Graph, entries: Mapping[str, Entry | None], target: Target):
        self.graph, self.entries, self.target = graph, entries, target
        self.demands = Demands(graph, entries, target)
        self.stages = stages(graph, self.demands.may_fuse, target)
        self.classes = Classes()
        self.sites: list[tuple[tuple[Any, ...], str, bool]] = []  # (place, tensor of the class, observes)
        self.redirected: dict[tuple[str, int], str] = {}
        self.weights: dict[str, WeightSpec] = {}
        self.integer: set[str] = set()
        self.floats: dict[str, str] = {}
        self.nonneg: set[str] = set()

    # -- the pass over the stages ---------------------------------------------------------------------------------

    def place(self) -> Plan:
        """The plan."""
        for stage in self.stages:
            self._place_stage(stage)
        return self._finish()

    def _place_stage(self, stage: Stage) -> None:
        ranged = [t for t in stage.anchor.inputs if t in self.classes]
        reason = self.demands.why_float(stage, ranged)
        if stage.row.placement is Placement.IDENTITY:
            self._pass_through(stage.anchor)
            return
        weight = self.demands.weight(stage) if stage.row.weighted else None
        if weight is not None:
            self.weights[stage.anchor.id] = weight
        if reason:
            self.floats[stage.anchor.id] = reason
            return
        self.integer.update(op.id for op in stage.ops)
        for tensor in stage.inputs:
            self._place_input(stage, tensor)
        self._match_widths(stage)
        self._note_nonneg(stage)
        if stage.row.placement is Placement.SHARED and not self._leaves_shared(stage):
            self._place_shared(stage)
        else:
            self._place_output(stage)

    def _pass_through(self, op: Op) -> None:
        source = op.inputs[0]
        if source in self.classes:
            self.integer.add(op.id)
            self.classes.add(op.output, self.classes.need(source))
            self.classes.join(source, op.output)
        if source in self.nonneg:
            self.nonneg.add(op.output)

    def _place_input(self, stage: Stage, tensor: str) -> None:
        """Give a float input that comes from the model input or from a float op its range."""
        value = self.graph.tensors[tensor]
        if tensor in self.classes or value.dtype != "float32" or value.constant is not None:
            return
        self.classes.add(tensor, self.demands.input_need(stage, tensor))
        self.sites.append((("tensor", tensor), tensor, True))

    def _match_widths(self, stage: Stage) -> None:
        """Kernels take all operands in 8 bits or all in 16: requantize those that differ from the output."""
        op, row = stage.anchor, stage.row
        ranged = [i for i, t in enumerate(op.inputs) if t in self.classes]
        shared = row.placement is Placement.SHARED and not self._leaves_shared(stage)
        widths = {i: self.classes.need(op.inputs[i]).bits for i in ranged}
        wide = 16 in widths.values() if shared else self.demands.output_bits(stage) == 16
        if wide and not row.int16:
            if not shared:
                raise UnsupportedError(
                    f"layer {op.layer!r} ({op.type_name})",
                    f"the target's 16-bit {op.kind} kernel does not keep its bound",
                    "output bits 16",
                    f"Give it 8 bits: {{'op_names': ['{op.layer}'], 'q_bits': 8}}",
                )
            wide = False
        for index in ranged:
            if (widths[index] == 16) != wide:
                self._edge(op, index, Need(16 if wide else 8))

    def _edge(self, op: Op, index: int, need: Need) -> None:
        """A requantize that only this reader sees, on a range of its own."""
        alias = f"{op.id}/operand{index}"
        self.classes.add(alias, replace(need, start_step=self.demands.start_step(op)))
        self.redirected[op.id, index] = alias
        self.sites.append((("edge", op.id, index), alias, True))

    def _operand(self, op: Op, index: int) -> str:
        """The tensor that an op reads: its input, or the requantized one."""
        return self.redirected.get((op.id, index), op.inputs[index])

    def _note_nonneg(self, stage: Stage) -> None:
        if is_nonneg(stage, self.nonneg):
            self.nonneg.update({*stage.anchor.outputs, stage.output})

    # -- outputs --------------------------------------------------------------------------------------------------

    def _output_need(self, stage: Stage) -> Need:
        return self.demands.output_need(stage, stage.output in self.nonneg)

    def _place_output(self, stage: Stage) -> None:
        need, fixed = self._output_need(stage), stage.row.fixed
        for tensor in dict.fromkeys((*stage.anchor.outputs[1:], stage.output)):
            if self.graph.tensors[tensor].dtype != "float32":
                continue
            if stage.anchor.kind == "softmax" and need.fixed != fixed:
                # No table can stand for softmax: the kernel writes its own grid, and a requantize follows.
                self.classes.add(f"{tensor}/kernel", Need(8, fixed=fixed, nonneg=True))
                self.sites.append((("tensor", tensor), f"{tensor}/kernel", False))
            self.classes.add(tensor, need)
            self.sites.append((("tensor", tensor), tensor, need.fixed is None and not need.unit))

    def _leaves_shared(self, stage: Stage) -> bool:
        """Whether a stand-alone activation gets a range of its own instead of its input's."""
        if stage.anchor.kind != "relu" or self.entries[stage.anchor.id] is None:
            return False
        need, given = self._output_need(stage), self.classes.need(stage.anchor.inputs[0])
        return need.unit or need.bits != given.bits or given.fixed is not None

    def _place_shared(self, stage: Stage) -> None:
        op = stage.anchor
        operands = [self._operand(op, i) for i in range(len(op.inputs))]
        ranged = [t for t in operands if t in self.classes]
        if not ranged:
            return  # ids, which have no grid
        free = [t for t in ranged if self.classes.need(t).fixed is None]
        target = (free or ranged)[0]
        padded_with = filler(op, self.demands.consumers)
        nonneg = padded_with is None or padded_with >= 0.0
        for output in dict.fromkeys((*op.outputs, stage.output)):
            if output not in self.classes:
                self.classes.add(output, replace(self.classes.need(target), nonneg=nonneg))
                self.classes.join(target, output)
        for index, tensor in enumerate(operands):
            if tensor not in self.classes:
                continue
            if self.classes.need(tensor).joins(self.classes.need(target)):
                self.classes.join(target, tensor)
            else:
                self.sites.append((("edge", op.id, index), target, True))
        if stage.row.rounds:
            self.sites.append((("tensor", stage.output), stage.output, False))
        elif padded_with is not None:
            self.sites.append((("tensor", stage.output), stage.output, True))

    # -- closing --------------------------------------------------------------------------------------------------

    def _finish(self) -> Plan:
        self._make_symmetric()
        specs: dict[str, Spec] = {}
        sites: dict[str, tuple[Site, ...]] = {}
        edges: dict[tuple[str, int], Site] = {}
        for place, tensor, observes in self.sites:
            root, need = self.classes.root(tensor), self.classes.need(tensor)
            spec = specs.get(root) or Spec(root, **vars(need))
            index = spec.sites if observes and not (need.fixed or need.unit) else None
            specs[root] = replace(spec, sites=spec.sites + (index is not None))
            site = Site(root, index, place[0] == "tensor" and self._by_float(place[1]))
            if place[0] == "tensor":
                sites[place[1]] = (*sites.get(place[1], ()), site)
            else:
                edges[place[1], place[2]] = site
        rows = tuple(self._row(stage, specs, edges) for stage in self.stages if stage.anchor.kind != "identity")
        integer, name = frozenset(self.integer), self.target.name
        return Plan(self.graph, specs, sites, edges, self.weights, integer, self.floats, rows, name)

    def _by_float(self, tensor: str) -> bool:
        producer = self.demands.producers.get(tensor)
        return producer is not None and producer.id in self.floats

    def _make_symmetric(self) -> None:
        """Operands whose zero point must be 0 make their whole class symmetric, or are requantized."""
        for op in self.graph.ops:
            if op.id not in self.integer:
                continue
            for index in self.target.row(op.kind).symmetric_inputs:
                tensor = self._operand(op, index)
                if tensor not in self.classes or self.classes.need(tensor).bits == 16:
                    continue
                need = self.classes.need(tensor)
                if need.fixed is None and not need.unit and need.bits == 8:
                    self.classes.change(tensor, replace(need, symmetric=True, nonneg=False))
                elif need.fixed is None or need.fixed.zero_point != 0:
                    self._edge(op, index, Need(8, symmetric=True))

    def _row(self, stage: Stage, specs: Mapping[str, Spec], edges: Mapping[tuple[str, int], Site]) -> PlanRow:
        op = stage.anchor
        weight = self.weights.get(op.id)
        wide = f"{weight.quantizer} {weight.bits} bit" if weight else "-"
        is_integer = op.id in self.integer
        output = "float"
        if is_integer and stage.output in self.classes:
            shared = " (shared)" if stage.row.placement is Placement.SHARED else ""
            output = specs[self.classes.root(stage.output)].describe() + shared
        fused = " + ".join(o.layer for o in stage.ops[1:] if o.kind != "identity")
        notes = [f"fused: {fused}"] if fused else []
        notes += [f"one scale with {weight.folds_norm}"] if weight and weight.folds_norm else []
        notes += ["not quantized before the sum"] if stage.add else []
        behind = self.demands.bits_behind(stage) if is_integer else None
        notes += [f"{behind} bit further on"] if behind else []
        notes += [f"requantize input {i}" for (op_id, i) in edges if op_id == op.id]
        notes += [self.floats[op.id]] if op.id in self.floats else []
        kernel = (stage.row.target or "by its function") if is_integer else "float"
        return PlanRow(op.layer, op.type_name, op.kind, wide, output, kernel, "; ".join(notes))


def place(graph: Graph, entries: Mapping[str, Entry | None], target: Target = TFLITE) -> Plan:
    """Decide the quantization of every tensor of a graph.

    Args:
        graph: the model that was read.
        entries: for every op id, the config entry that matches it (the last one), or None.
        target: where the model is to run.

    Raises:
        ConfigError: entries that contradict each other.
        UnsupportedError: a matched op that has no integer form.
    """
    return Placer(graph, entries, target).place()
