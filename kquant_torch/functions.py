"""Functions of our own in a wrapped model's code: what composite layers are made of besides torch's own functions."""

from __future__ import annotations

import torch
from torch import nn


def reciprocal_root(x: torch.Tensor, epsilon: float, factor: float = 1.0) -> torch.Tensor:
    """`1 / sqrt(x * factor + epsilon)`, elementwise: the denominator of a normalization."""
    return torch.rsqrt(x * factor + epsilon)


def of_shifted(x: torch.Tensor, offset: float, function: str) -> torch.Tensor:
    """A function of torch, by name, of `x + offset`: in one table, since 8 bits would lose a small offset.

    Square roots and reciprocals would be infinite, or have infinite gradients, at the zeros that quantization makes.
    """
    return getattr(torch, function)(x + offset)


def root(x: torch.Tensor) -> torch.Tensor:
    """`sqrt(x)` whose gradient at zero is zero."""
    return torch.where(x > 0, torch.sqrt(torch.where(x > 0, x, torch.ones_like(x))), torch.zeros_like(x))


def reciprocal_norm(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`1 / max(sqrt(x), epsilon)`, elementwise: what a vector of squared length x is multiplied with for length 1.

    A vector of length zero is multiplied with zero, which changes nothing: no range has to reach up to `1 / epsilon`.
    """
    return torch.where(x > 0, torch.rsqrt(torch.clamp(x, min=epsilon**2)), torch.zeros_like(x))


def scaled_softmax(x: torch.Tensor, beta: float, dim: int) -> torch.Tensor:
    """`softmax(beta * x)`, with the factor that the integer kernel has."""
    return torch.softmax(x * beta, dim)


def masked_softmax(x: torch.Tensor, keep: torch.Tensor, beta: float, dim: int) -> torch.Tensor:
    """`softmax(beta * x)` over those for which `keep` is True; the others get 0."""
    return torch.softmax(torch.masked_fill(x * beta, torch.logical_not(keep), float("-inf")), dim)


def channel_affine(x: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor | None, axis: int) -> torch.Tensor:
    """`x * scale + offset` with one value per channel of `axis`; either may be None. The tail of a normalization."""
    shape = [1] * x.ndim
    shape[axis] = -1
    if scale is not None:
        x = x * scale.reshape(shape)
    return x if offset is None else x + offset.reshape(shape)


def norm_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The batch norm that a module of the user's own applies among other things, with the statistics of its mode."""
    training = module.training and not getattr(module, "frozen", False)
    if training and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    statistics = module.running_mean, module.running_var, module.weight, module.bias
    return torch.nn.functional.batch_norm(x, *statistics, training, module.momentum, module.eps)


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


OURS = (
    reciprocal_root,
    reciprocal_norm,
    of_shifted,
    root,
    scaled_softmax,
    channel_affine,
    norm_of,
    run_pre_hooks,
    run_hooks,
    masked_softmax,
)
