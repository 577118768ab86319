"""Composite layers as small functional models in plain Keras, which are then read like any other.

The quantized model trains exactly these ops, so what is exported is what was trained (a normalization, for instance, is
the chain of mean, difference, square, mean, reciprocal root and product, with a quantizer behind each).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops, tree

from kquant.keras3.norms import ChannelAffine, ReciprocalRoot, ScaledSoftmax
from kquant.keras3.read import Reader

Expander = Callable[[Any, list[Any], Any], Any]
EXPAND: dict[type, Expander] = {}


def expands(*classes: type) -> Callable[[Expander], Expander]:
    """Enter an expander `(layer, symbolic inputs, node) -> symbolic outputs, or the reason why not`."""

    def enter(function: Expander) -> Expander:
        EXPAND.update(dict.fromkeys(classes, function))
        return function

    return enter


def expand(layer: Any, shapes: Sequence[Any], node: Any) -> keras.Model | str:
    """A layer as a functional model, or the reason why it has none."""
    dtypes = [keras.backend.standardize_dtype(t.dtype) for t in node.arguments.keras_tensors]
    inputs = [keras.Input(batch_shape=s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    expander = EXPAND.get(type(layer), _symbolic)
    try:
        outputs = expander(layer, inputs, node)
    except Exception as error:  # whatever a user's layer raises on symbolic inputs is the reason
        first = str(error).strip().splitlines()
        return f"it cannot be read op by op ({type(error).__name__}: {first[0] if first else ''})"
    if isinstance(outputs, str):
        return outputs
    return keras.Model(inputs, tree.flatten(outputs))


def expand_here(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Expand a layer in the middle of a handler."""
    parts = expand(layer, [t.shape for t in node.arguments.keras_tensors], node)
    if isinstance(parts, str):
        return r.unknown(layer, inputs, node, parts)
    path = "/".join((*r.scope.path, layer.name))
    with r.inside(layer.name, (path, type(layer).__name__)):
        return r.function(parts, inputs)


def twin(layer: Any, x: Any, **changes: Any) -> Any:
    """Call a copy of `layer`, with its weights, on `x`; the layer itself gets no new node."""
    copy = type(layer).from_config({**layer.get_config(), **changes})
    y = copy(x)
    copy.set_weights(layer.get_weights())
    return y


def _call(layer: Any, x: Any, weights: Sequence[Any]) -> Any:
    """Call a new layer and set its weights."""
    y = layer(x)
    layer.set_weights([np.asarray(w) for w in weights])
    return y


# -- separable convolutions -----------------------------------------------------------------------------------------


@expands(layers.SeparableConv1D, layers.SeparableConv2D)
def _separable(layer: Any, inputs: list[Any], node: Any) -> Any:
    one = isinstance(layer, layers.SeparableConv1D)
    depthwise = (layers.DepthwiseConv1D if one else layers.DepthwiseConv2D)(
        layer.kernel_size, strides=layer.strides, padding=layer.padding, depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate, data_format=layer.data_format, use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer, depthwise_constraint=layer.depthwise_constraint,
        name="depthwise", dtype=layer.dtype_policy, trainable=layer.trainable,
    )  # fmt: skip
    pointwise = (layers.Conv1D if one else layers.Conv2D)(
        layer.filters, 1, use_bias=layer.use_bias, activation=layer.activation, data_format=layer.data_format,
        kernel_regularizer=layer.pointwise_regularizer, kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer, bias_constraint=layer.bias_constraint,
        name="pointwise", dtype=layer.dtype_policy, trainable=layer.trainable,
    )  # fmt: skip
    x = _call(depthwise, inputs[0], [layer.depthwise_kernel])
    return _call(pointwise, x, [layer.pointwise_kernel, *([layer.bias] if layer.use_bias else [])])


# -- merges ---------------------------------------------------------------------------------------------------------


