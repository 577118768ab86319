"""A row per number: what was measured, its bar, and whether it is met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ROUNDING = 1e-9  # of a value that is on its bar, as a mean of counts of samples can be


@dataclass(frozen=True)
class Row:
    """One number beside its bar.

    Args:
        name: what was measured.
        value: the measurement.
        bar: what it must reach, or None for a row that only informs.
        at_most: whether the bar is an upper limit.
        unit: printed behind the value.
        detail: interval, spread, or the figures that the value comes from.
    """

    name: str
    value: float
    bar: float | None = None
    at_most: bool = True
    unit: str = ""
    detail: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.bar is None:
            return None
        return bool(self.value <= self.bar + ROUNDING if self.at_most else self.value >= self.bar - ROUNDING)

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"{'≤' if self.at_most else '≥'} {self.bar:g}{self.unit}"
        verdict = {True: "pass", False: "FAIL", None: ""}[self.passed]
        return f"{self.name:<52} {self.value:>9.3f}{self.unit:<2} {bar:>9}  {verdict:<4}  {self.detail}".rstrip()


def show(rows: Iterable[Row]) -> list[Row]:
    """Prints rows as they come, and returns them."""
    kept = []
    for row in rows:
        print(row, flush=True)
        kept.append(row)
    return kept
