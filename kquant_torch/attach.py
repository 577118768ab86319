"""Put the quantizers of a plan into a model that was read: layers change their class, and the code gets new nodes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from kquant.core.affine import Affine
from kquant.core.errors import ConfigError, ModelError, UnsupportedError
from kquant.core.graph import Op
from kquant.core.moving import EMA_DECAY
from kquant.core.plan import Plan, Site, WeightSpec
from kquant.core.weights import gain_shape, weight_formula
from kquant_torch.constants import ConstantQuantizer
from kquant_torch.fake_quantize import FakeQuantize
from kquant_torch.functions import norm_of
from kquant_torch.kernels import layout
from kquant_torch.norms import BATCH_NORMS, FreezableNorm, freezable
from kquant_torch.read import Reading
from kquant_torch.reader import Name
from kquant_torch.root import HOLDER, become_quantized
from kquant_torch.trace import DROPOUTS
from kquant_torch.weights import QUANTIZED, RECURRENT, WeightQuantizer


class Builder:
    """Rewrites one model by one plan. Use `attach`."""

    def __init__(self, plan: Plan, reading: Reading):
        self.plan, self.reading = plan, reading
        self.graph, self.model, self.code = plan.graph, reading.model, reading.code
        self.holder = nn.Module()
        self.quantizers: dict[str, FakeQuantize] = {}
        self.keys: dict[str, str] = {}  # names in the holder, by spec
        self.names: Counter[str] = Counter()
        self.axes: dict[str, tuple[int, ...] | None] = {}  # of kernels that share a scale, by op
        self.nodes = self._nodes_by_tensor()
        self.quantized: dict[str, fx.Node] = {}
        self.folded = _folded_norms(plan, self.model)
        self.labels: dict[fx.Node, Name] = dict(zip(self._op_nodes(), reading.names, strict=True))

    def build(self) -> nn.Module:
        """The wrapped model: the model of the reading itself, changed."""
        self.axes = _check_weights(self.plan, self.model)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for tensor in self.graph.inputs:
            self._fake_quantize_tensor(tensor, by_integer=False)
        for op in self.graph.ops:
            self._op(op)
        self._dropouts()
        self._modules()
        self.holder.to(device)
        self.model.add_module(HOLDER, self.holder)
        self.holder.train(self.model.training)
        self.code.lint()
        names = [self.labels[n] for n in self.code.nodes if n in self.labels]
        values = self.reading.inputs.values
        inputs = {name: (tuple(v.shape), v.dtype) for name, v in values.items()}
        return become_quantized(self.model, self.code, {"names": names, "inputs": inputs, "target": self.plan.target})

    def _op_nodes(self) -> list[fx.Node]:
        return [op.source for op in self.graph.ops]

    def _nodes_by_tensor(self) -> dict[str, fx.Node]:
        placeholders = [n for n in self.code.nodes if n.op == "placeholder"]
        found = dict(zip(self.graph.inputs, placeholders, strict=True))
        found.update({op.outputs[0]: op.source for op in self.graph.ops})
        return {**found, **self.reading.items}

    # -- activations ----------------------------------------------------------------------------------------------

    def _op(self, op: Op) -> None:
        node: fx.Node = op.source
        used: Counter[fx.Node] = Counter()
        for index, tensor in enumerate(op.inputs):
            if tensor not in self.nodes:
                continue
            raw = self.nodes[tensor]
            value = self.quantized.get(tensor, raw) if op.id in self.plan.integer else raw
            edge = self.plan.edges.get((op.id, index))
            if edge is not None:
                with self.code.inserting_before(node):
                    value = self._call_quantizer(value, edge, op.layer)
            if value is not raw:
                _replace_operand(node, raw, value, used[raw])
            else:
                used[raw] += 1
        self._constant(op, node)
        self._weight(op)
        for tensor in op.outputs:
            self._fake_quantize_tensor(tensor, by_integer=op.id in self.plan.integer)

    def _constant(self, op: Op, node: fx.Node) -> None:
        """A constant operand lies on the grid that the artifact has: its own, or that of what it is compared with."""
        for index, tensor in enumerate(op.inputs):
            if tensor not in self.reading.constants or op.id not in self.plan.integer:
                continue
            source, value = self.reading.constants[tensor], self.graph.tensors[tensor].constant
            if value is not None and value.size == 1:
                continue  # one number is held as it is
            if op.kind in ("maximum", "minimum"):
                with self.code.inserting_before(node):
                    held = self._call_quantizer(
                        source, Site(self._spec_of(op, 1 - index), None), f"{op.layer}.constant"
                    )
                del self.labels[held]
            else:
                key = self._unique(f"{op.id}_constant")
                self.holder.add_module(key, ConstantQuantizer())
                with self.code.inserting_before(node):
                    held = self.code.call_module(f"{HOLDER}.{key}", (source,))
            node.replace_input_with(source, held)

    def _spec_of(self, op: Op, index: int) -> str:
        """The range on which an op reads an input: a requantize's, or that of the tensor which it shares."""
        edge, tensor = self.plan.edges.get((op.id, index)), op.inputs[index]
        while edge is None and not self.plan.sites.get(tensor):
            maker = self.graph.producers()[tensor]
            edge, tensor = self.plan.edges.get((maker.id, 0)), maker.inputs[0]
        return self.plan.sites[tensor][-1].spec if edge is None else edge.spec

    def _fake_quantize_tensor(self, tensor: str, by_integer: bool) -> None:
        sites = self.plan.sites.get(tensor, ())
        raw = self.nodes.get(tensor)
        if not sites or raw is None:
            return
        users = list(raw.users)
        value, after = raw, raw
        if raw.op == "placeholder":
            after = [n for n in self.code.nodes if n.op == "placeholder"][-1]
        for site in sites:
            with self.code.inserting_after(after):
                value = after = self._call_quantizer(value, site, tensor)
        self.quantized[tensor] = value
        if by_integer:
            for user in users:
                user.replace_input_with(raw, value)
            self.nodes[tensor] = value

    def _call_quantizer(self, value: fx.Node, site: Site, near: str) -> fx.Node:
        if site.spec not in self.quantizers:
            self.keys[site.spec] = self._unique(site.spec)
            self.quantizers[site.spec] = self._quantizer(site.spec)
            self.holder.add_module(self.keys[site.spec], self.quantizers[site.spec])
        self.quantizers[site.spec].calls += 1
        options = {"site": site.index, **({"boundary": True} if site.boundary else {})}
        key = f"{HOLDER}.{self.keys[site.spec]}"
        node = self.code.call_module(key, (value,), options)
        label = self._unique(f"{near}/{self.keys[site.spec]}", keep=True)
        self.labels[node] = Name(label, key, "FakeQuantize", (label, key))
        return node

    def _quantizer(self, spec_id: str) -> FakeQuantize:
        spec = self.plan.specs[spec_id]
        fixed = (0.0, 1.0) if spec.unit else None
        if spec.fixed is not None:
            fixed = fixed_range(spec.fixed)
        made = FakeQuantize(
            spec.bits, max(spec.sites, 1), fixed, spec.symmetric, spec.nonneg, spec.start_step,
            1.0 if spec.naive else EMA_DECAY,
        )  # fmt: skip
        made.calls, made.name = 0, spec_id
        return made

    def _unique(self, name: str, keep: bool = False) -> str:
        if not keep:
            name = "".join(c if c.isalnum() else "_" for c in name)
            name = f"{name}_" if hasattr(nn.Module, name) else name  # a layer of the user's called `float`
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}_{self.names[name]}"

    # -- weights --------------------------------------------------------------------------------------------------

    def _weight(self, op: Op) -> None:
        spec = self.plan.weights.get(op.id)
        node: fx.Node = op.source
        if spec is None:
            return
        if op.kind == "recurrent":
            _quantize_recurrent(self.model.get_submodule(str(node.target)), spec, op.layer)
        elif node.op == "call_module":
            axes, norm = self._axes(op), self.folded.get(op.id)
            _quantize_layer(self.model.get_submodule(str(node.target)), spec, op, axes, norm)
        else:
            self._weight_of_function(op, node, spec)

    def _axes(self, op: Op) -> tuple[int, ...] | None:
        spec = self.plan.weights[op.id]
        return self.axes.get(op.id, op.attrs.get("kernel_axes") if spec.per_channel else None)

    def _weight_of_function(self, op: Op, node: fx.Node, spec: WeightSpec) -> None:
        if spec.gradient_bits:
            raise UnsupportedError(
                f"layer {op.layer!r} ({op.type_name})",
                "gradient bits need a layer that is a module; this one is a function of a parameter",
                spec.gradient_bits,
                "Drop 'gradient' from its q_bits, or write it as a module",
            )
        weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        key = self._unique(f"{op.id}_weight")
        self.holder.add_module(key, made_quantizer(spec, op, self._axes(op), self.folded.get(op.id)))
        with self.code.inserting_before(node):
            quantized = self.code.call_module(f"{HOLDER}.{key}", (weight,))
        node.replace_input_with(weight, quantized)

    # -- modules --------------------------------------------------------------------------------------------------

    def _dropouts(self) -> None:
        for node in list(self.code.nodes):
            if node.op == "call_function" and node.target in DROPOUTS:
                kinds = {f.__name__: c for f, c in zip(DROPOUTS, _dropout_classes(), strict=True)}
                key = self._unique(node.name)
                self.holder.add_module(key, kinds[node.target.__name__](node.args[1]))
                with self.code.inserting_before(node):
                    made = self.code.call_module(f"{HOLDER}.{key}", (node.args[0],))
                node.replace_all_uses_with(made)
                self.labels[made] = self.labels.pop(node)
                self.code.erase_node(node)

    def _modules(self) -> None:
        """Batch norms that can be frozen, and no activation that overwrites a tensor which a quantizer still needs."""
        for node in self.code.nodes:
            if node.op == "call_function" and node.target is norm_of:
                module = self.model.get_submodule(str(node.args[0].target))
                if not isinstance(module, FreezableNorm):
                    module.__class__, module.frozen = freezable(type(module)), False
            if node.op != "call_module" or str(node.target).startswith(f"{HOLDER}."):
                continue
            module = self.model.get_submodule(str(node.target))
            if type(module) in BATCH_NORMS:
                module.__class__ = BATCH_NORMS[type(module)]
                module.frozen = False
            if getattr(module, "inplace", False) is True:
                module.inplace = False


