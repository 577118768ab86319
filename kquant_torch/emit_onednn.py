"""TorchScript for oneDNN's kernels: plain uint8 tensors in and out, weights prepacked when the file is loaded.

On images of one shape, an identity depthwise kernel takes one operand of a sum and adds the other, its accumulator,
before it rounds: no temporary is larger than the codes. Any other sum, or a clamp that it lacks, is integer arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.integer import IntOp
from kquant_torch.emit import Emitter, literal
from kquant_torch.emit_add import add_codes
from kquant_torch.emit_linear import arrays, kernel_shape, needs_clamp

NO_SCALARS = "annotate(List[Optional[number]], [])"
# Their outputs are new and lie in memory channels_last, so that a last reader may write into them.
FRESH = frozenset({"conv2d", "conv2d_transpose", "avg_pool2d", "add", "sub"})


def post_op(e: Emitter, op: IntOp) -> list[str]:
    """The kernel's fused activation `attr, scalars`: what its own saturation to uint8 does not do."""
    (low, high), (scale, zero_point) = e.bounds(op), e.grid(op.outputs[0])
    limits: list[float] = []
    name = "none"
    if needs_clamp(e, op):
        name, limits = "hardtanh", [(low - zero_point) * scale, (high - zero_point) * scale]
    elif low > 0:
        name = "relu"
    return [literal(name), f"annotate(List[Optional[number]], {literal(limits)})"]


def _arrays(e: Emitter, op: IntOp, codes: np.ndarray) -> tuple[str, list[str]]:
    """A kernel's codes, and the arguments scale, zero point and bias that go with them."""
    kernel, scale, bias = arrays(e, op, codes)
    return kernel, [scale, e.zero(), bias]


def convolution(
    e: Emitter, op: IntOp, source: list[str], codes: np.ndarray, stride: Any, padding: Any, dilation: Any, groups: int,
    shape: list[int] | None = None,
) -> str:  # fmt: skip
    """One convolution kernel over `source` (value, scale, zero point).

    The kernel is packed for inputs of `shape`, which decides the layout of its blocks: in another layout, 34 of the 53
    convolutions of a ResNet-50 would be brought into theirs at each call, which takes twelve times as long as they do.
    """
    kernel, rest = _arrays(e, op, codes)
    shape = kernel_shape(e, op) if shape is None else shape
    window = [literal(list(v)) for v in (stride, padding, dilation)] + [literal(groups)]
    prepack = ", ".join([kernel, rest[0], *source[1:], *window, literal(shape)])
    made = e.pack(f"{op.id}/packed", f"ops.onednn.qconv_prepack({prepack})")
    # Only the kernel of two spatial axes and no sum has a clamp, and that of three not even a ReLU; on codes a clamp
    # gives the same.
    apart = needs_clamp(e, op) and (codes.ndim != 4 or len(op.inputs) > 1)
    apart = apart or (codes.ndim == 5 and e.bounds(op)[0] > 0)
    if len(op.inputs) > 1:
        made = accumulating(e, op, source, [made, *rest], window, op.inputs[1])
    else:
        target = list(map(literal, e.grid(op.outputs[0])))
        fused = ['"none"', NO_SCALARS] if apart else post_op(e, op)
        made = f'ops.onednn.qconv_pointwise({", ".join([*source, made, *rest, *window, *target, "0", *fused])}, "")'
    return f"torch.clamp({made}, {', '.join(map(literal, e.bounds(op)))})" if apart else made


def accumulating(
    e: Emitter, op: IntOp, source: list[str], kernel: list[str], window: list[str], accum: str
) -> str:  # fmt: skip
    """A convolution that adds another tensor, which it overwrites, before it rounds.

    Args:
        e, op: as everywhere.
        source: value, scale and zero point of its input.
        kernel: packed kernel, scale, zero point and bias.
        window: stride, padding, dilation and groups.
        accum: the tensor that is added.
    """
    held = e.name(accum) if _may_overwrite(e, accum) else f"torch.clone({e.name(accum)}, memory_format=2)"
    target = list(map(literal, e.grid(op.outputs[0])))
    (low, _), zero_point = e.bounds(op), e.grid(op.outputs[0])[1]
    relu = literal("relu") if 0 < low == zero_point else "None"
    arguments = [
        *source, *kernel[:3], held, kernel[3], *window, *target, "0", *map(literal, e.grid(accum)), '"sum"', "1.0",
        relu, NO_SCALARS, '""',
    ]  # fmt: skip
    return f"ops.onednn.qconv2d_pointwise({', '.join(arguments)})"


