"""The tf_keras layers that normalizations become."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import tensorflow as tf
import tf_keras

from kquant.keras_common.norms import ChannelAffineBase, Freezable, ReciprocalRootBase, ScaledSoftmaxBase, in_xla
from kquant.keras_common.operand import OperandBase

register = tf_keras.saving.register_keras_serializable(package="kquant")
WITHOUT_AUTOCAST = {"experimental_autocast": False}


def plain(call: Callable) -> Callable:
    """A layer's call that is not converted: nothing here branches on a tensor in Python.

    With its own signature, without which tf_keras would hand it every argument that it has, such as a mask.
    """
    converted: Any = tf.autograph.experimental.do_not_convert(call)
    converted.__signature__ = inspect.signature(call)
    return converted


@register
class BatchNormalization(Freezable, tf_keras.layers.BatchNormalization):
    """tf_keras' batch normalization whose statistics can be frozen while training goes on.

    While the variable `frozen` is 1, training steps normalize by the moving statistics, as inference does, and leave
    them as they are. No recompilation is needed. A call with `gain=True` gives `|gamma / sigma|` instead, for the layer
    in front whose kernel is quantized with it.
    """

    without_autocast: ClassVar = WITHOUT_AUTOCAST
    unbiased = True

    @plain
    def call(self, inputs: Any, training: Any = None, mask: Any = None, gain: bool = False) -> Any:
        if gain:
            return self.gain()
        if not training or not self.trainable:
            return super().call(inputs, training=False, mask=mask)
        if self.fused and list(self.axis) == [3] and mask is None and not in_xla():
            return tf.cast(self.in_one_kernel(tf.cast(inputs, tf.float32)), self.compute_dtype)
        return super().call(inputs, training=tf.equal(tf.convert_to_tensor(self.frozen), 0.0), mask=mask)


@register
class ChannelAffine(ChannelAffineBase, tf_keras.layers.Layer):
    __doc__ = ChannelAffineBase.__doc__


@register
class TrainedOperand(OperandBase, tf_keras.layers.Layer):
    __doc__ = OperandBase.__doc__
    without_autocast: ClassVar = WITHOUT_AUTOCAST


@register
class ReciprocalRoot(ReciprocalRootBase, tf_keras.layers.Layer):
    __doc__ = ReciprocalRootBase.__doc__


@register
class ScaledSoftmax(ScaledSoftmaxBase, tf_keras.layers.Layer):
    __doc__ = ScaledSoftmaxBase.__doc__
