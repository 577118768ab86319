"""Composite layers and functions, rewritten in the fx graph as the functions that they are made of.

The wrapped model trains exactly these, so what is exported is what was trained (a normalization, for instance, is the
chain of mean, difference, square, mean, reciprocal root and product, with a quantizer behind each).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import fx, nn

from kquant_torch.functions import channel_affine, reciprocal_root, scaled_softmax
from kquant_torch.handlers import function_name
from kquant_torch.trace import Described, Inputs, drop_unused, propagate

Expander = Callable[..., Any]
MODULES: dict[type, Expander] = {}
FUNCTIONS: dict[str, Expander] = {}


class Site:
    """Where a composite is rewritten: its node, its module if it is one, and proxies for its parts."""

    def __init__(self, model: nn.Module, node: fx.Node, tracer: Any):
        self.model, self.node, self.tracer = model, node, tracer
        self.path = str(node.target) if node.op == "call_module" else ""
        self.module: Any = model.get_submodule(self.path) if node.op == "call_module" else None

    def _inside(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def shape(self, proxy: fx.Proxy) -> tuple[int, ...]:
        """The sizes of a proxy's tensor on the example inputs."""
        return tuple(proxy.node.meta["value"].shape)

    def parameter(self, name: str) -> Any:
        """A parameter of the module, or None."""
        if getattr(self.module, name, None) is None:
            return None
        return self.get(name)

    def get(self, path: str) -> Any:
        """An attribute by its path inside the module."""
        return fx.Proxy(self.node.graph.get_attr(self._inside(path)), self.tracer)

    def call(self, name: str, *args: Any) -> Any:
        """A call of a module inside the module."""
        nodes = tuple(a.node if isinstance(a, fx.Proxy) else a for a in args)
        return fx.Proxy(self.node.graph.call_module(self._inside(name), nodes), self.tracer)


def expands_module(*classes: type) -> Callable[[Expander], Expander]:
    """Enter an expander `(site, *arguments of the call) -> proxies`; None leaves the node as it is."""

    def enter(expander: Expander) -> Expander:
        MODULES.update(dict.fromkeys(classes, expander))
        return expander

    return enter


def expands(*names: str) -> Callable[[Expander], Expander]:
    """Enter an expander for functions and methods by name."""

    def enter(expander: Expander) -> Expander:
        FUNCTIONS.update(dict.fromkeys(names, expander))
        return expander

    return enter


def expand(model: nn.Module, code: fx.Graph, inputs: Inputs) -> None:
    """Rewrite all composites of a graph, in place, until none is left."""
    found = [True]
    while any(found):
        propagate(model, code, inputs.values)
        found = [_expand_node(model, node) for node in list(code.nodes)]
        drop_unused(code)


def _expand_node(model: nn.Module, node: fx.Node) -> bool:
    expander = _expander(model, node)
    if expander is None or not isinstance(node.meta.get("value"), (Described, tuple, list)):
        return False
    if any("value" not in n.meta for n in node.all_input_nodes):
        return False  # it follows another composite; its turn comes when that one's parts have shapes
    tracer = fx.proxy.GraphAppendingTracer(node.graph)
    site = Site(model, node, tracer)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: fx.Proxy(n, tracer))
    previous = node.prev
    with node.graph.inserting_before(node):
        try:
            result = expander(site, *args, **kwargs)
        except TypeError:
            result = None
    if result is None:
        return False
    last = node.prev
    while last is not previous:
        _note_origin(last, node, site)
        last = last.prev
    _replace(node, result)
    return True


def _expander(model: nn.Module, node: fx.Node) -> Expander | None:
    if node.op == "call_module":
        return MODULES.get(type(model.get_submodule(str(node.target))))
    if node.op in ("call_function", "call_method"):
        return FUNCTIONS.get(function_name(node))
    return None


def _note_origin(part: fx.Node, node: fx.Node, site: Site) -> None:
    """Parts answer to the name and the type of the composite."""
    part.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    if "of" in node.meta:
        part.meta["of"] = node.meta["of"]
    elif site.module is not None:
        kind = type(site.module).__name__
        part.meta["of"] = (site.path or kind, kind)


