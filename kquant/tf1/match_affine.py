"""Sums and products: with a scale or an offset per channel, with a constant, of two tensors; and batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kquant.core.graph import Weight
from kquant.tf1.evaluate import BATCH_NORMS
from kquant.tf1.match import Found, Matcher, matches
from kquant.tf1.match_elementwise import dropped, region
from kquant.tf1.match_linear import NOT_CHANNELS_LAST, text, with_bias

Value = Callable[[], Any]

KINDS = {
    "Add": "add", "AddV2": "add", "BiasAdd": "add", "Sub": "sub", "Mul": "mul", "RealDiv": "div",
    "Maximum": "maximum", "Minimum": "minimum",
}  # fmt: skip


@matches(*KINDS)
def arithmetic(m: Matcher, op: Any, index: int) -> Found | str:
    """A sum, difference, product, quotient or extremum of two tensors, or of a tensor and a parameter."""
    kind = KINDS[op.type]
    found = dropped(m, op) or region(m, op)
    if found is not None:
        return found
    if op.type == "BiasAdd" and text(op, "data_format") != "NHWC":
        return NOT_CHANNELS_LAST
    a, b = op.inputs
    if not m.is_parameter(a) and not m.is_parameter(b):
        if kind == "div":
            return "a quotient of two tensors has no kernel that keeps its bound; multiply by a reciprocal"
        return Found(kind, (a, b), op.outputs[0], op)
    x, parameter, first = (b, a, True) if m.is_parameter(a) else (a, b, False)
    if m.is_of_a_flag(parameter):
        return m.of_a_flag(op.outputs[0])
    constant = m.static(parameter) if np.prod(parameter.shape.as_list() or [1], dtype=object) == 1 else None
    if constant is not None:
        return _with_constant(m, op, kind, x, np.asarray(constant), first)
    return _with_parameter(m, op, kind, x, parameter, first)


def _with_constant(m: Matcher, op: Any, kind: str, x: Any, value: np.ndarray, first: bool) -> Found | str:
    """One number: an operand of its own."""
    if kind == "div" and first:
        if value.size == 1:
            return Found("elementwise", (x,), op.outputs[0], op, {"fn": "reciprocal"})
        return "a constant vector divided by a tensor has no integer form"
    if kind == "div":
        kind = "mul"
        with np.errstate(divide="ignore"):
            value = np.float32(1.0) / value
    value = np.asarray(value, np.float32).reshape(value.shape or (1,))
    return Found(kind, (value, x) if first else (x, value), op.outputs[0], op)


def _with_parameter(m: Matcher, op: Any, kind: str, x: Any, parameter: Any, first: bool) -> Found | str:
    """Values per channel; a larger array can only be a constant operand."""
    channels = m.channels(x)
    shape = parameter.shape.as_list()
    size = int(np.prod(shape)) if None not in shape else 0
    per_channel = channels and size in (1, channels) and (not shape or shape[-1] == size)
    if not per_channel or op.outputs[0].shape.as_list() != x.shape.as_list() or kind in ("maximum", "minimum"):
        value = m.static(parameter)
        if kind == "div" and (first or value is None):
            return f"{op.type} with an array of shape {tuple(shape)} has no integer form"
        if value is None:
            m.read_by[parameter.name] = op
            return Found(kind, (parameter, x) if first else (x, parameter), op.outputs[0], op)
        return _with_constant(m, op, kind, x, np.asarray(value), first)
    if kind == "div" and first:
        return "a vector divided by a tensor has no integer form"
    biased = with_bias(m, op, x, parameter) if kind == "add" else None
    return biased or _affine(m, op, kind, x, parameter, first, channels)


def _affine(m: Matcher, op: Any, kind: str, x: Any, parameter: Any, first: bool, channels: int) -> Found:
    """`x * scale + offset`, joined with the one before it if there is one."""
    read = m.reader(parameter)

    def values() -> np.ndarray:
        return np.broadcast_to(np.asarray(read(), np.float64).reshape(-1), (channels,))

    steps: dict[str, tuple[Value, Value]] = {
        "add": (lambda: np.ones(channels), values),
        "sub": (lambda: -np.ones(channels), values) if first else (lambda: np.ones(channels), lambda: -values()),
        "mul": (values, lambda: np.zeros(channels)),
        "div": (lambda: 1.0 / values(), lambda: np.zeros(channels)),
    }
    factor, shift = steps[kind]
    factors = ((parameter, kind),) if kind in ("mul", "div") else ()
    before = m.match(x)
    if before.kind != "channel_affine" or not m.is_read_once(x, op):
        attrs = {"parameters": (parameter,), "factors": factors}
        return Found("channel_affine", (x,), op.outputs[0], op, attrs, _weights(channels, factor, shift))
    scale, offset = before.weights["scale"].read, before.weights["offset"].read
    joined = _weights(channels, lambda: scale() * factor(), lambda: offset() * factor() + shift())
    attrs = {key: (*before.attrs[key], *own) for key, own in (("parameters", (parameter,)), ("factors", factors))}
    return before.then(op, weights=joined, attrs=attrs)


def _weights(channels: int, scale: Value, offset: Value) -> dict[str, Weight]:
    return {"scale": Weight((channels,), scale), "offset": Weight((channels,), offset)}


@matches(*BATCH_NORMS)
def batch_norm(m: Matcher, op: Any, index: int) -> Found | str:
    """Fused batch norm, in the form of inference: a scale and an offset per channel."""
    x, gamma, beta, mean, variance = op.inputs
    if index:
        return "batch statistics have no counterpart in the artifact"
    if text(op, "data_format") != "NHWC":
        return NOT_CHANNELS_LAST
    trains = op.get_attr("is_training")
    epsilon = float(op.get_attr("epsilon"))
    if trains:
        names = [m.evaluator.statistics.get(t.name) for t in op.outputs[1:3]]
        if None in names:
            return (
                "it normalizes by its batch, and no op updates moving averages of that; build it with is_training=False"
            )
        mean, variance = op.outputs[1:3]
    read = [m.reader(t) for t in (gamma, beta, mean, variance)]

    def scale() -> np.ndarray:
        return np.asarray(read[0](), np.float64) / np.sqrt(np.asarray(read[3](), np.float64) + epsilon)

    def offset() -> np.ndarray:
        return np.asarray(read[1](), np.float64) - np.asarray(read[2](), np.float64) * scale()

    attrs = {"parameters": (gamma, beta, mean, variance), "factors": ((gamma, "mul"), (variance, "norm", epsilon))}
    return Found("channel_affine", (x,), op.outputs[0], op, attrs, _weights(int(gamma.shape[0]), scale, offset))
