"""The integer model as a float module in Q/DQ form: each tensor of the plan is quantized and dequantized around its op.

The codes, scales and zero points are those of the artifact; the ops between are torch's float ones, which compilers
fuse with the Q/DQ pairs around them. `torch.export` traces it into a straight line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

from kquant.core.errors import UnsupportedError
from kquant.core.integer import IntegerModel, IntOp
from kquant_torch.emit import SHIFT_OF_CODES, unsigned

QDQ = torch.ops.quantized_decomposed
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
LINEAR_MODES = ("linear", "bilinear", "trilinear")
WINDOW = ("stride", "padding", "dilation")


def _chosen(op: IntOp, *names: str) -> dict[str, Any]:
    return {n: op.attrs[n] for n in names}


def _conv(op: IntOp, x: Any, w: Any, b: Any) -> Any:
    return CONVOLUTIONS[op.attrs["rank"] - 1](x, w, b, **_chosen(op, *WINDOW, "groups"))


def _transposed(op: IntOp, x: Any, w: Any, b: Any) -> Any:
    settings = _chosen(op, *WINDOW, "output_padding", "groups")
    return TRANSPOSED[op.attrs["rank"] - 1](x, w.reshape(-1, *w.shape[-op.attrs["rank"] - 1 :]), b, **settings)


def _affine(op: IntOp, x: Any, w: Any, b: Any) -> Any:
    shape = [1] * x.ndim
    shape[op.attrs["axis"]] = -1
    return x * w.reshape(shape) + b.reshape(shape)


def _flat_pads(op: IntOp) -> list[int]:
    return [int(n) for pair in reversed(op.attrs["paddings"]) for n in pair]


def _spatial_pads(op: IntOp) -> list[int]:
    return [int(n) for pair in reversed(op.attrs["paddings"][2:]) for n in pair]


def _slice(op: IntOp, x: Any) -> Any:
    a = op.attrs
    key = [slice(b, e, s) for b, e, s in zip(a["begin"], a["end"], a["strides"], strict=True)]
    for axis in a.get("shrink", ()):
        key[axis] = a["begin"][axis]
    return x[tuple(key)]


def _resize(op: IntOp, x: Any, mode: str) -> Any:
    factors = op.attrs.get("scale_factor")
    to = {"scale_factor": tuple(factors)} if factors else {"size": tuple(op.attrs["size"])}
    corners = {} if mode == "nearest" else {"align_corners": bool(op.attrs.get("align_corners"))}
    return F.interpolate(x, mode=mode, **to, **corners)


def _max_pool(op: IntOp, x: Any) -> Any:
    settings = _chosen(op, "kernel_size", *WINDOW)
    return MAX_POOLS[op.attrs["rank"] - 1](x, ceil_mode=bool(op.attrs["ceil_mode"]), **settings)


def _softmax(op: IntOp, x: Any) -> Any:
    x = x * float(op.attrs.get("beta", 1.0))
    if "mask" in op.attrs:
        x = torch.where(torch.as_tensor(op.attrs["mask"]), x, float("-inf"))
    return torch.softmax(x, op.attrs["dim"])


def _average_pool(op: IntOp, x: Any) -> Any:
    return AVERAGE_POOLS[op.attrs["rank"] - 1](x, **_chosen(op, "kernel_size", "stride", "padding"))


# Op kind: the float function between DQ and Q, of (op, real inputs ..., kernel and bias if it has them).
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "conv2d": _conv,
    "conv2d_transpose": _transposed,
    "dense": lambda op, x, w, b: F.linear(x, w, b),
    "channel_affine": _affine,
    "add": lambda op, a, b: a + b,
    "sub": lambda op, a, b: a - b,
    "mul": lambda op, a, b: a * b,
    "batch_matmul": lambda op, a, b: torch.matmul(a, b),
    "mean": lambda op, x: x.mean(op.attrs["dim"], keepdim=op.attrs["keepdim"]),
    "sum": lambda op, x: x.sum(op.attrs["dim"], keepdim=op.attrs["keepdim"]),
    "softmax": _softmax,
    "relu": lambda op, x: torch.relu(x),
    "max_pool2d": _max_pool,
    "avg_pool2d": _average_pool,
    "concat": lambda op, *xs: torch.cat(xs, op.attrs["dim"]),
    "maximum": lambda op, a, b: torch.maximum(a, b),
    "minimum": lambda op, a, b: torch.minimum(a, b),
    "reduce_max": lambda op, x: x.amax(op.attrs["dim"], keepdim=op.attrs["keepdim"]),
    "reduce_min": lambda op, x: x.amin(op.attrs["dim"], keepdim=op.attrs["keepdim"]),
    "reshape": lambda op, x: x.reshape([-1 if s is None else int(s) for s in op.attrs["shape"]]),
    "transpose": lambda op, x: x.permute(op.attrs["dims"]),
    "pad": lambda op, x: F.pad(x, _flat_pads(op), value=float(op.attrs.get("value", 0.0))),
    "mirror_pad": lambda op, x: F.pad(x, _spatial_pads(op), mode="reflect"),
    "strided_slice": _slice,
    "gather": lambda op, x: x.index_select(op.attrs["dim"], torch.as_tensor(op.attrs["indices"])),
    "tile": lambda op, x: x.repeat(op.attrs["repeats"]),
    "resize_nearest": lambda op, x: _resize(op, x, "nearest"),
    "resize_bilinear": lambda op, x: _resize(op, x, LINEAR_MODES[x.ndim - 3]),
}


class QuantizedProgram(nn.Module):
    """Runs the ops one after another; `every` returns all their results, in order, instead of the model's outputs."""

    def __init__(self, model: IntegerModel, every: bool = False):
        super().__init__()
        self.model, self.every = model, every
        for op in model.ops:
            if op.kind not in (*FUNCTIONS, "table", "embedding", "quantize", "dequantize"):
                raise UnsupportedError(f"op {op.id!r}", "an op that has a Q/DQ form", op.kind, "Use export_torchscript")
        self.names: dict[str, str] = {}
        for index, op in enumerate(model.ops):
            self._hold(f"op{index}", op)
        for index, tensor in enumerate(model.tensors.values()):
            if tensor.constant is not None:
                self.names[tensor.id] = f"constant{index}"
                values = tensor.constant if tensor.affine is None else unsigned(tensor.constant)
                self.register_buffer(f"constant{index}", torch.from_numpy(np.asarray(values)))

    def _hold(self, name: str, op: IntOp) -> None:
        self.names[op.id] = name
        held: dict[str, np.ndarray] = {}
        if op.weight is not None:
            held = {"kernel": op.weight.codes, "scale": op.weight.scale, "bias": op.weight.bias.astype(np.float32)}
            held["zero"] = np.zeros(op.weight.scale.size, np.int64)
        elif op.table is not None:
            held = {"table": unsigned(op.table)}
            if op.attrs.get("offsets") is not None:
                shape = op.attrs["offsets"]
                held["start"] = 256 * np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        elif op.kind == "embedding":
            held = {"table": unsigned(op.attrs["constant"])}
        for role, values in held.items():
            self.register_buffer(f"{name}_{role}", torch.from_numpy(np.ascontiguousarray(values)))

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The outputs of the model, as one tensor or a tuple."""
        values = dict(zip(self.model.inputs, inputs, strict=True))
        for op in self.model.ops:
            values[op.outputs[0]] = self._run(op, values)
        if self.every:
            return tuple(values[op.outputs[0]] for op in self.model.ops)
        outputs = [values[t] for t in self.model.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _grid(self, tensor: str) -> tuple[float, int, int, int, torch.dtype]:
        affine = self.model.tensors[tensor].affine
        assert affine is not None
        low, high = affine.qmin + SHIFT_OF_CODES, affine.qmax + SHIFT_OF_CODES
        return float(affine.scale), affine.zero_point + SHIFT_OF_CODES, low, high, torch.uint8

    def _value(self, tensor: str, values: dict[str, Any]) -> Any:
        return values[tensor] if tensor in values else getattr(self, self.names[tensor])

    def _real(self, tensor: str, values: dict[str, Any]) -> Any:
        value = self._value(tensor, values)
        if self.model.tensors[tensor].affine is None:
            return value
        return QDQ.dequantize_per_tensor(value, *self._grid(tensor))

    def _part(self, op: IntOp, role: str) -> torch.Tensor:
        return getattr(self, f"{self.names[op.id]}_{role}")

    def _run(self, op: IntOp, values: dict[str, Any]) -> Any:
        if op.kind == "dequantize":
            return self._real(op.inputs[0], values)
        if op.kind == "quantize":
            return QDQ.quantize_per_tensor(values[op.inputs[0]], *self._grid(op.outputs[0]))
        if op.kind in ("table", "embedding"):
            return self._looked_up(op, self._value(op.inputs[0], values).to(torch.int64))
        real = FUNCTIONS[op.kind](op, *(self._real(t, values) for t in op.inputs), *self._weights(op))
        if self.model.tensors[op.outputs[0]].affine is None:
            return real  # ids
        if op.relu_max is not None:
            real = torch.clamp(real, 0.0, float(op.relu_max))
        elif op.relu and op.kind != "relu":
            real = torch.relu(real)
        return QDQ.quantize_per_tensor(real, *self._grid(op.outputs[0]))

    def _looked_up(self, op: IntOp, index: torch.Tensor) -> torch.Tensor:
        if op.kind == "table" and op.attrs.get("offsets") is not None:
            index = index + self._part(op, "start")
        return self._part(op, "table")[index]

    def _weights(self, op: IntOp) -> list[torch.Tensor]:
        if op.weight is None:
            return []
        kernel, scale = self._part(op, "kernel"), self._part(op, "scale")
        if op.kind == "conv2d_transpose" and op.attrs["groups"] > 1:  # (groups, in, out, *window): channels on two axes
            shape = (kernel.shape[0], 1, kernel.shape[2], *[1] * op.attrs["rank"])
            return [kernel.to(torch.float32) * scale.reshape(shape), self._part(op, "bias")]
        axis = 1 if op.kind == "conv2d_transpose" else 0
        real = QDQ.dequantize_per_channel(kernel, scale, self._part(op, "zero"), axis, -127, 127, torch.int8)
        return [real, self._part(op, "bias")]
