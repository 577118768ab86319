"""Placement: from a graph and a config to a plan. The rules stand in the operator table; this file applies them.

Free outputs get a range of their own, Fixed ones the kernel's parameters, and the tensors around a Shared op are joined
into one range (union-find). Where a Fixed, a Shared or a differently sized tensor meet, a requantize is inserted on
that edge, which the trained model simulates like every other fake quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kquant.core.config import Entry
from kquant.core.errors import ConfigError, UnsupportedError
from kquant.core.graph import Graph, Op
from kquant.core.int8_spec import WEIGHTS_ONLY, Placement
from kquant.core.needs import Need
from kquant.core.plan import Plan, PlanRow, Site, Spec, WeightSpec
from kquant.core.stages import Stage, stages
from kquant.core.target import TFLITE, Target

NON_NEGATIVE = frozenset({"relu", "softplus", "hard_sigmoid", "exponential", "squareplus", "abs", "sqrt", "rsqrt"})
NON_NEGATIVE |= {f"keras.ops.{name}" for name in ("Abs", "Square", "Exp", "Softplus", "HardSigmoid", "Sqrt")}


class Placer:
    """Makes a plan for one graph. Use `place`."""

    def __init__(self, graph: Graph, entries: Mapping[str, Entry | None], target: Target):
        self.graph, self.entries, self.target = graph, entries, target
        self.producers = graph.producers()
        self.stages = stages(graph, self._may_fuse, target)
        self.parent: dict[str, str] = {}
        self.needs: dict[str, Need] = {}
        self.sites: list[tuple[tuple[Any, ...], str, bool]] = []  # (place, tensor of the class, observes)
        self.redirected: dict[tuple[str, int], str] = {}
        self.weights: dict[str, WeightSpec] = {}
        self.integer: set[str] = set()
        self.floats: dict[str, str] = {}
        self.nonneg: set[str] = set()
        self.to_output = self._reaching_outputs()

    # -- union-find -----------------------------------------------------------------------------------------------

    def _find(self, tensor: str) -> str:
        while self.parent[tensor] != tensor:
            tensor = self.parent[tensor]
        return tensor

    def _need(self, tensor: str) -> Need:
        return self.needs[self._find(tensor)]

    def _new(self, tensor: str, need: Need) -> None:
        self.parent[tensor] = tensor
        self.needs[tensor] = need

    def _join(self, tensor: str, other: str) -> None:
        a, b = self._find(tensor), self._find(other)
        if a != b:
            one, two = self.needs[a], self.needs[b]
            self.parent[b] = a
            self.needs[a] = replace(
                one, nonneg=one.nonneg and two.nonneg, start_step=max(one.start_step, two.start_step)
            )
            del self.needs[b]

    # -- the pass over the stages ---------------------------------------------------------------------------------

    def place(self) -> Plan:
        """The plan."""
        for stage in self.stages:
            self._place_stage(stage)
        return self._finish()

    def _place_stage(self, stage: Stage) -> None:
        reason = self._why_float(stage)
        if stage.row.placement is Placement.IDENTITY:
            self._pass_through(stage.anchor)
            return
        if stage.row.weighted:
            self._place_weight(stage)
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
        for op in stage.ops[:-1]:
            if op.kind == "identity" and op.output in self.nonneg:
                self.nonneg.add(op.output)

    def _pass_through(self, op: Op) -> None:
        source = op.inputs[0]
        if source in self.parent:
            self.integer.add(op.id)
            self._new(op.output, self._need(source))
            self._join(source, op.output)
        if source in self.nonneg:
            self.nonneg.add(op.output)

    def _why_float(self, stage: Stage) -> str:
        """Why the stage stays float, or an empty string."""
        op, entry, row = stage.anchor, self.entries[stage.anchor.id], stage.row
        if entry is not None and entry.exclude:
            return f"excluded by config_list[{entry.index}]"
        if row.placement is Placement.OPAQUE:
            if entry is None:
                return "no config entry matches it"
            raise UnsupportedError(
                f"layer {op.layer!r} ({op.type_name})",
                op.attrs.get("reason", "this layer has no integer form on the target"),
                fix=f"Leave it in float with {{'op_names': ['{op.layer}'], 'exclude': True}} in config_list, "
                "and export with allow_float=True",
            )
        if row.placement in (Placement.SHARED, Placement.IDENTITY):
            has_codes = any(t in self.parent for t in op.inputs)
            return "" if has_codes or entry is not None else "no config entry matches it"
        if entry is None:
            return "no config entry matches it"
        if row.placement is Placement.STORED:
            return WEIGHTS_ONLY
        if row.weighted and entry.weight_bits in (None, 32):
            return f"its weight is not quantized by config_list[{entry.index}]"
        if self._output_bits(stage) in (None, 32):
            return f"its output is not quantized by config_list[{entry.index}]"
        return ""

    def _place_weight(self, stage: Stage) -> None:
        entry = self.entries[stage.anchor.id]
        if entry is None or entry.exclude or entry.weight_bits in (None, 32) or stage.anchor.kind == "channel_affine":
            return
        per_channel = "kernel_axes" in stage.anchor.attrs and entry.weight_per_channel is not False
        gradient = None if entry.gradient_bits in (None, 32) else entry.gradient_bits
        spec = WeightSpec(entry.quantizer, entry.weight_bits, per_channel, gradient, entry.start_step)
        one_scale = entry.weight_per_channel is False and entry.quantizer != "dorefa"
        if one_scale and stage.norm is not None and stage.norm.attrs.get("normalizes"):
            spec = replace(spec, folds_norm=stage.norm.id)
        self.weights[stage.anchor.id] = spec

    def _place_input(self, stage: Stage, tensor: str) -> None:
        """Give a float input that comes from the model input or from a float op its range."""
        value = self.graph.tensors[tensor]
        if tensor in self.parent or value.dtype != "float32" or value.constant is not None:
            return
        entry = self.entries[stage.anchor.id]
        named = entry is not None and entry.op_names is not None
        model_input = self._model_input(tensor)
        bits = entry.input_bits if entry is not None and entry.input_bits and (named or not model_input) else 8
        own = self.entries.get(f"input:{model_input}")
        if own is not None:
            bits = own.input_bits or own.output_bits or 8
            if own.exclude or bits == 32:
                raise ConfigError(
                    f"config_list[{own.index}]",
                    f"input {model_input!r} must be quantized, because {stage.anchor.layer!r} reads it in integers",
                    "an entry that leaves it in float",
                    "Leave the input out of the entry, or exclude its readers too",
                )
        delay = entry.start_step if entry is not None else 0
        self._new(tensor, Need(bits, start_step=delay, naive=entry is not None and entry.quantizer == "naive"))
        self.sites.append((("tensor", tensor), tensor, True))

    def _model_input(self, tensor: str) -> str | None:
        """The model input that a tensor is, directly or behind ops that act in training only."""
        while tensor not in self.graph.inputs:
            op = self.producers.get(tensor)
            if op is None or op.kind != "identity":
                return None
            tensor = op.inputs[0]
        return tensor

    def _match_widths(self, stage: Stage) -> None:
        """Kernels take all operands in 8 bits or all in 16: requantize those that differ from the output."""
        op, row = stage.anchor, stage.row
        ranged = [i for i, t in enumerate(op.inputs) if t in self.parent]
        shared = row.placement is Placement.SHARED and not self._leaves_shared(stage)
        wide = any(self._need(op.inputs[i]).bits == 16 for i in ranged) if shared else self._output_bits(stage) == 16
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
            if (self._need(op.inputs[index]).bits == 16) != wide:
                self._edge(op, index, Need(16 if wide else 8))

    def _edge(self, op: Op, index: int, need: Need) -> None:
        """A requantize that only this reader sees, on a range of its own."""
        alias, entry = f"{op.id}/operand{index}", self.entries[op.id]
        self._new(alias, replace(need, start_step=entry.start_step if entry is not None else 0))
        self.redirected[op.id, index] = alias
        self.sites.append((("edge", op.id, index), alias, True))

    def _operand(self, op: Op, index: int) -> str:
        """The tensor that an op reads: its input, or the requantized one."""
        return self.redirected.get((op.id, index), op.inputs[index])

    def _note_nonneg(self, stage: Stage) -> None:
        op, row = stage.anchor, stage.row
        through = row.placement is Placement.SHARED and all(t in self.nonneg for t in op.inputs)
        own = op.attrs.get("fn") in NON_NEGATIVE or row.nonneg or op.kind == "relu" or stage.relu is not None
        square = op.kind == "mul" and len(set(op.inputs)) < len(op.inputs)
        kept = op.kind in ("add", "mul", "mean", "sum") and all(t in self.nonneg for t in op.inputs)
        if own or through or square or kept:
            self.nonneg.update({*op.outputs, stage.output})

    # -- outputs --------------------------------------------------------------------------------------------------

    def _output_entry(self, stage: Stage) -> Entry | None:
        """The entry that decides the output: of the anchor and the fused ops, the explicit one."""
        found = [e for e in (self.entries[o.id] for o in stage.ops if o.kind != "identity") if e is not None]
        explicit = [e for e in found if "default" not in (e.op_types or ())]
        bits = {e.output_bits for e in explicit}
        if len(bits) > 1:
            first, second = explicit[0], next(e for e in explicit if e.output_bits != explicit[0].output_bits)
            raise ConfigError(
                f"config_list[{first.index}] and config_list[{second.index}]",
                f"entries that match fused ops ({', '.join(o.layer for o in stage.ops)}) must agree on the output bits",
                f"{first.output_bits} and {second.output_bits}",
                "Name the layer in one entry only",
            )
        return explicit[0] if explicit else (found[0] if found else None)

    def _output_bits(self, stage: Stage) -> int | None:
        entry = self._output_entry(stage)
        if entry is None:
            return None
        if stage.output in self.to_output and entry.op_names is None and entry.output_bits not in (None, 32):
            return 8
        return entry.output_bits

    def _output_need(self, stage: Stage) -> Need:
        entry = self._output_entry(stage)
        bits = self._output_bits(stage) or 8
        row = stage.row
        common: dict[str, Any] = {
            "start_step": entry.start_step if entry else 0,
            "naive": entry is not None and entry.quantizer == "naive",
        }
        dorefa = entry is not None and entry.quantizer == "dorefa"
        activation = stage.relu is not None or stage.anchor.kind in ("relu", "elementwise", "sigmoid")
        nonneg = stage.output in self.nonneg
        if dorefa and activation and nonneg and stage.output not in self.to_output:
            return Need(bits, unit=True, nonneg=True, **common)
        if row.fixed is not None and bits <= 8:
            return Need(bits, fixed=row.fixed.narrowed(bits), nonneg=row.nonneg, **common)
        if bits == 1 and not nonneg and entry is not None:
            raise ConfigError(
                f"config_list[{entry.index}]['q_bits']",
                f"1-bit activations must be non-negative, and the output of {stage.anchor.layer!r} is signed",
                1,
                "Use 2 bits or more there, or an activation function that is never negative",
            )
        symmetric = entry is not None and entry.output_symmetric
        return Need(bits, symmetric=symmetric, nonneg=nonneg and not symmetric, **common)

    def _place_output(self, stage: Stage) -> None:
        need, fixed = self._output_need(stage), stage.row.fixed
        for tensor in dict.fromkeys((*stage.anchor.outputs[1:], stage.output)):
            if self.graph.tensors[tensor].dtype != "float32":
                continue
            if stage.anchor.kind == "softmax" and need.fixed != fixed:
                # No table can stand for softmax: the kernel writes its own grid, and a requantize follows.
                self._new(f"{tensor}/kernel", Need(8, fixed=fixed, nonneg=True))
                self.sites.append((("tensor", tensor), f"{tensor}/kernel", False))
            self._new(tensor, need)
            self.sites.append((("tensor", tensor), tensor, need.fixed is None and not need.unit))

    def _leaves_shared(self, stage: Stage) -> bool:
        """Whether a stand-alone activation gets a range of its own instead of its input's."""
        if stage.anchor.kind != "relu" or self.entries[stage.anchor.id] is None:
            return False
        need, given = self._output_need(stage), self._need(stage.anchor.inputs[0])
        return need.unit or need.bits != given.bits or given.fixed is not None

    def _place_shared(self, stage: Stage) -> None:
        op = stage.anchor
        operands = [self._operand(op, i) for i in range(len(op.inputs))]
        ranged = [t for t in operands if t in self.parent]
        free = [t for t in ranged if self._need(t).fixed is None]
        target = (free or ranged)[0]
        for output in dict.fromkeys((*op.outputs, stage.output)):
            if output not in self.parent:
                self._new(output, replace(self._need(target), nonneg=True))
                self._join(target, output)
        for index, tensor in enumerate(operands):
            if tensor not in self.parent:
                continue
            if self._need(tensor).joins(self._need(target)):
                self._join(target, tensor)
            else:
                self.sites.append((("edge", op.id, index), target, True))
        if stage.row.rounds:
            self.sites.append((("tensor", stage.output), stage.output, False))

    # -- closing --------------------------------------------------------------------------------------------------

    def _finish(self) -> Plan:
        self._make_symmetric()
        specs: dict[str, Spec] = {}
        sites: dict[str, tuple[Site, ...]] = {}
        edges: dict[tuple[str, int], Site] = {}
        for place, tensor, observes in self.sites:
            root = self._find(tensor)
            need = self.needs[root]
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
        producer = self.producers.get(tensor)
        return producer is not None and producer.id in self.floats

    def _make_symmetric(self) -> None:
        """Operands whose zero point must be 0 make their whole class symmetric, or are requantized."""
        for op in self.graph.ops:
            if op.id not in self.integer:
                continue
            for index in self.target.row(op.kind).symmetric_inputs:
                tensor = self._operand(op, index)
                if tensor not in self.parent or self._need(tensor).bits == 16:
                    continue
                need = self._need(tensor)
                if need.fixed is None and not need.unit and need.bits == 8:
                    self.needs[self._find(tensor)] = replace(need, symmetric=True, nonneg=False)
                elif need.fixed is None or need.fixed.zero_point != 0:
                    self._edge(op, index, Need(8, symmetric=True))

    def _row(self, stage: Stage, specs: Mapping[str, Spec], edges: Mapping[tuple[str, int], Site]) -> PlanRow:
        op = stage.anchor
        weight = self.weights.get(op.id)
        wide = f"{weight.quantizer} {weight.bits} bit" if weight else "-"
        is_integer = op.id in self.integer
        output = specs[self._find(stage.output)].describe() if is_integer and stage.output in self.parent else "float"
        if is_integer and stage.row.placement is Placement.SHARED and stage.output in self.parent:
            output += " (shared)"
        fused = " + ".join(o.layer for o in stage.ops[1:] if o.kind != "identity")
        notes = [f"fused: {fused}"] if fused else []
        notes += [f"one scale with {weight.folds_norm}"] if weight and weight.folds_norm else []
        notes += ["not quantized before the sum"] if stage.add else []
        notes += [f"requantize input {i}" for (op_id, i) in edges if op_id == op.id]
        notes += [self.floats[op.id]] if op.id in self.floats else []
        kernel = (stage.row.target or "by its function") if is_integer else "float"
        return PlanRow(op.layer, op.type_name, op.kind, wide, output, kernel, "; ".join(notes))

    # -- facts about the graph ------------------------------------------------------------------------------------

    def _may_fuse(self, op: Op) -> bool:
        """A sum is an op of its own, which needs an entry; norms and activations follow what they are fused to."""
        entry = self.entries[op.id]
        if op.kind == "add" and (entry is None or entry.output_bits in (None, 32)):
            return False
        return entry is None or not entry.exclude

    def _reaching_outputs(self) -> set[str]:
        """Tensors that are model outputs, directly or through ops that keep the scale.

        The logits of a final softmax or sigmoid are among them: a model that leaves it to the loss has them as outputs.
        """
        reached = set(self.graph.outputs)
        for op in reversed(self.graph.ops):
            row = self.target.row(op.kind)
            keeps = row.placement in (Placement.SHARED, Placement.IDENTITY, Placement.FIXED)
            if keeps and op.kind != "relu" and reached & set(op.outputs):
                reached.update(op.inputs)
        return reached


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
