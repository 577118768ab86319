"""What the controls act on in a quantized Keras model."""

from __future__ import annotations

from typing import Any

from kquant.core.controls import Controlled
from kquant.keras_common.generation import Generation
from kquant.keras_common.mixed import check_model


def controlled(generation: Generation, model: Any) -> Controlled | None:
    """The moving ranges and the batch norms of a model, at any depth; None without a quantizer.

    Raises:
        ModelError: not a model of this generation.
    """
    own = generation.own
    check_model(generation, model, f"a quantized {generation.package}.Model")
    layers = list(model._flatten_layers(include_self=False))
    if not any(isinstance(layer, (own.FakeQuantize, own.QuantizedLayer)) for layer in layers):
        return None
    ranges = [layer for layer in layers if isinstance(layer, own.FakeQuantize) and layer.fixed is None]
    return Controlled(model.name, ranges, [layer for layer in layers if isinstance(layer, own.BatchNormalization)])
