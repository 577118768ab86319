"""Composite layers and functions, rewritten in the fx graph as the functions that they are made of.

The wrapped model trains exactly these, so what is exported is what was trained (a normalization, for instance, is the
chain of mean, difference, square, mean, reciprocal root and product, with a quantizer behind each).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn
from torch.utils import _pytree as pytree

from kquant_torch.handlers import function_name
from kquant_torch.reader import Reader
from kquant_torch.trace import Described, Inputs, drop_unused, propagate

Expander = Callable[..., Any]
NEVER = -1e4  # what is added to a score to leave it out: minus infinity, or a number as people write instead
FAMILIES = ("arithmetic", "attention", "layers", "norms", "pools", "resize", "select", "shapes", "transformer")
MODULES: dict[type, Expander] = {}
FUNCTIONS: dict[str, list[Expander]] = {}


class Site:
    """Where a composite is rewritten: its node, its module if it is one, and proxies for its parts."""

    def __init__(self, model: nn.Module, node: fx.Node, tracer: Any):
        self.model, self.node, self.tracer = model, node, tracer
        self.path = str(node.target) if node.op == "call_module" else ""
        self.module: Any = model.get_submodule(self.path) if node.op == "call_module" else None

    def _inside(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def node_proxy(self) -> fx.Proxy:
        """What the composite gives."""
        return fx.Proxy(self.node, self.tracer)

    def refuse(self, reason: str) -> None:
        """Leave the node as it is, for a reason that its refusal then states."""
        self.node.meta["reason"] = reason

    def batch_axis(self, proxy: fx.Proxy) -> int | None:
        """The axis of a tensor that follows the size of the batch; None where that is not known."""
        meta = proxy.node.meta
        if not isinstance(meta.get("other"), Described):
            return None
        pairs = zip(meta["value"].shape, meta["other"].shape, strict=True)
        found = [i for i, (a, b) in enumerate(pairs) if a != b]
        return found[0] if len(found) == 1 else None

    def shape(self, proxy: fx.Proxy) -> tuple[int, ...]:
        """The sizes of a proxy's tensor on the example inputs."""
        return tuple(proxy.node.meta["value"].shape)

    def parameter(self, name: str) -> Any:
        """A parameter of the module, or None."""
        if getattr(self.module, name, None) is None:
            return None
        return self.get(name)

    def get(self, path: str) -> Any:
        """An attribute by its path inside the module."""
        return fx.Proxy(self.node.graph.get_attr(self._inside(path)), self.tracer)

    def constant(self, value: torch.Tensor) -> Any:
        """A tensor that the rewriting makes: a buffer of the model that is not saved."""
        count = 0
        while hasattr(self.model, f"_constant_{count}"):
            count += 1
        first = next(iter([*self.model.parameters(), *self.model.buffers()]), value)
        self.model.register_buffer(f"_constant_{count}", value.to(first.device), persistent=False)
        return fx.Proxy(self.node.graph.get_attr(f"_constant_{count}"), self.tracer)

    def call(self, name: str, *args: Any) -> Any:
        """A call of a module inside the module."""
        nodes = tuple(a.node if isinstance(a, fx.Proxy) else a for a in args)
        return fx.Proxy(self.node.graph.call_module(self._inside(name), nodes), self.tracer)


def expands_module(*classes: type) -> Callable[[Expander], Expander]:
    """Enter an expander `(site, *arguments of the call) -> proxies`; None leaves the node as it is."""

    def enter(expander: Expander) -> Expander:
        MODULES.update(dict.fromkeys(classes, expander))
        return expander

    return enter


def expands(*names: str) -> Callable[[Expander], Expander]:
    """Enter an expander for functions and methods by name; the first that does not give None counts."""

    def enter(expander: Expander) -> Expander:
        for name in names:
            FUNCTIONS.setdefault(name, []).append(expander)
        return expander

    return enter


def load_expanders() -> None:
    """Import the modules that enter their expanders, which need this one."""
    for name in FAMILIES:
        importlib.import_module(f"kquant_torch.expand_{name}")


def expand(model: nn.Module, code: fx.Graph, inputs: Inputs) -> None:
    """Rewrite all composites of a graph, in place, until none is left."""
    load_expanders()
    found = [True]
    while any(found):
        propagate(model, code, inputs.values)
        found = [_expand_node(model, node) for node in list(code.nodes)]
        drop_unused(code)


