"""Composite functions that only move values: splits, stacks, shuffles, and a class token before the patches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn

from kquant_torch.expand import Site, expands, expands_module, items_taken, one_sample
from kquant_torch.handlers import function_name
from kquant_torch.trace import Described

MOVES = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")

# -- shapes ---------------------------------------------------------------------------------------------------------


@expands("chunk", "split", "unbind", "tensor_split", "unsafe_chunk")
def _split(site: Site, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Parts as slices."""
    parts = site.node.meta["value"]
    rank, is_unbind = len(site.shape(input)), function_name(site.node) == "unbind"
    at = kwargs.get("dim", args[0 if is_unbind else 1] if len(args) > (0 if is_unbind else 1) else 0) % rank
    if items_taken(site.node) is None:
        return None
    if at == 0:
        found = [_taken(site, input, i) for i in range(len(parts))] if is_unbind else [None]
        return None if any(part is None for part in found) else found
    found, start = [], 0
    for part in parts:
        size = 1 if is_unbind else part.shape[at]
        key: list[Any] = [slice(None)] * rank
        key[at] = start if is_unbind else slice(start, start + size)
        found.append(input[tuple(key)])
        start += size
    return found


def _taken(site: Site, x: Any, index: int) -> Any:
    """Item `index` on axis 0 of a tensor whose axes were moved so that the batch lies elsewhere: taken before that."""
    node = x.node
    name, source = function_name(node), node.args[0] if node.args else None
    if name not in MOVES or not isinstance(source, fx.Node) or not isinstance(source.meta.get("value"), Described):
        return None
    rank = len(source.meta["value"].shape)
    probe = torch.empty(tuple(range(2, 2 + rank)))  # distinct sizes show where each axis goes
    dims = [size - 2 for size in getattr(probe, name)(*node.args[1:], **node.kwargs).shape]
    if dims[0] == 0 or dims[1] != 0:
        return None
    key = (*[slice(None)] * dims[0], index)
    rest = [d - (d > dims[0]) for d in dims[1:]]
    return torch.permute(fx.Proxy(source, site.tracer)[key], rest)


@expands("getitem")
def _item_of_moved(site: Site, input: Any, key: Any) -> Any:
    key = key if isinstance(key, tuple) else (key,)
    if not isinstance(input.node.meta.get("value"), Described):
        return None
    if any(part is None for part in key):
        return _with_new_axes(input, key, len(site.shape(input)))
    first, *rest = key
    if not isinstance(first, int):
        return None
    found = _taken(site, input, first)
    return found if found is None or not rest else found[tuple(rest)]


def _with_new_axes(x: Any, key: tuple, rank: int) -> Any:
    """An index with `None` in it, as one without and an `unsqueeze` for each."""
    missing = [slice(None)] * (rank - sum(part is not None and part is not Ellipsis for part in key))
    at = next((i for i, part in enumerate(key) if part is Ellipsis), len(key))
    whole = (*key[:at], *missing, *key[at + 1 :])
    if not all(part is None or isinstance(part, (int, slice)) for part in whole):
        return None
    plain = tuple(part for part in whole if part is not None)
    made = x if all(part == slice(None) for part in plain) else x[plain]
    kept = [part for part in whole if not isinstance(part, int)]
    for place, part in enumerate(kept):
        made = torch.unsqueeze(made, place) if part is None else made
    return made


@expands("getattr")
def _matrix_transpose(site: Site, input: Any, name: str) -> Any:
    return torch.transpose(input, -1, -2) if name == "mT" else None


