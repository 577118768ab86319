"""Build the trainable quantized Keras model that a plan describes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import keras
import numpy as np
from keras import tree

from kquant.core.affine import Affine
from kquant.core.errors import ModelError
from kquant.core.graph import Op
from kquant.core.plan import Plan, Site
from kquant.keras3.layers import FakeQuantize, QuantizedLayer
from kquant.keras3.read import functional
from kquant.tf_numerics import EMA_DECAY


class Builder:
    """Rebuilds a graph as a functional model, with the plan's quantizers in it."""

    def __init__(self, plan: Plan):
        self.plan, self.graph = plan, plan.graph
        self.raw: dict[str, Any] = {}
        self.quantized: dict[str, Any] = {}
        self.made: dict[Any, Any] = {}
        self.quantizers: dict[str, FakeQuantize] = {}
        self.names: Counter[str] = Counter()

    def build(self, model: Any) -> keras.Model:
        """The quantized twin of `model`, whose weights it copies."""
        form = functional(model)
        inputs = tree.map_structure(self._input, form._inputs_struct)
        for name, tensor in zip(self.graph.inputs, tree.flatten(inputs), strict=True):
            self._set(name, tensor, produced_by_integer=False)
        for op in self.graph.ops:
            self._op(op)
        results = iter(self.graph.outputs)
        outputs = tree.map_structure(lambda _: self._finished(next(results)), form._outputs_struct)
        return keras.Model(inputs, outputs, name=model.name)

    def _input(self, tensor: Any) -> Any:
        self.names[tensor.name] += 1
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)

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
        fresh = source.key not in self.made
        if fresh:
            self.made[source.key] = self._make(op)
        layer = self.made[source.key]
        outputs = tree.flatten(source.invoke(layer, inputs))
        if fresh and source.weights is not None:
            _copy_weights(layer, source.weights(), op.layer)
        for tensor, value in zip(op.outputs, outputs, strict=True):
            self._set(tensor, value, op.id in self.plan.integer)

    def _operand(self, op: Op, index: int, tensor: str) -> Any:
        value = self.raw[tensor]
        if op.id in self.plan.integer:
            value = self.quantized.get(tensor, value)
        edge = self.plan.edges.get((op.id, index))
        return value if edge is None else self._fake_quantize(value, edge)

    def _make(self, op: Op) -> Any:
        layer = op.source.build()
        if not isinstance(layer, keras.layers.Layer):
            layer = copy.copy(layer)  # the operation of the float model keeps its own nodes
            layer._inbound_nodes, layer._outbound_nodes = [], []
            layer.name = self._unique(op.source.name)
            return layer
        spec = self.plan.weights.get(op.id)
        name = self._unique(op.id.split("#")[0] if op.source.name in op.id else op.source.name)
        layer.name = name
        if spec is None:
            return layer
        return QuantizedLayer(
            layer, spec.quantizer, spec.bits, spec.per_channel, spec.gradient_bits, spec.start_step,
            name=name, dtype=layer.dtype_policy,
        )  # fmt: skip

    def _fake_quantize(self, value: Any, site: Site) -> Any:
        if site.spec not in self.quantizers:
            self.quantizers[site.spec] = self._quantizer(site.spec)
        options = {"boundary": True} if site.boundary else {}
        return self.quantizers[site.spec](value, site=site.index, **options)

    def _quantizer(self, spec_id: str) -> FakeQuantize:
        spec = self.plan.specs[spec_id]
        fixed = [0.0, 1.0] if spec.unit else None
        if spec.fixed is not None:
            fixed = fixed_range(spec.fixed)
        return FakeQuantize(
            spec.bits,
            max(spec.sites, 1),
            fixed,
            spec.symmetric,
            spec.nonneg,
            spec.start_step,
            1.0 if spec.naive else EMA_DECAY,
            name=self._unique(f"{spec_id}_quantizer"),
        )

    def _unique(self, name: str) -> str:
        name = name.replace("/", "_").replace(":", "_").replace("#", "_")
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"


def fixed_range(affine: Affine) -> list[float]:
    """The float range of prescribed parameters: the values of the lowest and the highest code."""
    return [float(affine.dequantize(np.int32(q))) for q in (np.int32(affine.qmin), np.int32(affine.qmax))]


def _copy_weights(layer: Any, values: list[np.ndarray], name: str) -> None:
    target = layer.layer if isinstance(layer, QuantizedLayer) else layer
    for value in values:
        if np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all():
            raise ModelError(f"layer {name!r}", "finite weights", "NaN or infinity", "Repair the float model first")
    own = target.get_weights()
    # State that only the quantized layer has (a freeze flag) comes after what the float layer has.
    target.set_weights([*values, *own[len(values) :]])


def attach(plan: Plan, model: Any) -> keras.Model:
    """The trainable quantized model: an ordinary functional `keras.Model`; `model` itself is left unchanged."""
    return Builder(plan).build(model)
