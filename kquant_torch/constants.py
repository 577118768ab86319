"""Constant operands of sums and products: on the 8-bit grid of their own values, in training as in the artifact."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kquant_torch.fake_quantize import grid, rounded

BITS = 8


class _Hold(torch.autograd.Function):
    """Rounds to the grid of the tensor's own range; the gradient passes unchanged, as that of a weight."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        low, high = torch.clamp(x.amin(), max=0.0), torch.clamp(x.amax(), min=0.0)
        high = torch.where(high == low, torch.ones_like(high), high)
        magnitudes = torch.abs(x)
        # Values of one magnitude lie at code 127 or -127, exactly.
        return torch.where(magnitudes.amin() == magnitudes.amax(), x, rounded(x, *grid(low, high, BITS)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return upstream


class ConstantQuantizer(nn.Module):
    """Fake quantization of a buffer, or of a parameter that is added or multiplied: `core.constants.constant_affine`.

    It has no state: the range is that of the present values.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on its grid, float32."""
        return _Hold.apply(x.float())