@expands("sum", "mean")
def _over_a_stack(site: Site, input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Any:
    """A sum or mean over tensors that were stacked before the batch."""
    node = input.node
    at = dim if axis is None else axis
    if function_name(node) != "stack" or at not in (0, (0,), [0]) or keepdim:
        return None
    if (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) != 0:
        return None
    tensors = [fx.Proxy(n, site.tracer) for n in node.args[0]]
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total if function_name(site.node) == "sum" else total * (1.0 / len(tensors))


@expands("stack")
def _stack(site: Site, tensors: Any, dim: int = 0) -> Any:
    dim = dim % (len(site.shape(tensors[0])) + 1)
    return None if dim == 0 else torch.cat([torch.unsqueeze(t, dim) for t in tensors], dim)


def _blocks(site: Site, x: Any, split: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    return torch.reshape(torch.permute(torch.reshape(x, (-1, *split)), order), (-1, *shape))


def _shuffled(site: Site, x: Any, f: int) -> Any:
    c, h, w = site.shape(x)[1:]
    return _blocks(site, x, (c // f**2, f, f, h, w), (0, 1, 4, 2, 5, 3), (c // f**2, h * f, w * f))


@expands("pixel_shuffle")
def _pixel_shuffle(site: Site, input: Any, upscale_factor: int) -> Any:
    return _shuffled(site, input, upscale_factor) if len(site.shape(input)) == 4 else None


@expands_module(nn.PixelShuffle)
def _pixel_shuffle_module(site: Site, input: Any) -> Any:
    return _pixel_shuffle(site, input, site.module.upscale_factor)


@expands("pixel_unshuffle")
def _pixel_unshuffle(site: Site, input: Any, downscale_factor: int) -> Any:
    if len(site.shape(input)) != 4:
        return None
    (c, h, w), f = site.shape(input)[1:], downscale_factor
    return _blocks(site, input, (c, h // f, f, w // f, f), (0, 1, 3, 5, 2, 4), (c * f**2, h // f, w // f))


@expands_module(nn.PixelUnshuffle)
def _pixel_unshuffle_module(site: Site, input: Any) -> Any:
    return _pixel_unshuffle(site, input, site.module.downscale_factor)


@expands("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(site: Site, input: Any, groups: int) -> Any:
    c, *spatial = site.shape(input)[1:]
    order = (0, 2, 1, *range(3, 3 + len(spatial)))
    return _blocks(site, input, (groups, c // groups, *spatial), order, (c, *spatial))


@expands_module(nn.ChannelShuffle)
def _channel_shuffle_module(site: Site, input: Any) -> Any:
    return _channel_shuffle(site, input, site.module.groups)


# -- constants beside what is computed ------------------------------------------------------------------------------


@expands("cat", "concat", "concatenate")
def _concat_with_parameter(site: Site, tensors: Any, dim: int = 0) -> Any:
    """Class tokens, coordinates: zeros in their place, and then a sum with a constant that holds them there."""
    rank = len(site.shape(tensors[0]))
    at = dim % rank
    blocks = [one_sample(site, t) for t in tensors]
    data = [i for i, block in enumerate(blocks) if block is None]
    if at == 0 or not data or len(data) == len(tensors):
        return None
    sizes = [site.shape(t)[at] for t in tensors]
    padded = []
    for place, i in enumerate(data):
        before = sum(sizes[:i]) if place == 0 else 0
        last = data[place + 1] if place + 1 < len(data) else len(tensors)
        amounts = [0] * (2 * (rank - 1 - at)) + [before, sum(sizes[i + 1 : last])]
        padded.append(F.pad(tensors[i], amounts) if any(amounts) else tensors[i])
    example = next(block for block in blocks if block is not None)
    held = []
    for tensor, block in zip(tensors, blocks, strict=True):
        shape = (1, *site.shape(tensor)[1:])
        held.append(example.new_zeros(shape) if block is None else block.expand(shape))
    return (padded[0] if len(padded) == 1 else torch.cat(padded, at)) + torch.cat(held, at)


# -- borders and rings ----------------------------------------------------------------------------------------------


@expands("pad")
def _pad(site: Site, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """A border of another value than zero is a sum; one that repeats the image is gathered; a negative one is cut."""
    shape, rank = site.shape(input), len(site.shape(input))
    if not all(isinstance(n, int) for n in pad) or len(pad) // 2 >= rank:
        return None
    sides = {rank - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    if mode in ("replicate", "circular"):
        for axis, (low, high) in sides.items():
            places = torch.arange(-low, shape[axis] + high)
            places = places % shape[axis] if mode == "circular" else places.clamp(0, shape[axis] - 1)
            input = torch.index_select(input, axis, site.constant(places)) if low or high else input
        return input
    if mode != "constant" or not isinstance(value or 0, (int, float)) or not math.isfinite(value or 0):
        return None
    if min(pad) < 0:
        cuts = [slice(None)] * rank
        for axis, (low, high) in sides.items():
            cuts[axis] = slice(max(-low, 0), shape[axis] + min(high, 0))
        return F.pad(input[tuple(cuts)], [max(n, 0) for n in pad], value=float(value or 0.0))
    if not value or not any(pad):
        return None
    border = F.pad(torch.zeros(1, *shape[1:]), list(pad), value=1.0) * value
    return F.pad(input, list(pad)) + site.constant(border)


@expands_module(
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
def _pad_module(site: Site, input: Any) -> Any:
    name = type(site.module).__name__
    mode = {"R": "replicate", "C": "circular"}[name[0]] if not name.startswith("Constant") else "constant"
    return _pad(site, input, site.module.padding, mode, getattr(site.module, "value", None))


@expands("roll")
def _roll(site: Site, input: Any, shifts: Any, dims: Any = None) -> Any:
    if dims is None:
        return None
    pairs = [(shifts, dims)] if isinstance(dims, int) else list(zip(shifts, dims, strict=True))
    shape = site.shape(input)
    if any(d % len(shape) == 0 or not isinstance(n, int) for n, d in pairs):
        return None
    for shift, dim in pairs:
        places = torch.roll(torch.arange(shape[dim]), shift)
        input = torch.index_select(input, dim % len(shape), site.constant(places))
    return input
