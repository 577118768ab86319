"""Read a PyTorch model, float or wrapped, into the neutral graph.

Layout: torch's own. Batch on axis 0; channels on axis 1 of what convolutions read and write (NCW, NCHW, NCDHW);
features on the last axis of what a `dense` reads and writes. `Tensor.shape` has None wherever a size follows the size
of the batch (found by running two batch sizes), and the sizes of `example_inputs` elsewhere. Axes in attrs are
non-negative. `Tensor.dtype` is a numpy name; ids are `int64`. `call` takes and gives numpy arrays in this layout.

Every op has `attrs["aliases"]` (the names that `op_names` may match). An op with a kernel also has `channel_axis`, the
axis of its output along which the output channels lie; a `channel_affine` folds into it only if its `axis` is that one.
Windows are tuples with one int for each of the `rank` spatial axes, with torch's names and meanings.

Ops with a kernel (`weights` by role):
    conv2d: `rank` 1, 2 or 3, `stride`, `padding` (the same on both sides, zeros), `dilation`, `groups` (depthwise too).
        `kernel` (out, in / groups, *window), `kernel_axes` all but 0; `bias` (out,) or absent.
    conv2d_transpose: `rank`, `stride`, `padding`, `output_padding`, `dilation`, `groups`. `kernel` (in, out, *window),
        `kernel_axes` all but 1; with groups > 1 reshaped to (groups, in / groups, out / groups, *window), `kernel_axes`
        all but 0 and 2, so that the output channels are in the output's order; `bias`.
    dense: contracts the last axis of an input of any rank. `kernel` (out, in), `kernel_axes` (1,); `bias`.
    embedding: an input of ids. `kernel` (count, size), with one scale.
    channel_affine: `axis`; `scale` and `offset` (channels,): a batch norm with its running statistics, or a product or
        sum with a vector along `axis`.
    prelu: `kernel` shaped to broadcast against the input from the right, (channels, 1, 1) or (1,), with one scale.
    recurrent: `mode` "LSTM" or "GRU"; quantized weights, float arithmetic.

Arithmetic and functions:
    add, sub, mul, maximum, minimum: two inputs that broadcast; one may be a constant tensor.
    batch_matmul: two inputs, (..., n, k) and (..., k, m).
    mean, sum, reduce_max, reduce_min: `dim` (a tuple), `keepdim`. A pool over everything is a `mean` or `reduce_max`.
    elementwise: `fn`, a name such as `gelu`, `gelu_tanh`, `silu`, `hardswish`, `elu`, `leaky_relu`, `rsqrt`; `call`
        evaluates it on any shape.
    relu: `fn` = "relu", `max`: 6.0 for ReLU6, another limit, or None.
    sigmoid, tanh: nothing. softmax: `dim`, `beta` (the factor of its input).

Windows and shapes:
    max_pool2d: `rank`, `kernel_size`, `stride`, `padding`, `dilation`, `ceil_mode`.
    avg_pool2d: `rank`, `kernel_size`, `stride`, `padding`, `ceil_mode`, `count_include_pad`, `divisor_override`.
    concat: `dim`. reshape: `shape`, the output's, None where it follows the batch.
    transpose: `dims`; output axis i is input axis dims[i].
    strided_slice: `begin`, `end` (None: to the end), `strides`, one per input axis; `shrink`: axes dropped afterwards.
    gather: `dim`, `indices` (int64 array, constant). tile: `repeats`, one per axis (an `expand` too).
    pad: `paddings`, (before, after) per axis, `value`. mirror_pad: `paddings`, `mode` "reflect".
    resize_nearest, resize_bilinear: `size` (of the output's spatial axes), `scale_factor` (floats, or None if the size
        was given), `align_corners`.
    identity: nothing in the artifact (dropout, contiguous, hooks).
    opaque: `reason`; `where` (file and line) for a functional op of a model that cannot be traced.

In a wrapped model there are also, as in the Keras 3 front end, ops of kind `fake_quant` with attrs `spec` (one per
range), `site` (index of the observer, or None), `quantizer` (`bits`, `symmetric`, `nonneg`, `fixed`, `range()`,
`is_set()`, `set_range(low, high, site, covered, held)`), `unit`, `boundary` and `is_waiting`; and ops with a kernel
have `formula` (of `kquant.core.weights`), `codes` (gives integer-valued float codes in the shape of `kernel`, and a
scale that broadcasts) and `is_waiting`. `call(inputs, float_weights=True)` runs them on the float kernel.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from kquant.core.errors import ModelError, UnsupportedError
from kquant.core.graph import Graph, Op, Tensor, Weight
from kquant_torch.trace import Described, Inputs, NotTraceable, in_mode, propagate, trace
from kquant_torch.weights import WeightQuantizer


@dataclass(frozen=True)
class Name:
    """What an op is called: its id, the layer that `op_names` matches, its type, and the other names it answers to."""

    id: str
    layer: str
    type_name: str
    aliases: tuple[str, ...]


@dataclass
class Reading:
    """A model that was read: its graph, and the fx graph that `attach` rewrites."""

    graph: Graph
    model: nn.Module
    code: fx.Graph
    inputs: Inputs
    names: list[Name] = field(default_factory=list)
    items: dict[str, fx.Node] = field(default_factory=dict)
    traced: bool = True


class Refused(Exception):  # noqa: N818  caught by the reader, which makes an opaque op of it
    """Why a call has no integer form."""


class Reader:
    """Walks an fx graph and collects the ops of its graph."""

    def __init__(self, model: nn.Module, code: fx.Graph, training_only: frozenset[str], names: Sequence[Name]):
        self.model, self.code, self.training_only = model, code, training_only
        self.given = list(names)
        self.names: list[Name] = []
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}  # tensor ids, in the structure that the node gives
        self.items: dict[str, fx.Node] = {}  # the node that takes a tensor from an op with several outputs
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
        outputs = [name.id if i == 0 else f"{name.id}:{i}" for i in range(len(flat))]
        for tensor, value, shape in zip(outputs, flat, shapes, strict=True):
            self.tensors[tensor] = Tensor(tensor, shape.sizes, _numpy_name(value.dtype))
        self.ops.append(
            Op(
                name.id, kind, tuple(inputs), tuple(outputs), {**(attrs or {}), "aliases": name.aliases},
                weights or {}, name.layer, name.type_name, call or self.caller(node, operands), node,
            )
        )  # fmt: skip
        return pytree.tree_unflatten(outputs, structure)

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
        first = next(iter([*self.model.parameters(), *self.model.buffers()]), None)
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
        for value in pytree.tree_leaves(node.args[0]):
            if not self.is_data(value):
                raise ModelError(
                    f"model {type(self.model).__name__}", "outputs that are computed from its inputs", repr(value)
                )
            found += [v for v in pytree.tree_leaves(self.values[value]) if v is not None]
        return found

    def _node(self, node: fx.Node) -> None:
        from kquant_torch.handlers import handle

        if not any(n in self.data for n in node.all_input_nodes):
            return
        self.data.add(node)
        if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int):
            given = self.values[node.args[0]]
            if not isinstance(given, str):
                self._item(node, given[node.args[1]])
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


def read_code(model: nn.Module, example_inputs: Any = None) -> Reading:
    """Trace and read a model; what `read` returns, with the fx graph."""
    from kquant_torch.expand import expand
    from kquant_torch.root import example_of, names_of

    if not isinstance(model, nn.Module):
        raise ModelError("model", "a torch.nn.Module", type(model).__name__)
    inputs = Inputs(model, example_of(model) if example_inputs is None else example_inputs)
    code, training_only = trace(model, inputs)
    names = names_of(model)
    expand(model, code, inputs)
    propagate(model, code, inputs.values)
    reader = Reader(model, code, training_only, names)
    outputs = reader.walk()
    if not reader.ops:
        raise ModelError(f"model {type(model).__name__}", "a model with at least one layer", "an empty model")
    tensors = tuple(reader.values[n] for n in code.nodes if n.op == "placeholder")
    output_names = ("output",) if len(outputs) == 1 else tuple(f"output_{i}" for i in range(len(outputs)))
    name = type(model).__name__.removeprefix("Quantized")
    graph = Graph(tuple(reader.ops), reader.tensors, tensors, tuple(outputs), name, tensors, output_names)
    return Reading(graph, model, code, inputs, reader.names, reader.items)


def read(model: nn.Module, example_inputs: Any = None) -> Graph:
    """Read a model.

    Args:
        model: a float module, or one that `kquant_torch.wrap` or a quantizer returned.
        example_inputs: a tensor, a tuple of tensors or a dict by argument name, one batch. A wrapped model knows
            the shapes of its own.

    Returns:
        The graph; weights are read when asked for, so it follows the model's training.

    Raises:
        ModelError: not a module, empty, or example inputs that it cannot be called on.
        UnsupportedError: control flow that depends on values or on the mode.
    """
    try:
        return read_code(model, example_inputs).graph
    except NotTraceable as error:
        raise UnsupportedError(
            f"model {type(model).__name__!r}",
            "a forward that torch.fx can trace, since an artifact has no control flow",
            str(error),
            "Move the control flow out of the model; it can be wrapped and trained as it is, but not exported",
        ) from error


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
