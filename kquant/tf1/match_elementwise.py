"""Elementwise functions: single ops, functions written out in several ops, and what acts in training only."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.tf1 import marks
from kquant.tf1.match import Found, Matcher, matches, unchanged

# Functions of one op, by what the placement rules call them.
UNARY = {
    "LeakyRelu": "leaky_relu", "Elu": "elu", "Selu": "selu", "Softplus": "softplus", "Softsign": "softsign",
    "Abs": "abs", "Square": "square", "Sqrt": "sqrt", "Rsqrt": "rsqrt", "Exp": "exponential", "Expm1": "expm1",
    "Log": "log", "Log1p": "log1p", "Neg": "negative", "Sin": "sin", "Cos": "cos", "Tan": "tan", "Atan": "atan",
    "Asinh": "asinh", "Sinh": "sinh", "Cosh": "cosh", "Erf": "erf", "Erfc": "erfc", "Reciprocal": "reciprocal",
    "Inv": "reciprocal", "Sign": "sign", "Floor": "floor", "Ceil": "ceil", "Round": "round", "Rint": "rint",
}  # fmt: skip
NAMED = {"Relu": None, "Relu6": 6.0}
FIXED = {"Sigmoid": "sigmoid", "Tanh": "tanh"}
_BINARY = ("Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "Pow", "SquaredDifference")
_COMPARED = ("Greater", "GreaterEqual", "Less", "LessEqual")
_SELECTED = ("Select", "SelectV2")
_INSIDE = frozenset((*UNARY, *NAMED, *FIXED, *_BINARY, *_COMPARED, *_SELECTED, "Identity", "IdentityN"))
LONGEST = 24  # ops of a function that is written out

RANDOM = (
    "RandomUniform", "RandomStandardNormal", "TruncatedNormal", "StatelessRandomUniform", "StatelessRandomUniformV2",
    "StatelessRandomNormal", "StatelessRandomNormalV2",
)  # fmt: skip
_MASKING = ("GreaterEqual", "Greater", "Less", "LessEqual", "Cast", "Floor", "Add", "AddV2", "Mul", "Sub", "Identity")


@matches(*UNARY)
def unary(m: Matcher, op: Any, index: int) -> Found:
    """An elementwise function of one tensor, with the arithmetic before it: `rsqrt(variance + epsilon)` is one."""
    source, reader, names = op.inputs[0], op, []
    while source.op.type in _BINARY and _height(m, source) and m.is_read_once(source, reader):
        data = [t for t in source.op.inputs if not m.is_parameter(t)]
        if len(data) != 1 or data[0].shape.as_list() != source.shape.as_list():
            break
        names.append(source.op.name)
        source, reader = data[0], source.op
    fn = UNARY[op.type] if not names else f"{op.name} of several ops"
    return Found("elementwise", (source,), op.outputs[0], op, {"fn": fn}, aliases=tuple(names))


@matches(*NAMED)
def relu(m: Matcher, op: Any, index: int) -> Found:
    """ReLU, with its upper limit."""
    return Found("relu", (op.inputs[0],), op.outputs[0], op, {"max": NAMED[op.type], "fn": "relu"})


@matches(*FIXED)
def fixed(m: Matcher, op: Any, index: int) -> Found:
    """Functions with a kernel of prescribed output parameters."""
    return Found(FIXED[op.type], (op.inputs[0],), op.outputs[0], op)


@matches("Pow", "SquaredDifference")
def power(m: Matcher, op: Any, index: int) -> Found | str:
    """A power with a constant exponent is a function of one tensor."""
    found = region(m, op)
    data = [t for t in op.inputs if not m.is_parameter(t)]
    if found is not None:
        return found
    if len(data) == 1 and all(_is_number(m, t) for t in op.inputs if m.is_parameter(t)):
        return Found("elementwise", (data[0],), op.outputs[0], op, {"fn": op.type.lower()})
    return f"{op.type} of two tensors has no integer form"


# -- functions of several ops ---------------------------------------------------------------------------------------


def region(m: Matcher, op: Any) -> Found | None:
    """A function of one tensor that is written out and meets itself again, such as `x * sigmoid(x)`.

    The ops between are walked back, the latest first, until a single tensor is left. Operands beside it must be single
    numbers, and nothing else may read what lies between.
    """
    tensors = {t.name: t for t in op.inputs if not m.is_parameter(t)}
    inner: list[Any] = []
    if not all(m.is_parameter(t) is False or _is_number(m, t) for t in op.inputs):
        return None
    while len(tensors) > 1 and len(inner) < LONGEST:
        name = max(tensors, key=lambda n: _height(m, tensors[n]))
        tensor = tensors.pop(name)
        if not _height(m, tensor) or not _can_vanish(m, tensor, op):
            return None
        inner.append(tensor)
        sources = [tensor.op.inputs[0]] if tensor.op.type == "IdentityN" else list(tensor.op.inputs)
        tensors.update({t.name: t for t in sources if not m.is_parameter(t)})
    own = {op.name, *(t.op.name for t in inner)}
    if len(tensors) != 1 or not inner or any(not _is_read_in(m, t, own) for t in inner):
        return None
    (root,) = tensors.values()
    same = root.shape.as_list() == op.outputs[0].shape.as_list()
    return Found("elementwise", (root,), op.outputs[0], op, {"fn": f"{op.name} of several ops"}) if same else None


def _can_vanish(m: Matcher, tensor: Any, last: Any) -> bool:
    """Whether a tensor may disappear inside a function: single numbers beside it, and its shape that of the result."""
    if any(m.is_parameter(t) and not _is_number(m, t) for t in tensor.op.inputs):
        return False
    return bool(tensor.shape.as_list() == last.outputs[0].shape.as_list())


def _is_read_in(m: Matcher, tensor: Any, ops: set[str]) -> bool:
    """Whether nothing but some ops reads a tensor."""
    return all(op.name in ops for op in tensor.consumers() if m.readers(op))


def _height(m: Matcher, tensor: Any, limit: int = LONGEST) -> int:
    """How many elementwise ops lie behind a tensor, 0 if it does not come from one."""
    if tensor.name not in m.heights:
        m.heights[tensor.name] = _measured(m, tensor, limit)
    return m.heights[tensor.name]


def _measured(m: Matcher, tensor: Any, limit: int) -> int:
    op = tensor.op
    if op.type not in _INSIDE or not limit or marks.of(op) is not None or dropped(m, op) is not None:
        return 0
    data = [t for t in op.inputs if not m.is_parameter(t)]
    if not data or any(m.is_parameter(t) and not _is_number(m, t) for t in op.inputs):
        return 0
    return 1 + max(_height(m, t, limit - 1) for t in data)


def _is_number(m: Matcher, tensor: Any) -> bool:
    shape = tensor.shape.as_list() if tensor.shape.rank is not None else [None]
    return None not in shape and int(np.prod(shape)) == 1 and m.static(tensor) is not None


# -- what acts in training only -------------------------------------------------------------------------------------


def dropped(m: Matcher, op: Any) -> Found | None:
    """Dropout and added noise: the tensor without them."""
    if op.type in ("Mul", "Add", "AddV2"):
        sides = list(op.inputs)
        for x, mask in (sides, sides[::-1]):
            if not m.is_parameter(x) and is_random(mask) and not is_random(x):
                return _identity(op, _unscaled(m, x, mask) if op.type == "Mul" else x)
    if op.type in ("Select", "SelectV2") and is_random(op.inputs[0]):
        return _identity(op, _unscaled(m, op.inputs[1], op.inputs[0]))
    return None


@matches("Select", "SelectV2")
def select(m: Matcher, op: Any, index: int) -> Found | str:
    """A selection by random numbers is dropout; one by the tensor's own values is a function of it."""
    return dropped(m, op) or region(m, op) or "a selection by the values of another tensor has no integer form"


