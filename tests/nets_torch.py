"""A small net with everything that has state: convolutions, batch norms, an add, dropout, a buffer, a hook."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

QUANTIZERS = {
    "qat": [{"q_bits": 8, "op_types": ["default"]}],
    "qat W4A4": [{"q_bits": 4, "op_types": ["default"]}],
    "naive": [{"q_bits": 8, "op_types": ["default"], "quantizer": "naive"}],
    "dorefa": [{"q_bits": {"weight": 2, "output": 4}, "op_types": ["default"], "quantizer": "dorefa"}],
    "dorefa G6": [
        {"q_bits": {"weight": 2, "output": 4, "gradient": 6}, "op_types": ["default"], "quantizer": "dorefa"}
    ],
    "delayed": [{"q_bits": 8, "op_types": ["default"], "quant_start_step": 2}],
}


class Net(nn.Module):
    """A residual net; `norms` and `dropout` may be left out, for tests to the bit."""

    def __init__(self, norms: bool = True, dropout: float = 0.1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=not norms)
        self.bn = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8) if norms else nn.Identity(), nn.ReLU()
        )
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 5)
        self.register_buffer("offset", torch.ones(()))
        self.note = {"made": "by a user"}

    def forward(self, x):
        y = F.relu(self.bn(self.stem(x)))
        y = y + self.block(y)
        return self.head(self.drop(y.mean((2, 3))))

    def describe(self):
        return f"{type(self).__name__} {self.note['made']}"


def images(batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def step(model, optimizer, x):
    """One training step on a fixed target."""
    target = torch.arange(len(x)) % 5
    loss = F.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
