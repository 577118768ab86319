"""Functions that a forward tells its mode: attention with dropout, batch norm. In the graph they follow the model's."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kquant_torch.functions import norm_of

ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DROPOUT = "dropout"  # in a node's meta: the dropout of an attention's weights in training
STATISTICS = ("running_mean", "running_var", "weight", "bias")


def follow_mode(model: nn.Module, graph: fx.Graph, other: fx.Graph) -> None:
    """Make the nodes equal that differ between evaluation (`graph`) and training (`other`) only as their mode demands.

    An attention keeps its dropout in `node.meta`; a batch norm becomes a call of `norm_of`, which asks its module.
    """
    nodes, others = list(graph.nodes), list(other.nodes)
    if len(nodes) != len(others):
        return
    for node, twin in zip(nodes, others, strict=True):
        if node.op != "call_function" or node.target is not twin.target:
            continue
        if node.target is F.scaled_dot_product_attention:
            _attention(node, twin)
        elif node.target is F.batch_norm:
            _batch_norm(model, node, twin)


def _attention(node: fx.Node, twin: fx.Node) -> None:
    (mine, p), (theirs, q) = (_without_dropout(n) for n in (node, twin))
    if p == 0.0 and isinstance(q, float | int):
        node.kwargs, twin.kwargs = mine, theirs
        node.args, twin.args = node.args[:3], twin.args[:3]
        node.meta[DROPOUT] = float(q)


def _without_dropout(node: fx.Node) -> tuple[dict[str, Any], Any]:
    given = {**dict(zip(ATTENTION, node.args, strict=False)), **node.kwargs}
    return {k: v for k, v in given.items() if k not in ATTENTION[:3] and k != "dropout_p"}, given.get("dropout_p", 0.0)


def _batch_norm(model: nn.Module, node: fx.Node, twin: fx.Node) -> None:
    mine, theirs = (inspect.signature(F.batch_norm).bind(*n.args, **n.kwargs) for n in (node, twin))
    for bound in (mine, theirs):
        bound.apply_defaults()
    module, path = _owner(model, mine.arguments)
    if mine.arguments["training"] or module is None or module.eps != mine.arguments["eps"]:
        return
    for n, bound in ((node, mine), (twin, theirs)):
        with n.graph.inserting_before(n):
            held = n.graph.create_node("get_attr", path, (), {})
        n.target, n.args, n.kwargs = norm_of, (held, bound.arguments["input"]), {}


def _owner(model: nn.Module, arguments: Any) -> tuple[Any, str]:
    """The batch norm whose statistics and parameters a call uses, and its path."""
    found = [arguments[name] for name in STATISTICS]
    if not isinstance(found[0], fx.Node) or found[0].op != "get_attr":
        return None, ""
    path = str(found[0].target).rpartition(".")[0]
    module = model.get_submodule(path)
    for name, value in zip(STATISTICS, found, strict=True):
        held = f"{path}.{name}" if path else name
        if not (value is None and getattr(module, name, None) is None) and getattr(value, "target", None) != held:
            return None, ""
    usual = isinstance(module, _BatchNorm) and module.momentum is not None
    return (module, path) if usual else (None, "")


def dropout_of(node: fx.Node) -> float:
    """The dropout of an attention's weights in training."""
    return float(node.meta.get(DROPOUT, 0.0))