def _chain(pair: Callable) -> Expander:
    def expander(layer: Any, inputs: list[Any], node: Any) -> Any:
        total = inputs[0]
        for x in inputs[1:]:
            total = pair(total, x)
        return total if len(inputs) > 1 else layers.Identity()(total)

    return expander


EXPAND[layers.Add] = _chain(lambda a, b: layers.Add()([a, b]))
EXPAND[layers.Multiply] = _chain(lambda a, b: layers.Multiply()([a, b]))
EXPAND[layers.Maximum] = _chain(lambda a, b: layers.Maximum()([a, b]))
EXPAND[layers.Minimum] = _chain(lambda a, b: layers.Minimum()([a, b]))


@expands(layers.Average)
def _average(layer: Any, inputs: list[Any], node: Any) -> Any:
    return ops.multiply(EXPAND[layers.Add](layer, inputs, node), 1.0 / len(inputs))


@expands(layers.Dot)
def _dot(layer: Any, inputs: list[Any], node: Any) -> Any:
    a, b = inputs
    if layer.normalize:
        return "Dot with normalize=True is not read; normalize with UnitNormalization before it"
    first, second = (layer.axes, layer.axes) if isinstance(layer.axes, int) else layer.axes
    letters_a = ["a", *(chr(98 + i) for i in range(len(a.shape) - 1))]
    letters_b = ["a", *(chr(110 + i) for i in range(len(b.shape) - 1))]
    letters_b[second] = letters_a[first]
    kept = [c for i, c in enumerate(letters_a) if i != first % len(letters_a)]
    kept += [c for i, c in enumerate(letters_b) if i not in (0, second % len(letters_b))]
    y = ops.einsum(f"{''.join(letters_a)},{''.join(letters_b)}->{''.join(kept)}", a, b)
    return ops.expand_dims(y, -1) if len(kept) == 1 else y


# -- normalizations -------------------------------------------------------------------------------------------------


def _affine(layer: Any, x: Any) -> Any:
    """The trainable gamma and beta of a normalization over the last axis."""
    scale, offset = bool(getattr(layer, "scale", False)), bool(getattr(layer, "center", False))
    if not (scale or offset):
        return x
    values = [*([layer.gamma] if scale else []), *([layer.beta] if offset else [])]
    tail = ChannelAffine(scale, offset, name="affine", dtype=layer.dtype_policy, trainable=layer.trainable)
    return _call(tail, x, values)


def _standardize(x: Any, axes: tuple[int, ...], epsilon: float, center: bool = True) -> Any:
    centered = x - ops.mean(x, axis=axes, keepdims=True) if center else x
    variance = ops.mean(centered * centered, axis=axes, keepdims=True)
    return centered * ReciprocalRoot(epsilon, name="rsqrt")(variance)


@expands(layers.LayerNormalization)
def _layer_norm(layer: Any, inputs: list[Any], node: Any) -> Any:
    x = inputs[0]
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if [a % len(x.shape) for a in axes] != [len(x.shape) - 1]:
        return "layer normalization must be over the last axis"
    return _affine(layer, _standardize(x, (-1,), layer.epsilon))


@expands(layers.RMSNormalization)
def _rms_norm(layer: Any, inputs: list[Any], node: Any) -> Any:
    x = inputs[0]
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if [a % len(x.shape) for a in axes] != [len(x.shape) - 1]:
        return "RMS normalization must be over the last axis"
    tail = ChannelAffine(True, False, name="affine", dtype=layer.dtype_policy)
    return _call(tail, _standardize(x, (-1,), layer.epsilon, center=False), [layer.scale])


