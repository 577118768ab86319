"""Build the trainable quantized Keras model that a plan describes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from kquant.core.affine import Affine
from kquant.core.constants import ARITHMETIC, held_constant
from kquant.core.errors import ModelError
from kquant.core.graph import Op
from kquant.core.moving import EMA_DECAY
from kquant.core.plan import Plan, Site, Spec
from kquant.keras_common.copied import set_weights
from kquant.keras_common.generation import Generation
from kquant.keras_common.layers import Delayed
from kquant.keras_common.masks import warn_of_lost
from kquant.keras_common.named import class_of


class Builder:
    """Rebuilds a graph as a functional model, with the plan's quantizers in it."""

    def __init__(self, generation: Generation, plan: Plan):
        self.generation, self.tree = generation, generation.tree
        self.plan, self.graph = plan, plan.graph
        self.raw: dict[str, Any] = {}
        self.quantized: dict[str, Any] = {}
        self.made: dict[Any, Any] = {}
        self.quantizers: dict[str, Any] = {}
        self.names: Counter[str] = Counter()

    def build(self, model: Any) -> Any:
        """The quantized twin of `model`, whose weights it copies."""
        form = self.generation.functional(model)
        given, results = self.generation.structures(form)
        inputs = self.tree.map_structure(self._input, given)
        for name, tensor in zip(self.graph.inputs, self.tree.flatten(inputs), strict=True):
            self._set(name, tensor, produced_by_integer=False)
        for op in self.graph.ops:
            self._op(op)
        names = iter(self.graph.outputs)
        outputs = self.tree.map_structure(lambda _: self._finished(next(names)), results)
        quantized = class_of(self.generation, model)(inputs, outputs, name=model.name)
        for layer in (*self.made.values(), *self.quantizers.values()):
            if isinstance(layer, Delayed):
                layer.calls = len(layer._inbound_nodes)
        # Losses and metrics by output name, as the training script has them.
        quantized.output_names = list(form.output_names)
        warn_of_lost(model, form.outputs, quantized.outputs)
        return quantized

    def _input(self, tensor: Any) -> Any:
        g, name = self.generation, self.generation.maker(tensor)[0].name
        self.names[name] += 1
        return g.input(g.shape(tensor), g.dtype(tensor), name)

    def _finished(self, tensor: str) -> Any:
        return self.quantized.get(tensor, self.raw[tensor])

    def _set(self, tensor: str, value: Any, produced_by_integer: bool) -> None:
        self.raw[tensor] = value
        for site in self.plan.sites.get(tensor, ()):
            value = self.quantized[tensor] = self._fake_quantize(value, site)
            if produced_by_integer:
                self.raw[tensor] = value

    def _op(self, op: Op) -> None:
        inputs = [self._operand(op, i, t) for i, t in enumerate(op.inputs) if t in self.raw]
        source = op.source
        spec = self.plan.weights.get(op.id)
        gain = {"gain": self._gain(spec.folds_norm, inputs[0])} if spec and spec.folds_norm else {}
        fresh = source.key not in self.made
        if fresh:
            self.made[source.key] = self._make(op)
        layer = self.made[source.key]
        outputs = self.tree.flatten(layer(inputs[0], **gain) if gain else self._called(op, layer, inputs))
        if fresh and source.weights is not None:
            _copy_weights(self.generation.own.QuantizedLayer, layer, source.weights(), op.layer)
        for tensor, value in zip(op.outputs, outputs, strict=True):
            self._set(tensor, value, op.id in self.plan.integer)

    def _gain(self, norm_id: str, x: Any) -> Any:
        """The gain of the batch norm behind a layer, which is made before its turn."""
        norm = next(op for op in self.graph.ops if op.id == norm_id)
        if norm.source.key not in self.made:
            layer = self.made[norm.source.key] = self._make(norm)
            layer.shape = list(self.graph.tensors[norm.output].shape)
            layer.build(layer.shape)
            _copy_weights(self.generation.own.QuantizedLayer, layer, norm.source.weights(), norm.layer)
        return self.made[norm.source.key](x, gain=True)

    def _called(self, op: Op, layer: Any, inputs: list[Any]) -> Any:
        """The op on new inputs. The constant of an integer sum or product lies on the grid that the artifact has."""
        if isinstance(layer, self.generation.own.TrainedOperand):
            layer.held = op.id in self.plan.integer and not self._is_wide(op)
            return op.source.invoke(layer, inputs)
        value = next((self.graph.tensors[t].constant for t in op.inputs if t not in self.raw), None)
        if value is None or op.kind not in ARITHMETIC or op.id not in self.plan.integer or self._is_wide(op):
            return op.source.invoke(layer, inputs)
        held = held_constant(value, op.id)
        if held is value:
            return op.source.invoke(layer, inputs)
        return layer(*(inputs[0] if t in self.raw else held for t in op.inputs))

    def _is_wide(self, op: Op) -> bool:
        """Whether an op computes in 16 bits, where the grid of a constant is fine enough not to matter."""
        return any(self.plan.specs[site.spec].bits == 16 for site in self.plan.sites.get(op.output, ()))

    def _operand(self, op: Op, index: int, tensor: str) -> Any:
        value = self.raw[tensor]
        if op.id in self.plan.integer:
            value = self.quantized.get(tensor, value)
        edge = self.plan.edges.get((op.id, index))
        return value if edge is None else self._fake_quantize(value, edge)

    def _make(self, op: Op) -> Any:
        layer = op.source.build()
        if op.source.is_operation:
            return self.generation.copy_operation(layer, self._unique(op.source.name))
        name = self._unique(op.id.split("#")[0] if op.source.name in op.id else op.source.name)
        self.generation.rename(layer, name)
        spec = self.plan.weights.get(op.id)
        return layer if spec is None else self.generation.own.quantized(layer, spec, name)

    def _fake_quantize(self, value: Any, site: Site) -> Any:
        if site.spec not in self.quantizers:
            self.quantizers[site.spec] = self._quantizer(site.spec)
        options = {"boundary": True} if site.boundary else {}
        return self.quantizers[site.spec](value, site=site.index, **options)

    def _quantizer(self, spec_id: str) -> Any:
        spec = self.plan.specs[spec_id]
        name = self._unique(f"{spec_id}_quantizer")
        return self.generation.own.FakeQuantize(sites=max(spec.sites, 1), name=name, **range_settings(spec))

    def _unique(self, name: str) -> str:
        name = name.replace("/", "_").replace(":", "_").replace("#", "_")
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"


