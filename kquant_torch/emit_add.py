"""TorchScript for sums, differences and products of two tensors, or of a tensor and a constant.

Two tensors go to the backend's kernel, where it has one; everything else is integer arithmetic.
"""

from __future__ import annotations

import numpy as np

from kquant.core.integer import IntOp
from kquant_torch.emit import Emitter, shift_for, writes


@writes("add", "sub")
def _add(e: Emitter, op: IntOp) -> str:
    if any(e.model.tensors[t].constant is not None for t in op.inputs):
        return _with_constant(e, op)
    return e.backend.add(e, op)


def add_codes(e: Emitter, op: IntOp) -> str:
    """A sum or a difference in integer arithmetic."""
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
    return e.backend.mul(e, op)


def mul_codes(e: Emitter, op: IntOp) -> str:
    """A product in integer arithmetic."""
    a, b = op.inputs
    target = e.grid(op.outputs[0])
    shift = shift_for(e.grid(a)[0] * e.grid(b)[0] / target[0], 14, 21, op.outputs[0])
    return e.call("mul", *e.read(a), *e.read(b), *target, *e.bounds(op), shift)
