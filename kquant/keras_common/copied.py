"""Weights of one layer into a copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def set_weights(layer: Any, values: Sequence[np.ndarray]) -> None:
    """Set the weights of a layer, and what the layers in it derive from theirs (a normalization that was adapted)."""
    layer.set_weights(values)
    for part in layer._flatten_layers():
        if hasattr(part, "finalize_state"):
            part.finalize_state()
