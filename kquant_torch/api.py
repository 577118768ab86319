"""The public entry points for PyTorch: `wrap`, `plan`, and the three quantizers in their classic form."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from kquant.core.calibration import calibrate as calibrate_graph
from kquant.core.config import Candidate, Entry, match, parse
from kquant.core.errors import ConfigError, ModelError, UnsupportedError, check_choice
from kquant.core.graph import Op
from kquant.core.int8_spec import ROWS
from kquant.core.observers import CHOICES
from kquant.core.placement import place
from kquant.core.plan import Plan
from kquant.core.ready import check_quantizes
from kquant_torch.attach import attach
from kquant_torch.calls import undisturbed
from kquant_torch.data import arrays_of
from kquant_torch.read import Reading, read, read_code
from kquant_torch.root import is_quantized
from kquant_torch.target import ONEDNN, ONEDNN_FUSED
from kquant_torch.trace import Inputs, as_arguments
from kquant_torch.tracer import NotTraceable
from kquant_torch.untraced import attach_hooks, calibrate_untraced, is_untraced, read_untraced

# What trains quantized: the ops that have an integer kernel there, and those that keep their arithmetic in float.
TARGETS = {t.name: dataclasses.replace(t, rows={**ROWS, **t.rows}) for t in (ONEDNN, ONEDNN_FUSED)}
PORTABLE_MAX = 63  # codes; two products of u8 and s8 then fit the int16 that CPUs without VNNI add them in


def _entries(reading: Reading, config_list: Any, quantizer: str | None) -> dict[str, Entry | None]:
    graph = reading.graph
    entries = parse(config_list, quantizer=quantizer)
    for entry in entries:
        if 16 in (entry.input_bits, entry.output_bits):
            raise ConfigError(
                entry.where(entry.bits_key), "PyTorch's integer kernels take 8-bit activations at most", 16, "Use 8"
            )
    # A model input takes part only by its name: it is 8 bits unless an entry names it.
    candidates = [Candidate(f"input:{name}", (name,), "Input", False) for name in graph.inputs]
    candidates += [Candidate(op.id, op.attrs["aliases"], op.type_name, _in_default(reading, op)) for op in graph.ops]
    found = match(entries, candidates)
    return {**found, **{op.id: None for op in graph.ops if "where" in op.attrs}}


def _in_default(reading: Reading, op: Op) -> bool:
    """Whether "default" selects an op. It selects what cannot be quantized too, so that it is refused by name.

    In a model that cannot be traced the plan names it, since there nobody has to leave it out.
    """
    return reading.traced or op.kind != "opaque"


def _placed(reading: Reading, config_list: Any, quantizer: str | None, portable: bool, target: str) -> Plan:
    graph = reading.graph
    made = place(graph, _entries(reading, config_list, quantizer), TARGETS[target])
    check_quantizes(made)
    made = _with_places(made)
    if not portable:
        return made
    weights = {op: dataclasses.replace(spec, largest=PORTABLE_MAX) for op, spec in made.weights.items()}
    layers = {op.layer for op in graph.ops if op.id in weights}
    rows = tuple(
        dataclasses.replace(row, weight=f"{row.weight} within ±{PORTABLE_MAX}") if row.layer in layers else row
        for row in made.rows
    )
    return dataclasses.replace(made, weights=weights, rows=rows)


def _with_places(made: Plan) -> Plan:
    """The plan with file and line of the calls that stay float because the model cannot be traced."""
    reasons = {op.id: op.attrs["reason"] for op in made.graph.ops if "where" in op.attrs}
    layers = {op.layer: op.attrs["reason"] for op in made.graph.ops if "where" in op.attrs}
    rows = tuple(dataclasses.replace(r, note=layers[r.layer]) if r.layer in layers else r for r in made.rows)
    return dataclasses.replace(made, floats={**made.floats, **reasons}, rows=rows)


def _read(model: nn.Module, example_inputs: Any) -> tuple[Reading, Any]:
    """A model that was read, and how to attach a plan to it."""
    try:
        return read_code(model, example_inputs), attach
    except NotTraceable as error:
        reading = read_untraced(model, Inputs(model, example_inputs))
        if all("where" in op.attrs for op in reading.graph.ops):
            raise UnsupportedError(
                f"model {type(model).__name__!r}",
                "layers that are modules, or a forward that torch.fx can trace",
                str(error),
                "Write its functions as layers, or what it does in training only as a module",
            ) from error
        return reading, attach_hooks


def _check_model(model: Any, example_inputs: Any) -> None:
    """What can be said of a model and its inputs before anything runs."""
    if not isinstance(model, nn.Module):
        raise ModelError("model", "a torch.nn.Module", type(model).__name__, "Hand in the module itself")
    name = f"model {type(model).__name__!r}"
    if is_quantized(model):
        raise ModelError(
            name,
            "a float model",
            "a model that kquant_torch already wrapped",
            "Hand in the float model, of which wrap makes a copy",
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for what, value in tensors:
        if value.is_complex():
            raise ModelError(f"{what!r} of {name}", "real numbers", str(value.dtype), "Complex tensors have no codes")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ModelError(f"{what!r} of {name}", "float32 weights", str(value.dtype), "Call model.float() first")
    devices = {str(value.device) for _, value in tensors}
    if len(devices) > 1:
        raise ModelError(name, "all parameters on one device", sorted(devices), "Call model.to(device) first")
    positional, named = as_arguments(example_inputs)
    for what, value in [*enumerate(positional), *named.items()]:
        _check_input(what, value, next(iter(devices), None), name)


def _check_input(what: Any, value: Any, device: str | None, name: str) -> None:
    if not isinstance(value, torch.Tensor):
        return
    where = f"example_inputs[{what!r}]"
    if value.layout is not torch.strided:
        raise ModelError(where, "a dense tensor", str(value.layout), "Call .to_dense() on it")
    if value.is_complex():
        raise ModelError(where, "real numbers", str(value.dtype), "Complex tensors have no codes")
    if value.is_floating_point() and value.dtype != torch.float32:
        raise ModelError(where, "float32 values", str(value.dtype), "Call .float() on them")
    if value.ndim == 0 or value.shape[0] == 0:
        raise ModelError(
            where,
            "a batch: samples on axis 0, at least one",
            f"shape {tuple(value.shape)}",
            "Pass the inputs of one call, such as x[:2]",
        )
    if device is not None and str(value.device) != device:
        raise ModelError(
            where,
            f"a tensor on the device of {name}, {device}",
            str(value.device),
            "Move the model and its inputs to one device first",
        )
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ModelError(where, "finite values", "NaN or infinity", "Pass other samples")


@undisturbed
def plan(
    model: nn.Module,
    config_list: Any = None,
    *,
    example_inputs: Any,
    quantizer: str | None = None,
    portable: bool = False,
    target: str = "onednn",
) -> Plan:
    """What `wrap` would do, before anything happens; the arguments are those of `wrap`.

    Returns:
        A `Plan`; print it for a table, or call `to_dict()`. Ops that stay float are in it with the reason, functional
        ones of a model that cannot be traced with their file and line.
    """
    check_choice("target", target, tuple(TARGETS))
    _check_model(model, example_inputs)
    return _placed(_read(copy.deepcopy(model), example_inputs)[0], config_list, quantizer, portable, target)


@undisturbed
def wrap(
    model: nn.Module,
    config_list: Any = None,
    *,
    example_inputs: Any,
    calibration_data: Any = None,
    observer: str = "auto",
    portable: bool = False,
    target: str = "onednn",
) -> nn.Module:
    """A copy of a float model that trains quantized.

    Args:
        model: a float32 module; it is not changed.
        config_list: which layers are quantized how; None is `[{"q_bits": 8, "op_types": ["default"]}]`.
        example_inputs: one batch: a tensor, a tuple of tensors, or a dict by argument name; samples on axis 0.
        calibration_data: samples (a tensor or array) or batches (an iterable). With it the ranges are set before the
            first step, so the untrained model already has post-training-quantization accuracy.
        observer: how calibration picks ranges: `"auto"` (min-max; MSE at 4 bits and less), `"minmax"`,
            `"percentile"`, `"mse"`, `"ema"`.
        portable: weight codes within ±63, so that the artifact gives the same values on CPUs without VNNI.
        target: `"onednn"`; or `"onednn_fused"`, where a sum is computed by the convolution before it, whose own output
            is not quantized then: a kernel less for each, other values than every other artifact's, TorchScript only.

    Returns:
        A module of a subclass of the model's own class, with the same modules, parameters, attributes and hooks.

    Raises:
        ConfigError, ModelError, UnsupportedError, CalibrationError: each says where, what was expected and what to do.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
        >>> qmodel = wrap(model, example_inputs=x, calibration_data=x)
        >>> loss = qmodel(x).square().mean()
        >>> loss.backward()
        >>> qmodel[0].weight.grad is not None
        True
    """
    _check_model(model, example_inputs)
    return _quantize(
        copy.deepcopy(model), config_list, None, example_inputs, calibration_data, observer, portable, target
    )


@undisturbed
def _quantize_in_place(
    model: nn.Module, config_list: Any, quantizer: str, example_inputs: Any, *rest: Any
) -> nn.Module:
    _check_model(model, example_inputs)
    return _quantize(model, config_list, quantizer, example_inputs, *rest)


def _quantize(
    model: nn.Module, config_list: Any, quantizer: str | None, example_inputs: Any, calibration_data: Any,
    observer: str, portable: bool, target: str,
) -> nn.Module:  # fmt: skip
    check_choice("observer", observer, CHOICES)
    check_choice("target", target, tuple(TARGETS))
    reading, attached = _read(model, example_inputs)
    quantized = attached(_placed(reading, config_list, quantizer, portable, target), reading)
    if calibration_data is not None:
        calibrate(quantized, calibration_data, observer)
    return quantized


@undisturbed
def calibrate(qmodel: nn.Module, calibration_data: Any, observer: str = "auto") -> None:
    """Set the activation ranges of a wrapped model from data.

    Args:
        qmodel: a wrapped model.
        calibration_data, observer: as in `wrap`.
    """
    check_choice("observer", observer, CHOICES)
    if is_untraced(qmodel):
        calibrate_untraced(qmodel, calibration_data, observer)
        return
    calibrate_graph(read(qmodel), arrays_of(calibration_data), observer)


class _Quantizer:
    """The classic form: a quantizer made from a config, then called on a model."""

    kind = ""

    def __init__(self, config_list: Any = None):
        parse(config_list, quantizer=self.kind)
        self.config_list = config_list

    def __call__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        calibration_data: Any = None,
        observer: str = "auto",
        portable: bool = False,
        target: str = "onednn",
    ) -> nn.Module:
        """Quantize a model in place and return it; see `wrap`.

        Without `example_inputs` the first batch of `calibration_data` serves.
        """
        if example_inputs is None:
            example_inputs, calibration_data = _first_batch(calibration_data)
        return _quantize_in_place(
            model, self.config_list, self.kind, example_inputs, calibration_data, observer, portable, target
        )


def _first_batch(data: Any) -> tuple[Any, Any]:
    """Example inputs from calibration data, and the data with nothing taken away."""
    if isinstance(data, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(data[:2]), data
    batches = list(data) if hasattr(data, "__iter__") else []
    if not batches:
        raise ModelError(
            "example_inputs", "a batch of inputs, since a module does not know their shapes", "None",
            "Call quantizer(model, example_inputs=x), or give calibration_data",
        )  # fmt: skip
    first = batches[0]
    first = first[0] if isinstance(first, (tuple, list)) else first
    return torch.as_tensor(first) if not isinstance(first, dict) else first, batches


class NaiveQuantizer(_Quantizer):
    """Weights by their current max|w| per channel, ranges from calibration or the first training batch."""

    kind = "naive"


class QAT_Quantizer(_Quantizer):
    """Quantization-aware training after Jacob et al. 2018 (arXiv:1712.05877)."""

    kind = "qat"


class DoReFaQuantizer(_Quantizer):
    """DoReFa-Net (Zhou et al. 2016, arXiv:1606.06160): low-bit weights, activations and gradients."""

    kind = "dorefa"
