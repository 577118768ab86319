"""How `keras.ops` operations on symbolic tensors are read, by the name of their class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kquant.core.graph import Weight
from kquant.keras3.functions import NAMED, is_elementwise
from kquant.keras3.norms import ChannelAffine
from kquant.keras3.read import Reader, _fill

OpHandler = Callable[[Reader, Any, list[str], dict], list[str]]
OPERATIONS: dict[str, OpHandler] = {}


def reads(*names: str) -> Callable[[OpHandler], OpHandler]:
    """Enter a handler for operation classes by name."""

    def enter(handler: OpHandler) -> OpHandler:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def read_operation(r: Reader, node: Any, inputs: list[str]) -> list[str]:
    """Read one call of an operation; an unknown one that proves elementwise is a table, another one is refused."""
    operation = node.operation
    handler = OPERATIONS.get(type(operation).__name__)
    if handler is not None:
        return handler(r, node, inputs, _arguments(node))
    if len(inputs) == 1 and node.outputs[0].shape == node.arguments.keras_tensors[0].shape and _elementwise(node):
        return _add(r, node, inputs, "elementwise", {"fn": f"keras.ops.{type(operation).__name__}"})
    return _refused(r, node, inputs, f"the operation {type(operation).__name__} has no integer form on the target")


def _arguments(node: Any) -> dict:
    """The arguments of a call by name: those of `call`, then what the operation holds."""
    bound = inspect.signature(node.operation.call).bind(*node.arguments.args, **node.arguments.kwargs)
    bound.apply_defaults()
    held = {k: v for k, v in vars(node.operation).items() if not k.startswith("_")}
    return {**held, **bound.arguments}


def _elementwise(node: Any) -> bool:
    def function(x: Any) -> Any:
        args, kwargs = _fill(node, [x])
        return node.operation(*args, **kwargs)

    return is_elementwise(function)


def _add(r: Reader, node: Any, inputs: list[str], kind: str, attrs: dict | None = None) -> list[str]:
    """One op for the node. Its inputs may include constants, which its call already holds."""
    dynamic = [i for i, t in enumerate(inputs) if r.tensors[t].constant is None]
    source = r.operation(node.operation, node)

    def call(values: Any, float_weights: bool = False) -> list[Any]:
        kept = [keras.ops.convert_to_tensor(values[i]) for i in dynamic]
        return tree.flatten(source.invoke(node.operation, kept))

    return r.add(kind, node.operation, inputs, [t.shape for t in node.outputs], source, attrs=attrs, call=call)


def _refused(r: Reader, node: Any, inputs: list[str], reason: str) -> list[str]:
    return _add(r, node, inputs, "opaque", {"reason": reason})


def _rewritten(r: Reader, node: Any, inputs: list[str], function: Callable) -> list[str]:
    """Read `function(*symbolic inputs)` in the node's place."""
    symbolic = [keras.Input(batch_shape=t.shape, dtype=t.dtype) for t in node.arguments.keras_tensors]
    parts = keras.Model(symbolic, tree.flatten(function(*symbolic)))
    path = "/".join((*r.scope.path, node.operation.name))
    with r.inside(node.operation.name, (path, type(node.operation).__name__)):
        return r.function(parts, inputs)


# -- arithmetic -----------------------------------------------------------------------------------------------------

BINARY = {
    "Add": "add", "Subtract": "sub", "Multiply": "mul", "Maximum": "maximum", "Minimum": "minimum",
    "Divide": "div", "TrueDivide": "div",
}  # fmt: skip


