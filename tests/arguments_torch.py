"""Functions called with arguments that change what they compute, and layers that are sums and products in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from functions_torch import one
from parts_torch import One, Two, image, tokens
from torch import nn

_CONV = {"c": lambda: nn.Conv2d(4, 4, 1)}
_LINEAR = {"l": lambda: nn.Linear(8, 8)}


def conv(function, kinds: list[str]):
    return one(function, ["conv2d", *kinds], **_CONV)


def linear(function, kinds: list[str], **parts):
    return one(function, ["dense", *kinds], tokens, **_LINEAR, **parts)


def resized(kinds: list[str], **settings):
    return conv(lambda m, x: F.interpolate(m.c(x), **settings), kinds)


def heads(x, count: int):
    return x.reshape(-1, 5, 4, 2).transpose(1, 2)[:, :count]


def attention(function, kinds: list[str], **settings):
    return one(function, kinds, tokens, a=lambda: nn.MultiheadAttention(8, 2, batch_first=True, **settings))


ARGUMENTS = {
    "add with alpha": conv(lambda m, x: torch.add(m.c(x), x, alpha=2), ["mul", "add"]),
    "sub with alpha": conv(lambda m, x: m.c(x).sub_(x, alpha=0.5), ["mul", "sub"]),
    "rsub with alpha": conv(lambda m, x: torch.rsub(m.c(x), x, alpha=3), ["mul", "sub"]),
    "addcmul": conv(lambda m, x: torch.addcmul(x, m.c(x), x, value=-0.5), ["mul", "mul", "add"]),
    "addcdiv": conv(lambda m, x: torch.addcdiv(x, m.c(x), x.abs() + 1.0), ["elementwise", "mul", "add"]),
    "lerp": conv(lambda m, x: torch.lerp(m.c(x), x, 0.3), ["mul", "mul", "add"]),
    "lerp by a tensor": conv(lambda m, x: m.c(x).lerp(x, torch.sigmoid(x)), ["sub", "sigmoid", "mul", "add"]),
    "baddbmm": linear(
        lambda m, x: torch.baddbmm(x, m.l(x)[:, :, :5], x, beta=0.5, alpha=2.0), ["batch_matmul", "mul", "mul", "add"]
    ),
    "addmm": one(
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0),
        ["dense", "mul"],
        lambda: torch.randn(4, 6),
        b=lambda: nn.Parameter(torch.randn(3)),
        w=lambda: nn.Parameter(torch.randn(6, 3)),
    ),
    "hstack": conv(lambda m, x: torch.hstack([m.c(x), x]), ["concat"]),
    "dstack": conv(lambda m, x: torch.dstack((m.c(x), x)), ["concat"]),
    "clamp by tensors": one(
        lambda m, x: m.c(x).clamp(m.low, m.high) + torch.clamp(x, min=m.each),
        ["conv2d", "elementwise", "elementwise", "maximum", "add"],
        c=_CONV["c"],
        low=lambda: torch.tensor(-0.3),
        high=lambda: torch.tensor(0.4),
        each=lambda: torch.linspace(-1.0, 0.0, 4).reshape(1, 4, 1, 1),
    ),
    "softmax in float32": linear(lambda m, x: F.softmax(m.l(x), dim=-1, dtype=torch.float32), ["softmax"]),
    "softmax of a masked score in float32": linear(
        lambda m, x: F.softmax(m.l(x) + torch.full((5, 8), -1e9).triu(3), -1, dtype=torch.float32), ["softmax"]
    ),
    "softmin": linear(lambda m, x: F.softmin(m.l(x), dim=1), ["elementwise", "softmax"]),
    "softmin layer": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Softmin(-1)), tokens, ["dense", "softmax"]),
    "softmax of channels": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Softmax2d()), image, ["conv2d", "softmax"]),
    "logsumexp": linear(
        lambda m, x: torch.logsumexp(m.l(x), -1) + m.l(x).logsumexp(dim=2, keepdim=True).squeeze(-1),
        ["reduce_max", "sub", "elementwise", "sum", "elementwise", "add"],
    ),
    "mean in float32": conv(lambda m, x: m.c(x).mean((2, 3), dtype=torch.float32), ["mean"]),
    "sum of absolute values": conv(lambda m, x: m.c(x).norm(p=1, dim=1), ["elementwise", "sum"]),
    "largest absolute value": conv(lambda m, x: torch.linalg.vector_norm(m.c(x), float("inf"), dim=1), ["reduce_max"]),
    "distance": (
        lambda: Two(lambda m, x, y: F.pairwise_distance(m.l(x), m.l(y)), l=nn.Linear(6, 5)),
        (lambda: torch.randn(4, 6), lambda: torch.randn(4, 6)),
        ["dense", "dense", "sub", "mul", "sum", "elementwise"],
    ),
    "distance layer": (
        lambda: Two(lambda m, x, y: m.d(m.l(x), y), l=nn.Linear(6, 6), d=nn.PairwiseDistance(p=1, keepdim=True)),
        (lambda: torch.randn(4, 6), lambda: torch.randn(4, 6)),
        ["dense", "sub", "elementwise", "sum"],
    ),
    "cosine": linear(lambda m, x: F.cosine_similarity(m.l(x), x, dim=-1), ["mul", "sum", "elementwise", "mul"]),
    "cosine layer": (
        lambda: Two(lambda m, x, y: m.d(m.l(x), m.l(y)), l=nn.Linear(6, 5), d=nn.CosineSimilarity(dim=1)),
        (lambda: torch.randn(4, 6), lambda: torch.randn(4, 6)),
        ["dense", "mul", "sum", "elementwise"],
    ),
    "F.instance_norm": conv(lambda m, x: F.instance_norm(m.c(x), eps=1e-3), ["mean", "sub", "mul", "elementwise"]),
    "torch.layer_norm": linear(lambda m, x: torch.layer_norm(m.l(x), (8,), None, None, 1e-3, True), ["mean", "sub"]),
    "einsum of one": linear(lambda m, x: torch.einsum("btc->bct", m.l(x)), ["transpose"]),
    "einsum without a sum": linear(lambda m, x: torch.einsum("btc,bt->bct", m.l(x), x[..., 0]), ["transpose", "mul"]),
    "einsum with an ellipsis": linear(lambda m, x: torch.einsum("...td,...sd->...ts", m.l(x), x), ["batch_matmul"]),
    "maxima of what is padded by minus infinity": conv(
        lambda m, x: F.max_pool2d(F.pad(m.c(x), (1, 1, 0, 2), value=float("-inf")), 3), ["pad", "max_pool2d"]
    ),
    "smoothed": resized(["dense", "dense"], size=(4, 5), mode="bilinear", antialias=True),
    "bicubic": resized(["dense", "dense"], size=(12, 5), mode="bicubic"),
    "bicubic by a factor": resized(["dense", "dense"], scale_factor=1.7, mode="bicubic", align_corners=False),
    "bilinear by what the factor makes": resized(
        ["resize_bilinear"], scale_factor=1.3, mode="bilinear", recompute_scale_factor=True
    ),
    "area": resized(["avg_pool2d"], size=(4, 2), mode="area"),
    "nearest to the middle": resized(["gather", "gather"], size=(5, 11), mode="nearest-exact"),
    "nearest to the middle by a factor": resized(["gather"], scale_factor=(1.7, 1.0), mode="nearest-exact"),
    "upsample a signal": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.Upsample(scale_factor=2, mode="linear")),
        lambda: torch.randn(3, 4, 9),
        ["conv2d", "dense"],
    ),
    "upsample by what the factor makes": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True)
        ),
        image,
        ["conv2d", "resize_bilinear"],
    ),
    "upsample a volume": (
        lambda: nn.Sequential(nn.Conv3d(2, 2, 1), nn.Upsample(size=(3, 8, 5), mode="trilinear", align_corners=True)),
        lambda: torch.randn(2, 2, 4, 4, 5),
        ["conv2d", "dense", "dense"],
    ),
    "attention of shared heads": linear(
        lambda m, x: F.scaled_dot_product_attention(heads(m.l(x), 4), heads(x, 2), heads(x, 2), enable_gqa=True),
        ["gather", "gather", "batch_matmul", "softmax"],
    ),
    "attention and its weights": attention(
        lambda m, x: m.a(x, x, x)[0].sum(-1) + m.a(x, x, x)[1].amax(-1), ["softmax", "mean", "reduce_max"]
    ),
    "weights of each head": attention(
        lambda m, x: m.a(x, x, x, average_attn_weights=False)[1].amax(-1), ["softmax", "reduce_max"]
    ),
    "attention to other sizes": attention(
        lambda m, x: m.a(x, x[..., :6], x[..., :4])[0], ["dense"] * 4 + ["softmax"], kdim=6, vdim=4
    ),
    "attention of parameters": (
        lambda: One(
            lambda m, x: m.a(m.q.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0],
            a=nn.MultiheadAttention(8, 2, batch_first=True),
            q=nn.Parameter(torch.randn(1, 3, 8)),
        ),
        tokens,
        ["mul", "add", "dense", "softmax"],
    ),
    "attention of a table": (
        lambda: One(
            lambda m, x: m.a(m.q.weight.unsqueeze(1).repeat(1, x.size(0), 1), *[x.transpose(0, 1)] * 2)[0].mean(0),
            a=nn.MultiheadAttention(8, 2),
            q=nn.Embedding(3, 8),
        ),
        tokens,
        ["mul", "add", "dense", "softmax"],
    ),
}
