"""The reader: walks an fx graph whose nodes know their values' shapes, and collects the ops of the neutral graph."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from kquant.core.errors import ModelError
from kquant.core.graph import Op, Tensor, Weight
from kquant_torch.constants import ConstantQuantizer
from kquant_torch.trace import Described, is_record, leaves_of
from kquant_torch.tracer import in_mode
from kquant_torch.weights import WeightQuantizer


@dataclass(frozen=True)
class Name:
    """What an op is called: its id, the layer that `op_names` matches, its type, and the other names it answers to."""

    id: str
    layer: str
    type_name: str
    aliases: tuple[str, ...]


class Refused(Exception):  # noqa: N818  caught by the reader, which makes an opaque op of it
    """Why a call has no integer form."""


class Reader:
    """Walks an fx graph and collects the ops of its graph."""

    def __init__(self, model: nn.Module, code: fx.Graph, training_only: frozenset[str], names: Sequence[Name]):
        self.model, self.code, self.training_only = model, code, training_only
        self.given = list(names)
        self.is_complete = True  # whether `code` is all that the model does
        self.names: list[Name] = []
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}  # tensor ids, in the structure that the node gives
        self.items: dict[str, fx.Node] = {}  # the node that takes a tensor from an op with several outputs
        self.constants: dict[str, fx.Node] = {}  # the node of a constant operand that is an array
        self.data: set[fx.Node] = set()  # nodes whose tensors follow the model's inputs
        self._ids: Counter[str] = Counter()
        self._current: Name | None = None

    # -- used by the handlers -------------------------------------------------------------------------------------

    def add(
        self,
        kind: str,
        node: fx.Node,
        operands: Sequence[fx.Node | np.ndarray],
        attrs: dict | None = None,
        *,
        weights: dict[str, Weight] | None = None,
        call: Callable | None = None,
    ) -> Any:
        """Append the op that a node computes; an operand is a node, or an array that becomes a constant tensor."""
        name = self._current
        inputs = [self._operand(o, name.id) for o in operands]
        given = node.meta["value"]
        flat, structure = pytree.tree_flatten(given)
        shapes = pytree.tree_leaves(self.shape_of(node))
        found = [name.id if i == 0 else f"{name.id}:{i}" for i in range(len(flat))]
        found = [None if value is None else tensor for tensor, value in zip(found, flat, strict=True)]
        for tensor, value, shape in zip(found, flat, shapes, strict=True):
            if tensor is not None:
                self.tensors[tensor] = Tensor(tensor, shape.sizes, _numpy_name(value.dtype))
        outputs = [tensor for tensor in found if tensor is not None]
        self.ops.append(
            Op(
                name.id, kind, tuple(inputs), tuple(outputs), {**(attrs or {}), "aliases": name.aliases},
                weights or {}, name.layer, name.type_name, call or self.caller(node, operands), node,
            )
        )  # fmt: skip
        return pytree.tree_unflatten(found, structure)

    def caller(self, node: fx.Node, operands: Sequence[Any]) -> Callable:
        """Runs a node as it stands on given values of its operands, in evaluation mode."""
        places = [(i, o) for i, o in enumerate(operands) if isinstance(o, fx.Node)]

        def call(values: Sequence[Any], float_weights: bool = False) -> list[Any]:
            known = {o: self.tensor(values[i]) for i, o in places}
            with torch.no_grad():
                return self.arrays(self.run(node, known))

        return call

    def function(self, function: Callable) -> Callable:
        """A `call` that is a function of the operands' tensors."""

        def call(values: Sequence[Any], float_weights: bool = False) -> list[Any]:
            with torch.no_grad():
                return self.arrays(function(*(self.tensor(v) for v in values)))

        return call

    def tensor(self, value: Any) -> torch.Tensor:
        """A tensor on the model's device."""
        return torch.as_tensor(np.ascontiguousarray(value)).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        first = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)  # asked for at each op
        return torch.device("cpu") if first is None else first.device

    @staticmethod
    def arrays(value: Any) -> list[np.ndarray]:
        """All tensors of a structure as arrays."""
        return [v.detach().cpu().numpy() for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]

    def run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """The value of a node in evaluation mode, from known values and the model's present parameters."""
        if node in known:
            return known[node]
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        if not self.is_tensor(node):
            return self.constant_of(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.run(n, known))
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op != "call_module":
            raise Refused(f"{node.name} cannot be evaluated here")
        module = self.module(node)
        with in_mode(module, False):
            return module.forward(*args, **kwargs)

    def attribute(self, target: str) -> Any:
        """A parameter, buffer or other attribute by its path."""
        value = self.model
        for part in target.split("."):
            value = getattr(value, part)
        return value

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.model.get_submodule(str(node.target))

    def is_data(self, value: Any) -> bool:
        """Whether an argument is a tensor that follows the model's inputs."""
        return isinstance(value, fx.Node) and value in self.data

    @staticmethod
    def is_tensor(node: fx.Node) -> bool:
        """Whether a node gives a tensor or tensors, rather than sizes and the like."""
        return any(isinstance(v, Described) for v in pytree.tree_leaves(node.meta.get("value")))

    def is_parametric(self, value: Any) -> bool:
        """Whether an argument is a tensor of parameters, buffers and constants only."""
        return isinstance(value, fx.Node) and self.is_tensor(value) and value not in self.data

    def parameter(self, node: fx.Node) -> np.ndarray:
        """The present value of a tensor of parameters, float32."""
        with torch.no_grad():
            return np.asarray(self.run(node, {}).detach().cpu().float())

    def constant_of(self, value: Any) -> Any:
        """An argument with the numbers in place of the nodes that give them.

        Raises:
            Refused: a number that follows the batch.
        """

        def number(n: fx.Node) -> Any:
            first, second = n.meta.get("value"), n.meta.get("other", n.meta.get("value"))
            if self.is_tensor(n) or first != second:
                raise Refused(f"its argument {n.name!r} is computed from a tensor's values or the batch size")
            return first

        return fx.node.map_arg(value, number) if not isinstance(value, fx.Node) else number(value)

    def shape_of(self, node: fx.Node) -> Any:
        """Shapes of what a node gives, None where a size follows the batch; in the structure of its value."""
        value = node.meta["value"]
        other = node.meta.get("other")
        flat, structure = pytree.tree_flatten(value)
        others = pytree.tree_leaves(other) if other is not None else [None] * len(flat)
        return pytree.tree_unflatten([_shape(a, b) for a, b in zip(flat, others, strict=True)], structure)

    def sizes(self, node: fx.Node) -> tuple:
        """The shape of a node's only tensor."""
        return self.shape_of(node).sizes

    def follows_batch(self, node: fx.Node, axis: int) -> bool:
        """Whether the size of an axis of a node's only tensor is that of the batch."""
        return self.sizes(node)[axis] is None

    def rank(self, node: fx.Node) -> int:
        """The number of axes of a node's tensor."""
        return len(node.meta["value"].shape)

    # -- the walk -------------------------------------------------------------------------------------------------

    def _operand(self, operand: fx.Node | np.ndarray, near: str) -> str:
        if isinstance(operand, np.ndarray):
            return self._constant(operand, near)
        if operand not in self.values:
            raise Refused(f"its operand {operand.name!r} is not a tensor of the model")
        value = self.values[operand]
        if not isinstance(value, str):
            raise Refused(f"its operand {operand.name!r} is not a single tensor")
        return value

    def _constant(self, value: np.ndarray, near: str) -> str:
        tensor = self.unique(f"{near}.constant")
        self.tensors[tensor] = Tensor(tensor, tuple(value.shape), str(value.dtype), value)
        return tensor

    def unique(self, name: str) -> str:
        """`name`, with `#2`, `#3` ... when it was used before."""
        self._ids[name] += 1
        return name if self._ids[name] == 1 else f"{name}#{self._ids[name]}"

    def walk(self) -> list[str]:
        """Read every node; returns the ids of the outputs."""
        outputs: list[str] = []
        for node in self.code.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            elif node.op != "get_attr" and self.is_tensor(node):
                self._node(node)
        return outputs

    def _input(self, node: fx.Node) -> None:
        name = self.unique(str(node.target))
        self.data.add(node)
        self.values[node] = name
        value = node.meta["value"]
        self.tensors[name] = Tensor(name, self.sizes(node), _numpy_name(value.dtype))

    def _outputs(self, node: fx.Node) -> list[str]:
        found = []
        for value in leaves_of(node.args[0]):
            if not isinstance(value, fx.Node) or not self.is_tensor(value):
                continue  # None, a number: part of what the module gives, and no tensor of the artifact
            if not self.is_data(value):
                if not self.is_complete:
                    continue  # it comes from code that nobody could look into
                raise ModelError(
                    f"model {type(self.model).__name__}",
                    "outputs that are computed from its inputs",
                    repr(value),
                    "Return tensors that depend on the inputs",
                )
            found += [v for v in pytree.tree_leaves(self.values[value]) if v is not None]
        if not found and self.is_complete:
            raise ModelError(
                f"model {type(self.model).__name__}",
                "a tensor among its outputs",
                str(node.args[0]),
                "Return at least one tensor that depends on the inputs",
            )
        return found

    def _node(self, node: fx.Node) -> None:
        from kquant_torch.handlers import handle

        if not any(n in self.data for n in node.all_input_nodes):
            return
        self.data.add(node)
        if is_record(node):
            self.values[node] = [self.values[n] for n in node.all_input_nodes if self.is_data(n)]
            return
        if node.op == "call_function" and node.target in (operator.getitem, getattr):
            given, key = self.values.get(node.args[0]), node.args[1]
            if not isinstance(given, str) and isinstance(key, (int, str, slice)):
                self._item(node, getattr(given, key) if isinstance(key, str) else given[key])
                return
        self._current = self._named(node)
        self.names.append(self._current)
        self.values[node] = handle(self, node)

    def _item(self, node: fx.Node, value: Any) -> None:
        """One of several outputs of an op: one node stands for each."""
        if isinstance(value, str):
            first = self.items.setdefault(value, node)
            if first is not node:
                node.replace_all_uses_with(first)
        self.values[node] = value

    def _named(self, node: fx.Node) -> Name:
        if self.given:
            name = self.given[len(self.names)]
            self.unique(name.id)
            return name
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        stack = [(str(path), kind) for path, kind in stack if path]
        if node.op == "call_module":
            layer, type_name = str(node.target), _type_name(self.module(node))
        else:
            scope = stack[-1][0] if stack else ""
            function = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
            function = str(function).strip("_")
            expanded = node.meta.get("of")  # the composite that it is a part of
            layer, type_name = expanded or (f"{scope}.{function}" if scope else function, function)
            if expanded is not None:
                scope = layer
            owner = f"{scope}.{function}" if scope else function
            name = self.unique(owner)
            layer = layer if expanded else name
            return Name(name, layer, type_name, self._aliases(node, name, layer, stack))
        name = self.unique(layer)
        return Name(name, layer, type_name, self._aliases(node, name, layer, stack))

    @staticmethod
    def _aliases(node: fx.Node, name: str, layer: str, stack: list) -> tuple[str, ...]:
        return tuple(dict.fromkeys((name, layer, node.name, *(path for path, _ in stack))))


