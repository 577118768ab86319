"""Choosing by a constant mask, written out: what is kept is multiplied by one, what is left out by zero, and added.

The mask is a buffer, a constant, or made of those: with it the choice is a product, which integer kernels have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kquant_torch.expand import NEVER, Site, constant_value, expands, is_parameter
from kquant_torch.handlers import function_name

FILLED = {"zeros_like": 0.0, "new_zeros": 0.0, "ones_like": 1.0, "new_ones": 1.0}  # whatever they are called on


@expands("where")
def _where(site: Site, condition: Any, input: Any = None, other: Any = None) -> Any:
    return None if input is None or other is None else _chosen(site, condition, input, other)


@expands("masked_fill")
def _masked_fill(site: Site, input: Any, mask: Any, value: Any) -> Any:
    return _chosen(site, mask, value, input)


def _chosen(site: Site, mask: Any, yes: Any, no: Any) -> Any:
    """`yes` where the mask is True, else `no`; None where it follows the inputs, or leaves scores out of a softmax."""
    if not is_parameter(mask) or is_parameter(site.node_proxy()):
        return None
    keep = constant_value(site, mask)
    follows_batch = keep.ndim == len(site.node.meta["value"].shape) and keep.shape[0] != 1
    if keep.dtype != torch.bool or follows_batch:
        return None
    terms = [(_held(site, yes), keep), (_held(site, no), ~keep)]
    if any((value <= NEVER).any() for value, _ in terms if isinstance(value, torch.Tensor)):
        return None
    made, constant = [], torch.zeros(())
    for value, kept in terms:
        if isinstance(value, torch.Tensor):
            constant = constant + value * kept.float()
        else:
            made.append(value * site.constant(kept.float()))
    result = made[0] if len(made) == 1 else made[0] + made[1]
    return result + site.constant(constant) if constant.any() else result


def _held(site: Site, value: Any) -> Any:
    """The number or constant array that an operand is, else the operand."""
    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    node = value.node
    if node.op in ("call_function", "call_method") and function_name(node) in FILLED:
        return torch.tensor(FILLED[function_name(node)])
    if is_parameter(value) and not any(isinstance(v, torch.nn.Parameter) for v in _sources(site, node)):
        return constant_value(site, value).float()
    return value


def _sources(site: Site, node: fx.Node) -> list[Any]:
    """The parameters and buffers that a node is computed from."""
    found, pending = [], [node]
    while pending:
        node = pending.pop()
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            found.append(getattr(site.model.get_submodule(owner), name))
        pending += node.all_input_nodes
    return found
