"""From a module to an fx graph whose nodes know their values' shapes: tracing, cleaning, and running it on examples."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn
from torch.utils import _pytree as pytree

from kquant.core.errors import ModelError, UnsupportedError
from kquant_torch.modes import follow_mode
from kquant_torch.tracer import NotTraceable, Tracer, in_mode, larger

VIEWS = frozenset(
    "getitem view reshape flatten unflatten squeeze unsqueeze permute transpose t select narrow chunk split unbind "
    "expand movedim swapaxes detach contiguous".split()
)
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


class Inputs:
    """The example inputs of a model, by the names of its forward arguments."""

    def __init__(self, model: nn.Module, example_inputs: Any):
        self.signature = inspect.signature(type(model).forward)
        positional, named = as_arguments(example_inputs)
        try:
            bound = self.signature.bind(model, *positional, **named).arguments
        except TypeError as error:
            raise ModelError(
                "example_inputs",
                f"arguments of {type(model).__name__}.forward{self.signature}",
                str(error),
                "Pass a tensor, a tuple of tensors, or a dict by argument name",
            ) from error
        own = next(iter(bound))
        self.values: dict[str, Any] = {k: v for k, v in bound.items() if k != own}
        for name, value in self.values.items():
            kind = self.signature.parameters[name].kind
            if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                raise UnsupportedError(
                    f"model {type(model).__name__}",
                    "a forward that names the arguments it is given",
                    f"*args or **kwargs ({name})",
                    "Wrap it in a module whose forward(self, x, ...) calls it",
                )
            if not isinstance(value, torch.Tensor):
                raise ModelError(
                    f"example_inputs, argument {name!r}",
                    "a tensor",
                    type(value).__name__,
                    "Bind other arguments in a module of your own around the model",
                )
        self.defaults = {
            p.name: p.default
            for p in list(self.signature.parameters.values())[1:]
            if p.name not in self.values and p.default is not inspect.Parameter.empty
        }


def as_arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and named arguments from what a user hands over: a tensor, a tuple or list, or a dict by name."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    fix = "Pass a tensor, a tuple of tensors, or a dict of tensors by argument name; a batch of the usual shape"
    raise ModelError("example_inputs", "the inputs of one call of the model", type(example_inputs).__name__, fix)


def trace(model: nn.Module, inputs: Inputs) -> tuple[fx.Graph, frozenset[str]]:
    """The fx graph of a model in evaluation, and the names of the modules that act in training only.

    Raises:
        NotTraceable: control flow that depends on values or on the mode.
    """
    with in_mode(model, False):
        graph, names, constants = _trace_once(model, inputs)
    try:
        with in_mode(model, True):
            other = _trace_once(model, inputs, names, constants)[0]
        follow_mode(model, graph, other)
        _check_same(graph, other)
    except NotTraceable as error:
        for name in constants:
            delattr(model, name)
        raise NotTraceable(f"in training mode: {error}") from error
    return graph, names


def _check_same(graph: fx.Graph, other: fx.Graph) -> None:
    if _outline(graph) != _outline(other):
        raise NotTraceable("its forward does something else in training than in evaluation (it reads self.training)")


def _trace_once(
    model: nn.Module, inputs: Inputs, leaves: frozenset[str] = frozenset(), constants: dict | None = None
) -> Any:
    tracer = Tracer(inputs.values, constants)
    if leaves:
        own = tracer.is_leaf_module
        tracer.is_leaf_module = lambda m, name: name in leaves or own(m, name)  # type: ignore[method-assign]
    try:
        if is_composite(model):
            return _as_one_call(inputs), frozenset(), {}
        graph = tracer.trace(model, concrete_args=inputs.defaults or None)
    except Exception as error:  # whatever a user's code raises on symbolic values
        if constants is None:
            for name in tracer.constants:
                delattr(model, name)
        first = (str(error).strip().splitlines() or [""])[0]
        known = isinstance(error, NotTraceable)
        raise NotTraceable(first if known else f"{type(error).__name__}: {first}") from error
    _drop_defaults(graph, inputs)
    _out_of_place(graph, model)
    _dropouts_as_modules(graph)
    drop_unused(graph)
    return graph, frozenset(tracer.training_only), tracer.constants


def is_composite(model: nn.Module) -> bool:
    """Whether a model is itself a layer that is rewritten as the functions that it is made of."""
    from kquant_torch.expand import MODULES, load_expanders

    load_expanders()
    return type(model) in MODULES


def _as_one_call(inputs: Inputs) -> fx.Graph:
    """A graph that calls the model itself, which the expansion then replaces."""
    graph = fx.Graph()
    names = {name: graph.placeholder(name) for name in inputs.values}
    graph.output(graph.call_module("", (), names))
    return graph


def is_record(node: fx.Node) -> bool:
    """Whether a node makes a dataclass or a named tuple, in which a model gives its outputs."""
    made = node.target
    return node.op == "call_function" and isinstance(made, type) and (
        dataclasses.is_dataclass(made) or hasattr(made, "_fields")
    )  # fmt: skip


def drop_unused(graph: fx.Graph) -> None:
    """Remove nodes whose value nobody uses; none has an effect, since nothing is overwritten any more."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _outline(graph: fx.Graph) -> list[Any]:
    return [(n.op, n.target if n.op != "get_attr" else str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes]


def _drop_defaults(graph: fx.Graph, inputs: Inputs) -> None:
    """Arguments that were left at their defaults are constants of the graph; fx only checks that they are."""
    checks: list[fx.Node] = []
    for node in graph.nodes:
        is_left = node.op == "placeholder" and str(node.target).lstrip("*") not in inputs.values
        if is_left or any(n in checks for n in node.all_input_nodes):
            checks.append(node)
    for node in reversed(checks):
        graph.erase_node(node)


# -- in-place operations and functional dropout ---------------------------------------------------------------------

_INPLACE_OPERATORS = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.imatmul: operator.matmul, operator.ipow: operator.pow,
}  # fmt: skip


