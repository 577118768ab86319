"""How each layer class is read: one handler a class, in one table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.graph import Weight
from kquant.core.int8_spec import RESIZED
from kquant.keras_common.functions import function_kind
from kquant.keras_common.generation import Call, Source
from kquant.keras_common.handlers import LAYERS, reads, reads_own
from kquant.keras_common.norms import norm_affine
from kquant.keras_common.reader import Reader, activation_name
from kquant.keras_common.regularized import unchanged


def not_channels_last(layer: Any) -> str | None:
    """Why a layer that is not channels-last has no integer form."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "the target's kernels are channels-last, and the layer has data_format='channels_first'"
    return None


# -- per-channel scale and offset -----------------------------------------------------------------------------------


@reads("BatchNormalization")
@reads_own("BatchNormalization")
def read_batch_norm(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Batch norm with its moving statistics: a scale and an offset per channel; or its gain alone."""
    if call.kwargs.get("gain"):
        return [r.gain(layer, call)]
    rank = len(r.shape(inputs[0]))
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if [axis % rank for axis in axes] != [rank - 1] or getattr(layer, "renorm", False):
        return r.unknown(layer, inputs, call, "batch norm must normalize the last axis, without renorm")

    def affine() -> tuple[np.ndarray, np.ndarray]:
        return norm_affine(layer, layer.moving_mean, layer.moving_variance)

    size = (int(layer.moving_mean.shape[0]),)
    weights = {"scale": Weight(size, lambda: affine()[0]), "offset": Weight(size, lambda: affine()[1])}
    source = r.clone(layer)
    attrs: dict[str, Any] = {"normalizes": True}
    if isinstance(layer, r.own.BatchNormalization):
        attrs["batch_norm"] = layer
    else:

        def build() -> Any:
            return r.own.BatchNormalization.from_config(layer.get_config())

        source = Source(source.key, build, layer.get_weights, source.invoke, layer.name)
    return r.add("channel_affine", layer, inputs, [call.shape], source, attrs=attrs, weights=weights)


@reads_own("ChannelAffine")
def read_channel_affine(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Our own scale and offset per channel."""
    size = r.shape(inputs[0])[-1]
    weights = {
        "scale": Weight((size,), lambda: layer.values(size)[0]),
        "offset": Weight((size,), lambda: layer.values(size)[1]),
    }
    return r.add("channel_affine", layer, inputs, [call.shape], r.clone(layer), weights=weights)


@reads("Rescaling")
def read_rescaling(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """`x * scale + offset`."""
    scale, offset = np.asarray(layer.scale, np.float64), np.asarray(layer.offset, np.float64)
    if any(v.ndim and v.size != v.shape[-1] for v in (scale, offset)):
        return r.unknown(layer, inputs, call, "rescaling must be by one number, or by one per channel of the last axis")
    return _constant_affine(r, layer, inputs, call, scale.ravel(), offset.ravel())


@reads("Normalization")
def read_normalization(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """`(x - mean) / max(sqrt(variance), epsilon)`, or its inverse."""
    mean, variance = np.asarray(layer.mean), np.asarray(layer.variance)
    sigma = np.maximum(np.sqrt(variance), r.generation.keras.backend.epsilon())
    if mean.size != 1 and mean.shape[-1] != mean.size:
        return r.unknown(layer, inputs, call, "normalization must keep one mean per channel of the last axis")
    if layer.invert:
        return _constant_affine(r, layer, inputs, call, sigma.ravel(), mean.ravel())
    return _constant_affine(r, layer, inputs, call, (1 / sigma).ravel(), (-mean / sigma).ravel())


def _constant_affine(r: Reader, layer: Any, inputs: list[str], call: Call, scale: Any, offset: Any) -> list[str]:
    size = r.shape(inputs[0])[-1]
    if size is None:
        return r.unknown(layer, inputs, call, "the number of channels must be known")
    scale = np.broadcast_to(np.asarray(scale, np.float64), (size,))
    offset = np.broadcast_to(np.asarray(offset, np.float64), (size,))
    weights = {"scale": Weight((size,), lambda: scale), "offset": Weight((size,), lambda: offset)}
    return r.add("channel_affine", layer, inputs, [call.shape], r.clone(layer), weights=weights)


# -- markers of a quantized model -----------------------------------------------------------------------------------


@reads_own("FakeQuantize")
def read_fake_quantize(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """A fake quantization: the marker of a quantized tensor."""
    site = call.kwargs.get("site")
    boundary = bool(call.kwargs.get("boundary"))
    unit = layer.fixed == [0.0, 1.0]  # DoReFa's range
    attrs = {
        "spec": layer.name,
        "site": site,
        "quantizer": layer,
        "unit": unit,
        "boundary": boundary,
        "is_waiting": layer.is_waiting,
    }
    return r.add("fake_quant", layer, inputs, [call.shape], r.again(layer, call), attrs=attrs)


# -- activations ----------------------------------------------------------------------------------------------------


def activation(r: Reader, layer: Any, function: Any, inputs: list[str]) -> list[str]:
    """The activation argument of a layer, as an op after it."""
    kind, attrs = function_kind(r.generation, function)
    name = activation_name(layer)

    def build() -> Any:
        return r.layers.Activation(function, name=name, dtype=layer.dtype_policy)

    source = Source((id(layer), "activation"), build, None, lambda new, values: new(values[0]), name)
    shapes = [r.shape(inputs[0])]
    return r.add(kind, layer, inputs, shapes, source, attrs=attrs, suffix="_activation", call=_calls(function))


def _calls(function: Any) -> Callable:
    return lambda values, float_weights=False: [function(tf.convert_to_tensor(values[0]))]


@reads("Activation")
def read_activation(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """`Activation(fn)`."""
    kind, attrs = function_kind(r.generation, layer.activation)
    if "reason" in attrs:
        return r.unknown(layer, inputs, call, attrs["reason"])

    def build() -> Any:  # not through its config: a lambda does not survive that
        return r.layers.Activation(layer.activation, name=layer.name, dtype=layer.dtype_policy)

    source = Source(id(layer), build, None, lambda new, values: new(values[0]), layer.name)
    return r.add(kind, layer, inputs, [call.shape], source, attrs=attrs)


def _unary(r: Reader, layer: Any, inputs: list[str], call: Call, kind: str, attrs: dict) -> list[str]:
    if "reason" in attrs:
        return r.unknown(layer, inputs, call, attrs["reason"])
    return r.add(kind, layer, inputs, [call.shape], r.clone(layer), attrs=attrs)


@reads("Lambda")
def read_lambda(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """A function of the user's: a table if it is elementwise, else read op by op."""
    from kquant.keras_common.composite import expand_here

    given = dict(layer.arguments or {})  # without any, the function itself may be one that is known by name
    kind, attrs = function_kind(r.generation, functools.partial(layer.function, **given) if given else layer.function)
    if kind == "opaque" or len(inputs) != 1:
        return expand_here(r, layer, inputs, call)

    def build() -> Any:
        return r.layers.Lambda(layer.function, layer._output_shape, arguments=layer.arguments, dtype=layer.dtype_policy)

    source = Source(id(layer), build, None, lambda new, values: new(values[0]), layer.name)
    return r.add(kind, layer, inputs, [call.shape], source, attrs=attrs)


@reads("ReLU")
def read_relu(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """ReLU with an upper limit; a slope or a threshold makes it a general function."""
    if layer.negative_slope or layer.threshold:
        return _unary(r, layer, inputs, call, "elementwise", {"fn": "leaky"})
    limit = None if layer.max_value is None else float(layer.max_value)
    return _unary(r, layer, inputs, call, "relu", {"max": limit, "fn": "relu"})


@reads("LeakyReLU")
def read_leaky(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Leaky ReLU."""
    slope = layer.negative_slope if hasattr(layer, "negative_slope") else layer.alpha
    return _unary(r, layer, inputs, call, "elementwise", {"fn": "leaky_relu", "alpha": float(slope)})


@reads("ELU")
def read_elu(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """ELU."""
    return _unary(r, layer, inputs, call, "elementwise", {"fn": "elu" if layer.alpha == 1 else "scaled elu"})


@reads("Softmax")
def read_softmax(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Softmax over one axis."""
    if len(inputs) > 1 or not isinstance(layer.axis, int):
        return r.unknown(layer, inputs, call, "softmax over one axis and without a mask has a kernel, this has not")
    return _unary(r, layer, inputs, call, "softmax", {"axis": layer.axis})


# -- identity in the artifact ---------------------------------------------------------------------------------------

IDENTITY = (
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout", "GaussianDropout",
    "GaussianNoise", "ActivityRegularization", "Identity", "RandomFlip", "RandomRotation", "RandomZoom",
    "RandomTranslation", "RandomContrast", "RandomBrightness", "RandomErasing", "RandomHue", "RandomSaturation",
    "RandomSharpness", "RandomShear", "RandomPerspective", "RandomColorJitter", "RandomGrayscale",
    "RandomGaussianBlur", "RandomInvert", "RandomPosterization", "RandomColorDegeneration", "RandomElasticTransform",
)  # fmt: skip


@reads(*IDENTITY)
def read_identity(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Layers that act in training only."""
    return r.add("identity", layer, inputs, [call.shape], r.clone(layer), call=unchanged)


# -- arithmetic, shapes, pools --------------------------------------------------------------------------------------

MERGE = {
    "Add": "add",
    "Subtract": "sub",
    "Multiply": "mul",
    "Maximum": "maximum",
    "Minimum": "minimum",
}


@reads(*MERGE)
def read_merge(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Merges of two tensors of one rank; others come back through `composite`."""
    from kquant.keras_common.composite import expand_here

    if len(inputs) != 2 or len({len(r.shape(t)) for t in inputs}) > 1:
        return expand_here(r, layer, inputs, call)
    return r.add(MERGE[type(layer).__name__], layer, inputs, [call.shape], r.clone(layer))


@reads("Concatenate")
def read_concatenate(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Concatenation of any arity."""
    axis = layer.axis % len(r.shape(inputs[0]))
    return r.add("concat", layer, inputs, [call.shape], r.clone(layer), attrs={"axis": axis})


def _shape_op(kind: str, attrs: Callable[[Any, tuple], dict] = lambda layer, shape: {}) -> Callable:
    def handler(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
        reason = not_channels_last(layer)
        found = attrs(layer, r.shape(inputs[0]))
        if kind.startswith("resize") and None in call.shape[1:-1]:
            reason = reason or RESIZED
        if reason or "reason" in found:
            return r.unknown(layer, inputs, call, reason or found["reason"])
        return r.add(kind, layer, inputs, [call.shape], r.clone(layer), attrs=found)

    return handler


def _pool(layer: Any, shape: tuple) -> dict:
    return {
        "pool": tuple(layer.pool_size),
        "strides": tuple(layer.strides),
        "padding": layer.padding,
        "rank": len(layer.pool_size),
    }


def _global_pool(kind: str) -> Callable:
    """A reduction of all axes but the channels', wherever those are."""

    def handler(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
        axes = tuple(range(1, len(r.shape(inputs[0]))))
        axes = axes[1:] if layer.data_format == "channels_first" else axes[:-1]
        attrs = {"axes": axes, "keepdims": bool(layer.keepdims)}
        return r.add(kind, layer, inputs, [call.shape], r.clone(layer), attrs=attrs)

    return handler


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


LAYERS["MaxPooling1D"] = LAYERS["MaxPooling2D"] = _shape_op("max_pool2d", _pool)


@reads("AveragePooling1D", "AveragePooling2D")
def read_average_pool(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """A windowed average; one window over everything is a mean, which has a range of its own."""
    shape, output = r.shape(inputs[0]), call.shape
    if tuple(layer.pool_size) == tuple(shape[1:-1]) and set(output[1:-1]) == {1}:
        axes = tuple(range(1, len(shape) - 1))
        return _shape_op("mean", lambda layer, shape: {"axes": axes, "keepdims": True})(r, layer, inputs, call)
    return _shape_op("avg_pool2d", _pool)(r, layer, inputs, call)


LAYERS["GlobalAveragePooling1D"] = LAYERS["GlobalAveragePooling2D"] = _global_pool("mean")
LAYERS["GlobalMaxPooling1D"] = LAYERS["GlobalMaxPooling2D"] = _global_pool("reduce_max")
LAYERS["ZeroPadding1D"] = LAYERS["ZeroPadding2D"] = _shape_op("pad", _padding)
LAYERS["Cropping1D"] = LAYERS["Cropping2D"] = _shape_op("strided_slice", _cropping)
LAYERS["Flatten"] = LAYERS["Reshape"] = _shape_op("reshape")
LAYERS["RepeatVector"] = _shape_op("tile", lambda layer, shape: {"expand": 1, "repeats": (1, layer.n, 1)})
LAYERS["Permute"] = _shape_op("transpose", lambda layer, shape: {"perm": (0, *layer.dims)})
LAYERS["UpSampling1D"] = _shape_op("resize_nearest", _upsampling)


def _resize(layer: Any, shape: tuple) -> dict:
    return _resizing(layer, shape) if hasattr(layer, "crop_to_aspect_ratio") else _upsampling(layer, shape)


@reads("UpSampling2D", "Resizing")
def read_resize(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Nearest and bilinear resizing."""
    kinds = {"nearest": "resize_nearest", "bilinear": "resize_bilinear"}
    if layer.interpolation not in kinds:
        return r.unknown(layer, inputs, call, f"interpolation {layer.interpolation!r} has no kernel on the target")
    return _shape_op(kinds[layer.interpolation], _resize)(r, layer, inputs, call)


@reads_own("ReciprocalRoot")
def read_reciprocal_root(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """The reciprocal root of a normalization: an elementwise function."""
    return _unary(r, layer, inputs, call, "elementwise", {"fn": "rsqrt"})


@reads_own("ScaledSoftmax")
def read_scaled_softmax(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """Softmax with the kernel's factor."""
    return _unary(r, layer, inputs, call, "softmax", {"axis": -1, "beta": layer.beta})
