"""Read a Keras 3 model into the neutral graph.

Functional, Sequential and nested models are walked node by node; composite and subclassed ones are first rewritten as
small functional models in plain Keras (`kquant.keras3.composite`) and walked the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import tree

from kquant.core.errors import ModelError
from kquant.core.graph import Graph, Op, Tensor, Weight


@dataclass(frozen=True)
class Source:
    """How to make an op again in the quantized model.

    Args:
        key: ops with the same key are calls of one layer.
        build: makes the layer or operation.
        weights: the values to set on a built layer, or None.
        invoke: (layer or operation, inputs) -> output or outputs.
        name: the name that the layer or operation had in the float model.
    """

    key: Any
    build: Callable[[], Any]
    weights: Callable[[], list[np.ndarray]] | None
    invoke: Callable[[Any, Sequence[Any]], Any]
    name: str = ""


@dataclass
class _Scope:
    """Where the walk is: the path of enclosing models, and the composite layer being expanded, if any."""

    path: tuple[str, ...] = ()
    composite: tuple[str, str] | None = None  # (path, type name)


class Reader:
    """Walks a model and collects the ops of its graph."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.scope = _Scope()
        self._ids: Counter[str] = Counter()
        self._expanded: dict[Any, keras.Model] = {}

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

    def unique(self, name: str) -> str:
        """`name`, with `#2`, `#3` ... when it was used before."""
        self._ids[name] += 1
        return name if self._ids[name] == 1 else f"{name}#{self._ids[name]}"

    def shape(self, tensor: str) -> tuple:
        """The shape of a tensor that was read."""
        return self.tensors[tensor].shape

    def clone(self, layer: Any, **changes: Any) -> Source:
        """A source that makes `layer` again with some of its config changed, and its weights."""

        def build() -> Any:
            return type(layer).from_config({**layer.get_config(), **changes})

        return Source(id(layer), build, layer.get_weights, _invoke_layer, layer.name)

    def operation(self, operation: Any, node: Any) -> Source:
        """A source that calls the same stateless operation with the node's other arguments."""

        def invoke(op: Any, inputs: Sequence[Any]) -> Any:
            return op(*_fill(node, inputs)[0], **_fill(node, inputs)[1])

        return Source(id(operation), lambda: operation, None, invoke, operation.name)

    @contextmanager
    def inside(self, name: str, composite: tuple[str, str] | None = None) -> Any:
        """Walk inside a nested model, or the parts of a composite layer."""
        before = self.scope
        own = composite or before.composite
        self.scope = _Scope((*before.path, name), own)
        yield
        self.scope = before

    # -- the walk -------------------------------------------------------------------------------------------------

    @staticmethod
    def _caller(source: Source, layer: Any) -> Callable:
        def call(inputs: Sequence[Any], float_weights: bool = False) -> list[Any]:
            return tree.flatten(source.invoke(layer, inputs))

        return call

    def function(self, model: Any, inputs: Sequence[str]) -> list[str]:
        """Walk a functional model whose inputs are the given tensors; returns its output tensors."""
        known = {id(t): name for t, name in zip(model.inputs, inputs, strict=True)}
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.operation is None or node.is_input:
                    continue
                outputs = self.node(node, [known[id(t)] for t in node.arguments.keras_tensors])
                known.update(zip(map(id, node.outputs), outputs, strict=True))
        return [known[id(t)] for t in model.outputs]

    def node(self, node: Any, inputs: list[str]) -> list[str]:
        """Read one call of a layer or an operation."""
        from kquant.keras3 import read_layers, read_linear  # noqa: F401  they enter their handlers
        from kquant.keras3.composite import expand
        from kquant.keras3.handlers import LAYERS
        from kquant.keras3.read_ops import read_operation

        layer = node.operation
        if isinstance(layer, keras.Model):
            return self._nested(layer, inputs)
        if not isinstance(layer, keras.layers.Layer):
            return read_operation(self, node, inputs)
        handler = LAYERS.get(type(layer))
        if handler is not None:
            return handler(self, layer, inputs, node)
        if id(layer) not in self._expanded:
            self._expanded[id(layer)] = expand(layer, [t.shape for t in node.arguments.keras_tensors], node)
        parts = self._expanded[id(layer)]
        if parts == "identity":
            from kquant.keras3.read_layers import unchanged

            shapes = [t.shape for t in node.outputs]
            return self.add("identity", layer, inputs, shapes, self.clone(layer), call=unchanged)
        if isinstance(parts, str):
            return self.unknown(layer, inputs, node, parts)
        path = "/".join((*self.scope.path, layer.name))
        with self.inside(layer.name, (path, type(layer).__name__)):
            return self.function(parts, inputs)

    def unknown(self, layer: Any, inputs: list[str], node: Any, reason: str) -> list[str]:
        """A layer that has no integer form; it can only stay in float."""
        base = self.clone(layer)
        source = Source(base.key, base.build, base.weights, _node_invoke(node), layer.name)
        shapes = [t.shape for t in node.outputs]
        return self.add("opaque", layer, inputs, shapes, source, attrs={"reason": reason})

    def _nested(self, model: Any, inputs: list[str]) -> list[str]:
        if not hasattr(model, "_nodes_by_depth"):
            model = self._expanded.setdefault(id(model), functional(model))
        if isinstance(model, keras.Sequential):
            name, model = model.name, model._functional
            with self.inside(name):
                return self.function(model, inputs)
        with self.inside(model.name):
            return self.function(model, inputs)


