"""Small modules, one per function or way of writing, in the form of `snippets_torch`."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from parts_torch import One, added, attended, image, multiplied, rows, tokens, vector
from torch import nn

_CONV = {"c": lambda: nn.Conv2d(4, 4, 1)}


def one(function: Callable, kinds: list[str], make: Callable = image, **parts: Callable):
    """A snippet of one input; parts are made anew for each module."""
    return (lambda: One(function, **{k: p() for k, p in parts.items()}), make, kinds)


FUNCTIONS = {
    "F.relu": one(lambda m, x: F.relu(m.c(x)), ["conv2d", "relu"], **_CONV),
    "in place": one(lambda m, x: m.c(x).relu_().add_(1.0).mul_(0.5), ["conv2d", "relu", "add", "mul"], **_CONV),
    "F.relu in place": one(lambda m, x: F.relu(m.c(x), inplace=True), ["conv2d", "relu"], **_CONV),
    "x + y": one(lambda m, x: m.c(x) + m.d(x), ["conv2d", "conv2d", "add"], c=_CONV["c"], d=_CONV["c"]),
    "x += y": one(lambda m, x: operator.iadd(m.c(x), x), ["conv2d", "add"], **_CONV),
    "x - y": one(lambda m, x: m.c(x) - x, ["conv2d", "sub"], **_CONV),
    "x * y": one(lambda m, x: m.c(x) * torch.sigmoid(x), ["conv2d", "sigmoid", "mul"], **_CONV),
    "x / y": one(lambda m, x: m.c(x) / (x.abs() + 1.0), ["conv2d", "elementwise", "elementwise", "mul"], **_CONV),
    # Means of nearly zero differ by a step of their range; a much smaller e has no quotient that 8 bits hold.
    "x / sqrt(y + e)": one(
        lambda m, x: m.c(x) / torch.sqrt(x.mean(1, keepdim=True).square() + 0.1),
        ["conv2d", "mean", "mul", "elementwise", "mul"],
        **_CONV,
    ),
    "scalars": one(lambda m, x: 2.0 - (m.c(x) * 3 + 1) / 4, ["conv2d", "mul", "add", "mul", "sub"], **_CONV),
    "1 / x": one(lambda m, x: 1.0 / (m.c(x).abs() + 1.0), ["conv2d", "elementwise", "add", "elementwise"], **_CONV),
    "x ** 2": one(lambda m, x: m.c(x) ** 2 + m.c(x).square(), ["conv2d", "conv2d", "mul", "mul", "add"], **_CONV),
    "x ** 3": one(lambda m, x: m.c(x) ** 3, ["conv2d", "elementwise"], **_CONV),
    "maximum": one(lambda m, x: torch.maximum(m.c(x), x), ["conv2d", "maximum"], **_CONV),
    "clamp": one(
        lambda m, x: m.c(x).clamp(0, 2) + m.c(x).clamp(-1, 1), ["conv2d"] * 2 + ["relu", "elementwise", "add"], **_CONV
    ),
    "cat": one(lambda m, x: torch.cat([m.c(x), x], 1), ["conv2d", "concat"], **_CONV),
    "stack": one(
        lambda m, x: torch.stack([m.c(x), x], 1).flatten(1, 2),
        ["conv2d", "reshape", "reshape", "concat", "reshape"],
        **_CONV,
    ),
    "chunk": one(lambda m, x: added(m.c(x).chunk(2, 1)), ["conv2d", "strided_slice", "strided_slice", "add"], **_CONV),
    "split": one(
        lambda m, x: multiplied(torch.split(m.c(x), [2, 2], dim=1)),
        ["conv2d", "strided_slice", "strided_slice", "mul"],
        **_CONV,
    ),
    "unbind": one(
        lambda m, x: added(m.c(x).reshape(-1, 2, 2, 64).unbind(1)),
        ["conv2d", "reshape", "strided_slice", "strided_slice", "add"],
        **_CONV,
    ),
    "slices": one(lambda m, x: m.c(x)[:, 1:3, ::2, -1], ["conv2d", "strided_slice"], **_CONV),
    "ellipsis": one(lambda m, x: m.c(x)[..., 2:], ["conv2d", "strided_slice"], **_CONV),
    "gather": one(lambda m, x: m.c(x)[:, [3, 0, 1]], ["conv2d", "gather"], **_CONV),
    "index_select": one(
        lambda m, x: m.c(x).index_select(1, m.i), ["conv2d", "gather"], c=_CONV["c"], i=lambda: torch.tensor([2, 0])
    ),
    "mean": one(lambda m, x: m.c(x).mean((2, 3)), ["conv2d", "mean"], **_CONV),
    "mean keepdim": one(lambda m, x: torch.mean(m.c(x), dim=[-2, -1], keepdim=True), ["conv2d", "mean"], **_CONV),
    "sum": one(lambda m, x: m.c(x).sum(1), ["conv2d", "sum"], **_CONV),
    "amax": one(lambda m, x: m.c(x).amax((2, 3)), ["conv2d", "reduce_max"], **_CONV),
    "flatten": one(lambda m, x: torch.flatten(m.c(x), 1), ["conv2d", "reshape"], **_CONV),
    "view": one(lambda m, x: m.c(x).view(x.size(0), -1), ["conv2d", "reshape"], **_CONV),
    "view with shape": one(
        lambda m, x: m.c(x).reshape(x.shape[0], 4, -1).transpose(1, 2), ["conv2d", "reshape", "transpose"], **_CONV
    ),
    "squeeze": one(
        lambda m, x: m.c(x).mean(1, keepdim=True).squeeze(1).unsqueeze(1),
        ["conv2d", "mean", "reshape", "reshape"],
        **_CONV,
    ),
    "permute": one(
        lambda m, x: m.c(x).permute(0, 2, 3, 1).movedim(3, 1), ["conv2d", "transpose", "transpose"], **_CONV
    ),
    "interpolate": one(
        lambda m, x: F.interpolate(m.c(x), scale_factor=2, mode="nearest"), ["conv2d", "resize_nearest"], **_CONV
    ),
    "interpolate to a size": one(
        lambda m, x: F.interpolate(m.c(x), size=x.shape[2:], mode="bilinear"), ["conv2d", "resize_bilinear"], **_CONV
    ),
    "pad": one(lambda m, x: F.pad(m.c(x), (1, 1, 0, 2)), ["conv2d", "pad"], **_CONV),
    "pools": one(
        lambda m, x: F.max_pool2d(m.c(x), 2) + F.avg_pool2d(x, 2),
        ["conv2d", "max_pool2d", "avg_pool2d", "add"],
        **_CONV,
    ),
    "adaptive": one(lambda m, x: F.adaptive_avg_pool2d(m.c(x), 1).flatten(1), ["conv2d", "mean", "reshape"], **_CONV),
    "matmul": one(lambda m, x: m.c(x) @ x.transpose(-1, -2), ["conv2d", "transpose", "batch_matmul"], **_CONV),
    "einsum": one(lambda m, x: torch.einsum("bchw,bdhw->bcd", m.c(x), x), ["batch_matmul"], **_CONV),
    "sdpa": one(
        lambda m, x: F.scaled_dot_product_attention(m.l(x), x, x),
        ["dense", "batch_matmul", "softmax", "transpose", "batch_matmul"],
        tokens,
        l=lambda: nn.Linear(8, 8),
    ),
    "F.conv2d": one(
        lambda m, x: F.conv2d(x, m.w, m.b, padding=1),
        ["conv2d"],
        w=lambda: nn.Parameter(torch.randn(3, 4, 3, 3)),
        b=lambda: vector(3),
    ),
    "F.linear": one(lambda m, x: F.linear(x, m.w), ["dense"], rows, w=lambda: nn.Parameter(torch.randn(3, 6))),
    "x @ w": one(lambda m, x: x @ m.w, ["dense"], rows, w=lambda: nn.Parameter(torch.randn(6, 3))),
    "scale and shift": one(
        lambda m, x: m.c(x) * m.s.view(1, -1, 1, 1) + m.o.view(1, -1, 1, 1),
        ["conv2d", "channel_affine", "channel_affine"],
        c=_CONV["c"],
        s=lambda: vector(4),
        o=lambda: vector(4),
    ),
    "position": one(
        lambda m, x: m.l(x) + m.p,
        ["dense", "add"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        p=lambda: nn.Parameter(torch.randn(1, 5, 8)),
    ),
    "class token": one(
        lambda m, x: torch.cat([m.t.expand(x.shape[0], -1, -1), m.l(x)], 1)[:, 0],
        ["dense", "pad", "add", "strided_slice"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        t=lambda: nn.Parameter(torch.randn(1, 1, 8)),
    ),
    "expand": one(lambda m, x: m.c(x).mean(1, keepdim=True).expand(-1, 4, -1, -1), ["conv2d", "mean", "tile"], **_CONV),
    "causal attention": one(
        lambda m, x: F.scaled_dot_product_attention(m.l(x), x, x, is_causal=True),
        ["batch_matmul", "softmax"],
        tokens,
        l=lambda: nn.Linear(8, 8),
    ),
    "attention with a bias": one(
        lambda m, x: F.scaled_dot_product_attention(m.l(x), x, x, m.b),
        ["mul", "add", "softmax"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        b=lambda: nn.Parameter(torch.randn(5, 5)),
    ),
    "attention with a bias and a mask": one(
        lambda m, x: F.scaled_dot_product_attention(m.l(x), x, x, m.b),
        ["mul", "add", "softmax"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        b=lambda: torch.randn(5, 5).masked_fill(torch.eye(5) > 0, float("-inf")),
    ),
    "new axes": one(
        lambda m, x: m.l(x)[:, None, 1:4] * x[..., -2:-1, None, :][:, :, 0, None].transpose(1, 2),
        ["dense", "strided_slice", "reshape", "mul"],
        tokens,
        l=lambda: nn.Linear(8, 8),
    ),
    "where a mask says": one(
        lambda m, x: torch.where(m.k[:5, :8], m.l(x), x * 2.0),
        ["dense", "mul", "mul", "add"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        k=lambda: torch.eye(9) < 0.5,
    ),
    "where with numbers": one(
        lambda m, x: torch.where(
            m.k, torch.where(m.k.flip(0), m.l(x), torch.zeros_like(x)).masked_fill(m.k.flip(1), 0.5), -0.75
        ),
        ["dense", "mul", "mul", "mul"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        k=lambda: torch.ones(5, 8).tril() > 0,
    ),
    "masked_fill": one(
        lambda m, x: F.softmax((m.l(x) @ x.mT * 0.4).masked_fill(m.k[:, : x.size(1), :5] == 0, float("-inf")), -1) @ x,
        ["batch_matmul", "mul", "softmax", "batch_matmul"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        k=lambda: torch.tril(torch.ones(1, 7, 7)),
    ),
    "mask that is added": one(
        lambda m, x: torch.softmax(m.l(x) + torch.triu(torch.full((5, 8), -1e9), 3), dim=2),
        ["dense", "softmax"],
        tokens,
        l=lambda: nn.Linear(8, 8),
    ),
    "softmax": one(lambda m, x: F.softmax(m.l(x), dim=-1), ["dense", "softmax"], rows, l=lambda: nn.Linear(6, 4)),
    "functional dropout": one(lambda m, x: F.dropout(m.c(x), 0.5, m.training), ["conv2d", "identity"], **_CONV),
    "called twice": one(lambda m, x: m.c(m.c(x)), ["conv2d", "conv2d"], **_CONV),
    "F.layer_norm": one(
        lambda m, x: F.layer_norm(m.l(x), (8,)),
        ["dense", "mean", "sub", "mul", "mean", "elementwise", "mul"],
        tokens,
        l=lambda: nn.Linear(8, 8),
    ),
    "qkv unbound": one(
        lambda m, x: attended(*m.l(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)),
        ["dense", "reshape", *["strided_slice", "transpose"] * 3, "batch_matmul", "softmax", "batch_matmul"],
        tokens,
        l=lambda: nn.Linear(8, 24),
    ),
    "qkv by items": one(
        lambda m, x: attended(*(m.l(x).view(-1, 5, 3, 8).movedim(2, 0)[i] for i in range(3))),
        ["dense", "reshape", *["strided_slice", "transpose"] * 3, "batch_matmul", "softmax", "batch_matmul"],
        tokens,
        l=lambda: nn.Linear(8, 24),
    ),
    "max over an axis": one(
        lambda m, x: m.c(x).max(dim=1, keepdim=True).values + torch.min(m.c(x), 1, True)[0],
        ["reduce_max", "reduce_min", "add"],
        **_CONV,
    ),
    "max of two": one(
        lambda m, x: torch.max(m.c(x), x) + torch.min(x, m.n),
        ["maximum", "elementwise", "add"],
        c=_CONV["c"],
        n=lambda: torch.tensor(0.37),
    ),
    "glu": one(lambda m, x: F.glu(m.c(x), 1), ["strided_slice", "strided_slice", "sigmoid", "mul"], **_CONV),
    "normalize": one(lambda m, x: F.normalize(m.c(x), dim=1), ["mul", "sum", "elementwise", "mul"], **_CONV),
    "norm": one(lambda m, x: torch.norm(m.c(x), dim=(2, 3)), ["mul", "sum", "elementwise"], **_CONV),
    "linalg norm": one(lambda m, x: torch.linalg.vector_norm(m.c(x), dim=1), ["mul", "sum", "elementwise"], **_CONV),
    "var": one(lambda m, x: m.c(x).var(1, unbiased=False, keepdim=True), ["mean", "sub", "mul", "mean"], **_CONV),
    "std": one(lambda m, x: torch.std(m.c(x), (2, 3)), ["mean", "sub", "mul", "mean", "mul", "elementwise"], **_CONV),
    "log_softmax": one(
        lambda m, x: F.log_softmax(m.l(x), dim=1),
        ["dense", "reduce_max", "sub", "elementwise", "sum", "elementwise", "sub"],
        rows,
        l=lambda: nn.Linear(6, 4),
    ),
    "F.rms_norm": one(
        lambda m, x: F.rms_norm(m.l(x), (8,), m.w),
        ["mul", "mean", "elementwise", "mul", "channel_affine"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        w=lambda: vector(8),
    ),
    "roll": one(lambda m, x: torch.roll(m.c(x), (-3, 1), (2, 3)), ["gather", "gather"], **_CONV),
    "pad replicated": one(lambda m, x: F.pad(m.c(x), (1, 2, 0, 1), mode="replicate"), ["gather", "gather"], **_CONV),
    "pad circular": one(lambda m, x: F.pad(m.c(x), (1, 2, 0, 0), mode="circular"), ["gather"], **_CONV),
    "pad with a value": one(lambda m, x: F.pad(m.c(x), (1, 1), value=-7.3), ["pad", "add"], **_CONV),
    "pad by less": one(lambda m, x: F.pad(m.c(x), (-1, 2, 0, -2)), ["strided_slice", "pad"], **_CONV),
    "cat with constants": one(
        lambda m, x: torch.cat([m.o.expand(x.size(0), -1, 8, 8), m.c(x), m.t.expand(x.shape[0], 2, 8, 8), x], 1),
        ["pad", "concat", "add"],
        c=_CONV["c"],
        o=lambda: torch.linspace(-2, 2, 8).view(1, 1, 8, 1),
        t=lambda: nn.Parameter(torch.randn(1, 2, 8, 8)),
    ),
    "sum of a stack": one(
        lambda m, x: torch.stack([m.c(x), x, x * 2]).mean(0) + torch.stack([x, m.c(x)], dim=0).sum(dim=0),
        ["add", "add", "mul", "add", "add"],
        **_CONV,
    ),
    "sum of a list": one(lambda m, x: sum([m.c(x), x]), ["conv2d", "identity", "add"], **_CONV),
    "constant from the left": one(
        lambda m, x: m.a @ m.l(x),
        ["dense", "transpose", "dense", "transpose"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        a=lambda: torch.randn(5, 5),
    ),
    "einsum with a constant first": one(
        lambda m, x: torch.einsum("nm,bmf->bnf", m.a, m.l(x)),
        ["dense", "dense"],
        tokens,
        l=lambda: nn.Linear(8, 8),
        a=lambda: torch.randn(5, 5),
    ),
    "F.batch_norm": one(
        lambda m, x: F.relu(F.batch_norm(m.c(x), m.m, m.v, m.g, m.o)),
        ["conv2d", "channel_affine", "relu"],
        c=_CONV["c"],
        m=lambda: torch.randn(4),
        v=lambda: torch.rand(4) + 0.5,
        g=lambda: vector(4),
        o=lambda: vector(4),
    ),
    "average without padding": one(
        lambda m, x: F.avg_pool2d(m.c(x), 3, 2, 1, count_include_pad=False), ["pad", "avg_pool2d", "mul"], **_CONV
    ),
    "average with ceil_mode": one(
        lambda m, x: F.avg_pool2d(m.c(x), 3, 2, ceil_mode=True), ["pad", "avg_pool2d", "mul"], **_CONV
    ),
    "average of a signal": one(
        lambda m, x: F.avg_pool1d(x, 5, 3, 2, ceil_mode=True, count_include_pad=True),
        ["pad", "avg_pool2d"],
        lambda: torch.randn(3, 4, 9),
    ),
    "average with a divisor": one(
        lambda m, x: F.avg_pool2d(m.c(x), 2, divisor_override=3), ["avg_pool2d", "mul"], **_CONV
    ),
    "adaptive average of unlike windows": one(
        lambda m, x: F.adaptive_avg_pool2d(m.c(x), (3, 5)), ["gather", "pad", "gather", "avg_pool2d", "mul"], **_CONV
    ),
    "adaptive average that overlaps": one(
        lambda m, x: F.adaptive_avg_pool1d(x, 6), ["avg_pool2d"], lambda: torch.randn(3, 4, 13)
    ),
    "adaptive maximum of unlike windows": one(
        lambda m, x: F.adaptive_max_pool2d(m.c(x), 3), ["gather", "gather", "max_pool2d"], **_CONV
    ),
    "elementwise by name": one(
        lambda m, x: torch.erf(m.c(x)) + torch.exp(-m.c(x).abs()), ["elementwise", "add"], **_CONV
    ),
}
