"""How the layers with a kernel are read, in a float model and in a quantized one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kquant.core.int8_spec import RESIZED
from kquant.keras_common.copied import set_weights
from kquant.keras_common.generation import Call, Source
from kquant.keras_common.handlers import reads, reads_own, weight
from kquant.keras_common.read_layers import activation, not_channels_last
from kquant.keras_common.reader import NOT_IDS, Reader


def _geometry(layer: Any) -> dict:
    return {
        "strides": tuple(layer.strides),
        "padding": layer.padding,
        "dilation": tuple(layer.dilation_rate),
        "rank": layer.rank,
    }


def _conv(layer: Any) -> tuple[str, dict]:
    return "conv2d", {**_geometry(layer), "groups": layer.groups}


def _depthwise(layer: Any) -> tuple[str, dict]:
    return "depthwise_conv2d", _geometry(layer)


def _transposed(layer: Any) -> tuple[str, dict]:
    return "conv2d_transpose", _geometry(layer)


def _dense(layer: Any) -> tuple[str, dict]:
    return "dense", {}


def _embedding(layer: Any) -> tuple[str, dict]:
    return "embedding", {}


def _einsum(layer: Any) -> tuple[str, dict]:
    """A contraction of the input's last axes with the kernel's first ones; anything else has no kernel."""
    equation = layer.equation.replace(" ", "").replace("...", "")
    (x, kernel), output = equation.split("->")[0].split(","), equation.split("->")[1]
    contracted = [c for c in x if c not in output]
    count = len(contracted)
    if x[-count:] != "".join(contracted) or kernel[:count] != x[-count:] or output != x[:-count] + kernel[count:]:
        return "opaque", {"reason": f"the equation {layer.equation!r} is not a contraction of the last input axes"}
    if set(layer.bias_axes or "") - set(kernel[count:]):
        return "opaque", {"reason": f"the bias axes {layer.bias_axes!r} are not all output channels of the kernel"}
    return "dense", {"contracted": count}


def _why_misshapen(layer: Any, contracted: int, given: tuple, stated: tuple) -> str | None:
    """Keras misplaces sizes where an ellipsis stands for several axes, and what follows would build on them."""
    actual = (*given[:-contracted], *layer.kernel.shape[contracted:])
    same = all(a is None or s is None or a == s for a, s in zip(actual, stated, strict=True))
    fix = f"write all axes of {layer.equation!r} as letters"
    return None if same else f"Keras states the shape {stated}, but it gives {actual}; {fix}"


def _prelu(layer: Any) -> tuple[str, dict]:
    return "prelu", {}


KINDS: dict[str, Callable[[Any], tuple[str, dict]]] = {
    "Conv1D": _conv,
    "Conv2D": _conv,
    "DepthwiseConv1D": _depthwise,
    "DepthwiseConv2D": _depthwise,
    "Conv1DTranspose": _transposed,
    "Conv2DTranspose": _transposed,
    "Dense": _dense,
    "EinsumDense": _einsum,
    "Embedding": _embedding,
    "PReLU": _prelu,
}


def _why_opaque(layer: Any, kind: str) -> str | None:
    if kind == "conv2d_transpose" and set(layer.dilation_rate) != {1}:
        return "a dilated transposed convolution has no kernel on the target"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return "a layer with LoRA or Keras' own quantization cannot be quantized again"
    return not_channels_last(layer)


@reads(*KINDS)
def read_linear(r: Reader, layer: Any, inputs: list[str], call: Call) -> list[str]:
    """A layer with a kernel; its activation becomes an op of its own."""
    kind, attrs = KINDS[type(layer).__name__](layer)
    reason = _why_opaque(layer, kind) or attrs.get("reason")
    if kind == "conv2d_transpose" and None in call.shape[1:-1]:
        reason = reason or RESIZED
    if kind == "embedding" and any(inputs[0] in op.outputs for op in r.ops):
        reason = reason or NOT_IDS
    if "contracted" in attrs:
        reason = reason or _why_misshapen(layer, attrs["contracted"], r.shape(inputs[0]), call.shape)
    if reason:
        return r.unknown(layer, inputs, call, reason)
    split = hasattr(layer, "activation") and r.generation.known_function(layer.activation) != "linear"
    source = r.clone(layer, activation=None) if split else r.clone(layer)
    run = _alone(source) if split else None
    outputs = _add_linear(r, layer, layer, kind, attrs, inputs, call, source, run)
    return activation(r, layer, layer.activation, outputs) if split else outputs


def _alone(source: Source) -> Callable:
    """What a layer computes before its activation function, which is an op of its own."""

    def run(values: Any, float_weights: bool = False) -> list[Any]:
        plain = source.build()
        plain.build(tuple(values[0].shape))
        set_weights(plain, source.weights())
        return [source.invoke(plain, values)]

    return run


@reads_own("QuantizedLayer")
def read_quantized(r: Reader, wrapper: Any, inputs: list[str], call: Call) -> list[str]:
    """The wrapper of a quantized model: the same op, with its formula; and with the gain of the norm behind it."""
    layer = wrapper.layer
    kind, attrs = KINDS[type(layer).__name__](layer)
    norm = r.gains[inputs[1]] if inputs[1:] else None

    def gain() -> dict:
        return {} if norm is None else {"gain": norm.gain()}

    def run(values: Any, float_weights: bool = False) -> list[Any]:
        return [wrapper(values[0], quantized=not float_weights, **gain())]

    attrs = {
        **attrs,
        "is_waiting": wrapper.is_waiting,
        "formula": wrapper.formula,
        "codes": lambda: tuple(np.asarray(a) for a in wrapper.codes(**gain())),
        "folds_norm": norm is not None,
    }
    return _add_linear(r, wrapper, layer, kind, attrs, inputs[:1], call, r.clone(wrapper), run)


def _add_linear(
    r: Reader, owner: Any, layer: Any, kind: str, attrs: dict, inputs: Any, call: Call, source: Source, run: Any
) -> list[str]:
    rule = r.generation.linear[type(layer)]
    axes = rule.axes(layer)
    weights = {"kernel": weight(rule.kernel(layer))}
    if rule.bias(layer) is not None:
        weights["bias"] = weight(rule.bias(layer))
    attrs = {**attrs, **({} if axes is None else {"kernel_axes": axes}), "source_layer": layer}
    return r.add(kind, owner, inputs, [call.shape], source, attrs=attrs, weights=weights, call=run)
