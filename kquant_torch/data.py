"""What users hand over as data, as arrays for the core."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def arrays_of(data: Any) -> Any:
    """Calibration data with arrays in the place of tensors; an iterable is converted batch by batch, when asked for."""
    if isinstance(data, (torch.Tensor, np.ndarray, dict)) or not hasattr(data, "__iter__"):
        return _converted(data)
    return (_converted(batch) for batch in data)


def _converted(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.detach().cpu().numpy()
    if isinstance(batch, dict):
        return {k: _converted(v) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        # A DataLoader hands `(x, y)` over as a list.
        together = isinstance(batch, tuple) or all(isinstance(v, (torch.Tensor, np.ndarray, dict)) for v in batch)
        return (tuple if together else list)(_converted(v) for v in batch)
    return batch