def _dropout_classes() -> list[type]:
    by_name = {
        "dropout": nn.Dropout, "dropout1d": nn.Dropout1d, "dropout2d": nn.Dropout2d, "dropout3d": nn.Dropout3d,
        "alpha_dropout": nn.AlphaDropout, "feature_alpha_dropout": nn.FeatureAlphaDropout,
    }  # fmt: skip
    return [by_name[f.__name__] for f in DROPOUTS]


def _replace_operand(node: fx.Node, raw: fx.Node, value: fx.Node, occurrence: int) -> None:
    """Put `value` in the place of the n-th of the remaining uses of `raw` among a node's arguments."""
    count = -1

    def swap(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is raw
        return value if n is raw and count == occurrence else n

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), swap)


def fixed_range(affine: Affine) -> tuple[float, float]:
    """The float range of prescribed parameters: the values of the lowest and the highest code."""
    low, high = (float(affine.dequantize(np.asarray(q, np.int32))) for q in (affine.qmin, affine.qmax))
    return low, high


def made_quantizer(spec: WeightSpec, op: Op, axes: tuple[int, ...] | None, norm: Any = None) -> WeightQuantizer:
    """The weight quantizer of an op with one kernel, whose `axes` share a scale, and which may hold a batch norm."""
    formula = weight_formula(spec.quantizer, spec.bits, axes, spec.largest)
    view = op.weights["kernel"].shape
    behind = None if norm is None else (norm, gain_shape(norm.num_features, view, op.attrs["kernel_axes"]))
    return WeightQuantizer(formula, view, spec.gradient_bits, spec.start_step, op.layer, behind)


