"""Read a Keras model into the neutral graph.

Functional, Sequential and nested models are walked call by call; composite and subclassed ones are first rewritten as
small functional models in plain Keras (`kquant.keras_common.composite`) and walked the same way.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kquant.core.errors import ModelError, UnsupportedError
from kquant.core.graph import Graph, Op, Tensor, Weight
from kquant.keras_common.generation import Call, Generation, Source
from kquant.keras_common.masks import Masks
from kquant.keras_common.mixed import check_layer, check_model
from kquant.keras_common.regularized import regularized, unchanged
from kquant.keras_common.subclassed import empty

SIZES = "computes with sizes that are known only when the model runs, and the artifact has no such tensor"
NOT_IDS = "its ids must be an input of the model that is nothing else"


@dataclass
class _Scope:
    """Where the walk is: the path of enclosing models, and the composite layer being expanded, if any."""

    path: tuple[str, ...] = ()
    composite: tuple[str, str] | None = None  # (path, type name)


class Reader:
    """Walks a model and collects the ops of its graph."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.layers, self.operations, self.own = generation.layers, generation.ops, generation.own
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.asides: set[str] = set()
        self.gains: dict[str, Any] = {}
        self.trained: dict[int, tuple[Any, Any, Any]] = {}  # by the id of a variable: it, its use, its layer
        self.masks = Masks(generation)
        self.turned: dict[str, Any] = {}  # tensors whose batch is not the first axis, of which only parts are read
        self.scope = _Scope()
        self.places: list[tuple[str, Any, str]] = []  # of the walk's outermost model: layer, symbolic tensor, tensor
        self._ids: Counter[str] = Counter()
        self._expanded: dict[Any, Any] = {}
        self._handlers = _handlers(generation)

    # -- used by the handlers -------------------------------------------------------------------------------------

    def add(
        self,
        kind: str,
        layer: Any,
        inputs: Sequence[str],
        shapes: Sequence[Any],
        source: Source,
        *,
        attrs: dict | None = None,
        weights: dict[str, Weight] | None = None,
        suffix: str = "",
        call: Callable | None = None,
        dtype: str | Sequence[str] = "float32",
    ) -> list[str]:
        """Append an op of `layer`; returns the ids of its outputs, whose shapes (None for unknown) are given."""
        path = "/".join((*self.scope.path, layer.name)) + suffix
        op_id = self.unique(path)
        outputs = [op_id if i == 0 else f"{op_id}:{i}" for i in range(len(shapes))]
        types = [dtype] * len(shapes) if isinstance(dtype, str) else list(dtype)
        for tensor, shape, kind_of in zip(outputs, shapes, types, strict=True):
            self.tensors[tensor] = Tensor(tensor, tuple(shape), kind_of)
        composite = self.scope.composite
        parents = ["/".join(self.scope.path[: i + 1]) for i in range(len(self.scope.path))]
        aliases = tuple(dict.fromkeys((path, layer.name, *parents, *((composite[0],) if composite else ()))))
        self.ops.append(
            Op(
                op_id,
                kind,
                tuple(inputs),
                tuple(outputs),
                {**(attrs or {}), "aliases": aliases},
                weights or {},
                composite[0] if composite else path,
                composite[1] if composite else type(layer).__name__,
                call or self._caller(source, layer),
                source,
            )
        )
        return outputs

    def constant(self, value: np.ndarray, near: str) -> str:
        """A constant tensor; returns its id."""
        tensor = self.unique(f"{near}/constant")
        self.tensors[tensor] = Tensor(tensor, tuple(value.shape), str(value.dtype), value)
        return tensor

    def aside(self, name: str, call: Call) -> str:
        """A value that is no tensor of the graph (the shape of one), which a later handler looks through."""
        tensor = self.unique(name)
        self.tensors[tensor] = Tensor(tensor, call.shape, "int32")
        self.asides.add(tensor)
        return tensor

    def gain(self, norm: Any, call: Call) -> str:
        """The gain of a batch norm, which is no tensor of the graph: a kernel is quantized with it."""
        tensor = self.aside(f"{norm.name}/gain", call)
        self.gains[tensor] = norm
        return tensor

    def mark(self) -> tuple[int, int]:
        """How much was read until now."""
        return len(self.ops), len(self.tensors)

    def undo(self, mark: tuple[int, int]) -> None:
        """Forget what was read since."""
        del self.ops[mark[0] :]
        for tensor in list(self.tensors)[mark[1] :]:
            del self.tensors[tensor]

    def asks_for_sizes(self, mark: tuple[int, int]) -> list[str]:
        """The layers read since whose ops need a size that is known only when the model runs."""
        return [op.layer for op in self.ops[mark[0] :] if not self.asides.isdisjoint(op.inputs)]

    def unique(self, name: str) -> str:
        """`name`, with `#2`, `#3` ... when it was used before."""
        self._ids[name] += 1
        return name if self._ids[name] == 1 else f"{name}#{self._ids[name]}"

    def shape(self, tensor: str) -> tuple:
        """The shape of a tensor that was read."""
        return self.tensors[tensor].shape

    def clone(self, layer: Any, **changes: Any) -> Source:
        """A source that makes `layer` again with some of its config changed, and its weights.

        Its activity regularizer becomes a layer behind it: one that only replaces its parts would lose it.
        """

        def build() -> Any:
            return type(layer).from_config({**without_activity_regularizer(layer.get_config()), **changes})

        return Source(id(layer), build, layer.get_weights, _invoke_layer, layer.name)

    def again(self, layer: Any, call: Call) -> Source:
        """A source that makes `layer` again and calls it with the call's other arguments."""
        base = self.clone(layer)
        return Source(base.key, base.build, base.weights, call.invoke, layer.name)

    def operation(self, call: Call) -> Source:
        """A source that calls the same stateless operation with the call's other arguments."""
        operation = call.layer
        return Source(id(operation), lambda: operation, None, call.invoke, operation.name, is_operation=True)

    @contextmanager
    def inside(self, name: str, composite: tuple[str, str] | None = None) -> Any:
        """Walk inside a nested model, or the parts of a composite layer."""
        before = self.scope
        own = composite or before.composite
        self.scope = _Scope((*before.path, name), own)
        yield
        self.scope = before

    # -- the walk -------------------------------------------------------------------------------------------------

    def _caller(self, source: Source, layer: Any) -> Callable:
        def call(inputs: Sequence[Any], float_weights: bool = False) -> list[Any]:
            return self.generation.tree.flatten(source.invoke(layer, inputs))

        return call

    def function(self, model: Any, inputs: Sequence[str]) -> list[str]:
        """Walk a functional model whose inputs are the given tensors; returns its output tensors."""
        known = {id(t): name for t, name in zip(model.inputs, inputs, strict=True)}
        calls = list(self.generation.calls(model))
        self.masks.find(calls)
        for call in calls:
            outputs = self.call(call, [known[id(t)] for t in call.inputs])
            known.update(zip(map(id, call.outputs), outputs, strict=True))
            if self.scope == _Scope():
                self.places += [(call.layer.name, *pair) for pair in zip(call.outputs, outputs, strict=True)]
        return [self._whole(known[id(t)]) for t in model.outputs]

    def _whole(self, tensor: str) -> str:
        from kquant.keras_common.read_turned import whole

        return whole(self, tensor)

    def call(self, call: Call, inputs: list[str]) -> list[str]:
        """Read one call of a layer or an operation."""
        if self.masks.makes_one(call):
            return [self.masks.named(self.aside(f"{call.layer.name}/mask", call), call)]
        before = len(self.ops)
        if (self.generation.operation(call) or ("",))[0] not in ("GetItem", "Unstack"):
            inputs = [self._whole(t) for t in inputs]
        self.masks.check(call, inputs)
        outputs = self._parts(call, inputs)
        self.masks.note(call, inputs, outputs)
        return regularized(self, call.layer, outputs, self.ops[before:])

    def _parts(self, call: Call, inputs: list[str]) -> list[str]:
        """The ops of a call."""
        from kquant.keras_common.composite import expand
        from kquant.keras_common.read_ops import read_operation

        layer = call.layer
        check_layer(self.generation, layer)
        if call.kwargs.get("training") is True and not _trains_by_default(layer):
            reason = "it is called with training=True, and the artifact computes what the model does in inference"
            return self.unknown(layer, inputs, call, reason)
        if isinstance(layer, self.generation.keras.Model):
            return self._nested(layer, inputs)
        named = self.generation.operation(call)
        if named is not None:
            return read_operation(self, call, inputs, *named)
        handler = self._handlers.get(type(layer))
        if handler is not None:
            return handler(self, layer, inputs, call)
        if id(layer) not in self._expanded:
            self._expanded[id(layer)] = expand(self.generation, call, [self.shape(t) for t in inputs])
        parts = self._expanded[id(layer)]
        if parts == "identity":
            return self.add("identity", layer, inputs, call.shapes, self.clone(layer), call=unchanged)
        if isinstance(parts, str):
            return self.unknown(layer, inputs, call, parts)
        path, mark = "/".join((*self.scope.path, layer.name)), self.mark()
        with self.inside(layer.name, (path, type(layer).__name__)):
            outputs = self.function(parts, inputs)
        if not self.asks_for_sizes(mark):
            return outputs
        self.undo(mark)
        return self.unknown(layer, inputs, call, f"it {SIZES}")

    def unknown(self, layer: Any, inputs: list[str], call: Call, reason: str) -> list[str]:
        """A layer that has no integer form; it can only stay in float."""
        return self.add("opaque", layer, inputs, call.shapes, self.again(layer, call), attrs={"reason": reason})

    def _nested(self, model: Any, inputs: list[str]) -> list[str]:
        form = self._expanded.setdefault(id(model), self.generation.functional(model))
        with self.inside(model.name):
            return self.function(form, inputs[: len(form.inputs)])  # a mask may come behind them


