"""Which tensors share a range, and what they ask of it, while a plan is being made."""

from __future__ import annotations

from dataclasses import dataclass, replace

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


class Classes:
    """The tensors that have a range, in classes of those that share one (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._needs: dict[str, Need] = {}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._parent

    def root(self, tensor: str) -> str:
        """The tensor that stands for the class of this one."""
        while self._parent[tensor] != tensor:
            tensor = self._parent[tensor]
        return tensor

    def need(self, tensor: str) -> Need:
        """What the tensor's class asks of its range."""
        return self._needs[self.root(tensor)]

    def add(self, tensor: str, need: Need) -> None:
        """Give a tensor a range of its own."""
        self._parent[tensor] = tensor
        self._needs[tensor] = need

    def change(self, tensor: str, need: Need) -> None:
        """Let the tensor's class ask for something else."""
        self._needs[self.root(tensor)] = need

    def join(self, tensor: str, other: str) -> None:
        """Make one class of two, which keeps to zero only if both do, and starts when the later of them does."""
        a, b = self.root(tensor), self.root(other)
        if a != b:
            one, two = self._needs[a], self._needs.pop(b)
            self._parent[b] = a
            starts = max(one.start_step, two.start_step)
            self._needs[a] = replace(one, nonneg=one.nonneg and two.nonneg, start_step=starts)
