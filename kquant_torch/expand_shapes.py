"""Composite functions that only move values: splits, stacks, shuffles, and a class token before the patches."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn

from kquant_torch.expand import Site, expands, expands_module, is_parameter
from kquant_torch.handlers import function_name

# -- shapes ---------------------------------------------------------------------------------------------------------


@expands("chunk", "split", "unbind", "tensor_split", "unsafe_chunk")
def _split(site: Site, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Parts as slices."""
    parts = site.node.meta["value"]
    rank, is_unbind = len(site.shape(input)), function_name(site.node) == "unbind"
    at = kwargs.get("dim", args[0 if is_unbind else 1] if len(args) > (0 if is_unbind else 1) else 0) % rank
    if any(u.target is not operator.getitem for u in site.node.users) or at == 0:
        return None
    found, start = [], 0
    for part in parts:
        size = 1 if is_unbind else part.shape[at]
        key: list[Any] = [slice(None)] * rank
        key[at] = start if is_unbind else slice(start, start + size)
        found.append(input[tuple(key)])
        start += size
    return found


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


@expands("cat", "concat", "concatenate")
def _concat_with_parameter(site: Site, tensors: Any, dim: int = 0) -> Any:
    """A class token before the patches: zeros in its place, and then a sum with a constant that holds it there."""
    tokens = [_one_sample(site, t) for t in tensors]
    fixed = [i for i, t in enumerate(tokens) if t is not None]
    if len(tensors) != 2 or len(fixed) != 1 or dim % len(site.shape(tensors[0])) == 0:
        return None
    (before,) = fixed
    x, token = tensors[1 - before], tokens[before]
    rank = len(site.shape(x))
    at = dim % rank
    amounts = [0] * (2 * rank)
    amounts[2 * (rank - 1 - at) + before] = site.shape(token)[at]
    sizes = tuple(1 if i == 0 else n for i, n in enumerate(site.shape(x)))
    zeros = token.new_zeros(sizes)
    held = torch.cat([token, zeros] if before == 0 else [zeros, token], at)
    return F.pad(x, amounts) + held


def _one_sample(site: Site, proxy: Any) -> Any:
    """A tensor of parameters with one sample, before it was expanded to the batch; None for any other."""
    if isinstance(proxy, fx.Proxy) and function_name(proxy.node) in ("expand", "repeat", "tile"):
        source = proxy.node.args[0]
        if source.meta["value"].shape[1:] == proxy.node.meta["value"].shape[1:]:
            proxy = fx.Proxy(source, site.tracer)
    return proxy if is_parameter(proxy) and site.shape(proxy)[0] == 1 else None
