"""The kinds of ops that random models are made of: each draws its settings and knows the shape of its output.

A maker takes the growing net (`descriptions.Net`) and a tensor, appends one or a few nodes and returns the new tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Shape = tuple[int, ...]
LARGEST = 600  # values of a tensor
Maker = Callable[[Any, int], int]
KINDS: dict[str, tuple[Maker, tuple[int, ...]]] = {}


def kind(*ranks: int) -> Callable[[Maker], Maker]:
    """Enter the maker `(net, tensor) -> new tensor` of a kind for tensors of these ranks."""

    def enter(maker: Maker) -> Maker:
        KINDS[maker.__name__.strip("_")] = maker, ranks
        return maker

    return enter


# -- layers with a kernel ---------------------------------------------------------------------------------------------

FUNCTIONS = (
    "relu", "relu6", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "silu", "gelu", "hard_silu", "hard_sigmoid",
    "mish", "softplus", "softsign", "softmax", "exponential",
)  # fmt: skip


def _function_name(net: Any, *first: str | None) -> str | None:
    """An activation function; the exponential only once, since exponentials of exponentials leave every range."""
    used = any("exponential" in (n.args.get("activation"), n.args.get("function")) for n in net.nodes)
    return net.pick(*first, *(FUNCTIONS[:-1] if used else FUNCTIONS))


def _argument(net: Any) -> str | None:
    """The activation argument of a layer."""
    return _function_name(net, None, "relu", None, "relu")


def _length(size: int, kernel: int, stride: int, padding: str, dilation: int = 1) -> int:
    return math.ceil(size / stride) if padding == "same" else (size - (kernel - 1) * dilation - 1) // stride + 1


def _window(net: Any, shape: Shape, equal: bool = False, dilate: bool = True) -> tuple[Shape, dict]:
    """Kernel, strides, padding and dilation that fit the spatial sizes; returns the sizes after it as well."""
    sizes = shape[:-1]
    padding = net.pick("same", "valid")
    kernel = tuple(net.pick(*[k for k in (1, 3, 2, 5) if padding == "same" or k <= n]) for n in sizes)
    strides = tuple(net.pick(1, 1, 2, 3) for _ in sizes)
    strides = (strides[0],) * len(sizes) if equal else strides
    dilation = (1,) * len(sizes)
    if dilate and set(strides) == {1} and net.pick(False, False, True):
        dilation = tuple(2 if padding == "same" or 2 * (k - 1) < n else 1 for k, n in zip(kernel, sizes, strict=True))
        dilation = (min(dilation),) * len(sizes)
    after = tuple(_length(*z[:3], padding, z[3]) for z in zip(sizes, kernel, strides, dilation, strict=True))
    return after, {"kernel": kernel, "strides": strides, "padding": padding, "dilation": dilation}


def _tail(net: Any) -> dict:
    return {"bias": net.maybe(), "activation": _argument(net)}


@kind(2, 3)
def _conv(net: Any, x: int) -> int:
    after, window = _window(net, net.shapes[x])
    channels = net.shapes[x][-1]
    groups = net.pick(1, 1, *[g for g in (2, 3, channels) if channels % g == 0 and g > 1])
    filters = groups * net.pick(*[f for f in (1, 2, 3, 5, 8) if f == 1 or f * groups <= 12])
    return net.add("conv", (x,), (*after, filters), filters=filters, groups=groups, **window, **_tail(net))


@kind(2, 3)
def _depthwise(net: Any, x: int) -> int:
    after, window = _window(net, net.shapes[x], equal=True)
    multiplier = net.pick(1, 1, 2, 3)
    return net.add(
        "depthwise", (x,), (*after, net.shapes[x][-1] * multiplier), multiplier=multiplier, **window, **_tail(net)
    )


@kind(2, 3)
def _separable(net: Any, x: int) -> int:
    after, window = _window(net, net.shapes[x], equal=True)
    filters = net.pick(1, 3, 4)
    return net.add(
        "separable", (x,), (*after, filters), filters=filters, multiplier=net.pick(1, 2), **window, **_tail(net)
    )


@kind(2, 3)
def _conv_transpose(net: Any, x: int) -> int:
    x = net.tensor((len(net.shapes[x]),), 150)
    sizes, filters = net.shapes[x][:-1], net.pick(1, 2, 3, 5)
    kernel, strides = tuple(net.pick(1, 2, 3) for _ in sizes), tuple(net.pick(1, 2) for _ in sizes)
    padding = net.pick("same", "valid")
    extra = [max(k - s, 0) if padding == "valid" else 0 for k, s in zip(kernel, strides, strict=True)]
    after = [n * s + e for n, s, e in zip(sizes, strides, extra, strict=True)]
    window = {"kernel": kernel, "strides": strides, "padding": padding}
    return net.add("conv_transpose", (x,), (*after, filters), filters=filters, **window, **_tail(net))


@kind(1, 2, 3)
def _dense(net: Any, x: int) -> int:
    units = net.pick(1, 3, 4, 7)
    return net.add("dense", (x,), (*net.shapes[x][:-1], units), units=units, **_tail(net))


@kind(2)
def _einsum_dense(net: Any, x: int) -> int:
    """A dense layer with two new axes, or over the two last axes."""
    length, _ = net.shapes[x]
    if net.maybe():
        args = {"equation": "abc,bcd->ad", "units": (3,), "length": None}
        return net.add("einsum_dense", (x,), (3,), **args, **_tail(net))
    args = {"equation": "abc,cde->abde", "units": (2, 3), "length": length}
    return net.add("einsum_dense", (x,), (length, 2, 3), **args, **_tail(net))


@kind(1, 2, 3)
def _batch_norm(net: Any, x: int) -> int:
    return net.add("batch_norm", (x,), net.shapes[x], scale=net.usually(), center=net.usually())


@kind(1, 2, 3)
def _normed(net: Any, x: int) -> int:
    """The usual block: a kernel, batch norm, often an activation."""
    options = (_dense, _conv, _depthwise, _conv_transpose) if len(net.shapes[x]) > 1 else (_dense,)
    y = net.pick(*options)(net, x)
    net.nodes[-1].args["activation"] = None
    y = _batch_norm(net, y)
    return _activation(net, y) if net.maybe() else y


@kind(1, 2, 3)
def _prelu(net: Any, x: int) -> int:
    shape = net.shapes[x]
    return net.add("prelu", (x,), shape, shared_axes=tuple(range(1, len(shape))) if net.maybe() else None)


@kind(1, 2, 3)
def _activation(net: Any, x: int) -> int:
    return net.add("activation", (x,), net.shapes[x], function=_function_name(net), form=net.pick("argument", "layer"))


@kind(1, 2, 3)
def _again(net: Any, x: int) -> int:
    """A layer used twice, on two tensors."""
    shape = net.shapes[x]
    units = shape[-1]
    y = net.add("dense", (x,), shape, units=units, **_tail(net))
    other = net.pick(y, *net.twins(x, 2))
    return net.again(y, other)


# -- merges -----------------------------------------------------------------------------------------------------------


def _merge(name: str, *arities: int) -> Maker:
    def maker(net: Any, x: int) -> int:
        return net.add(name, net.twins(x, net.pick(*arities)), net.shapes[x])

    return maker


for _name in ("add", "multiply", "maximum", "minimum", "average"):
    KINDS[_name] = _merge(_name, 2, 2, 3, 4), (1, 2, 3)
KINDS["subtract"] = _merge("subtract", 2), (1, 2, 3)


@kind(1, 2, 3)
def _concat(net: Any, x: int) -> int:
    shape = net.shapes[x]
    inputs = net.twins(x, net.pick(2, 2, 3, 4))
    axis = net.pick(*reversed(range(len(shape))))
    after = (*shape[:axis], shape[axis] * len(inputs), *shape[axis + 1 :])
    return net.add("concat", inputs, after, axis=axis + 1)


@kind(2)
def _attention(net: Any, x: int) -> int:
    query = _dense(net, x)
    args = {"heads": net.pick(1, 2, 3), "key_dim": net.pick(2, 3, 4), "value_dim": net.pick(None, 3)}
    return net.add("attention", (query, x), net.shapes[query], **args)


@kind(2)
def _matmul(net: Any, x: int) -> int:
    length, _ = net.shapes[x]
    other = net.twins(x, 2)[1]
    turned = net.add("permute", (other,), net.shapes[x][::-1], dims=(2, 1))
    return net.add("matmul", (x, turned), (length, length))


# -- pools, sizes, shapes ---------------------------------------------------------------------------------------------


def _pool(name: str) -> Maker:
    def maker(net: Any, x: int) -> int:
        after, window = _window(net, net.shapes[x], dilate=False)
        args = {k: window[k] for k in ("kernel", "strides", "padding")}
        return net.add(name, (x,), (*after, net.shapes[x][-1]), **args)

    return maker


def _global(name: str) -> Maker:
    def maker(net: Any, x: int) -> int:
        shape, keep = net.shapes[x], net.maybe()
        return net.add(name, (x,), (*((1,) * (len(shape) - 1) if keep else ()), shape[-1]), keepdims=keep)

    return maker


for _name in ("max_pool", "average_pool"):
    KINDS[_name] = _pool(_name), (2, 3)
    KINDS[f"global_{_name}"] = _global(f"global_{_name}"), (2, 3)


@kind(2, 3)
def _upsample(net: Any, x: int) -> int:
    x = net.tensor((len(net.shapes[x]),), 120)
    shape = net.shapes[x]
    size = tuple(net.pick(2, 1, 3) for _ in shape[:-1])
    how = net.pick("nearest", "bilinear") if len(shape) == 3 else "nearest"
    after = [n * s for n, s in zip(shape, size, strict=False)]
    return net.add("upsample", (x,), (*after, shape[-1]), size=size, interpolation=how)


@kind(3)
def _resize(net: Any, x: int) -> int:
    size = tuple(net.pick(4, 3, 6, 7, 1) for _ in range(2))
    return net.add("resize", (x,), (*size, net.shapes[x][-1]), size=size, interpolation=net.pick("nearest", "bilinear"))


@kind(2, 3)
def _zero_pad(net: Any, x: int) -> int:
    shape = net.shapes[x]
    padding = tuple((net.pick(1, 0, 2), net.pick(1, 0, 2)) for _ in shape[:-1])
    after = [n + a + b for n, (a, b) in zip(shape, padding, strict=False)]
    return net.add("zero_pad", (x,), (*after, shape[-1]), padding=padding)


@kind(2, 3)
def _pad(net: Any, x: int) -> int:
    """Padding by an operation: constant or mirrored."""
    shape = net.shapes[x]
    mode = net.pick("reflect", "symmetric", "constant")
    padding = tuple((net.pick(1, 0), net.pick(0, 1)) if n > 1 else (0, 0) for n in shape[:-1])
    after = [n + a + b for n, (a, b) in zip(shape, padding, strict=False)]
    return net.add("pad", (x,), (*after, shape[-1]), padding=padding, mode=mode)


@kind(2, 3)
def _crop(net: Any, x: int) -> int:
    shape = net.shapes[x]
    cropping = tuple((net.pick(1, 0), net.pick(0, 1)) if n > 2 else (0, 0) for n in shape[:-1])
    after = [n - a - b for n, (a, b) in zip(shape, cropping, strict=False)]
    return net.add("crop", (x,), (*after, shape[-1]), cropping=cropping)


@kind(1, 2, 3)
def _reshape(net: Any, x: int) -> int:
    size, channels = math.prod(net.shapes[x]), net.shapes[x][-1]
    shapes = [(size,), (size // channels, channels), (1, size // channels, channels), (size, 1)]
    return net.add("reshape", (x,), net.pick(*shapes))


@kind(1, 2, 3)
def _flatten(net: Any, x: int) -> int:
    return net.add("flatten", (x,), (math.prod(net.shapes[x]),))


@kind(2, 3)
def _permute(net: Any, x: int) -> int:
    shape = net.shapes[x]
    dims = net.pick(*[(2, 1)] if len(shape) == 2 else [(2, 1, 3), (3, 1, 2), (1, 3, 2), (3, 2, 1)])
    return net.add("permute", (x,), tuple(shape[d - 1] for d in dims), dims=dims)


@kind(1)
def _repeat(net: Any, x: int) -> int:
    x = net.tensor((1,), 100)
    count = net.pick(2, 3)
    return net.add("repeat", (x,), (count, *net.shapes[x]), count=count)


@kind(1, 2, 3)
def _slice(net: Any, x: int) -> int:
    shape = net.shapes[x]
    parts = tuple((net.pick(0, 1), n - net.pick(0, 1), net.pick(1, 2)) if n > 2 else (0, n, 1) for n in shape)
    return net.add("slice", (x,), tuple(len(range(*p)) for p in parts), parts=parts)


@kind(1, 2, 3)
def _take(net: Any, x: int) -> int:
    shape = net.shapes[x]
    axis = net.pick(*reversed(range(len(shape))))
    indices = tuple(net.pick(*range(shape[axis])) for _ in range(net.pick(1, 2, 4)))
    return net.add("take", (x,), (*shape[:axis], len(indices), *shape[axis + 1 :]), axis=axis + 1, indices=indices)


@kind(1, 2, 3)
def _tile(net: Any, x: int) -> int:
    x = net.tensor((len(net.shapes[x]),), 100)
    repeats = tuple(net.pick(1, 2) for _ in net.shapes[x])
    return net.add("tile", (x,), tuple(n * r for n, r in zip(net.shapes[x], repeats, strict=True)), repeats=repeats)


# -- normalizations and arithmetic ------------------------------------------------------------------------------------


@kind(1, 2, 3)
def _layer_norm(net: Any, x: int) -> int:
    return net.add(net.pick("layer_norm", "rms_norm", "unit_norm"), (x,), net.shapes[x])


@kind(2, 3)
def _group_norm(net: Any, x: int) -> int:
    channels = net.shapes[x][-1]
    groups = net.pick(*[g for g in (1, 2, 3, channels) if channels % g == 0])
    return net.add("group_norm", (x,), net.shapes[x], groups=groups)


@kind(1, 2, 3)
def _rescaling(net: Any, x: int) -> int:
    return net.add(
        "rescaling", (x,), net.shapes[x], scale=net.pick(0.5, -1.5, 2.0, 1 / 3), offset=net.pick(0.0, -0.5, 1.0)
    )


@kind(1, 2, 3)
def _arithmetic(net: Any, x: int) -> int:
    """An operation with a constant: `x + c`, `c - x`, `x / c` ..."""
    function = net.pick("add", "multiply", "divide", "subtract", "subtract_from", "maximum", "minimum")
    return net.add("arithmetic", (x,), net.shapes[x], function=function, constant=net.pick(0.5, 2.0, -1.25, 0.1))


@kind(1, 2, 3)
def _function(net: Any, x: int) -> int:
    """An elementwise operation."""
    names = ("absolute", "square", "negative", "sin", "cos", "erf", "arctan", "clip", "clip_positive")
    return net.add("function", (x,), net.shapes[x], function=net.pick(*names))


@kind(1, 2, 3)
def _reduce(net: Any, x: int) -> int:
    shape, keep = net.shapes[x], net.maybe()
    axes = net.pick((len(shape),), tuple(range(1, len(shape) + 1)) if keep else (len(shape),), (1,))
    if not keep and len(axes) == len(shape):
        keep = True
    after = [1 if i + 1 in axes else n for i, n in enumerate(shape) if keep or i + 1 not in axes]
    function = net.pick("mean", "sum", "max", "min")
    return net.add("reduce", (x,), tuple(after), function=function, axes=axes, keepdims=keep)


@kind(1, 2, 3)
def _dropout(net: Any, x: int) -> int:
    return net.add(net.pick("dropout", "noise"), (x,), net.shapes[x])
