"""Composite layers as small functional models in plain Keras, which are then read like any other.

The quantized model trains exactly these ops, so what is exported is what was trained (a normalization, for instance, is
the chain of mean, difference, square, mean, reciprocal root and product, with a quantizer behind each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kquant.keras_common.copied import set_weights
from kquant.keras_common.generation import Call, Generation
from kquant.keras_common.reader import Reader
from kquant.keras_common.subclassed import readable

Expander = Callable[[Generation, Any, list[Any], Call], Any]
EXPAND: dict[str, Expander] = {}


def expands(*names: str) -> Callable[[Expander], Expander]:
    """Enter an expander `(generation, layer, symbolic inputs, call) -> symbolic outputs, or the reason why not`."""

    def enter(function: Expander) -> Expander:
        EXPAND.update(dict.fromkeys(names, function))
        return function

    return enter


def expand(g: Generation, call: Call, shapes: Sequence[tuple]) -> Any:
    """A layer as a functional model of inputs of these shapes, or the reason why it has none."""
    layer = call.layer
    inputs = [g.input(shape, g.dtype(t)) for t, shape in zip(call.inputs, shapes, strict=True)]
    is_keras = getattr(g.layers, type(layer).__name__, None) is type(layer)
    expander = EXPAND.get(type(layer).__name__, _symbolic) if is_keras else _symbolic
    try:
        with g.quiet():
            outputs = expander(g, layer, inputs, call)
    except Exception as error:  # whatever a user's layer raises on symbolic inputs is the reason
        first = str(error).strip().splitlines()
        return f"it cannot be read op by op ({type(error).__name__}: {first[0] if first else ''})"
    if isinstance(outputs, str):
        return outputs
    return outputs if isinstance(outputs, g.keras.Model) else g.keras.Model(inputs, g.tree.flatten(outputs))


def expand_here(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Expand a layer in the middle of a handler."""
    parts = expand(r.generation, call, [r.shape(t) for t in inputs])
    if isinstance(parts, str):
        return r.unknown(layer, inputs, call, parts)
    path = "/".join((*r.scope.path, layer.name))
    with r.inside(layer.name, (path, type(layer).__name__)):
        return r.function(parts, inputs)


def twin(layer: Any, x: Any, **changes: Any) -> Any:
    """Call a copy of `layer`, with its weights, on `x`; the layer itself gets no new node."""
    copy = type(layer).from_config({**layer.get_config(), **changes})
    y = copy(x)
    set_weights(copy, layer.get_weights())
    return y


def _call(layer: Any, x: Any, weights: Sequence[Any]) -> Any:
    """Call a new layer and set its weights."""
    y = layer(x)
    layer.set_weights([np.asarray(w) for w in weights])
    return y


# -- separable convolutions -----------------------------------------------------------------------------------------


