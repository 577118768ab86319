"""The fx tracer: what stays whole, tensors that a forward makes, and control flow that depends on sizes only."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from kquant_torch.functions import OURS, run_hooks, run_pre_hooks
from kquant_torch.state import Stateful

COMPOSITE = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What a forward may ask of a tensor without looking at its values.
FACTS = frozenset("shape ndim dtype device is_cuda layout size dim ndimension numel nelement is_floating_point".split())
# Makers of tensors, which see a symbolic size among their arguments only if they are wrapped.
MAKERS = "tensor as_tensor zeros ones full empty arange linspace logspace eye rand randn randint".split()


class NotTraceable(Exception):  # noqa: N818  a reason, not an error: such a model is wrapped module by module
    """Why fx cannot trace a model."""


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a module and all its parts in a mode, and each back as it was."""
    modes = {m: m.training for m in model.modules()}
    try:
        for m in modes:
            m.training = training
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def larger(values: Mapping[str, Any]) -> dict[str, Any]:
    """The example inputs with one sample more: what differs between the two follows the batch."""
    return {k: v if v.ndim == 0 else torch.cat([v, v[:1]]) for k, v in values.items()}


class _Known:
    """A symbolic value whose number may be asked for, where it depends on nothing but sizes."""

    tracer: Tracer
    node: fx.Node

    def __len__(self) -> int:
        return self.tracer.count(self.node)

    def __index__(self) -> int:
        return self.tracer.number(self.node, lambda v: v.__index__())

    def __int__(self) -> int:
        return self.tracer.number(self.node, int)

    def __float__(self) -> float:
        return self.tracer.number(self.node, float)


class KnownProxy(_Known, fx.Proxy):
    """A symbolic value of this tracer."""

    def __getattr__(self, k: str) -> Any:
        return KnownAttribute(self, k)


class KnownAttribute(_Known, fx.proxy.Attribute):
    """An attribute of a symbolic value."""


