"""How the tf_keras layers with a kernel apply it: by their own `call`, on a shallow copy that holds another kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tf_keras import layers

from kquant.keras_common.linear import Linear, einsum_axes


def _own_call(attribute: str) -> Callable[[Any, Any, Any], Any]:
    def apply(layer: Any, x: Any, kernel: Any) -> Any:
        if getattr(layer, "groups", 1) > 1:
            return _grouped(layer, x, kernel)
        twin = copy.copy(layer)
        vars(twin).update({attribute: kernel, "bias": None, "use_bias": False, "activation": None})
        return type(layer).call(twin, x)

    return apply


def _grouped(layer: Any, x: Any, kernel: Any) -> Any:
    """TensorFlow's CPU kernels compute grouped convolutions in XLA only; the layer would compile at every call."""
    padding = layer.padding.upper()
    if padding == "CAUSAL":
        reach = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        x, padding = tf.pad(x, [[0, 0], [reach, 0], [0, 0]]), "VALID"
    return _convolution(x, kernel, tuple(layer.strides), padding, tuple(layer.dilation_rate))


@tf.function(jit_compile=True, reduce_retracing=True)
def _convolution(x: Any, kernel: Any, strides: tuple, padding: str, dilations: tuple) -> Any:
    return tf.nn.convolution(x, kernel, strides, padding, dilations=dilations)


def _linear(axes: Callable[[Any], tuple[int, ...] | None], attribute: str = "kernel", **more: Any) -> Linear:
    return Linear(_own_call(attribute), axes, attribute, **more)


LINEAR: dict[type, Linear] = {
    layers.Conv1D: _linear(lambda layer: (0, 1)),
    layers.Conv2D: _linear(lambda layer: (0, 1, 2)),
    layers.DepthwiseConv1D: _linear(lambda layer: (0,), "depthwise_kernel"),
    layers.DepthwiseConv2D: _linear(lambda layer: (0, 1), "depthwise_kernel"),
    layers.Conv1DTranspose: _linear(lambda layer: (0, 2)),
    layers.Conv2DTranspose: _linear(lambda layer: (0, 1, 3)),
    layers.Dense: _linear(lambda layer: (0,)),
    layers.EinsumDense: _linear(einsum_axes),
    layers.Embedding: _linear(lambda layer: None, "embeddings", casts=False),
    layers.PReLU: _linear(lambda layer: None, "alpha"),
}
