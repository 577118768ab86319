"""Fold a weighted stage: its trained codes with the batch norm in their scales, and its bias.

Batch norm goes into scale and bias: the codes of `w` and of `w * gamma / sigma` are the same but for the sign of gamma
(Jacob et al. 2018, section 3.2, for ranges per channel). A kernel with one scale was quantized with `|gamma / sigma|`
in it (`Symmetric.fold`), and the norm's factor gives that one scale back.
"""

from __future__ import annotations

import numpy as np

from kquant.core.affine import SMALLEST_SCALE, Affine, bias_error, bias_unit, round_half_up
from kquant.core.errors import ModelError, RangeError
from kquant.core.graph import Op
from kquant.core.int8_spec import EXACT
from kquant.core.integer import IntWeight
from kquant.core.stages import Stage
from kquant.core.target import Accumulator
from kquant.core.weights import storage_bits

DEAD_MULTIPLIER = 2.0**-12  # of a channel without weights: its bias is exact to 2^-13 output codes


def fold(stage: Stage, source: Affine, target: Affine, holds: Accumulator) -> IntWeight:
    """Weight codes, channel scales and bias of a weighted stage between two activation tensors.

    The scale of a channel is at least `|bias| / (s_in * bias_limit)`, so that an integer bias fits, and large enough
    for the kernel's multiplier (`holds`); a channel raised to that floor is coded anew on the coarser grid.

    Raises:
        RangeError: a multiplier that the kernel cannot hold. ModelError: weights that are not finite.
    """
    op = stage.anchor
    codes, scale, bits, bias = folded_codes(stage)
    largest = np.abs(by_channel(op, codes)).reshape(-1, scale.size).max(axis=0) * scale
    floor = channel_floors(op, bias, largest, source, target, holds)
    raised = scale < floor
    coarser = round_half_up(by_channel(op, codes) * (scale / np.where(raised, floor, 1.0)))
    codes = from_channel(op, np.where(raised, coarser, by_channel(op, codes)))
    scale = np.where(raised, floor, scale).astype(np.float32)
    _check_scale(op, scale, source, target, holds)
    per_tensor = getattr(op.attrs.get("formula"), "axes", ()) is None and bool((scale == scale[0]).all())
    return IntWeight(codes.astype(np.int8), scale, bits, bias, per_tensor)


def channel_floors(
    op: Op, bias: np.ndarray, largest: np.ndarray, source: Affine, target: Affine, holds: Accumulator
) -> np.ndarray:
    """`scale_floor` of each channel; a kernel that holds its batch norm keeps one scale: its channels count as one."""
    if op.attrs.get("folds_norm"):
        bias, largest = (np.full(bias.size, np.abs(values).max(initial=0.0)) for values in (bias, largest))
    return scale_floor(bias, largest, source, target, holds)


def scale_floor(
    bias: np.ndarray, largest: np.ndarray, source: Affine, target: Affine, holds: Accumulator
) -> np.ndarray:
    """The smallest weight scale of each channel: an integer bias fits, and the kernel holds its multiplier.

    A channel whose weights (largest magnitude `largest`) vanish at the kernel's smallest multiplier is dead, by zero
    weights or a zero gamma: any scale holds it, so it gets one that suits its bias.
    """
    unit = np.float64(target.scale) / np.float64(source.scale)  # the weight scale of multiplier one
    fits = np.maximum(np.abs(bias) / (np.float64(source.scale) * holds.bias_limit), SMALLEST_SCALE)
    least = np.where(largest < holds.smallest * unit, DEAD_MULTIPLIER, holds.smallest)
    floor: np.ndarray = np.maximum(fits, least * unit)
    return floor