def without_activity_regularizer(config: dict) -> dict:
    """The config of a layer, without its activity regularizer."""
    return {**config, "activity_regularizer": None} if config.get("activity_regularizer") else config


def _handlers(generation: Generation) -> dict[type, Callable]:
    from kquant.keras_common.handlers import handlers_of

    return handlers_of(generation)


def _trains_by_default(layer: Any) -> bool:
    """Whether `training=True` is what a call means that says nothing, as with image preprocessing."""
    training = inspect.signature(layer.call).parameters.get("training")
    return training is not None and training.default is True


def _invoke_layer(layer: Any, inputs: Sequence[Any]) -> Any:
    return layer(inputs[0] if len(inputs) == 1 else list(inputs))


def read(generation: Generation, model: Any) -> Graph:
    """Read a Keras model.

    Args:
        generation: of Keras.
        model: a built model of it: Sequential, functional, nested, or subclassed and callable on symbolic inputs.

    Returns:
        The graph; weights are read when asked for, so it follows the model's training.

    Raises:
        ModelError: not a model of this generation, not built, empty, or not readable.
    """
    return traced(generation, model)[0]


def traced(generation: Generation, model: Any) -> tuple[Graph, Any, list[tuple[str, Any, str]]]:
    """As `read`; also the functional form that was walked, and for each symbolic tensor in it its layer and tensor."""
    check_model(generation, model, f"a built {generation.package}.Model ({generation.title})")
    reader = Reader(generation)
    form = generation.functional(model)
    _check_dtypes(model)
    inputs = []
    for tensor in form.inputs:
        name = reader.unique(generation.maker(tensor)[0].name)
        reader.tensors[name] = Tensor(name, generation.shape(tensor), generation.dtype(tensor))
        inputs.append(name)
    outputs = reader.function(form, inputs)
    asking = reader.asks_for_sizes((0, 0))
    if asking:
        raise UnsupportedError(
            f"layer {asking[0]!r}", f"it {SIZES}", fix="Make the array for one sample; it broadcasts"
        )
    if not reader.ops:
        raise empty(model)
    for name in inputs:
        _settle_dtype(reader, name)
    names = tuple(dict.fromkeys(_output_names(generation, form)))
    graph = Graph(
        tuple(reader.ops),
        reader.tensors,
        tuple(inputs),
        tuple(outputs),
        model.name,
        tuple(inputs),
        names if len(names) == len(outputs) else tuple(f"output_{i}" for i in range(len(outputs))),
    )
    return graph, form, reader.places