def range_settings(spec: Spec) -> dict[str, Any]:
    """The arguments of a fake quantization that a spec asks for, all but the number of its call sites."""
    return {
        "bits": spec.bits,
        "fixed": [0.0, 1.0] if spec.unit else None if spec.fixed is None else fixed_range(spec.fixed),
        "symmetric": spec.symmetric,
        "nonneg": spec.nonneg,
        "start_step": spec.start_step,
        "decay": 1.0 if spec.naive else EMA_DECAY,
    }


def fixed_range(affine: Affine) -> list[float]:
    """The float range of prescribed parameters: the values of the lowest and the highest code."""
    return [float(affine.dequantize(np.int32(q))) for q in (np.int32(affine.qmin), np.int32(affine.qmax))]


def _copy_weights(quantized: type, layer: Any, values: list[np.ndarray], name: str) -> None:
    target = layer.layer if isinstance(layer, quantized) else layer
    for value in values:
        if np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelError(f"layer {name!r}", "finite weights", "NaN or infinity", "Repair the float model first")
    own = target.get_weights()
    # State that only the quantized layer has (a freeze flag) comes after what the float layer has.
    set_weights(target, [*values, *own[len(values) :]])


def attach(generation: Generation, plan: Plan, model: Any) -> Any:
    """The trainable quantized model: an ordinary functional model of Keras; `model` itself is left unchanged."""
    return Builder(generation, plan).build(model)
