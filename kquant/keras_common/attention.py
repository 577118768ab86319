"""Attention layers as their products and a softmax."""

from __future__ import annotations

import inspect
from typing import Any

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
    if len(query.shape) != 3 or len(layer._attention_axes) != 1:
        return "attention must be over one axis of (batch, length, features)"
    q = g.ops.transpose(twin(layer._query_dense, query), (0, 2, 1, 3))
    k = g.ops.transpose(twin(layer._key_dense, key), (0, 2, 3, 1))
    v = g.ops.transpose(twin(layer._value_dense, value), (0, 2, 1, 3))
    y, weights = _weighted(g, layer, g.ops.matmul(q, k), 1.0 / float(layer._key_dim) ** 0.5, v, layer._dropout)
    y = twin(layer._output_dense, g.ops.transpose(y, (0, 2, 1, 3)))
    return (y, weights) if bound.get("return_attention_scores") else y


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
