"""A description (`tests/descriptions.py`) as a torch module.

Descriptions are channels-last; the module holds a tensor of several axes channels-first, as torch's layers take it, and
turns it around an operation that is stated in channels-last axes. Padding "same" is written out, evenly at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from descriptions import Description, Node
from torch import nn

FUNCTIONS: dict[str, Callable] = {
    "relu": torch.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "elu": F.elu, "selu": F.selu, "silu": F.silu, "gelu": F.gelu,
    "hard_silu": F.hardswish, "hard_sigmoid": F.hardsigmoid, "mish": F.mish, "softplus": F.softplus,
    "softsign": F.softsign, "exponential": torch.exp, "absolute": torch.abs, "square": torch.square,
    "negative": torch.neg, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf, "arctan": torch.atan,
    "clip": lambda x: x.clamp(-0.75, 1.5), "clip_positive": lambda x: x.clamp(0.0, 1.25),
}  # fmt: skip
ARITHMETIC: dict[str, Callable] = {
    "add": lambda x, c: x + c, "multiply": lambda x, c: c * x,
    "divide": lambda x, c: x / c, "subtract": lambda x, c: x - c, "subtract_from": lambda x, c: c - x,
    "maximum": lambda x, c: x.clamp(min=c), "minimum": lambda x, c: x.clamp(max=c),
}  # fmt: skip
MERGES: dict[str, Callable] = {
    "add": torch.add, "multiply": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum, "subtract": torch.sub,
}  # fmt: skip
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)


Shape = tuple[int, ...]


def last(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A tensor of a (channels-last) shape with its channels last."""
    return x.movedim(1, -1) if len(shape) > 1 else x


