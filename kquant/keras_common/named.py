"""The class of a quantized model: the user's own where it can be, else one that keeps the output names."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from kquant.keras_common.generation import Generation

# What a training script overrides in a model class of its own.
_OVERRIDDEN = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", "compile", "fit")


class NamedOutputs:
    """A functional model whose output names are saved with it.

    Keras names an output after the layer that gives it, which here is a quantizer. Losses and metrics by output name,
    and the file's signature, go by the names of the float model, also after loading.
    """

    output_names: list[str]

    def get_config(self) -> dict:
        return {**super().get_config(), "output_names": [str(name) for name in self.output_names]}

    @classmethod
    def from_config(cls, config: dict, custom_objects: Any = None) -> Any:
        config = dict(config)
        names = config.pop("output_names", None)
        model = super().from_config(config, custom_objects)
        if names is not None:
            model.output_names = names
        return model


def class_of(generation: Generation, model: Any) -> type:
    """The class of the quantized twin of `model`.

    That of a user who made a functional model of a class of his own, which then goes on training as it says; a class
    that cannot be made from inputs and outputs is left, with a warning if it trains in a way of its own.
    """
    own, theirs = generation.own.QuantizedModel, type(model)
    if theirs.__module__.partition(".")[0] == generation.package or isinstance(model, own):
        return own
    if generation.functional(model) is model and _takes_inputs_and_outputs(theirs):
        return theirs
    changed = [n for n in _OVERRIDDEN if getattr(theirs, n) is not getattr(generation.keras.Model, n)]
    if changed:
        warnings.warn(
            f"model {model.name!r}: the quantized model is a functional one, without {changed[0]!r} of "
            f"{theirs.__name__}. Train it in a custom loop, or in a class made as {theirs.__name__}(inputs, outputs).",
            UserWarning,
            stacklevel=5,
        )
    return own


def _takes_inputs_and_outputs(theirs: type) -> bool:
    spec = inspect.getfullargspec(theirs.__init__)
    return spec.args[1:3] == ["inputs", "outputs"] or (spec.varargs is not None and spec.varkw is not None)
