"""The layers that normalizations become: batch norm that can be frozen, and the parts of the others."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops
from tensorflow.python.ops import control_flow_util

from kquant.keras_common.norms import ChannelAffineBase, Freezable, ReciprocalRootBase, ScaledSoftmaxBase

register = keras.saving.register_keras_serializable(package="kquant")


@register
class BatchNormalization(Freezable, keras.layers.BatchNormalization):
    """Keras' batch normalization whose statistics can be frozen while training goes on.

    While the variable `frozen` is 1, training steps normalize by the moving statistics, as inference does, and leave
    them as they are. No recompilation is needed.
    """

    without_autocast: ClassVar = {"autocast": False}

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.frozen = self.add_state("frozen")

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
class ChannelAffine(ChannelAffineBase, keras.layers.Layer):
    __doc__ = ChannelAffineBase.__doc__


@register
class ReciprocalRoot(ReciprocalRootBase, keras.layers.Layer):
    __doc__ = ReciprocalRootBase.__doc__


@register
class ScaledSoftmax(ScaledSoftmaxBase, keras.layers.Layer):
    __doc__ = ScaledSoftmaxBase.__doc__