def _folded_norms(plan: Plan, model: nn.Module) -> dict[str, Any]:
    """For op ids, the batch norm that the op's kernel holds."""
    ops = {op.id: op for op in plan.graph.ops}
    held = {op_id: spec.folds_norm for op_id, spec in plan.weights.items() if spec.folds_norm is not None}
    return {op_id: model.get_submodule(str(ops[norm].source.target)) for op_id, norm in held.items()}


def _quantize_layer(module: Any, spec: WeightSpec, op: Op, axes: tuple[int, ...] | None, norm: Any) -> None:
    if isinstance(module, tuple(QUANTIZED.values())):
        module.weight_quantizer.calls += 1  # called at several places: one weight spec
        return
    module.add_module(
        "weight_quantizer", made_quantizer(spec, op, axes, norm).to(module.weight.device).train(module.training)
    )
    module.__class__ = QUANTIZED[type(module)]


def _quantize_recurrent(module: Any, spec: WeightSpec, name: str) -> None:
    if isinstance(module, tuple(RECURRENT.values())):
        return
    if spec.gradient_bits:
        raise UnsupportedError(
            f"layer {name!r}",
            "recurrent layers do not quantize gradients",
            spec.gradient_bits,
            "Leave the gradient bits out of the entry that matches it",
        )
    quantizers = nn.ModuleDict()
    for key, weight in module.named_parameters():
        if key.startswith("weight"):
            _, axes = layout("dense", tuple(weight.shape), 1, 2)
            formula = weight_formula(spec.quantizer, spec.bits, axes if spec.per_channel else None, spec.largest)
            quantizers[key] = WeightQuantizer(formula, None, None, spec.start_step, f"{name}.{key}")
    module.add_module("weight_quantizers", quantizers.to(next(module.parameters()).device))
    module.__class__ = RECURRENT[type(module)]


