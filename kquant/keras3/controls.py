"""What a user controls while a quantized Keras model trains: ranges, batch norm statistics, and when each stands still.

Everything goes through state variables of the layers, so a compiled train function notices without being rebuilt, and
the state is saved with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import keras
import numpy as np

from kquant.core.calibration import batches as feeds_of
from kquant.core.errors import ConfigError, ModelError
from kquant.core.graph import Op, walk
from kquant.keras3.layers import FakeQuantize, QuantizedLayer
from kquant.keras3.norms import BatchNormalization
from kquant.keras3.precision import as_float32
from kquant.keras3.read import read

UNITS = ("epochs", "steps")


def _layers(qmodel: Any) -> list[Any]:
    """All layers of a quantized model, at any depth.

    Raises:
        ModelError: not a Keras 3 model, or one without quantizers.
    """
    if not isinstance(qmodel, keras.Model):
        raise ModelError("model", "a quantized keras.Model", type(qmodel).__name__)
    layers = list(qmodel._flatten_layers(include_self=False))
    if not any(isinstance(layer, (FakeQuantize, QuantizedLayer)) for layer in layers):
        fix = "Call kquant.quantize_model(model) first, and hand its result in"
        raise ModelError(f"model {qmodel.name!r}", "a quantized model", "a model without quantizers", fix)
    return layers


def _set_frozen(layers: list[Any], value: float) -> int:
    for layer in layers:
        layer.frozen.assign(value)
    return len(layers)


def _moving_ranges(qmodel: Any) -> list[Any]:
    return [layer for layer in _layers(qmodel) if isinstance(layer, FakeQuantize) and layer.fixed is None]


def _batch_norms(qmodel: Any) -> list[Any]:
    return [layer for layer in _layers(qmodel) if isinstance(layer, BatchNormalization)]


def freeze_observers(qmodel: Any) -> int:
    """Let the activation ranges stand still while training goes on. The state is saved with the model.

    Args:
        qmodel: a quantized model; float layers in it are not touched.

    Returns:
        The number of ranges that stand still now.

    Raises:
        ModelError: a model without quantizers, or one with ranges that no data has set yet.

    Example:
        >>> import kquant
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> qmodel = kquant.quantize_model(model, calibration_data=np.ones((8, 4), np.float32))
        >>> kquant.freeze_observers(qmodel)
        2
    """
    ranges = _moving_ranges(qmodel)
    unset = [layer.name for layer in ranges if not layer.is_set()]
    if unset:
        fix = "Pass calibration_data= to quantize_model, or train at least one step"
        raise ModelError(f"model {qmodel.name!r}", "ranges set by data before they are frozen", unset[:5], fix)
    return _set_frozen(ranges, 1.0)


def unfreeze_observers(qmodel: Any) -> int:
    """Undo `freeze_observers`: the ranges move with the training batches again.

    Returns:
        The number of ranges that move now.

    Raises:
        ModelError: a model without quantizers.
    """
    return _set_frozen(_moving_ranges(qmodel), 0.0)


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
    return _set_frozen(_batch_norms(qmodel), 1.0)


def unfreeze_batch_norm(qmodel: Any) -> int:
    """Undo `freeze_batch_norm`: training steps normalize by their batch and move the statistics again.

    Returns:
        The number of batch norm layers whose statistics move now.

    Raises:
        ModelError: a model without quantizers.
    """
    return _set_frozen(_batch_norms(qmodel), 0.0)


# -- re-estimation --------------------------------------------------------------------------------------------------


@dataclass
class _Statistics:
    """The average over batches of a layer's batch mean and variance, float64, weighted by the samples of a batch."""

    mean: Any = 0.0
    variance: Any = 0.0
    samples: int = field(default=0)

    def normalize(self, layer: BatchNormalization, x: np.ndarray) -> np.ndarray:
        """Take in one batch (channels last) and return the layer's output with the statistics of that batch."""
        wide = np.asarray(x, np.float64)
        axes = tuple(range(wide.ndim - 1))
        mean, variance = wide.mean(axes), wide.var(axes)
        self.samples += len(wide)
        self.mean += (mean - self.mean) * (len(wide) / self.samples)
        self.variance += (variance - self.variance) * (len(wide) / self.samples)
        scale = (np.asarray(layer.gamma) if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon)
        offset = np.asarray(layer.beta) if layer.center else 0.0
        return ((wide - mean) * scale + offset).astype(np.float32)


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
    targets = _batch_norms(qmodel)
    exact = as_float32(qmodel)
    sources = {id(layer): layer for layer in _batch_norms(exact)}
    found: dict[int, _Statistics] = {}

    def visit(op: Op, inputs: list[Any], outputs: list[Any]) -> list[Any] | None:
        layer = sources.get(op.source.key)
        if layer is None:
            return None
        return [found.setdefault(id(layer), _Statistics()).normalize(layer, np.asarray(inputs[0]))]

    graph = read(exact)
    for feeds in islice(feeds_of(data, graph), batches):
        walk(graph, feeds, visit)
    for target, source in zip(targets, sources.values(), strict=True):
        target.moving_mean.assign(found[id(source)].mean)
        target.moving_variance.assign(found[id(source)].variance)
    return len(targets)


