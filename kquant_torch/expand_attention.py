"""Attention, rewritten as its products and a softmax, which leaves out what a constant mask says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn

from kquant_torch.expand import NEVER, Site, constant_value, expands, expands_module, is_parameter, one_sample
from kquant_torch.functions import masked_softmax, scaled_softmax
from kquant_torch.handlers import function_name
from kquant_torch.modes import dropout_of
from kquant_torch.tracer import NotTraceable

# -- masks ----------------------------------------------------------------------------------------------------------


def _softmax(site: Site, scores: Any, beta: float, dim: int, mask: Any = None, keeps: bool = True) -> Any:
    """`softmax(beta * scores)`, with a mask: True (False unless `keeps`) where a score counts, or what is added to it.

    `dim` counts from the last axis, -1. None for a mask that follows the model's inputs, or leaves nothing of a row.
    """
    tracer = scores.tracer
    if mask is None:
        return tracer.create_proxy("call_function", scaled_softmax, (scores, float(beta), dim), {})
    if not is_parameter(mask):
        return None
    value = constant_value(site, mask)
    if value.dtype == torch.bool:
        keep, kept = (mask, value) if keeps else (torch.logical_not(mask), ~value)
    else:
        keep, kept = mask > NEVER, value > NEVER
        bias = torch.where(kept, value, torch.zeros_like(value))
        if bias.abs().max() > 0:
            scores = (scores if beta == 1.0 else scores * float(beta)) + (mask if kept.all() else site.constant(bias))
            beta = 1.0
        if kept.all():
            return tracer.create_proxy("call_function", scaled_softmax, (scores, float(beta), dim), {})
    whole = kept.reshape((1,) * (-dim - kept.ndim) + tuple(kept.shape))
    if not whole.any(dim).all():
        return None
    return tracer.create_proxy("call_function", masked_softmax, (scores, keep, float(beta), dim), {})


@expands("softmax")
def _softmax_of_masked(site: Site, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """A softmax of scores that were filled with minus infinity where a constant mask is True, or got it added."""
    node, name = input.node, function_name(input.node)
    given = [fx.Proxy(n, site.tracer) if isinstance(n, fx.Node) else n for n in node.args]
    rank = len(site.shape(input))
    if dim is None or dtype is not None or dim % rank == 0 or node.kwargs:
        return None
    dim = dim % rank - rank
    if name == "masked_fill" and len(given) == 3 and _is_never(given[2]):
        return _softmax(site, given[0], 1.0, dim, given[1], keeps=False)
    if name == "where" and len(given) == 3 and _is_never(given[2]):
        return _softmax(site, given[1], 1.0, dim, given[0])
    if name in ("add", "radd") and len(given) == 2:
        scores, mask = given if not is_parameter(given[0]) else given[::-1]
        if is_parameter(mask) and bool((constant_value(site, mask) <= NEVER).any()):
            return _softmax(site, scores, 1.0, dim, mask)
    return None


def _is_never(value: Any) -> bool:
    return isinstance(value, float | int) and value <= NEVER


@expands_module(nn.Softmax)
def _softmax_module(site: Site, input: Any) -> Any:
    return _softmax_of_masked(site, input, site.module.dim)


# -- attention ------------------------------------------------------------------------------------------------------


def _attention(
    site: Site, q: Any, k: Any, v: Any, scale: float, dropout: float = 0.0, mask: Any = None, keeps: bool = True
) -> tuple[Any, Any]:  # fmt: skip
    """What an attention gives, and its weights; None for a mask that follows the model's inputs."""
    weights = _softmax(site, torch.matmul(q, torch.transpose(k, -2, -1)), scale, -1, mask, keeps)
    if weights is not None and dropout:
        tracer = weights.tracer
        weights = tracer.create_proxy("call_function", F.dropout, (weights, dropout), {"training": "follow"})
    return (None, None) if weights is None else (torch.matmul(weights, v), weights)