def _out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Operations that overwrite their first operand return a new tensor, which later uses of the operand read."""
    for node in list(graph.nodes):
        if not _overwrites(node, model):
            continue
        target = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(target, fx.Node):
            continue
        _check_alias(node, target)
        seen = False
        for user in list(graph.nodes):
            seen = seen or user is node
            if seen and user is not node:
                user.replace_input_with(target, node)


def _check_alias(node: fx.Node, target: fx.Node) -> None:
    """Writing into a view changes the tensor behind it, which must have no later use."""
    while target.op in ("call_function", "call_method") and _function_name(target) in VIEWS:
        base = target.args[0]
        if any(user is not target and node < user for user in base.users):
            raise NotTraceable(f"{node.name} writes into a part of {base.name}, which is used later")
        target = base


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _overwrites(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_function" and node.target is operator.setitem:
        raise NotTraceable("it assigns to a part of a tensor")
    if node.op == "call_function" and node.target in _INPLACE_OPERATORS:
        node.target = _INPLACE_OPERATORS[node.target]
        return True
    if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
        plain = node.target.rstrip("_")
        if plain != "requires_grad" and (not hasattr(torch.Tensor, plain) or plain in ("copy", "set")):
            raise NotTraceable(f"it calls {node.target}, which overwrites a tensor")
        if plain != "requires_grad":
            node.target = plain
            return True
    if node.op == "call_function" and getattr(node.target, "__name__", "").endswith("_"):
        plain = getattr(torch, node.target.__name__.rstrip("_"), None) or getattr(F, node.target.__name__[:-1], None)
        if plain is not None:
            node.target = plain
            return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        return True
    return node.op == "call_module" and bool(getattr(model.get_submodule(node.target), "inplace", False))


def _dropouts_as_modules(graph: fx.Graph) -> None:
    """Functional dropout reads the mode of its module once, when it is traced; these nodes follow it instead."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in DROPOUTS:
            args = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            args.apply_defaults()
            node.args = (args.arguments["input"], args.arguments["p"])
            node.kwargs = {"training": "follow"}


# -- values ---------------------------------------------------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs a graph and notes what each node gave."""

    def __init__(self, model: nn.Module, graph: fx.Graph, key: str):
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.key = key

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta[self.key] = pytree.tree_map(_described, leaves_of(value) if is_record(n) else value)
        return value

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return self.module.get_submodule(target).forward(*args, **kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in DROPOUTS:
            return args[0]
        return super().call_function(target, args, kwargs)


def leaves_of(value: Any) -> list[Any]:
    """All leaves of what a model gives: of tuples, lists and dicts, and of dataclasses in the order of fields."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves_of([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        else:
            found.append(leaf)
    return found


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of what a model gives, in its order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)]


class Described:
    """What is kept of a tensor that flowed through a node."""

    def __init__(self, value: torch.Tensor):
        self.shape, self.dtype = tuple(value.shape), value.dtype


def _described(value: Any) -> Any:
    return Described(value) if isinstance(value, torch.Tensor) else value


def propagate(model: nn.Module, graph: fx.Graph, values: Mapping[str, torch.Tensor]) -> None:
    """Note in `node.meta["value"]` what each node gives, and in `node.meta["other"]` what it gives for a larger batch.

    The model runs in evaluation mode without gradients. `other` is missing where it cannot run on another batch size.
    """
    ordered = [values[str(n.target)] for n in graph.nodes if n.op == "placeholder"]
    with in_mode(model, False), torch.no_grad():
        try:
            _Recorder(model, graph, "value").run(*ordered)
        except Exception as error:
            shapes = {k: tuple(v.shape) for k, v in values.items()}
            raise ModelError(
                "example_inputs",
                "inputs that the model can be called on",
                f"{shapes}; the model raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                "Pass a batch that the float model accepts",
            ) from error
        more = larger(values)
        with contextlib.suppress(Exception):
            _Recorder(model, graph, "other").run(*(more[str(n.target)] for n in graph.nodes if n.op == "placeholder"))