def first(x: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A tensor of a (channels-last) shape with its channels first."""
    return x.movedim(-1, 1) if len(shape) > 1 else x


def activated(x: torch.Tensor, name: str | None, axis: int = 1) -> torch.Tensor:
    if name is None:
        return x
    return torch.softmax(x, axis) if name == "softmax" else FUNCTIONS[name](x)


def same(x: torch.Tensor, args: dict, shape: Shape) -> torch.Tensor:
    """Padded so that a window gives as many outputs as there are strides."""
    if args["padding"] != "same":
        return x
    dilation = args.get("dilation", (1,) * len(args["kernel"]))
    pads: list[int] = []
    for n, k, s, d in reversed(list(zip(shape[:-1], args["kernel"], args["strides"], dilation, strict=True))):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Built(nn.Module):
    """Runs the nodes of a description one after another."""

    def __init__(self, description: Description):
        super().__init__()
        self.description = description
        shapes = [description.shape, *(n.shape for n in description.nodes)]
        for node in description.nodes:
            if node.name in self._modules:
                continue
            made = self._module(
                node, shapes[node.inputs[0]], shapes[node.inputs[-1]][-1] if shapes[node.inputs[-1]] else 0
            )
            if made is not None:
                self.add_module(node.name, made)
        with torch.no_grad():
            for name, value in self.state_dict().items():
                role = name.rsplit(".", 1)[-1]
                kinds = {"weight": "kernel", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
                kind = "gamma" if role == "weight" and value.ndim == 1 else kinds.get(role)
                if kind is not None:
                    drawn = description.weight(name, kind, tuple(value.shape)[::-1])
                    value.copy_(torch.from_numpy(drawn.T.copy()).reshape(value.shape))

    @staticmethod
    def _module(node: Node, shape: Shape, other: int) -> nn.Module | None:
        a, rank, channels = node.args, len(shape) - 1, shape[-1]
        if node.kind == "conv":
            settings = {"stride": a["strides"], "dilation": a["dilation"], "groups": a["groups"], "bias": a["bias"]}
            return CONVOLUTIONS[rank - 1](channels, a["filters"], a["kernel"], **settings)
        if node.kind in ("depthwise", "separable"):
            wide = channels * a["multiplier"]
            settings = {"stride": a["strides"], "dilation": a["dilation"], "groups": channels}
            depth = CONVOLUTIONS[rank - 1](channels, wide, a["kernel"], bias=a["bias"], **settings)
            point = [CONVOLUTIONS[rank - 1](wide, a["filters"], 1)] if node.kind == "separable" else []
            return nn.Sequential(depth, *point) if point else depth
        if node.kind == "conv_transpose":
            return TRANSPOSED[rank - 1](channels, a["filters"], a["kernel"], a["strides"], bias=a["bias"])
        if node.kind == "dense":
            return nn.Linear(channels, a["units"], bias=a["bias"])
        if node.kind == "einsum_dense":
            inside = channels if a["length"] is not None else channels * shape[0]
            return nn.Linear(inside, math.prod(a["units"]), bias=a["bias"])
        if node.kind == "embedding":
            return nn.Embedding(a["vocabulary"], a["units"])
        if node.kind == "batch_norm":
            return NORMS[rank](channels)
        if node.kind == "layer_norm":
            return nn.LayerNorm(channels)
        if node.kind == "rms_norm":
            return nn.RMSNorm(channels)
        if node.kind == "group_norm":
            return nn.GroupNorm(a["groups"], channels)
        if node.kind == "prelu":
            return nn.PReLU(channels if a["shared_axes"] is None or rank else 1)
        if node.kind in ("dropout", "noise"):
            return nn.Dropout(0.3)
        if node.kind == "attention":
            return Attention(channels, other, a["heads"], a["key_dim"])
        return None

    def forward(self, input):
        shapes = [self.description.shape, *(n.shape for n in self.description.nodes)]
        tensors = [input if self.description.vocabulary else first(input, shapes[0])]
        for node in self.description.nodes:
            tensors.append(self._run(node, [tensors[i] for i in node.inputs], [shapes[i] for i in node.inputs]))
        results = [tensors[i] for i in self.description.outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
        a, x, shape = node.args, xs[0], shapes[0]
        made = self._modules.get(node.name)
        if node.kind in ("conv", "depthwise", "separable"):
            return activated(made(same(x, a, shape)), a["activation"])
        if node.kind == "conv_transpose":
            return _cut(activated(made(x), a["activation"]), node, shape)
        if node.kind in ("dense", "layer_norm", "rms_norm"):
            return first(activated(made(last(x, shape)), a.get("activation"), -1), node.shape)
        if node.kind == "einsum_dense":
            y = made(last(x, shape) if a["length"] is not None else last(x, shape).flatten(1))
            y = activated(y, a["activation"], -1)
            return first(y if a["length"] is None else y.unflatten(-1, a["units"]), node.shape)
        if node.kind == "embedding":
            return first(made(x), node.shape)
        if node.kind == "attention":
            return first(made(last(x, shape), last(xs[1], shapes[1])), node.shape)
        return made(x) if made is not None else OPERATIONS[node.kind](node, xs, shapes)


def _cut(y: torch.Tensor, node: Node, shape: Shape) -> torch.Tensor:
    """The output of a transposed convolution at the size that the description states: its end cut off, or zeros."""
    a = node.args
    have = [(n - 1) * s + k for n, s, k in zip(shape[:-1], a["strides"], a["kernel"], strict=True)]
    more = [max(w - h, 0) for w, h in zip(node.shape[:-1], have, strict=True)]
    if any(more):
        y = F.pad(y, [n for m in reversed(more) for n in (0, m)])
    if any(w < h for w, h in zip(node.shape[:-1], have, strict=True)):
        y = y[(slice(None), slice(None), *(slice(0, n) for n in node.shape[:-1]))]
    return y


class Attention(nn.Module):
    """Heads of scaled dot products between a query and what it attends to."""

    def __init__(self, channels: int, other: int, heads: int, size: int):
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(n, heads * size) for n in (channels, other, other))
        self.out = nn.Linear(heads * size, channels)

    def forward(self, query, other):
        def split(x):
            return x.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

        made = F.scaled_dot_product_attention(split(self.q(query)), split(self.k(other)), split(self.v(other)))
        return self.out(made.transpose(1, 2).flatten(2))


# -- operations: (node, inputs, their shapes) -> output ---------------------------------------------------------------


def _merged(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    y = xs[0]
    for x in xs[1:]:
        y = MERGES[node.kind](y, x)
    return y


def _average(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    y = xs[0]
    for x in xs[1:]:
        y = y + x
    return y / len(xs)


def _pool(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    a, rank = node.args, len(node.args["kernel"])
    kind = "max" if node.kind == "max_pool" else "avg"
    return getattr(F, f"{kind}_pool{rank}d")(same(xs[0], a, shapes[0]), a["kernel"], a["strides"])


def _global(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    axes = tuple(range(2, 1 + len(shapes[0])))
    function = torch.amax if "max" in node.kind else torch.mean
    return function(xs[0], axes, keepdim=node.args["keepdims"])


def _in_last(function: Callable) -> Callable:
    """An operation stated in channels-last axes."""
    return lambda node, xs, shapes: first(
        function(node, [last(x, s) for x, s in zip(xs, shapes, strict=True)]), node.shape
    )


def _resized(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    mode = "bilinear" if node.args["interpolation"] == "bilinear" else "nearest"
    return F.interpolate(xs[0], size=node.shape[:-1], mode=mode)


def _padded(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    pads = [n for pair in reversed(node.args["padding"]) for n in pair]
    mirrored = node.args.get("mode") in ("reflect", "symmetric")
    return F.pad(xs[0], pads, mode="reflect" if mirrored else "constant")


def _cropped(node: Node, xs: list, shapes: list[Shape]) -> torch.Tensor:
    cut = zip(node.args["cropping"], shapes[0][:-1], strict=True)
    return xs[0][(slice(None), slice(None), *(slice(a, n - b) for (a, b), n in cut))]


def _reduced(node: Node, xs: list) -> torch.Tensor:
    a = node.args
    function = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}[a["function"]]
    return function(xs[0], a["axes"], keepdim=a["keepdims"])


OPERATIONS: dict[str, Callable] = {
    **dict.fromkeys(MERGES, _merged),
    "average": _average,
    "max_pool": _pool,
    "average_pool": _pool,
    "global_max_pool": _global,
    "global_average_pool": _global,
    "upsample": _resized,
    "resize": _resized,
    "zero_pad": _padded,
    "pad": _padded,
    "crop": _cropped,
    "activation": lambda node, xs, shapes: activated(xs[0], node.args["function"]),
    "function": lambda node, xs, shapes: FUNCTIONS[node.args["function"]](xs[0]),
    "arithmetic": lambda node, xs, shapes: ARITHMETIC[node.args["function"]](xs[0], node.args["constant"]),
    "rescaling": lambda node, xs, shapes: xs[0] * node.args["scale"] + node.args["offset"],
    "unit_norm": lambda node, xs, shapes: xs[0] / (xs[0].square().sum(1, keepdim=True) + 1.0).sqrt(),
    "concat": _in_last(lambda node, xs: torch.cat(xs, node.args["axis"])),
    "matmul": _in_last(lambda node, xs: xs[0] @ xs[1]),
    "reshape": _in_last(lambda node, xs: xs[0].reshape(-1, *node.shape)),
    "flatten": _in_last(lambda node, xs: xs[0].reshape(-1, *node.shape)),
    "permute": _in_last(lambda node, xs: xs[0].permute(0, *node.args["dims"])),
    "repeat": _in_last(lambda node, xs: xs[0].unsqueeze(1).repeat(1, node.args["count"], 1)),
    "slice": _in_last(lambda node, xs: xs[0][(slice(None), *(slice(*p) for p in node.args["parts"]))]),
    "take": _in_last(lambda node, xs: xs[0][(slice(None),) * node.args["axis"] + (list(node.args["indices"]),)]),
    "tile": _in_last(lambda node, xs: xs[0].repeat(1, *node.args["repeats"])),
    "reduce": _in_last(_reduced),
}


def build(description: Description) -> nn.Module:
    """The float module of a description, with its weights, in evaluation mode."""
    return Built(description).eval()
