"""Attention layers as their products and a softmax."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from kquant.keras_common.composite import expands, twin
from kquant.keras_common.generation import Call, Generation

MASKED = "attention with a mask that follows the model's inputs has no integer form: the softmax kernel takes none"
NOTHING = "attention with a mask that leaves nothing of a row has no integer form"
# What a constant mask leaves out has this score or less, where the others are seldom below -8: its weight is then below
# e^-8 of the largest, less than a tenth of the softmax kernel's unit. A lower one would coarsen the scores' 8 bits.
NEVER = -16.0


def _kept(g: Generation, arguments: dict, sizes: tuple) -> Any:
    """Which scores of a matrix of these sizes count: an array, None for all of them, or the reason why not."""
    causal = arguments.get("use_causal_mask")
    given = {k: v for k, v in arguments.items() if "mask" in k and k != "use_causal_mask" and v is not None}
    mask = given.pop("attention_mask", None)
    if given or g.is_symbolic(mask):
        return MASKED
    if mask is None and not causal:
        return None
    if None in sizes:
        return "attention with a mask needs known lengths"
    kept = np.ones(sizes, bool) if mask is None else np.asarray(mask).astype(bool)
    kept = np.broadcast_to(kept[:, None] if kept.ndim == 3 else kept, (1, 1, *sizes))
    kept = kept & np.tri(*sizes, dtype=bool) if causal else kept
    return kept if kept.any(-1).all() else NOTHING


def _weighted(
    g: Generation, layer: Any, scores: Any, beta: float, value: Any, dropout: float, kept: Any
) -> tuple[Any, Any]:
    """The softmax of the scores that are kept, and its product with the values."""
    if kept is not None:
        kept = kept if len(scores.shape) == 4 else kept[0]
        scores = g.ops.multiply(scores, np.where(kept, np.float32(1), np.float32(0)))
        scores = g.ops.add(scores, np.where(kept, np.float32(0), np.float32(NEVER / beta)))
    weights = g.own.ScaledSoftmax(beta, name="scores", dtype=layer.dtype_policy)(scores)
    dropped = g.layers.Dropout(dropout, name="dropout", dtype=layer.dtype_policy)(weights) if dropout else weights
    return g.ops.matmul(dropped, value), weights


@expands("MultiHeadAttention")
def _multi_head(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    args, kwargs = call.fill(inputs)
    bound = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    query, value = bound["query"], bound["value"]
    key = bound["key"] if bound.get("key") is not None else value
    kept = _kept(g, bound, (_length(query), _length(key)))
    if isinstance(kept, str):
        return kept
    rank, returned = len(query.shape), bool(bound.get("return_attention_scores"))
    if tuple(layer._attention_axes) != tuple(range(1, rank - 1)) or (rank > 3 and returned):
        return "attention is read over all axes between the batch and the features, and its scores over one of them"
    if rank > 3 and any(None in t.shape[1:] for t in (query, key)):
        return "attention over several axes needs known sizes"
    q = g.ops.transpose(_flat(g, twin(layer._query_dense, query), query), (0, 2, 1, 3))
    k = g.ops.transpose(_flat(g, twin(layer._key_dense, key), key), (0, 2, 3, 1))
    v = g.ops.transpose(_flat(g, twin(layer._value_dense, value), value), (0, 2, 1, 3))
    y, weights = _weighted(g, layer, g.ops.matmul(q, k), 1.0 / float(layer._key_dim) ** 0.5, v, layer._dropout, kept)
    y = g.ops.transpose(y, (0, 2, 1, 3))
    if rank > 3:
        y = g.ops.reshape(y, (-1, *query.shape[1:-1], *y.shape[2:]))
    if getattr(layer, "_use_gate", False):
        y = g.ops.multiply(y, twin(layer._gate_dense, query))
    y = twin(layer._output_dense, y)
    return (y, weights) if returned else y


def _length(x: Any) -> int | None:
    """The product of all sizes between the batch and the features, if they are known."""
    sizes = tuple(x.shape)[1:-1]
    return None if None in sizes else int(np.prod(sizes))


def _flat(g: Generation, x: Any, given: Any) -> Any:
    """(batch, lengths ..., heads, size) with one length; the lengths are those of what was given."""
    lengths = tuple(given.shape)[1:-1]
    return x if len(lengths) == 1 else g.ops.reshape(x, (-1, int(np.prod(lengths)), *tuple(x.shape)[-2:]))


@expands("Attention", "AdditiveAttention")
def _attention(g: Generation, layer: Any, inputs: list[Any], call: Call) -> Any:
    args, kwargs = call.fill(inputs)
    bound = inspect.signature(layer.call).bind(*args, **kwargs).arguments
    query, value, *more = bound["inputs"]
    key = more[0] if more else value
    masks = bound.get("mask") or ()
    if any(m is not None for m in masks) or getattr(layer, "causal", False):
        return MASKED
    kept = _kept(g, {"use_causal_mask": bound.get("use_causal_mask")}, (_length(query), _length(key)))
    if isinstance(kept, str):
        return kept
    scores = _additive(g, layer, query, key) if _adds(layer) else _dots(g, layer, query, key)
    y, weights = _weighted(g, layer, scores, 1.0, value, layer.dropout, kept)
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