def _invoke_layer(layer: Any, inputs: Sequence[Any]) -> Any:
    return layer(inputs[0] if len(inputs) == 1 else list(inputs))


def _fill(node: Any, inputs: Sequence[Any]) -> tuple:
    table = {id(t): x for t, x in zip(node.arguments.keras_tensors, inputs, strict=True)}
    return node.arguments.fill_in(table)


def _node_invoke(node: Any) -> Callable:
    def invoke(layer: Any, inputs: Sequence[Any]) -> Any:
        args, kwargs = _fill(node, inputs)
        return layer(*args, **kwargs)

    return invoke


def functional(model: Any) -> Any:
    """The functional form of a model: itself, a Sequential's, or a subclassed model called on symbolic inputs.

    Raises:
        ModelError: a model that is not built, is empty, or cannot be called on symbolic inputs.
    """
    if isinstance(model, keras.Sequential):
        if not model.built or model._functional is None:
            raise ModelError(
                f"model {model.name!r}",
                "it must be built before it is quantized",
                "a Sequential without input shape",
                "Add a keras.Input as first layer, or call the model on a batch once",
            )
        return model._functional
    if hasattr(model, "_nodes_by_depth"):
        return model
    shapes = getattr(model, "_build_shapes_dict", None)
    if not model.built or not shapes:
        raise ModelError(
            f"model {model.name!r}",
            "it must be built before it is quantized",
            "a subclassed model never called",
            "Call the model on a batch once; its call() must also work on symbolic inputs",
        )
    symbolic = [keras.Input(batch_shape=(None, *s[1:])) for s in _flat_shapes(list(shapes.values()))]
    try:
        outputs = model.call(symbolic[0] if len(symbolic) == 1 else symbolic)
        return keras.Model(symbolic, outputs, name=model.name)
    except Exception as error:
        raise ModelError(
            f"model {model.name!r}",
            "a subclassed model must be callable on symbolic inputs (no Python control flow on values, "
            "keras.ops or layers only)",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "Write it with the functional API, or quantize the parts",
        ) from error


def _flat_shapes(shapes: Any) -> list[tuple]:
    if isinstance(shapes, (list, tuple)) and all(s is None or isinstance(s, int) for s in shapes):
        return [tuple(shapes)]
    values = shapes.values() if isinstance(shapes, dict) else shapes
    return [flat for s in values for flat in _flat_shapes(s)]


def read(model: Any) -> Graph:
    """Read a Keras 3 model.

    Args:
        model: a built `keras.Model`: Sequential, functional, nested, or subclassed and callable on symbolic inputs.

    Returns:
        The graph; weights are read when asked for, so it follows the model's training.

    Raises:
        ModelError: not a Keras 3 model, not built, empty, or not readable.
    """
    if not isinstance(model, keras.Model):
        raise ModelError("model", "a built keras.Model (Keras 3)", type(model).__name__)
    reader = Reader()
    form = functional(model)
    inputs = []
    for tensor in form.inputs:
        name = reader.unique(tensor.name)
        reader.tensors[name] = Tensor(name, tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype))
        inputs.append(name)
    outputs = reader.function(form, inputs)
    if not reader.ops:
        raise ModelError(f"model {model.name!r}", "a model with at least one layer", "an empty model")
    _numbers_are_float(reader, inputs)
    names = tuple(dict.fromkeys(_output_names(form)))
    return Graph(
        tuple(reader.ops),
        reader.tensors,
        tuple(inputs),
        tuple(outputs),
        model.name,
        tuple(inputs),
        names if len(names) == len(outputs) else tuple(f"output_{i}" for i in range(len(outputs))),
    )


def _numbers_are_float(reader: Reader, inputs: list[str]) -> None:
    """An integer input that no embedding looks up holds numbers (pixels), which the artifact takes as real values."""
    ids = {t for op in reader.ops if op.kind in ("embedding", "gather") for t in op.inputs}
    for name in inputs:
        if name not in ids and reader.tensors[name].dtype != "float32":
            reader.tensors[name] = replace(reader.tensors[name], dtype="float32")


def _output_names(form: Any) -> list[str]:
    if isinstance(form._outputs_struct, dict):
        return list(form._outputs_struct)
    return [_named(t).name for t in form.outputs]


def _named(tensor: Any) -> Any:
    """The layer that made a tensor, before any fake quantization."""
    operation = tensor._keras_history.operation
    while type(operation).__name__ == "FakeQuantize":
        node = operation._inbound_nodes[tensor._keras_history.node_index]
        (tensor,) = node.arguments.keras_tensors
        operation = tensor._keras_history.operation
    return operation
