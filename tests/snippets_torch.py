"""Small modules, one per layer class or activation: name -> (module, example inputs, kinds expected)."""

from __future__ import annotations

import torch
from parts_torch import DroppedAttention, NormAct, One, Tied, Two, image, rows, tokens
from torch import nn

# name: (module maker, input maker or tuple of them, kinds that the graph must hold, in any order)
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, padding=1), lambda: torch.randn(3, 4, 9), ["conv2d"]),
    "conv2d": (lambda: nn.Conv2d(4, 5, 3, 2, 1), image, ["conv2d"]),
    "conv2d same": (lambda: nn.Conv2d(4, 5, 3, padding="same", dilation=2), image, ["conv2d"]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(2, 2, 4, 4, 4), ["conv2d"]),
    "grouped conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), image, ["conv2d"]),
    "depthwise conv": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), image, ["conv2d"]),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 3, 3, 2), lambda: torch.randn(2, 4, 5), ["conv2d_transpose"]),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), image, ["conv2d_transpose"]),
    "transposed conv3d": (
        lambda: nn.ConvTranspose3d(2, 3, 2),
        lambda: torch.randn(2, 2, 3, 3, 3),
        ["conv2d_transpose"],
    ),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), image, ["conv2d_transpose"]),
    "linear": (lambda: nn.Linear(6, 3), rows, ["dense"]),
    "linear on tokens": (lambda: nn.Linear(8, 3), tokens, ["dense"]),
    "bilinear": (
        lambda: Two(lambda m, x, y: m.b(x, y), b=nn.Bilinear(6, 5, 3)),
        (rows, lambda: rows(5)),
        ["dense", "reshape", "mul", "sum", "channel_affine"],
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 2)),
        lambda: torch.randint(0, 10, (3, 4)),
        ["embedding", "dense"],
    ),
    "embedding bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(10, 6), nn.Linear(6, 2)),
        lambda: torch.randint(0, 10, (3, 4)),
        ["embedding", "mean", "dense"],
    ),
    "prelu": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.PReLU(4)), image, ["conv2d", "prelu"]),
    "batch norm alone": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)),
        image,
        ["channel_affine", "conv2d"],
    ),
    "conv1d + norm": (
        lambda: nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.ReLU()),
        lambda: torch.randn(3, 4, 9),
        ["conv2d", "channel_affine", "relu"],
    ),
    "transposed conv + norm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU6()),
        image,
        ["conv2d_transpose", "channel_affine", "relu"],
    ),
    "linear + norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), rows, ["dense", "channel_affine"]),
    "conv3d + norm": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.ReLU()),
        lambda: torch.randn(2, 2, 4, 4, 4),
        ["conv2d", "channel_affine", "relu"],
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
        tokens,
        ["dense", "mean", "sub", "mul", "mean", "elementwise", "mul", "channel_affine"],
    ),
    "layer norm over an image": (
        lambda: nn.LayerNorm((4, 8, 8)),
        image,
        ["mean", "sub", "mul", "mean", "elementwise", "mul", "mul", "add"],
    ),
    "rms norm": (lambda: nn.RMSNorm(8), tokens, ["mul", "mean", "elementwise", "mul", "channel_affine"]),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)),
        image,
        ["conv2d", "reshape", "mean", "sub", "mul", "mean", "elementwise", "mul", "reshape", "channel_affine"],
    ),
    "instance norm": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        image,
        ["mean", "sub", "mul", "mean", "elementwise", "mul", "channel_affine"],
    ),
    "attention": (
        lambda: One(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)),
        tokens,
        ["dense"] * 4 + ["reshape", "transpose"] * 4 + ["transpose", "batch_matmul", "softmax", "batch_matmul"],
    ),
    "attention with the batch second": (
        lambda: One(
            lambda m, x: (lambda y: m.a(y, y, y, need_weights=False)[0].mean(0))(x.permute(1, 0, 2)),
            a=nn.MultiheadAttention(8, 2),
        ),
        tokens,
        ["dense"] * 4 + ["batch_matmul", "softmax", "batch_matmul"],
    ),
    "encoder with the batch second": (
        lambda: One(
            lambda m, x: m.e(x.transpose(0, 1))[0],
            e=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False),
        ),
        tokens,
        ["softmax", "batch_matmul"],
    ),
    "encoder and decoder": (
        lambda: One(
            lambda m, x: m.t(x, x[:, :4] * 0.5, tgt_mask=nn.Transformer.generate_square_subsequent_mask(4)),
            t=nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        ),
        tokens,
        ["softmax"] * 3 + ["batch_matmul"] * 6,
    ),
    "decoder layers with norms first": (
        lambda: One(
            lambda m, x: m.d(x.transpose(0, 1), m.l(x).transpose(0, 1)).mean(0),
            d=nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, norm_first=True), 1, nn.LayerNorm(8)),
            l=nn.Linear(8, 8),
        ),
        tokens,
        ["softmax"] * 2 + ["batch_matmul"] * 4,
    ),
    "encoder with dropout": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8), enable_nested_tensor=False
        ),
        tokens,
        ["softmax"] * 2 + ["identity"] * 8,
    ),
    "masked encoder": (
        lambda: One(
            lambda m, x: m.e(x, mask=nn.Transformer.generate_square_subsequent_mask(5)),
            e=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
            ),
        ),
        tokens,
        ["softmax", "identity"],
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        tokens,
        ["softmax", "relu"],
    ),
    "max pools": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, 2, 1)), image, ["conv2d", "max_pool2d"]),
    "max pool 1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.MaxPool1d(2)),
        lambda: torch.randn(2, 4, 8),
        ["conv2d", "max_pool2d"],
    ),
    "average pool": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)), image, ["conv2d", "avg_pool2d"]),
    "average pool over everything": (lambda: nn.AvgPool2d(8), image, ["mean"]),
    "adaptive pools": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(1)),
        image,
        ["avg_pool2d", "reduce_max"],
    ),
    "adaptive average": (lambda: nn.AdaptiveAvgPool2d((1, 1)), image, ["mean"]),
    "upsample nearest": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=2)),
        image,
        ["conv2d", "resize_nearest"],
    ),
    "upsample bilinear": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(size=12, mode="bilinear", align_corners=False)),
        image,
        ["conv2d", "resize_bilinear"],
    ),
    "paddings": (
        lambda: nn.Sequential(nn.ZeroPad2d(1), nn.ReflectionPad2d((1, 0, 0, 1)), nn.Conv2d(4, 2, 3)),
        image,
        ["pad", "mirror_pad", "conv2d"],
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
        image,
        ["conv2d", *["reshape", "transpose", "reshape"] * 2],
    ),
    "norm with activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), NormAct(4)),
        image,
        ["conv2d", "channel_affine", "relu"],
    ),
    "attention with dropout": (
        DroppedAttention,
        tokens,
        ["dense", "batch_matmul", "softmax", "identity", "batch_matmul"],
    ),
    "tied embedding": (Tied, lambda: torch.randint(0, 10, (3, 4)), ["embedding", "dense"]),
    "glu layer": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU()), rows, ["dense", "sigmoid", "mul"]),
    "log softmax layer": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(-1)), rows, ["dense", "sub", "sub"]),
    "max pool 3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 1), nn.MaxPool3d((3, 2, 2), (2, 2, 2), (1, 0, 0), ceil_mode=True)),
        lambda: torch.randn(2, 2, 7, 9, 9),
        ["conv2d", "max_pool2d"],
    ),
    "average layer without padding": (
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        image,
        ["pad", "avg_pool2d", "mul"],
    ),
    "adaptive layers of unlike windows": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveMaxPool2d((5, 8)), nn.AdaptiveAvgPool2d(3)),
        image,
        ["gather", "max_pool2d", "avg_pool2d"],
    ),
    "pads by layer": (
        lambda: nn.Sequential(nn.ReplicationPad2d(1), nn.ConstantPad2d((0, 1, 2, 0), 3.5), nn.CircularPad2d(2)),
        image,
        ["gather", "gather", "pad", "add", "gather", "gather"],
    ),
    "channel shuffle": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ChannelShuffle(2)),
        image,
        ["conv2d", "reshape", "transpose", "reshape"],
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)),
        rows,
        ["dense", "identity", "dense"],
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(72, 3), nn.Unflatten(1, (3, 1))),
        image,
        ["conv2d", "reshape", "dense", "reshape"],
    ),
}