@reads(*BINARY)
def _binary(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    kind = BINARY[type(node.operation).__name__]
    pair = [args["x1"], args["x2"]]
    if any(isinstance(v, keras.Variable) for v in pair):
        return _with_variable(r, node, inputs, kind, pair)
    symbolic = [isinstance(v, keras.KerasTensor) for v in pair]
    if all(symbolic):
        if kind == "div":
            return _rewritten(r, node, inputs, lambda a, b: ops.multiply(a, ops.reciprocal(b)))
        return _add(r, node, [inputs[0], inputs[-1]], kind)
    position = symbolic.index(False)
    value = np.asarray(pair[position], np.float32)
    if kind == "div":
        if position == 0:
            return (
                _add(r, node, inputs, "elementwise", {"fn": "reciprocal"})
                if value.size == 1
                else _refused(r, node, inputs, "a constant vector divided by a tensor has no integer form")
            )
        kind, value = "mul", np.float32(1.0) / value
    if value.size > 1 and value.size == value.shape[-1] == node.outputs[0].shape[-1]:
        return _per_channel(r, node, inputs, kind, value.ravel().astype(np.float64), position)
    constant = r.constant(value.reshape(value.shape or (1,)), node.operation.name)
    operands = [constant, inputs[0]] if position == 0 else [inputs[0], constant]
    return _add(r, node, operands, kind)


def _per_channel(r: Reader, node: Any, inputs: list[str], kind: str, value: np.ndarray, position: int) -> list[str]:
    """A vector over the last axis: a scale or an offset per channel, which the artifact holds exactly."""
    if kind not in ("mul", "add", "sub"):
        constant = r.constant(value.astype(np.float32), node.operation.name)
        return _add(r, node, [constant, inputs[0]] if position == 0 else [inputs[0], constant], kind)
    scale = value if kind == "mul" else np.full(value.size, -1.0 if kind == "sub" and position == 0 else 1.0)
    offset = np.zeros(value.size) if kind == "mul" else -value if kind == "sub" and position == 1 else value
    weights = {"scale": Weight(scale.shape, lambda: scale), "offset": Weight(offset.shape, lambda: offset)}
    source = r.operation(node.operation, node)
    return r.add("channel_affine", node.operation, inputs, [t.shape for t in node.outputs], source, weights=weights)


def _with_variable(r: Reader, node: Any, inputs: list[str], kind: str, pair: list[Any]) -> list[str]:
    """`x * v` and `x + v` with a trainable vector over the last axis become a scale or an offset per channel."""
    variable = next(v for v in pair if isinstance(v, keras.Variable))
    channels = node.outputs[0].shape[-1]
    values = np.asarray(variable)
    if (
        kind not in ("mul", "add")
        or values.size not in (1, channels)
        or values.shape[-1:] not in ((channels,), (1,), ())
    ):
        return _refused(r, node, inputs, f"{kind} with a trainable array of shape {values.shape} has no integer form")

    def function(x: Any) -> Any:
        layer = ChannelAffine(kind == "mul", kind == "add", name="affine")
        y = layer(x)
        layer.set_weights([np.broadcast_to(values.ravel(), (channels,))])
        return y

    return _rewritten(r, node, inputs, function)


@reads("Matmul")
def _matmul(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    a, b = args["x1"], args["x2"]
    if isinstance(b, keras.Variable) and len(b.shape) == 2:

        def function(x: Any) -> Any:
            layer = keras.layers.Dense(b.shape[1], use_bias=False, name="dense")
            y = layer(x)
            layer.set_weights([np.asarray(b)])
            return y

        return _rewritten(r, node, inputs, function)
    if len(inputs) < 2 and not (isinstance(a, keras.KerasTensor) and a is b):
        return _refused(r, node, inputs, "a product with a constant matrix has no integer form; use a Dense layer")
    if len(a.shape) < 2 or len(b.shape) < 2:
        return _refused(r, node, inputs, "a matrix product of vectors has no kernel; reshape them to matrices")
    return _add(r, node, [inputs[0], inputs[-1]], "batch_matmul")


@reads("Einsum")
def _einsum(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    """Two operands: batch letters first, then one matrix product, then the wanted order."""
    subscripts = args["subscripts"].replace(" ", "")
    if "..." in subscripts or len(inputs) != 2 or "->" not in subscripts:
        return _refused(r, node, inputs, f"the einsum {subscripts!r} is not a product of two tensors")
    (a, b), out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    shared = [c for c in a if c in b]
    batch, inner = [c for c in shared if c in out], [c for c in shared if c not in out]
    left, right = [c for c in a if c not in shared], [c for c in b if c not in shared]
    if sorted(batch + left + right) != sorted(out) or not inner:
        return _refused(r, node, inputs, f"the einsum {subscripts!r} is not a matrix product")

    def function(x: Any, y: Any) -> Any:
        sizes = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}
        sides = [(x, a, batch, left, inner), (y, b, batch, inner, right)]
        parts = [_as_matrix(*side, sizes) for side in sides]
        z = ops.matmul(*parts)
        shape = [sizes[c] for c in batch + left + right]
        z = ops.reshape(z, [-1 if s is None else s for s in shape])
        return ops.transpose(z, [(batch + left + right).index(c) for c in out])

    return _rewritten(r, node, inputs, function)


def _as_matrix(x: Any, letters: str, batch: list, rows: list, columns: list, sizes: dict) -> Any:
    x = ops.transpose(x, [letters.index(c) for c in batch + rows + columns])
    shape = [sizes[c] for c in batch]
    shape += [int(np.prod([sizes[c] for c in side])) for side in (rows, columns)]
    return ops.reshape(x, [-1 if s is None else s for s in shape])


# -- activations ----------------------------------------------------------------------------------------------------


@reads("Relu", "Relu6", "Sigmoid", "Tanh")
def _named(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    kind, attrs = NAMED[type(node.operation).__name__.lower()]
    return _add(r, node, inputs, kind, dict(attrs))


@reads("Gelu")
def _gelu(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    return _add(r, node, inputs, "elementwise", {"fn": "gelu_tanh" if args["approximate"] else "gelu"})


@reads("Softmax")
def _softmax(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    if not isinstance(args["axis"], int):
        return _refused(r, node, inputs, "softmax over several axes has no kernel")
    return _add(r, node, inputs, "softmax", {"axis": args["axis"]})


@reads("Clip")
def _clip(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    low, high = args["x_min"], args["x_max"]
    if np.ndim(low) or np.ndim(high) or isinstance(low, keras.KerasTensor) or isinstance(high, keras.KerasTensor):
        return _refused(r, node, inputs, "a clip with limits per element has no integer form")
    if low == 0 and high is not None and high > 0:
        return _add(r, node, inputs, "relu", {"max": float(high), "fn": "relu"})
    return _add(r, node, inputs, "elementwise", {"fn": "clip"})


@reads("Cast")
def _cast(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    if "float" not in str(args["dtype"]):
        return _refused(r, node, inputs, "a cast to integers is not a quantizable op")
    return _add(r, node, inputs, "identity")


@reads("StopGradient", "Identity")
def _identity(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    return _add(r, node, inputs, "identity")


# -- reductions and shapes ------------------------------------------------------------------------------------------

REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "reduce_max", "Min": "reduce_min", "Amax": "reduce_max"}


@reads(*REDUCTIONS)
def _reduce(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    rank = len(r.shape(inputs[0]))
    axis = args["axis"]
    axes = tuple(range(rank)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    attrs = {"axes": tuple(a % rank for a in axes), "keepdims": bool(args["keepdims"])}
    if 0 in attrs["axes"]:
        return _refused(r, node, inputs, "a reduction over the batch has no counterpart in the artifact")
    return _add(r, node, inputs, REDUCTIONS[type(node.operation).__name__], attrs)


@reads("Reshape", "Squeeze", "ExpandDims", "Ravel", "Flatten")
def _reshape(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    return _add(r, node, inputs, "reshape")


@reads("Transpose", "Swapaxes", "Moveaxis")
def _transpose(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    order = np.arange(len(r.shape(inputs[0])))
    name = type(node.operation).__name__
    if name == "Transpose":
        perm = order[::-1] if args["axes"] is None else np.asarray(args["axes"]) % order.size
    else:
        shape = tuple(range(2, 2 + order.size))  # distinct sizes show where each axis goes
        move = np.swapaxes if name == "Swapaxes" else np.moveaxis
        first, second = (args["axis1"], args["axis2"]) if name == "Swapaxes" else (args["source"], args["destination"])
        perm = np.array(move(np.empty(shape), first, second).shape) - 2
    if perm[0] != 0:
        return _refused(r, node, inputs, "a transpose that moves the batch axis has no counterpart in the artifact")
    return _add(r, node, inputs, "transpose", {"perm": tuple(int(p) for p in perm)})


@reads("Concatenate")
def _concatenate(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    if not all(isinstance(x, keras.KerasTensor) for x in args["xs"]):
        return _refused(r, node, inputs, "a concatenation with constants has no integer form")
    return _add(r, node, inputs, "concat", {"axis": args["axis"] % len(r.shape(inputs[0]))})


@reads("Stack")
def _stack(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    axis = args["axis"]

    def function(*xs: Any) -> Any:
        return ops.concatenate([ops.expand_dims(x, axis) for x in xs], axis)

    return _rewritten(r, node, inputs, function)


@reads("Split")
def _split(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    axis = args["axis"] % len(r.shape(inputs[0]))
    ends = np.cumsum([t.shape[axis] for t in node.outputs])

    def function(x: Any) -> Any:
        starts = [0, *ends[:-1]]
        return [x[(slice(None),) * axis + (slice(int(s), int(e)),)] for s, e in zip(starts, ends, strict=True)]

    return _rewritten(r, node, inputs, function)


@reads("GetItem")
def _get_item(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    key = args["key"] if isinstance(args["key"], tuple) else (args["key"],)
    rank = len(r.shape(inputs[0]))
    if any(not (k is Ellipsis or k is None or isinstance(k, (int, slice, np.integer))) for k in key):
        return _refused(r, node, inputs, "indexing with arrays has no integer form")
    if None in key:
        return _refused(r, node, inputs, "indexing with a new axis: use keras.ops.expand_dims")
    if Ellipsis in key:
        at = key.index(Ellipsis)
        key = (*key[:at], *[slice(None)] * (rank - len(key) + 1), *key[at + 1 :])
    begin, end, strides, shrink = [], [], [], []
    for axis, part in enumerate((*key, *[slice(None)] * (rank - len(key)))):
        if not isinstance(part, slice):
            part, _ = slice(int(part), int(part) + 1 or None, 1), shrink.append(axis)
        begin.append(part.start)
        end.append(part.stop)
        strides.append(part.step or 1)
    if (begin[0], end[0], strides[0]) != (None, None, 1):
        return _refused(r, node, inputs, "a slice of the batch axis has no counterpart in the artifact")
    attrs = {"begin": tuple(begin), "end": tuple(end), "strides": tuple(strides), "shrink": tuple(shrink)}
    return _add(r, node, inputs, "strided_slice", attrs)


@reads("Pad")
def _pad(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    mode, pads = args["mode"], np.asarray(args["pad_width"])
    pads = np.broadcast_to(pads, (len(r.shape(inputs[0])), 2))
    paddings = tuple((int(a), int(b)) for a, b in pads)
    if mode == "constant":
        value = float(args.get("constant_values") or 0.0)
        return _add(r, node, inputs, "pad", {"paddings": paddings, "value": value})
    if mode in ("reflect", "symmetric"):
        return _add(r, node, inputs, "mirror_pad", {"paddings": paddings, "mode": mode})
    return _refused(r, node, inputs, f"padding mode {mode!r} has no kernel on the target")


@reads("Tile")
def _tile(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    repeats = (args["repeats"],) if isinstance(args["repeats"], int) else tuple(args["repeats"])
    rank = len(r.shape(inputs[0]))
    if len(repeats) > rank:
        return _refused(r, node, inputs, "a tile that adds axes: reshape first")
    return _add(r, node, inputs, "tile", {"repeats": (1,) * (rank - len(repeats)) + repeats})


@reads("Take")
def _take(r: Reader, node: Any, inputs: list[str], args: dict) -> list[str]:
    if len(inputs) != 1 or not isinstance(args["x"], keras.KerasTensor) or args["axis"] in (None, 0):
        return _refused(r, node, inputs, "take needs constant indices on an axis other than the batch")
    rank = len(r.shape(inputs[0]))
    return _add(r, node, inputs, "gather", {"axis": args["axis"] % rank, "indices": np.asarray(args["indices"])})