@expands("scaled_dot_product_attention")
def _sdpa(
    site: Site, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    dropout = dropout_of(site.node)
    made = None
    if is_causal and attn_mask is None:
        sizes = site.shape(query)[-2], site.shape(key)[-2]
        attn_mask = site.constant(torch.ones(sizes, dtype=torch.bool).tril())
    if dropout_p == 0.0:
        scale = site.shape(query)[-1] ** -0.5 if scale is None else scale
        key, value = (_for_heads(site, x, site.shape(query)[-3]) if enable_gqa else x for x in (key, value))
        made, _ = _attention(site, query, key, value, scale, dropout, attn_mask)
    if made is None and dropout:
        raise NotTraceable("an attention drops out weights in training only, and its mask is not a constant")
    return made


def _for_heads(site: Site, x: Any, heads: int) -> Any:
    """Keys or values that several heads share, once for each of them."""
    axis, own = len(site.shape(x)) - 3, site.shape(x)[-3]
    places = torch.arange(own).repeat_interleave(heads // own)
    return x if own == heads else torch.index_select(x, axis, site.constant(places))


@expands_module(nn.MultiheadAttention)
def _multi_head(
    site: Site, query: Any, key: Any, value: Any, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    m = site.module
    reason = _why_not(site, query, key_padding_mask, attn_mask)
    if reason:
        return site.refuse(reason)
    size, heads, by_batch = m.embed_dim, m.num_heads, m.batch_first
    lengths = [site.shape(x)[1 if by_batch else 0] for x in (query, key, value)]
    parts = []
    for i, (x, length) in enumerate(zip((_of_each_sample(site, query, key), key, value), lengths, strict=True)):
        y = F.linear(x if by_batch else torch.transpose(x, 0, 1), *_projection(site, i))
        parts.append(torch.transpose(torch.reshape(y, (-1, length, heads, size // heads)), 1, 2))
    y, weights = _attention(site, *parts, (size // heads) ** -0.5, m.dropout, attn_mask, keeps=False)
    if y is None:
        return site.refuse("an attention whose mask follows the model's inputs has no integer form")
    y = torch.reshape(torch.transpose(y, 1, 2), (-1, lengths[0], size))
    out = F.linear(y, *(_child_parameter(site, "out_proj", n) for n in ("weight", "bias")))
    weights = None if not need_weights else torch.mean(weights, 1) if average_attn_weights else weights
    return (out if by_batch else torch.transpose(out, 0, 1), weights)


def _of_each_sample(site: Site, query: Any, key: Any) -> Any:
    """Queries that are parameters, the same for all samples, as a sum with zeros that follow the batch."""
    axis = 0 if site.module.batch_first else 1
    block = None if is_parameter(key) else one_sample(site, query, axis)
    if block is None or site.shape(query)[2] != site.shape(key)[2]:
        return query
    first = (slice(None), slice(0, 1)) if axis == 0 else (slice(0, 1),)
    return key[first] * 0.0 + block


def _projection(site: Site, index: int) -> tuple[Any, Any]:
    """The weight and the bias that queries (0), keys (1) or values (2) are multiplied with."""
    size, bias = site.module.embed_dim, site.parameter("in_proj_bias")
    rows = slice(index * size, (index + 1) * size)
    if site.module._qkv_same_embed_dim:
        weight = site.parameter("in_proj_weight")[rows]
    else:
        weight = site.parameter(("q_proj_weight", "k_proj_weight", "v_proj_weight")[index])
    return weight, None if bias is None else bias[rows]


def _why_not(site: Site, query: Any, padding: Any, mask: Any) -> str:
    """Why an attention layer stays as it is, or an empty string."""
    m, axis = site.module, 0 if site.module.batch_first else 1
    if padding is not None:
        return "an attention with key_padding_mask, which follows the model's inputs, has no integer form"
    if m.bias_k is not None or m.add_zero_attn:
        return "an attention with add_bias_kv or add_zero_attn has no integer form"
    if mask is not None and len(site.shape(mask)) != 2:
        return "an attention with a mask for each head has no integer form"
    if len(site.shape(query)) != 3 or site.batch_axis(query) not in (axis, None if m.batch_first else axis):
        return f"an attention of batch_first={m.batch_first} needs three axes with the samples on axis {axis}"
    return ""


def _child_parameter(site: Site, child: str, name: str) -> Any:
    if getattr(getattr(site.module, child), name) is None:
        return None
    return site.get(f"{child}.{name}")