ACTIVATIONS = {
    "relu": (nn.ReLU(), "relu"), "relu6": (nn.ReLU6(), "relu"), "hardtanh": (nn.Hardtanh(), "elementwise"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"), "tanh": (nn.Tanh(), "tanh"), "gelu": (nn.GELU(), "elementwise"),
    "gelu tanh": (nn.GELU("tanh"), "elementwise"), "elu": (nn.ELU(), "elementwise"), "selu": (nn.SELU(), "elementwise"),
    "celu": (nn.CELU(), "elementwise"), "silu": (nn.SiLU(), "elementwise"), "mish": (nn.Mish(), "elementwise"),
    "hardswish": (nn.Hardswish(), "elementwise"), "hardsigmoid": (nn.Hardsigmoid(), "elementwise"),
    "leaky relu": (nn.LeakyReLU(0.1), "elementwise"), "softplus": (nn.Softplus(), "elementwise"),
    "softsign": (nn.Softsign(), "elementwise"), "logsigmoid": (nn.LogSigmoid(), "elementwise"),
    "softmax": (nn.Softmax(-1), "softmax"), "threshold": (nn.Threshold(0.1, 0.0), "elementwise"),
    "hardshrink": (nn.Hardshrink(), "elementwise"), "tanhshrink": (nn.Tanhshrink(), "elementwise"),
}  # fmt: skip


def example(snippet) -> tuple:
    """The example inputs of a snippet, as a tuple."""
    makers = snippet[1] if isinstance(snippet[1], tuple) else (snippet[1],)
    return tuple(m() for m in makers)


def activation(name: str) -> tuple:
    """An activation behind a layer, as a snippet."""
    module, kind = ACTIVATIONS[name]
    return lambda: nn.Sequential(nn.Linear(6, 7), module), rows, ["dense", kind]
