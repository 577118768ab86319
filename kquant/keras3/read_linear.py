"""How the layers with a kernel are read, in a float model and in a quantized one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from kquant.keras3.handlers import reads, weight
from kquant.keras3.layers import QuantizedLayer
from kquant.keras3.linear import LINEAR
from kquant.keras3.read import Reader, Source
from kquant.keras3.read_layers import activation, not_channels_last


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
    return "dense", {"contracted": count}


def _prelu(layer: Any) -> tuple[str, dict]:
    return "prelu", {}


KINDS: dict[type, Callable[[Any], tuple[str, dict]]] = {
    layers.Conv1D: _conv,
    layers.Conv2D: _conv,
    layers.DepthwiseConv1D: _depthwise,
    layers.DepthwiseConv2D: _depthwise,
    layers.Conv1DTranspose: _transposed,
    layers.Conv2DTranspose: _transposed,
    layers.Dense: _dense,
    layers.EinsumDense: _einsum,
    layers.Embedding: _embedding,
    layers.PReLU: _prelu,
}


def _why_opaque(layer: Any) -> str | None:
    if isinstance(layer, layers.Embedding) and layer.mask_zero:
        return "mask_zero=True: masks have no counterpart in the artifact"
    if getattr(layer, "rank", 0) and "Transpose" in type(layer).__name__ and set(layer.dilation_rate) != {1}:
        return "a dilated transposed convolution has no kernel on the target"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return "a layer with LoRA or Keras' own quantization cannot be quantized again"
    return not_channels_last(layer)


@reads(*KINDS)
def read_linear(r: Reader, layer: Any, inputs: list[str], node: Any) -> list[str]:
    """A layer with a kernel; its activation becomes an op of its own."""
    kind, attrs = KINDS[type(layer)](layer)
    reason = _why_opaque(layer) or attrs.get("reason")
    if reason:
        return r.unknown(layer, inputs, node, reason)
    split = hasattr(layer, "activation") and layer.activation is not keras.activations.linear
    source = r.clone(layer, activation=None) if split else r.clone(layer)
    outputs = _add_linear(r, layer, layer, kind, attrs, inputs, node, source, None)
    return activation(r, layer, layer.activation, outputs) if split else outputs


@reads(QuantizedLayer)
def read_quantized(r: Reader, wrapper: QuantizedLayer, inputs: list[str], node: Any) -> list[str]:
    """The wrapper of a quantized model: the same op, with its formula."""
    layer = wrapper.layer
    kind, attrs = KINDS[type(layer)](layer)

    def call(values: Any, float_weights: bool = False) -> list[Any]:
        return [wrapper(values[0], quantized=not float_weights)]

    return _add_linear(r, wrapper, layer, kind, attrs, inputs, node, r.clone(wrapper), call)


def _add_linear(
    r: Reader, owner: Any, layer: Any, kind: str, attrs: dict, inputs: Any, node: Any, source: Source, call: Any
) -> list[str]:
    rule = LINEAR[type(layer)]
    axes = rule.axes(layer)
    weights = {"kernel": weight(rule.kernel(layer))}
    if rule.bias(layer) is not None:
        weights["bias"] = weight(rule.bias(layer))
    attrs = {**attrs, **({} if axes is None else {"kernel_axes": axes}), "source_layer": layer}
    if owner is not layer:
        attrs.update(
            is_waiting=owner.is_waiting,
            formula=owner.formula,
            codes=lambda: tuple(np.asarray(a) for a in owner.codes()),
        )
    shapes = [node.outputs[0].shape]
    return r.add(kind, owner, inputs, shapes, source, attrs=attrs, weights=weights, call=call)