def _expand_node(model: nn.Module, node: fx.Node) -> bool:
    expanders = [] if node._erased else _expanders(model, node)
    if not expanders or not isinstance(node.meta.get("value"), (Described, tuple, list)):
        return False
    if any("value" not in n.meta for n in node.all_input_nodes):
        return False  # it follows another composite; its turn comes when that one's parts have shapes
    tracer = fx.proxy.GraphAppendingTracer(node.graph)
    site = Site(model, node, tracer)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: fx.Proxy(n, tracer))
    previous = node.prev
    result = None
    with node.graph.inserting_before(node), contextlib.suppress(TypeError):
        result = next((r for e in expanders if (r := _tried(e, site, args, kwargs)) is not None), None)
        if result is None and node.op == "call_module" and not site.path:
            result = _as_function(site, args, kwargs)
    if result is None:
        return False
    last = node.prev
    while last is not previous:
        _note_origin(last, node, site)
        last = last.prev
    _replace(node, result)
    return True


def _tried(expander: Expander, site: Site, args: Any, kwargs: Any) -> Any:
    """What an expander gives; None for arguments that it does not know, which the reader then refuses by name."""
    try:
        inspect.signature(expander).bind(site, *args, **kwargs)
    except TypeError:
        return None
    return expander(site, *args, **kwargs)


def _expanders(model: nn.Module, node: fx.Node) -> list[Expander]:
    if node.op == "call_module":
        found = MODULES.get(type(model.get_submodule(str(node.target))))
        return [] if found is None else [found]
    return FUNCTIONS.get(function_name(node), []) if node.op in ("call_function", "call_method") else []


def _as_function(site: Site, args: Any, kwargs: Any) -> Any:
    """A model that is itself one layer, as the function of that layer, since its code cannot call itself."""
    from kquant_torch.read_modules import AS_FUNCTION

    name, attributes = AS_FUNCTION.get(type(site.module), (None, ()))
    if name is None:
        return None
    given = {a: getattr(site.module, a) for a in attributes}
    return site.tracer.create_proxy("call_function", getattr(F, name), args, {**kwargs, **given})


def _note_origin(part: fx.Node, node: fx.Node, site: Site) -> None:
    """Parts answer to the name and the type of the composite."""
    part.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    if "of" in node.meta:
        part.meta["of"] = node.meta["of"]
    elif site.module is not None:
        kind = type(site.module).__name__
        part.meta["of"] = (site.path or kind, kind)


def items_taken(node: fx.Node) -> set[Any] | None:
    """Which items of a tuple are used, by index or name; None if it is handed on as a whole."""
    taken = {user.args[1] for user in node.users if _takes_item(user) and user.users}
    return taken if all(map(_takes_item, node.users)) else None


def _takes_item(user: fx.Node) -> bool:
    return user.op == "call_function" and user.target in (operator.getitem, getattr)


def _replace(node: fx.Node, result: Any) -> None:
    """Put the results in the place of a node; those of a tuple in the place of its items."""
    if isinstance(result, fx.Proxy):
        node.replace_all_uses_with(result.node)
    else:
        for user in list(node.users):
            if _takes_item(user):
                _put(user, _bare(result[user.args[1]]))
                node.graph.erase_node(user)
            else:
                _put(node, tuple(map(_bare, result)), user)
    if not node.users:
        node.graph.erase_node(node)


def _bare(proxy: Any) -> Any:
    return proxy.node if isinstance(proxy, fx.Proxy) else proxy


def _put(node: fx.Node, value: Any, *users: fx.Node) -> None:
    """A node, a tuple of nodes or None in the place of a node, for all its users or for these."""
    for user in users or list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)


def is_parameter(proxy: Any) -> bool:
    """Whether a tensor is computed from parameters, buffers and constants; it may ask for the size of the batch."""
    if not isinstance(proxy, fx.Proxy):
        return False
    pending = [proxy.node]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        pending += [n for n in node.all_input_nodes if "value" not in n.meta or _is_tensor(n)]
    return True


def constant_value(site: Site, proxy: Any) -> torch.Tensor:
    """The present value of a tensor of parameters and constants."""
    return Reader(site.model, site.node.graph, frozenset(), ()).run(proxy.node, {})


def _is_tensor(node: fx.Node) -> bool:
    return any(isinstance(v, Described) for v in pytree.tree_leaves(node.meta["value"]))


def one_sample(site: Site, proxy: Any, axis: int = 0) -> Any:
    """A tensor of parameters for one sample, before it was expanded to the batch on `axis`; None for any other."""
    if not is_parameter(proxy):
        return None
    if function_name(proxy.node) in ("expand", "repeat", "tile"):
        node = proxy.node
        sizes = list(node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])
        source = fx.Proxy(node.args[0], site.tracer)
        if len(sizes) == len(site.shape(proxy)) and isinstance(sizes[axis], fx.Node):
            sizes[axis] = 1
            rest = [fx.Proxy(n, site.tracer) if isinstance(n, fx.Node) else n for n in sizes]
            return getattr(source, node.target)(*rest) if site.shape(source)[axis] == 1 else None
        if axis == 0 and site.shape(source)[1:] == site.shape(proxy)[1:]:
            proxy = source
    return proxy if site.shape(proxy)[axis] == 1 else None
