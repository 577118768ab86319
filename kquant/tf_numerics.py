"""The numerics that all TensorFlow front ends share: core's formulas over `tf`, with their gradients.

Everything here is a function of tensors. Where state lies (Keras variables, variables of a graph) is the front end's.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from kquant.core.affine import fake_quantize
from kquant.core.moving import kept, moved
from kquant.core.weights import DoReFa, Symmetric, quantize_gradient

# The array namespace of core's formulas, over TensorFlow.
xp = SimpleNamespace(
    abs=tf.abs,
    clip=tf.clip_by_value,
    floor=tf.floor,
    max=lambda x, axis=None, keepdims=False: tf.reduce_max(x, axis, keepdims),
    maximum=tf.maximum,
    min=tf.reduce_min,
    mean=lambda x, axis=None, keepdims=False: tf.reduce_mean(x, axis, keepdims),
    minimum=tf.minimum,
    ones_like=tf.ones_like,
    tanh=tf.tanh,
    where=tf.where,
)


@tf.custom_gradient
def straight_through(x: Any, value: Any) -> Any:
    """`value`, with the gradient passed to `x` unchanged (Bengio et al. 2013, straight-through estimator)."""
    return value, lambda upstream: (upstream, None)


@tf.custom_gradient
def clipped_straight_through(x: Any, value: Any, low: Any, high: Any) -> Any:
    """`value`, with the gradient passed to `x` inside `[low, high]` and zero outside."""

    def backward(upstream: Any) -> tuple:
        inside = tf.logical_and(x >= low, x <= high)
        return tf.where(inside, upstream, tf.zeros_like(upstream)), None, None, None

    return value, backward


def fake_quantize_range(x: Any, low: Any, high: Any, bits: int) -> Any:
    """Fake-quantize float32 `x` to `bits` on the range `[low, high]`, nudged so that zero is exact.

    From 2 to 8 bits this is TensorFlow's `FakeQuantWithMinMaxVars` (one pass, same codes as `Affine.of_range`); one bit
    and the symmetric 16-bit grid, which that kernel lacks, are written out.
    """
    if 2 <= bits <= 8:
        return tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=bits)
    levels = 1.0 if bits == 1 else 32767.0
    scale = high / levels
    value = fake_quantize(x, scale, 0.0, 0.0 if bits == 1 else -levels - 1.0, levels, xp)
    return clipped_straight_through(x, value, low, high)


def weight_codes(formula: Symmetric | DoReFa, kernel: Any, gain: Any = None, revive: bool = False) -> tuple[Any, Any]:
    """Integer-valued float codes (shape of the float32 `kernel`) and their broadcastable scale.

    With a `gain` they are those of the kernel and its batch norm on one scale, see `Symmetric.fold`.
    """
    prepared = formula.prepare(kernel, xp)
    return formula.quantize(prepared, xp) if gain is None else formula.fold(prepared, gain, revive, xp)


def quantized_weight(formula: Symmetric | DoReFa, kernel: Any, gain: Any = None, revive: bool = False) -> Any:
    """The fake-quantized float32 `kernel`, differentiable through the formula's `prepare`."""
    codes, scale = weight_codes(formula, kernel, gain, revive)
    return straight_through(formula.prepare(kernel, xp), tf.stop_gradient(codes * scale))


def with_quantized_gradient(y: Any, bits: int, seed: tuple[str, Any], started: Any = None) -> Any:
    """`y` unchanged, whose gradient is quantized as DoReFa-Net does it.

    Args:
        y: a layer's output before its bias, samples on axis 0.
        bits: of the gradient, 1..8.
        seed: of the noise: a name, and the number of the draw (int32).
        started: a boolean tensor; where it is false the gradient passes as it is. None for always.
    """
    name, draw = seed
    replicas = _replicas()
    if replicas is not None:  # noise of their own: equal noise would not average out over the replicas
        draw = draw * replicas.num_replicas_in_sync + tf.cast(replicas.replica_id_in_sync_group, tf.int32)
    key = tf.stack([zlib.crc32(name.encode()) % 2**31, draw])
    noise = tf.random.stateless_uniform(tf.shape(y), key, -0.5, 0.5)

    @tf.custom_gradient
    def identity(value: Any) -> Any:
        def backward(upstream: Any) -> Any:
            quantized = tf.cast(quantize_gradient(tf.cast(upstream, tf.float32), noise, bits, xp), upstream.dtype)
            return quantized if started is None else tf.where(started, quantized, upstream)

        return value, backward

    return identity(y)


