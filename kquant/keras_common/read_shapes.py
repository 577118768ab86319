"""How reductions, slices and other operations that move values are read, by their names in `keras.ops`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from kquant.core.int8_spec import RESIZED
from kquant.keras_common.arguments import Arguments
from kquant.keras_common.concrete import stretched
from kquant.keras_common.generation import Call
from kquant.keras_common.read_ops import add, reads, refused, rewritten
from kquant.keras_common.read_turned import indexed, turn, unstacked
from kquant.keras_common.reader import Reader

REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "reduce_max", "Min": "reduce_min"}
REDUCTIONS |= {"Amax": "reduce_max", "Amin": "reduce_min"}


@reads(*REDUCTIONS)
def _reduce(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    rank = len(r.shape(inputs[0]))
    axis = args["axis"]
    axes = tuple(range(rank)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    attrs = {"axes": tuple(a % rank for a in axes), "keepdims": bool(args["keepdims"])}
    if 0 in attrs["axes"]:
        return refused(r, call, inputs, "a reduction over the batch has no counterpart in the artifact")
    return add(r, call, inputs, REDUCTIONS[name], attrs)


@reads("Reshape", "Squeeze", "ExpandDims", "Ravel", "Flatten")
def _reshape(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    args.all_read()
    if len(inputs) == 1:
        return add(r, call, inputs, "reshape")
    sizes = [-1 if n is None else n for n in call.shape]  # some were given as sizes of a tensor
    if sizes.count(-1) > 1:
        return refused(r, call, inputs, "a reshape to more than one unknown size has no counterpart in the artifact")
    only = dataclasses.replace(call, inputs=call.inputs[:1])
    return rewritten(r, only, inputs[:1], lambda x: r.operations.reshape(x, sizes))


@reads("Shape")
def _shape(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    """The shape of a tensor, which only reshapes read: it is no tensor of the artifact."""
    return [r.aside(f"{inputs[0]}/shape", call)]


@reads("Resize")
def _resize(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    kinds = {"nearest": "resize_nearest", "bilinear": "resize_bilinear"}
    extra = ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio", "preserve_aspect_ratio")
    if args["interpolation"] not in kinds or any(args.get(k) for k in extra) or len(call.shape) != 4:
        return refused(r, call, inputs, "resizing by other than nearest or bilinear, or with aspect ratio or antialias")
    if None in call.shape[1:-1]:
        return refused(r, call, inputs, RESIZED)
    return add(r, call, inputs, kinds[args["interpolation"]], {"rank": 2})


@reads("Transpose", "Swapaxes", "Moveaxis")
def _transpose(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    order = np.arange(len(r.shape(inputs[0])))
    if name == "Transpose":
        perm = order[::-1] if args["axes"] is None else np.asarray(args["axes"]) % order.size
    else:
        shape = tuple(range(2, 2 + order.size))  # distinct sizes show where each axis goes
        move = np.swapaxes if name == "Swapaxes" else np.moveaxis
        first, second = (args["axis1"], args["axis2"]) if name == "Swapaxes" else (args["source"], args["destination"])
        perm = np.array(move(np.empty(shape), first, second).shape) - 2
    if perm[0] != 0:
        return turn(r, call, inputs[0], tuple(int(p) for p in perm))
    return add(r, call, inputs, "transpose", {"perm": tuple(int(p) for p in perm)})


@reads("Concatenate")
def _concatenate(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if not all(r.generation.is_symbolic(x) for x in args["xs"]):
        return refused(r, call, inputs, "a concatenation with constants has no integer form")
    return add(r, call, inputs, "concat", {"axis": args["axis"] % len(r.shape(inputs[0]))})


@reads("Stack")
def _stack(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    axis = args["axis"]

    def function(*xs: Any) -> Any:
        return r.operations.concatenate([r.operations.expand_dims(x, axis) for x in xs], axis)

    return rewritten(r, call, inputs, function)


@reads("Split")
def _split(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    args.all_read()  # the shapes of the parts say how many there are
    axis = args["axis"] % len(r.shape(inputs[0]))
    ends = np.cumsum([shape[axis] for shape in call.shapes])

    def function(x: Any) -> Any:
        starts = [0, *ends[:-1]]
        return [x[(slice(None),) * axis + (slice(int(s), int(e)),)] for s, e in zip(starts, ends, strict=True)]

    return rewritten(r, call, inputs, function)


@reads("GetItem")
def _get_item(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if inputs[0] in r.asides and inputs[0] not in r.turned:
        return [r.aside(f"{inputs[0]}/part", call)]
    # A model that was saved and loaded has its tuples as lists; TensorFlow takes the one for the other.
    key = tuple(args["key"]) if isinstance(args["key"], (tuple, list)) else (args["key"],)
    if inputs[0] in r.turned:
        return indexed(r, call, inputs[0], key)
    rank = len(r.shape(inputs[0]))
    if any(not (k is Ellipsis or k is None or isinstance(k, (int, slice, np.integer))) for k in key):
        return refused(r, call, inputs, "indexing with arrays has no integer form")
    if None in key:
        return _with_new_axes(r, call, inputs, key)
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
        return refused(r, call, inputs, "a slice of the batch axis has no counterpart in the artifact")
    attrs = {"begin": tuple(begin), "end": tuple(end), "strides": tuple(strides), "shrink": tuple(shrink)}
    return add(r, call, inputs, "strided_slice", attrs)


def _with_new_axes(r: Reader, call: Call, inputs: list[str], key: tuple) -> list[str]:
    """`x[:, None, 1:]`: the slice, then the new axes."""
    rest = tuple(k for k in key if k is not None)
    missing = len(r.shape(inputs[0])) - sum(k is not Ellipsis for k in rest)
    whole = [slice(None)] * missing
    parts = [p for k in (key if Ellipsis in key else (*key, Ellipsis)) for p in (whole if k is Ellipsis else [k])]
    kept = [p for p in parts if not isinstance(p, (int, np.integer))]  # an integer takes its axis away

    def function(x: Any) -> Any:
        y = x[rest]
        for axis in (i for i, part in enumerate(kept) if part is None):
            y = r.operations.expand_dims(y, axis)
        return y

    return rewritten(r, call, inputs, function)


@reads("MaxPool", "AveragePool")
def _pool(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    rank = len(r.shape(inputs[0])) - 2
    form = f"{'Max' if name == 'MaxPool' else 'Average'}Pooling{rank}D"
    layer = getattr(r.generation.layers, form, None)
    if layer is None:
        return refused(r, call, inputs, f"the operation {name} has no kernel over {rank} axes")
    settings = {k: args[k] for k in ("pool_size", "strides", "padding", "data_format")}
    return rewritten(r, call, inputs, lambda x: layer(**settings, name=name.lower())(x))


@reads("Flip")
def _flip(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    rank = len(r.shape(inputs[0]))
    axes = range(rank) if args["axis"] is None else np.atleast_1d(args["axis"]) % rank
    key = tuple(slice(None, None, -1 if i in axes else None) for i in range(rank))
    return rewritten(r, call, inputs, lambda x: x[key])


@reads("Unstack")
def _unstack(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    args.all_read()
    axis = args["axis"] % len(r.shape(inputs[0]))
    if inputs[0] in r.turned:
        return unstacked(r, call, inputs[0], axis)
    before = (slice(None),) * axis
    return rewritten(r, call, inputs, lambda x: [x[(*before, i)] for i in range(len(call.shapes))])


@reads("Roll")
def _roll(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    shift, axis = args["shift"], args["axis"]
    shape = r.shape(inputs[0])
    shifts = np.atleast_1d(shift).tolist()
    axes = [] if axis is None else [int(a) % len(shape) for a in np.atleast_1d(axis)]
    if len(shifts) != len(axes) or 0 in axes or None in [shape[a] for a in axes]:
        return refused(r, call, inputs, "a roll needs an axis of known size, other than the batch")

    def function(x: Any) -> Any:
        for by, axis in zip(shifts, axes, strict=True):
            at, before = -by % shape[axis], (slice(None),) * axis
            parts = [x[(*before, slice(at, shape[axis]))], x[(*before, slice(0, at))]]
            x = r.operations.concatenate(parts, axis) if at else x[(*before, slice(0, shape[axis]))]
        return x

    return rewritten(r, call, inputs, function)


@reads("Pad")
def _pad(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    mode, pads = args["mode"], np.asarray(args["pad_width"])
    pads = np.broadcast_to(pads, (len(r.shape(inputs[0])), 2))
    paddings = tuple((int(a), int(b)) for a, b in pads)
    if mode == "constant":
        value = float(args.get("constant_values") or 0.0)
        return add(r, call, inputs, "pad", {"paddings": paddings, "value": value})
    if mode in ("reflect", "symmetric"):
        return add(r, call, inputs, "mirror_pad", {"paddings": paddings, "mode": mode})
    return refused(r, call, inputs, f"padding mode {mode!r} has no kernel on the target")


@reads("Tile")
def _tile(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    repeats = (args["repeats"],) if isinstance(args["repeats"], int) else tuple(args["repeats"])
    rank = len(r.shape(inputs[0]))
    if len(repeats) > rank:
        return refused(r, call, inputs, "a tile that adds axes: reshape first")
    if len(repeats) == rank and repeats[0] != 1:
        return refused(r, call, inputs, "a repetition of the batch has no counterpart in the artifact")
    return add(r, call, inputs, "tile", {"repeats": (1,) * (rank - len(repeats)) + repeats})


@reads("BroadcastTo")
def _broadcast_to(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    shape = r.shape(inputs[0])
    if not set(inputs[1:]) <= r.asides or len(shape) != len(call.shape) or None in call.shape[1:]:
        return refused(r, call, inputs, "broadcast_to is read where it keeps the rank, to known sizes")
    only = dataclasses.replace(call, inputs=call.inputs[:1])
    return rewritten(r, only, inputs[:1], lambda x: stretched(r.operations, x, call.shape))


@reads("Take")
def _take(r: Reader, call: Call, inputs: list[str], name: str, args: Arguments) -> list[str]:
    if len(inputs) != 1 or not r.generation.is_symbolic(args["x"]) or args["axis"] in (None, 0):
        return refused(r, call, inputs, "take needs constant indices on an axis other than the batch")
    axis, indices = args["axis"] % len(r.shape(inputs[0])), np.asarray(args["indices"])
    size = r.shape(inputs[0])[axis]
    if size is None and indices.min(initial=0) < 0:
        return refused(r, call, inputs, "take with negative indices needs an axis of known size")
    indices = np.where(indices < 0, indices + (size or 0), indices)  # the kernel counts from the start only
    return add(r, call, inputs, "gather", {"axis": axis, "indices": indices})
