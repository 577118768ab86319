"""TorchScript for sums, differences and products of two tensors, or of a tensor and a constant.

On images of one shape, an identity depthwise kernel takes one operand and adds the other, its accumulator, before it
rounds: no temporary is larger than the codes. Anything else, and a clamp that this kernel lacks, is integer arithmetic.
"""

from __future__ import annotations

import numpy as np

from kquant.core.integer import IntOp
from kquant_torch.emit import Emitter, literal, shift_for, writes

# Their outputs are new and lie in memory channels_last, so that a last reader may write into them.
FRESH = frozenset({"conv2d", "conv2d_transpose", "avg_pool2d", "add", "sub"})


@writes("add", "sub")
def _add(e: Emitter, op: IntOp) -> str:
    if any(e.model.tensors[t].constant is not None for t in op.inputs):
        return _with_constant(e, op)
    return _by_kernel(e, op) if _has_kernel(e, op) else _by_arithmetic(e, op)


def _has_kernel(e: Emitter, op: IntOp) -> bool:
    """Two different images of one shape, and no clamp but a ReLU's or the kernel's own saturation."""
    a, b = (e.model.tensors[t] for t in op.inputs)
    low, high = e.bounds(op)
    plain = high == 255 and low in (0, e.grid(op.outputs[0])[1])
    return plain and a.id != b.id and a.shape == b.shape and len(a.shape) == 4


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
    held = e.name(accum) if _may_overwrite(e, accum) else f"torch.clone({e.name(accum)}, memory_format=2)"
    channels = int(e.model.tensors[source].shape[1])
    kernel, scale = identity(e, channels, code)
    target = list(map(literal, e.grid(op.outputs[0])))
    relu = literal("relu") if op.relu and e.grid(op.outputs[0])[1] > 0 else "None"
    window = ["[1, 1]", "[0, 0]", "[1, 1]", literal(channels)]
    arguments = [
        *e.read(source), kernel, scale, "self.zero", held, "None", *window, *target, "0",
        *map(literal, e.grid(accum)), '"sum"', "1.0", relu, "annotate(List[Optional[number]], [])", '""',
    ]  # fmt: skip
    return f"ops.onednn.qconv2d_pointwise({', '.join(arguments)})"


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


def _by_arithmetic(e: Emitter, op: IntOp) -> str:
    a, b = op.inputs
    target = e.grid(op.outputs[0])
    # Both products and the zero point stay below 2^28 each, so their sum is an int32.
    shift = shift_for(max(e.grid(a)[0], e.grid(b)[0]) / target[0], 20, 19, op.outputs[0])
    sign = -1 if op.kind == "sub" else 1
    return e.call("add", *e.read(a), *e.read(b), *target, *e.bounds(op), sign, shift)


def constant_of(e: Emitter, op: IntOp) -> tuple[str, np.ndarray, int]:
    """The tensor among two operands, the real values of the other, and the constant's place."""
    at = next(i for i, t in enumerate(op.inputs) if e.model.tensors[t].constant is not None)
    value = e.model.tensors[op.inputs[at]].constant
    assert value is not None
    return op.inputs[1 - at], np.asarray(value, np.float64), at


def _with_constant(e: Emitter, op: IntOp) -> str:
    """The constant is held in fractions of an output code, so it is as exact as the factors are."""
    source, value, at = constant_of(e, op)
    target = e.grid(op.outputs[0])
    steps = value / target[0]
    largest = max(e.grid(source)[0] / target[0], float(np.abs(steps).max(initial=0.0)) / 255)
    shift = shift_for(largest, 20, 19, op.outputs[0])
    signs = {"add": (1, 1), "sub": ((-1, 1) if at == 0 else (1, -1))}[op.kind]
    units = np.round(signs[1] * steps * 2.0**shift).astype(np.int32)
    return e.call(
        "add_constant", *e.read(source), e.array(f"{op.id}/constant", units), *target, *e.bounds(op), signs[0], shift
    )


@writes("mul")
def _mul(e: Emitter, op: IntOp) -> str:
    target = e.grid(op.outputs[0])
    if any(e.model.tensors[t].constant is not None for t in op.inputs):
        source, value, _ = constant_of(e, op)
        ratios = value * e.grid(source)[0] / target[0]
        shift = shift_for(max(float(np.abs(ratios).max(initial=0.0)), 2.0**-30), 21, 21, op.outputs[0])
        units = np.round(ratios * 2.0**shift).astype(np.int32)
        factor = e.array(f"{op.id}/factor", units)
        return e.call("mul_constant", *e.read(source), factor, *target, *e.bounds(op), shift)
    a, b = op.inputs
    shift = shift_for(e.grid(a)[0] * e.grid(b)[0] / target[0], 14, 21, op.outputs[0])
    return e.call("mul", *e.read(a), *e.read(b), *target, *e.bounds(op), shift)
