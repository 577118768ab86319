"""What the entries of a config ask of a stage: float or integers, its weights' spec, its input's and output's range."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kquant.core.config import Entry
from kquant.core.errors import ConfigError, UnsupportedError
from kquant.core.graph import Graph, Op
from kquant.core.int8_spec import WEIGHTS_ONLY, Placement
from kquant.core.needs import Need
from kquant.core.plan import WeightSpec
from kquant.core.stages import Stage
from kquant.core.target import Target

FUNCTIONS = frozenset({"relu", "prelu", "elementwise", "sigmoid", "tanh", "softmax"})  # activation functions


class Demands:
    """The entries of a config, read for the stages of one graph.

    Args:
        graph: the model.
        entries: for every op id, the entry that matches it, or None.
        target: where the model is to run.
    """

    def __init__(self, graph: Graph, entries: Mapping[str, Entry | None], target: Target):
        self.graph, self.entries, self.target = graph, entries, target
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.to_output = self._reaching_outputs()

    def may_fuse(self, op: Op) -> bool:
        """A sum is an op of its own, which needs an entry; norms and activations follow what they are fused to."""
        entry = self.entries[op.id]
        if op.kind == "add" and (entry is None or entry.output_bits in (None, 32)):
            return False
        return entry is None or not entry.exclude

    def why_float(self, stage: Stage, ranged: Collection[str]) -> str:
        """Why the stage stays float, or an empty string.

        Args:
            stage: the stage.
            ranged: those of the anchor's inputs that have a range already.

        Raises:
            UnsupportedError: an entry matches it, and the target has no integer form of it.
        """
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
            return "" if ranged or entry is not None else "no config entry matches it"
        if entry is None:
            return "no config entry matches it"
        if row.placement is Placement.STORED:
            return WEIGHTS_ONLY
        if row.weighted and entry.weight_bits in (None, 32):
            return f"its weight is not quantized by config_list[{entry.index}]"
        if self.output_bits(stage) in (None, 32):
            return f"its output is not quantized by config_list[{entry.index}]"
        return ""

    def weight(self, stage: Stage) -> WeightSpec | None:
        """How the anchor's weights are quantized; None where they are not."""
        entry = self.entries[stage.anchor.id]
        if entry is None or entry.exclude or entry.weight_bits in (None, 32) or stage.anchor.kind == "channel_affine":
            return None
        per_channel = "kernel_axes" in stage.anchor.attrs and entry.weight_per_channel is not False
        gradient = None if entry.gradient_bits in (None, 32) else entry.gradient_bits
        spec = WeightSpec(entry.quantizer, entry.weight_bits, per_channel, gradient, entry.start_step)
        one_scale = entry.weight_per_channel is False and entry.quantizer != "dorefa"
        holds = stage.anchor.attrs.get("may_hold_norm", True)
        if one_scale and holds and stage.norm is not None and stage.norm.attrs.get("normalizes"):
            spec = replace(spec, folds_norm=stage.norm.id)
        return spec

    def input_need(self, stage: Stage, tensor: str) -> Need:
        """The range of a float tensor that the stage reads: a model input, or the result of a float op."""
        entry = self.entries[stage.anchor.id]
        model_input = self._model_input(tensor)
        asked = self._asked_of_input(tensor, model_input)
        bits = asked[0][1] if asked else 8
        for index, own in asked:
            if own == 32:
                raise ConfigError(
                    f"config_list[{index}]",
                    f"input {model_input or tensor!r} must be quantized: {stage.anchor.layer!r} reads it in integers",
                    "an entry that leaves it in float",
                    "Leave the input out of the entry, or exclude its readers too",
                )
        for index, own in asked:
            if own != bits:
                raise ConfigError(
                    f"config_list[{asked[0][0]}] and config_list[{index}]",
                    f"entries that match {model_input or tensor!r} or what reads it must agree on its bits",
                    f"{bits} and {own}",
                    "One tensor has one range: give its readers the same input bits",
                )
        naive = entry is not None and entry.quantizer == "naive"
        return Need(bits, start_step=self.start_step(stage.anchor), naive=naive)

    def _asked_of_input(self, tensor: str, model_input: str | None) -> list[tuple[int, int]]:
        """The bits that entries ask of a float tensor, each with the entry's index: its own, and those of its readers.

        A model input has 8 bits whatever an entry says of its readers' inputs, unless that entry names ops.
        """
        own = self.entries.get(f"input:{model_input}")
        readers = [self.entries[op.id] for op, _ in self.consumers[tensor]]
        named = [e for e in readers if e is not None and (e.op_names is not None or model_input is None)]
        asked = [] if own is None else [(own.index, 32 if own.exclude else own.input_bits or own.output_bits or 8)]
        return asked + [(e.index, e.input_bits) for e in named if e.input_bits]

    def start_step(self, op: Op) -> int:
        """The training step at which the op's quantization begins."""
        entry = self.entries[op.id]
        return 0 if entry is None else entry.start_step

    def _model_input(self, tensor: str) -> str | None:
        """The model input that a tensor is, directly or behind ops that act in training only."""
        while tensor not in self.graph.inputs:
            op = self.producers.get(tensor)
            if op is None or op.kind != "identity":
                return None
            tensor = op.inputs[0]
        return tensor

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

    def output_bits(self, stage: Stage) -> int | None:
        """Bits of the output; None or 32 for float."""
        entry = self._output_entry(stage)
        return 8 if self.bits_behind(stage) else self._asked(entry, stage.output)

    def _asked(self, entry: Entry | None, output: str) -> int | None:
        """The output bits of an entry; those of a model output are 8 unless its op is named."""
        if entry is None:
            return None
        ends = output in self.to_output and entry.op_names is None and entry.output_bits not in (None, 32)
        return 8 if ends else entry.output_bits

    def bits_behind(self, stage: Stage) -> int | None:
        """The bits, fewer than 8, that apply further on, where the output is a step on the way; else None."""
        bits = self._asked(self._output_entry(stage), stage.output)
        return bits if bits in range(8) and self.is_inner(stage) else None

    def is_inner(self, stage: Stage) -> bool:
        """Whether the output is a step on the way to a tensor that the bits are meant for.

        Bits of an output apply behind the activation function and behind the sum (Jacob et al. 2018, section 3), and
        to what a layer gives, not to the terms of its formula. So a result that only sums and activation functions of
        the same bits read, or only ops of its own layer that are no products, is such a step.
        """
        op, asked = stage.anchor, self._asked(self._output_entry(stage), stage.output)
        readers = list(self._readers(stage.output, op.layer))
        behind = frozenset() if stage.relu is not None or op.kind in FUNCTIONS else FUNCTIONS | {"add"}

        def passes(reader: Op) -> bool:
            if reader.layer == op.layer:
                return not self.target.row(reader.kind).is_product
            bits = self._asked(self.entries[reader.id], reader.outputs[0])
            return reader.kind in behind and bits == asked

        return bool(readers) and stage.output not in self.graph.outputs and all(map(passes, readers))

    def _readers(self, tensor: str, layer: str) -> Iterator[Op]:
        """The ops that read a tensor, seen through ops that act in training only and movements of data in the layer."""
        for op, _ in self.consumers[tensor]:
            moves = self.target.row(op.kind).placement is Placement.SHARED and op.kind not in FUNCTIONS
            if op.kind == "identity" or (moves and op.layer == layer):
                for output in op.outputs:
                    yield from self._readers(output, layer)
            else:
                yield op

    def output_need(self, stage: Stage, nonneg: bool) -> Need:
        """The range of the stage's output; `nonneg` says that it is never negative."""
        entry = self._output_entry(stage)
        bits = self.output_bits(stage) or 8
        row = stage.row
        common: dict[str, Any] = {
            "start_step": entry.start_step if entry else 0,
            "naive": entry is not None and entry.quantizer == "naive",
        }
        dorefa = entry is not None and entry.quantizer == "dorefa"
        activation = stage.relu is not None or stage.anchor.kind in ("relu", "elementwise", "sigmoid")
        if dorefa and activation and nonneg and stage.output not in self.to_output and not self.is_inner(stage):
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
