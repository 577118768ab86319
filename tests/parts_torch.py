"""What small PyTorch modules are made of: modules of a function, example inputs, and layers of other people's code."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn


class Call(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(self, function: Callable, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *xs):
        return self.function(self, *xs)


class One(Call):
    """A function of the module and one input."""

    def forward(self, x):
        return self.function(self, x)


class Two(Call):
    """A function of the module and two inputs."""

    def forward(self, x, y):
        return self.function(self, x, y)


def image(channels: int = 4, size: int = 8, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def rows(size: int = 6, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, size)


def tokens(length: int = 5, size: int = 8) -> torch.Tensor:
    return torch.randn(2, length, size)


def vector(size: int, at: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, at + 1, size))


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, as image model libraries have it."""

    def forward(self, x):
        factor = 0.0
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            factor = self.momentum
        own = not self.training or self.track_running_stats
        y = F.batch_norm(
            x, self.running_mean if own else None, self.running_var if own else None, self.weight, self.bias,
            self.training or self.running_mean is None, factor, self.eps,
        )  # fmt: skip
        return F.relu(y)


class DroppedAttention(nn.Module):
    """An attention that drops out weights while it trains."""

    def __init__(self):
        super().__init__()
        self.qkv, self.p = nn.Linear(8, 24), 0.25

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)


class Tied(nn.Module):
    """A table of embeddings that is the last layer's kernel as well."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table(x))


def attended(q, k, v):
    """Attention from its parts, written out."""
    return (q * 0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def added(pair):
    a, b = pair
    return a + b


def multiplied(pair):
    a, b = pair
    return a * b
