"""What the controls act on in a quantized Keras model."""

from __future__ import annotations

from typing import Any

from kquant.core.controls import Controlled
from kquant.core.errors import ModelError
from kquant.keras_common.generation import Generation


def controlled(generation: Generation, model: Any) -> Controlled | None:
    """The moving ranges and the batch norms of a model, at any depth; None without a quantizer.

    Raises:
        ModelError: not a model of this generation.
    """
    own = generation.own
    if not isinstance(model, generation.keras.Model):
        raise ModelError("model", f"a quantized {generation.package}.Model", type(model).__name__)
    layers = list(model._flatten_layers(include_self=False))
    if not any(isinstance(layer, (own.FakeQuantize, own.QuantizedLayer)) for layer in layers):
        return None
    ranges = [layer for layer in layers if isinstance(layer, own.FakeQuantize) and layer.fixed is None]
    return Controlled(model.name, ranges, [layer for layer in layers if isinstance(layer, own.BatchNormalization)])
