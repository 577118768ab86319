"""Kernels whose largest weight is where a coarse grid wants it.

The scale of a kernel is its largest weight by the number of codes. At two bits there is one code to each side, and the
largest of some hundred weights is so far out that most of the others round to zero; a net starts better from kernels
that are clipped first, each channel where its squared rounding error is least.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def clipped(model: nn.Module, bits: int, keep: tuple[str, ...] = ()) -> nn.Module:
    """A copy of a network whose convolutions and linear layers are clipped per output channel.

    Args:
        model: any module.
        bits: of the symmetric grid that the weights are to lie on.
        keep: names of layers that stay as they are.
    """
    model = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and name not in keep:
            rows = layer.weight.detach().flatten(1)
            limit = _limits(rows, 2 ** (bits - 1) - 1)
            layer.weight.data = rows.clamp(-limit, limit).reshape(layer.weight.shape)
    return model


def _limits(rows: torch.Tensor, top: int) -> torch.Tensor:
    """For each row the limit with the least squared error on `2 top + 1` levels, of shares of its largest value."""
    largest = rows.abs().amax(1, keepdim=True)
    tried = [largest * share for share in torch.linspace(0.2, 1.0, 81)]
    errors = [(_on_grid(rows, limit, top) - rows).square().sum(1, keepdim=True) for limit in tried]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(tried).gather(0, best)[0]


def _on_grid(rows: torch.Tensor, limit: torch.Tensor, top: int) -> torch.Tensor:
    step = limit / top
    return (rows / step).round().clamp(-top, top).nan_to_num() * step
