"""Functions of our own in a wrapped model's code: what composite layers are made of besides torch's own functions."""

from __future__ import annotations

import torch
from torch import nn


def reciprocal_root(x: torch.Tensor, epsilon: float, factor: float = 1.0) -> torch.Tensor:
    """`1 / sqrt(x * factor + epsilon)`, elementwise: the denominator of a normalization."""
    return torch.rsqrt(x * factor + epsilon)


def scaled_softmax(x: torch.Tensor, beta: float, dim: int) -> torch.Tensor:
    """`softmax(beta * x)`, with the factor that the integer kernel has."""
    return torch.softmax(x * beta, dim)


def channel_affine(x: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None, axis: int) -> torch.Tensor:
    """`x * scale + offset` with one value per channel of `axis`; either may be None. The tail of a normalization."""
    shape = [1] * x.ndim
    shape[axis] = -1
    if scale is not None:
        x = x * scale.reshape(shape)
    return x if offset is None else x + offset.reshape(shape)


def run_pre_hooks(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input of a module after its forward pre-hooks; its own code is part of the model's."""
    for key, hook in module._forward_pre_hooks.items():
        result = hook(module, (x,), {})[0] if key in module._forward_pre_hooks_with_kwargs else hook(module, (x,))
        if result is not None:
            x = result[0] if isinstance(result, tuple) else result
    return x


def run_hooks(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The output of a module after its forward hooks."""
    for key, hook in module._forward_hooks.items():
        extra = ({},) if key in module._forward_hooks_with_kwargs else ()
        result = hook(module, (x,), *extra, y)
        y = y if result is None else result
    return y


OURS = (reciprocal_root, scaled_softmax, channel_affine, run_pre_hooks, run_hooks)
