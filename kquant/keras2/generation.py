"""tf_keras as a generation of Keras: how its functional models are walked, and what its operations are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.engine.keras_tensor import KerasTensor
from tf_keras.src.layers.core.tf_op_layer import KerasOpDispatcher, SlicingOpLambda, TFOpLambda

from kquant.keras2 import symbols
from kquant.keras2._tfmot import QuantizeLayer, QuantizeWrapper
from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call, Generation
from kquant.keras_common.subclassed import from_subclass, unbuilt_sequential
from kquant.keras_common.tf_symbols import symbol_of
from kquant.keras_common.variables import as_operations


class Keras2(Generation):
    """tf_keras, which `tf.keras` is under `TF_USE_LEGACY_KERAS=1`."""

    title, package = "Keras 2", "tf_keras"
    keras, ops, tree = tf_keras, symbols.OPS, tf.nest

    def _own(self) -> Any:
        from kquant.keras2 import layers

        return layers

    @property
    def linear(self) -> dict[type, Any]:
        """The rules of the layers with a kernel."""
        from kquant.keras2.linear import LINEAR

        return LINEAR

    def calls(self, model: Any) -> Iterator[Call]:
        """The calls of a functional model in topological order, without its inputs."""
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if not node.is_input:
                    yield call_of(node)

    def functional(self, model: Any) -> Any:
        """A functional model itself, a Sequential's, or a subclassed model's."""
        if isinstance(model, tf_keras.Sequential):
            if not model.built or not model.inputs:
                raise unbuilt_sequential(model)
            return model if model._has_explicit_input_shape else _with_any_batch(model)
        if getattr(model, "_is_graph_network", False):
            return model
        specs = tf.nest.flatten(model._saved_model_inputs_spec)
        inputs = [(tuple(s.shape), s.dtype.name) for s in specs if s is not None]
        if not inputs and model._build_input_shape is not None:
            inputs = [(tuple(model._build_input_shape), "float32")]
        return from_subclass(self, model, inputs)

    def structures(self, form: Any) -> tuple[Any, Any]:
        """The nested structures of a functional model's inputs and outputs."""
        return form._nested_inputs, form._nested_outputs

    def operation(self, call: Call) -> tuple[str, Arguments] | None:
        """The name and the arguments in `keras.ops` of a TensorFlow function that became a layer."""
        return symbols.translated(call, self) if isinstance(call.layer, (TFOpLambda, SlicingOpLambda)) else None

    def copy_operation(self, operation: Any, name: str) -> Any:
        """A layer of the same function."""
        if isinstance(operation, SlicingOpLambda):
            return SlicingOpLambda(operation.function, name=name)
        return TFOpLambda(operation.function, name=name)

    def rename(self, layer: Any, name: str) -> None:
        """Give a new layer another name."""
        layer._name = name

    def maker(self, tensor: Any) -> tuple[Any, tuple[Any, ...]]:
        """The layer that gave a symbolic tensor, and the symbolic tensors it was given."""
        history = tensor._keras_history
        return history.layer, tuple(history.layer._inbound_nodes[history.node_index].keras_inputs)

    def shape(self, tensor: Any) -> tuple:
        """The shape of a symbolic tensor."""
        return tuple(tensor.shape)

    def dtype(self, tensor: Any) -> str:
        """The dtype of a symbolic tensor."""
        return tensor.dtype.name

    def is_symbolic(self, value: Any) -> bool:
        """Whether a value is a symbolic tensor."""
        return isinstance(value, KerasTensor)

    def is_variable(self, value: Any) -> bool:
        """Whether a value is a variable."""
        return isinstance(value, tf.Variable)

    def why_refused(self, layer: Any) -> tuple[str, str, str] | None:
        """Tfmot's own wrappers and quantize layers: their places and ranges are not kquant's."""
        if not isinstance(layer, (QuantizeWrapper, QuantizeLayer)) or isinstance(layer, self.own.QuantizedLayer):
            return None
        return (
            "a float model, or one that kquant quantized",
            f"a {type(layer).__name__} that tfmot placed",
            "Pass scheme=kquant.keras2.QuantizeScheme() to quantize_apply, or hand the float model to quantize_model",
        )

    def variable(self, values: np.ndarray, name: str, trainable: bool) -> Any:
        """A new float32 variable."""
        return tf.Variable(values, dtype=tf.float32, name=name, trainable=trainable)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without the warning that a weight of a copied layer is no weight of the function that reads it.

        `w * x` is an operation of the variable; by itself it would be one of the variable's value of now.
        """
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with as_operations(tf.Variable, OPERATORS, self.is_symbolic):
                yield
        finally:
            logger.setLevel(level)

    @contextmanager
    def known_sizes(self) -> Iterator[None]:
        """While `tf.shape` of a symbolic tensor whose sizes are all known is a plain array."""
        handle = KerasOpDispatcher.handle

        def handled(dispatcher: Any, op: Any, args: tuple, kwargs: dict) -> Any:
            x = args[0] if args else kwargs.get("input")
            known = isinstance(x, KerasTensor) and x.shape.is_fully_defined()
            if known and symbol_of(op) == "shape":
                return tf.constant(x.shape.as_list(), kwargs.get("out_type") or tf.int32)
            return handle(dispatcher, op, args, kwargs)

        KerasOpDispatcher.handle = handled
        try:
            yield
        finally:
            KerasOpDispatcher.handle = handle

    def known_function(self, function: Any) -> str | None:
        """The name in `keras.activations` of a function of tf_keras or of TensorFlow."""
        return symbols.known_function(function)


OPERATORS = {
    "__add__": tf.add,
    "__sub__": tf.subtract,
    "__mul__": tf.multiply,
    "__truediv__": tf.truediv,
    "__matmul__": tf.matmul,
}


def call_of(node: Any) -> Call:
    """A node of a functional model as a call."""
    outputs = tuple(tf.nest.flatten(node.outputs))
    arguments = tf.nest.flatten((tuple(node.call_args), dict(node.call_kwargs)))
    return Call(
        node.layer,
        tuple(node.call_args),
        dict(node.call_kwargs),
        tuple(a for a in arguments if isinstance(a, KerasTensor)),
        outputs,
        tuple(tuple(t.shape) for t in outputs),
        tf.nest,
    )


def _with_any_batch(model: Any) -> Any:
    """A Sequential that was built by a batch: its layers, whose input is not bound to that batch's size."""
    given = model.inputs[0]
    x = first = tf_keras.Input(batch_shape=(None, *given.shape[1:]), dtype=given.dtype, name=given.node.layer.name)
    for layer in model.layers:
        x = layer(x)
    return tf_keras.Model(first, x, name=model.name)


KERAS = Keras2()
