"""What a user controls while a quantized model trains: ranges, batch norm statistics, and when each stands still.

Everything goes through state variables of the model, so a compiled train function notices without being rebuilt, and
the state is saved with the model. The rules stand in `kquant.core.controls`; a front end says what they act on.
"""

from __future__ import annotations

from typing import Any

from kquant.core.controls import Controlled, estimated_statistics, freeze_ranges, reached_batch_norms, set_frozen
from kquant.core.errors import ModelError


def controlled(qmodel: Any) -> Controlled:
    """What the controls of a quantized model act on.

    Raises:
        ModelError: not a model that kquant reads, or one without quantizers.
    """
    from kquant.api import front_end

    found: Controlled | None = front_end(qmodel).controlled(qmodel)
    if found is None:
        fix = "Call kquant.quantize_model(model) first, and hand its result in"
        name = getattr(qmodel, "name", type(qmodel).__name__)  # a session has none
        raise ModelError(f"model {name!r}", "a quantized model", "a model without quantizers", fix)
    return found


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
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> qmodel = kquant.quantize_model(model, calibration_data=np.ones((8, 4), np.float32))
        >>> kquant.freeze_observers(qmodel)
        2
    """
    return freeze_ranges(controlled(qmodel))


def unfreeze_observers(qmodel: Any) -> int:
    """Undo `freeze_observers`: the ranges move with the training batches again.

    Returns:
        The number of ranges that move now.

    Raises:
        ModelError: a model without quantizers.
    """
    return set_frozen(controlled(qmodel).ranges, 0.0)


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
    return set_frozen(reached_batch_norms(controlled(qmodel)), 1.0)


def unfreeze_batch_norm(qmodel: Any) -> int:
    """Undo `freeze_batch_norm`: training steps normalize by their batch and move the statistics again.

    Returns:
        The number of batch norm layers whose statistics move now.

    Raises:
        ModelError: a model without quantizers.
    """
    return set_frozen(reached_batch_norms(controlled(qmodel)), 0.0)


# -- re-estimation --------------------------------------------------------------------------------------------------


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
    from kquant.api import front_end

    front, targets = front_end(qmodel), reached_batch_norms(controlled(qmodel))
    exact = front.as_float32(qmodel)
    found = estimated_statistics(front.read(exact), data, batches)
    for target, source in zip(targets, controlled(exact).batch_norms, strict=True):
        target.set_statistics(found[source].mean, found[source].variance)
    return len(targets)
