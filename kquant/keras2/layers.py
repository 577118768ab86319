"""The tf_keras layers of a quantized model: tfmot's wrapper around a kernel, and quantize layers elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

import tensorflow as tf
import tf_keras
from tf_keras.src.mixed_precision.autocast_variable import AutoCastVariable

from kquant.keras2._tfmot import QuantizeWrapperV2
from kquant.keras2.linear import LINEAR
from kquant.keras2.norms import (
    WITHOUT_AUTOCAST,
    BatchNormalization,
    ChannelAffine,
    ReciprocalRoot,
    ScaledSoftmax,
    TrainedOperand,
    plain,
    register,
)
from kquant.keras2.quantize_config import CONFIGS
from kquant.keras_common.layers import FakeQuantizeBase, QuantizedBase
from kquant.keras_common.named import NamedOutputs
from kquant.keras_common.regularized import ActivityRegularizerBase

__all__ = [
    "ActivityRegularizer",
    "BatchNormalization",
    "ChannelAffine",
    "FakeQuantize",
    "QuantizedLayer",
    "QuantizedModel",
    "ReciprocalRoot",
    "ScaledSoftmax",
    "TrainedOperand",
    "quantized",
]


@register
class FakeQuantize(FakeQuantizeBase, tf_keras.layers.Layer):
    __doc__ = FakeQuantizeBase.__doc__
    without_autocast: ClassVar = WITHOUT_AUTOCAST
    call = plain(FakeQuantizeBase.call)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


@register
class ActivityRegularizer(ActivityRegularizerBase, tf_keras.layers.Layer):
    __doc__ = ActivityRegularizerBase.__doc__
    keras: ClassVar = tf_keras
    call = plain(ActivityRegularizerBase.call)


def _plain_property(name: str) -> property:
    """A property as a plain Keras wrapper has it."""
    own = getattr(tf_keras.layers.Wrapper, name)
    return property(own.fget, own.fset, doc=f"`{name}` of the layer and of this wrapper.")


@register
class QuantizedLayer(QuantizedBase, QuantizeWrapperV2):
    """tfmot's wrapper of a layer whose kernel is quantized each time it is used, as its `quantize_config` says.

    The float kernel stays the trained variable; the gradient is passed straight through the rounding. Unlike tfmot's
    own wrapper this one never replaces an attribute of the layer, honours `trainable`, and can quantize the gradient of
    the layer's output before its bias.

    Args:
        layer: the layer (no activation of its own).
        quantize_config: one of `kquant.keras2.quantize_config`; only its part for the kernel counts.
        calls: how often the model calls it in a step.
    """

    without_autocast: ClassVar = WITHOUT_AUTOCAST
    rules: ClassVar = LINEAR
    call = plain(QuantizedBase.call)

    # Plain Keras wrappers get these right; tfmot's ignores `trainable`.
    trainable = _plain_property("trainable")
    trainable_weights = _plain_property("trainable_weights")
    non_trainable_weights = _plain_property("non_trainable_weights")
    losses = _plain_property("losses")
    updates = _plain_property("updates")

    def __init__(self, layer: Any, quantize_config: Any, calls: int = 1, **kwargs: Any):
        super().__init__(layer, quantize_config, autocast=False, **kwargs)
        self.calls = calls
        self.quantizer, self.bits = quantize_config.quantizer, quantize_config.weight_bits
        self.per_channel, self.start_step = quantize_config.per_channel, quantize_config.start_step
        self.gradient_bits = quantize_config.gradient_bits
        self.formula = self.make_formula()

    def build(self, input_shape: Any) -> None:
        tf_keras.layers.Wrapper.build(self, input_shape)
        self.make_state()

    @staticmethod
    def exempt(variable: Any) -> None:
        """Nothing to do: `wide_kernel` reads past the cast."""

    def wide_kernel(self) -> Any:
        """The float32 kernel, as a tensor."""
        kernel = self.kernel
        return tf.convert_to_tensor(kernel._variable if isinstance(kernel, AutoCastVariable) else kernel)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict:
        return {
            **tf_keras.layers.Layer.get_config(self),
            "layer": tf_keras.layers.serialize(self.layer),
            "calls": self.calls,
            "quantize_config": self.quantize_config.get_config(),
            "recipe": tf_keras.saving.get_registered_name(type(self.quantize_config)),
        }

    @classmethod
    def from_config(cls, config: dict) -> QuantizedLayer:
        config, layer = dict(config), config["layer"]
        config["layer"] = tf_keras.layers.deserialize(layer, use_legacy_format="module" not in layer)
        recipe = tf_keras.saving.get_registered_object(config.pop("recipe"))
        config["quantize_config"] = recipe.from_config(config["quantize_config"])
        return cls(**config)


@register
class QuantizedModel(NamedOutputs, tf_keras.Model):
    __doc__ = NamedOutputs.__doc__


# A model in an .h5 file is looked up by the bare name of its class.
tf_keras.utils.get_custom_objects()["QuantizedModel"] = QuantizedModel


def quantized(layer: Any, spec: Any, name: str) -> QuantizedLayer:
    """The wrapper of a layer whose weights a `WeightSpec` describes."""
    more = {} if spec.gradient_bits is None else {"gradient_bits": spec.gradient_bits}
    config = CONFIGS[spec.quantizer](
        weight_bits=spec.bits, per_channel=spec.per_channel, start_step=spec.start_step, followed_by_bn=True, **more
    )
    return QuantizedLayer(layer, config, name=name, dtype=layer.dtype_policy)
