"""TorchScript for sums, differences and products of two tensors, or of a tensor and the codes of a constant.

Two tensors go to the backend's kernel, where it has one; everything else is integer arithmetic.
"""

from __future__ import annotations

from kquant.core.integer import IntOp
from kquant_torch.emit import Emitter, shift_for, writes


def _has_constant(e: Emitter, op: IntOp) -> bool:
    return any(e.model.tensors[t].constant is not None for t in op.inputs)


@writes("add", "sub")
def _add(e: Emitter, op: IntOp) -> str:
    return add_codes(e, op) if _has_constant(e, op) else e.backend.add(e, op)


def add_codes(e: Emitter, op: IntOp) -> str:
    """A sum or a difference in integer arithmetic."""
    a, b = op.inputs
    target = e.grid(op.outputs[0])
    # Both products and the zero point stay below 2^28 each, so their sum is an int32.
    shift = shift_for(max(e.grid(a)[0], e.grid(b)[0]) / target[0], 20, 19, op.outputs[0])
    sign = -1 if op.kind == "sub" else 1
    return e.call("add", *e.read(a), *e.read(b), *target, *e.bounds(op), sign, shift)


@writes("mul")
def _mul(e: Emitter, op: IntOp) -> str:
    return mul_codes(e, op) if _has_constant(e, op) else e.backend.mul(e, op)


def mul_codes(e: Emitter, op: IntOp) -> str:
    """A product in integer arithmetic."""
    a, b = op.inputs
    target = e.grid(op.outputs[0])
    shift = shift_for(e.grid(a)[0] * e.grid(b)[0] / target[0], 14, 21, op.outputs[0])
    return e.call("mul", *e.read(a), *e.read(b), *target, *e.bounds(op), shift)
