"""The layers that normalizations become, for both generations of Keras."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kquant.keras_common.layers import Stateful


def norm_affine(layer: Any, mean: Any, variance: Any) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset per channel of a batch norm layer for given statistics, float64."""
    sigma = np.sqrt(np.asarray(variance, np.float64) + layer.epsilon)
    scale = (np.asarray(layer.gamma, np.float64) if layer.scale else 1.0) / sigma
    beta = np.asarray(layer.beta, np.float64) if layer.center else 0.0
    return scale, beta - np.asarray(mean, np.float64) * scale


class Freezable(Stateful):
    """A batch norm whose statistics stand still while its variable `frozen` is 1."""

    def set_frozen(self, value: float) -> None:
        """Let the statistics stand still (1) or move with the training batches (0)."""
        self.frozen.assign(value)

    def set_statistics(self, mean: np.ndarray, variance: np.ndarray) -> None:
        """Set the moving statistics."""
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)

    def affine_of(self, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale and the offset per channel that normalize by these statistics, float64."""
        return norm_affine(self, mean, variance)


class ChannelAffineBase:
    """`x * scale + offset` with one trainable value per channel of the last axis (either may be absent).

    The tail of a normalization, or a product or sum with a trainable vector.
    """

    def __init__(self, scale: bool = True, offset: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.has_scale, self.has_offset = scale, offset

    def build(self, input_shape: Any) -> None:
        size = (input_shape[-1],)
        self.scale = self.add_weight(name="scale", shape=size, initializer="ones") if self.has_scale else None
        self.offset = self.add_weight(name="offset", shape=size, initializer="zeros") if self.has_offset else None
        self.built = True

    def call(self, x: Any) -> Any:
        if self.scale is not None:
            x = x * tf.cast(tf.convert_to_tensor(self.scale), x.dtype)
        return x if self.offset is None else x + tf.cast(tf.convert_to_tensor(self.offset), x.dtype)

    def values(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset, float64, shape (size,)."""
        scale = np.ones(size) if self.scale is None else np.asarray(self.scale, np.float64)
        offset = np.zeros(size) if self.offset is None else np.asarray(self.offset, np.float64)
        return scale, offset

    def get_config(self) -> dict:
        return {**super().get_config(), "scale": self.has_scale, "offset": self.has_offset}


class ReciprocalRootBase:
    """`1 / sqrt(max(x * factor, least) + epsilon)`, elementwise: the denominator of a normalization."""

    def __init__(self, epsilon: float = 1e-3, factor: float = 1.0, least: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.epsilon, self.factor, self.least = epsilon, factor, least

    def call(self, x: Any) -> Any:
        return tf.math.rsqrt(tf.maximum(x * self.factor, self.least) + self.epsilon)

    def get_config(self) -> dict:
        return {**super().get_config(), "epsilon": self.epsilon, "factor": self.factor, "least": self.least}


class ScaledSoftmaxBase:
    """`softmax(beta * x)` over the last axis, as the target's SOFTMAX kernel computes it."""

    def __init__(self, beta: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.beta = beta

    def call(self, x: Any) -> Any:
        return tf.nn.softmax(x * self.beta, axis=-1)

    def get_config(self) -> dict:
        return {**super().get_config(), "beta": self.beta}
