"""Models that are not yet functional: what a refusal says, and a subclassed model called on symbolic inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kquant.core.errors import ModelError
from kquant.keras_common.generation import Generation


def not_built(model: Any, received: str, fix: str) -> ModelError:
    """The refusal of a model that is not built."""
    return ModelError(f"model {model.name!r}", "it must be built before it is quantized", received, fix)


def unbuilt_sequential(model: Any) -> ModelError:
    """The refusal of a Sequential without input shape."""
    fix = "Add a keras.Input as first layer, or call build((None, ...)): a call on a batch would fix its size"
    return not_built(model, "a Sequential without input shape", fix)


def from_subclass(generation: Generation, model: Any, inputs: Sequence[tuple[tuple, str]] | None) -> Any:
    """A subclassed model as a functional one, by its `call` on symbolic inputs.

    Args:
        generation: of Keras.
        model: the model.
        inputs: the shape (with the batch) and the dtype of each input; None for a model that was never called.

    Raises:
        ModelError: not built, or not callable on symbolic inputs.
    """
    if not inputs:
        fix = "Call the model on a batch once; its call() must also work on symbolic inputs"
        raise not_built(model, "a subclassed model never called", fix)
    symbolic = [generation.input((None, *shape[1:]), dtype) for shape, dtype in inputs]
    try:
        with generation.quiet():
            outputs = model.call(symbolic[0] if len(symbolic) == 1 else symbolic)
        form = generation.keras.Model(symbolic, outputs, name=model.name)
    except Exception as error:
        raise ModelError(
            f"model {model.name!r}",
            "a subclassed model must be callable on symbolic inputs (no Python control flow on values, "
            "operations of the framework or layers only)",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "Write it with the functional API, or quantize the parts",
        ) from error
    lost = unread_weight(generation, model, form)
    if lost:
        raise ModelError(f"model {model.name!r}", lost, fix="Use it in a layer, or in x * w, x + w or x @ w")
    return form


def unread_weight(generation: Generation, owner: Any, form: Any) -> str:
    """Says which trainable weight of a layer or model its functional form lacks: it would no longer train.

    What code of one's own does with a weight alone, before a symbolic tensor is involved, is not seen in the form.
    """
    calls = [v for call in generation.calls(form) for v in generation.tree.flatten((call.args, call.kwargs))]
    seen = {id(v) for v in (*form.variables, *filter(generation.is_variable, calls))}
    lost = [v.name for v in owner.trainable_variables if id(v) not in seen]
    return f"its weight {lost[0]!r} meets the input only through values computed from it alone" if lost else ""