class Tracer(fx.Tracer):
    """Keeps whole: torch's layers, ours, and modules that act in training only. Reads parameters and buffers.

    Args:
        examples: inputs by name, on which control flow that asks for sizes is decided.
        constants: tensors that the forward made in an earlier trace, which it has to make again.
    """

    def __init__(self, examples: Mapping[str, Any] | None = None, constants: dict[str, torch.Tensor] | None = None):
        super().__init__(autowrap_functions=OURS)
        self.proxy_buffer_attributes = True
        self.training_only: set[str] = set()
        self.examples = {k: v.clone() for k, v in (examples or {}).items()}  # code may overwrite its inputs
        self.earlier, self.constants = constants, {} if constants is None else dict(constants)
        self._made: list[torch.Tensor] = []
        self._runs: list[dict[fx.Node, Any]] = []
        self._evaluating = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own layers, and ours."""
        if isinstance(m, Stateful) or type(m).__module__.startswith("kquant_torch."):
            return not getattr(type(m), "is_quantized_root", False)
        return super().is_leaf_module(m, module_qualified_name)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """The graph; makers of tensors with symbolic arguments are nodes of it."""
        with self._wrapped_makers():
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A symbolic value that knows its sizes."""
        return KnownProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        """A module of the user's that returns its input as it is in evaluation (drop path) is one node."""
        if self._evaluating:
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return self._hooked(m, forward, args, kwargs)
        before = len(self.graph.nodes)
        result = super().call_module(m, forward, args, kwargs)
        if args and result is args[0] and len(self.graph.nodes) == before and not isinstance(m, COMPOSITE):
            name = self.path_of_module(m)
            self.training_only.add(name)
            return self.create_proxy("call_module", name, args, kwargs)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """Parameters and buffers are symbolic, except while an example is run."""
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """A module as an argument is an attribute of the model, and so is a tensor that the forward made."""
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            return self.create_node("get_attr", self._constant(a), (), {})
        return super().create_arg(a)

    def _constant(self, value: torch.Tensor) -> str:
        """The name of a tensor that the forward made, the same in every trace; a buffer that is not saved."""
        at = next((i for i, v in enumerate(self._made) if v is value), len(self._made))
        name = f"_constant_{at}"
        if at == len(self._made):
            self._made.append(value)
            known = None if self.earlier is None else self.earlier.get(name)
            if self.earlier is None:
                self.constants[name] = value.detach()
                self.root.register_buffer(name, value.detach(), persistent=False)
            elif known is None or known.dtype != value.dtype or not torch.equal(known, value):
                raise NotTraceable("its forward makes a tensor with other values at each call, or in training")
        return name

    def _hooked(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        """A container with hooks: they run where its code begins and ends."""
        if len(args) != 1 or kwargs or m._backward_hooks or m._backward_pre_hooks:
            raise NotTraceable(f"{self.path_of_module(m)!r} has backward hooks, or hooks and several inputs")
        x = self.create_proxy("call_function", run_pre_hooks, (m, args[0]), {}) if m._forward_pre_hooks else args[0]
        hooks = m._forward_hooks, m._forward_pre_hooks
        m._forward_hooks, m._forward_pre_hooks = OrderedDict(), OrderedDict()
        try:
            # The closure that fx made holds the arguments before the hooks.
            y = super().call_module(m, lambda *a, **k: m.forward(*a, **k), (x,), {})
        finally:
            m._forward_hooks, m._forward_pre_hooks = hooks
        return self.create_proxy("call_function", run_hooks, (m, x, y), {}) if m._forward_hooks else y

    @contextlib.contextmanager
    def _wrapped_makers(self) -> Iterator[None]:
        own = {name: getattr(torch, name) for name in MAKERS}
        try:
            for name, function in own.items():
                setattr(torch, name, self._wrapped(function))
            yield
        finally:
            for name, function in own.items():
                setattr(torch, name, function)

    def _wrapped(self, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda v: found.append(v) if isinstance(v, fx.Proxy) else None)
            if not found or self._evaluating:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return call

    # -- numbers --------------------------------------------------------------------------------------------------

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A condition on sizes, dtypes or devices is decided on the example inputs."""
        return self.number(obj.node, bool)

    def iter(self, obj: fx.Proxy) -> Iterator:
        """The items of a split or a shape, as many as on the example inputs."""
        return iter([obj[i] for i in range(self.count(obj.node))]) if self.examples else super().iter(obj)

    def count(self, node: fx.Node) -> int:
        """The number of parts of a split, of axes in a shape, of items on the first axis of a tensor."""
        counts = {len(run[node]) if hasattr(run[node], "__len__") else -1 for run in self._evaluated()}
        if len(counts) != 1 or -1 in counts:
            raise NotTraceable("it iterates over the samples of a batch, or over what has no length")
        return counts.pop()

    def number(self, node: fx.Node, kind: Callable) -> Any:
        """A symbolic number, which depends on nothing but sizes and is the same for every batch size.

        Raises:
            NotTraceable: it depends on values or on the batch size.
        """
        runs = self._evaluated()
        if not runs or not all(self._by_sizes(node, run) for run in runs):
            raise NotTraceable("its control flow depends on the values of a tensor")
        numbers = [kind(run[node]) for run in runs]
        if any(n != numbers[0] for n in numbers):
            raise NotTraceable("its control flow depends on the size of the batch")
        return numbers[0]

    def _by_sizes(self, node: fx.Node, run: dict[fx.Node, Any]) -> bool:
        if node.target in FACTS or (node.target is getattr and node.args[1] in FACTS):
            return True
        if isinstance(run.get(node, _UNKNOWN), (torch.Tensor, _Unknown)):
            return False
        return node.op != "placeholder" and all(self._by_sizes(n, run) for n in node.all_input_nodes)

    def _evaluated(self) -> list[dict[fx.Node, Any]]:
        """What every node gives on the examples, and on a larger batch of them, as far as these run."""
        if not self._runs and self.examples:
            self._runs = [{}, {}]
        self._evaluating = True
        try:
            with in_mode(self.root, False), torch.no_grad(), torch.random.fork_rng(devices=[]):
                for run, values in zip(self._runs, (self.examples, larger(self.examples)), strict=False):
                    for node in self.graph.nodes:
                        if node not in run:
                            run[node] = self._value(node, run, values)
        finally:
            self._evaluating = False
        return self._runs

    def _value(self, node: fx.Node, run: dict[fx.Node, Any], values: Mapping[str, Any]) -> Any:
        if node.op == "placeholder":
            return values.get(str(node.target).lstrip("*"), _UNKNOWN)
        if any(isinstance(run[n], _Unknown) for n in node.all_input_nodes):
            return _UNKNOWN
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: run[n])
        try:
            if node.op == "get_attr":
                return _attribute(self.root, str(node.target))
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target)).forward(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # a batch of another size that the model does not take, for instance
            return _UNKNOWN


class _Unknown:
    """The value of a node that cannot be run."""


_UNKNOWN = _Unknown()


def _attribute(model: nn.Module, path: str) -> Any:
    """An attribute by its path; a copy of a tensor, since code may overwrite it."""
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value.clone() if isinstance(value, torch.Tensor) else value
