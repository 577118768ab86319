"""Attention layers as their products and a softmax."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from kquant.keras_common.composite import expands, twin
from kquant.keras_common.generation import Call, Generation

MASKED = "attention with masks (use_causal_mask too) has no integer form: the softmax kernel takes none"


def _is_masked(arguments: dict) -> bool:
    return any("mask" in name and value is not None and value is not False for name, value in arguments.items())


def _weighted(g: Generation, layer: Any, scores: Any, beta: float, value: Any, dropout: float) -> tuple[Any, Any]:
    """The softmax of scores and its product with the values."""
    weights = g.own.ScaledSoftmax(beta, name="scores", dtype=layer.dtype_policy)(scores)
    dropped = g.layers.Dropout(dropout, name="dropout", dtype=layer.dtype_policy)(weights) if dropout else weights
    return g.ops.matmul(dropped, value), weights


@expands("MultiHeadAttention")
def _multi_head(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    args, kwargs = call.fill(inputs)
    bound = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    if _is_masked(bound):
        return MASKED
    query, value = bound["query"], bound["value"]
    key = bound["key"] if bound.get("key") is not None else value
    rank, returned = len(query.shape), bool(bound.get("return_attention_scores"))
    if tuple(layer._attention_axes) != tuple(range(1, rank - 1)) or (rank > 3 and returned):
        return "attention is read over all axes between the batch and the features, and its scores over one of them"
    if rank > 3 and any(None in t.shape[1:] for t in (query, key)):
        return "attention over several axes needs known sizes"
    q = g.ops.transpose(_flat(g, twin(layer._query_dense, query), query), (0, 2, 1, 3))
    k = g.ops.transpose(_flat(g, twin(layer._key_dense, key), key), (0, 2, 3, 1))
    v = g.ops.transpose(_flat(g, twin(layer._value_dense, value), value), (0, 2, 1, 3))
    y, weights = _weighted(g, layer, g.ops.matmul(q, k), 1.0 / float(layer._key_dim) ** 0.5, v, layer._dropout)
    y = g.ops.transpose(y, (0, 2, 1, 3))
    if rank > 3:
        y = g.ops.reshape(y, (-1, *query.shape[1:-1], *y.shape[2:]))
    y = twin(layer._output_dense, y)
    return (y, weights) if returned else y


def _flat(g: Generation, x: Any, given: Any) -> Any:
    """(batch, lengths ..., heads, size) with one length; the lengths are those of what was given."""
    lengths = tuple(given.shape)[1:-1]
    return x if len(lengths) == 1 else g.ops.reshape(x, (-1, int(np.prod(lengths)), *tuple(x.shape)[-2:]))


@expands("Attention", "AdditiveAttention")
def _attention(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    args, kwargs = call.fill(inputs)
    bound = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    if _is_masked(bound) or getattr(layer, "causal", False):
        return MASKED
    query, value, *more = bound["inputs"]
    key = more[0] if more else value
    scores = _additive(g, layer, query, key) if _adds(layer) else _dots(g, layer, query, key)
    y, weights = _weighted(g, layer, scores, 1.0, value, layer.dropout)
    return (y, weights) if bound.get("return_attention_scores") else y


def _adds(layer: Any) -> bool:
    return type(layer).__name__ == "AdditiveAttention" or layer.score_mode == "concat"


def _dots(g: Generation, layer: Any, query: Any, key: Any) -> Any:
    scores = g.ops.matmul(query, g.ops.transpose(key, (0, 2, 1)))
    return scores if layer.scale is None else g.ops.multiply(scores, layer.scale)


def _additive(g: Generation, layer: Any, query: Any, key: Any) -> Any:
    """`sum(w * tanh(s * (query + key)))` over the features, of every query with every key."""
    total = g.ops.add(g.ops.expand_dims(query, -2), g.ops.expand_dims(key, -3))
    if type(layer).__name__ == "AdditiveAttention":
        shares = g.layers.Activation("tanh", name="tanh", dtype=layer.dtype_policy)(total)
        return g.ops.sum(g.ops.multiply(shares, layer.scale) if layer.use_scale else shares, axis=-1)
    total = total if layer.scale is None else g.ops.multiply(total, layer.scale)
    shares = g.layers.Activation("tanh", name="tanh", dtype=layer.dtype_policy)(total)
    return g.ops.multiply(g.ops.sum(shares, axis=-1), layer.concat_score_weight)
