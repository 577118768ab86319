"""Ops with a kernel: their geometry, the kernel's layout and the axes that share a scale, for modules and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from kquant.core.graph import Weight
from kquant_torch.reader import Reader, Refused, parameter_weight, weight_quantizer
from kquant_torch.tracer import in_mode

GEOMETRY = ("stride", "padding", "output_padding", "dilation")


def geometry(attrs: dict, window: tuple[int, ...]) -> dict:
    """The settings of a convolution with a tuple of ints for each window setting.

    Raises:
        Refused: padding that is not the same on both sides.
    """
    found, rank = dict(attrs), len(window)
    for key in GEOMETRY:
        value = found.get(key)
        if isinstance(value, int):
            found[key] = (value,) * rank
        elif isinstance(value, (tuple, list)):
            found[key] = tuple(value) if len(value) == rank else tuple(value) * rank
    if found["padding"] == "valid":
        found["padding"] = (0,) * rank
    if found["padding"] == "same":
        reach = [d * (w - 1) for d, w in zip(found["dilation"], window, strict=True)]
        if any(total % 2 for total in reach):
            raise Refused("padding='same' pads an even window more on one side; pad with F.pad before it")
        found["padding"] = tuple(total // 2 for total in reach)
    return found


def layout(kind: str, shape: tuple[int, ...], groups: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shape in which a kernel is quantized, and the axes that share a scale; None for one scale.

    Args:
        kind: the op's kind.
        shape: of torch's parameter.
        groups: of a convolution.
        rank: of the op's input, for the slopes of a PReLU.
    """
    if kind == "conv2d_transpose" and groups > 1:
        view = (groups, shape[0] // groups, *shape[1:])
        return view, (1, *range(3, len(view)))
    if kind == "conv2d_transpose":
        return shape, (0, *range(2, len(shape)))
    if kind == "prelu":
        return (*shape, *(1,) * (rank - 2)) if shape != (1,) else shape, None
    if kind == "embedding":
        return shape, None
    return shape, tuple(range(1, len(shape)))


def read_kernel(r: Reader, node: fx.Node, kind: str, x: Any, weight: Any, bias: Any, attrs: dict) -> Any:
    """A function with a kernel: a parameter, or what is computed from parameters."""
    quantizer, source = weight_quantizer(r, weight)
    if not r.is_data(x) or not r.is_parametric(source):
        raise Refused("its kernel is computed from the model's input")
    if bias is not None and not r.is_parametric(bias):
        raise Refused("its bias is computed from the model's input")
    shape = tuple(source.meta["value"].shape)
    view, axes = layout(kind, shape, attrs.get("groups", 1), r.rank(x))
    if "padding" in attrs:
        attrs = geometry(attrs, shape[2:])
    weights = {"kernel": parameter_weight(r, source, view)}
    if bias is not None:
        weights["bias"] = parameter_weight(r, bias)

    def codes() -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return tuple(c.cpu().numpy() for c in quantizer.codes(r.run(source, {})))

    def call(values: Any, float_weights: bool = False) -> list[np.ndarray]:
        known = {x: r.tensor(values[0])}
        if float_weights:
            known[weight] = r.run(source, {})
        with torch.no_grad():
            return r.arrays(r.run(node, known))

    found = {**attrs, **_marks(kind, r.rank(node), axes), **_quantized(quantizer, codes)}
    return r.add(kind, node, [x], found, weights=weights, call=call)


def read_layer(r: Reader, node: fx.Node, module: nn.Module, kind: str, x: Any, attrs: dict) -> Any:
    """A layer with a kernel, float or quantized."""
    if len(node.args) + len(node.kwargs) > 1:
        raise Refused("it is called with more than its input")
    shape = tuple(module.weight.shape)
    view, axes = layout(kind, shape, attrs.get("groups", 1), r.rank(x))
    if "padding" in attrs:
        attrs = geometry(attrs, shape[2:])
    quantizer = getattr(module, "weight_quantizer", None)
    weights = {"kernel": _weight(module, "weight", view)}
    if getattr(module, "bias", None) is not None:
        weights["bias"] = _weight(module, "bias", tuple(module.bias.shape))

    def codes() -> tuple[np.ndarray, np.ndarray]:
        return tuple(c.cpu().numpy() for c in quantizer.codes(module.weight))

    def call(values: Any, float_weights: bool = False) -> list[np.ndarray]:
        known = r.tensor(values[0])
        with torch.no_grad(), in_mode(module, False):
            if quantizer is None or not float_weights:
                return r.arrays(module.forward(known))
            return r.arrays(module.run(known, quantized=False))

    found = {**attrs, **_marks(kind, r.rank(node), axes), **_quantized(quantizer, codes)}
    return r.add(kind, node, [x], found, weights=weights, call=call)


def _weight(module: nn.Module, name: str, shape: tuple[int, ...]) -> Weight:
    def read() -> np.ndarray:
        return getattr(module, name).detach().cpu().float().numpy().reshape(shape)

    return Weight(shape, read)


def _marks(kind: str, rank: int, axes: tuple[int, ...] | None) -> dict:
    if kind in ("prelu", "embedding"):
        return {}
    return {"kernel_axes": axes, "channel_axis": rank - 1 if kind == "dense" else 1}


def _quantized(quantizer: Any, codes: Callable) -> dict:
    if quantizer is None:
        return {}
    marks = {"formula": quantizer.formula, "codes": codes, "is_waiting": quantizer.is_waiting}
    return {**marks, "folds_norm": quantizer.norm is not None}
