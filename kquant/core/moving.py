"""The ranges of training: how one follows the batches, and what the batch itself is quantized on."""

from __future__ import annotations

from typing import Any

import numpy as np

EMA_DECAY = 0.99  # Jacob et al. 2018, section 3.1: an exponential moving average "close to 1"
# Training never clips a batch below this share of what a range that had followed would cover of it. Batch norm in
# training divides by the batch's own deviation: what a range from another state of the net clips to almost nothing, the
# next norm blows up again, and the gradient with it. In a MobileNetV2 with fresh statistics the first kernel's was 5e13
# times the float model's without a limit, 6 times at 1/2, and 1.2 times at 2/3.
KEPT = 2 / 3


def moved(old: Any, batch: Any, decay: float = EMA_DECAY) -> Any:
    """One end of a range after a batch: `old + (batch - old) (1 - decay)`.

    Example:
        >>> moved(1.0, 3.0)
        1.02
    """
    return old + (batch - old) * (1.0 - decay)


def kept(low: Any, high: Any, batch_low: Any, batch_high: Any, xp: Any = np) -> tuple[Any, Any]:
    """The range that a batch in training is quantized on: the moving one, but no less than `KEPT` of the batch's own.

    As long as a range follows its tensor this is the moving range. The two differ for an odd batch, and in a net whose
    batch norms have not settled, where training sees other values than calibration did.

    Args:
        low, high: the moving range, `low <= 0 <= high`.
        batch_low, batch_high: what the range is to cover of the batch, `batch_low <= 0 <= batch_high`.
        xp: the array namespace.

    Example:
        >>> low, high = kept(-1.0, 1.0, 0.0, 6.0)
        >>> float(low), float(high)
        (-1.0, 4.0)
    """
    return xp.minimum(low, KEPT * batch_low), xp.maximum(high, KEPT * batch_high)
