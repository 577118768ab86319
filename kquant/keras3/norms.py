"""The layers that normalizations become: batch norm that can be frozen, and the parts of the others."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow.python.ops import control_flow_util

register = keras.saving.register_keras_serializable(package="kquant")


def norm_affine(layer: Any, mean: Any, variance: Any) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset per channel of a batch norm layer for given statistics, float64."""
    sigma = np.sqrt(np.asarray(variance, np.float64) + layer.epsilon)
    scale = (np.asarray(layer.gamma, np.float64) if layer.scale else 1.0) / sigma
    beta = np.asarray(layer.beta, np.float64) if layer.center else 0.0
    return scale, beta - np.asarray(mean, np.float64) * scale


@register
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch normalization whose statistics can be frozen while training goes on.

    While the variable `frozen` is 1, training steps normalize by the moving statistics, as inference does, and leave
    them as they are. No recompilation is needed.
    """

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.frozen = self.add_weight(
            name="frozen", shape=(), dtype="float32", initializer="zeros", trainable=False, autocast=False
        )

    def set_frozen(self, value: float) -> None:
        """Let the statistics stand still (1) or move with the training batches (0)."""
        self.frozen.assign(value)

    def set_statistics(self, mean: np.ndarray, variance: np.ndarray) -> None:
        """Set the moving statistics."""
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)

    def affine(self, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale and the offset per channel that normalize by these statistics, float64."""
        return norm_affine(self, mean, variance)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if not training or not self.trainable:
            return super().call(inputs, training=training, mask=mask)
        x = ops.cast(inputs, "float32")
        one_kernel = len(x.shape) == 4 and self.axis % 4 == 3 and mask is None and not self.synchronized
        y = self._fused(x) if one_kernel and not _in_xla() else self._composed(x, mask)
        return ops.cast(y, self.compute_dtype)

    def _parameters(self, size: int) -> tuple[Any, Any]:
        gamma = ops.cast(self.gamma, "float32") if self.scale else ops.ones((size,))
        beta = ops.cast(self.beta, "float32") if self.center else ops.zeros((size,))
        return gamma, beta

    def _fused(self, x: Any) -> Any:
        """TensorFlow's single kernel: on CPU a third of the time of the ops it is made of."""
        gamma, beta = self._parameters(x.shape[-1])
        statistics = [ops.convert_to_tensor(v) for v in (self.moving_mean, self.moving_variance)]

        def kernel(is_training: bool, *given: Any) -> Any:
            arguments = dict(zip(("mean", "variance"), given, strict=True)) if given else {}
            return tf.compat.v1.nn.fused_batch_norm(
                x, gamma, beta, epsilon=self.epsilon, is_training=is_training, **arguments
            )

        def frozen() -> tuple:
            return kernel(False, *statistics)[0], *statistics

        def moving() -> tuple:
            y, mean, variance = kernel(True)
            count = ops.cast(ops.size(x), "float32") / x.shape[-1]
            batch = (mean, variance * ((count - 1.0) / count))  # the kernel's variance is unbiased, Keras' is not
            keep = self.momentum
            return y, *(old * keep + new * (1.0 - keep) for old, new in zip(statistics, batch, strict=True))

        y, mean, variance = tf.cond(self.frozen > 0, frozen, moving)
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)
        return y

    def _composed(self, x: Any, mask: Any) -> Any:
        """The same in single ops, which XLA fuses better than the kernel."""
        frozen = self.frozen > 0
        moved = []
        for variable, batch in zip((self.moving_mean, self.moving_variance), self._moments(x, mask), strict=True):
            old = ops.convert_to_tensor(variable)
            moved.append(ops.where(frozen, old, batch))
            variable.assign(ops.where(frozen, old, old * self.momentum + batch * (1.0 - self.momentum)))
        gamma, beta = self._parameters(x.shape[self.axis])
        return ops.batch_normalization(x, *moved, axis=self.axis, offset=beta, scale=gamma, epsilon=self.epsilon)


def _in_xla() -> bool:
    """Whether a function is being traced for XLA."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


@register
class ChannelAffine(keras.layers.Layer):
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
            x = x * ops.cast(self.scale, x.dtype)
        return x if self.offset is None else x + ops.cast(self.offset, x.dtype)

    def values(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and offset, float64, shape (size,)."""
        scale = np.ones(size) if self.scale is None else np.asarray(self.scale, np.float64)
        offset = np.zeros(size) if self.offset is None else np.asarray(self.offset, np.float64)
        return scale, offset

    def get_config(self) -> dict:
        return {**super().get_config(), "scale": self.has_scale, "offset": self.has_offset}


@register
class ReciprocalRoot(keras.layers.Layer):
    """`1 / sqrt(max(x * factor, least) + epsilon)`, elementwise: the denominator of a normalization."""

    def __init__(self, epsilon: float = 1e-3, factor: float = 1.0, least: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.epsilon, self.factor, self.least = epsilon, factor, least

    def call(self, x: Any) -> Any:
        return ops.rsqrt(ops.maximum(x * self.factor, self.least) + self.epsilon)

    def get_config(self) -> dict:
        return {**super().get_config(), "epsilon": self.epsilon, "factor": self.factor, "least": self.least}


@register
class ScaledSoftmax(keras.layers.Layer):
    """`softmax(beta * x)` over the last axis, as the target's SOFTMAX kernel computes it."""

    def __init__(self, beta: float = 1.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.beta = beta

    def call(self, x: Any) -> Any:
        return ops.softmax(x * self.beta, axis=-1)

    def get_config(self) -> dict:
        return {**super().get_config(), "beta": self.beta}
