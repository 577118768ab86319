"""Masks of sequences, which Keras hands from layer to layer beside the values. The artifact has no such thing.

A mask that only reaches the loss is kept: the quantized model hands it on as the float model does. A layer that
computes with it is refused by name.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from kquant.core.errors import UnsupportedError
from kquant.keras_common.generation import Call, Generation


class Masks:
    """Which tensors of a graph carry a mask, and where it was made."""

    def __init__(self, generation: Generation):
        self.generation = generation
        self.made_by: dict[str, str] = {}
        self._masks: dict[int, str] = {}
        self._tensors: set[str] = set()

    def find(self, calls: list[Call]) -> None:
        """Note the masks that tensors of these calls carry, and which layers made them."""
        carriers = [(t, call.layer.name) for call in calls for t in call.outputs if has_mask(t)]
        for tensor, layer in carriers:
            self._masks.setdefault(id(tensor._keras_mask), layer)

    def makes_one(self, call: Call) -> bool:
        """Whether an operation only makes a mask, which is no tensor of the artifact."""
        named = self.generation.operation(call) is not None
        return named and len(call.outputs) == 1 and id(call.outputs[0]) in self._masks

    def named(self, tensor: str, call: Call) -> str:
        """Note the tensor that stands for the mask that a call makes."""
        self.made_by[tensor] = self._masks[id(call.outputs[0])]
        self._tensors.add(tensor)
        return tensor

    def note(self, call: Call, inputs: list[str], outputs: list[str]) -> None:
        """Follow the masks through a call that was read."""
        made = [self.made_by[t] for t in inputs if t in self.made_by]
        made = made if getattr(call.layer, "supports_masking", False) else []
        if any(has_mask(t) for t in call.outputs):
            made = made or [call.layer.name]
        self.made_by.update(dict.fromkeys(outputs, made[0]) if made else {})

    def check(self, call: Call, inputs: list[str]) -> None:
        """Refuse a layer that computes with a mask.

        Raises:
            UnsupportedError: naming it and the layer that makes the mask.
        """
        made = next((self.made_by[t] for t in inputs if t in self.made_by), None)
        reads = _reads(call.layer) or not self._tensors.isdisjoint(inputs)
        if made is None or isinstance(call.layer, self.generation.keras.Model) or not reads:
            return
        raise UnsupportedError(
            f"layer {call.layer.name!r} ({type(call.layer).__name__})",
            "a layer that reads no mask, because the artifact has none",
            f"the mask that {made!r} makes",
            f"Build {made!r} without it (an Embedding with mask_zero=False; no Masking layer), or end it before "
            f"{call.layer.name!r}, and train the float model so",
        )


def has_mask(tensor: Any) -> bool:
    """Whether a symbolic tensor carries a mask."""
    return getattr(tensor, "_keras_mask", None) is not None


def _reads(layer: Any) -> bool:
    """Whether a layer's call takes a mask. A lambda layer's does on behalf of its function."""
    function = getattr(layer, "function", None)
    call = function if type(layer).__name__ == "Lambda" else getattr(layer, "call", None)
    try:
        return any("mask" in name for name in inspect.signature(call).parameters)
    except (TypeError, ValueError):  # a function without a signature, or an operation
        return False


def warn_of_lost(model: Any, given: list[Any], made: list[Any]) -> None:
    """Warn where an output of the float model carried a mask to its loss, and that of the quantized one does not."""
    if any(has_mask(a) and not has_mask(b) for a, b in zip(given, made, strict=True)):
        warnings.warn(
            f"model {model.name!r}: its output carries a mask that the loss leaves samples out by, and that of the "
            "quantized model does not. Give fit() the same as sample_weight.",
            UserWarning,
            stacklevel=5,
        )
