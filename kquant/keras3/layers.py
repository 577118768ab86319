"""The Keras 3 layers that a quantized model is made of. All of their state lies in Keras variables."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import tensorflow as tf

from kquant.keras3.linear import LINEAR
from kquant.keras3.norms import (
    BatchNormalization,
    ChannelAffine,
    ReciprocalRoot,
    ScaledSoftmax,
    TrainedOperand,
    register,
)
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
class FakeQuantize(FakeQuantizeBase, keras.layers.Layer):
    __doc__ = FakeQuantizeBase.__doc__
    without_autocast: ClassVar = {"autocast": False}

    def compute_output_spec(
        self, x: Any, site: int | None = None, boundary: bool = False, training: bool | None = None
    ) -> Any:
        dtype = keras.backend.standardize_dtype(x.dtype)
        return keras.KerasTensor(x.shape, dtype if "float" in dtype else "float32")


@register
class QuantizedLayer(QuantizedBase, keras.layers.Layer):
    """A layer whose kernel is quantized each time it is used; its float kernel stays the trained variable.

    The gradient is passed straight through the rounding. Batch norm, if any, stays behind it in the model.

    Args:
        layer: the layer (no activation of its own).
        quantizer: `"naive"`, `"qat"` or `"dorefa"`.
        bits: of the weights.
        per_channel: one scale per output channel (naive and qat).
        gradient_bits: DoReFa's gradient quantization of the layer's output before its bias, or None.
        start_step: use the float kernel before this training step.
        calls: how often the model calls it in a step.
    """

    without_autocast: ClassVar = {"autocast": False}
    rules: ClassVar = LINEAR

    def __init__(
        self,
        layer: keras.layers.Layer,
        quantizer: str = "qat",
        bits: int = 8,
        per_channel: bool = True,
        gradient_bits: int | None = None,
        start_step: int = 0,
        calls: int = 1,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.layer, self.quantizer, self.bits, self.per_channel = layer, quantizer, bits, per_channel
        self.gradient_bits, self.start_step, self.calls = gradient_bits, start_step, calls
        self.formula = self.make_formula()

    def build(self, input_shape: Any) -> None:
        if not self.layer.built:
            self.layer.build(input_shape)
        self.make_state()
        self.built = True

    @staticmethod
    def exempt(variable: Any) -> None:
        """Keep a variable from being cast to the compute dtype where it is read."""
        variable._autocast = False

    def wide_kernel(self) -> Any:
        """The float32 kernel, as a tensor."""
        return tf.convert_to_tensor(self.kernel)

    def compute_output_spec(
        self, x: Any, gain: Any = None, training: bool | None = None, quantized: bool = True
    ) -> Any:
        return keras.KerasTensor(self.rule.shape(self.layer, tuple(x.shape)), self.compute_dtype)

    def get_config(self) -> dict:
        own = ("quantizer", "bits", "per_channel", "gradient_bits", "start_step", "calls")
        config = {k: getattr(self, k) for k in own}
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer), **config}

    @classmethod
    def from_config(cls, config: dict) -> QuantizedLayer:
        config = dict(config)
        config["layer"] = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**config)


@register
class ActivityRegularizer(ActivityRegularizerBase, keras.layers.Layer):
    __doc__ = ActivityRegularizerBase.__doc__
    keras: ClassVar = keras


@register
class QuantizedModel(NamedOutputs, keras.Model):
    __doc__ = NamedOutputs.__doc__


def quantized(layer: keras.layers.Layer, spec: Any, name: str) -> QuantizedLayer:
    """The wrapper of a layer whose weights a `WeightSpec` describes."""
    return QuantizedLayer(
        layer, spec.quantizer, spec.bits, spec.per_channel, spec.gradient_bits, spec.start_step,
        name=name, dtype=layer.dtype_policy,
    )  # fmt: skip
