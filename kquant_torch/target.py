"""The integer kernels of PyTorch on x86 CPUs as a table: one row per op kind, beside the measurement it rests on.

Placement is TFLite's, so a model has the same ranges and codes in every artifact; a row here says what computes it. All
were measured in torch 2.13 on AVX512-VNNI and with ONEDNN_MAX_CPU_ISA=AVX2, on random codes of all values and many
scales, against the exact result: none is off by more than perfect rounding (0.5 codes) and the last bit of a float32 or
of an integer factor, which `EXACT` covers. `tests/torch/test_artifacts.py` holds
each to its bound, inside of models.

What torch offers and this table does not use, measured as well: `onednn::qadd` and `qmul` give wrong values nearly
everywhere; `onednn::qlinear_pointwise` with a weight that was not prepacked ends the process; bilinear interpolation of
uint8 is up to 0.97 codes off; without VNNI, 16-bit sums of pairs saturate where a weight is beyond +-63.
"""

from __future__ import annotations

from dataclasses import replace

from kquant.core.int8_spec import EXACT, ROWS, Row
from kquant.core.target import Accumulator, Target

PORTABLE = 64  # the largest weight code with which 255 * code + 255 * code stays within int16, on CPUs without VNNI

# Op kind: what computes it. `kquant::` functions are those of `kquant_torch.runtime`, integer throughout.
KERNELS: dict[str, str] = {
    # u8 x s8 with int32 sums, then float32: real scale and bias, clamp, rounding half to even.
    "conv2d": "onednn::qconv_pointwise",
    "conv2d_transpose": "onednn::qconv_pointwise",  # behind kquant::spread
    "channel_affine": "onednn::qconv_pointwise",
    "avg_pool2d": "onednn::qconv_pointwise",  # a kernel of ones
    "dense": "onednn::qlinear_pointwise",
    # An identity kernel with the `sum` post-op; kquant::add where shapes differ. At 16 x 32 x 32 the arithmetic is
    # faster, 25 us against 34; at 256 x 56 x 56 the kernel, 202 us against 407, and at a batch of 32 nine times.
    "add": "onednn::qconv2d_pointwise",
    "sub": "onednn::qconv2d_pointwise",
    "mul": "kquant::mul",
    "batch_matmul": "kquant::matmul",
    "mean": "kquant::mean",
    "sum": "kquant::sum",
    "softmax": "kquant::softmax",
    # Exact by construction: a code is moved, compared or looked up.
    "embedding": "aten::index_select",
    "elementwise": "kquant::lookup",
    "prelu": "kquant::lookup_by_slope",
    "sigmoid": "kquant::lookup",
    "tanh": "kquant::lookup",
    "relu": "aten::clamp",
    "max_pool2d": "quantized::max_pool2d",
    "concat": "aten::cat",
    "maximum": "aten::maximum",
    "minimum": "aten::minimum",
    "reduce_max": "aten::amax",
    "reduce_min": "aten::amin",
    "reshape": "aten::reshape",
    "transpose": "aten::permute",
    "pad": "aten::constant_pad_nd",
    "mirror_pad": "aten::reflection_pad2d",
    "strided_slice": "aten::slice",
    "gather": "aten::index_select",
    "tile": "aten::repeat",
    "resize_nearest": "aten::upsample_nearest2d",
    "resize_bilinear": "kquant::resize_linear",
}


def _row(kind: str, kernel: str) -> Row:
    """TFLite's placement of the kind with this target's kernel: no int4 and no 16 bits."""
    plain = {"version": 1, "version16": 0, "options": "", "int4": False, "int16": False, "bound": EXACT}
    return replace(ROWS[kind], target=kernel, **plain)


# The kernels that do not need oneDNN, of every engine; measured on fbgemm, qnnpack, x86 and onednn: see `QUANTIZED`.
QUANTIZED_KERNELS: dict[str, str] = {
    **KERNELS,
    "conv2d": "quantized::conv2d",
    "conv2d_transpose": "quantized::conv2d",  # behind kquant::spread
    "channel_affine": "quantized::conv2d",
    "avg_pool2d": "quantized::conv2d",  # a kernel of ones
    "dense": "quantized::linear",
    "add": "quantized::add",
    "sub": "kquant::add",
    "mul": "quantized::mul",
}

ONEDNN = Target(
    name="onednn",
    rows={kind: _row(kind, kernel) for kind, kernel in KERNELS.items()} | {"identity": ROWS["identity"]},
    functions=frozenset(),
    fixed_kernels=False,
    requantize_by_kernel=False,
    clamps=True,
    accumulator=Accumulator(),
)

# A convolution of images takes the other operand of a sum as its accumulator: its own output before the sum is not
# rounded to codes, and the model is trained that way. Measured as the others, with and without ReLU: 0.5 codes.
ONEDNN_FUSED = replace(
    ONEDNN, name="onednn_fused", rows={**ONEDNN.rows, "conv2d": replace(ONEDNN.rows["conv2d"], sums_axes=4)}
)

# Random codes, scales and settings through each kernel on the four engines: none is off by more than 0.51 codes, with
# the biases that QNNPACK holds in int32. Without VNNI fbgemm adds pairs of products in saturating int16, as oneDNN does
# (FBGEMM_ENABLE_INSTRUCTIONS=AVX2 shows it): up to 57 codes, and exact within +-64. A sum times its multiplier must fit
# the int32 that they round into.
QUANTIZED = replace(
    ONEDNN,
    name="quantized",
    rows={kind: _row(kind, kernel) for kind, kernel in QUANTIZED_KERNELS.items()} | {"identity": ROWS["identity"]},
    accumulator=Accumulator(bias_limit=2.0**30, largest=2.0**8, widest=PORTABLE),
)

TARGETS = {target.name: target for target in (ONEDNN, ONEDNN_FUSED, QUANTIZED)}  # of TorchScript files
