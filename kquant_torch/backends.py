"""The backends of the TorchScript artifact: a table of kernels and the functions that write their calls, by name."""

from __future__ import annotations

from kquant_torch import emit_float, emit_onednn, emit_quantized, emit_shapes  # noqa: F401  entering writing functions
from kquant_torch.emit import Backend
from kquant_torch.emit_add import mul_codes
from kquant_torch.target import ONEDNN, QUANTIZED

BACKENDS = {
    "onednn": Backend(
        ONEDNN, emit_onednn.convolution, emit_onednn.dense, emit_onednn.channel_affine, emit_onednn.add, mul_codes
    ),
    "quantized": Backend(
        QUANTIZED, emit_quantized.convolution, emit_quantized.dense, emit_quantized.channel_affine, emit_quantized.add,
        emit_quantized.mul,
    ),
}  # fmt: skip
