"""The backends of the TorchScript artifact: a table of kernels and the functions that write their calls, by name."""

from __future__ import annotations

from dataclasses import replace

from kquant_torch import emit_float, emit_onednn, emit_quantized, emit_shapes  # noqa: F401  entering writing functions
from kquant_torch.emit import Backend
from kquant_torch.emit_add import mul_codes
from kquant_torch.target import ONEDNN, ONEDNN_FUSED, QUANTIZED

# By the names of their targets.
BACKENDS = {
    "onednn": Backend(
        ONEDNN, emit_onednn.convolution, emit_onednn.dense, emit_onednn.channel_affine, emit_onednn.add, mul_codes
    ),
    "quantized": Backend(
        QUANTIZED, emit_quantized.convolution, emit_quantized.dense, emit_quantized.channel_affine, emit_quantized.add,
        emit_quantized.mul,
    ),
}  # fmt: skip
BACKENDS["onednn_fused"] = replace(BACKENDS["onednn"], target=ONEDNN_FUSED)
# What a user may ask for, and the targets that it serves, the usual one first.
CHOICES = {"onednn": ("onednn", "onednn_fused"), "quantized": ("quantized",)}


def backend_for(name: str, trained_for: str) -> Backend:
    """The backend that a user asks for, with the target that the model was trained for if it serves that."""
    served = CHOICES[name]
    return BACKENDS[trained_for if trained_for in served else served[0]]