def folded_codes(stage: Stage) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Codes (the kernel's shape, sign of gamma included), scale per channel, storage bits and bias, float64."""
    op = stage.anchor
    codes, scale, bits = _trained_codes(stage)
    channels = output_channels(op)
    scale = np.broadcast_to(np.asarray(scale, np.float64).reshape(-1), (channels,))
    bias = trained_bias(op)
    if stage.norm is not None:
        factor, offset = (over_channels(op, stage.norm.weights[role].read()) for role in ("scale", "offset"))
        bias = bias * factor + offset
        codes = from_channel(op, by_channel(op, codes) * np.where(factor < 0, -1.0, 1.0))
        scale = scale * np.abs(factor)
        if op.attrs.get("folds_norm"):  # equal but for the rounding of the gain, and 0 where all codes are
            scale = np.full(channels, scale.max(initial=0.0))
    check_finite(op, kernel=codes, scale=scale, bias=bias)
    return codes, scale, bits, bias


def check_finite(op: Op, **arrays: np.ndarray) -> None:
    """Refuse what training made NaN or infinite.

    Raises:
        ModelError: naming the layer and the array.
    """
    for what, values in arrays.items():
        if not np.isfinite(values).all():
            raise ModelError(
                f"layer {op.layer!r}",
                f"a finite {what}",
                "NaN or infinity",
                "Training diverged; lower the learning rate",
            )


def trained_bias(op: Op) -> np.ndarray:
    """The bias of an op, one value per output channel, float64; zeros without one."""
    channels = output_channels(op)
    if op.kind == "channel_affine":
        return np.asarray(op.weights["offset"].read(), np.float64)
    if "bias" not in op.weights:
        return np.zeros(channels)
    return over_channels(op, op.weights["bias"].read())


def over_channels(op: Op, values: np.ndarray) -> np.ndarray:
    """Values of a bias or a norm, one per output channel: what lacks some output axes of an einsum broadcasts."""
    values = np.asarray(values, np.float64)
    if values.size == output_channels(op):
        return values.reshape(-1)
    return np.broadcast_to(values, _kept_shape(op)).reshape(-1)


def _trained_codes(stage: Stage) -> tuple[np.ndarray, np.ndarray, int]:
    op = stage.anchor
    if op.kind == "channel_affine":  # one weight per channel: a code of full magnitude holds it exactly
        factor = np.asarray(op.weights["scale"].read(), np.float64)
        return np.where(factor < 0, -127.0, 127.0), np.abs(factor) / 127.0, 8
    codes, scale = (np.asarray(a) for a in op.attrs["codes"]())
    return codes, scale, storage_bits(op.attrs["formula"]) if stage.row.int4 else 8


def _kept_axes(op: Op) -> list[int]:
    return [i for i in range(len(op.weights["kernel"].shape)) if i not in op.attrs.get("kernel_axes", ())]


def _kept_shape(op: Op) -> tuple[int, ...]:
    return tuple(op.weights["kernel"].shape[i] for i in _kept_axes(op))


def output_channels(op: Op) -> int:
    """The number of output channels of a weighted op."""
    if op.kind == "channel_affine":
        return int(op.weights["scale"].shape[0])
    return int(np.prod(_kept_shape(op)))


def by_channel(op: Op, codes: np.ndarray) -> np.ndarray:
    """Codes with the output channel(s) flattened into the last axis."""
    if op.kind == "channel_affine":
        return codes
    axes = op.attrs["kernel_axes"]
    return codes.transpose(*axes, *_kept_axes(op)).reshape(*(codes.shape[a] for a in axes), -1)


def from_channel(op: Op, codes: np.ndarray) -> np.ndarray:
    """The inverse of `by_channel`."""
    if op.kind == "channel_affine":
        return codes
    order = [*op.attrs["kernel_axes"], *_kept_axes(op)]
    return codes.reshape([op.weights["kernel"].shape[i] for i in order]).transpose(np.argsort(order))


def _check_scale(op: Op, scale: np.ndarray, source: Affine, target: Affine, holds: Accumulator) -> None:
    multiplier = bias_unit(source, scale) / target.scale
    if not np.isfinite(scale).all() or multiplier.max() >= holds.largest:
        raise RangeError(
            f"tensor {op.output!r}",
            f"the ratio of accumulator to output scale must lie below {holds.largest:.0f}, which the kernel holds",
            f"{multiplier.max():.3g} (weight {scale.max():.3g}, input {source.scale:.3g}, output {target.scale:.3g})",
            "Calibrate on representative data, or leave the layer in float with `exclude`",
        )


def check_bias(bias: np.ndarray, unit: np.ndarray, tensor: str, target: Affine) -> None:
    """Refuse a bias that its unit shifts by so much of an output code that the op could not keep to one code.

    Args:
        bias: real values, one per output channel.
        unit: what a kernel holds it in multiples of, `s_in * s_w`.
        tensor: the id of the op's output.
        target: its parameters.

    Raises:
        RangeError: naming the tensor.
    """
    error = bias_error(bias, unit, target)
    if error > 1.0 - EXACT:
        raise RangeError(
            f"tensor {tensor!r}",
            f"the bias of its layer must be exact to {1.0 - EXACT:.1f} output codes",
            f"{error:.2f}: one step of the bias, input scale times weight scale, is {unit.max():.3g}, "
            f"and one output code {target.scale:.3g}",
            "Calibrate on representative data, give the layer more weight bits, or leave it in float with `exclude`",
        )
