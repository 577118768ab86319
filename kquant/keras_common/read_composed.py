"""Operations of `keras.ops` that are read as compositions of others, which is what is trained and what is deployed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from kquant.keras_common.arguments import Arguments
from kquant.keras_common.generation import Call
from kquant.keras_common.read_ops import reads, refused, rewritten
from kquant.keras_common.reader import Reader

OVER_BATCH = "a reduction over the batch has no counterpart in the artifact"


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    return tuple(range(rank)) if axis is None else tuple(int(a) % rank for a in np.atleast_1d(axis))


def _variance(ops: Any, x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    centered = x - ops.mean(x, axis=axes, keepdims=True)
    return ops.mean(centered * centered, axis=axes, keepdims=keepdims)


def _log_sum(ops: Any, x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    """With the largest value apart, so that every power lies in (0, 1]."""
    powers = ops.exp(x - ops.max(x, axis=axes, keepdims=True))
    return ops.log(ops.sum(powers, axis=axes, keepdims=keepdims)) + ops.max(x, axis=axes, keepdims=keepdims)


def _moments(ops: Any, x: Any, axes: tuple[int, ...], keepdims: bool) -> list[Any]:
    return [ops.mean(x, axis=axes, keepdims=keepdims), _variance(ops, x, axes, keepdims)]


def _norm(ops: Any, x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    return ops.sqrt(ops.sum(x * x, axis=axes, keepdims=keepdims))


REDUCTIONS = {
    "Var": _variance,
    "Std": lambda ops, *args: ops.sqrt(_variance(ops, *args)),
    "Logsumexp": _log_sum,
    "Moments": _moments,
    "Norm": _norm,
}


@reads(*REDUCTIONS)
def _reduction(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if args.get("ord") not in (None, 2, "euclidean"):
        return refused(r, call, inputs, f"the norm of order {args['ord']!r} has no integer form")
    axes = _axes(args["axes"] if name == "Moments" else args["axis"], len(r.shape(inputs[0])))
    if 0 in axes:
        return refused(r, call, inputs, OVER_BATCH)
    return rewritten(r, call, inputs, lambda x: REDUCTIONS[name](r.operations, x, axes, bool(args["keepdims"])))


@reads("LogSoftmax")
def _log_softmax(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    axes = _axes(args["axis"], len(r.shape(inputs[0])))
    if 0 in axes:
        return refused(r, call, inputs, OVER_BATCH)
    return rewritten(r, call, inputs, lambda x: x - _log_sum(r.operations, x, axes, True))


@reads("Where")
def _where(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """With a constant mask: a product with its zeros and ones for either side, and their sum."""
    is_symbolic = r.generation.is_symbolic
    values = [args.get(k) for k in ("condition", "x1", "x2")]
    if is_symbolic(values[0]) or any(v is None or r.generation.is_variable(v) for v in values):
        return refused(r, call, inputs, "where needs a constant mask and two values; a mask of data is a comparison")
    mask = np.asarray(values[0], bool).astype(np.float32)
    mask = mask.reshape((1,) * (len(call.shape) - mask.ndim) + mask.shape)
    if mask.shape[0] != 1:
        return refused(r, call, inputs, "the mask of where must be the same for each of a batch")
    sides = list(zip(values[1:], (mask, 1.0 - mask), strict=True))

    def function(*xs: Any) -> Any:
        given = iter(xs if len(xs) == sum(map(is_symbolic, values)) else (xs[0], xs[0]))
        terms = [next(given) * share for v, share in sides if is_symbolic(v)]
        constants = [np.asarray(v, np.float32) * share for v, share in sides if not is_symbolic(v)]
        return functools.reduce(lambda a, b: a + b, [*terms, *(c for c in constants if c.any())])

    return rewritten(r, call, inputs, function)


@reads("Tril", "Triu")
def _triangle(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    shape = r.shape(inputs[0])[-2:]
    if len(r.shape(inputs[0])) < 3 or None in shape:
        return refused(r, call, inputs, f"the operation {name} needs matrices of known sizes")
    mask = getattr(np, name.lower())(np.ones(shape, np.float32), args["k"])[None]
    return rewritten(r, call, inputs, lambda x: x * mask)


@reads("Average")
def _average(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    rank = len(r.shape(inputs[0]))
    axes, weights = _axes(args["axis"], rank), args.get("weights")
    if 0 in axes or len(inputs) > 1 or r.generation.is_variable(weights):
        return refused(r, call, inputs, "an average needs constant weights, and not the batch")
    if weights is None:
        return rewritten(r, call, inputs, lambda x: r.operations.mean(x, axis=axes))
    shares = np.asarray(weights, np.float32)
    if shares.ndim == 1:
        shares = shares.reshape([-1 if i == axes[0] else 1 for i in range(rank)])
    total = np.broadcast_to(shares, [n or 1 for n in r.shape(inputs[0])]).sum(axis=axes, keepdims=True)
    return rewritten(r, call, inputs, lambda x: r.operations.sum(x * (shares / total), axis=axes))


@reads("Normalize")
def _normalize(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    epsilon = args.get("epsilon")
    if args["order"] != 2 or epsilon not in (None, 1e-12) or not hasattr(r.layers, "UnitNormalization"):
        return refused(r, call, inputs, "normalize is read with order=2 and its own epsilon")
    return rewritten(r, call, inputs, lambda x: r.layers.UnitNormalization(axis=args["axis"], name="unit")(x))


@reads("LayerNorm", "RMSNorm")
def _standardize(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """As the layers of the same name, where gamma and beta are absent: those of one's own are a product and a sum."""
    root = args.get("rms_scaling") or name == "RMSNorm"
    values = [args.get(k) for k in (("scale",) if name == "RMSNorm" else ("gamma", "beta"))]
    if any(v is not None for v in values) or (name == "LayerNorm" and root):
        return refused(r, call, inputs, f"the operation {name} is read without gamma and beta; multiply and add them")
    if _axes(args["axis"], len(r.shape(inputs[0]))) != (len(r.shape(inputs[0])) - 1,):
        return refused(r, call, inputs, "a normalization must be over the last axis")
    epsilon = args["epsilon"] or r.generation.keras.backend.epsilon()
    kind = r.layers.RMSNormalization if root else r.layers.LayerNormalization
    settings = {} if root else {"scale": False, "center": False}
    return rewritten(r, call, inputs, lambda x: kind(epsilon=epsilon, name="norm", **settings)(x))


