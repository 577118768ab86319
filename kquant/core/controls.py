"""What the controls of training share in all front ends: which parts they act on, and batch norm re-estimation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from kquant.core.calibration import batches as feeds_of
from kquant.core.errors import ConfigError, ModelError, some
from kquant.core.graph import Graph, Op, walk


@dataclass(frozen=True)
class Controlled:
    """What the controls of a quantized model act on.

    Args:
        name: of the model.
        ranges: the activation ranges that move. Each has a `name`, `is_set()` and `set_frozen(value)`.
        batch_norms: in a fixed order. Each has `set_frozen(value)`, `set_statistics(mean, variance)` and
            `affine_of(mean, variance) -> (scale, offset)`; the op that `read` makes of it holds one that is equal to it
            as `attrs["batch_norm"]`.
        beyond: names of batch norms that the controls do not reach.
    """

    name: str
    ranges: Sequence[Any]
    batch_norms: Sequence[Any]
    beyond: Sequence[str] = ()


def set_frozen(parts: Sequence[Any], value: float) -> int:
    """Let parts stand still (1) or move (0); returns how many there are."""
    for part in parts:
        part.set_frozen(value)
    return len(parts)


def reached_batch_norms(found: Controlled) -> Sequence[Any]:
    """The batch norms that the controls act on; a warning names those that they do not reach."""
    if found.beyond:
        warnings.warn(
            f"The controls do not reach {len(found.beyond)} batch norms: {some(found.beyond)}. They go on "
            "as they are, because their moving averages cannot be told from their other arrays.",
            stacklevel=3,
        )
    return found.batch_norms


def freeze_ranges(found: Controlled) -> int:
    """Let all ranges stand still; returns how many there are.

    Raises:
        ModelError: ranges that no data has set yet.
    """
    unset = [part.name for part in found.ranges if not part.is_set()]
    if unset:
        fix = "Pass calibration_data= when you quantize the model, or train at least one step"
        raise ModelError(f"model {found.name!r}", "ranges set by data before they are frozen", unset[:5], fix)
    return set_frozen(found.ranges, 1.0)


@dataclass
class Statistics:
    """The average over batches of a layer's batch mean and variance, float64, weighted by the samples of a batch."""

    mean: Any = 0.0
    variance: Any = 0.0
    samples: int = field(default=0)

    def normalize(self, norm: Any, x: np.ndarray, axis: int) -> np.ndarray:
        """Take in one batch with its channels on `axis`, and return the layer's output with that batch's statistics."""
        wide = np.moveaxis(np.asarray(x, np.float64), axis, -1)
        axes = tuple(range(wide.ndim - 1))
        mean, variance = wide.mean(axes), wide.var(axes)
        self.samples += len(wide)
        self.mean += (mean - self.mean) * (len(wide) / self.samples)
        self.variance += (variance - self.variance) * (len(wide) / self.samples)
        scale, offset = norm.affine_of(mean, variance)
        return np.moveaxis((wide * scale + offset).astype(np.float32), -1, axis)


def estimated_statistics(graph: Graph, data: Any, batches: int | None) -> dict[Any, Statistics]:
    """The exact average statistics of all batch norms over batches of data, by the op's `batch_norm`.

    Args:
        graph: a quantized model that was read; each batch norm normalizes by the batch, so that those behind see it.
        data: samples or batches, as for calibration.
        batches: use this many batches at most; None for all.

    Raises:
        CalibrationError: data that does not fit the model, or without a batch.
        ConfigError: `batches` that is not a positive integer.
    """
    if batches is not None and (not isinstance(batches, int) or isinstance(batches, bool) or batches < 1):
        raise ConfigError(
            "batches",
            "a positive number of batches, or None for all",
            repr(batches),
            "Pass batches=None for all of the data",
        )
    found: dict[Any, Statistics] = {}

    def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
        norm = op.attrs.get("batch_norm")
        if norm is None:
            return None
        of_norm = found.setdefault(norm, Statistics())
        return [of_norm.normalize(norm, np.asarray(inputs[0]), op.attrs.get("axis", -1))]

    for feeds in islice(feeds_of(data, graph), batches):
        walk(graph, feeds, visit)
    return found
