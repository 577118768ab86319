"""The Keras 3 layers that a quantized model is made of. All of their state lies in Keras variables.

`QuantizedLayer` wraps a layer and quantizes its kernel; `FakeQuantize` quantizes activations of one range, at one or
several places. The layers of `kquant.keras3.norms` are registered with them.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from kquant.core.weights import weight_formula
from kquant.keras3.linear import LINEAR, linear_of
from kquant.keras3.norms import register
from kquant.tf_numerics import (
    EMA_DECAY,
    Observed,
    fake_quantize_range,
    observe,
    quantized_weight,
    range_in_force,
    weight_codes,
    with_quantized_gradient,
)


def _float_dtype(x: Any) -> str:
    """The dtype of a fake-quantized tensor: its own, or float32 for integer pixels."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return dtype if "float" in dtype else "float32"


class _Delayed(keras.layers.Layer):
    """A layer that begins to quantize at the training step `start_step`.

    The variable `step` counts calls in training. A layer that a model calls at several places is called as often in
    each step, so all its calls begin in the same step.
    """

    start_step: int

    def _add_step(self) -> None:
        if self.start_step:
            self.step = self.add_weight(
                name="step", shape=(), dtype="int32", initializer="zeros", trainable=False, autocast=False
            )

    def is_waiting(self) -> bool:
        """Whether quantization has not begun yet."""
        return bool(self.start_step) and int(self.step) < self.start_step * max(len(self._inbound_nodes), 1)

    def _started(self, training: bool | None) -> Any:
        """Whether quantization has begun, as a tensor, or None without a delay. Counts a call in training."""
        if not self.start_step:
            return None
        started = self.step >= self.start_step * max(len(self._inbound_nodes), 1)
        if training:
            self.step.assign(self.step + 1)
        return started