def dense(e: Emitter, op: IntOp) -> str:
    """A linear layer."""
    assert op.weight is not None
    kernel, rest = _arrays(e, op, op.weight.codes)
    made = e.pack(f"{op.id}/packed", f"ops.onednn.qlinear_prepack({kernel}, None)")
    target = list(map(literal, e.grid(op.outputs[0])))
    arguments = [*e.read(op.inputs[0]), made, *rest, *target, "0", *post_op(e, op), '""']
    return f"ops.onednn.qlinear_pointwise({', '.join(arguments)})"


def channel_affine(e: Emitter, op: IntOp) -> str:
    """One factor per channel along any axis: a depthwise kernel over an image of one row."""
    assert op.weight is not None
    codes, source, channels = op.weight.codes.reshape(-1, 1, 1, 1), e.read(op.inputs[0]), op.weight.codes.size
    kernel, rest = _arrays(e, op, codes)
    prepack = ", ".join([kernel, rest[0], *source[1:], "[1, 1], [0, 0], [1, 1]", literal(channels)])
    made = e.pack(f"{op.id}/packed", f"ops.onednn.qconv_prepack({prepack})")
    grid = e.grid(op.outputs[0])
    return e.call("channel_affine", *source, made, *rest, *grid, *post_op(e, op), op.attrs["axis"])


def add(e: Emitter, op: IntOp) -> str:
    """A sum or a difference of two tensors."""
    return _by_kernel(e, op) if _has_kernel(e, op) else add_codes(e, op)


def _has_kernel(e: Emitter, op: IntOp) -> bool:
    """Two different images of one shape, and no clamp but a ReLU's or the kernel's own saturation."""
    a, b = (e.model.tensors[t] for t in op.inputs)
    return not needs_clamp(e, op) and a.id != b.id and a.shape == b.shape and len(a.shape) == 4


def _may_overwrite(e: Emitter, tensor: str) -> bool:
    """Whether nobody else reads a tensor that a kernel has just made."""
    producer = e.producers.get(tensor)
    if e.readers[tensor] != 1 or producer is None or producer.kind not in FRESH:
        return False
    return producer.kind not in ("add", "sub") or _has_kernel(e, producer)


def _by_kernel(e: Emitter, op: IntOp) -> str:
    a, b = op.inputs
    if op.kind == "sub":  # a + (-1) * b
        source, accum, code = b, a, -1
    else:  # a source with zero point 0 spares the kernel a correction, so it comes first among equals
        source, accum = sorted(op.inputs, key=lambda t: (_may_overwrite(e, t), e.grid(t)[1] != 0))
        code = 1
    channels = int(e.model.tensors[source].shape[1])
    kernel, scale = identity(e, channels, code)
    window = ["[1, 1]", "[0, 0]", "[1, 1]", literal(channels)]
    return accumulating(e, op, e.read(source), [kernel, scale, "self.zero", "None"], window, accum)


def identity(e: Emitter, channels: int, code: int) -> tuple[str, ...]:
    """A packed depthwise kernel of one code, and its scales; one for each number of channels."""
    if (channels, code) not in e.identities:
        name = f"{'identity' if code == 1 else 'negation'}_{channels}"
        kernel = e.array(f"{name}_kernel", np.full((channels, 1, 1, 1), code, np.int8))
        scale = e.array(f"{name}_scale", np.ones(channels, np.float32))
        e.zero()
        prepack = f"{kernel}, {scale}, 1.0, 0, [1, 1], [0, 0], [1, 1], {channels}"
        e.identities[channels, code] = e.pack(f"{name}_packed", f"ops.onednn.qconv_prepack({prepack})"), scale
    return e.identities[channels, code]
