"""A network of ResNet-50's shape, as He et al. 2016 (arXiv:1512.03385), table 1, describe it; random weights."""

from __future__ import annotations

import torch
from torch import nn

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # inner channels, blocks, stride of the first


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut."""

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        outside = 4 * width

        def normed(a: int, b: int, window: int, step: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(a, b, window, step, window // 2, bias=False), nn.BatchNorm2d(b)]

        self.body = nn.Sequential(
            *normed(inside, width, 1),
            nn.ReLU(),
            *normed(width, width, 3, stride),
            nn.ReLU(),
            *normed(width, outside, 1),
        )
        self.shortcut = nn.Sequential(*normed(inside, outside, 1, stride)) if stride > 1 or inside != outside else None
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet50(nn.Module):
    """The 50-layer network for images of 224 x 224."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, channels = [], 64
        for width, count, stride in STAGES:
            for index in range(count):
                blocks.append(Bottleneck(channels, width, stride if index == 0 else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def random_model(seed: int = 0) -> ResNet50:
    """With statistics of the batch norms from one pass in training mode, in evaluation mode."""
    torch.manual_seed(seed)
    model = ResNet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()