def _check_weights(plan: Plan, model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Finite parameters, and one spec for a parameter that several layers share.

    Returns:
        For each op with a quantized kernel, the axes that share a scale. A table that is a layer's kernel as well, as
        in language models, has that kernel's: a scale per row.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"parameter {name!r}", "finite weights", "NaN or infinity", "Repair the float model first")
    for name, buffer in model.named_buffers():  # a mask may be infinite
        if torch.isnan(buffer).any():
            raise ModelError(f"buffer {name!r}", "values that are not NaN", "NaN", "Repair the float model first")
    users: dict[int, list[Op]] = {}
    axes: dict[str, tuple[int, ...] | None] = {}
    for op in plan.graph.ops:
        parameter = _kernel_of(op, model)
        if parameter is not None:
            users.setdefault(id(parameter), []).append(op)
    for ops in users.values():
        first, *others = ops
        kernels = [o for o in ops if o.kind != "embedding"]
        for op in others:
            _check_shared(first, op, plan)
        for op in ops:
            spec, source = plan.weights.get(op.id), op if op in kernels or not kernels else kernels[0]
            per_channel = (plan.weights.get(source.id) or spec) if spec is not None else None
            given = source.attrs.get("kernel_axes")
            axes[op.id] = given if per_channel is not None and per_channel.per_channel else None
    return axes


def _check_shared(first: Op, op: Op, plan: Plan) -> None:
    one, other = (_setting(plan.weights.get(o.id), "embedding" not in (first.kind, op.kind)) for o in (first, op))
    if one != other:
        raise ConfigError(
            "config_list",
            f"layers {first.layer!r} and {op.layer!r} share one parameter, so they must have the same weight settings",
            f"{one} and {other}",
            "Match both in one entry",
        )


def _setting(spec: WeightSpec | None, whole: bool) -> Any:
    return "float" if spec is None else dataclasses.astuple(spec)[: 3 if whole else 2]


def _kernel_of(op: Op, model: nn.Module) -> Any:
    node: fx.Node = op.source
    if "kernel" not in op.weights:
        return None
    if node.op == "call_module":
        return model.get_submodule(str(node.target)).weight
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    if weight.op != "get_attr":
        return None
    value: Any = model
    for part in str(weight.target).split("."):
        value = getattr(value, part)
    return value


def attach(plan: Plan, reading: Reading) -> nn.Module:
    """The wrapped model that a plan describes: the reading's model, changed in place."""
    return Builder(plan, reading).build()