@expands("SeparableConv1D", "SeparableConv2D")
def _separable(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    one = type(layer).__name__ == "SeparableConv1D"
    depthwise = (g.layers.DepthwiseConv1D if one else g.layers.DepthwiseConv2D)(
        layer.kernel_size, strides=layer.strides, padding=layer.padding, depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate, data_format=layer.data_format, use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer, depthwise_constraint=layer.depthwise_constraint,
        name="depthwise", dtype=layer.dtype_policy, trainable=layer.trainable,
    )  # fmt: skip
    pointwise = (g.layers.Conv1D if one else g.layers.Conv2D)(
        layer.filters, 1, use_bias=layer.use_bias, activation=layer.activation, data_format=layer.data_format,
        kernel_regularizer=layer.pointwise_regularizer, kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer, bias_constraint=layer.bias_constraint,
        name="pointwise", dtype=layer.dtype_policy, trainable=layer.trainable,
    )  # fmt: skip
    x = _call(depthwise, inputs[0], [layer.depthwise_kernel])
    return _call(pointwise, x, [layer.pointwise_kernel, *([layer.bias] if layer.use_bias else [])])


# -- several layers in one ------------------------------------------------------------------------------------------


@expands("TimeDistributed")
def _time_distributed(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    """The time steps as further samples: what the layer does with one does not depend on the others."""
    x, inner = inputs[0], layer.layer
    if None in x.shape[1:]:
        return "TimeDistributed needs known sizes on the target"
    if not (isinstance(inner, g.keras.Model) or g.is_own_class(inner)):
        return "TimeDistributed is read only around Keras' own layers, and models of layers"
    y = twin(inner, g.ops.reshape(x, (-1, *x.shape[2:])))
    return g.ops.reshape(y, (-1, x.shape[1], *y.shape[1:]))


@expands("CenterCrop")
def _center_crop(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    x = inputs[0]
    _, height, width, _ = x.shape
    if getattr(layer, "data_format", "channels_last") != "channels_last" or None in (height, width):
        return "CenterCrop needs known sizes, channels last"
    if height < layer.height or width < layer.width:
        return "CenterCrop of a smaller image resizes it; use Resizing"
    top, left = (height - layer.height) // 2, (width - layer.width) // 2
    return x[:, top : top + layer.height, left : left + layer.width]


# -- merges ---------------------------------------------------------------------------------------------------------


@expands("Add", "Subtract", "Multiply", "Maximum", "Minimum")
def _chain(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    pair = getattr(g.layers, type(layer).__name__)
    total, *rest = _of_one_rank(g, inputs)
    for x in rest:
        total = pair(dtype=layer.dtype_policy)([total, x])
    return total if rest else g.layers.Identity(dtype=layer.dtype_policy)(total)


def _of_one_rank(g: Generation, inputs: list[Any]) -> list[Any]:
    """With new axes behind the batch, as Keras' merges put them, where operations would put them in front."""
    rank = max(len(x.shape) for x in inputs)
    for _ in range(rank):
        inputs = [x if len(x.shape) == rank else g.ops.expand_dims(x, 1) for x in inputs]
    return inputs


@expands("Average")
def _average(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    total = g.layers.Add(dtype=layer.dtype_policy)(inputs) if len(inputs) > 1 else inputs[0]
    return g.ops.multiply(total, 1.0 / len(inputs))


@expands("Dot")
def _dot(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    a, b = inputs
    first, second = (layer.axes, layer.axes) if isinstance(layer.axes, int) else layer.axes
    if layer.normalize:
        a, b = _normalized(g, layer, a, (first,), "first"), _normalized(g, layer, b, (second,), "second")
    letters_a = ["a", *(chr(98 + i) for i in range(len(a.shape) - 1))]
    letters_b = ["a", *(chr(110 + i) for i in range(len(b.shape) - 1))]
    letters_b[second] = letters_a[first]
    kept = [c for i, c in enumerate(letters_a) if i != first % len(letters_a)]
    kept += [c for i, c in enumerate(letters_b) if i not in (0, second % len(letters_b))]
    y = g.ops.einsum(f"{''.join(letters_a)},{''.join(letters_b)}->{''.join(kept)}", a, b)
    return g.ops.expand_dims(y, -1) if len(kept) == 1 else y


# -- normalizations -------------------------------------------------------------------------------------------------


def _affine(g: Generation, layer: Any, x: Any) -> Any:
    """The trainable gamma and beta of a normalization over the last axis."""
    scale, offset = bool(getattr(layer, "scale", False)), bool(getattr(layer, "center", False))
    if not (scale or offset):
        return x
    values = [*([layer.gamma] if scale else []), *([layer.beta] if offset else [])]
    tail = g.own.ChannelAffine(scale, offset, name="affine", dtype=layer.dtype_policy, trainable=layer.trainable)
    return _call(tail, x, values)


def _standardize(g: Generation, layer: Any, x: Any, axes: tuple[int, ...], center: bool = True) -> Any:
    centered = x - g.ops.mean(x, axis=axes, keepdims=True) if center else x
    variance = g.ops.mean(centered * centered, axis=axes, keepdims=True)
    return centered * g.own.ReciprocalRoot(layer.epsilon, name="rsqrt", dtype=layer.dtype_policy)(variance)


@expands("LayerNormalization")
def _layer_norm(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    x = inputs[0]
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if [a % len(x.shape) for a in axes] != [len(x.shape) - 1]:
        return "layer normalization must be over the last axis"
    if getattr(layer, "rms_scaling", False):  # divided by the deviation, and the mean left in
        return "layer normalization is read without rms_scaling; use RMSNormalization"
    return _affine(g, layer, _standardize(g, layer, x, (-1,)))


@expands("RMSNormalization")
def _rms_norm(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    x = inputs[0]
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if [a % len(x.shape) for a in axes] != [len(x.shape) - 1]:
        return "RMS normalization must be over the last axis"
    tail = g.own.ChannelAffine(True, False, name="affine", dtype=layer.dtype_policy)
    return _call(tail, _standardize(g, layer, x, (-1,), center=False), [layer.scale])


@expands("GroupNormalization")
def _group_norm(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    x = inputs[0]
    shape = x.shape
    if layer.axis % len(shape) != len(shape) - 1 or None in shape[1:]:
        return "group normalization must be over the last axis, of known sizes"
    groups = shape[-1] if layer.groups == -1 else layer.groups
    count = int(np.prod(shape[1:-1])) if len(shape) > 2 else 1
    grouped = g.ops.reshape(x, (-1, count, groups, shape[-1] // groups))
    y = _standardize(g, layer, grouped, (1, 3))
    return _affine(g, layer, g.ops.reshape(y, (-1, *shape[1:])))


@expands("UnitNormalization")
def _unit_norm(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    return _normalized(g, layer, inputs[0], (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis))


def _normalized(g: Generation, layer: Any, x: Any, axes: tuple[int, ...], name: str = "rsqrt") -> Any:
    """`x` divided by its norm."""
    count = int(np.prod([x.shape[a] for a in axes]))
    mean = g.ops.mean(x * x, axis=axes, keepdims=True)
    return x * g.own.ReciprocalRoot(0.0, factor=float(count), least=1e-12, name=name, dtype=layer.dtype_policy)(mean)


# -- anything else --------------------------------------------------------------------------------------------------


@expands("Lambda")
def _lambda(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    args, _ = call.fill(inputs)
    return layer.function(*args, **(layer.arguments or {}))


NO_INTEGER = {
    "Masking": "it makes a mask of its input's values, and the artifact has none",
    "LSTM": "the stock int8 LSTM kernel quantizes its internal state on scales that a trained model does not have",
    "GRU": "the target has no GRU kernel",
    "SimpleRNN": "a recurrent loop has no integer kernel on the target",
    "Conv3D": "the target's CONV_3D kernel is float only",
    "Conv3DTranspose": "the target's CONV_3D_TRANSPOSE kernel is float only",
    "MaxPooling3D": "the target has no 3-D pooling kernel",
    "AveragePooling3D": "the target has no 3-D pooling kernel",
}


def _loops(layer: Any) -> str:
    """What a recurrent layer needs beside its exclusion."""
    rolled = getattr(getattr(layer, "forward_layer", layer), "unroll", None) is False
    return "; left in float it must be built with unroll=True, because the file holds no loop" if rolled else ""


def _only_named_anew(g: Generation, layer: Any) -> type | None:
    """The class of Keras' own whose calls a user's class leaves as they are: it has other defaults, or another name."""
    base = next((c for c in type(layer).__mro__ if c.__module__.startswith(f"{g.package}.src.layers")), None)
    known = base is not None and getattr(g.layers, base.__name__, None) is base and base is not g.layers.Layer
    same = known and all(getattr(base, m, None) is getattr(type(layer), m, None) for m in ("call", "convolution_op"))
    return base if same else None


def _symbolic(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    """A user's own layer: a copy of it called on symbolic inputs shows its ops."""
    if g.is_own_class(layer):
        name = type(layer).__name__
        return NO_INTEGER.get(name, f"{name} has no integer form on the target") + _loops(layer)
    args, kwargs = call.fill(inputs)
    base = _only_named_anew(g, layer)
    if base is not None:
        plain = base.from_config(base.get_config(layer))
        y = plain(*args, **kwargs)
        set_weights(plain, layer.get_weights())
        return y
    try:
        copy = type(layer).from_config(layer.get_config())
        copy(*args, **kwargs)
        set_weights(copy, layer.get_weights())
    except Exception:  # a class that does not say how it is made again
        copy = layer

    def run(values: Sequence[Any]) -> Any:
        args, kwargs = call.fill(values)
        return copy.call(*args, **kwargs)

    return readable(g, copy, run, inputs)
