"""How operations on symbolic tensors are read, by the name that they have in `keras.ops`.

tf_keras has TensorFlow's functions instead; `kquant.keras2.symbols` gives each the name and arguments that it has here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.constants import ARITHMETIC
from kquant.core.graph import Weight
from kquant.keras_common.arguments import Arguments
from kquant.keras_common.functions import NAMED, is_elementwise
from kquant.keras_common.generation import Call
from kquant.keras_common.reader import Reader

OpHandler = Callable[[Reader, Call, list[str], str, Arguments], list[str]]
OPERATIONS: dict[str, OpHandler] = {}


def reads(*names: str) -> Callable[[OpHandler], OpHandler]:
    """Enter a handler for operations by name."""

    def enter(handler: OpHandler) -> OpHandler:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def read_operation(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """Read one call of an operation; an unknown one that proves elementwise is a table, another one is refused."""
    handler = OPERATIONS.get(name)
    if handler is not None:
        mark = r.mark()
        outputs = handler(r, call, inputs, name, args)
        lost = args.left()
        if not lost or any(op.kind == "opaque" for op in r.ops[mark[0] :]):
            return outputs
        r.undo(mark)
        return refused(r, call, inputs, f"{name} is not read with {', '.join(lost)} other than by default")
    shown = name or call.layer.name
    if len(inputs) == 1 and call.shape == r.generation.shape(call.inputs[0]) and _elementwise(call):
        return add(r, call, inputs, "elementwise", {"fn": f"keras.ops.{shown}"})
    return refused(r, call, inputs, f"the operation {shown} has no integer form on the target")


def _elementwise(call: Call) -> bool:
    return is_elementwise(lambda x: call.invoke(call.layer, [x]))


def add(r: Reader, call: Call, inputs: list[str], kind: str, attrs: dict | None = None) -> list[str]:
    """One op for the call. Its inputs may include constants, which the call already holds."""
    dynamic = [i for i, t in enumerate(inputs) if r.tensors[t].constant is None]
    source = r.operation(call)

    def run(values: Any, float_weights: bool = False) -> list[Any]:
        kept = [tf.convert_to_tensor(values[i]) for i in dynamic]
        return r.generation.tree.flatten(call.invoke(call.layer, kept))

    return r.add(kind, call.layer, inputs, call.shapes, source, attrs=attrs, call=run)


def refused(r: Reader, call: Call, inputs: list[str], reason: str) -> list[str]:
    """The call as an op that can only stay in float."""
    return add(r, call, inputs, "opaque", {"reason": reason})


def rewritten(r: Reader, call: Call, inputs: list[str], function: Callable) -> list[str]:
    """Read `function(*symbolic inputs)` in the call's place."""
    g = r.generation
    symbolic = [g.input(g.shape(t), g.dtype(t)) for t in call.inputs]
    parts = g.keras.Model(symbolic, g.tree.flatten(function(*symbolic)))
    path = "/".join((*r.scope.path, call.layer.name))
    with r.inside(call.layer.name, (path, type(call.layer).__name__)):
        return r.function(parts, inputs)


# -- arithmetic -----------------------------------------------------------------------------------------------------

BINARY = {
    "Add": "add", "Subtract": "sub", "Multiply": "mul", "Maximum": "maximum", "Minimum": "minimum",
    "Divide": "div", "TrueDivide": "div",
}  # fmt: skip


