"""How each Keras 3 layer class is read: one handler a class, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from kquant.core.graph import Weight
from kquant.keras3.handlers import LAYERS, Handler, reads
from kquant.keras3.layers import FakeQuantize
from kquant.keras3.norms import BatchNormalization, ChannelAffine, ReciprocalRoot, ScaledSoftmax, norm_affine
from kquant.keras3.read import Reader, Source, _node_invoke


def not_channels_last(layer: Any) -> str | None:
    """Why a layer that is not channels-last has no integer form."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "the target's kernels are channels-last, and the layer has data_format='channels_first'"
    return None


# -- per-channel scale and offset -----------------------------------------------------------------------------------


@reads(layers.BatchNormalization, BatchNormalization)
def read_batch_norm(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Batch norm with its moving statistics: a scale and an offset per channel."""
    rank = len(r.shape(inputs[0]))
    if layer.axis % rank != rank - 1 or getattr(layer, "renorm", False):
        return r.unknown(layer, inputs, node, "batch norm must normalize the last axis, without renorm")

    def affine() -> tuple[np.ndarray, np.ndarray]:
        return norm_affine(layer, layer.moving_mean, layer.moving_variance)

    size = (int(layer.moving_mean.shape[0]),)
    weights = {"scale": Weight(size, lambda: affine()[0]), "offset": Weight(size, lambda: affine()[1])}
    source = r.clone(layer)
    attrs = {"batch_norm": layer} if isinstance(layer, BatchNormalization) else {}
    if type(layer) is layers.BatchNormalization:

        def build() -> Any:
            return BatchNormalization.from_config(layer.get_config())

        source = Source(source.key, build, layer.get_weights, source.invoke, layer.name)
    return r.add("channel_affine", layer, inputs, [node.outputs[0].shape], source, attrs=attrs, weights=weights)


@reads(ChannelAffine)
def read_channel_affine(r: Reader, layer: ChannelAffine, inputs: list[str], node: Any) -> list[str]:
    """Our own scale and offset per channel."""
    size = r.shape(inputs[0])[-1]
    weights = {
        "scale": Weight((size,), lambda: layer.values(size)[0]),
        "offset": Weight((size,), lambda: layer.values(size)[1]),
    }
    return r.add("channel_affine", layer, inputs, [node.outputs[0].shape], r.clone(layer), weights=weights)


@reads(layers.Rescaling)
def read_rescaling(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """`x * scale + offset`."""
    size = r.shape(inputs[0])[-1]
    return _constant_affine(r, layer, inputs, node, np.broadcast_to(layer.scale, (size,)), layer.offset)


@reads(layers.Normalization)
def read_normalization(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """`(x - mean) / max(sqrt(variance), epsilon)`, or its inverse."""
    mean, variance = np.asarray(layer.mean), np.asarray(layer.variance)
    sigma = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if mean.size != 1 and mean.shape[-1] != mean.size:
        return r.unknown(layer, inputs, node, "normalization must keep one mean per channel of the last axis")
    if layer.invert:
        return _constant_affine(r, layer, inputs, node, sigma.ravel(), mean.ravel())
    return _constant_affine(r, layer, inputs, node, (1 / sigma).ravel(), (-mean / sigma).ravel())


def _constant_affine(r: Reader, layer: Any, inputs: list[str], node: Any, scale: Any, offset: Any) -> list[str]:
    size = r.shape(inputs[0])[-1]
    if size is None:
        return r.unknown(layer, inputs, node, "the number of channels must be known")
    scale = np.broadcast_to(np.asarray(scale, np.float64), (size,))
    offset = np.broadcast_to(np.asarray(offset, np.float64), (size,))
    weights = {"scale": Weight((size,), lambda: scale), "offset": Weight((size,), lambda: offset)}
    return r.add("channel_affine", layer, inputs, [node.outputs[0].shape], r.clone(layer), weights=weights)


# -- markers of a quantized model -----------------------------------------------------------------------------------


@reads(FakeQuantize)
def read_fake_quantize(r: Reader, layer: FakeQuantize, inputs: list[str], node: Any) -> list[str]:
    """A fake quantization: the marker of a quantized tensor."""
    site = node.arguments.kwargs.get("site")
    boundary = bool(node.arguments.kwargs.get("boundary"))
    base = r.clone(layer)
    source = Source(base.key, base.build, base.weights, _node_invoke(node), layer.name)
    unit = layer.fixed == [0.0, 1.0]  # DoReFa's range
    attrs = {
        "spec": layer.name,
        "site": site,
        "quantizer": layer,
        "unit": unit,
        "boundary": boundary,
        "is_waiting": layer.is_waiting,
    }
    return r.add("fake_quant", layer, inputs, [node.outputs[0].shape], source, attrs=attrs)


# -- activations ----------------------------------------------------------------------------------------------------


def activation(r: Reader, layer: Any, function: Any, inputs: list[str]) -> list[str]:
    """The activation argument of a layer, as an op after it."""
    from kquant.keras3.functions import function_kind

    kind, attrs = function_kind(function)
    name = f"{layer.name}_activation"

    def build() -> Any:
        return layers.Activation(function, name=name, dtype=layer.dtype_policy)

    source = Source((id(layer), "activation"), build, None, lambda new, values: new(values[0]), name)
    shapes = [r.shape(inputs[0])]
    return r.add(kind, layer, inputs, shapes, source, attrs=attrs, suffix="_activation", call=_calls(function))


def _calls(function: Any) -> Callable:
    return lambda values, float_weights=False: [function(keras.ops.convert_to_tensor(values[0]))]


@reads(layers.Activation)
def read_activation(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """`Activation(fn)`."""
    from kquant.keras3.functions import function_kind

    kind, attrs = function_kind(layer.activation)
    if "reason" in attrs:
        return r.unknown(layer, inputs, node, attrs["reason"])

    def build() -> Any:  # not through its config: a lambda does not survive that
        return layers.Activation(layer.activation, name=layer.name, dtype=layer.dtype_policy)

    source = Source(id(layer), build, None, lambda new, values: new(values[0]), layer.name)
    return r.add(kind, layer, inputs, [node.outputs[0].shape], source, attrs=attrs)


def _unary(r: Reader, layer: Any, inputs: list[str], node: Any, kind: str, attrs: dict) -> list[str]:
    if "reason" in attrs:
        return r.unknown(layer, inputs, node, attrs["reason"])
    return r.add(kind, layer, inputs, [node.outputs[0].shape], r.clone(layer), attrs=attrs)


@reads(layers.Lambda)
def read_lambda(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """A function of the user's: a table if it is elementwise, else read op by op."""
    from kquant.keras3.composite import expand_here
    from kquant.keras3.functions import function_kind

    kind, attrs = function_kind(layer.function)
    if kind == "opaque" or len(inputs) != 1:
        return expand_here(r, layer, inputs, node)

    def build() -> Any:
        return layers.Lambda(layer.function, layer._output_shape, arguments=layer.arguments, dtype=layer.dtype_policy)

    source = Source(id(layer), build, None, lambda new, values: new(values[0]), layer.name)
    return r.add(kind, layer, inputs, [node.outputs[0].shape], source, attrs=attrs)


@reads(layers.ReLU)
def read_relu(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """ReLU with an upper limit; a slope or a threshold makes it a general function."""
    if layer.negative_slope or layer.threshold:
        return _unary(r, layer, inputs, node, "elementwise", {"fn": "leaky"})
    limit = None if layer.max_value is None else float(layer.max_value)
    return _unary(r, layer, inputs, node, "relu", {"max": limit, "fn": "relu"})


@reads(layers.LeakyReLU)
def read_leaky(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Leaky ReLU."""
    return _unary(r, layer, inputs, node, "elementwise", {"fn": "leaky_relu", "alpha": float(layer.negative_slope)})


@reads(layers.ELU)
def read_elu(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """ELU."""
    return _unary(r, layer, inputs, node, "elementwise", {"fn": "elu" if layer.alpha == 1 else "scaled elu"})


@reads(layers.Softmax)
def read_softmax(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Softmax over one axis."""
    if len(inputs) > 1 or not isinstance(layer.axis, int):
        return r.unknown(layer, inputs, node, "softmax over one axis and without a mask has a kernel, this has not")
    return _unary(r, layer, inputs, node, "softmax", {"axis": layer.axis})


# -- identity in the artifact ---------------------------------------------------------------------------------------

IDENTITY = (
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout", "GaussianDropout",
    "GaussianNoise", "ActivityRegularization", "Identity", "RandomFlip", "RandomRotation", "RandomZoom",
    "RandomTranslation", "RandomContrast", "RandomBrightness", "RandomErasing", "RandomHue", "RandomSaturation",
    "RandomSharpness", "RandomShear", "RandomPerspective", "RandomColorJitter", "RandomGrayscale",
    "RandomGaussianBlur", "RandomInvert", "RandomPosterization", "RandomColorDegeneration", "RandomElasticTransform",
)  # fmt: skip


@reads(*(getattr(layers, name) for name in IDENTITY if hasattr(layers, name)))
def read_identity(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Layers that act in training only."""
    return r.add("identity", layer, inputs, [node.outputs[0].shape], r.clone(layer), call=unchanged)


def unchanged(values: Any, float_weights: bool = False) -> list[Any]:
    """What an identity op computes in inference; augmentation layers called alone would augment."""
    return [values[0]]


# -- arithmetic, shapes, pools --------------------------------------------------------------------------------------

MERGE = {
    layers.Add: "add",
    layers.Multiply: "mul",
    layers.Maximum: "maximum",
    layers.Minimum: "minimum",
}


@reads(*MERGE)
def read_merge(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Merges of two tensors; more are a chain and come back through `composite`."""
    from kquant.keras3.composite import expand_here

    if len(inputs) != 2:
        return expand_here(r, layer, inputs, node)
    return r.add(MERGE[type(layer)], layer, inputs, [node.outputs[0].shape], r.clone(layer))


@reads(layers.Subtract)
def read_subtract(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """`a - b`."""
    return r.add("sub", layer, inputs, [node.outputs[0].shape], r.clone(layer))


@reads(layers.Concatenate)
def read_concatenate(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Concatenation of any arity."""
    axis = layer.axis % len(r.shape(inputs[0]))
    return r.add("concat", layer, inputs, [node.outputs[0].shape], r.clone(layer), attrs={"axis": axis})


def _shape_op(kind: str, attrs: Callable[[Any, tuple], dict] = lambda layer, shape: {}) -> Handler:
    def handler(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
        reason = not_channels_last(layer)
        found = attrs(layer, r.shape(inputs[0]))
        if reason or "reason" in found:
            return r.unknown(layer, inputs, node, reason or found["reason"])
        return r.add(kind, layer, inputs, [node.outputs[0].shape], r.clone(layer), attrs=found)

    return handler


def _pool(layer: Any, shape: tuple) -> dict:
    return {
        "pool": tuple(layer.pool_size),
        "strides": tuple(layer.strides),
        "padding": layer.padding,
        "rank": len(layer.pool_size),
    }


def _spatial(layer: Any, shape: tuple) -> dict:
    return {"axes": tuple(range(1, len(shape) - 1)), "keepdims": bool(layer.keepdims)}


def _pairs(value: Any) -> list[tuple[int, int]]:
    value = value if isinstance(value[0], (tuple, list)) else [value]
    return [tuple(v) for v in value]


def _padding(layer: Any, shape: tuple) -> dict:
    return {"paddings": ((0, 0), *_pairs(layer.padding), (0, 0))}


def _cropping(layer: Any, shape: tuple) -> dict:
    begin, end = [0], [None]
    for low, high in _pairs(layer.cropping):
        begin.append(low)
        end.append(-high or None)
    return {"begin": (*begin, 0), "end": (*end, None), "strides": (1,) * len(shape)}


def _upsampling(layer: Any, shape: tuple) -> dict:
    size = layer.size if isinstance(layer.size, (tuple, list)) else (layer.size,)
    return {"rank": len(size)}


def _resizing(layer: Any, shape: tuple) -> dict:
    if layer.crop_to_aspect_ratio or getattr(layer, "pad_to_aspect_ratio", False) or getattr(layer, "antialias", False):
        return {"reason": "resizing with aspect ratio or antialias has no kernel"}
    return {"rank": 2}


LAYERS[layers.MaxPooling1D] = LAYERS[layers.MaxPooling2D] = _shape_op("max_pool2d", _pool)


@reads(layers.AveragePooling1D, layers.AveragePooling2D)
def read_average_pool(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """A windowed average; one window over everything is a mean, which has a range of its own."""
    shape, output = r.shape(inputs[0]), node.outputs[0].shape
    if tuple(layer.pool_size) == tuple(shape[1:-1]) and set(output[1:-1]) == {1}:
        axes = tuple(range(1, len(shape) - 1))
        return _shape_op("mean", lambda layer, shape: {"axes": axes, "keepdims": True})(r, layer, inputs, node)
    return _shape_op("avg_pool2d", _pool)(r, layer, inputs, node)


LAYERS[layers.GlobalAveragePooling1D] = LAYERS[layers.GlobalAveragePooling2D] = _shape_op("mean", _spatial)
LAYERS[layers.GlobalMaxPooling1D] = LAYERS[layers.GlobalMaxPooling2D] = _shape_op("reduce_max", _spatial)
LAYERS[layers.ZeroPadding1D] = LAYERS[layers.ZeroPadding2D] = _shape_op("pad", _padding)
LAYERS[layers.Cropping1D] = LAYERS[layers.Cropping2D] = _shape_op("strided_slice", _cropping)
LAYERS[layers.Flatten] = LAYERS[layers.Reshape] = _shape_op("reshape")
LAYERS[layers.RepeatVector] = _shape_op("tile", lambda layer, shape: {"expand": 1, "repeats": (1, layer.n, 1)})
LAYERS[layers.Permute] = _shape_op("transpose", lambda layer, shape: {"perm": (0, *layer.dims)})
LAYERS[layers.UpSampling1D] = _shape_op("resize_nearest", _upsampling)


def _resize(layer: Any, shape: tuple) -> dict:
    return _resizing(layer, shape) if isinstance(layer, layers.Resizing) else _upsampling(layer, shape)


@reads(layers.UpSampling2D, layers.Resizing)
def read_resize(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """Nearest and bilinear resizing."""
    kinds = {"nearest": "resize_nearest", "bilinear": "resize_bilinear"}
    if layer.interpolation not in kinds:
        return r.unknown(layer, inputs, node, f"interpolation {layer.interpolation!r} has no kernel on the target")
    return _shape_op(kinds[layer.interpolation], _resize)(r, layer, inputs, node)


@reads(ReciprocalRoot)
def read_reciprocal_root(r: Reader, layer: ReciprocalRoot, inputs: list[str], node: Any) -> list[str]:
    """The reciprocal root of a normalization: an elementwise function."""
    return _unary(r, layer, inputs, node, "elementwise", {"fn": "rsqrt"})


@reads(ScaledSoftmax)
def read_scaled_softmax(r: Reader, layer: ScaledSoftmax, inputs: list[str], node: Any) -> list[str]:
    """Softmax with the kernel's factor."""
    return _unary(r, layer, inputs, node, "softmax", {"axis": -1, "beta": layer.beta})
