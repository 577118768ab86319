"""Keras 3 as a generation: how its functional models are walked, and what its operations are."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from kquant.keras3.tf_functions import FUNCTIONS
from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call, Generation
from kquant.keras_common.subclassed import from_subclass, unbuilt_sequential
from kquant.keras_common.variables import as_operations


class Keras3(Generation):
    """Keras 3 on its TensorFlow backend."""

    title, package = "Keras 3", "keras"
    keras, ops, tree = keras, keras.ops, keras.tree

    def _own(self) -> Any:
        from kquant.keras3 import layers

        return layers

    @property
    def linear(self) -> dict[type, Any]:
        """The rules of the layers with a kernel."""
        from kquant.keras3.linear import LINEAR

        return LINEAR

    def calls(self, model: Any) -> Iterator[Call]:
        """The calls of a functional model in topological order, without its inputs."""
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.operation is not None and not node.is_input:
                    yield _call(node)

    def functional(self, model: Any) -> Any:
        """A functional model itself, a Sequential's, or a subclassed model's."""
        if isinstance(model, keras.Sequential):
            if not model.built or model._functional is None:
                raise unbuilt_sequential(model)
            return model._functional
        if hasattr(model, "_nodes_by_depth"):
            return model
        shapes = getattr(model, "_build_shapes_dict", None) if model.built else None
        flat = _flat_shapes(list(shapes.values())) if shapes else None
        return from_subclass(self, model, flat and [(s, "float32") for s in flat])

    def structures(self, form: Any) -> tuple[Any, Any]:
        """The nested structures of a functional model's inputs and outputs."""
        return form._inputs_struct, form._outputs_struct

    def operation(self, call: Call) -> tuple[str, Arguments] | None:
        """The class name of an operation and its arguments: those of `call`, then what the operation holds."""
        operation = call.layer
        if isinstance(operation, keras.layers.Layer):
            return None
        bound = inspect.signature(operation.call).bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        held = {k: v for k, v in vars(operation).items() if not k.startswith("_")}
        return type(operation).__name__, Arguments({**held, **bound.arguments}, _defaults(type(operation)))

    def copy_operation(self, operation: Any, name: str) -> Any:
        """The same operation; that of the float model keeps its own nodes."""
        twin = copy.copy(operation)
        twin._inbound_nodes, twin._outbound_nodes = [], []
        twin.name = name
        return twin

    def rename(self, layer: Any, name: str) -> None:
        """Give a new layer another name."""
        layer.name = name

    def maker(self, tensor: Any) -> tuple[Any, tuple[Any, ...]]:
        """The layer or operation that gave a symbolic tensor, and the symbolic tensors it was given."""
        history = tensor._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        return history.operation, tuple(node.arguments.keras_tensors)

    def shape(self, tensor: Any) -> tuple:
        """The shape of a symbolic tensor."""
        return tuple(tensor.shape)

    def dtype(self, tensor: Any) -> str:
        """The dtype of a symbolic tensor."""
        return keras.backend.standardize_dtype(tensor.dtype)

    def is_symbolic(self, value: Any) -> bool:
        """Whether a value is a symbolic tensor."""
        return isinstance(value, keras.KerasTensor)

    def is_variable(self, value: Any) -> bool:
        """Whether a value is a variable."""
        return isinstance(value, keras.Variable)

    def variable(self, values: np.ndarray, name: str, trainable: bool) -> Any:
        """A new float32 variable."""
        return keras.Variable(values, dtype="float32", name=name, trainable=trainable)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """With `w * x` and TensorFlow's functions as operations: TensorFlow refuses symbolic tensors of Keras.

        A product with a variable is as dense as the tensor: Keras takes what does not say so for sparse.
        """
        keras.Variable.sparse = False
        try:
            with as_operations(keras.Variable, OPERATORS, self.is_symbolic), FUNCTIONS.as_operations():
                yield
        finally:
            del keras.Variable.sparse

    def known_function(self, function: Any) -> str | None:
        """The name in `keras.activations` of a function."""
        name = getattr(function, "__name__", type(function).__name__)
        return name if getattr(keras.activations, name, None) is function else None


@functools.cache
def _defaults(operation: type) -> dict[str, Any]:
    """The arguments that an operation may be made or called without, and what they then are."""
    signatures = (inspect.signature(f).parameters for f in (operation.__init__, operation.call))
    return {k: p.default for parameters in signatures for k, p in parameters.items() if p.default is not p.empty}


OPERATORS = {
    "__add__": keras.ops.add,
    "__sub__": keras.ops.subtract,
    "__mul__": keras.ops.multiply,
    "__truediv__": keras.ops.divide,
    "__matmul__": keras.ops.matmul,
}


def _call(node: Any) -> Call:
    arguments = node.arguments
    outputs = tuple(node.outputs)
    return Call(
        node.operation,
        arguments.args,
        arguments.kwargs,
        tuple(arguments.keras_tensors),
        outputs,
        tuple(tuple(t.shape) for t in outputs),
        keras.tree,
    )


def _flat_shapes(shapes: Any) -> list[tuple]:
    if isinstance(shapes, (list, tuple)) and all(s is None or isinstance(s, int) for s in shapes):
        return [tuple(shapes)]
    values = shapes.values() if isinstance(shapes, dict) else shapes
    return [flat for s in values for flat in _flat_shapes(s)]


KERAS = Keras3()
