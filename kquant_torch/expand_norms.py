"""Normalizations, rewritten as mean, difference, square, mean, reciprocal root and product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from kquant_torch.expand import Site, expands, expands_module
from kquant_torch.functions import channel_affine, of_shifted, reciprocal_norm, reciprocal_root, root
from kquant_torch.handlers import function_name


def _standardized(x: Any, dims: tuple[int, ...], epsilon: float, center: bool = True) -> Any:
    centered = x - torch.mean(x, dims, keepdim=True) if center else x
    variance = torch.mean(centered * centered, dims, keepdim=True)
    return centered * _reciprocal_root(variance, epsilon)


def _reciprocal_root(x: Any, epsilon: float) -> Any:
    return x.tracer.create_proxy("call_function", reciprocal_root, (x, float(epsilon)), {})


def affine(x: Any, scale: Any, offset: Any, axis: int) -> Any:
    """`x * scale + offset` with a value per channel of `axis`, as one node."""
    if scale is None and offset is None:
        return x
    return x.tracer.create_proxy("call_function", channel_affine, (x, scale, offset, axis), {})


def _layer_norm(site: Site, x: Any, normalized: Any, scale: Any, offset: Any, epsilon: float, center: bool) -> Any:
    rank = len(site.shape(x))
    dims = tuple(range(rank - len(normalized), rank))
    y = _standardized(x, dims, epsilon, center)
    if len(dims) == 1:
        return affine(y, scale, offset, rank - 1)
    y = y if scale is None else y * scale
    return y if offset is None else y + offset


@expands_module(nn.LayerNorm)
def _layer_norm_module(site: Site, input: Any) -> Any:
    m = site.module
    return _layer_norm(site, input, m.normalized_shape, site.parameter("weight"), site.parameter("bias"), m.eps, True)


@expands("layer_norm")
def _layer_norm_function(
    site: Site, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:  # fmt: skip
    return _layer_norm(site, input, normalized_shape, weight, bias, eps, True)


@expands("rms_norm")
def _rms_norm_function(site: Site, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    return _layer_norm(site, input, normalized_shape, weight, None, epsilon, False)


@expands_module(nn.RMSNorm)
def _rms_norm(site: Site, x: Any) -> Any:
    m = site.module
    epsilon = torch.finfo(torch.float32).eps if m.eps is None else m.eps
    return _layer_norm(site, x, m.normalized_shape, site.parameter("weight"), None, epsilon, False)


def _group_norm(site: Site, x: Any, groups: int, scale: Any, offset: Any, epsilon: float) -> Any:
    shape = site.shape(x)
    y = torch.reshape(x, (-1, groups, math.prod(shape[1:]) // groups))
    return affine(torch.reshape(_standardized(y, (2,), epsilon), (-1, *shape[1:])), scale, offset, 1)


@expands_module(nn.GroupNorm)
def _group_norm_module(site: Site, input: Any) -> Any:
    m = site.module
    return _group_norm(site, input, m.num_groups, site.parameter("weight"), site.parameter("bias"), m.eps)


@expands("group_norm")
def _group_norm_function(
    site: Site, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    return _group_norm(site, input, num_groups, weight, bias, eps)


@expands_module(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(site: Site, input: Any) -> Any:
    m, rank = site.module, len(site.shape(input))
    if m.track_running_stats:
        return None
    y = _standardized(input, tuple(range(2, rank)), m.eps)
    return affine(y, site.parameter("weight"), site.parameter("bias"), 1)


@expands("instance_norm")
def _instance_norm_function(
    site: Site, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if running_mean is not None or running_var is not None or not use_input_stats:
        return None
    return affine(_standardized(input, tuple(range(2, len(site.shape(input)))), eps), weight, bias, 1)


@expands("sqrt", "rsqrt", "reciprocal", "log")
def _of_shifted(site: Site, input: Any) -> Any:
    """A function of a sum with a small number, as people write normalizations, is one function."""
    name, node = function_name(site.node), input.node
    if name == "reciprocal" and node.target is of_shifted and node.args[2] == "sqrt":
        return _shifted(input, *node.args[:2], "rsqrt")
    if function_name(node) not in ("add", "radd") or len(node.args) != 2 or node.kwargs:
        return None
    x, offset = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    if not isinstance(x, fx.Node) or not isinstance(offset, float | int) or offset <= 0:
        return None
    return _shifted(input, x, offset, name)


def _shifted(proxy: Any, x: fx.Node, offset: Any, name: str) -> Any:
    tracer = proxy.tracer
    return tracer.create_proxy("call_function", of_shifted, (fx.Proxy(x, tracer), float(offset), name), {})


# -- norms of vectors -------------------------------------------------------------------------------------------------


def _dims(site: Site, x: Any, dim: Any) -> tuple[int, ...] | None:
    """The axes as a tuple, or None if the batch is among them."""
    rank = len(site.shape(x))
    found = tuple(range(rank)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    found = tuple(d % rank for d in found)
    return None if 0 in found else found


def _root(x: Any) -> Any:
    return x.tracer.create_proxy("call_function", root, (x,), {})


@expands("normalize")
def _normalize(site: Site, input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    dims = _dims(site, input, dim)
    if p != 2 or dims is None or out is not None:
        return None
    total = torch.sum(input * input, dims, keepdim=True)
    return input * total.tracer.create_proxy("call_function", reciprocal_norm, (total, float(eps)), {})


@expands("norm", "linalg_norm", "linalg_vector_norm")
def _norm(site: Site, x: Any, first: Any = 2, dim: Any = None, keepdim: bool = False, **given: Any) -> Any:
    """Of torch.norm, Tensor.norm and torch.linalg's: the order is called p or ord."""
    order, dims = given.pop("p", given.pop("ord", first)), _dims(site, x, dim)
    if dims is None or any(v is not None for v in given.values()):
        return None
    if order in (1, float("inf")) and len(dims) == 1:
        return (torch.sum if order == 1 else torch.amax)(torch.abs(x), dims, keepdim=keepdim)
    if order not in (2, 2.0, "fro", None):
        return None
    return _root(torch.sum(x * x, dims, keepdim=keepdim))


@expands("var", "std")
def _variance(
    site: Site, input: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None
) -> Any:  # fmt: skip
    dims = _dims(site, input, dim)
    if dims is None or isinstance(dim, bool):
        return None
    less = int(unbiased is not False) if correction is None else correction
    count = math.prod(site.shape(input)[d] for d in dims)
    centered = input - torch.mean(input, dims, keepdim=True)
    variance = torch.mean(centered * centered, dims, keepdim=keepdim)
    variance = variance if less == 0 else variance * (count / (count - less))
    return _root(variance) if function_name(site.node) == "std" else variance


@expands("log_softmax")
def _log_softmax(site: Site, input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """`x - max(x) - log(sum(exp(x - max(x))))`."""
    dims = None if dim is None else _dims(site, input, dim)
    if dims is None or dtype is not None:
        return None
    shifted = input - torch.amax(input, dims, keepdim=True)
    return shifted - torch.log(torch.sum(torch.exp(shifted), dims, keepdim=True))


@expands_module(nn.LogSoftmax)
def _log_softmax_module(site: Site, input: Any) -> Any:
    return _log_softmax(site, input, site.module.dim)
