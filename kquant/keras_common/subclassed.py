"""Models that are not yet functional: what a refusal says, and a subclassed model called on symbolic inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from kquant.core.errors import ModelError
from kquant.keras_common.concrete import Concrete, Run, UnreadError
from kquant.keras_common.generation import Generation


def not_built(model: Any, received: str, fix: str) -> ModelError:
    """The refusal of a model that is not built."""
    return ModelError(f"model {model.name!r}", "it must be built before it is quantized", received, fix)


def empty(model: Any) -> ModelError:
    """The refusal of a model without a layer."""
    return ModelError(f"model {model.name!r}", "a model with at least one layer", "an empty model", "Add layers to it")


def unbuilt_sequential(model: Any) -> ModelError:
    """The refusal of a Sequential without layers, or without input shape."""
    if not model.layers:
        return empty(model)
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
    results: list[Any] = []

    def run(values: Sequence[Any]) -> Any:
        outputs = model.call(values[0] if len(values) == 1 else list(values))
        results[:] = [outputs]  # whose structure the functional model has
        return outputs

    try:
        with generation.quiet():
            read = readable(generation, model, run, symbolic)
    except Exception as error:
        raise ModelError(
            f"model {model.name!r}",
            "a subclassed model must be callable on symbolic inputs (no Python control flow on values, "
            "operations of the framework or layers only)",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "Write it with the functional API, or quantize the parts",
        ) from error
    if isinstance(read, str):
        raise ModelError(f"model {model.name!r}", read, fix="Use it in a layer, or in x * w, x + w or x @ w")
    if isinstance(read, generation.keras.Model):
        symbolic, read = read.inputs, generation.tree.pack_sequence_as(results[0], read.outputs)
    inputs = symbolic[0] if len(symbolic) == 1 else symbolic  # Keras warns of a tensor where it expects a list
    return generation.keras.Model(inputs, read, name=model.name)


def readable(generation: Generation, owner: Any, run: Run, inputs: Sequence[Any]) -> Any:
    """What code of one's own computes on symbolic inputs.

    Args:
        generation: of Keras.
        owner: the layer or model whose code it is.
        run: calls it.
        inputs: symbolic tensors.

    Returns:
        Its outputs, or a functional model, or the reason why it cannot be read.

    Raises:
        Exception: whatever it raises on symbolic inputs.
    """
    failure, outputs, reason = None, None, ""
    try:
        outputs = run(inputs)
        form = generation.keras.Model(inputs, generation.tree.flatten(outputs))
        reason = unread_weight(generation, owner, form)
        if not reason and not _asks_for_sizes(generation, form):
            return outputs
    except Exception as error:
        failure = error
    concrete = Concrete(generation, owner, run)
    try:
        with generation.known_sizes():
            form = concrete.form([(generation.shape(t), generation.dtype(t)) for t in inputs])
        if not unread_weight(generation, owner, form, concrete.read):
            return form
    except Exception as error:  # then what the first attempt says is the reason
        failure = error if isinstance(error, UnreadError) and failure is not None else failure
    if failure is not None:
        raise failure
    return reason or outputs


def _asks_for_sizes(generation: Generation, form: Any) -> bool:
    """Whether a form holds sizes that are known only when it runs, the batch among them."""
    named = [generation.operation(call) or ("", {}) for call in generation.calls(form)]
    return any(name == "Shape" or (name == "Reshape" and None in args.get("newshape", ())) for name, args in named)


def unread_weight(generation: Generation, owner: Any, form: Any, read: Collection[int] = ()) -> str:
    """Says which trainable weight of a layer or model its functional form lacks: it would no longer train.

    What code of one's own does with a weight alone, before a symbolic tensor is involved, is not seen in the form.
    `read` are the ids of weights that are in it all the same.
    """
    calls = [v for call in generation.calls(form) for v in generation.tree.flatten((call.args, call.kwargs))]
    seen = {id(v) for v in (*form.variables, *filter(generation.is_variable, calls))} | set(read)
    lost = [v.name for v in owner.trainable_variables if id(v) not in seen]
    return f"its weight {lost[0]!r} meets the input only through values computed from it alone" if lost else ""
