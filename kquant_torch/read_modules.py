"""How torch's layers are read, by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from kquant.core.elementwise import is_elementwise
from kquant.core.graph import Weight
from kquant_torch.fake_quantize import FakeQuantize
from kquant_torch.handlers import FUNCTIONS, opaque, reads, reads_module
from kquant_torch.kernels import read_layer
from kquant_torch.norms import BATCH_NORMS, FreezableNorm, batch_affine
from kquant_torch.read_functions import add_relu
from kquant_torch.reader import Reader, Refused
from kquant_torch.weights import QUANTIZED, RECURRENT


def read_unknown_module(r: Reader, node: fx.Node, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer that has no handler: a table if it proves to be elementwise, else it is refused."""
    if parametrize.is_parametrized(module):
        raise Refused("it has parametrizations; remove them (torch.nn.utils.parametrize.remove_parametrizations)")
    operands = [n for n in node.all_input_nodes if r.is_data(n)]
    name = type(module).__name__
    has_state = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    same = len(operands) == 1 and getattr(node.meta["value"], "shape", None) == operands[0].meta["value"].shape
    call = r.caller(node, operands)
    if not same or has_state or not is_elementwise(lambda values: call([values])[0]):
        return opaque(r, node, node.meta.get("reason", f"the layer {name} has no integer form"))
    return r.add("elementwise", node, operands, {"fn": name.lower()})


# -- layers with a kernel -------------------------------------------------------------------------------------------


def _convolution(module: Any) -> tuple[str, dict]:
    kind = "conv2d_transpose" if module.transposed else "conv2d"
    names = ("stride", "padding", "dilation", "groups", *(("output_padding",) if module.transposed else ()))
    return kind, {"rank": len(module.kernel_size), **{n: getattr(module, n) for n in names}}


KINDS: dict[type, Any] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.ConvTranspose3d: _convolution,
    nn.Linear: lambda module: ("dense", {}),
    nn.Embedding: lambda module: ("embedding", {}),
    nn.PReLU: lambda module: ("prelu", {}),
}


def why_not_quantizable(module: Any) -> str | None:
    """What keeps the weight of a layer from being quantized, or None."""
    if any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values()):
        return "it has weight_norm or spectral_norm; remove it (torch.nn.utils.remove_weight_norm) before quantizing"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return (
            f"padding_mode={module.padding_mode!r} has no kernel; pad with F.pad before a convolution without padding"
        )
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes the embedding's weights while it runs"
    return None


@reads_module(*KINDS, *(QUANTIZED[base] for base in KINDS))
def _layer(r: Reader, node: fx.Node, module: Any, *args: Any, **kwargs: Any) -> Any:
    base = next(b for b in KINDS if isinstance(module, b))
    kind, attrs = KINDS[base](module)
    reason = why_not_quantizable(module)
    if reason:
        raise Refused(reason)
    return read_layer(r, node, module, kind, node.all_input_nodes[0], attrs)


@reads_module(*RECURRENT, *RECURRENT.values())
def _recurrent(r: Reader, node: fx.Node, module: Any, *args: Any, **kwargs: Any) -> Any:
    weights = {
        f"kernel:{name}": Weight(tuple(w.shape), lambda w=w: w.detach().cpu().float().numpy())
        for name, w in module.named_parameters()
        if name.startswith("weight")
    }
    operands = [n for n in node.all_input_nodes if r.is_data(n)]

    def call(values: Any, float_weights: bool = False) -> list[np.ndarray]:
        known = {o: r.tensor(v) for o, v in zip(operands, values, strict=True)}
        if not (float_weights and hasattr(module, "run")):
            with torch.no_grad():
                return r.arrays(r.run(node, known))
        inputs, named = fx.node.map_arg((node.args, node.kwargs), lambda n: r.run(n, known))
        with torch.no_grad():
            return r.arrays(module.run(*inputs, **named, quantized=False))

    return r.add("recurrent", node, operands, {"mode": module.mode}, weights=weights, call=call)


# -- normalization --------------------------------------------------------------------------------------------------


