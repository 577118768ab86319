"""A ResNet whose activations lie in [0, 1], which is what DoReFa clips to: the same function on other scales.

Batch norm is free to scale what it gives, and takes any scale back from what it is given; so dividing gamma and beta
behind one convolution, and the running statistics behind the next, changes no output. The sums of a residual network
share one scale.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

SHARE = 0.999  # of the activations that the interval is to cover


def _reach(values: list[torch.Tensor]) -> float:
    """What `SHARE` of the positive part of some tensors lies below."""
    flat = torch.cat([v.relu().flatten() for v in values])
    return float(
        flat[torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))[:1_000_000]].quantile(SHARE)
    )


def within_unit(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy of a `torch_resnet` network with the same outputs, but for the batch norms' epsilon.

    Args:
        model: with `bn1`, blocks of `bn1` and `bn2`, and `linear`.
        x: samples that show how large activations are.
    """
    model = copy.deepcopy(model).eval()
    blocks = [m for m in model.modules() if hasattr(m, "bn2")]
    seen: dict[nn.Module, list[torch.Tensor]] = {}
    watched = [model.bn1, *blocks, *(block.bn1 for block in blocks)]
    hooks = [m.register_forward_hook(lambda m, _, y: seen.setdefault(m, []).append(y)) for m in watched]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    stream = _reach([y for m in (model.bn1, *blocks) for y in seen[m]])
    with torch.no_grad():
        _scale(model.bn1, 1.0, stream)
        for block in blocks:
            inner = _reach(seen[block.bn1])
            _scale(block.bn1, stream, inner)
            _scale(block.bn2, inner, stream)
        model.linear.weight.mul_(stream)
    return model


def _scale(norm: nn.Module, given: float, gives: float) -> None:
    """Let a batch norm take what is divided by `given`, and divide what it gives by `gives`."""
    norm.running_mean.div_(given)
    norm.running_var.div_(given**2)
    norm.weight.div_(gives)
    norm.bias.div_(gives)
