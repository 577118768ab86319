"""How operations on symbolic tensors are read, by the name that they have in `keras.ops`.

tf_keras has TensorFlow's functions instead; `kquant.keras2.symbols` gives each the name and arguments that it has here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.core.graph import Weight
from kquant.keras_common.functions import NAMED, is_elementwise
from kquant.keras_common.generation import Call
from kquant.keras_common.reader import Reader

OpHandler = Callable[[Reader, Call, list[str], str, dict], list[str]]
OPERATIONS: dict[str, OpHandler] = {}


def reads(*names: str) -> Callable[[OpHandler], OpHandler]:
    """Enter a handler for operations by name."""

    def enter(handler: OpHandler) -> OpHandler:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return enter


def read_operation(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    """Read one call of an operation; an unknown one that proves elementwise is a table, another one is refused."""
    handler = OPERATIONS.get(name)
    if handler is not None:
        return handler(r, call, inputs, name, args)
    shown = name or call.layer.name
    if len(inputs) == 1 and call.shape == r.generation.shape(call.inputs[0]) and _elementwise(call):
        return _add(r, call, inputs, "elementwise", {"fn": f"keras.ops.{shown}"})
    return _refused(r, call, inputs, f"the operation {shown} has no integer form on the target")


def _elementwise(call: Call) -> bool:
    return is_elementwise(lambda x: call.invoke(call.layer, [x]))


def _add(r: Reader, call: Call, inputs: list[str], kind: str, attrs: dict | None = None) -> list[str]:
    """One op for the call. Its inputs may include constants, which the call already holds."""
    dynamic = [i for i, t in enumerate(inputs) if r.tensors[t].constant is None]
    source = r.operation(call)

    def run(values: Any, float_weights: bool = False) -> list[Any]:
        kept = [tf.convert_to_tensor(values[i]) for i in dynamic]
        return r.generation.tree.flatten(call.invoke(call.layer, kept))

    return r.add(kind, call.layer, inputs, call.shapes, source, attrs=attrs, call=run)


def _refused(r: Reader, call: Call, inputs: list[str], reason: str) -> list[str]:
    return _add(r, call, inputs, "opaque", {"reason": reason})


def _rewritten(r: Reader, call: Call, inputs: list[str], function: Callable) -> list[str]:
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
def _binary(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    kind = BINARY[name]
    pair = [args["x1"], args["x2"]]
    if any(r.generation.is_variable(v) for v in pair):
        return _with_variable(r, call, inputs, kind, pair)
    symbolic = [r.generation.is_symbolic(v) for v in pair]
    if all(symbolic):
        if kind == "div":
            return _rewritten(r, call, inputs, lambda a, b: r.operations.multiply(a, r.operations.reciprocal(b)))
        return _add(r, call, [inputs[0], inputs[-1]], kind)
    position = symbolic.index(False)
    value = np.asarray(pair[position], np.float32)
    if kind == "div":
        if position == 0:
            return (
                _add(r, call, inputs, "elementwise", {"fn": "reciprocal"})
                if value.size == 1
                else _refused(r, call, inputs, "a constant vector divided by a tensor has no integer form")
            )
        if value.size > 1:
            return _rewritten(r, call, inputs, lambda x: r.operations.multiply(x, np.float32(1.0) / value))
        kind, value = "mul", np.float32(1.0) / value
    if value.size > 1 and value.size == value.shape[-1] == call.shape[-1]:
        return _per_channel(r, call, inputs, kind, value.ravel().astype(np.float64), position)
    constant = r.constant(value.reshape(value.shape or (1,)), call.layer.name)
    operands = [constant, inputs[0]] if position == 0 else [inputs[0], constant]
    return _add(r, call, operands, kind)


def _per_channel(r: Reader, call: Call, inputs: list[str], kind: str, value: np.ndarray, position: int) -> list[str]:
    """A vector over the last axis: a scale or an offset per channel, which the artifact holds exactly."""
    if kind not in ("mul", "add", "sub"):
        constant = r.constant(value.astype(np.float32), call.layer.name)
        return _add(r, call, [constant, inputs[0]] if position == 0 else [inputs[0], constant], kind)
    scale = value if kind == "mul" else np.full(value.size, -1.0 if kind == "sub" and position == 0 else 1.0)
    offset = np.zeros(value.size) if kind == "mul" else -value if kind == "sub" and position == 1 else value
    weights = {"scale": Weight(scale.shape, lambda: scale), "offset": Weight(offset.shape, lambda: offset)}
    source = r.operation(call)
    return r.add("channel_affine", call.layer, inputs, call.shapes, source, weights=weights)


def _with_variable(r: Reader, call: Call, inputs: list[str], kind: str, pair: list[Any]) -> list[str]:
    """`x * v` and `x + v` with a trainable vector over the last axis become a scale or an offset per channel."""
    variable = next(v for v in pair if r.generation.is_variable(v))
    channels = call.shape[-1]
    values = np.asarray(variable)
    if (
        kind not in ("mul", "add")
        or values.size not in (1, channels)
        or values.shape[-1:] not in ((channels,), (1,), ())
    ):
        return _refused(r, call, inputs, f"{kind} with a trainable array of shape {values.shape} has no integer form")

    def function(x: Any) -> Any:
        layer = r.own.ChannelAffine(kind == "mul", kind == "add", name="affine")
        y = layer(x)
        layer.set_weights([np.broadcast_to(values.ravel(), (channels,))])
        return y

    return _rewritten(r, call, inputs, function)


@reads("AddN")
def _add_n(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    return _rewritten(r, call, inputs, lambda *xs: functools.reduce(r.operations.add, xs))


@reads("Matmul")
def _matmul(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    a, b = args["x1"], args["x2"]
    turned = [bool(args.get(f"transpose_{side}")) for side in "ab"]
    if any(turned) and len(inputs) == 2:

        def turn(x: Any, wanted: bool) -> Any:
            order = list(range(len(x.shape)))
            return r.operations.transpose(x, [*order[:-2], order[-1], order[-2]]) if wanted else x

        return _rewritten(r, call, inputs, lambda *xs: r.operations.matmul(*map(turn, xs, turned)))
    if r.generation.is_variable(b) and len(b.shape) == 2:

        def function(x: Any) -> Any:
            layer = r.layers.Dense(b.shape[1], use_bias=False, name="dense")
            y = layer(x)
            layer.set_weights([np.asarray(b)])
            return y

        return _rewritten(r, call, inputs, function)
    if len(inputs) < 2 and not (r.generation.is_symbolic(a) and a is b):
        return _refused(r, call, inputs, "a product with a constant matrix has no integer form; use a Dense layer")
    if len(a.shape) < 2 or len(b.shape) < 2:
        return _refused(r, call, inputs, "a matrix product of vectors has no kernel; reshape them to matrices")
    return _add(r, call, [inputs[0], inputs[-1]], "batch_matmul")


@reads("Einsum")
def _einsum(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    """Two operands: batch letters first, then one matrix product, then the wanted order."""
    subscripts = args["subscripts"].replace(" ", "")
    if "..." in subscripts or len(inputs) != 2 or "->" not in subscripts:
        return _refused(r, call, inputs, f"the einsum {subscripts!r} is not a product of two tensors")
    (a, b), out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    shared = [c for c in a if c in b]
    batch, inner = [c for c in shared if c in out], [c for c in shared if c not in out]
    left, right = [c for c in a if c not in shared], [c for c in b if c not in shared]
    if sorted(batch + left + right) != sorted(out) or not inner:
        return _refused(r, call, inputs, f"the einsum {subscripts!r} is not a matrix product")

    def function(x: Any, y: Any) -> Any:
        sizes = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}
        sides = [(x, a, batch, left, inner), (y, b, batch, inner, right)]
        parts = [_as_matrix(r.operations, *side, sizes) for side in sides]
        z = r.operations.matmul(*parts)
        shape = [sizes[c] for c in batch + left + right]
        z = r.operations.reshape(z, [-1 if s is None else s for s in shape])
        return r.operations.transpose(z, [(batch + left + right).index(c) for c in out])

    return _rewritten(r, call, inputs, function)


def _as_matrix(ops: Any, x: Any, letters: str, batch: list, rows: list, columns: list, sizes: dict) -> Any:
    x = ops.transpose(x, [letters.index(c) for c in batch + rows + columns])
    shape = [sizes[c] for c in batch]
    shape += [int(np.prod([sizes[c] for c in side])) for side in (rows, columns)]
    return ops.reshape(x, [-1 if s is None else s for s in shape])


# -- activations ----------------------------------------------------------------------------------------------------


@reads("Relu", "Relu6", "Sigmoid", "Tanh")
def _named(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    kind, attrs = NAMED[name.lower()]
    return _add(r, call, inputs, kind, dict(attrs))


@reads("Gelu")
def _gelu(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    return _add(r, call, inputs, "elementwise", {"fn": "gelu_tanh" if args["approximate"] else "gelu"})


@reads("Softmax")
def _softmax(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    if not isinstance(args["axis"], int):
        return _refused(r, call, inputs, "softmax over several axes has no kernel")
    return _add(r, call, inputs, "softmax", {"axis": args["axis"]})


@reads("Clip")
def _clip(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    low, high = args["x_min"], args["x_max"]
    if np.ndim(low) or np.ndim(high) or r.generation.is_symbolic(low) or r.generation.is_symbolic(high):
        return _refused(r, call, inputs, "a clip with limits per element has no integer form")
    if low == 0 and high is not None and high > 0:
        return _add(r, call, inputs, "relu", {"max": float(high), "fn": "relu"})
    return _add(r, call, inputs, "elementwise", {"fn": "clip"})


@reads("Cast")
def _cast(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    if "float" not in str(args["dtype"]):
        return _refused(r, call, inputs, "a cast to integers is not a quantizable op")
    return _add(r, call, inputs, "identity")


@reads("StopGradient", "Identity")
def _identity(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    return _add(r, call, inputs, "identity")


# -- reductions and shapes ------------------------------------------------------------------------------------------

REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "reduce_max", "Min": "reduce_min", "Amax": "reduce_max"}


@reads(*REDUCTIONS)
def _reduce(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    rank = len(r.shape(inputs[0]))
    axis = args["axis"]
    axes = tuple(range(rank)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    attrs = {"axes": tuple(a % rank for a in axes), "keepdims": bool(args["keepdims"])}
    if 0 in attrs["axes"]:
        return _refused(r, call, inputs, "a reduction over the batch has no counterpart in the artifact")
    return _add(r, call, inputs, REDUCTIONS[name], attrs)


@reads("Reshape", "Squeeze", "ExpandDims", "Ravel", "Flatten")
def _reshape(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    if len(inputs) == 1:
        return _add(r, call, inputs, "reshape")
    sizes = [-1 if n is None else n for n in call.shape]  # some were given as sizes of a tensor
    if sizes.count(-1) > 1:
        return _refused(r, call, inputs, "a reshape to more than one unknown size has no counterpart in the artifact")
    only = dataclasses.replace(call, inputs=call.inputs[:1])
    return _rewritten(r, only, inputs[:1], lambda x: r.operations.reshape(x, sizes))


@reads("Shape")
def _shape(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    """The shape of a tensor, which only reshapes read: it is no tensor of the artifact."""
    return [r.aside(f"{inputs[0]}/shape", call)]


@reads("Resize")
def _resize(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    kinds = {"nearest": "resize_nearest", "bilinear": "resize_bilinear"}
    extra = ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio", "preserve_aspect_ratio")
    if args["interpolation"] not in kinds or any(args.get(k) for k in extra) or len(call.shape) != 4:
        return _refused(
            r, call, inputs, "resizing by other than nearest or bilinear, or with aspect ratio or antialias"
        )
    return _add(r, call, inputs, kinds[args["interpolation"]], {"rank": 2})


@reads("Transpose", "Swapaxes", "Moveaxis")
def _transpose(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    order = np.arange(len(r.shape(inputs[0])))
    if name == "Transpose":
        perm = order[::-1] if args["axes"] is None else np.asarray(args["axes"]) % order.size
    else:
        shape = tuple(range(2, 2 + order.size))  # distinct sizes show where each axis goes
        move = np.swapaxes if name == "Swapaxes" else np.moveaxis
        first, second = (args["axis1"], args["axis2"]) if name == "Swapaxes" else (args["source"], args["destination"])
        perm = np.array(move(np.empty(shape), first, second).shape) - 2
    if perm[0] != 0:
        return _refused(r, call, inputs, "a transpose that moves the batch axis has no counterpart in the artifact")
    return _add(r, call, inputs, "transpose", {"perm": tuple(int(p) for p in perm)})


@reads("Concatenate")
def _concatenate(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    if not all(r.generation.is_symbolic(x) for x in args["xs"]):
        return _refused(r, call, inputs, "a concatenation with constants has no integer form")
    return _add(r, call, inputs, "concat", {"axis": args["axis"] % len(r.shape(inputs[0]))})


@reads("Stack")
def _stack(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    axis = args["axis"]

    def function(*xs: Any) -> Any:
        return r.operations.concatenate([r.operations.expand_dims(x, axis) for x in xs], axis)

    return _rewritten(r, call, inputs, function)


@reads("Split")
def _split(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    axis = args["axis"] % len(r.shape(inputs[0]))
    ends = np.cumsum([shape[axis] for shape in call.shapes])

    def function(x: Any) -> Any:
        starts = [0, *ends[:-1]]
        return [x[(slice(None),) * axis + (slice(int(s), int(e)),)] for s, e in zip(starts, ends, strict=True)]

    return _rewritten(r, call, inputs, function)


@reads("GetItem")
def _get_item(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    if inputs[0] in r.asides:
        return [r.aside(f"{inputs[0]}/part", call)]
    # A model that was saved and loaded has its tuples as lists; TensorFlow takes the one for the other.
    key = tuple(args["key"]) if isinstance(args["key"], (tuple, list)) else (args["key"],)
    rank = len(r.shape(inputs[0]))
    if any(not (k is Ellipsis or k is None or isinstance(k, (int, slice, np.integer))) for k in key):
        return _refused(r, call, inputs, "indexing with arrays has no integer form")
    if None in key:
        return _refused(r, call, inputs, "indexing with a new axis: use keras.ops.expand_dims")
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
        return _refused(r, call, inputs, "a slice of the batch axis has no counterpart in the artifact")
    attrs = {"begin": tuple(begin), "end": tuple(end), "strides": tuple(strides), "shrink": tuple(shrink)}
    return _add(r, call, inputs, "strided_slice", attrs)


@reads("Pad")
def _pad(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    mode, pads = args["mode"], np.asarray(args["pad_width"])
    pads = np.broadcast_to(pads, (len(r.shape(inputs[0])), 2))
    paddings = tuple((int(a), int(b)) for a, b in pads)
    if mode == "constant":
        value = float(args.get("constant_values") or 0.0)
        return _add(r, call, inputs, "pad", {"paddings": paddings, "value": value})
    if mode in ("reflect", "symmetric"):
        return _add(r, call, inputs, "mirror_pad", {"paddings": paddings, "mode": mode})
    return _refused(r, call, inputs, f"padding mode {mode!r} has no kernel on the target")


@reads("Tile")
def _tile(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    repeats = (args["repeats"],) if isinstance(args["repeats"], int) else tuple(args["repeats"])
    rank = len(r.shape(inputs[0]))
    if len(repeats) > rank:
        return _refused(r, call, inputs, "a tile that adds axes: reshape first")
    return _add(r, call, inputs, "tile", {"repeats": (1,) * (rank - len(repeats)) + repeats})


@reads("Take")
def _take(r: Reader, call: Call, inputs: list[str], name: str, args: dict) -> list[str]:
    if len(inputs) != 1 or not r.generation.is_symbolic(args["x"]) or args["axis"] in (None, 0):
        return _refused(r, call, inputs, "take needs constant indices on an axis other than the batch")
    rank = len(r.shape(inputs[0]))
    return _add(r, call, inputs, "gather", {"axis": args["axis"] % rank, "indices": np.asarray(args["indices"])})