@reads_module(*BATCH_NORMS, *BATCH_NORMS.values())
def _batch_norm(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    """Batch norm with its running statistics: a scale and an offset per channel."""
    if module.running_mean is None:
        raise Refused("batch norm without running statistics has no integer form")

    def affine() -> tuple[np.ndarray, np.ndarray]:
        mean, variance = (v.detach().cpu().double().numpy() for v in (module.running_mean, module.running_var))
        return batch_affine(module, mean, variance)

    size = (module.num_features,)
    weights = {"scale": Weight(size, lambda: affine()[0]), "offset": Weight(size, lambda: affine()[1])}
    own = {"batch_norm": module} if isinstance(module, FreezableNorm) else {}
    attrs = {"axis": 1, "normalizes": node.op == "call_module", **own}
    return r.add("channel_affine", node, [input], attrs, weights=weights)


@reads("norm_of")
def _norm_of(r: Reader, node: fx.Node, module: fx.Node, x: Any) -> Any:
    return _batch_norm(r, node, r.model.get_submodule(str(module.target)), x)


@reads("batch_norm")
def _batch_norm_function(
    r: Reader, node: fx.Node, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """With statistics that stand still: a scale and an offset per channel."""
    if training or not (r.is_parametric(running_mean) and r.is_parametric(running_var)):
        raise Refused("batch norm by the statistics of the batch has no integer form")

    def affine() -> tuple[np.ndarray, np.ndarray]:
        given = (running_mean, running_var, weight, bias)
        mean, variance, gamma, beta = (None if n is None else r.parameter(n).astype(np.float64) for n in given)
        scale = (1.0 if gamma is None else gamma) / np.sqrt(variance + eps)
        return scale, (0.0 if beta is None else beta) - mean * scale

    size = tuple(running_mean.meta["value"].shape)
    weights = {"scale": Weight(size, lambda: affine()[0]), "offset": Weight(size, lambda: affine()[1])}
    return r.add("channel_affine", node, [input], {"axis": 1}, weights=weights)


# -- markers of a wrapped model -------------------------------------------------------------------------------------


@reads_module(FakeQuantize)
def _fake_quantize(
    r: Reader, node: fx.Node, module: FakeQuantize, x: Any, site: int | None = None, boundary: bool = False
) -> Any:
    attrs = {
        "spec": str(node.target).rpartition(".")[2],
        "site": site,
        "quantizer": module,
        "unit": module.unit,
        "boundary": boundary,
        "is_waiting": module.is_waiting,
    }
    return r.add("fake_quant", node, [x], attrs)


# -- layers that are functions --------------------------------------------------------------------------------------


@reads_module(nn.ReLU)
def _relu(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    return add_relu(r, node, input, None)


@reads_module(nn.ReLU6)
def _relu6(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    return add_relu(r, node, input, 6.0)


_RESIZE = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
# A module is read as the function of the same meaning, called with the module's attributes.
AS_FUNCTION: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.Softmax: ("softmax", ("dim",)),
    nn.MaxPool1d: ("max_pool1d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    nn.MaxPool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    nn.MaxPool3d: ("max_pool3d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    nn.AvgPool1d: ("avg_pool1d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    nn.AvgPool2d: (
        "avg_pool2d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AvgPool3d: (
        "avg_pool3d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool1d: ("adaptive_avg_pool1d", ("output_size",)),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", ("output_size",)),
    nn.AdaptiveAvgPool3d: ("adaptive_avg_pool3d", ("output_size",)),
    nn.AdaptiveMaxPool1d: ("adaptive_max_pool1d", ("output_size", "return_indices")),
    nn.AdaptiveMaxPool2d: ("adaptive_max_pool2d", ("output_size", "return_indices")),
    nn.AdaptiveMaxPool3d: ("adaptive_max_pool3d", ("output_size", "return_indices")),
    nn.ConstantPad1d: ("pad", ("padding", "value")),
    nn.ConstantPad2d: ("pad", ("padding", "value")),
    nn.ConstantPad3d: ("pad", ("padding", "value")),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")),
    nn.Unflatten: ("unflatten", ("dim", "unflattened_size")),
    nn.Upsample: ("interpolate", _RESIZE),
    nn.UpsamplingNearest2d: ("interpolate", _RESIZE),
    nn.UpsamplingBilinear2d: ("interpolate", _RESIZE),
}  # fmt: skip
RENAMED = {nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.LeakyReLU: "leaky_relu", nn.Hardsigmoid: "hard_sigmoid"}


@reads_module(*AS_FUNCTION)
def _as_function(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    name, attributes = AS_FUNCTION[type(module)]
    node.meta["function"] = name
    return FUNCTIONS[name](r, node, input, **{a: getattr(module, a) for a in attributes})


@reads_module(*RENAMED)
def _elementwise(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    return r.add("elementwise", node, [input], {"fn": RENAMED[type(module)]})


@reads_module(
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
)  # fmt: skip
def _pad(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    name = type(module).__name__
    mode = "reflect" if name.startswith("Reflection") else "replicate" if name.startswith("Replication") else "constant"
    return FUNCTIONS["pad"](r, node, input, module.padding, mode, getattr(module, "value", 0.0))


@reads_module(
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity
)
def _identity(r: Reader, node: fx.Node, module: Any, input: Any) -> Any:
    return FUNCTIONS["dropout"](r, node, input)