# -- the schedule ---------------------------------------------------------------------------------------------------


class QuantizationSchedule(keras.callbacks.Callback):
    """Freezes batch norm statistics, then activation ranges, at their time in `fit`.

    Batch norm first: the ranges then settle on activations that are normalized as they will be in the artifact. A time
    is a float, the share of all steps of the training (epochs times steps; whole epochs where the number of steps is
    not known), or an int, counted in `unit`. Epochs and steps are counted from the start of the training, so a `fit`
    that goes on with `initial_epoch=` freezes what is due. What was frozen stays so after the training; the
    `unfreeze_` functions undo it.

    Args:
        freeze_observers_after: when the ranges freeze; None for never.
        freeze_batch_norm_after: when the batch norm statistics freeze; None for never.
        reestimate_batch_norm_with: data for `reestimate_batch_norm`, run at the moment before the statistics freeze,
            or at the end of the training if they do not. Weights that train on adapt to what it found.
        reestimate_batches: batches of it to use; None for all.
        unit: of the ints, `"epochs"` or `"steps"`.

    Raises:
        ConfigError: a time that is neither a share from 0 to 1 nor a count, or an unknown unit.
        ModelError: at the start of the training, a model without quantizers.

    Source: Krishnamoorthi 2018 (arXiv:1806.08342) freezes batch norm statistics late in quantized training.

    Example:
        >>> late = QuantizationSchedule(freeze_observers_after=0.8, freeze_batch_norm_after=0.6)
        >>> QuantizationSchedule(freeze_batch_norm_after=60.0)
        Traceback (most recent call last):
        kquant.core.errors.ConfigError: freeze_batch_norm_after: a share from 0.0 to 1.0 ... Received: 60.0
    """

    def __init__(
        self,
        freeze_observers_after: float | int | None = 0.75,
        freeze_batch_norm_after: float | int | None = 0.5,
        reestimate_batch_norm_with: Any = None,
        *,
        reestimate_batches: int | None = None,
        unit: str = "epochs",
    ):
        super().__init__()
        _check_time("freeze_observers_after", freeze_observers_after)
        _check_time("freeze_batch_norm_after", freeze_batch_norm_after)
        if unit not in UNITS:
            raise ConfigError("unit", f"one of {', '.join(map(repr, UNITS))}", repr(unit))
        self.freeze_observers_after = freeze_observers_after
        self.freeze_batch_norm_after = freeze_batch_norm_after
        self.reestimate_batch_norm_with = reestimate_batch_norm_with
        self.reestimate_batches, self.unit = reestimate_batches, unit

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the model, and start over."""
        _layers(self.model)
        self._epoch, self._step = 0, 0
        self._due = [
            (self.freeze_batch_norm_after, self._freeze_batch_norm),
            (self.freeze_observers_after, lambda: freeze_observers(self.model)),
        ]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note where the training is: also where it goes on in a later epoch."""
        self._epoch = epoch
        if self.params.get("steps"):
            self._step = epoch * self.params["steps"]

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Freeze what is due before this step."""
        due = [action for time, action in self._due if self._reached(time)]
        self._due = [(time, action) for time, action in self._due if not self._reached(time)]
        for action in due:
            action()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the steps done; Keras reports a group of `steps_per_execution` by its last one."""
        steps = self.params.get("steps")
        self._step = self._epoch * steps + batch + 1 if steps else self._step + 1

    def on_train_end(self, logs: Any = None) -> None:
        """Re-estimate the statistics unless that was done when they froze."""
        if any(action == self._freeze_batch_norm for _, action in self._due):
            self._reestimate()

    def _freeze_batch_norm(self) -> None:
        self._reestimate()
        freeze_batch_norm(self.model)

    def _reestimate(self) -> None:
        if self.reestimate_batch_norm_with is not None:
            reestimate_batch_norm(self.model, self.reestimate_batch_norm_with, self.reestimate_batches)

    def _reached(self, time: float | int | None) -> bool:
        if time is None:
            return False
        epochs, steps = self.params["epochs"], self.params.get("steps")
        if isinstance(time, float):
            done, limit = (self._step, time * epochs * steps) if steps else (self._epoch, time * epochs)
        else:
            done, limit = (self._epoch if self.unit == "epochs" else self._step), time
        return done >= limit - 1e-6  # 0.1 * 3 epochs * 10 steps is a little more than 3


def _check_time(name: str, time: Any) -> None:
    is_share = isinstance(time, float) and 0.0 <= time <= 1.0
    is_count = isinstance(time, int) and not isinstance(time, bool) and time >= 0
    if not (time is None or is_share or is_count):
        raise ConfigError(name, "a share from 0.0 to 1.0 of the training, a count as an int, or None", repr(time))
