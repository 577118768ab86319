"""The wrapped model itself: the user's module, of a subclass of its own class whose `forward` is generated code.

All of the user's modules, parameters, attributes, methods and hooks stay where they are; the quantizers are one more
child, the last one, named `quantizers`. The code is kept as text, so that the model can be pickled and copied.
"""

from __future__ import annotations

import importlib
import linecache
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from kquant.core.errors import ModelError

HOLDER = "quantizers"
STATE = "_kquant"  # the attribute with what a wrapped model knows of itself


class QuantizedRoot:
    """Mixed in before the user's class: pickling, and what a `Sequential` needs to hide the quantizers."""

    is_quantized_root = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; errors of `_check_hooks` besides its own."""
        if not torch.compiler.is_compiling():
            _check_hooks(self)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # of the user's class, mixed in behind

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).float_class, self.__dict__[STATE]), self.__getstate__()


class _Sequential(QuantizedRoot):
    """A `Sequential` counts and iterates over its own layers only."""

    def __len__(self) -> int:
        return len(self._modules) - (HOLDER in self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([m for name, m in self._modules.items() if name != HOLDER])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            own = [(name, m) for name, m in self._modules.items() if name != HOLDER]
            part = nn.Sequential()
            for name, module in own[index]:
                part.add_module(name, module)
            return part
        return list(self)[index]


def _empty(float_class: type, state: dict) -> nn.Module:
    """A wrapped module without contents, for unpickling."""
    cls = quantized_class(float_class, state["code"], state["names_in_code"])
    return cls.__new__(cls)


def quantized_class(float_class: type, code: str, names_in_code: dict[str, Any]) -> type:
    """The subclass of a user's class whose `forward` is the given code."""
    mixin = _Sequential if issubclass(float_class, nn.Sequential) else QuantizedRoot
    file = f"<kquant forward of {float_class.__name__} {abs(hash(code)):x}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    space = {name: _resolved(value) for name, value in names_in_code.items()}
    exec(compile(code, file, "exec"), space)  # fx's own code, as in torch.fx.GraphModule
    body = {
        "forward": space["forward"],
        "float_class": float_class,
        "__module__": float_class.__module__,
        "__doc__": float_class.__doc__,
    }
    return type(f"Quantized{float_class.__name__}", (mixin, float_class), body)


def _containers(graph: fx.Graph) -> list[str]:
    """The modules whose own `forward` is never called, because the code of a graph holds what it does."""
    called = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    around = {".".join(name.split(".")[:i]) for name in called for i in range(1, name.count(".") + 1)}
    return sorted(around - called - {HOLDER})


def _check_hooks(model: nn.Module) -> None:
    """Hooks that a container got after wrapping would never run: say so.

    Raises:
        ModelError: naming the container.
    """
    for name in model.__dict__[STATE]["containers"]:
        module = model.get_submodule(name)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise ModelError(
                f"module {name!r}", "no hook on a container that had none when the model was wrapped", "a hook",
                "Register it on the float model, before wrapping; or on a layer inside, at any time",
            )  # fmt: skip


def _stored(value: Any) -> Any:
    """A name of the code's namespace in a form that can be pickled: modules by their names."""
    return ("module", value.__name__) if isinstance(value, types.ModuleType) else ("object", value)


def _resolved(stored: Any) -> Any:
    kind, value = stored
    return importlib.import_module(value) if kind == "module" else value


def become_quantized(model: nn.Module, graph: fx.Graph, state: dict[str, Any]) -> nn.Module:
    """Give a model the code of a rewritten graph, in place.

    Args:
        model: the user's module, whose parts were already replaced; it has a child `quantizers`.
        graph: the code, over that module.
        state: what it shall know of itself besides the code: names of its ops, example shapes, its target.
    """
    generated = graph.python_code("self")
    names = {name: _stored(value) for name, value in generated.globals.items()}
    model.__dict__[STATE] = {
        **state, "code": generated.src, "names_in_code": names, "containers": _containers(graph),
    }  # fmt: skip
    model.__class__ = quantized_class(type(model), generated.src, names)
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether a module was wrapped."""
    return STATE in model.__dict__


def names_of(model: nn.Module) -> list[Any]:
    """The names of a wrapped model's ops in the order of its code; none for a float model."""
    return list(model.__dict__[STATE].get("names", ())) if is_quantized(model) else []


def target_of(model: nn.Module) -> str:
    """The target that a model was wrapped for; none for a float model."""
    return str(model.__dict__[STATE].get("target", "onednn")) if is_quantized(model) else ""


def example_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs of the shapes that a model was wrapped with, all zeros."""
    if not is_quantized(model):
        raise ModelError(
            "example_inputs", "a batch of inputs, since a module does not know their shapes", "None",
            "Pass example_inputs=x: a tensor, a tuple, or a dict by argument name",
        )  # fmt: skip
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    device = None if first is None else first.device
    given = model.__dict__[STATE]["inputs"]
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in given.items()}
