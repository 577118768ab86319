"""A ResNet that DoReFa changes little before it rounds: the same function on other scales.

DoReFa clips activations to [0, 1], and takes tanh of a kernel before it gives it the largest weight 1 (Zhou et al.
2016, equations 9 and 11). Batch norm is free to scale what it gives, and takes any scale back from what it is given; so
dividing gamma and beta behind one convolution, and the running statistics behind the next, changes no output. The sums
of a residual network share one scale. No batch norm follows the last layer: what it gives are the logits by a factor.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

SHARE = 0.999  # of the activations that the interval is to cover
KERNEL = 0.5  # a kernel's largest weight: up to there tanh bends by 8 % at most


def _reach(values: list[torch.Tensor]) -> float:
    """What `SHARE` of the positive part of some tensors lies below."""
    flat = torch.cat([v.relu().flatten() for v in values])
    return float(
        flat[torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))[:1_000_000]].quantile(SHARE)
    )


def within_unit(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, float]:
    """A copy of a `torch_resnet` network, and what its outputs are to be multiplied by to be the same logits.

    They are the same but for the batch norms' epsilon.

    Args:
        model: with `conv1`, `bn1`, blocks of `conv1`, `bn1`, `conv2` and `bn2`, and `linear`.
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
        _scale(model.conv1, model.bn1, 1.0, stream)
        for block in blocks:
            inner = _reach(seen[block.bn1])
            _scale(block.conv1, block.bn1, stream, inner)
            _scale(block.conv2, block.bn2, inner, stream)
        largest = model.linear.weight.abs().max()
        model.linear.weight.div_(largest)
        model.linear.bias.div_(stream * largest)
    return model, float(stream * largest)


def _scale(conv: nn.Module, norm: nn.Module, given: float, gives: float) -> None:
    """Let a convolution take what is divided by `given`, and divide what its batch norm gives by `gives`."""
    share = KERNEL / conv.weight.abs().max()
    conv.weight.mul_(share)
    norm.running_mean.mul_(share / given)
    norm.running_var.mul_((share / given) ** 2)
    norm.weight.div_(gives)
    norm.bias.div_(gives)
