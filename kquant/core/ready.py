"""What must hold before a model is quantized, and before a trained one is exported, on every target."""

from __future__ import annotations

from kquant.core.errors import ConfigError, ExportError, ModelError, some
from kquant.core.graph import Graph
from kquant.core.int8_spec import Placement, row_of
from kquant.core.integer import IntegerModel
from kquant.core.plan import Plan
from kquant.core.stages import stages
from kquant.core.target import Target


def check_quantizes(plan: Plan) -> None:
    """Refuse a model, or a config, that leaves nothing to quantize.

    Raises:
        ModelError: no op of the model has an integer form.
        ConfigError: the config leaves every op in float.
    """
    if all(row_of(op.kind).placement in (Placement.IDENTITY, Placement.OPAQUE) for op in plan.graph.ops):
        raise ModelError(
            f"model {plan.graph.name!r}",
            "a model with at least one quantizable layer",
            "none",
            "Hand in the model that holds the layers",
        )
    if not plan.integer and not plan.weights:
        raise ConfigError(
            "config_list",
            f"at least one entry that quantizes an op of model {plan.graph.name!r}",
            "entries that leave every op in float",
            'Put {"q_bits": 8, "op_types": ["default"]} in front: what no entry matches stays in float',
        )


def check_ranges(graph: Graph) -> None:
    """Refuse a model with ranges that were never set.

    Raises:
        ExportError: naming the tensors.
    """
    unset = [op.inputs[0] for op in graph.ops if op.kind == "fake_quant" and not op.attrs["quantizer"].is_set()]
    if unset:
        raise ExportError(
            f"tensors {some(unset)}",
            "every activation range must be set before the export",
            f"{len(unset)} ranges without data",
            "Pass calibration_data= when you quantize the model, or train a step",
        )


def check_started(graph: Graph) -> None:
    """Refuse a model whose quantization has not begun: it was trained in float so far.

    Raises:
        ExportError: naming the layers.
    """
    waiting = [op.layer for op in graph.ops if "is_waiting" in op.attrs and op.attrs["is_waiting"]()]
    if waiting:
        raise ExportError(
            f"layers {some(waiting)}",
            "quantization must have begun before the export",
            "training steps fewer than quant_start_step",
            "Train past quant_start_step, or leave it out of config_list",
        )


def check_sums(graph: Graph, made_for: Target, target: Target, fix: str) -> None:
    """Refuse a model whose kernels add before they round, on a target that has no such kernels.

    Raises:
        ExportError: naming the layers, and with `fix`.
    """
    fused = [s for s in stages(graph, target=made_for) if s.add is not None]
    lacking = [s.anchor.layer for s in fused if target.row(s.anchor.kind).sums_axes == 0]
    if lacking:
        raise ExportError(
            f"layers {some(lacking)}",
            f"kernels that add before they round, as the model was trained for {made_for.name!r}",
            f"an artifact for {target.name!r}, which has none for {len(lacking)} sums",
            fix,
        )


def check_integer(model: IntegerModel) -> None:
    """Refuse an integer model with float ops in it.

    Raises:
        ExportError: naming the ops and why they are float.
    """
    if model.floats:
        listed = "; ".join(f"{name}: {why}" for name, why in list(model.floats.items())[:8])
        raise ExportError(
            f"model {model.name!r}",
            "every op must run in integers",
            listed,
            "Add a config entry that matches these ops, or pass allow_float=True",
        )
