"""The layers that normalizations become: batch norm that can be frozen, and the parts of the others."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
from keras import ops

from kquant.keras_common.norms import ChannelAffineBase, Freezable, ReciprocalRootBase, ScaledSoftmaxBase, in_xla
from kquant.keras_common.operand import OperandBase

register = keras.saving.register_keras_serializable(package="kquant")


@register
class BatchNormalization(Freezable, keras.layers.BatchNormalization):
    """Keras' batch normalization whose statistics can be frozen while training goes on.

    While the variable `frozen` is 1, training steps normalize by the moving statistics, as inference does, and leave
    them as they are. No recompilation is needed. A call with `gain=True` gives `|gamma / sigma|` instead, for the layer
    in front whose kernel is quantized with it.
    """

    without_autocast: ClassVar = {"autocast": False}
    unbiased = False

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None, gain: bool = False) -> Any:
        if gain:
            return self.gain()
        if not training or not self.trainable:
            return super().call(inputs, training=training, mask=mask)
        x = ops.cast(inputs, "float32")
        one_kernel = len(x.shape) == 4 and self.axis % 4 == 3 and mask is None and not self.synchronized
        y = self.in_one_kernel(x) if one_kernel and not in_xla() else self._composed(x, mask)
        return ops.cast(y, self.compute_dtype)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None, mask: Any = None, gain: bool = False
    ) -> Any:
        if gain:
            return keras.KerasTensor(self.moving_mean.shape, "float32")
        return keras.KerasTensor(inputs.shape, self.compute_dtype)

    def _composed(self, x: Any, mask: Any) -> Any:
        """The same in single ops, which XLA fuses better than the kernel."""
        frozen = self.frozen > 0
        moved = []
        for variable, batch in zip((self.moving_mean, self.moving_variance), self._moments(x, mask), strict=True):
            old = ops.convert_to_tensor(variable)
            moved.append(ops.where(frozen, old, batch))
            variable.assign(ops.where(frozen, old, old * self.momentum + batch * (1.0 - self.momentum)))
        gamma, beta = self.parameters(x.shape[self.axis])
        return ops.batch_normalization(x, *moved, axis=self.axis, offset=beta, scale=gamma, epsilon=self.epsilon)


@register
class ChannelAffine(ChannelAffineBase, keras.layers.Layer):
    __doc__ = ChannelAffineBase.__doc__


@register
class TrainedOperand(OperandBase, keras.layers.Layer):
    __doc__ = OperandBase.__doc__
    without_autocast: ClassVar = {"autocast": False}


@register
class ReciprocalRoot(ReciprocalRootBase, keras.layers.Layer):
    __doc__ = ReciprocalRootBase.__doc__


@register
class ScaledSoftmax(ScaledSoftmaxBase, keras.layers.Layer):
    __doc__ = ScaledSoftmaxBase.__doc__
