"""The integer specification as a table: one row per op kind, with its placement, its target op and its measured bound.

Sources. `spec`: the TensorFlow Lite 8-bit quantization specification (fixed output parameters, ops whose input and
output scales must be equal, per-axis weights). `measured`: all 256 codes or 65,536 code pairs through the stock
kernels. `bound` is the largest distance, in codes, between an artifact's code and the exact unrounded result of the op
on the artifact's own inputs; 0.5 is perfect rounding, and 0.6 is what a row has unless its kernel is coarser.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kquant.core.affine import Affine


class Placement(enum.Enum):
    """How the range of an op's output comes about."""

    FREE = "free"  # a range of its own
    FIXED = "fixed"  # parameters that the kernel prescribes
    SHARED = "shared"  # the same scale and zero point in and out
    IDENTITY = "identity"  # no op at all in the artifact
    STORED = "stored"  # quantized weights, float arithmetic: there is no integer kernel
    OPAQUE = "opaque"  # an op that the table does not know; it can only stay float


# The runtime's own kernels, without a delegate, round twice, the second time in a shift by r bits (`second_rounding`).
# int4 weights run on those alone, and are used where r >= INT4_SHIFT.
INT4_SHIFT = 4
WEIGHTS_ONLY = "no integer kernel: its weights are quantized, its arithmetic stays float"  # of a STORED op
RESIZED = "a resize or a transposed convolution needs a known output size; give the model a fixed input size"
EXACT = 0.6  # the contract: 0.5 is perfect rounding, the rest is the kernel's fixed-point multiplier


@dataclass(frozen=True)
class Row:
    """One op kind.

    Args:
        kind: the name that front ends read into.
        placement: how the output's range comes about.
        target: the TFLite builtin op, or "" where a lowering function composes several.
        version: the op version written for int8.
        options: the options class of the schema.
        weighted: has a kernel quantized per output channel.
        int4: the kernel runs on int4 weights.
        int16: the int16 kernel keeps `bound`.
        fuses_norm: a following batch norm folds into the kernel.
        fuses_relu: a following ReLU family op is the kernel's fused activation.
        sums_axes: of an output onto which the kernel adds a tensor of the same shape before it rounds; 0 if it cannot.
        rounds: a SHARED op that computes new values and rounds them to the grid.
        fixed: the output's parameters at 8 bits, for FIXED rows.
        symmetric_inputs: indices of operands whose zero point must be 0.
        bound: largest measured distance to the exact unrounded code.
        version16: the op version written for int16 activations, 0 for `version`.
    """

    kind: str
    placement: Placement
    target: str = ""
    version: int = 1
    options: str = ""
    weighted: bool = False
    int4: bool = False
    int16: bool = False
    fuses_norm: bool = False
    fuses_relu: bool = False
    sums_axes: int = 0
    rounds: bool = False
    fixed: Affine | None = None
    symmetric_inputs: tuple[int, ...] = ()
    bound: float = EXACT
    version16: int = 0
    nonneg: bool = field(default=False)

    @property
    def is_product(self) -> bool:
        """Whether the kernel sums products over an axis, with weights or of two tensors."""
        return self.fuses_norm or self.kind == "batch_matmul"


def _weighted(kind: str, target: str, version: int, options: str, **more: Any) -> Row:
    flags = {"int16": True, "fuses_norm": True, "fuses_relu": True, **more}
    return Row(kind, Placement.FREE, target, version, options, weighted=True, **flags)


def _shared(kind: str, target: str = "", version: int = 1, options: str = "", **more: Any) -> Row:
    flags = {"int16": True, **more}
    return Row(kind, Placement.SHARED, target, version, options, **flags)


def _fixed(kind: str, target: str, options: str, scale: float, zero_point: int, bound: float, nonneg: bool) -> Row:
    affine = Affine(np.float32(scale), zero_point, 8)
    return Row(kind, Placement.FIXED, target, 2, options, fixed=affine, bound=bound, nonneg=nonneg)


FREE = Placement.FREE

