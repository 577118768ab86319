"""Padding with a number other than zero: the range of what is padded has to hold it.

A number below the range is cut off to its lower end. Where maxima alone read the result, that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kquant.core.affine import Affine
from kquant.core.errors import RangeError
from kquant.core.graph import Op

_PASSING = ("identity", "fake_quant")
# How graphs with their channels last, and torch's, call the same; and the first axis that a pool slides along.
_REDUCED = ("axes", "dim")
_POOLED = {"pool": 1, "kernel_size": 2}

Consumers = Mapping[str, list[tuple[Op, int]]]


def filler(op: Op, consumers: Consumers) -> float | None:
    """The number that a padding writes and that its readers tell from others; None for another op, or for zero.

    Args:
        op: any op.
        consumers: of the graph's tensors.
    """
    value = float(op.attrs.get("value", 0.0)) if op.kind == "pad" else 0.0
    return None if value == 0.0 or (value < 0.0 and _only_maxima_read(op, op.output, consumers)) else value


def check_filler(value: float | None, affine: Affine, name: str) -> None:
    """Refuse a number that the grid cannot hold, which would be another one in the artifact.

    Args:
        value: as `filler` found it.
        affine: the grid of what is padded.
        name: the padded tensor, for the error.

    Raises:
        RangeError: a number more than half a step beyond the grid.
    """
    if value is None or not np.any(affine.beyond(value)):
        return
    low, high = affine.limits()
    raise RangeError(
        f"tensor {name!r}",
        f"a padding with a number in the range of what it pads, [{low:.6g}, {high:.6g}]",
        f"{value:.6g}",
        "Calibrate with observer='minmax', whose range holds it; or pad with a number that is in the range",
    )


def _only_maxima_read(op: Op, tensor: str, consumers: Consumers) -> bool:
    """Whether whatever reads a padded tensor takes the maximum of something that is not padding."""
    readers = [reader for reader, _ in consumers[tensor]]
    return bool(readers) and all(
        _only_maxima_read(op, reader.output, consumers) if reader.kind in _PASSING else _sees_more(op, reader)
        for reader in readers
    )


def _sees_more(op: Op, reader: Op) -> bool:
    """Whether every maximum that an op takes has more than the padding in it."""
    pads = {axis: max(pair) for axis, pair in enumerate(op.attrs["paddings"]) if any(pair)}
    if reader.kind == "reduce_max":
        return set(pads) <= set(_setting(reader, _REDUCED))
    windows = _windows(reader) if reader.kind == "max_pool2d" else {}
    return all(width < windows.get(axis, 0) for axis, width in pads.items())


def _windows(pool: Op) -> dict[int, int]:
    """The window of a pool by axis."""
    (first,) = (start for name, start in _POOLED.items() if name in pool.attrs)
    return dict(enumerate(_setting(pool, tuple(_POOLED)), first))


def _setting(op: Op, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(next(op.attrs[n] for n in names if n in op.attrs))
