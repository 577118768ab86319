"""The layers that normalizations become, for both generations of Keras."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from kquant.keras_common.layers import Stateful


def norm_affine(layer: Any, mean: Any, variance: Any) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset per channel of a batch norm layer for given statistics, float64."""
    sigma = np.sqrt(np.asarray(variance, np.float64) + np.float32(layer.epsilon))  # float32 is what the kernels add
    scale = (np.asarray(layer.gamma, np.float64) if layer.scale else 1.0) / sigma
    beta = np.asarray(layer.beta, np.float64) if layer.center else 0.0
    return scale, beta - np.asarray(mean, np.float64) * scale


def in_xla() -> bool:
    """Whether a function is being traced for XLA."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


class Freezable(Stateful):
    """A batch norm whose statistics stand still while its variable `frozen` is 1.

    `unbiased` says whether the moving variance is fed the unbiased variance of a batch, as this generation's own layer
    does where it uses TensorFlow's single kernel.

    Args:
        shape: of what is normalized, for a norm that is first called for its gain, beside the layer in front of it.
    """

    unbiased: ClassVar[bool]

    def __init__(self, *args: Any, shape: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shape = None if shape is None else list(shape)

    def build(self, input_shape: Any) -> None:
        super().build(input_shape if self.shape is None else tuple(self.shape))
        self.frozen = self.add_state("frozen")
        if self.shape is not None:
            self.input_spec = None  # a call for the gain takes what the layer in front takes

    def get_config(self) -> dict:
        own = {} if self.shape is None else {"shape": list(self.shape)}
        return {**super().get_config(), **own}

    def gain(self) -> Any:
        """`|gamma / sigma|` with the moving statistics, one float32 value per channel, without a gradient."""
        variance = tf.convert_to_tensor(self.moving_variance)
        gamma, _ = self.parameters(variance.shape[0])
        return tf.stop_gradient(tf.abs(gamma) * tf.math.rsqrt(tf.cast(variance, tf.float32) + self.epsilon))

    def parameters(self, size: int) -> tuple[Any, Any]:
        """Scale and offset as float32 tensors."""
        gamma = tf.cast(tf.convert_to_tensor(self.gamma), tf.float32) if self.scale else tf.ones((size,))
        beta = tf.cast(tf.convert_to_tensor(self.beta), tf.float32) if self.center else tf.zeros((size,))
        return gamma, beta

    def in_one_kernel(self, x: Any) -> Any:
        """A training step of rank 4, channels last, in TensorFlow's single kernel; XLA fuses the single ops better."""
        gamma, beta = self.parameters(x.shape[-1])
        statistics = [tf.convert_to_tensor(v) for v in (self.moving_mean, self.moving_variance)]

        def kernel(is_training: bool, *given: Any) -> Any:
            arguments = dict(zip(("mean", "variance"), given, strict=True)) if given else {}
            return tf.compat.v1.nn.fused_batch_norm(
                x, gamma, beta, epsilon=self.epsilon, is_training=is_training, **arguments
            )

        def frozen() -> tuple:
            return kernel(False, *statistics)[0], *statistics

        def moving() -> tuple:
            y, mean, variance = kernel(True)
            if not self.unbiased:  # the kernel's variance is
                count = tf.cast(tf.size(x), tf.float32) / x.shape[-1]
                variance = variance * ((count - 1.0) / count)
            keep = self.momentum
            return y, *(o * keep + n * (1.0 - keep) for o, n in zip(statistics, (mean, variance), strict=True))

        y, mean, variance = tf.cond(tf.convert_to_tensor(self.frozen) > 0, frozen, moving)
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)
        return y

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
