"""Quantized graphs written by hand, so that the artifact is tested without a front end: ops, ranges, exact `call`s.

A graph grows op by op; `Hand.op` runs the op in float on the samples, puts a fake quantization with the range of its
output behind it, and goes on with the fake-quantized values, as a trained model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kquant.core.affine import Affine, fake_quantize
from kquant.core.graph import Graph, Op, Tensor, Weight
from kquant.core.weights import Symmetric, weight_formula


@dataclass(frozen=True)
class Range:
    """A trained activation quantizer."""

    low: np.float32
    high: np.float32
    bits: int = 8
    symmetric: bool = False

    def range(self) -> tuple[np.float32, np.float32]:
        return self.low, self.high

    def is_set(self) -> bool:
        return True


def quantizer_call(spec: Range) -> Callable:
    affine = Affine.of_range(spec.low, spec.high, spec.bits)

    def call(values: Any, float_weights: bool = False) -> list[np.ndarray]:
        x = np.asarray(values[0], np.float32)
        made = fake_quantize(x, affine.scale, np.float32(affine.zero_point), affine.qmin, affine.qmax)
        return [np.asarray(made, np.float32)]

    return call


class Hand:
    """Grows a graph; `values` holds what each tensor is for the samples."""

    def __init__(self, **inputs: np.ndarray):
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, np.ndarray] = {}
        self.inputs = tuple(inputs)
        for name, value in inputs.items():
            self._tensor(name, value)

    def _tensor(self, name: str, value: np.ndarray) -> None:
        self.values[name] = value
        self.tensors[name] = Tensor(name, (None, *value.shape[1:]), str(value.dtype))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.tensors[name] = Tensor(name, value.shape, str(value.dtype), value)
        self.values[name] = value
        return name

    def op(
        self, kind: str, inputs: tuple[str, ...], function: Callable, name: str, *, bits: int | None = 8,
        weights: dict[str, np.ndarray] | None = None, like: Range | None = None, symmetric: bool = False, **attrs: Any,
    ) -> str:  # fmt: skip
        """Add an op and, unless `bits` is None, a fake quantization of its output; returns the tensor to go on with."""
        held = {role: Weight(w.shape, lambda w=w: w) for role, w in (weights or {}).items()}

        def call(values: Any, float_weights: bool = False) -> list[np.ndarray]:
            tensors = [torch.from_numpy(np.ascontiguousarray(v)) for v in values]
            with torch.no_grad():
                return [function(*tensors).numpy()]

        self.ops.append(Op(name, kind, inputs, (name,), attrs, held, name, kind, call))
        self._tensor(name, call([self.values[t] for t in inputs])[0])
        return name if bits is None else self.quantize(name, bits, like, symmetric)

    def quantize(self, tensor: str, bits: int = 8, like: Range | None = None, symmetric: bool = False) -> str:
        value = self.values[tensor]
        low, high = np.float32(min(value.min(), 0)), np.float32(max(value.max(), 0))
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
            low = np.float32(low * np.float32(128 / 127))
        spec = like or Range(low, high, bits)
        name = f"{tensor}/fq"
        attrs = {"quantizer": spec, "spec": tensor, "site": None}
        self.ops.append(
            Op(name, "fake_quant", (tensor,), (name,), attrs, {}, tensor, "fake_quant", quantizer_call(spec))
        )
        self._tensor(name, quantizer_call(spec)([value])[0])
        return name

    def weighted(
        self, kind: str, source: str, function: Callable, name: str, kernel: np.ndarray, *, w_bits: int = 8,
        quantizer: str = "qat", kernel_axes: tuple[int, ...] = (), bias: np.ndarray | None = None, **more: Any,
    ) -> str:  # fmt: skip
        """An op with a kernel; `function(x, quantized kernel, bias)`."""
        formula = weight_formula(quantizer, w_bits, kernel_axes or None)
        codes, scale = formula.quantize(formula.prepare(kernel))
        real = torch.from_numpy((codes * scale).astype(np.float32))
        held = None if bias is None else torch.from_numpy(bias)
        weights = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
        return self.op(
            kind, (source,), lambda x: function(x, real, held), name, weights=weights, formula=formula,
            kernel_axes=kernel_axes, codes=lambda: (codes, scale), **more,
        )  # fmt: skip

    def graph(self, *outputs: str) -> Graph:
        named = tuple(t.removesuffix("/fq") for t in outputs)
        return Graph(tuple(self.ops), self.tensors, self.inputs, outputs, "hand", self.inputs, named)


def conv(hand: Hand, source: str, name: str, kernel: np.ndarray, bias: np.ndarray | None = None, **more: Any) -> str:
    """A convolution of any rank with stride, padding, dilation and groups as torch takes them."""
    rank = kernel.ndim - 2
    geometry = {n: more.pop(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))}
    groups = more.pop("groups", 1)
    function = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[rank - 1]
    windows = {n: (v,) * rank for n, v in geometry.items()}
    return hand.weighted(
        "conv2d", source, lambda x, w, b: function(x, w, b, **geometry, groups=groups), name, kernel, bias=bias,
        kernel_axes=tuple(range(1, rank + 2)), channel_axis=1, rank=rank, groups=groups, **windows, **more,
    )  # fmt: skip


def dense(hand: Hand, source: str, name: str, kernel: np.ndarray, bias: np.ndarray | None = None, **more: Any) -> str:
    return hand.weighted(
        "dense", source, torch.nn.functional.linear, name, kernel, bias=bias, kernel_axes=(1,),
        channel_axis=hand.values[source].ndim - 1, **more,
    )  # fmt: skip


def relu(hand: Hand, source: str, name: str, limit: float | None = None, **more: Any) -> str:
    function = torch.relu if limit is None else lambda x: torch.clamp(x, 0, limit)
    return hand.op("relu", (source,), function, name, max=limit, fn="relu", **more)


__all__ = ["Hand", "Range", "Symmetric", "conv", "dense", "relu"]