def _unscaled(m: Matcher, x: Any, mask: Any) -> Any:
    """The tensor before dropout's factor `1 / keep_prob`; another factor is the model's own."""
    op = x.op
    if op.type not in ("Mul", "RealDiv"):
        return x
    numbers = [t for t in op.inputs if not t.shape.rank]  # a rate that is fed may have no known shape
    others = [t for t in op.inputs if t.shape.rank]
    divides = op.type == "RealDiv"
    if len(numbers) != 1 or m.is_parameter(others[0]) or (divides and op.inputs[1] is not numbers[0]):
        return x
    return others[0] if _is_of_the_rate(m, numbers[0], divides, mask) else x


def _is_of_the_rate(m: Matcher, number: Any, divides: bool, mask: Any) -> bool:
    """Whether a factor, or a divisor, is made of what a mask of random numbers is made of, or is its inverse share."""
    behind = _behind(mask)
    if {t.name for t in _behind(number)} & {t.name for t in behind if t.op.type != "Const"}:
        return True
    factor = m.static(number)
    shares = [] if factor is None else [m.static(t) for t in behind if t.op.type == "Const"]
    kept = [float(k) for s in shares if np.size(s) == 1 for k in (np.ravel(s)[0], 1.0 - np.ravel(s)[0])]
    return any(abs(k - factor if divides else k * factor - 1.0) < 1e-4 for k in kept)


def _behind(tensor: Any) -> list[Any]:
    """A tensor and all that it is computed from, other than the shapes of random numbers."""
    found, todo = {}, [tensor]
    while todo:
        t = todo.pop()
        if t.name not in found:
            found[t.name] = t
            todo += [] if t.op.type in RANDOM else list(t.op.inputs)
    return [t for t in found.values() if t.dtype.is_floating]


def _identity(op: Any, source: Any) -> Found:
    return Found("identity", (source,), op.outputs[0], op, call=unchanged)


def is_random(tensor: Any, depth: int = 6) -> bool:
    """Whether a tensor is made of random numbers."""
    op = tensor.op
    if op.type in RANDOM:
        return True
    return bool(depth) and op.type in _MASKING and any(is_random(t, depth - 1) for t in op.inputs)
