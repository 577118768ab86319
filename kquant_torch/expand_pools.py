"""Pools whose windows differ in size: a pool of equal windows over zeros or repeated values, and a factor for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

from kquant_torch.expand import Site, expands, expands_module
from kquant_torch.handlers import function_name

AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAXIMA = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)


def _weighted(site: Site, y: Any, factors: Sequence[np.ndarray]) -> Any:
    """Each window times the product of its factors, one array per axis; nothing where all are 1."""
    if all((f == 1).all() for f in factors):
        return y
    whole = np.ones(())
    for f in factors:
        whole = whole[..., None] * f
    return y * site.constant(torch.from_numpy(whole.astype(np.float32)[None, None]))


# -- windows at a border ----------------------------------------------------------------------------------------------


@expands("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average(
    site: Site, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> Any:  # fmt: skip
    shape, after = site.shape(input)[2:], tuple(site.node.meta["value"].shape)[2:]
    rank = int(function_name(site.node)[-2]) if site.module is None else int(type(site.module).__name__[-2])
    if len(shape) != rank or not all(isinstance(v, (int, tuple, list, type(None))) for v in (kernel_size, stride)):
        return None
    size, pads = _each(kernel_size, rank), _each(padding, rank)
    steps = size if stride is None or stride == [] else _each(stride, rank)
    factors, amounts, whole = [], [], divisor_override is None
    for n, k, s, p, m in zip(shape, size, steps, pads, after, strict=True):
        starts = np.arange(m) * s - p
        ends = np.minimum(starts + k, n + p)
        inside = np.minimum(ends, n) - np.maximum(starts, 0)
        factors.append(k / (ends - starts if count_include_pad else inside))
        amounts += [max((m - 1) * s - p + k - n, 0), p]
        whole = whole and bool((factors[-1] == 1).all())
    if whole and not any(pads if not count_include_pad else ()):
        return None
    y = AVERAGES[rank - 1](F.pad(input, amounts[::-1]), size, steps)
    if divisor_override is not None:
        return y * (math.prod(size) / divisor_override)
    return _weighted(site, y, factors)


@expands_module(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average_module(site: Site, input: Any) -> Any:
    m = site.module
    divisor = getattr(m, "divisor_override", None)
    return _average(site, input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)


# -- adaptive windows -------------------------------------------------------------------------------------------------


def _adaptive(site: Site, input: Any, is_average: bool) -> Any:
    """Windows of unlike sizes or steps are gathered side by side, filled up by zeros or by their last value again."""
    shape, after = site.shape(input), tuple(site.node.meta["value"].shape)
    rank = len(after) - 2
    if rank not in (1, 2, 3) or len(shape) != len(after) or all(n % m == 0 for n, m in zip(shape, after, strict=True)):
        return None
    y, size, steps, factors = input, [], [], []
    for axis in range(2, len(shape)):
        n, m = shape[axis], after[axis]
        starts = np.arange(m) * n // m
        ends = -(-(np.arange(m) + 1) * n // m)
        k = int((ends - starts).max())
        step = int(starts[1]) if m > 1 else k
        if not ((ends - starts == k).all() and (starts == np.arange(m) * step).all()):
            places = starts[:, None] + np.arange(k)
            places = np.where(places < ends[:, None], places, n if is_average else ends[:, None] - 1)
            if is_average and (places == n).any():
                y = F.pad(y, [0, 0] * (len(shape) - 1 - axis) + [0, 1])
            y, step = torch.index_select(y, axis, site.constant(torch.from_numpy(places.reshape(-1)))), k
        size.append(k)
        steps.append(step)
        factors.append(k / (ends - starts))
    if not is_average:
        return MAXIMA[rank - 1](y, tuple(size), tuple(steps))
    return _weighted(site, AVERAGES[rank - 1](y, tuple(size), tuple(steps)), factors)


@expands("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_average(site: Site, input: Any, output_size: Any) -> Any:
    return _adaptive(site, input, True)


@expands_module(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_average_module(site: Site, input: Any) -> Any:
    return _adaptive(site, input, True)


@expands("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_maximum(site: Site, input: Any, output_size: Any, return_indices: bool = False) -> Any:
    return None if return_indices else _adaptive(site, input, False)


@expands_module(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_maximum_module(site: Site, input: Any) -> Any:
    return None if site.module.return_indices else _adaptive(site, input, False)
