"""What the layers of a quantized Keras model do, for both generations: state in variables, numerics in TensorFlow.

A front end derives its layers from these and from its own `Layer`, and adds what that needs (registration, shapes).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from kquant.core.moving import EMA_DECAY
from kquant.core.weights import gain_shape, weight_formula
from kquant.keras_common.linear import linear_of
from kquant.tf_numerics import (
    NO_BATCH,
    Observed,
    fake_quantize_range,
    observe,
    quantized_weight,
    range_in_force,
    weight_codes,
    with_quantized_gradient,
)


class Stateful:
    """A layer that keeps plain variables: not trained, and never cast to a narrower dtype."""

    without_autocast: ClassVar[dict[str, bool]]  # how this generation's `add_weight` is told so

    def add_state(self, name: str, shape: tuple = (), dtype: str = "float32", initial: str = "zeros") -> Any:
        """A variable of the layer."""
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer=initial, trainable=False, **self.without_autocast
        )


class Delayed(Stateful):
    """A layer that begins to quantize at the training step `start_step`.

    The variable `step` counts calls in training. `calls` is how often the model calls the layer in each step, so all
    its calls begin in the same step; the nodes of the layer would not do, because a clone of the model adds to them.
    """

    start_step: int
    calls: int

    def add_step(self) -> None:
        """Make the variable that counts, if there is a delay."""
        if self.start_step:
            self.step = self.add_state("step", dtype="int32")

    def is_waiting(self) -> bool:
        """Whether quantization has not begun yet."""
        return bool(self.start_step) and int(np.asarray(self.step)) < self.start_step * self.calls

    def started(self, training: bool | None) -> Any:
        """Whether quantization has begun, as a tensor, or None without a delay. Counts a call in training."""
        if not self.start_step:
            return None
        step = tf.convert_to_tensor(self.step)
        if training:
            self.step.assign(step + 1)
        return step >= self.start_step * self.calls


class Range:
    """A range in variables: `minimum`, `maximum`, `covered_low`, `covered_high`, `seen` and `frozen`, or `fixed`.

    See `kquant.tf_numerics.Observed` for what each holds. `bits`, `symmetric`, `nonneg` and `decay` are attributes.
    """

    fixed: list[float] | None

    def observe(self, x: Any, site: int) -> tuple[Any, Any]:
        """Take in one training batch, float32, at a call site; gives what `range` takes as `batch`."""
        state = Observed(*(tf.convert_to_tensor(getattr(self, name)) for name in Observed._fields))
        taken = observe(x, state, site, self.nonneg, self.decay)
        self.minimum.assign(taken.minimum)
        self.maximum.assign(taken.maximum)
        self.seen.assign(taken.seen)
        return taken.low, taken.high

    def fake_quantized(self, x: Any, site: int | None, training: bool | None, started: Any) -> Any:
        """Fake-quantize float32 `x`.

        Args:
            x: the tensor.
            site: the call site that observes it in training; None where it only rounds.
            training: whether this is a training step.
            started: whether quantization has begun, as a tensor; None where it has no delay.
        """
        observes = training and self.fixed is None and site is not None
        batch = self.observe(x, site) if observes else NO_BATCH
        quantized = fake_quantize_range(x, *self.range(batch), self.bits)
        ready = started
        if self.fixed is None and not training:
            seen = tf.reduce_max(tf.convert_to_tensor(self.seen)) > 0
            ready = seen if started is None else tf.logical_and(started, seen)
        return quantized if ready is None else tf.where(ready, quantized, x)

    def range(self, batch: tuple[Any, Any] = NO_BATCH) -> tuple[Any, Any]:
        """The float32 range in force, before nudging; `[0, 1]` for a tensor that is constantly zero.

        Args:
            batch: what `observe` gave of the training batch that is quantized on it.
        """
        if self.fixed is not None:
            return tf.constant(self.fixed[0], tf.float32), tf.constant(self.fixed[1], tf.float32)
        values = (tf.convert_to_tensor(v) for v in (self.minimum, self.maximum))
        return range_in_force(*values, self.bits, self.symmetric, batch)

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

    def make_state(self, owner: Stateful, prefix: str = "") -> None:
        """Make the variables of an observed range, on the layer `owner`."""
        if self.fixed is not None:
            return
        for name in ("minimum", "maximum", "covered_low", "covered_high", "seen"):
            initial = "ones" if name.startswith("covered") else "zeros"
            setattr(self, name, owner.add_state(prefix + name, (self.sites,), initial=initial))
        self.frozen = owner.add_state(prefix + "frozen")


class FakeQuantizeBase(Range, Delayed):
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
        calls: how often the model calls it in a step.
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
        calls: int = 1,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.bits, self.sites, self.symmetric, self.nonneg = bits, sites, symmetric, nonneg
        self.fixed = None if fixed is None else [float(v) for v in fixed]
        self.start_step, self.decay, self.calls = start_step, decay, calls
        self.supports_masking = True

    def build(self, input_shape: Any = None) -> None:
        self.make_state(self)
        self.add_step()
        self.built = True

    def call(self, x: Any, site: int | None = None, boundary: bool = False, training: bool | None = None) -> Any:
        x = tf.convert_to_tensor(x)
        quantized = self.fake_quantized(tf.cast(x, tf.float32), site, training, self.started(training))
        return tf.cast(quantized, x.dtype if x.dtype.is_floating else tf.float32)

    def get_config(self) -> dict:
        own = ("bits", "sites", "fixed", "symmetric", "nonneg", "start_step", "decay", "calls")
        return {**super().get_config(), **{k: _plain(getattr(self, k)) for k in own}}


def _plain(value: Any) -> Any:
    """A list as such: Keras wraps those that a layer holds."""
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else value


class QuantizedBase(Delayed):
    """A layer whose kernel is quantized each time it is used; its float kernel stays the trained variable.

    The gradient is passed straight through the rounding. Batch norm, if any, stays behind it in the model. `layer`,
    `quantizer`, `bits`, `per_channel`, `gradient_bits`, `start_step` and `calls` are attributes.
    """

    rules: ClassVar[dict[type, Any]]

    def make_formula(self) -> Any:
        """The formula of the weights, from the attributes."""
        axes = self.rule.axes(self.layer) if self.per_channel else None
        return weight_formula(self.quantizer, self.bits, axes)

    def make_state(self) -> None:
        """Make the variables, once the layer is built."""
        # Codes come from the float32 kernel; a mixed-precision scope would round it first.
        self.exempt(self.kernel)
        self.supports_masking = self.layer.supports_masking
        self.add_step()
        if self.gradient_bits:  # a weight, because Keras does not save the state of its own seed generators
            self.draws = self.add_state("draws", dtype="int32")

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, mask)

    @property
    def rule(self) -> Any:
        """How the layer's class applies its kernel."""
        return linear_of(self.rules, self.layer)

    @property
    def kernel(self) -> Any:
        """The float master weights."""
        return self.rule.kernel(self.layer)

    def codes(self, gain: Any = None) -> tuple[Any, Any]:
        """Integer-valued float codes (shape of the kernel) and their broadcastable scale, from the current kernel.

        Args:
            gain: of the batch norm behind, where the kernel has one scale with it: one value per output channel.
        """
        return weight_codes(self.formula, self.wide_kernel(), self._over_kernel(gain))

    def _over_kernel(self, gain: Any) -> Any:
        if gain is None:
            return None
        return tf.reshape(gain, gain_shape(gain.shape[0], self.kernel.shape, self.rule.axes(self.layer)))

    def call(self, x: Any, gain: Any = None, training: bool | None = None, quantized: bool = True) -> Any:
        kernel = self.wide_kernel()
        if quantized:
            kernel = quantized_weight(self.formula, kernel, self._over_kernel(gain), bool(training))
        started = self.started(training) if quantized else None
        if started is not None:
            kernel = tf.where(started, kernel, self.wide_kernel())
        kind = self.compute_dtype
        if self.rule.casts:
            x = tf.cast(x, kind)
        y = self.rule.apply(self.layer, x, tf.cast(kernel, kind))
        if self.gradient_bits and training:
            draws = tf.convert_to_tensor(self.draws) + 1
            self.draws.assign(draws)
            y = with_quantized_gradient(y, self.gradient_bits, (self.layer.name, draws), started)
        bias = self.rule.bias(self.layer)
        return y if bias is None else y + tf.cast(tf.convert_to_tensor(bias), kind)
