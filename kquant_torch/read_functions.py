"""How functions and methods that compute are read: arithmetic, products, activations, reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from kquant.core.elementwise import is_elementwise
from kquant.core.graph import Weight
from kquant_torch.handlers import function_name, reads
from kquant_torch.kernels import read_kernel
from kquant_torch.reader import Reader, Refused, constant_quantizer

RENAMED = {"hardsigmoid": "hard_sigmoid", "exp": "exponential", "absolute": "abs"}


def read_unknown(r: Reader, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """A function that has no handler: a table if it proves to be elementwise, else it is refused."""
    operands = [n for n in node.all_input_nodes if r.is_data(n)]
    name = function_name(node)
    if len(operands) != 1 or not isinstance(r.values[operands[0]], str):
        raise Refused(f"the function {name!r} has no integer form")
    (x,) = operands
    value = node.meta["value"]
    same = getattr(value, "shape", None) == x.meta["value"].shape and value.dtype == torch.float32
    call = r.caller(node, operands)
    if not same or not is_elementwise(lambda values: call([values])[0]):
        raise Refused(f"the function {name!r} has no integer form")
    return r.add("elementwise", node, operands, {"fn": RENAMED.get(name, name)})


# -- kernels --------------------------------------------------------------------------------------------------------


@reads("conv1d", "conv2d", "conv3d")
def _conv(
    r: Reader, node: fx.Node, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    rank = int(function_name(node)[4])
    attrs = {"rank": rank, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return read_kernel(r, node, "conv2d", input, weight, bias, r.constant_of(attrs))


@reads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    r: Reader, node: fx.Node, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    rank = int(function_name(node)[14])
    attrs = {
        "rank": rank, "stride": stride, "padding": padding, "output_padding": output_padding, "groups": groups,
        "dilation": dilation,
    }  # fmt: skip
    return read_kernel(r, node, "conv2d_transpose", input, weight, bias, r.constant_of(attrs))


@reads("linear")
def _linear(r: Reader, node: fx.Node, input: Any, weight: Any, bias: Any = None) -> Any:
    return read_kernel(r, node, "dense", input, weight, bias, {})


@reads("embedding")
def _embedding(
    r: Reader, node: fx.Node, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any,
    **settings: Any,
) -> Any:  # fmt: skip
    if max_norm is not None:
        raise Refused("max_norm changes the embedding's weights while it runs")
    return read_kernel(r, node, "embedding", input, weight, None, {})


@reads("prelu")
def _prelu(r: Reader, node: fx.Node, input: Any, weight: Any) -> Any:
    return read_kernel(r, node, "prelu", input, weight, None, {})


@reads("channel_affine")
def _channel_affine(r: Reader, node: fx.Node, x: Any, scale: Any, offset: Any, axis: int) -> Any:
    axis = axis % r.rank(node)
    size = (node.meta["value"].shape[axis],)
    weights = {"scale": _vector(r, scale, size, 1.0), "offset": _vector(r, offset, size, 0.0)}
    return r.add("channel_affine", node, [x], {"axis": axis}, weights=weights)


def _vector(r: Reader, node: Any, size: tuple[int], default: float) -> Weight:
    if node is None:
        return Weight(size, lambda: np.full(size, default))
    return Weight(size, lambda: np.broadcast_to(r.parameter(node).ravel(), size).astype(np.float64))


# -- arithmetic -----------------------------------------------------------------------------------------------------

ARITHMETIC = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum}


@reads("add", "iadd", "radd")
def _add(r: Reader, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Any:
    return _binary(r, node, "add", input, other, alpha)


@reads("sub", "subtract", "isub")
def _sub(r: Reader, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Any:
    return _binary(r, node, "sub", input, other, alpha)


@reads("rsub")
def _rsub(r: Reader, node: fx.Node, input: Any, other: Any, alpha: Any = 1) -> Any:
    return _binary(r, node, "sub", other, input, alpha)


@reads("mul", "multiply", "imul")
def _mul(r: Reader, node: fx.Node, input: Any, other: Any) -> Any:
    return _binary(r, node, "mul", input, other)


@reads("maximum", "minimum")
def _extremum(r: Reader, node: fx.Node, input: Any, other: Any) -> Any:
    return _binary(r, node, function_name(node), input, other)


@reads("truediv", "div", "divide", "true_divide", "itruediv")
def _div(r: Reader, node: fx.Node, input: Any, other: Any, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        raise Refused("an integer division has no integer kernel of these values")
    if r.is_data(other):
        if r.is_data(input) or r.is_parametric(input):
            raise Refused("a division by a tensor has no integer form")
        return r.add("elementwise", node, [other], {"fn": "reciprocal"})
    value = np.float32(1.0) / np.asarray(r.constant_of(other), np.float32)
    return _with_constant(r, node, "mul", input, value.reshape(1), False)


@reads("pow", "ipow")
def _pow(r: Reader, node: fx.Node, input: Any, exponent: Any) -> Any:
    if not r.is_data(input) or isinstance(exponent, fx.Node):
        raise Refused("a power with a tensor as exponent has no integer form")
    if exponent == 2:
        return r.add("mul", node, [input, input], call=r.function(torch.mul))
    return read_unknown(r, node, input, exponent)


@reads("square")
def _square(r: Reader, node: fx.Node, input: Any) -> Any:
    return r.add("mul", node, [input, input], call=r.function(torch.mul))


def _binary(r: Reader, node: fx.Node, kind: str, a: Any, b: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        raise Refused(f"{kind} with alpha={alpha} has no integer form; multiply first")
    if r.is_data(a) and r.is_data(b):
        return r.add(kind, node, [a, b], call=r.function(ARITHMETIC[kind]))
    first = not r.is_data(a)
    x, constant = (b, a) if first else (a, b)
    if r.is_parametric(constant):
        return _with_parameter(r, node, kind, x, constant, first)
    number = r.constant_of(constant)
    if number == {"add": 0, "mul": 1}.get(kind):  # the beginning of a sum over a list
        return _identity(r, node, x)
    value = np.asarray(number, np.float32)
    return _with_constant(r, node, kind, x, value.reshape(value.shape or (1,)), first)


def _with_constant(r: Reader, node: fx.Node, kind: str, x: fx.Node, value: np.ndarray, first: bool) -> Any:
    operands = [value, x] if first else [x, value]
    return r.add(kind, node, operands, call=r.function(ARITHMETIC[kind]))


def _with_parameter(r: Reader, node: fx.Node, kind: str, x: fx.Node, parameter: fx.Node, first: bool) -> Any:
    """A vector along one axis is a scale or an offset per channel, which the artifact holds exactly."""
    shape, axis = node.meta["value"].shape, None
    own = parameter.meta["value"].shape
    varying = [i for i in range(len(shape)) if i >= len(shape) - len(own) and own[i - len(shape) + len(own)] > 1]
    if len(varying) == 1 and varying[0] != 0 and tuple(x.meta["value"].shape) == tuple(shape):
        axis = varying[0]
    if axis is None or kind not in ("add", "sub", "mul"):
        return _with_array(r, node, kind, x, parameter, first)
    size = (shape[axis],)

    def values() -> np.ndarray:
        return r.parameter(parameter).ravel().astype(np.float64)

    ones, zeros = Weight(size, lambda: np.ones(size)), Weight(size, lambda: np.zeros(size))
    weights = {
        "mul": {"scale": Weight(size, values), "offset": zeros},
        "add": {"scale": ones, "offset": Weight(size, values)},
        "sub": {
            "scale": Weight(size, lambda: np.full(size, -1.0 if first else 1.0)),
            "offset": Weight(size, lambda: values() if first else -values()),
        },
    }[kind]
    return r.add("channel_affine", node, [x], {"axis": axis}, weights=weights)


def _with_array(r: Reader, node: fx.Node, kind: str, x: fx.Node, parameter: fx.Node, first: bool) -> Any:
    """An array of buffers and parameters as a constant operand, which a wrapped model holds on its grid."""
    quantizer, source = constant_quantizer(r, parameter)
    value = r.parameter(source)
    if value.size == 1 and kind in ("maximum", "minimum"):
        return r.add("elementwise", node, [x], {"fn": "clip"})
    value = value.reshape(value.shape or (1,))
    operands = [value, x] if first else [x, value]

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if quantizer is not None:
            a, b = (quantizer(a), b) if first else (a, quantizer(b))
        return ARITHMETIC[kind](a, b)

    made = r.add(kind, node, operands, call=r.function(function))
    r.constants[r.ops[-1].inputs[0 if first else 1]] = parameter
    return made


@reads("matmul", "bmm", "mm", "imatmul")
def _matmul(r: Reader, node: fx.Node, input: Any, other: Any) -> Any:
    if not (r.is_data(input) and r.is_data(other)):
        raise Refused("a product with a constant matrix has no integer form; use nn.Linear")
    if r.rank(input) < 2 or r.rank(other) < 2:
        raise Refused("a matrix product of vectors has no kernel; reshape them to matrices")
    return r.add("batch_matmul", node, [input, other], call=r.function(torch.matmul))


# -- activations ----------------------------------------------------------------------------------------------------


@reads("relu", "relu6")
def _relu(r: Reader, node: fx.Node, input: Any, inplace: bool = False) -> Any:
    return add_relu(r, node, input, 6.0 if function_name(node) == "relu6" else None)


def add_relu(r: Reader, node: fx.Node, x: fx.Node, limit: float | None) -> Any:
    """ReLU with an upper limit or None."""
    return r.add("relu", node, [x], {"fn": "relu", "max": limit})


@reads("hardtanh", "clamp", "clip", "clamp_min")
def _clamp(r: Reader, node: fx.Node, input: Any, min: Any = None, max: Any = None, **names: Any) -> Any:
    default = (-1.0, 1.0) if function_name(node) == "hardtanh" else (None, None)
    low = r.constant_of(names.get("min_val", default[0] if min is None else min))
    high = r.constant_of(names.get("max_val", default[1] if max is None else max))
    if low == 0 and (high is None or high > 0):
        return add_relu(r, node, input, None if high is None else float(high))
    return r.add("elementwise", node, [input], {"fn": "clip"})


@reads("sigmoid", "tanh")
def _fixed(r: Reader, node: fx.Node, input: Any) -> Any:
    return r.add(function_name(node), node, [input])


@reads("gelu")
def _gelu(r: Reader, node: fx.Node, input: Any, approximate: str = "none") -> Any:
    return r.add("elementwise", node, [input], {"fn": "gelu" if approximate == "none" else "gelu_tanh"})


@reads("elu")
def _elu(r: Reader, node: fx.Node, input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    return r.add("elementwise", node, [input], {"fn": "elu" if alpha == 1 else "scaled elu"})


@reads("reciprocal_root")
def _reciprocal_root(r: Reader, node: fx.Node, x: Any, epsilon: float, factor: float = 1.0) -> Any:
    return r.add("elementwise", node, [x], {"fn": "rsqrt"})


@reads("of_shifted")
def _of_shifted(r: Reader, node: fx.Node, x: Any, offset: float, function: str) -> Any:
    return r.add("elementwise", node, [x], {"fn": function})


@reads("root")
def _root(r: Reader, node: fx.Node, x: Any) -> Any:
    return r.add("elementwise", node, [x], {"fn": "sqrt"})


@reads("softmax", "softmin")
def _softmax(r: Reader, node: fx.Node, input: Any, dim: Any = None, **settings: Any) -> Any:
    if dim is None or settings.get("dtype") is not None or function_name(node) == "softmin":
        raise Refused("softmax needs its dim, and no dtype of its own")
    return r.add("softmax", node, [input], {"dim": dim % r.rank(node), "beta": 1.0})


@reads("scaled_softmax")
def _scaled_softmax(r: Reader, node: fx.Node, x: Any, beta: float, dim: int) -> Any:
    return r.add("softmax", node, [x], {"dim": dim % r.rank(node), "beta": float(beta)})


@reads("masked_softmax")
def _masked_softmax(r: Reader, node: fx.Node, x: Any, keep: Any, beta: float, dim: int) -> Any:
    mask = r.parameter(keep) > 0
    mask = mask.reshape((1,) * (r.rank(node) - mask.ndim) + mask.shape)
    return r.add("softmax", node, [x], {"dim": dim % r.rank(node), "beta": float(beta), "mask": mask})


# -- reductions -----------------------------------------------------------------------------------------------------

REDUCTIONS = {"mean": "mean", "sum": "sum", "amax": "reduce_max", "amin": "reduce_min"}


@reads(*REDUCTIONS)
def _reduce(
    r: Reader, node: fx.Node, input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None
) -> Any:
    dim = axis if dim is None else dim
    rank = r.rank(input)
    dims = range(rank) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    found = tuple(sorted(d % rank for d in dims))
    if any(r.follows_batch(input, d) for d in found):
        raise Refused("a reduction over the batch has no counterpart in the artifact")
    return r.add(REDUCTIONS[function_name(node)], node, [input], {"dim": found, "keepdim": bool(keepdim)})


# -- what only training sees ----------------------------------------------------------------------------------------


@reads(
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous", "detach",
    "clone", "float", "type_as", "assert_is_none",
)  # fmt: skip
def _identity(r: Reader, node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Any:
    return r.add("identity", node, [input], call=lambda values, float_weights=False: [values[0]])


@reads("run_pre_hooks", "run_hooks")
def _hooks(r: Reader, node: fx.Node, module: Any, *values: Any) -> Any:
    return _identity(r, node, values[-1])


@reads("to")
def _to(r: Reader, node: fx.Node, input: Any, *args: Any, **kwargs: Any) -> Any:
    if node.meta["value"].dtype != torch.float32:
        raise Refused("a cast to another type than float32 is not a quantizable op")
    return _identity(r, node, input)
