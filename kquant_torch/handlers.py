"""Which handler reads a node: by the class of a module, or by the name of a function or method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kquant_torch.reader import Reader, Refused

Handler = Callable[..., Any]  # (reader, node, *arguments of the call) -> what `Reader.add` returned
MODULES: dict[type, Handler] = {}
FUNCTIONS: dict[str, Handler] = {}


def reads(*names: str) -> Callable[[Handler], Handler]:
    """Enter a handler for functions and methods by name; its arguments are those of the call, by torch's names."""

    def enter(handler: Handler) -> Handler:
        FUNCTIONS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def reads_module(*classes: type) -> Callable[[Handler], Handler]:
    """Enter a handler for modules: `(reader, node, module, *arguments of the call)`."""

    def enter(handler: Handler) -> Handler:
        MODULES.update(dict.fromkeys(classes, handler))
        return handler

    return enter


def function_name(node: fx.Node) -> str:
    """The name of a function or method without its underscores, or of the function that a module is read as."""
    if node.op == "call_module":
        return str(node.meta.get("function", node.target))
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return str(target).strip("_")


def handle(r: Reader, node: fx.Node) -> Any:
    """Read one node; what has no integer form becomes an opaque op with the reason."""
    from kquant_torch import read_functions, read_modules, read_shapes  # noqa: F401  they enter their handlers
    from kquant_torch.read_functions import read_unknown

    if "where" in node.meta:
        return opaque(r, node, f"{function_name(node)} at {node.meta['where']}, in code that torch.fx cannot trace")
    try:
        _check_dtype(node)
        if node.op == "call_module":
            return _module(r, node)
        handler = FUNCTIONS.get(function_name(node), read_unknown)
        try:
            return handler(r, node, *node.args, **node.kwargs)
        except TypeError as error:
            raise Refused(f"{function_name(node)} is called in a way that is not read ({error})") from error
    except Refused as error:
        return opaque(r, node, str(error))


def _check_dtype(node: fx.Node) -> None:
    """Numbers are float32, and are quantized; or whole, and are ids."""
    for value in pytree.tree_leaves(node.meta["value"]):
        dtype = getattr(value, "dtype", torch.float32)
        if dtype != torch.float32 and (dtype.is_floating_point or dtype.is_complex):
            raise Refused(f"it gives {dtype}, and integer kernels stand for float32")


def _module(r: Reader, node: fx.Node) -> Any:
    from kquant_torch.read_modules import read_unknown_module

    module = r.module(node)
    if str(node.target) in r.training_only:
        return r.add("identity", node, [node.args[0]], call=lambda values, float_weights=False: [values[0]])
    handler = MODULES.get(type(module), read_unknown_module)
    return handler(r, node, module, *node.args, **node.kwargs)


def opaque(r: Reader, node: fx.Node, reason: str) -> Any:
    """An op that can only stay float."""
    operands = [n for n in node.all_input_nodes if r.is_data(n) and isinstance(r.values[n], str)]
    place = {"where": node.meta["where"]} if "where" in node.meta else {}
    return r.add("opaque", node, operands, {"reason": reason, **place})
