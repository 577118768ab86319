"""ResNet-20 for CIFAR-10, as He et al. 2016 (arXiv:1512.03385), section 4.2, describe it, with option-A shortcuts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shortcut(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are new."""

    def __init__(self, added: int):
        super().__init__()
        self.added = added

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = Shortcut(outside - inside) if stride != 1 or inside != outside else nn.Sequential()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32 and 64 channels; parameter names as in the published state_dict."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inside: int, outside: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(inside, outside, stride), *(Block(outside, outside, 1) for _ in range(2)))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        y = F.avg_pool2d(y, y.size()[3])
        return self.linear(y.view(y.size(0), -1))


def normalized(images: np.ndarray) -> torch.Tensor:
    """Images 0..255 (n, 32, 32, 3) as the network takes them, float32 (n, 3, 32, 32)."""
    x = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def pretrained(path: object) -> ResNet20:
    """The network with the weights of a state_dict file, in evaluation mode."""
    model = ResNet20()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
