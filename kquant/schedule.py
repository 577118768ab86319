"""`QuantizationSchedule`: a training callback that freezes batch norm statistics and ranges at their time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kquant import controls
from kquant.core.errors import ConfigError, check_choice

UNITS = ("epochs", "steps")


class QuantizationSchedule:
    """Freezes batch norm statistics, then activation ranges, at their time in `fit`.

    It goes into the `callbacks` of `fit` of Keras 3 and of tf_keras alike: both call a callback by its methods, and it
    inherits from neither's base class.

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
        _check_time("freeze_observers_after", freeze_observers_after)
        _check_time("freeze_batch_norm_after", freeze_batch_norm_after)
        check_choice("unit", unit, UNITS)
        self.freeze_observers_after = freeze_observers_after
        self.freeze_batch_norm_after = freeze_batch_norm_after
        self.reestimate_batch_norm_with = reestimate_batch_norm_with
        self.reestimate_batches, self.unit = reestimate_batches, unit
        self.model: Any = None
        self.params: Mapping[str, Any] = {}

    def set_model(self, model: Any) -> None:
        """Take the model that is about to be trained."""
        self.model = model

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Take the settings of the training: `epochs` and, where it is known, `steps`."""
        self.params = params

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the model, and start over."""
        controls.controlled(self.model)
        self._epoch, self._step = 0, 0
        self._due = [
            (self.freeze_batch_norm_after, self._freeze_batch_norm),
            (self.freeze_observers_after, lambda: controls.freeze_observers(self.model)),
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

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """A moment of training at which nothing is due."""

    on_epoch_end = on_test_begin = on_test_end = on_predict_begin = on_predict_end = _nothing
    on_test_batch_begin = on_test_batch_end = on_predict_batch_begin = on_predict_batch_end = _nothing

    # tf_keras asks which moments a callback wants to hear of.

    def _implements_train_batch_hooks(self) -> bool:
        return True

    def _implements_test_batch_hooks(self) -> bool:
        return False

    def _implements_predict_batch_hooks(self) -> bool:
        return False

    def _freeze_batch_norm(self) -> None:
        self._reestimate()
        controls.freeze_batch_norm(self.model)

    def _reestimate(self) -> None:
        if self.reestimate_batch_norm_with is not None:
            controls.reestimate_batch_norm(self.model, self.reestimate_batch_norm_with, self.reestimate_batches)

    def _reached(self, time: float | int | None) -> bool:
        if time is None:
            return False
        epochs, steps = self.params["epochs"], self.params.get("steps")
        if isinstance(time, float):
            done, limit = (self._step, time * epochs * steps) if steps else (self._epoch, time * epochs)
        else:
            done, limit = (self._epoch if self.unit == "epochs" else self._step), time
        return bool(done >= limit - 1e-6)  # 0.1 * 3 epochs * 10 steps is a little more than 3


def _check_time(name: str, time: Any) -> None:
    is_share = isinstance(time, float) and 0.0 <= time <= 1.0
    is_count = isinstance(time, int) and not isinstance(time, bool) and time >= 0
    if not (time is None or is_share or is_count):
        raise ConfigError(
            name,
            "a share from 0.0 to 1.0 of the training, a count as an int, or None",
            repr(time),
            "Write 0.5 for half of the training, 3 for three epochs or steps, None for never",
        )
