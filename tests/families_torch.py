"""Small image networks of the usual architectures, each written from its paper, for inputs of 3 x 32 x 32."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn


def conv(inside: int, outside: int, window: int = 3, stride: int = 1, groups: int = 1, act=nn.ReLU) -> nn.Sequential:
    """Convolution, batch norm, activation (or none)."""
    layers = [
        nn.Conv2d(inside, outside, window, stride, window // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class Head(nn.Sequential):
    """Global average pool and classifier."""

    def __init__(self, channels: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Residual(nn.Module):
    """`act(body(x) + shortcut(x))`."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None):
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.body(x) + self.shortcut(x))


def resnet_basic() -> nn.Module:
    """He et al. 2016, arXiv:1512.03385, basic blocks."""

    def block(inside, outside, stride):
        body = nn.Sequential(conv(inside, outside, 3, stride), conv(outside, outside, act=None))
        same = stride == 1 and inside == outside
        return Residual(body, None if same else conv(inside, outside, 1, stride, act=None), nn.ReLU(inplace=True))

    return nn.Sequential(conv(3, 16), block(16, 16, 1), block(16, 32, 2), block(32, 64, 2), Head(64))


def resnet_bottleneck() -> nn.Module:
    """He et al. 2016, arXiv:1512.03385, bottleneck blocks."""

    def block(inside, middle, stride):
        body = nn.Sequential(
            conv(inside, middle, 1), conv(middle, middle, 3, stride), conv(middle, 4 * middle, 1, act=None)
        )
        same = stride == 1 and inside == 4 * middle
        return Residual(body, None if same else conv(inside, 4 * middle, 1, stride, act=None), nn.ReLU())

    stem = nn.Sequential(conv(3, 16), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(stem, block(16, 8, 1), block(32, 8, 1), block(32, 16, 2), Head(64))


class SqueezeExcite(nn.Module):
    """Hu et al. 2018, arXiv:1709.01507."""

    def __init__(self, channels: int, gate=nn.Sigmoid):
        super().__init__()
        self.reduce, self.expand, self.gate = (
            nn.Conv2d(channels, channels // 4, 1),
            nn.Conv2d(channels // 4, channels, 1),
            gate(),
        )

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.expand(F.relu(self.reduce(scale))))


def inverted(inside, outside, stride, act, squeeze=None, window=3) -> nn.Module:
    """The inverted residual of Sandler et al. 2018, arXiv:1801.04381."""
    wide = 4 * inside
    parts = [conv(inside, wide, 1, act=act), conv(wide, wide, window, stride, wide, act=act)]
    body = nn.Sequential(*parts, *([squeeze(wide)] if squeeze else []), conv(wide, outside, 1, act=None))
    return Residual(body) if stride == 1 and inside == outside else body


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018, arXiv:1801.04381."""
    a = nn.ReLU6
    blocks = [inverted(16, 16, 1, a), inverted(16, 24, 2, a), inverted(24, 24, 1, a), inverted(24, 32, 2, a)]
    return nn.Sequential(conv(3, 16, act=a), *blocks, conv(32, 64, 1, act=a), Head(64))


def mobilenet_v3() -> nn.Module:
    """Howard et al. 2019, arXiv:1905.02244: squeeze-and-excitation with hard sigmoid, and hard-swish."""

    def squeeze(channels):
        return SqueezeExcite(channels, nn.Hardsigmoid)

    blocks = [inverted(16, 16, 1, nn.ReLU, squeeze), inverted(16, 24, 2, nn.Hardswish, squeeze, 5)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 96), nn.Hardswish(), nn.Dropout(0.2))
    return nn.Sequential(
        conv(3, 16, act=nn.Hardswish), *blocks, conv(24, 64, 1, act=nn.Hardswish), head, nn.Linear(96, 10)
    )


class DenseLayer(nn.Module):
    """Huang et al. 2017, arXiv:1608.06993: batch norm before the convolution, and the input kept beside the output."""

    def __init__(self, inside: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet() -> nn.Module:
    """Huang et al. 2017, arXiv:1608.06993."""
    transition = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2))
    first = [DenseLayer(16, 8), DenseLayer(24, 8)]
    second = [DenseLayer(16, 8), DenseLayer(24, 8), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), *first, transition, *second, Head(32))


class Branches(nn.Module):
    """Szegedy et al. 2015, arXiv:1409.4842: parallel windows, joined."""

    def __init__(self, inside: int):
        super().__init__()
        self.one, self.three = conv(inside, 8, 1), nn.Sequential(conv(inside, 8, 1), conv(8, 12))
        self.five = nn.Sequential(conv(inside, 4, 1), conv(4, 8, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inside, 8, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


def inception() -> nn.Module:
    """Szegedy et al. 2015, arXiv:1409.4842."""
    return nn.Sequential(conv(3, 16, 3, 2), Branches(16), nn.MaxPool2d(2), Branches(36), Head(36))


class Shuffle(nn.Module):
    """Ma et al. 2018, arXiv:1807.11164: half of the channels pass, and all are mixed."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(conv(half, half, 1), conv(half, half, 3, 1, half, act=None), conv(half, half, 1))

    def forward(self, x):
        kept, changed = x.chunk(2, dim=1)
        y = torch.cat((kept, self.branch(changed)), dim=1)
        b, c, h, w = y.size()
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def shufflenet() -> nn.Module:
    """Ma et al. 2018, arXiv:1807.11164."""
    return nn.Sequential(conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1), Shuffle(24), Shuffle(24), conv(24, 48, 1), Head(48))


class Fire(nn.Module):
    """Iandola et al. 2016, arXiv:1602.07360."""

    def __init__(self, inside: int, squeeze: int, outside: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, outside, 1), nn.Conv2d(squeeze, outside, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.one(x), inplace=True), F.relu(self.three(x), inplace=True)], 1)