ROWS: dict[str, Row] = {
    row.kind: row
    for row in (
        # Weighted ops. Per-axis weights: spec, section "Per-axis vs per-tensor"; int4 versions: measured.
        _weighted("conv2d", "CONV_2D", 3, "Conv2DOptions", version16=8, int4=True),
        _weighted("depthwise_conv2d", "DEPTHWISE_CONV_2D", 3, "DepthwiseConv2DOptions", int4=True),
        _weighted("conv2d_transpose", "TRANSPOSE_CONV", 3, "TransposeConvOptions", int16=False),
        _weighted("dense", "FULLY_CONNECTED", 4, "FullyConnectedOptions", version16=11, int4=True),
        _weighted("channel_affine", "DEPTHWISE_CONV_2D", 3, "DepthwiseConv2DOptions", fuses_norm=False),
        _weighted("embedding", "GATHER", 2, "GatherOptions", fuses_norm=False, fuses_relu=False),
        # Arithmetic. Rank <= 6; fused activations.
        Row("add", FREE, "ADD", 2, "AddOptions", version16=3, fuses_relu=True, int16=True, bound=0.65),
        Row("sub", FREE, "SUB", 2, "SubOptions", version16=5, fuses_relu=True, int16=True, bound=0.65),
        Row("mul", FREE, "MUL", 2, "MulOptions", version16=4, fuses_relu=True, int16=True),
        Row(
            "batch_matmul",
            FREE,
            "BATCH_MATMUL",
            4,
            "BatchMatMulOptions",
            version16=4,
            symmetric_inputs=(1,),
            int16=True,
        ),
        Row("mean", FREE, "MEAN", 2, "ReducerOptions", version16=3, int16=True),
        Row("sum", FREE, "SUM", 2, "ReducerOptions"),
        Row("elementwise", FREE),  # a native kernel where one keeps the contract, else the exact 256-entry table
        _weighted("prelu", "", 1, "", fuses_norm=False, fuses_relu=False, int16=False),  # a table per slope
        # Fixed output parameters: spec, "Tensorflow Lite specification for 8-bit".
        _fixed("softmax", "SOFTMAX", "SoftmaxOptions", 1 / 256, -128, 1.0, True),
        _fixed("sigmoid", "LOGISTIC", "", 1 / 256, -128, EXACT, True),
        _fixed("tanh", "TANH", "", 1 / 128, 0, EXACT, False),
        # Equal scales in and out: spec, the ops with the same-scale restriction.
        _shared("relu", "RELU", version16=3),
        _shared("max_pool2d", "MAX_POOL_2D", 2, "Pool2DOptions", version16=3),
        _shared("avg_pool2d", "AVERAGE_POOL_2D", 2, "Pool2DOptions", version16=3, rounds=True, fuses_relu=True),
        _shared("concat", "CONCATENATION", 2, "ConcatenationOptions", version16=3),
        _shared("maximum", "MAXIMUM", 2, "MaximumMinimumOptions", version16=3),
        _shared("minimum", "MINIMUM", 2, "MaximumMinimumOptions", version16=3),
        _shared("reduce_max", "REDUCE_MAX", 2, "ReducerOptions", version16=3),
        _shared("reduce_min", "REDUCE_MIN", 2, "ReducerOptions", version16=3),
        _shared("reshape", "RESHAPE", 1, "ReshapeOptions"),
        _shared("transpose", "TRANSPOSE", 2, "TransposeOptions", version16=4),
        _shared("pad", "PAD", 2, "PadOptions", version16=3),
        _shared("mirror_pad", "MIRROR_PAD", 2, "MirrorPadOptions", version16=3),
        _shared("strided_slice", "STRIDED_SLICE", 2, "StridedSliceOptions", version16=4),
        _shared("gather", "GATHER", 2, "GatherOptions"),
        _shared("tile", "TILE", 1, "TileOptions"),
        _shared("resize_bilinear", "RESIZE_BILINEAR", 3, "ResizeBilinearOptions", rounds=True, int16=False),
        _shared("resize_nearest", "RESIZE_NEAREST_NEIGHBOR", 3, "ResizeNearestNeighborOptions"),
        # An operand that is a trained array: a constant tensor of the artifact, with a range of its own.
        Row("parameter", FREE, int16=True),
        # Trains on quantized weights, and runs in float.
        Row("recurrent", Placement.STORED, weighted=True),
        # Nothing in the artifact.
        Row("identity", Placement.IDENTITY, int16=True),
    )
}


@dataclass(frozen=True)
class Native:
    """A kernel for an elementwise function: measured on all 256 codes, within `EXACT` in every kernel set."""

    target: str
    version: int = 1
    options: str = ""
    fields: tuple[tuple[str, Any], ...] = ()


# Functions whose native int8 kernel keeps the contract; every other one runs as the exact table. LEAKY_RELU does not
# (0.85 codes, a mean of 0.16), nor HARD_SWISH at large scales (0.75, a mean of 0.12).
NATIVE: dict[str, Native] = {
    "elu": Native("ELU"),
    "gelu": Native("GELU", 2, "GeluOptions", (("approximate", False),)),
    "gelu_tanh": Native("GELU", 2, "GeluOptions", (("approximate", True),)),
}

OPAQUE = Row("opaque", Placement.OPAQUE)


def second_rounding(multiplier: float) -> float:
    """What a kernel that rounds twice adds to an error of half a code: at most `2^-r / 2`, and on average as much.

    Source: gemmlowp's fixed-point output stage, a rounding high multiply by a mantissa in [0.5, 1), then a rounding
    shift by the r bits that are left. Where r is 0 or less there is no second rounding.

    Args:
        multiplier: `s_in * s_w / s_out`.

    Example:
        >>> second_rounding(0.26), second_rounding(0.5), second_rounding(0.03)
        (0.25, 0.0, 0.015625)
    """
    shift = -math.frexp(multiplier)[1]
    return 2.0 ** -(shift + 1) if shift > 0 else 0.0


def row_of(kind: str) -> Row:
    """The row of an op kind, or `OPAQUE`.

    Example:
        >>> row_of("conv2d").target, row_of("lstm").placement.value
        ('CONV_2D', 'opaque')
    """
    return ROWS.get(kind, OPAQUE)
