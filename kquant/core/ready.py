"""What must hold before a trained model is exported, on every target."""

from __future__ import annotations

from kquant.core.errors import ExportError
from kquant.core.graph import Graph
from kquant.core.integer import IntegerModel


def check_ranges(graph: Graph) -> None:
    """Refuse a model with ranges that were never set.

    Raises:
        ExportError: naming the tensors.
    """
    unset = [op.inputs[0] for op in graph.ops if op.kind == "fake_quant" and not op.attrs["quantizer"].is_set()]
    if unset:
        raise ExportError(
            f"tensors {', '.join(map(repr, unset[:5]))}{' ...' if len(unset) > 5 else ''}",
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
            f"layers {', '.join(map(repr, waiting[:5]))}{' ...' if len(waiting) > 5 else ''}",
            "quantization must have begun before the export",
            "training steps fewer than quant_start_step",
            "Train past quant_start_step, or leave it out of config_list",
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