def _replace(node: fx.Node, result: Any) -> None:
    """Put the results in the place of a node; those of a tuple in the place of its items."""
    if isinstance(result, fx.Proxy):
        node.replace_all_uses_with(result.node)
    else:
        for user in list(node.users):
            item = result[user.args[1]]
            if item is not None:
                user.replace_all_uses_with(item.node)
                node.graph.erase_node(user)
    if not node.users:
        node.graph.erase_node(node)


# -- normalizations -------------------------------------------------------------------------------------------------


def _standardized(x: Any, dims: tuple[int, ...], epsilon: float, center: bool = True) -> Any:
    centered = x - torch.mean(x, dims, keepdim=True) if center else x
    variance = torch.mean(centered * centered, dims, keepdim=True)
    return centered * _reciprocal_root(variance, epsilon)


def _reciprocal_root(x: Any, epsilon: float) -> Any:
    return x.tracer.create_proxy("call_function", reciprocal_root, (x, float(epsilon)), {})


def _affine(x: Any, scale: Any, offset: Any, axis: int) -> Any:
    if scale is None and offset is None:
        return x
    return x.tracer.create_proxy("call_function", channel_affine, (x, scale, offset, axis), {})


def _layer_norm(site: Site, x: Any, normalized: Any, scale: Any, offset: Any, epsilon: float, center: bool) -> Any:
    rank = len(site.shape(x))
    dims = tuple(range(rank - len(normalized), rank))
    y = _standardized(x, dims, epsilon, center)
    if len(dims) == 1:
        return _affine(y, scale, offset, rank - 1)
    y = y if scale is None else y * scale
    return y if offset is None else y + offset


@expands_module(nn.LayerNorm)
def _layer_norm_module(site: Site, input: Any) -> Any:
    m = site.module
    return _layer_norm(site, input, m.normalized_shape, site.parameter("weight"), site.parameter("bias"), m.eps, True)


