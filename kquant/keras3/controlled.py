"""What the controls act on in a quantized Keras 3 model."""

from __future__ import annotations

from typing import Any

import keras

from kquant.controls import Controlled
from kquant.core.errors import ModelError
from kquant.keras3.layers import FakeQuantize, QuantizedLayer
from kquant.keras3.norms import BatchNormalization


def controlled(model: Any) -> Controlled | None:
    """The moving ranges and the batch norms of a model, at any depth; None without a quantizer.

    Raises:
        ModelError: not a Keras 3 model.
    """
    if not isinstance(model, keras.Model):
        raise ModelError("model", "a quantized keras.Model", type(model).__name__)
    layers = list(model._flatten_layers(include_self=False))
    if not any(isinstance(layer, (FakeQuantize, QuantizedLayer)) for layer in layers):
        return None
    ranges = [layer for layer in layers if isinstance(layer, FakeQuantize) and layer.fixed is None]
    return Controlled(model.name, ranges, [layer for layer in layers if isinstance(layer, BatchNormalization)])
