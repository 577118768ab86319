"""Composite layers that compute: products, gates, extremes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn

from kquant_torch.expand import Site, expands, expands_module, is_parameter, items_taken
from kquant_torch.expand_norms import affine
from kquant_torch.handlers import function_name
from kquant_torch.trace import Described

# -- products -------------------------------------------------------------------------------------------------------


@expands("matmul", "mm", "imatmul")
def _matmul(site: Site, input: Any, other: Any) -> Any:
    """A product with a matrix of parameters is a dense layer; from the left, between two transposes."""
    if is_parameter(other) and len(site.shape(other)) == 2 and not is_parameter(input):
        return F.linear(input, other.t())
    if is_parameter(input) and len(site.shape(input)) == 2 and not is_parameter(other) and len(site.shape(other)) > 2:
        return torch.transpose(F.linear(torch.transpose(other, -1, -2), input), -1, -2)
    return None


@expands("addmm")
def _addmm(site: Site, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1 or not is_parameter(mat2):
        return None
    return F.linear(mat1, mat2.t(), input)


@expands("div", "truediv", "divide", "true_divide")
def _div(site: Site, input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    """A quotient of two tensors is a product with the reciprocal."""
    if not isinstance(other, fx.Proxy) or not isinstance(other.node.meta.get("value"), Described):
        return None
    if not isinstance(input, fx.Proxy) or rounding_mode is not None or (is_parameter(input) and is_parameter(other)):
        return None
    return input * torch.reciprocal(other)


@expands("einsum")
def _einsum(site: Site, equation: Any, *operands: Any) -> Any:
    """One operand moved; two multiplied where they lie; else batch letters, one matrix product, the wanted order."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    terms, out = _letters(equation.replace(" ", ""), [len(site.shape(x)) for x in operands])
    if any(len(set(term)) != len(term) for term in terms):
        return None
    if len(terms) == 1:
        return operands[0].permute([terms[0].index(c) for c in out]) if sorted(out) == sorted(terms[0]) else None
    if len(terms) != 2:
        return None
    a, b = terms
    if sorted(set(a + b)) == sorted(out):
        x, y = (_spread(x, term, out) for x, term in zip(operands, terms, strict=True))
        return x * y
    if is_parameter(operands[0]):
        a, b, operands = b, a, operands[::-1]
    shared = [c for c in a if c in b]
    batch, inner = [c for c in shared if c in out], [c for c in shared if c not in out]
    left, right = [c for c in a if c not in shared], [c for c in b if c not in shared]
    if sorted(batch + left + right) != sorted(out) or not inner or out[0] not in a[:1] + b[:1]:
        return None
    sizes = {**dict(zip(a, site.shape(operands[0]), strict=True)), **dict(zip(b, site.shape(operands[1]), strict=True))}
    moving = out[0]  # the batch axis keeps whatever size it has
    x = _as_matrix(operands[0], a, batch, left, inner, sizes, moving)
    y = _as_matrix(operands[1], b, batch, inner, right, sizes, moving)
    z = torch.reshape(torch.matmul(x, y), [-1 if c == moving else sizes[c] for c in batch + left + right])
    return z.permute([(batch + left + right).index(c) for c in out])


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result; those that `...` stands for are capitals not in use."""
    given, arrow, out = equation.partition("->")
    terms, free = given.split(","), [c for c in map(chr, range(65, 91)) if c not in equation]
    for i, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        hidden = rank - len(term.replace("...", ""))
        terms[i] = term.replace("...", "".join(free[-hidden:] if hidden else ()))
    hidden = max((len(set(t) & set(free)) for t in terms), default=0)
    if not arrow:
        once = sorted(c for c in set("".join(terms)) - set(free) if "".join(terms).count(c) == 1)
        out = "..." + "".join(once)
    return terms, out.replace("...", "".join(free[-hidden:] if hidden else ()))


def _spread(x: Any, letters: str, out: str) -> Any:
    """A tensor with its axes in the order of `out`, and an axis of size one for each letter that it lacks."""
    order = [letters.index(c) for c in out if c in letters]
    x = x if order == sorted(order) else x.permute(order)
    for place, c in enumerate(out):
        x = x if c in letters else torch.unsqueeze(x, place)
    return x


def _as_matrix(x: Any, letters: str, batch: list, rows: list, columns: list, sizes: dict, moving: str) -> Any:
    x = x.permute([letters.index(c) for c in batch + rows + columns])
    shape = [-1 if c == moving else sizes[c] for c in batch]
    shape += [-1 if moving in side else math.prod(sizes[c] for c in side) for side in (rows, columns)]
    return torch.reshape(x, shape)


@expands_module(nn.Bilinear)
def _bilinear(site: Site, input1: Any, input2: Any) -> Any:
    """`x1 A x2 + b`: a dense layer on x1 that gives a matrix, times x2, summed."""
    m = site.module
    out, first, second = m.weight.shape
    kernel = torch.reshape(torch.transpose(site.parameter("weight"), 1, 2), (out * second, first))
    rows = torch.reshape(F.linear(input1, kernel), (-1, *site.shape(input1)[1:-1], out, second))
    y = torch.sum(rows * torch.unsqueeze(input2, -2), -1)
    return affine(y, None, site.parameter("bias"), len(site.shape(input1)) - 1)


@expands_module(nn.EmbeddingBag)
def _embedding_bag(site: Site, input: Any, offsets: Any = None, per_sample_weights: Any = None) -> Any:
    m = site.module
    reductions = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    if offsets is not None or per_sample_weights is not None or len(site.shape(input)) != 2:
        return None
    if m.padding_idx is not None or m.max_norm is not None:
        return None
    return reductions[m.mode](F.embedding(input, site.parameter("weight")), 1)


# -- gates and extremes ---------------------------------------------------------------------------------------------


@expands("glu")
def _glu(site: Site, input: Any, dim: int = -1) -> Any:
    """`a * sigmoid(b)` of the halves a and b."""
    shape, at = site.shape(input), dim % len(site.shape(input))
    if at == 0:
        return None
    half = [(slice(None),) * at + (slice(*part),) for part in ((0, shape[at] // 2), (shape[at] // 2, shape[at]))]
    return input[half[0]] * torch.sigmoid(input[half[1]])


@expands_module(nn.GLU)
def _glu_module(site: Site, input: Any) -> Any:
    return _glu(site, input, site.module.dim)


@expands("max", "min")
def _extreme(site: Site, input: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    """Of two tensors, or over an axis where nobody asks for the indices."""
    largest = function_name(site.node) == "max"
    second = other if isinstance(other, fx.Proxy) else dim if isinstance(dim, fx.Proxy) else None
    if second is not None:
        return (torch.maximum if largest else torch.minimum)(input, second)
    if not isinstance(dim, int) or (items_taken(site.node) or {1}) - {0, "values"}:
        return None
    found = (torch.amax if largest else torch.amin)(input, dim, keepdim=keepdim)
    return {0: found, "values": found}
