"""What a full run of random models must have held: each table row, bit width and quantizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

FULL = 200  # from this many models on, everything must have occurred
LEAST = 5  # models that hold it
# Random weights and six samples of calibration make ranges that no kernel can hold (an output of a hundredth of one
# step of its bias): such a model must be refused by the name of the tensor. More than these would be a fault of ours.
MOST_REFUSED = 0.02


def wanted(rows: Iterable[str]) -> list[tuple[str, str | int]]:
    """What is asked for, for the rows that a front end can have."""
    bits = [(what, b) for what in ("weight bits", "activation bits") for b in range(1, 9)]
    return [*(("row", kind) for kind in rows), *bits, *(("quantizer", q) for q in ("qat", "naive", "dorefa"))]


def check_occurred(seen: Counter, rows: Iterable[str]) -> None:
    """Assert that each occurred in at least `LEAST` models, and that no exporter refused more than a few."""
    refused = {key: count for key, count in seen.items() if key[0] == "refused"}  # by each backend that there is
    assert all(count <= MOST_REFUSED * seen["models"] for count in refused.values()), refused
    assert {what: seen[what] for what in wanted(rows) if seen[what] < LEAST} == {}
