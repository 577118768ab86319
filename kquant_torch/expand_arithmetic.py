"""Functions that are sums, products and extremes in one call, written out as those."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn

from kquant_torch.expand import Site, expands, expands_module
from kquant_torch.functions import reciprocal_norm, root
from kquant_torch.handlers import function_name
from kquant_torch.trace import Described

# -- sums and products ----------------------------------------------------------------------------------------------


def _times(x: Any, factor: Any) -> Any:
    return x if isinstance(factor, int | float) and factor == 1 else x * factor


@expands("add", "sub", "subtract", "rsub")
def _scaled_sum(site: Site, input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """`input + alpha * other`, and so on."""
    if isinstance(alpha, int | float) and alpha == 1:
        return None
    name = function_name(site.node)
    first, second = (other, input) if name == "rsub" else (input, other)
    if name == "rsub":
        return first - second * alpha
    return first + second * alpha if name == "add" else first - second * alpha


@expands("addcmul", "addcdiv")
def _sum_with_product(site: Site, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    product = tensor1 * tensor2 if function_name(site.node) == "addcmul" else tensor1 / tensor2
    return input + _times(product, value)


@expands("lerp")
def _lerp(site: Site, input: Any, end: Any, weight: Any) -> Any:
    if isinstance(weight, int | float):
        return input * (1.0 - weight) + end * weight
    return input + (end - input) * weight


@expands("baddbmm", "addmm", "addmv")
def _sum_with_matrices(site: Site, input: Any, first: Any, second: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _times(input, beta) + _times(torch.matmul(first, second), alpha)


@expands("hstack", "dstack")
def _side_by_side(site: Site, tensors: Any) -> Any:
    axis = 1 if function_name(site.node) == "hstack" else 2
    return torch.cat(list(tensors), axis) if all(len(site.shape(t)) > axis for t in tensors) else None


# -- limits ---------------------------------------------------------------------------------------------------------


@expands("clamp", "clip", "clamp_min", "clamp_max")
def _between(site: Site, input: Any, first: Any = None, second: Any = None, **named: Any) -> Any:
    """Limits that are tensors are an extreme of two."""
    if function_name(site.node) == "clamp_max":
        first, second = None, first
    low, high = named.get("min", first), named.get("max", second)
    if not any(isinstance(v, fx.Proxy) and isinstance(v.node.meta.get("value"), Described) for v in (low, high)):
        return None
    made = input if low is None else _extreme(torch.maximum, torch.clamp_min, input, low)
    return made if high is None else _extreme(torch.minimum, torch.clamp_max, made, high)


def _extreme(of_tensors: Any, of_number: Any, x: Any, limit: Any) -> Any:
    return of_tensors(x, limit) if isinstance(limit, fx.Proxy) else of_number(x, limit)


# -- softmax and its like -------------------------------------------------------------------------------------------


@expands("softmax", "log_softmax")
def _in_float32(site: Site, input: Any, dim: Any, *rest: Any, dtype: Any = None, **named: Any) -> Any:
    """A dtype of float32 says nothing new."""
    given = [v for v in (*rest, dtype) if isinstance(v, torch.dtype)]
    return getattr(F, function_name(site.node))(input, dim) if given == [torch.float32] else None


@expands("softmin")
def _softmin(site: Site, input: Any, dim: Any = None, *rest: Any, dtype: Any = None, **named: Any) -> Any:
    return None if dim is None or dtype is not None else F.softmax(torch.neg(input), dim)


@expands_module(nn.Softmin)
def _softmin_module(site: Site, input: Any) -> Any:
    return _softmin(site, input, site.module.dim)


@expands_module(nn.Softmax2d)
def _softmax_of_channels(site: Site, input: Any) -> Any:
    return F.softmax(input, -3)


@expands("logsumexp")
def _logsumexp(site: Site, input: Any, dim: Any, keepdim: bool = False) -> Any:
    """`max(x) + log(sum(exp(x - max(x))))`."""
    rank = len(site.shape(input))
    dims = [d % rank for d in ([dim] if isinstance(dim, int) else dim)]
    if 0 in dims:
        return None
    top = torch.amax(input, dims, keepdim=True)
    total = torch.log(torch.sum(torch.exp(input - top), dims, keepdim=keepdim))
    return total + (top if keepdim else torch.amax(input, dims))


# -- distances ------------------------------------------------------------------------------------------------------


@expands("pairwise_distance")
def _distance(site: Site, x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """Without `eps`, which keeps torch's gradient finite at zero; that of `root` is zero there."""
    if p not in (1, 2):
        return None
    difference = x1 - x2
    if p == 1:
        return torch.sum(torch.abs(difference), -1, keepdim=keepdim)
    total = torch.sum(difference * difference, -1, keepdim=keepdim)
    return total.tracer.create_proxy("call_function", root, (total,), {})


@expands_module(nn.PairwiseDistance)
def _distance_module(site: Site, x1: Any, x2: Any) -> Any:
    m = site.module
    return _distance(site, x1, x2, m.norm, m.eps, m.keepdim)


@expands("cosine_similarity")
def _cosine(site: Site, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """The sum of the products of two vectors of length 1."""
    return torch.sum(_of_length_one(x1, dim, eps) * _of_length_one(x2, dim, eps), dim)


def _of_length_one(x: Any, dim: int, eps: float) -> Any:
    total = torch.sum(x * x, dim, keepdim=True)
    return x * total.tracer.create_proxy("call_function", reciprocal_norm, (total, float(eps)), {})


@expands_module(nn.CosineSimilarity)
def _cosine_module(site: Site, x1: Any, x2: Any) -> Any:
    return _cosine(site, x1, x2, site.module.dim, site.module.eps)
