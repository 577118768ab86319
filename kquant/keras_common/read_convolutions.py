"""How convolutions with an array of one's own (`keras.ops.conv(x, self.kernel)`) are read: as a layer of that array."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call
from kquant.keras_common.read_ops import reads, refused, with_array
from kquant.keras_common.reader import Reader

PADDINGS = ("valid", "same")


@reads("Conv", "DepthwiseConv")
def _convolution(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    x, kernel = args["inputs"], args["kernel"]
    padding = str(args["padding"]).lower()
    if len(inputs) != 1 or r.generation.is_symbolic(kernel) or not r.generation.is_symbolic(x):
        return refused(r, call, inputs, f"{name} is read with a trainable or a constant kernel only")
    rank = len(kernel.shape) - 2
    if rank not in (1, 2) or padding not in PADDINGS:
        return refused(r, call, inputs, f"{name} is read over one or two axes, with padding 'valid' or 'same'")
    settings = {"strides": args["strides"], "dilation_rate": args["dilation_rate"]}
    make = _depthwise if name == "DepthwiseConv" else _full
    return with_array(
        r, call, inputs, kernel, (name, padding, *map(str, settings.values())),
        lambda: make(r, x, tuple(kernel.shape), padding=padding, use_bias=False, **settings),
        np.asarray(kernel, np.float32),
    )  # fmt: skip


def _full(r: Reader, x: Any, shape: tuple[int, ...], **settings: Any) -> Any:
    kind = getattr(r.layers, f"Conv{len(shape) - 2}D")
    return kind(shape[-1], shape[:-2], groups=x.shape[-1] // shape[-2], name="conv", **settings)


def _depthwise(r: Reader, x: Any, shape: tuple[int, ...], **settings: Any) -> Any:
    kind = getattr(r.layers, f"DepthwiseConv{len(shape) - 2}D")
    return kind(shape[:-2], depth_multiplier=shape[-1], name="depthwise", **settings)
