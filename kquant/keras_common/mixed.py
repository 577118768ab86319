"""Models and layers of the other generation of Keras: told apart, and refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from kquant.core.errors import ModelError
from kquant.keras_common.generation import TITLES, Generation, generation_of


def described(value: Any) -> str:
    """A value's class, and the generation of Keras that it comes from."""
    package = generation_of(value)
    return type(value).__name__ if package is None else f"a {type(value).__name__} of {TITLES[package]}"


def check_model(generation: Generation, model: Any, expected: str) -> None:
    """Refuse what is not a model of this generation.

    Raises:
        ModelError: saying which generation it is of.
    """
    if not isinstance(model, generation.keras.Model):
        raise ModelError(
            "model",
            expected,
            described(model),
            f"Hand in a whole model of {generation.title}",
        )


def check_layer(generation: Generation, layer: Any) -> None:
    """Refuse a layer of the other generation, one that holds such a layer, and what the generation refuses itself.

    Raises:
        ModelError: naming the layer.
    """
    refused = generation.why_refused(layer)
    if refused is not None:
        raise ModelError(f"layer {layer.name!r}", *refused)
    for part in _parts(layer):
        package = generation_of(part)
        if package is not None and package != generation.package:
            raise ModelError(
                f"layer {layer.name!r}",
                f"layers of {TITLES[generation.package]} only",
                f"{getattr(part, 'name', 'one')!r}, {described(part)}",
                "Build the whole model in one generation of Keras",
            )


def _parts(layer: Any) -> Iterator[Any]:
    """A layer, what a user's layer holds, and what the function of a lambda layer closes over."""
    yield layer
    for value in vars(layer).values():
        yield from value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    function = getattr(layer, "function", None)
    if inspect.isfunction(function):
        yield from inspect.getclosurevars(function).nonlocals.values()