@register
class FakeQuantize(_Delayed):
    """Fake quantization of activations that share one range.

    In training each call site keeps its own moving minimum and maximum, and the range is their union, so tensors that
    share a scale (the inputs of a concatenation) are all covered. Outside training the range stands still.

    Args:
        bits: 1..8, or 16 (symmetric).
        sites: number of call sites that observe; a call names its own as `site=`, and with `boundary=True` that its
            input comes from a layer that stays float.
        fixed: `[low, high]` of a range that does not move, or None.
        symmetric: zero point 0.
        nonneg: the range starts at zero.
        start_step: quantize from this training step on; observe before it.
        decay: of the exponential moving average; 1.0 keeps the first range (calibration's, or the first batch's).
    """

    def __init__(
        self,
        bits: int = 8,
        sites: int = 1,
        fixed: list[float] | None = None,
        symmetric: bool = False,
        nonneg: bool = False,
        start_step: int = 0,
        decay: float = EMA_DECAY,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.bits, self.sites, self.symmetric, self.nonneg = bits, sites, symmetric, nonneg
        self.fixed = None if fixed is None else [float(v) for v in fixed]
        self.start_step, self.decay = start_step, decay
        self.supports_masking = True

    def build(self, input_shape: Any = None) -> None:
        def state(name: str, shape: tuple, initial: str = "zeros") -> Any:
            return self.add_weight(
                name=name, shape=shape, dtype="float32", initializer=initial, trainable=False, autocast=False
            )

        if self.fixed is None:
            self.minimum = state("minimum", (self.sites,))
            self.maximum = state("maximum", (self.sites,))
            # Calibration's ranges may be narrower than the data (MSE at few bits); training keeps to that share.
            self.covered_low = state("covered_low", (self.sites,), "ones")
            self.covered_high = state("covered_high", (self.sites,), "ones")
            self.seen = state("seen", (self.sites,))  # 0: no range yet, 1: it moves with the batches, 2: it is held
            self.frozen = state("frozen", ())
        self._add_step()
        self.built = True

    def call(self, x: Any, site: int | None = None, boundary: bool = False, training: bool | None = None) -> Any:
        wide = ops.cast(x, "float32")
        if training and self.fixed is None and site is not None:
            self._observe(wide, site)
        low, high = self.range()
        quantized = fake_quantize_range(wide, low, high, self.bits)
        ready = self._ready(training)
        if ready is not None:
            quantized = ops.where(ready, quantized, wide)
        return ops.cast(quantized, _float_dtype(x))

    def _ready(self, training: bool | None) -> Any:
        """Whether quantization is on, as a tensor; None where it always is."""
        started = self._started(training)
        if self.fixed is not None or training:
            return started
        seen = ops.max(self.seen) > 0
        return seen if started is None else ops.logical_and(started, seen)

    def _observe(self, x: Any, site: int) -> None:
        state = Observed(*(ops.convert_to_tensor(getattr(self, name)) for name in Observed._fields))
        minimum, maximum, seen = observe(x, state, site, self.nonneg, self.decay)
        self.minimum.assign(minimum)
        self.maximum.assign(maximum)
        self.seen.assign(seen)

    def range(self) -> tuple[Any, Any]:
        """The float32 range in force, before nudging; `[0, 1]` for a tensor that is constantly zero."""
        if self.fixed is not None:
            return ops.convert_to_tensor(self.fixed[0], "float32"), ops.convert_to_tensor(self.fixed[1], "float32")
        values = (ops.convert_to_tensor(v) for v in (self.minimum, self.maximum))
        return range_in_force(*values, self.bits, self.symmetric)

    def is_set(self) -> bool:
        """Whether the range has come from data, or is fixed."""
        return self.fixed is not None or bool(np.asarray(self.seen).max() > 0)

    def set_frozen(self, value: float) -> None:
        """Let the range stand still (1) or move with the training batches (0)."""
        self.frozen.assign(value)

    def set_range(
        self, low: float, high: float, site: int, covered: tuple[float, float] = (1.0, 1.0), held: bool = False
    ) -> None:
        """Set a site's range, as calibration does.

        Args:
            low, high: the range.
            site: the call site.
            covered: the shares of the data's minimum and maximum that the range covers, which training keeps to.
            held: training leaves the range as it is.
        """
        values = (low, high, *covered, 2.0 if held else 1.0)
        state = (self.minimum, self.maximum, self.covered_low, self.covered_high, self.seen)
        for variable, value in zip(state, values, strict=True):
            array = np.asarray(variable).copy()
            array[site] = value
            variable.assign(array)

    def compute_output_spec(
        self, x: Any, site: int | None = None, boundary: bool = False, training: bool | None = None
    ) -> Any:
        return keras.KerasTensor(x.shape, _float_dtype(x))

    def get_config(self) -> dict:
        own = ("bits", "sites", "fixed", "symmetric", "nonneg", "start_step", "decay")
        return {**super().get_config(), **{k: getattr(self, k) for k in own}}


@register
class QuantizedLayer(_Delayed):
    """A layer whose kernel is quantized each time it is used; its float kernel stays the trained variable.

    The gradient is passed straight through the rounding. Batch norm, if any, stays behind it in the model.

    Args:
        layer: the layer (no activation of its own).
        quantizer: `"naive"`, `"qat"` or `"dorefa"`.
        bits: of the weights.
        per_channel: one scale per output channel (naive and qat).
        gradient_bits: DoReFa's gradient quantization of the layer's output before its bias, or None.
        start_step: use the float kernel before this training step.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        quantizer: str = "qat",
        bits: int = 8,
        per_channel: bool = True,
        gradient_bits: int | None = None,
        start_step: int = 0,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.layer, self.quantizer, self.bits, self.per_channel = layer, quantizer, bits, per_channel
        self.gradient_bits, self.start_step = gradient_bits, start_step
        rule = linear_of(layer)
        axes = rule.axes(layer) if per_channel else None
        self.formula = weight_formula(quantizer, bits, axes)

    def build(self, input_shape: Any) -> None:
        if not self.layer.built:
            self.layer.build(input_shape)
        # Codes come from the float32 kernel; a mixed-precision scope would round it first.
        self.kernel._autocast = False
        self._add_step()
        if self.gradient_bits:  # a weight, because Keras does not save the state of its own seed generators
            self.draws = self.add_weight(
                name="draws", shape=(), dtype="int32", initializer="zeros", trainable=False, autocast=False
            )
        self.built = True

    @property
    def kernel(self) -> Any:
        """The float master weights."""
        return LINEAR[type(self.layer)].kernel(self.layer)

    def codes(self) -> tuple[Any, Any]:
        """Integer-valued float codes (shape of the kernel) and their broadcastable scale, from the current kernel."""
        return weight_codes(self.formula, ops.convert_to_tensor(self.kernel))

    def quantized_kernel(self) -> Any:
        """The fake-quantized kernel, float32, differentiable with respect to the float kernel."""
        return quantized_weight(self.formula, ops.convert_to_tensor(self.kernel))

    def call(self, x: Any, training: bool | None = None, quantized: bool = True) -> Any:
        kernel = self.quantized_kernel() if quantized else ops.convert_to_tensor(self.kernel)
        started = self._started(training) if quantized else None
        if started is not None:
            kernel = ops.where(started, kernel, ops.convert_to_tensor(self.kernel))
        rule = LINEAR[type(self.layer)]
        kind = self.compute_dtype
        if rule.casts:
            x = ops.cast(x, kind)
        y = rule.apply(self.layer, x, ops.cast(kernel, kind))
        if self.gradient_bits and training:
            y = self._with_quantized_gradient(y, started)
        bias = rule.bias(self.layer)
        return y if bias is None else y + ops.cast(ops.convert_to_tensor(bias), kind)

    def _with_quantized_gradient(self, y: Any, started: Any) -> Any:
        draws = self.draws + 1
        self.draws.assign(draws)
        return with_quantized_gradient(y, self.gradient_bits, (self.layer.name, ops.convert_to_tensor(draws)), started)

    def compute_output_spec(self, x: Any, training: bool | None = None, quantized: bool = True) -> Any:
        return keras.KerasTensor(linear_of(self.layer).shape(self.layer, tuple(x.shape)), self.compute_dtype)

    def get_config(self) -> dict:
        own = ("quantizer", "bits", "per_channel", "gradient_bits", "start_step")
        config = {k: getattr(self, k) for k in own}
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer), **config}

    @classmethod
    def from_config(cls, config: dict) -> QuantizedLayer:
        config = dict(config)
        config["layer"] = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**config)
