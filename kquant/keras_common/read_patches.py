"""How images are cut into patches, or blocks of pixels become channels and back: as moves of whole axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call
from kquant.keras_common.read_ops import reads, refused, rewritten
from kquant.keras_common.reader import Reader

PLACED = "needs images of known size, channels last"


@reads("ExtractPatches")
def _extract_patches(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """Rows of the patches one below the other, then columns; where patches do not overlap, this is the image itself."""
    shape, size, dilation = r.shape(inputs[0]), _pair(args["size"]), _pair(args["dilation_rate"])
    if len(shape) != 4 or len(size) != 2 or None in shape[1:] or args.get("data_format") == "channels_first":
        return refused(r, call, inputs, f"extract_patches {PLACED}")
    strides = _pair(args["strides"] or size)
    spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    pads = [(0, 0), (0, 0)]
    if args["padding"].lower() == "same":
        missing = [max((-(-n // s) - 1) * s + w - n, 0) for n, s, w in zip(shape[1:3], strides, spans, strict=True)]
        pads = [(m // 2, m - m // 2) for m in missing]
    ops, (rows, columns) = r.operations, call.shape[1:3]
    (height, width), channels = size, shape[3]

    def function(x: Any) -> Any:
        if any(map(any, pads)):
            x = ops.pad(x, ((0, 0), *pads, (0, 0)))
        if strides == size and set(dilation) == {1}:
            x = x[:, : rows * height, : columns * width]
        else:
            for axis, (count, k) in enumerate(zip((rows, columns), size, strict=True), 1):
                step, apart = strides[axis - 1], dilation[axis - 1]
                x = ops.take(x, [i * step + j * apart for i in range(count) for j in range(k)], axis=axis)
        x = ops.reshape(x, (-1, rows, height, columns, width * channels))
        return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4)), (-1, rows, columns, height * width * channels))

    return rewritten(r, call, inputs, function)


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),) * 2


@reads("DepthToSpace")
def _depth_to_space(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    shape, block = r.shape(inputs[0]), int(args["block_size"])
    if None in shape[1:] or args["data_format"] != "NHWC":
        return refused(r, call, inputs, f"depth_to_space {PLACED}")
    return rewritten(r, call, inputs, lambda x: blocks_of_pixels(r.operations, x, shape[1:], block))


def blocks_of_pixels(ops: Any, x: Any, shape: Sequence[int], block: int) -> Any:
    """Channels as blocks of `block` by `block` pixels, of images of this shape (height, width, channels)."""
    height, width, channels = shape
    x = ops.reshape(x, (-1, height, width, block, channels // block))
    x = ops.transpose(x, (0, 1, 3, 2, 4))
    return ops.reshape(x, (-1, height * block, width * block, channels // block**2))


@reads("SpaceToDepth")
def _space_to_depth(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    block = int(args["block_size"])
    patches = {"size": block, "strides": block, "dilation_rate": 1, "padding": "valid"}
    if args["data_format"] != "NHWC":
        return refused(r, call, inputs, f"space_to_depth {PLACED}")
    return _extract_patches(r, call, inputs, name, patches)
