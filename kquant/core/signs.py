"""Which tensors are never negative, by what computes them."""

from __future__ import annotations

from collections.abc import Collection

from kquant.core.int8_spec import Placement
from kquant.core.stages import Stage

NON_NEGATIVE = frozenset({"relu", "softplus", "hard_sigmoid", "exponential", "squareplus", "abs", "sqrt", "rsqrt"})
NON_NEGATIVE |= {f"keras.ops.{name}" for name in ("Abs", "Square", "Exp", "Softplus", "HardSigmoid", "Sqrt")}


def is_nonneg(stage: Stage, nonneg: Collection[str]) -> bool:
    """Whether the outputs of a stage are never negative, given the tensors before it that are not.

    Args:
        stage: the stage.
        nonneg: tensors that are never negative.
    """
    op, row = stage.anchor, stage.row
    through = row.placement is Placement.SHARED and all(t in nonneg for t in op.inputs)
    through = through and op.attrs.get("value", 0.0) >= 0.0  # of a padding
    own = op.attrs.get("fn") in NON_NEGATIVE or row.nonneg or op.kind == "relu" or stage.relu is not None
    square = op.kind == "mul" and len(set(op.inputs)) < len(op.inputs)
    kept = op.kind in ("add", "mul", "mean", "sum") and all(t in nonneg for t in op.inputs)
    return own or through or square or kept