def squeezenet() -> nn.Module:
    """Iandola et al. 2016, arXiv:1602.07360."""
    stem = [nn.Conv2d(3, 24, 3, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)]
    head = [nn.Dropout(0.5), nn.Conv2d(48, 10, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]
    return nn.Sequential(*stem, Fire(24, 8, 16), Fire(32, 8, 24), *head)


def efficientnet() -> nn.Module:
    """Tan and Le 2019, arXiv:1905.11946: inverted residuals with squeeze-and-excitation and swish."""
    a = nn.SiLU
    blocks = [inverted(16, 16, 1, a, SqueezeExcite), inverted(16, 24, 2, a, SqueezeExcite, 5)]
    return nn.Sequential(conv(3, 16, 3, 2, act=a), *blocks, conv(24, 64, 1, act=a), Head(64))


def regnet() -> nn.Module:
    """Radosavovic et al. 2020, arXiv:2003.13678: bottlenecks of ratio 1 with grouped convolutions."""

    def block(inside, outside, stride):
        body = nn.Sequential(
            conv(inside, outside, 1),
            conv(outside, outside, 3, stride, outside // 8),
            conv(outside, outside, 1, act=None),
        )
        same = stride == 1 and inside == outside
        return Residual(body, None if same else conv(inside, outside, 1, stride, act=None), nn.ReLU())

    return nn.Sequential(conv(3, 16, 3, 2), block(16, 24, 2), block(24, 24, 1), block(24, 56, 2), Head(56))


class ChannelsLastNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022, arXiv:2201.03545."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.act, self.narrow = (
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(self.act(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Liu et al. 2022, arXiv:2201.03545."""
    stem = nn.Sequential(nn.Conv2d(3, 24, 4, 4), ChannelsLastNorm(24))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 10))
    return nn.Sequential(stem, ConvNeXtBlock(24), ConvNeXtBlock(24), head)


class Encoder(nn.Module):
    """A transformer block that normalizes before attention and before the perceptron."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(size), nn.MultiheadAttention(size, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x):
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021, arXiv:2010.11929: patches, a class token, positions, encoder blocks."""

    def __init__(self, size: int = 32, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, size, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, size) * 0.5)
        self.position = nn.Parameter(torch.randn(1, (32 // patch) ** 2 + 1, size) * 0.5)
        self.blocks = nn.Sequential(Encoder(size, 4), Encoder(size, 4))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


FAMILIES = {
    "resnet basic": resnet_basic, "resnet bottleneck": resnet_bottleneck, "mobilenet v2": mobilenet_v2,
    "mobilenet v3": mobilenet_v3, "densenet": densenet, "inception": inception, "shufflenet": shufflenet,
    "squeezenet": squeezenet, "efficientnet": efficientnet, "regnet": regnet, "convnext": convnext, "vit": ViT,
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network whose batch norm statistics come from one training pass over the images that are given with it."""
    torch.manual_seed(len(name))
    model = FAMILIES[name]()
    images = torch.randn(32, 3, 32, 32)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model.eval(), images
