"""What a user controls while a wrapped model trains: ranges, batch norm statistics, and when each stands still.

All of it is saved in the `state_dict`. A compiled model specializes to what is frozen and notices a change by itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kquant.core.controls import Controlled, estimated_statistics, freeze_ranges, set_frozen
from kquant.core.errors import ModelError
from kquant_torch.calls import check_bare, undisturbed
from kquant_torch.data import arrays_of
from kquant_torch.fake_quantize import quantizers_of
from kquant_torch.norms import FreezableNorm
from kquant_torch.read import read


def controlled(qmodel: nn.Module) -> Controlled:
    """What the controls of a wrapped model act on.

    Raises:
        ModelError: not a module, or one without quantizers.
    """
    check_bare(qmodel)
    if not isinstance(qmodel, nn.Module):
        raise ModelError(
            "model", "a wrapped torch.nn.Module", type(qmodel).__name__, "Hand in what kquant_torch.wrap returned"
        )
    quantizers = quantizers_of(qmodel)
    if not quantizers:
        fix = "Call kquant_torch.wrap(model, example_inputs=x) first, and hand its result in"
        raise ModelError(f"model {type(qmodel).__name__!r}", "a wrapped model", "a model without quantizers", fix)
    norms = [m for m in qmodel.modules() if isinstance(m, FreezableNorm) and m.running_mean is not None]
    return Controlled(type(qmodel).__name__, [q for q in quantizers if q.fixed is None], norms)


def freeze_observers(qmodel: nn.Module) -> int:
    """Let the activation ranges stand still while training goes on.

    Returns:
        The number of ranges that stand still now.

    Raises:
        ModelError: a model without quantizers, or one with ranges that no data has set yet.

    Example:
        >>> import torch, kquant_torch
        >>> x = torch.ones(8, 4)
        >>> qmodel = kquant_torch.wrap(nn.Sequential(nn.Linear(4, 2)), example_inputs=x, calibration_data=x)
        >>> kquant_torch.freeze_observers(qmodel)
        2
    """
    return freeze_ranges(controlled(qmodel))


def unfreeze_observers(qmodel: nn.Module) -> int:
    """Undo `freeze_observers`; returns the number of ranges that move now."""
    return set_frozen(controlled(qmodel).ranges, 0.0)


def freeze_batch_norm(qmodel: nn.Module) -> int:
    """Train on with the running statistics: a training step then normalizes as the exported model does.

    The trainable scale and offset keep training.

    Returns:
        The number of batch norms whose statistics stand still now.

    Source: Krishnamoorthi 2018 (arXiv:1806.08342), batch norm freezing.
    """
    return set_frozen(controlled(qmodel).batch_norms, 1.0)


def unfreeze_batch_norm(qmodel: nn.Module) -> int:
    """Undo `freeze_batch_norm`; returns the number of batch norms whose statistics move now."""
    return set_frozen(controlled(qmodel).batch_norms, 0.0)


@undisturbed
def reestimate_batch_norm(qmodel: nn.Module, data: Any, batches: int | None = None) -> int:
    """Set the running statistics of all batch norms to their exact average over batches of data.

    One pass. Weights and activations are quantized as in evaluation and dropout is off; only batch norm normalizes by
    the batch, so that each layer sees the effect of those before it.

    Args:
        qmodel: a wrapped model.
        data: samples or batches, as `calibration_data` of `wrap`.
        batches: use this many batches at most; None for all.

    Returns:
        The number of batch norms that were set.

    Raises:
        ModelError: a model without quantizers.
        CalibrationError: data that does not fit the model, or without a batch.
        ConfigError: `batches` that is not a positive integer.

    Source: Nagel et al. 2022 (arXiv:2203.11086) for quantized training.
    """
    norms = controlled(qmodel).batch_norms
    found = estimated_statistics(read(qmodel), arrays_of(data), batches)
    reached = [norm for norm in norms if norm in found]
    for norm in reached:
        norm.set_statistics(found[norm].mean, found[norm].variance)
    return len(reached)