# -- what moves values ----------------------------------------------------------------------------------------------


@reads("Repeat")
def _repeat(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    rank = len(r.shape(inputs[0]))
    axis = 0 if args["axis"] is None else args["axis"] % rank
    size = r.shape(inputs[0])[axis]
    if axis == 0 or size is None or len(inputs) > 1:
        return refused(r, call, inputs, "repeat needs a constant number, and another axis of known size than the batch")
    indices = np.repeat(np.arange(size), np.asarray(args["repeats"])).tolist()
    return rewritten(r, call, inputs, lambda x: r.operations.take(x, indices, axis=axis))


@reads("Rot90")
def _rot90(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    rank = len(r.shape(inputs[0]))
    first, second = (a % rank for a in args["axes"])
    if 0 in (first, second) or args["k"] % 2 == 0:  # Keras states another shape than it computes for half a turn
        return refused(r, call, inputs, "rot90 is read for a quarter turn of other axes than the batch; else use flip")
    order = list(range(rank))
    order[first], order[second] = second, first
    back = second if args["k"] % 4 == 1 else first
    key = tuple(slice(None, None, -1 if i == back else None) for i in range(rank))
    return rewritten(r, call, inputs, lambda x: r.operations.transpose(x[key], order))


@reads("Diff")
def _diff(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    axis = args["axis"] % len(r.shape(inputs[0]))
    if args["n"] != 1 or axis == 0:
        return refused(r, call, inputs, "diff is read with n=1, over another axis than the batch")
    before = (slice(None),) * axis
    return rewritten(r, call, inputs, lambda x: x[(*before, slice(1, None))] - x[(*before, slice(None, -1))])


@reads("Glu")
def _glu(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    axis = args["axis"] % len(r.shape(inputs[0]))
    half, before = r.shape(inputs[0])[axis] // 2, (slice(None),) * axis

    def function(x: Any) -> Any:
        return x[(*before, slice(None, half))] * r.operations.sigmoid(x[(*before, slice(half, None))])

    return rewritten(r, call, inputs, function)


@reads("Hstack")
def _hstack(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if len(r.shape(inputs[0])) < 2:
        return refused(r, call, inputs, "a concatenation along the batch has no counterpart in the artifact")
    return rewritten(r, call, inputs, lambda *xs: r.operations.concatenate(list(xs), 1))