@expands("layer_norm")
def _layer_norm_function(
    site: Site, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    return _layer_norm(site, input, normalized_shape, weight, bias, eps, True)


@expands_module(nn.RMSNorm)
def _rms_norm(site: Site, x: Any) -> Any:
    m = site.module
    epsilon = torch.finfo(torch.float32).eps if m.eps is None else m.eps
    return _layer_norm(site, x, m.normalized_shape, site.parameter("weight"), None, epsilon, False)


def _group_norm(site: Site, x: Any, groups: int, scale: Any, offset: Any, epsilon: float) -> Any:
    shape = site.shape(x)
    y = torch.reshape(x, (-1, groups, math.prod(shape[1:]) // groups))
    return _affine(torch.reshape(_standardized(y, (2,), epsilon), (-1, *shape[1:])), scale, offset, 1)


@expands_module(nn.GroupNorm)
def _group_norm_module(site: Site, input: Any) -> Any:
    m = site.module
    return _group_norm(site, input, m.num_groups, site.parameter("weight"), site.parameter("bias"), m.eps)


@expands("group_norm")
def _group_norm_function(
    site: Site, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    return _group_norm(site, input, num_groups, weight, bias, eps)


@expands_module(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(site: Site, input: Any) -> Any:
    m, rank = site.module, len(site.shape(input))
    if m.track_running_stats:
        return None
    y = _standardized(input, tuple(range(2, rank)), m.eps)
    return _affine(y, site.parameter("weight"), site.parameter("bias"), 1)


# -- products -------------------------------------------------------------------------------------------------------


@expands("matmul", "imatmul")
def _matmul(site: Site, input: Any, other: Any) -> Any:
    """A product with a matrix of parameters is a dense layer."""
    if not _is_parameter(other) or len(site.shape(other)) != 2:
        return None
    return F.linear(input, other.t())


@expands("addmm")
def _addmm(site: Site, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1 or not _is_parameter(mat2):
        return None
    return F.linear(mat1, mat2.t(), input)


def _is_parameter(proxy: Any) -> bool:
    """Whether a value is computed from parameters alone."""
    if not isinstance(proxy, fx.Proxy):
        return False
    pending = [proxy.node]
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            return False
        pending += node.all_input_nodes
    return True


@expands("div", "truediv", "divide", "true_divide")
def _div(site: Site, input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    """A quotient of two tensors is a product with the reciprocal."""
    if not isinstance(other, fx.Proxy) or not isinstance(other.node.meta.get("value"), Described):
        return None
    if _is_parameter(other) or not isinstance(input, fx.Proxy) or rounding_mode is not None:
        return None
    return input * torch.reciprocal(other)


@expands("einsum")
def _einsum(site: Site, equation: Any, *operands: Any) -> Any:
    """Two operands: batch letters first, then one matrix product, then the wanted order."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    subscripts = equation.replace(" ", "")
    if "." in subscripts or len(operands) != 2 or "->" not in subscripts:
        return None
    (a, b), out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
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
    return _affine(y, None, site.parameter("bias"), len(site.shape(input1)) - 1)


@expands_module(nn.EmbeddingBag)
def _embedding_bag(site: Site, input: Any, offsets: Any = None, per_sample_weights: Any = None) -> Any:
    m = site.module
    reductions = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    if offsets is not None or per_sample_weights is not None or len(site.shape(input)) != 2:
        return None
    if m.padding_idx is not None or m.max_norm is not None:
        return None
    return reductions[m.mode](F.embedding(input, site.parameter("weight")), 1)


# -- attention ------------------------------------------------------------------------------------------------------


def _attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    scores = torch.matmul(q, torch.transpose(k, -2, -1))
    weights = scores.tracer.create_proxy("call_function", scaled_softmax, (scores, float(scale), -1), {})
    return torch.matmul(weights, v)


@expands("scaled_dot_product_attention")
def _sdpa(
    site: Site, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if attn_mask is not None or is_causal or enable_gqa or dropout_p != 0.0:
        return None
    return _attention(query, key, value, site.shape(query)[-1] ** -0.5 if scale is None else scale)


@expands_module(nn.MultiheadAttention)
def _multi_head(
    site: Site, query: Any, key: Any, value: Any, key_padding_mask: Any = None, need_weights: bool = True,
    attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    m, node = site.module, site.node
    wants_scores = any(user.args[1:] != (0,) and user.users for user in node.users)
    special = m.bias_k is not None or m.add_zero_attn or m.dropout or not m._qkv_same_embed_dim
    masked = key_padding_mask is not None or attn_mask is not None or is_causal
    if wants_scores or special or masked or not m.batch_first or len(site.shape(query)) != 3:
        return None
    size, heads = m.embed_dim, m.num_heads
    weight, bias = site.parameter("in_proj_weight"), site.parameter("in_proj_bias")
    parts = []
    for i, x in enumerate((query, key, value)):
        rows = slice(i * size, (i + 1) * size)
        y = F.linear(x, weight[rows], None if bias is None else bias[rows])
        y = torch.reshape(y, (-1, site.shape(x)[1], heads, size // heads))
        parts.append(torch.transpose(y, 1, 2))
    y = _attention(*parts, (size // heads) ** -0.5)
    y = torch.reshape(torch.transpose(y, 1, 2), (-1, site.shape(query)[1], size))
    out = F.linear(y, *(_child_parameter(site, "out_proj", n) for n in ("weight", "bias")))
    return (out, None)


def _child_parameter(site: Site, child: str, name: str) -> Any:
    if getattr(getattr(site.module, child), name) is None:
        return None
    return site.get(f"{child}.{name}")


@expands_module(nn.TransformerEncoderLayer)
def _encoder_layer(
    site: Site, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    if src_mask is not None or src_key_padding_mask is not None or is_causal:
        return None

    def attend(x: Any) -> Any:
        return site.call("dropout1", site.call("self_attn", x, x, x)[0])

    def feed(x: Any) -> Any:
        hidden = site.module.activation(site.call("linear1", x))
        return site.call("dropout2", site.call("linear2", site.call("dropout", hidden)))

    if site.module.norm_first:
        x = src + attend(site.call("norm1", src))
        return x + feed(site.call("norm2", x))
    x = site.call("norm1", src + attend(src))
    return site.call("norm2", x + feed(x))


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
    return proxy if _is_parameter(proxy) and site.shape(proxy)[0] == 1 else None
