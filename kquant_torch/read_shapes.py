"""How pools, paddings and whatever only moves values are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from kquant_torch.handlers import function_name, reads
from kquant_torch.reader import Reader, Refused

# -- pools ----------------------------------------------------------------------------------------------------------


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) if len(value) == rank else tuple(value) * rank


def _window(r: Reader, node: fx.Node, input: fx.Node, kernel_size: Any, stride: Any, padding: Any) -> dict:
    rank = int(function_name(node)[-2])
    if r.rank(input) != rank + 2:
        raise Refused("a pool needs a batch axis")
    size = _tuple(r.constant_of(kernel_size), rank)
    given = r.constant_of(stride)
    step = size if given is None or given == [] else _tuple(given, rank)
    return {"rank": rank, "kernel_size": size, "stride": step, "padding": _tuple(r.constant_of(padding), rank)}


@reads("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    r: Reader, node: fx.Node, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    if return_indices:
        raise Refused("the indices of a max pool have no counterpart in the artifact")
    attrs = _window(r, node, input, kernel_size, stride, padding)
    attrs |= {"dilation": _tuple(dilation, attrs["rank"]), "ceil_mode": bool(ceil_mode)}
    return r.add("max_pool2d", node, [input], attrs)


@reads("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    r: Reader, node: fx.Node, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    attrs = _window(r, node, input, kernel_size, stride, padding)
    spatial = r.sizes(input)[2:]
    if attrs["kernel_size"] == tuple(spatial) and not any(attrs["padding"]) and divisor_override is None:
        return _over_everything(r, node, input, "mean")
    if divisor_override not in (None, int(np.prod(attrs["kernel_size"]))):
        raise Refused("an average with a divisor of its own has no kernel; multiply by a constant behind a plain one")
    if any(attrs["padding"]) and not count_include_pad:
        raise Refused("an average that leaves its padding out has windows of different sizes")
    windows = zip(spatial, attrs["kernel_size"], attrs["stride"], attrs["padding"], r.sizes(node)[2:], strict=True)
    if any((n + 2 * pad - size) // step + 1 != given for n, size, step, pad, given in windows):
        raise Refused("an average with ceil_mode=True has windows of different sizes at the edge")
    return r.add("avg_pool2d", node, [input], attrs)


def _over_everything(r: Reader, node: fx.Node, input: Any, kind: str) -> Any:
    """One window over everything is a mean (with a range of its own) or a maximum."""
    return r.add(kind, node, [input], {"dim": tuple(range(2, r.rank(input))), "keepdim": True})


@reads("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_avg(r: Reader, node: fx.Node, input: Any, output_size: Any) -> Any:
    return _adaptive(r, node, input, output_size, "mean", "avg_pool2d")


@reads("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max(r: Reader, node: fx.Node, input: Any, output_size: Any, return_indices: bool = False) -> Any:
    if return_indices:
        raise Refused("the indices of a max pool have no counterpart in the artifact")
    return _adaptive(r, node, input, output_size, "reduce_max", "max_pool2d")


def _adaptive(r: Reader, node: fx.Node, input: Any, output_size: Any, whole: str, windowed: str) -> Any:
    """An adaptive pool whose windows are all alike is a pool; others have no kernel."""
    sizes, wanted = node.meta["value"].shape[2:], input.meta["value"].shape[2:]
    rank = len(wanted)
    if r.rank(input) != r.rank(node) or r.rank(input) < 3:
        raise Refused("a pool needs a batch axis")
    if set(sizes) == {1}:
        return _over_everything(r, node, input, whole)
    if any(n % m for n, m in zip(wanted, sizes, strict=True)):
        raise Refused(f"an adaptive pool from {tuple(wanted)} to {tuple(sizes)} has windows of different sizes")
    window = tuple(n // m for n, m in zip(wanted, sizes, strict=True))
    if set(window) == {1}:
        return r.add("identity", node, [input], call=lambda values, float_weights=False: [values[0]])
    attrs = {"rank": rank, "kernel_size": window, "stride": window, "padding": (0,) * rank}
    if windowed == "max_pool2d":
        attrs |= {"dilation": (1,) * rank, "ceil_mode": False}
    return r.add(windowed, node, [input], attrs)


@reads("interpolate")
def _interpolate(
    r: Reader, node: fx.Node, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Any:  # fmt: skip
    kinds = {"nearest": "resize_nearest", "bilinear": "resize_bilinear"}
    if mode not in kinds or antialias or recompute_scale_factor:
        raise Refused(f"interpolation {mode!r} (antialias={antialias}) has no integer kernel")
    spatial = tuple(node.meta["value"].shape[2:])
    factor = None if scale_factor is None else r.constant_of(scale_factor)
    attrs = {
        "size": spatial,
        "scale_factor": None if factor is None else tuple(float(f) for f in _tuple_of(factor, len(spatial))),
        "align_corners": bool(align_corners),
    }
    return r.add(kinds[mode], node, [input], attrs)


def _tuple_of(value: Any, rank: int) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


# -- padding --------------------------------------------------------------------------------------------------------


@reads("pad")
def _pad(r: Reader, node: fx.Node, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    rank, amounts = r.rank(input), list(r.constant_of(_tuple_of(pad, 2)))
    paddings = [(0, 0)] * rank
    for i in range(len(amounts) // 2):
        paddings[rank - 1 - i] = (int(amounts[2 * i]), int(amounts[2 * i + 1]))
    moved = [r.follows_batch(input, axis) for axis, amount in enumerate(paddings) if amount != (0, 0)]
    if any(moved) or any(low < 0 or high < 0 for low, high in paddings):
        raise Refused("padding of the batch axis, or by a negative amount, has no kernel; slice instead")
    if mode == "constant":
        return r.add("pad", node, [input], {"paddings": tuple(paddings), "value": float(value or 0.0)})
    if mode == "reflect":
        return r.add("mirror_pad", node, [input], {"paddings": tuple(paddings), "mode": "reflect"})
    raise Refused(f"padding mode {mode!r} has no integer kernel")


# -- shapes ---------------------------------------------------------------------------------------------------------


@reads("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _reshape(r: Reader, node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Any:
    shape = r.sizes(node)
    if sum(s is None for s in shape) > 1:
        raise Refused("a reshape with more than one size that follows the batch has no counterpart in the artifact")
    sizes = [-1 if s is None else s for s in shape]
    return r.add("reshape", node, [input], {"shape": shape}, call=r.function(lambda x: x.reshape(sizes)))


@reads("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT")
def _transpose(r: Reader, node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Any:
    rank = r.rank(input)
    probe = torch.empty(tuple(range(2, 2 + rank)))  # distinct sizes show where each axis goes
    args, kwargs = r.constant_of(args), r.constant_of(kwargs)
    moved = getattr(probe, function_name(node))(*args, **kwargs)
    return r.add("transpose", node, [input], {"dims": tuple(size - 2 for size in moved.shape)})


@reads("cat", "concat", "concatenate")
def _concat(r: Reader, node: fx.Node, tensors: Any, dim: int = 0, *, axis: Any = None) -> Any:
    at = (dim if axis is None else axis) % r.rank(node)
    if r.follows_batch(node, at):
        raise Refused("a concatenation along the batch has no counterpart in the artifact")
    if not all(r.is_data(t) for t in tensors):
        raise Refused("a concatenation with constants has no integer form")
    call = r.function(lambda *xs: torch.cat(xs, at))
    return r.add("concat", node, list(tensors), {"dim": at}, call=call)


@reads("repeat", "expand", "tile", "expand_as")
def _tile(r: Reader, node: fx.Node, input: Any, *sizes: Any, **kwargs: Any) -> Any:
    before, after = r.sizes(input), r.sizes(node)
    if len(before) != len(after) or any((a is None) != (b is None) for a, b in zip(before, after, strict=True)):
        raise Refused("a tile that adds axes or follows the batch: reshape first")
    if before[0] is not None or after[0] is not None:
        raise Refused("a tile of the batch axis has no counterpart in the artifact")
    repeats = tuple(1 if a is None else a // b for a, b in zip(after, before, strict=True))
    return r.add("tile", node, [input], {"repeats": repeats}, call=r.function(lambda x: x.repeat(repeats)))


# -- indexing -------------------------------------------------------------------------------------------------------


@reads("getitem")
def _getitem(r: Reader, node: fx.Node, input: Any, key: Any) -> Any:
    rank = r.rank(input)
    key = key if isinstance(key, tuple) else (key,)
    if any(r.is_data(k) for k in key):
        raise Refused("indexing with a computed tensor has no integer form")
    key = tuple(r.parameter(k).astype(np.int64) if r.is_parametric(k) else r.constant_of(k) for k in key)
    if any(k is None for k in key):
        raise Refused("indexing with a new axis: use unsqueeze")
    if any(k is Ellipsis for k in key):
        at = next(i for i, k in enumerate(key) if k is Ellipsis)
        key = (*key[:at], *[slice(None)] * (rank - len(key) + 1), *key[at + 1 :])
    key = (*key, *[slice(None)] * (rank - len(key)))
    arrays = [i for i, k in enumerate(key) if not isinstance(k, (int, slice))]
    if arrays:
        plain = all(k == slice(None) for i, k in enumerate(key) if i not in arrays)
        if len(arrays) > 1 or not plain or r.follows_batch(input, arrays[0]):
            raise Refused("indexing with arrays on more than one axis, or on the batch, has no integer form")
        return _gather(r, node, input, arrays[0], np.asarray(key[arrays[0]], np.int64))
    return add_slice(r, node, input, key)


def add_slice(r: Reader, node: fx.Node, input: fx.Node, key: Sequence[Any], call: Callable | None = None) -> Any:
    """A strided slice; ints drop their axis."""
    begin, end, strides, shrink = [], [], [], []
    for axis, part in enumerate(key):
        if not isinstance(part, slice):
            part, _ = slice(int(part), int(part) + 1 or None, 1), shrink.append(axis)
        begin.append(part.start)
        end.append(part.stop)
        strides.append(part.step or 1)
    parts = enumerate(zip(begin, end, strides, strict=True))
    if any(part != (None, None, 1) and r.follows_batch(input, axis) for axis, part in parts):
        raise Refused("a slice of the batch axis has no counterpart in the artifact")
    attrs = {"begin": tuple(begin), "end": tuple(end), "strides": tuple(strides), "shrink": tuple(shrink)}
    return r.add("strided_slice", node, [input], attrs, call=call)


@reads("select")
def _select(r: Reader, node: fx.Node, input: Any, dim: int, index: int) -> Any:
    key: list[Any] = [slice(None)] * r.rank(input)
    key[dim] = r.constant_of(index)
    return add_slice(r, node, input, key)


@reads("narrow")
def _narrow(r: Reader, node: fx.Node, input: Any, dim: int, start: int, length: int) -> Any:
    key: list[Any] = [slice(None)] * r.rank(input)
    key[dim] = slice(start, start + length)
    return add_slice(r, node, input, key)


@reads("index_select")
def _index_select(r: Reader, node: fx.Node, input: Any, dim: int, index: Any) -> Any:
    if not r.is_parametric(index):
        raise Refused("indexing with a computed tensor has no integer form")
    return _gather(r, node, input, dim, r.parameter(index).astype(np.int64))


def _gather(r: Reader, node: fx.Node, input: Any, dim: int, indices: np.ndarray) -> Any:
    dim = dim % r.rank(input)
    if r.follows_batch(input, dim) or indices.ndim != 1:
        raise Refused("indexing of the batch axis, or with a matrix of indices, has no integer form")
    at = torch.as_tensor(indices)
    call = r.function(lambda x: torch.index_select(x, dim, at.to(x.device)))
    return r.add("gather", node, [input], {"dim": dim, "indices": indices}, call=call)


@reads("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _refused(r: Reader, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    raise Refused(f"{function_name(node)} needs a batch axis and known channels")
