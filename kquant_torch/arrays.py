"""The array namespace `xp` of `kquant.core`'s formulas, in torch: the few functions that they use."""

from __future__ import annotations

from typing import Any

import torch

floor = torch.floor
abs = torch.abs
tanh = torch.tanh
where = torch.where
ones_like = torch.ones_like


def clip(x: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """`min(max(x, low), high)`; the limits are numbers or tensors."""
    return torch.clamp(x, low, high)


def max(x: torch.Tensor, axis: Any = None, keepdims: bool = False) -> torch.Tensor:
    """The greatest value over some axes, over all for None."""
    return torch.amax(x, dim=_axes(x, axis), keepdim=keepdims)


def min(x: torch.Tensor) -> torch.Tensor:
    """The least value."""
    return torch.amin(x)


def mean(x: torch.Tensor, axis: Any = None, keepdims: bool = False) -> torch.Tensor:
    """The mean over some axes, over all for None."""
    return torch.mean(x, dim=_axes(x, axis), keepdim=keepdims)


def maximum(x: torch.Tensor, least: Any) -> torch.Tensor:
    """The greater of a tensor and a number or tensor, elementwise."""
    return torch.maximum(x, least) if isinstance(least, torch.Tensor) else torch.clamp(x, min=float(least))


def minimum(x: torch.Tensor, most: Any) -> torch.Tensor:
    """The lesser of a tensor and a tensor or number, elementwise."""
    return torch.minimum(x, most) if isinstance(most, torch.Tensor) else torch.clamp(x, max=float(most))


def _axes(x: torch.Tensor, axis: Any) -> tuple[int, ...]:
    return tuple(range(x.ndim)) if axis is None else axis
