"""tfmot `Quantizer`s: what a tfmot wrapper calls on a kernel and on an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kquant.core.moving import EMA_DECAY
from kquant.core.weights import weight_formula
from kquant.keras2._tfmot import Quantizer
from kquant.keras2.norms import WITHOUT_AUTOCAST, plain, register
from kquant.keras_common.layers import Range
from kquant.tf_numerics import Observed, quantized_weight


def _variable(layer: Any, name: str, shape: tuple = (), dtype: str = "float32", initial: str = "zeros") -> Any:
    return layer.add_weight(
        name=name, shape=shape, dtype=dtype, initializer=initial, trainable=False, **WITHOUT_AUTOCAST
    )


def _started(start_step: int, weights: dict, training: Any) -> Any:
    """Whether quantization has begun, as a tensor, or None without a delay. Counts a call in training."""
    if not start_step:
        return None
    step = tf.convert_to_tensor(weights["step"])
    if training:
        weights["step"].assign(step + 1)
    return step >= start_step


@register
class KernelQuantizer(Quantizer):
    """Quantizes a kernel by a recipe's formula; the gradient is passed straight through the rounding.

    Args:
        quantizer: `"naive"`, `"qat"` or `"dorefa"`.
        bits: of the weights.
        axes: the kernel axes that share a scale; None for one scale.
        start_step: the kernel is left in float before this training step.
    """

    def __init__(self, quantizer: str, bits: int, axes: Sequence[int] | None, start_step: int = 0):
        self.quantizer, self.bits, self.start_step = quantizer, bits, start_step
        self.axes = None if axes is None else tuple(axes)
        self.formula = weight_formula(quantizer, bits, self.axes)

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict:
        return {"step": _variable(layer, f"{name}_step", dtype="int32")} if self.start_step else {}

    @plain
    def __call__(self, inputs: Any, training: Any, weights: dict, **kwargs: Any) -> Any:
        kernel = tf.convert_to_tensor(inputs)
        started = _started(self.start_step, weights, training)
        quantized = quantized_weight(self.formula, kernel)
        return quantized if started is None else tf.where(started, quantized, kernel)

    def get_config(self) -> dict:
        return {"quantizer": self.quantizer, "bits": self.bits, "axes": self.axes, "start_step": self.start_step}


class _Bound(Range):
    """A range whose variables are those that tfmot hands over at each call."""

    def __init__(self, settings: RangeQuantizer, weights: dict):
        vars(self).update(vars(settings) | weights)


@register
class RangeQuantizer(Quantizer):
    """Fake-quantizes activations on a range that follows them in training and stands still outside it.

    Args: as `kquant.keras2.layers.FakeQuantize`, for one call site.
    """

    def __init__(
        self,
        bits: int = 8,
        fixed: Sequence[float] | None = None,
        symmetric: bool = False,
        nonneg: bool = False,
        start_step: int = 0,
        decay: float = EMA_DECAY,
    ):
        self.bits, self.symmetric, self.nonneg = bits, symmetric, nonneg
        self.fixed = None if fixed is None else [float(v) for v in fixed]
        self.start_step, self.decay = start_step, decay

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict:
        weights = {"step": _variable(layer, f"{name}_step", dtype="int32")} if self.start_step else {}
        if self.fixed is not None:
            return weights
        for field in Observed._fields:
            shape = () if field == "frozen" else (1,)
            initial = "ones" if field.startswith("covered") else "zeros"
            weights[field] = _variable(layer, f"{name}_{field}", shape, initial=initial)
        return weights

    @plain
    def __call__(self, inputs: Any, training: Any, weights: dict, **kwargs: Any) -> Any:
        started = _started(self.start_step, weights, training)
        quantized = _Bound(self, weights).fake_quantized(tf.cast(inputs, tf.float32), 0, training, started)
        return tf.cast(quantized, inputs.dtype)

    def get_config(self) -> dict:
        own = ("bits", "fixed", "symmetric", "nonneg", "start_step", "decay")
        return {name: getattr(self, name) for name in own}