@reads(*BINARY)
def _binary(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    kind = BINARY[name]
    pair = [args["x1"], args["x2"]]
    if any(r.generation.is_variable(v) for v in pair):
        return _with_variable(r, call, inputs, kind, pair)
    symbolic = [r.generation.is_symbolic(v) for v in pair]
    if all(symbolic):
        if kind == "div":
            return rewritten(r, call, inputs, lambda a, b: r.operations.multiply(a, r.operations.reciprocal(b)))
        return add(r, call, [inputs[0], inputs[-1]], kind)
    position = symbolic.index(False)
    value = np.asarray(pair[position], np.float32)
    if kind == "div":
        if position == 0:
            return (
                add(r, call, inputs, "elementwise", {"fn": "reciprocal"})
                if value.size == 1
                else refused(r, call, inputs, "a constant vector divided by a tensor has no integer form")
            )
        if value.size > 1:
            return rewritten(r, call, inputs, lambda x: r.operations.multiply(x, np.float32(1.0) / value))
        kind, value = "mul", np.float32(1.0) / value
    if value.size > 1 and value.size == value.shape[-1] == r.shape(inputs[0])[-1]:
        return _per_channel(r, call, inputs, kind, value.ravel().astype(np.float64), position)
    constant = r.constant(value.reshape(value.shape or (1,)), call.layer.name)
    operands = [constant, inputs[0]] if position == 0 else [inputs[0], constant]
    return add(r, call, operands, kind)


def _per_channel(r: Reader, call: Call, inputs: list[str], kind: str, value: np.ndarray, position: int) -> list[str]:
    """A vector over the last axis: a scale or an offset per channel, which the artifact holds exactly."""
    if kind not in ("mul", "add", "sub"):
        constant = r.constant(value.astype(np.float32), call.layer.name)
        return add(r, call, [constant, inputs[0]] if position == 0 else [inputs[0], constant], kind)
    scale = value if kind == "mul" else np.full(value.size, -1.0 if kind == "sub" and position == 0 else 1.0)
    offset = np.zeros(value.size) if kind == "mul" else -value if kind == "sub" and position == 1 else value
    weights = {"scale": Weight(scale.shape, lambda: scale), "offset": Weight(offset.shape, lambda: offset)}
    source = r.operation(call)
    return r.add("channel_affine", call.layer, inputs, call.shapes, source, weights=weights)


def _with_variable(r: Reader, call: Call, inputs: list[str], kind: str, pair: list[Any]) -> list[str]:
    """Arithmetic with a trainable array: exactly where it is a scale or an offset per channel, else on its grid."""
    first = r.generation.is_variable(pair[0])
    variable = pair[0] if first else pair[1]
    shape, rank = tuple(variable.shape), len(call.shape)
    if kind not in ARITHMETIC or len(shape) > rank or (len(shape) == rank and shape[0] != 1):
        return refused(r, call, inputs, f"{kind} with a trainable array of shape {shape} has no integer form")
    channels, size = r.shape(inputs[0])[-1], int(np.prod(shape))  # a single value stays one: a vector would train apart
    per_channel = kind != "sub" and size == channels and shape[-1:] == (channels,)
    dtype = call.layer.dtype_policy if hasattr(call.layer, "dtype_policy") else None

    def make() -> Any:
        if per_channel:
            return r.own.ChannelAffine(kind == "mul", kind == "add", name="affine", dtype=dtype)
        return r.own.TrainedOperand(kind, shape, first, name="operand", dtype=dtype)

    values = np.asarray(variable).ravel() if per_channel else np.asarray(variable)
    return trained(r, call, inputs, variable, (kind, first), make, values)


def trained(
    r: Reader, call: Call, inputs: list[str], variable: Any, use: Any, make: Callable, values: np.ndarray
) -> list[str]:
    """Read a call with a trainable array as a layer of that array; all calls with it share the layer.

    Args:
        r, call, inputs: as in a handler.
        variable: the array.
        use: what is done with it, the same in all calls.
        make: makes the layer.
        values: of its only weight.
    """
    _, before, layer = r.trained.get(id(variable), (variable, use, None))
    if before != use:
        name = getattr(variable, "name", "")
        return refused(r, call, inputs, f"the trainable array {name!r} is used by two different operations")
    fresh = layer is None
    layer = make() if fresh else layer
    r.trained[id(variable)] = variable, use, layer

    def function(x: Any) -> Any:
        y = layer(x)
        if fresh:
            layer.trainable = bool(variable.trainable)
            layer.set_weights([values])
        return y

    return rewritten(r, call, inputs, function)


def with_array(
    r: Reader,
    call: Call,
    inputs: list[str],
    operand: Any,
    use: Any,
    make: Callable,
    values: np.ndarray,
    apply: Callable | None = None,
) -> list[str]:
    """Read a call with an array as a layer of it: a trainable one as `trained` does, a constant one stands still.

    Args:
        r, call, inputs, use, make, values: as of `trained`.
        operand: the array.
        apply: of a constant one, (x, layer) -> the result; by default the layer's.
    """  # fmt: skip
    if r.generation.is_variable(operand):
        return trained(r, call, inputs, operand, use, make, values)

    def function(x: Any) -> Any:
        layer = make()
        y = apply(x, layer) if apply else layer(x)
        layer.set_weights([values])
        layer.trainable = False
        return y

    return rewritten(r, call, inputs, function)


@reads("AddN")
def _add_n(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    return rewritten(r, call, inputs, lambda *xs: functools.reduce(r.operations.add, xs))


@reads("SquaredDifference")
def _squared_difference(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    b = args["x2"]
    if len(inputs) == 1 and r.generation.is_symbolic(b):
        return refused(r, call, inputs, "a squared difference from a constant is read with the tensor first")

    def function(*xs: Any) -> Any:
        difference = r.operations.add(xs[0], r.operations.multiply(xs[1] if len(xs) > 1 else b, -1.0))
        return r.operations.multiply(difference, difference)

    return rewritten(r, call, inputs, function)


# -- activations ----------------------------------------------------------------------------------------------------


@reads("Relu", "Relu6", "Sigmoid", "Tanh")
def _named(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    kind, attrs = NAMED[name.lower()]
    return add(r, call, inputs, kind, dict(attrs))


@reads("Gelu")
def _gelu(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    return add(r, call, inputs, "elementwise", {"fn": "gelu_tanh" if args["approximate"] else "gelu"})


@reads("Softmax")
def _softmax(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if not isinstance(args["axis"], int):
        return refused(r, call, inputs, "softmax over several axes has no kernel; reshape them to one")
    return add(r, call, inputs, "softmax", {"axis": args["axis"]})


@reads("Clip")
def _clip(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    low, high = args["x_min"], args["x_max"]
    if np.ndim(low) or np.ndim(high) or r.generation.is_symbolic(low) or r.generation.is_symbolic(high):
        return refused(r, call, inputs, "a clip with limits per element has no integer form")
    if low == 0 and high is not None and high > 0:
        return add(r, call, inputs, "relu", {"max": float(high), "fn": "relu"})
    return add(r, call, inputs, "elementwise", {"fn": "clip"})


@reads("Cast")
def _cast(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if "float" not in str(args["dtype"]):
        return refused(r, call, inputs, "a cast to integers is not a quantizable op")
    return add(r, call, inputs, "identity")


@reads("StopGradient", "Identity")
def _identity(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    return add(r, call, inputs, "identity")
