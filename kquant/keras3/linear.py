"""How the Keras 3 layers with a kernel apply it."""

from __future__ import annotations

from typing import Any

from keras import layers, ops

from kquant.keras_common.linear import Linear, einsum_axes, einsum_shape


def _conv(layer: Any, x: Any, kernel: Any) -> Any:
    return layer.convolution_op(x, kernel)


def _conv1d(layer: Any, x: Any, kernel: Any) -> Any:
    padding = layer.padding
    if padding == "causal":
        reach = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        x, padding = ops.pad(x, [[0, 0], [reach, 0], [0, 0]]), "valid"
    return ops.conv(x, kernel, list(layer.strides), padding, layer.data_format, layer.dilation_rate)


def _depthwise(layer: Any, x: Any, kernel: Any) -> Any:
    return ops.depthwise_conv(x, kernel, layer.strides, layer.padding, layer.data_format, layer.dilation_rate)


def _transpose(layer: Any, x: Any, kernel: Any) -> Any:
    return ops.conv_transpose(
        x, kernel, list(layer.strides), layer.padding, layer.output_padding, layer.data_format, layer.dilation_rate
    )


def _prelu(layer: Any, x: Any, kernel: Any) -> Any:
    return ops.relu(x) - kernel * ops.relu(-x)


LINEAR: dict[type, Linear] = {
    layers.Conv1D: Linear(_conv1d, lambda layer: (0, 1)),
    layers.Conv2D: Linear(_conv, lambda layer: (0, 1, 2)),
    layers.DepthwiseConv1D: Linear(_depthwise, lambda layer: (0,)),
    layers.DepthwiseConv2D: Linear(_depthwise, lambda layer: (0, 1)),
    layers.Conv1DTranspose: Linear(_transpose, lambda layer: (0, 2)),
    layers.Conv2DTranspose: Linear(_transpose, lambda layer: (0, 1, 3)),
    layers.Dense: Linear(lambda layer, x, kernel: ops.matmul(x, kernel), lambda layer: (0,)),
    layers.EinsumDense: Linear(
        lambda layer, x, kernel: ops.einsum(layer.equation, x, kernel), einsum_axes, output_shape=einsum_shape
    ),
    layers.Embedding: Linear(
        lambda layer, x, kernel: ops.take(kernel, ops.cast(x, "int32"), axis=0),
        lambda layer: None,
        "embeddings",
        casts=False,
    ),
    layers.PReLU: Linear(_prelu, lambda layer: None, "alpha"),
}
