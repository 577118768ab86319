"""The points where Keras 3 and tf_keras (Keras 2) differ; everything else of a Keras front end is shared."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from kquant.keras_common.arguments import Arguments

TITLES = {"keras": "Keras 3", "tf_keras": "tf_keras (Keras 2)"}


def generation_of(value: Any) -> str | None:
    """The package of Keras that a model's or a layer's class comes from: `keras`, `tf_keras` or None."""
    roots = {c.__module__.partition(".")[0] for c in type(value).__mro__}
    return next((package for package in TITLES if package in roots), None)


@dataclass(frozen=True)
class Call:
    """One call of a layer or an operation in a functional model.

    Args:
        layer: the layer or operation.
        args, kwargs: what it was called with, symbolic tensors among it.
        inputs: those symbolic tensors, in order.
        outputs: its symbolic results, flat.
        shapes: of the results, None for unknown sizes.
        tree: the generation's functions over nested structures.
    """

    layer: Any
    args: tuple
    kwargs: dict
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    shapes: tuple[tuple, ...]
    tree: Any

    @property
    def shape(self) -> tuple:
        """The shape of the first result."""
        return self.shapes[0]

    def fill(self, values: Sequence[Any]) -> tuple[tuple, dict]:
        """The arguments with the symbolic tensors replaced by `values`."""
        ids, given = {id(t) for t in self.inputs}, iter(values)
        filled: tuple[tuple, dict] = self.tree.map_structure(
            lambda a: next(given) if id(a) in ids else a, (tuple(self.args), dict(self.kwargs))
        )
        return filled

    def invoke(self, layer: Any, values: Sequence[Any]) -> Any:
        """Call `layer` as this call does, on other tensors."""
        args, kwargs = self.fill(values)
        return layer(*args, **kwargs)


@dataclass(frozen=True)
class Source:
    """How to make an op again in the quantized model.

    Args:
        key: ops with the same key are calls of one layer.
        build: makes the layer or operation.
        weights: the values to set on a built layer, or None.
        invoke: (layer or operation, inputs) -> output or outputs.
        name: the name that the layer or operation had in the float model.
        is_operation: it is an operation without weights, not a layer.
    """

    key: Any
    build: Callable[[], Any]
    weights: Callable[[], list[np.ndarray]] | None
    invoke: Callable[[Any, Sequence[Any]], Any]
    name: str = ""
    is_operation: bool = False


class Generation(abc.ABC):
    """One generation of Keras.

    Args:
        title: how a message names it.
        keras: the module.
        ops: `keras.ops`, or functions over TensorFlow of the same names.
        tree: `flatten` and `map_structure`.
        package: `keras` or `tf_keras`, the root of its classes' modules.
    """

    title: str
    package: str
    keras: ModuleType
    ops: Any
    tree: Any

    @property
    def layers(self) -> Any:
        """Keras' own layers."""
        return self.keras.layers

    @cached_property
    def own(self) -> Any:
        """The layers of a quantized model, by name."""
        return self._own()

    @abc.abstractmethod
    def _own(self) -> Any: ...

    @property
    @abc.abstractmethod
    def linear(self) -> dict[type, Any]:
        """The rules of the layers with a kernel."""

    @abc.abstractmethod
    def calls(self, model: Any) -> Iterator[Call]:
        """The calls of a functional model in topological order, without its inputs."""

    @abc.abstractmethod
    def functional(self, model: Any) -> Any:
        """The functional form of a model.

        Raises:
            ModelError: a model that is not built, is empty, or cannot be called on symbolic inputs.
        """

    @abc.abstractmethod
    def structures(self, form: Any) -> tuple[Any, Any]:
        """The nested structures of a functional model's inputs and outputs."""

    @abc.abstractmethod
    def operation(self, call: Call) -> tuple[str, Arguments] | None:
        """For a call of an operation (not of a layer) its name in `keras.ops` and its arguments by name there.

        The name is empty where nothing is known of it.
        """

    @abc.abstractmethod
    def copy_operation(self, operation: Any, name: str) -> Any:
        """An operation of the same function without the calls of the other."""

    @abc.abstractmethod
    def rename(self, layer: Any, name: str) -> None:
        """Give a new layer another name."""

    @abc.abstractmethod
    def maker(self, tensor: Any) -> tuple[Any, tuple[Any, ...]]:
        """The layer or operation that gave a symbolic tensor, and the symbolic tensors it was given."""

    @abc.abstractmethod
    def shape(self, tensor: Any) -> tuple:
        """The shape of a symbolic tensor, None for unknown sizes."""

    @abc.abstractmethod
    def dtype(self, tensor: Any) -> str:
        """The numpy name of a symbolic tensor's dtype."""

    @abc.abstractmethod
    def is_symbolic(self, value: Any) -> bool:
        """Whether a value is a symbolic tensor."""

    @abc.abstractmethod
    def is_variable(self, value: Any) -> bool:
        """Whether a value is a variable."""

    @abc.abstractmethod
    def variable(self, values: np.ndarray, name: str, trainable: bool) -> Any:
        """A new float32 variable."""

    @abc.abstractmethod
    def known_function(self, function: Any) -> str | None:
        """The name in `keras.activations` of a function, or None for any other callable."""

    def why_refused(self, layer: Any) -> tuple[str, str, str] | None:
        """For a layer that no model may hold: what was expected, what it is, and what to do instead."""
        return None

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While copies of a user's layers are called on symbolic tensors, which is nothing to warn the user about."""
        yield

    @contextmanager
    def known_sizes(self) -> Iterator[None]:
        """While the shape of a symbolic tensor whose sizes are all known is a plain array."""
        yield

    def input(self, shape: tuple, dtype: str, name: str | None = None) -> Any:
        """A symbolic input; `shape` has the batch in it."""
        return self.keras.Input(batch_shape=shape, dtype=dtype, name=name)

    def is_own_class(self, layer: Any) -> bool:
        """Whether a layer's class is Keras' own, not a user's."""
        return type(layer).__module__.startswith(f"{self.package}.src.layers")
