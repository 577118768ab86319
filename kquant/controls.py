"""What a user controls while a quantized model trains: ranges, batch norm statistics, and when each stands still.

Everything goes through state variables of the model, so a compiled train function notices without being rebuilt, and
the state is saved with the model. The rules stand here; a front end only says what they act on (`Controlled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from kquant.core.calibration import batches as feeds_of
from kquant.core.errors import ConfigError, ModelError
from kquant.core.graph import Op, walk


@dataclass(frozen=True)
class Controlled:
    """What the controls of a quantized model act on.

    Args:
        name: of the model.
        ranges: the activation ranges that move. Each has a `name`, `is_set()` and `set_frozen(value)`.
        batch_norms: in a fixed order. Each has `set_frozen(value)`, `set_statistics(mean, variance)` and
            `affine(mean, variance) -> (scale, offset)`; the op that `read` makes of it holds one that is equal to it as
            `attrs["batch_norm"]`.
    """

    name: str
    ranges: Sequence[Any]
    batch_norms: Sequence[Any]


def controlled(qmodel: Any) -> Controlled:
    """What the controls of a quantized model act on.

    Raises:
        ModelError: not a model that kquant reads, or one without quantizers.
    """
    from kquant.api import front_end

    found: Controlled | None = front_end(qmodel).controlled(qmodel)
    if found is None:
        fix = "Call kquant.quantize_model(model) first, and hand its result in"
        raise ModelError(f"model {qmodel.name!r}", "a quantized model", "a model without quantizers", fix)
    return found


def _set_frozen(parts: Sequence[Any], value: float) -> int:
    for part in parts:
        part.set_frozen(value)
    return len(parts)


def freeze_observers(qmodel: Any) -> int:
    """Let the activation ranges stand still while training goes on. The state is saved with the model.

    Args:
        qmodel: a quantized model; float layers in it are not touched.

    Returns:
        The number of ranges that stand still now.

    Raises:
        ModelError: a model without quantizers, or one with ranges that no data has set yet.

    Example:
        >>> import keras, kquant
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> qmodel = kquant.quantize_model(model, calibration_data=np.ones((8, 4), np.float32))
        >>> kquant.freeze_observers(qmodel)
        2
    """
    found = controlled(qmodel)
    unset = [part.name for part in found.ranges if not part.is_set()]
    if unset:
        fix = "Pass calibration_data= to quantize_model, or train at least one step"
        raise ModelError(f"model {found.name!r}", "ranges set by data before they are frozen", unset[:5], fix)
    return _set_frozen(found.ranges, 1.0)


def unfreeze_observers(qmodel: Any) -> int:
    """Undo `freeze_observers`: the ranges move with the training batches again.

    Returns:
        The number of ranges that move now.

    Raises:
        ModelError: a model without quantizers.
    """
    return _set_frozen(controlled(qmodel).ranges, 0.0)


def freeze_batch_norm(qmodel: Any) -> int:
    """Train on with the moving statistics: a training step then normalizes as the exported model does.

    The trainable scale and offset keep training. The state is saved with the model.

    Args:
        qmodel: a quantized model. Batch norm layers inside a part that was left opaque keep their own behaviour.

    Returns:
        The number of batch norm layers whose statistics stand still now.

    Raises:
        ModelError: a model without quantizers.

    Source: Krishnamoorthi 2018 (arXiv:1806.08342), batch norm freezing.
    """
    return _set_frozen(controlled(qmodel).batch_norms, 1.0)


def unfreeze_batch_norm(qmodel: Any) -> int:
    """Undo `freeze_batch_norm`: training steps normalize by their batch and move the statistics again.

    Returns:
        The number of batch norm layers whose statistics move now.

    Raises:
        ModelError: a model without quantizers.
    """
    return _set_frozen(controlled(qmodel).batch_norms, 0.0)


# -- re-estimation --------------------------------------------------------------------------------------------------


@dataclass
class _Statistics:
    """The average over batches of a layer's batch mean and variance, float64, weighted by the samples of a batch."""

    mean: Any = 0.0
    variance: Any = 0.0
    samples: int = field(default=0)

    def normalize(self, norm: Any, x: np.ndarray) -> np.ndarray:
        """Take in one batch (channels last) and return the layer's output with the statistics of that batch."""
        wide = np.asarray(x, np.float64)
        axes = tuple(range(wide.ndim - 1))
        mean, variance = wide.mean(axes), wide.var(axes)
        self.samples += len(wide)
        self.mean += (mean - self.mean) * (len(wide) / self.samples)
        self.variance += (variance - self.variance) * (len(wide) / self.samples)
        scale, offset = norm.affine(mean, variance)
        normalized: np.ndarray = (wide * scale + offset).astype(np.float32)
        return normalized


def reestimate_batch_norm(qmodel: Any, data: Any, batches: int | None = None) -> int:
    """Set the moving statistics of all batch norms to their exact average over batches of data.

    One pass over the data. Weights and activations are quantized as in inference, with the ranges as they are, and
    dropout is off; only batch norm normalizes by the batch, as it does in training, so that each layer sees the effect
    of those before it. Batches count by their number of samples. Nothing else changes, frozen statistics are set too,
    and a compiled train function needs no rebuild. The model is not changed if the data is refused.

    Args:
        qmodel: a quantized model.
        data: samples or batches, as `calibration_data` of `quantize_model`. Batches as large as those of training give
            statistics as in training; an array is cut into batches of 32.
        batches: use this many batches at most; None for all.

    Returns:
        The number of batch norm layers that were set.

    Raises:
        ModelError: a model without quantizers.
        CalibrationError: data that does not fit the model, or without a batch.
        ConfigError: `batches` that is not a positive integer.

    Source: Nagel et al. 2022 (arXiv:2203.11086) for quantized training; the pass is that of stochastic weight
    averaging, Izmailov et al. 2018 (arXiv:1803.05407).
    """
    if batches is not None and (not isinstance(batches, int) or isinstance(batches, bool) or batches < 1):
        raise ConfigError("batches", "a positive number of batches, or None for all", repr(batches))
    from kquant.api import front_end

    front, targets = front_end(qmodel), controlled(qmodel).batch_norms
    exact = front.as_float32(qmodel)
    found: dict[Any, _Statistics] = {}

    def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
        norm = op.attrs.get("batch_norm")
        if norm is None:
            return None
        return [found.setdefault(norm, _Statistics()).normalize(norm, np.asarray(inputs[0]))]

    graph = front.read(exact)
    for feeds in islice(feeds_of(data, graph), batches):
        walk(graph, feeds, visit)
    for target, source in zip(targets, controlled(exact).batch_norms, strict=True):
        target.set_statistics(found[source].mean, found[source].variance)
    return len(targets)
