"""Constant operands of sums and products: on the 8-bit grid of their own values, in training as in the artifact."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kquant.core.constants import on_grid
from kquant_torch import arrays


class _Hold(torch.autograd.Function):
    """Rounds to the grid of the tensor's own range; the gradient passes unchanged, as that of a weight."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return on_grid(x, arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return upstream


class ConstantQuantizer(nn.Module):
    """Fake quantization of a buffer, or of a parameter that is added or multiplied: `core.constants.on_grid`.

    It has no state: the range is that of the present values.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on its grid, float32."""
        return _Hold.apply(x.float())
