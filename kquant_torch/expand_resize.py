"""Interpolations without a kernel: each axis by its matrix, or by the places that it reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

from kquant_torch.expand import Site, expands, expands_module

MATRICES = ("linear", "bicubic", "trilinear")  # "bilinear" has a kernel, unless it is smoothed (antialias)


@expands("interpolate")
def _interpolate(
    site: Site, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: Any = None, recompute_scale_factor: Any = None, antialias: bool = False,
) -> Any:  # fmt: skip
    before, after = site.shape(input)[2:], tuple(site.node.meta["value"].shape)[2:]
    rank = len(before)
    if recompute_scale_factor and scale_factor is not None:
        rest = {"align_corners": align_corners, "antialias": antialias}
        return F.interpolate(input, after, mode=mode, **rest)
    factors = scale_factor if isinstance(scale_factor, tuple | list) else [scale_factor] * rank
    if not all(f is None or isinstance(f, int | float) for f in factors):
        return None
    if mode == "area":
        return getattr(F, f"adaptive_avg_pool{rank}d")(input, after)
    if mode == "nearest-exact":
        return _by_places(site, input, before, after, factors)
    if mode not in MATRICES and not (mode == "bilinear" and antialias):
        return None
    settings = {"mode": mode, "align_corners": align_corners, **({"antialias": True} if antialias else {})}
    for axis, (n, m, factor) in enumerate(zip(before, after, factors, strict=True)):
        matrix = _matrix(n, m, factor, axis, rank, settings)
        if n != m or not torch.equal(matrix, torch.eye(n)):
            input = _along(input, axis + 2, rank + 1, site.constant(matrix))
    return input


def _matrix(n: int, m: int, factor: Any, axis: int, rank: int, settings: dict) -> torch.Tensor:
    """(m, n): what the interpolation of one axis makes of each of its positions alone.

    The other axes have two positions that are equal: with one of them, torch takes a smoothed image for another layout.
    """
    shape, sizes = [2] * rank, [2] * rank
    shape[axis], sizes[axis] = n, m
    basis = torch.eye(n).reshape(1, n, *(n if i == axis else 1 for i in range(rank))).expand(1, n, *shape)
    to = {"size": sizes} if factor is None else {"scale_factor": [factor if i == axis else 1.0 for i in range(rank)]}
    made = F.interpolate(basis.contiguous(), **to, **settings)
    return made.movedim(axis + 2, 2).reshape(n, m, -1)[:, :, 0].t().contiguous()


def _along(x: Any, axis: int, last: int, matrix: Any) -> Any:
    """A dense layer along an axis."""
    if axis == last:
        return F.linear(x, matrix)
    return torch.transpose(F.linear(torch.transpose(x, axis, last), matrix), axis, last)


def _by_places(site: Site, x: Any, before: Any, after: Any, factors: Any) -> Any:
    """The nearest position to the middle of each new one."""
    for axis, (n, m, factor) in enumerate(zip(before, after, factors, strict=True), 2):
        step = n / m if factor is None else 1.0 / factor
        places = ((torch.arange(m, dtype=torch.float64) + 0.5) * step).floor().long().clamp(max=n - 1)
        x = x if torch.equal(places, torch.arange(n)) else torch.index_select(x, axis, site.constant(places))
    return x


@expands_module(nn.Upsample)
def _upsample(site: Site, input: Any) -> Any:
    m = site.module
    return _interpolate(site, input, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)
