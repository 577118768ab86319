"""What tensors ask of the range that they share, while a plan is being made."""

from __future__ import annotations

from dataclasses import dataclass

from kquant.core.affine import Affine


@dataclass(frozen=True)
class Need:
    """What a class of joined tensors asks of its range."""

    bits: int
    fixed: Affine | None = None
    unit: bool = False
    symmetric: bool = False
    nonneg: bool = False
    start_step: int = 0
    naive: bool = False

    def joins(self, other: Need) -> bool:
        """Whether two classes can share one range."""
        same = (self.bits, self.unit, self.symmetric) == (other.bits, other.unit, other.symmetric)
        return same and self.fixed == other.fixed