def _replicas() -> Any:
    """The replica context of distributed training, or None where there is one replica only."""
    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context


def batch_range(x: Any, nonneg: bool) -> tuple[Any, Any]:
    """Minimum and maximum of a batch, both widened to zero; of the batches of all replicas in distributed training.

    So the ranges of all replicas are equal to the bit, and are those of one process that has the whole batch.
    """
    low = tf.zeros(()) if nonneg else tf.minimum(tf.reduce_min(x), 0.0)
    high = tf.maximum(tf.reduce_max(x), 0.0)
    replicas = _replicas()
    if replicas is None:
        return low, high
    ends = tf.reduce_max(replicas.all_gather(tf.stack([-low, high])[None], axis=0), axis=0)
    return 0.0 - ends[0], ends[1]


class Observed(NamedTuple):
    """The state of an observed range, float32 tensors; all but `frozen` have one value per call site.

    `seen` is 0 where there is no range yet, 1 where it moves with the batches, 2 where it is held. Calibration's ranges
    may be narrower than the data (MSE at few bits); training keeps to the shares `covered_low` and `covered_high`.
    """

    minimum: Any
    maximum: Any
    covered_low: Any
    covered_high: Any
    seen: Any
    frozen: Any


NO_BATCH = (0.0, 0.0)  # extremes that widen no range


class Taken(NamedTuple):
    """What a training batch leaves: the state's `minimum`, `maximum` and `seen` after it, and its own `low` and `high`.

    The latter are scalars, zero where the range does not move.
    """

    minimum: Any
    maximum: Any
    seen: Any
    low: Any
    high: Any


def observe(x: Any, state: Observed, site: int, nonneg: bool, decay: float) -> Taken:
    """Take in one training batch at a call site, that of all replicas in distributed training.

    Args:
        x: the float32 tensor.
        state: before the batch.
        site: the call site that sees it.
        nonneg: the range starts at zero.
        decay: of the exponential moving average; 1.0 keeps the first range.
    """
    # To the gradient a range is a constant, as one that is read from a variable is.
    low, high = batch_range(tf.stop_gradient(x), nonneg)
    low, high = low * state.covered_low[site], high * state.covered_high[site]
    here = np.arange(int(state.seen.shape[0])) == site
    alone = here.size == 1
    fresh = tf.logical_and(tf.equal(state.seen, 0.0), tf.equal(state.frozen, 0.0))
    moving = tf.logical_and(tf.equal(state.seen, 1.0), tf.equal(state.frozen, 0.0))

    def after(old: Any, value: Any) -> Any:
        new = tf.where(fresh, value, tf.where(moving, moved(old, value, decay), old))
        return new if alone else tf.where(here, new, old)

    now = tf.cast(fresh, tf.float32)
    seen = tf.maximum(state.seen, now if alone else tf.where(here, now, 0.0))
    follows = tf.cast(moving[site], tf.float32) if decay < 1.0 else tf.zeros(())
    return Taken(after(state.minimum, low), after(state.maximum, high), seen, low * follows, high * follows)


def range_in_force(
    minimum: Any, maximum: Any, bits: int, symmetric: bool, batch: tuple[Any, Any] = NO_BATCH
) -> tuple[Any, Any]:
    """The range that covers all sites, before nudging; `[0, 1]` for a tensor that is constantly zero.

    Args:
        minimum, maximum: of each site.
        bits: 1..8 or 16.
        symmetric: whether zero lies in the middle.
        batch: `low` and `high` of the training batch that is quantized on it.
    """
    low, high = tf.minimum(tf.reduce_min(minimum), 0.0), tf.maximum(tf.reduce_max(maximum), 0.0)
    low, high = kept(low, high, *batch, xp)
    if symmetric or bits == 16:
        limit = tf.maximum(-low, high)
        half = 2 ** (bits - 1)
        low, high = (-limit if bits == 16 else -limit * (half / (half - 1.0))), limit
    return low, tf.where(tf.equal(high - low, 0.0), 1.0, high)
