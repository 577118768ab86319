"""TorchScript for ops that move, pool, compare or resize codes."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.errors import UnsupportedError
from kquant.core.integer import IntOp
from kquant_torch.emit import SHIFT_OF_CODES, Emitter, literal, writes


def clamped(e: Emitter, op: IntOp, expression: str) -> str:
    """An expression within the codes that the op may give, where it does not keep to them by itself."""
    low, high = e.bounds(op)
    return expression if (low, high) == (0, 255) else f"torch.clamp({expression}, {low}, {high})"


@writes("relu")
def _relu(e: Emitter, op: IntOp) -> str:
    low, high = e.bounds(op)
    return f"torch.clamp({e.codes(op.inputs[0])}, {low}, {high})"


@writes("max_pool2d")
def _max_pool(e: Emitter, op: IntOp) -> str:
    """`quantized::max_pool2d` takes plain uint8 and keeps channels_last; one spatial axis is an image of one row."""
    a, x = op.attrs, e.codes(op.inputs[0])
    window = [list(a[n]) for n in ("kernel_size", "stride", "padding", "dilation")]
    ceil = literal(bool(a["ceil_mode"]))
    if a["rank"] == 3:
        return e.call("max_pool3d", x, *map(list, window), bool(a["ceil_mode"]))
    if a["rank"] == 2:
        return f"ops.quantized.max_pool2d({x}, {', '.join(map(literal, window))}, {ceil})"
    window = [[one, *v] for one, v in zip((1, 1, 0, 1), window, strict=True)]
    pooled = f"ops.quantized.max_pool2d(torch.unsqueeze({x}, 2), {', '.join(map(literal, window))}, {ceil})"
    return f"torch.squeeze({pooled}, 2)"


@writes("reduce_max", "reduce_min")
def _extreme(e: Emitter, op: IntOp) -> str:
    name = "amax" if op.kind == "reduce_max" else "amin"
    return f"torch.{name}({e.codes(op.inputs[0])}, {literal(list(op.attrs['dim']))}, {bool(op.attrs['keepdim'])})"


@writes("maximum", "minimum")
def _compare(e: Emitter, op: IntOp) -> str:
    return f"torch.{op.kind}({e.codes(op.inputs[0])}, {e.codes(op.inputs[1])})"


@writes("concat")
def _concat(e: Emitter, op: IntOp) -> str:
    return f"torch.cat([{', '.join(map(e.codes, op.inputs))}], {op.attrs['dim']})"


@writes("reshape")
def _reshape(e: Emitter, op: IntOp) -> str:
    """To the output's shape; an axis that follows the batch is -1, and the batch itself where another axis is open."""
    x, wanted = e.codes(op.inputs[0]), list(op.attrs["shape"])
    if wanted.count(None) > 1:
        raise UnsupportedError(
            f"op {op.id!r}", "a reshape in which one size follows the batch", wanted, "Give the others as numbers"
        )
    return f"torch.reshape({x}, {literal([-1 if s is None else int(s) for s in wanted])})"


@writes("transpose")
def _transpose(e: Emitter, op: IntOp) -> str:
    return f"torch.permute({e.codes(op.inputs[0])}, {literal(list(op.attrs['dims']))})"


def _flat_pads(paddings: Any) -> list[int]:
    """Torch's order: the last axis first, leading axes without padding left out."""
    pads = [tuple(map(int, p)) for p in paddings]
    while len(pads) > 1 and pads[0] == (0, 0):
        pads = pads[1:]
    return [n for pair in reversed(pads) for n in pair]


@writes("pad")
def _pad(e: Emitter, op: IntOp) -> str:
    value = np.asarray(op.attrs.get("value", 0.0), np.float32)
    code = int(e.affine(op.outputs[0]).quantize(value)) + SHIFT_OF_CODES
    return f"torch.constant_pad_nd({e.codes(op.inputs[0])}, {literal(_flat_pads(op.attrs['paddings']))}, {code})"


@writes("mirror_pad")
def _mirror_pad(e: Emitter, op: IntOp) -> str:
    x, paddings = e.codes(op.inputs[0]), list(op.attrs["paddings"])
    spatial = len(paddings) - 2
    if any(tuple(p) != (0, 0) for p in paddings[:2]) or spatial not in (1, 2, 3):
        raise UnsupportedError(
            f"op {op.id!r}",
            "mirrored padding of the spatial axes",
            paddings,
            "Pad the spatial axes only, or with a constant",
        )
    pads = [int(n) for pair in reversed(paddings[2:]) for n in pair]
    return f"torch.reflection_pad{spatial}d({x}, {literal(pads)})"


@writes("strided_slice")
def _strided_slice(e: Emitter, op: IntOp) -> str:
    """`begin`, `end` (None: to the end) and `strides` per axis; `shrink` drops axes of size one."""
    expression = e.codes(op.inputs[0])
    bounds = zip(op.attrs["begin"], op.attrs["end"], op.attrs["strides"], strict=True)
    for axis, (begin, end, stride) in enumerate(bounds):
        if (begin or 0, end, stride) != (0, None, 1):
            expression = f"torch.slice({expression}, {axis}, {literal(begin)}, {literal(end)}, {stride})"
    for axis in sorted(op.attrs.get("shrink", ()), reverse=True):
        expression = f"torch.squeeze({expression}, {axis})"
    return expression


@writes("gather")
def _gather(e: Emitter, op: IntOp) -> str:
    indices = e.array(f"{op.id}/indices", np.asarray(op.attrs["indices"], np.int64))
    return f"torch.index_select({e.codes(op.inputs[0])}, {op.attrs['dim']}, {indices})"


@writes("tile")
def _tile(e: Emitter, op: IntOp) -> str:
    return f"torch.repeat({e.codes(op.inputs[0])}, {literal(list(op.attrs['repeats']))})"


@writes("resize_nearest")
def _nearest(e: Emitter, op: IntOp) -> str:
    """By the factors, where the model gave them, so that the image may have any size."""
    rank = len(op.attrs["size"])
    x, factors = e.codes(op.inputs[0]), op.attrs.get("scale_factor")
    if factors is None:
        return f"torch.upsample_nearest{rank}d({x}, {literal(list(op.attrs['size']))}, None)"
    return f"torch.upsample_nearest{rank}d({x}, None, {literal([float(f) for f in factors])})"


@writes("resize_bilinear")
def _linear(e: Emitter, op: IntOp) -> str:
    factors = [float(f) for f in op.attrs.get("scale_factor") or ()]
    size = [] if factors else [int(n) for n in op.attrs["size"]]
    lists = f"annotate(List[int], {literal(size)})", f"annotate(List[float], {literal(factors)})"
    return e.call("resize_linear", e.codes(op.inputs[0]), *lists, bool(op.attrs.get("align_corners", False)))