@dataclass(frozen=True)
class _Sizes:
    """A shape as one leaf of a structure."""

    sizes: tuple[int | None, ...]


def _shape(value: Any, other: Any) -> Any:
    if not isinstance(value, Described):
        return _Sizes(())
    if not isinstance(other, Described) or len(other.shape) != len(value.shape):
        return _Sizes((None, *value.shape[1:]))
    return _Sizes(tuple(a if a == b else None for a, b in zip(value.shape, other.shape, strict=True)))


def _numpy_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type_name(module: nn.Module) -> str:
    from kquant_torch.weights import QUANTIZED

    bases = {quantized: base for base, quantized in QUANTIZED.items()}
    return bases.get(type(module), type(module)).__name__.removeprefix("Quantized")


def parameter_weight(reader: Reader, node: fx.Node, view: tuple[int, ...] | None = None) -> Weight:
    """A weight that follows the parameters that a node is computed from."""
    shape = tuple(node.meta["value"].shape) if view is None else view
    return Weight(shape, lambda: reader.parameter(node).reshape(shape))


def weight_quantizer(reader: Reader, node: Any) -> tuple[WeightQuantizer | None, Any]:
    """The quantizer that a weight argument comes from, if any, and the node of the float weight."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        module = reader.module(node)
        if isinstance(module, WeightQuantizer):
            return module, node.args[0]
    return None, node


def constant_quantizer(reader: Reader, node: fx.Node) -> tuple[Any, fx.Node]:
    """The quantizer that a constant operand comes from, if any, and the node of its values."""
    if node.op == "call_module":
        module = reader.module(node)
        if isinstance(module, ConstantQuantizer):
            return module, node.args[0]
    return None, node