def _check_dtypes(model: Any) -> None:
    """Master weights and ranges are float32, whatever the layers compute in."""
    for layer in model._flatten_layers(include_self=False):
        if layer.weights and layer.variable_dtype != "float32":
            fix = "Build the model under the policy float32, mixed_float16 or mixed_bfloat16 and set_weights() in it"
            raise ModelError(f"layer {layer.name!r}", "variables of float32", layer.variable_dtype, fix)


def _settle_dtype(reader: Reader, name: str) -> None:
    """An input that embeddings look up holds ids, whatever its dtype in Keras; any other holds real numbers."""
    readers = [(i, op) for i, op in enumerate(reader.ops) if name in op.inputs]
    lookups = [(i, op) for i, op in readers if op.kind == "embedding"]
    is_ids = bool(lookups) and len(lookups) == len(readers)
    dtype = reader.tensors[name].dtype
    wanted = dtype if is_ids and dtype in ("int32", "int64") else "int32" if is_ids else "float32"
    reader.tensors[name] = replace(reader.tensors[name], dtype=wanted)
    for i, op in [] if is_ids else lookups:
        attrs = {"aliases": op.attrs["aliases"], "reason": f"{NOT_IDS}; give the model one for {name!r} as ids"}
        reader.ops[i] = replace(op, kind="opaque", attrs=attrs, weights={})


def _output_names(generation: Generation, form: Any) -> list[str]:
    """The names of a model's outputs: its keys, or the names of the layers of the float model that make them."""
    outputs = generation.structures(form)[1]
    if isinstance(outputs, dict):
        return list(outputs)
    made = [generation.maker(t)[0].name for t in form.outputs]
    given = list(form.output_names)  # a quantized model keeps those of the float model
    return given if given != made else [_named(generation, t) for t in form.outputs]


def _named(generation: Generation, tensor: Any) -> str:
    """The name of the layer of the float model that made a tensor: before fake quantization, with its activation."""
    layer, given = _maker(generation, tensor)
    if layer is not generation.maker(tensor)[0] and len(given) == 1:
        before, _ = _maker(generation, given[0])
        layer = before if layer.name == activation_name(before) else layer
    return str(layer.name)


def _maker(generation: Generation, tensor: Any) -> tuple[Any, Any]:
    """The layer behind the fake quantizations of a tensor, and what it was given."""
    layer, given = generation.maker(tensor)
    while isinstance(layer, generation.own.FakeQuantize):
        layer, given = generation.maker(given[0])
    return layer, given


def activation_name(layer: Any) -> str:
    """The name of the layer that the activation argument of another becomes."""
    return f"{layer.name}_activation"