@expands(layers.GroupNormalization)
def _group_norm(layer: Any, inputs: list[Any], node: Any) -> Any:
    x = inputs[0]
    shape = x.shape
    if layer.axis % len(shape) != len(shape) - 1 or None in shape[1:]:
        return "group normalization must be over the last axis, of known sizes"
    groups = shape[-1] if layer.groups == -1 else layer.groups
    count = int(np.prod(shape[1:-1])) if len(shape) > 2 else 1
    grouped = ops.reshape(x, (-1, count, groups, shape[-1] // groups))
    y = _standardize(grouped, (1, 3), layer.epsilon)
    return _affine(layer, ops.reshape(y, (-1, *shape[1:])))


@expands(layers.UnitNormalization)
def _unit_norm(layer: Any, inputs: list[Any], node: Any) -> Any:
    axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    x = inputs[0]
    count = int(np.prod([x.shape[a] for a in axes]))
    mean = ops.mean(x * x, axis=axes, keepdims=True)
    return x * ReciprocalRoot(0.0, factor=float(count), least=1e-12, name="rsqrt")(mean)


# -- attention ------------------------------------------------------------------------------------------------------


@expands(layers.MultiHeadAttention)
def _attention(layer: Any, inputs: list[Any], node: Any) -> Any:
    bound = inspect.signature(layer.call).bind(*node.arguments.args, **node.arguments.kwargs).arguments
    masks = [k for k in ("query_mask", "value_mask", "key_mask", "attention_mask") if bound.get(k) is not None]
    if masks or bound.get("use_causal_mask") or bound.get("return_attention_scores"):
        return "attention with masks or returned scores has no integer form"
    table = {id(t): x for t, x in zip(node.arguments.keras_tensors, inputs, strict=True)}
    query, value = table[id(bound["query"])], table[id(bound["value"])]
    key = table[id(bound["key"])] if bound.get("key") is not None else value
    if len(query.shape) != 3 or len(layer._attention_axes) != 1:
        return "attention must be over one axis of (batch, length, features)"
    q = ops.transpose(twin(layer._query_dense, query), (0, 2, 1, 3))
    k = ops.transpose(twin(layer._key_dense, key), (0, 2, 3, 1))
    v = ops.transpose(twin(layer._value_dense, value), (0, 2, 1, 3))
    scores = ScaledSoftmax(float(layer._inverse_sqrt_key_dim), name="scores")(ops.matmul(q, k))
    if layer._dropout:
        scores = layers.Dropout(layer._dropout, name="dropout")(scores)
    return twin(layer._output_dense, ops.transpose(ops.matmul(scores, v), (0, 2, 1, 3)))


# -- anything else --------------------------------------------------------------------------------------------------


@expands(layers.Lambda)
def _lambda(layer: Any, inputs: list[Any], node: Any) -> Any:
    args, _ = node.arguments.fill_in({id(t): x for t, x in zip(node.arguments.keras_tensors, inputs, strict=True)})
    return layer.function(*args, **(layer.arguments or {}))


NO_INTEGER = {
    layers.LSTM: "the stock int8 LSTM kernel quantizes its internal state on scales that a trained model does not have",
    layers.GRU: "the target has no GRU kernel",
    layers.SimpleRNN: "a recurrent loop has no integer kernel on the target",
    layers.Conv3D: "the target's CONV_3D kernel is float only",
    layers.Conv3DTranspose: "the target's CONV_3D_TRANSPOSE kernel is float only",
    layers.MaxPooling3D: "the target has no 3-D pooling kernel",
    layers.AveragePooling3D: "the target has no 3-D pooling kernel",
}


def _symbolic(layer: Any, inputs: list[Any], node: Any) -> Any:
    """A user's own layer: a copy of it called on symbolic inputs shows its ops."""
    if type(layer) in NO_INTEGER:
        return NO_INTEGER[type(layer)]
    if type(layer).__module__.startswith("keras.src.layers"):
        return f"{type(layer).__name__} has no integer form on the target"
    table = {id(t): x for t, x in zip(node.arguments.keras_tensors, inputs, strict=True)}
    args, kwargs = node.arguments.fill_in(table)
    copy = type(layer).from_config(layer.get_config())
    copy(*args, **kwargs)
    copy.set_weights(layer.get_weights())
    outputs = copy.call(*args, **kwargs)
    if any(y is x for y in tree.flatten(outputs) for x in inputs):
        return "identity"
    return outputs
