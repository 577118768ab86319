"""PyTorch: ResNet-20 on JPEG CIFAR-10, calibrated and after at most four epochs, each drop with its interval."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import kquant_torch
from benchmarks.data import Folder, Settings
from benchmarks.statistics import mean_difference, paired_difference
from benchmarks.table import Row
from benchmarks.torch_clip import clipped
from benchmarks.torch_finetune import Recipe, classes, finetune, keep_features
from benchmarks.torch_resnet import normalized, pretrained
from benchmarks.torch_unit import within_unit

CALIBRATION = 1000  # training images that ranges are calibrated on
ENDS = ("conv1", "linear")
# The last layer's input is what the pool gives, and is no less part of an 8-bit layer than its weights.
FIRST_AND_LAST = {"q_bits": 8, "op_names": [*ENDS, "avg_pool2d"]}


def config(weight: int, output: int, quantizer: str = "qat", *more: dict) -> list[dict]:
    """A `config_list` for all layers, and further entries."""
    bits = {"weight": weight, "output": output}
    return [{"q_bits": bits, "op_types": ["default"], "quantizer": quantizer}, *more]


@dataclasses.dataclass(frozen=True)
class Case:
    """A setting that is trained.

    Args:
        config: a `config_list`.
        recipe: how it is trained.
        drop: the bar of its mean drop in points.
        unit: the float network is the same one on the scales of DoReFa.
        clip: bits for which the kernels are clipped before they are quantized, or None.
        target: where the model is to run.

    With either, the batch norm statistics are first estimated anew, for the quantized weights.
    """

    config: Any
    recipe: Recipe
    drop: float
    unit: bool = False
    clip: int | None = None
    target: str = "onednn"


FEW_BITS = Recipe(1e-3, features=10.0, freeze_ranges=True, freeze_batch_norm=0.0, mix=0.5)
CASES = {
    "W8A8": Case(None, Recipe(2e-5, freeze_batch_norm=0.0), 0.25),
    "W4A4": Case(config(4, 4), FEW_BITS, 1.5),
    "W4A4 onednn_fused": Case(config(4, 4), FEW_BITS, 1.5, target="onednn_fused"),
    "W2A2": Case(
        config(2, 2, "qat", FIRST_AND_LAST),
        Recipe(7e-4, features=3.0, freeze_batch_norm=0.6, bound=True, batch=16),
        7.0,
        clip=2,
    ),
    "DoReFa W4A4": Case(
        config(4, 4, "dorefa"), Recipe(1e-3, features=3.0, freeze_batch_norm=0.6, batch=50), 2.0, unit=True
    ),
}


def exported_classes(qmodel: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The predicted class of each sample by the exported file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.pt"
        kquant_torch.export_torchscript(qmodel, path, example_inputs=x[:2])
        module = torch.jit.load(path)
        with torch.no_grad():
            return torch.cat([module(part).argmax(1) for part in x.split(250)]).numpy()


def calibrated(model: nn.Module, samples: torch.Tensor, x: torch.Tensor, y: np.ndarray) -> Iterator[Row]:
    """The rows of the model that is calibrated only."""
    floats = classes(model, x)
    for name, entries in {"W8A8": None, "W4A8": config(4, 8)}.items():
        qmodel = kquant_torch.wrap(model, entries, example_inputs=x[:2], calibration_data=samples)
        for what, found in (("model", classes(qmodel, x)), ("artifact", exported_classes(qmodel, x))):
            gain = paired_difference(floats == y, found == y)
            accuracy, agreement = 100 * (found == y).mean(), 100 * (found == floats).mean()
            detail = f"accuracy {accuracy:.2f}, float {100 * (floats == y).mean():.2f}, difference {gain}"
            title = f"ResNet-20 {name} calibrated, {what}"
            if name == "W8A8":
                yield Row(f"{title}: agreement with float", agreement, 98.0, False, "%", detail)
                yield Row(f"{title}: drop", -gain.points, 0.4, detail=detail)
            else:
                yield Row(f"{title}: accuracy", accuracy, 85.5, False, "%", f"{detail}, agreement {agreement:.2f}%")


def trained(
    name: str, model: nn.Module, images: torch.Tensor, x: torch.Tensor, y: np.ndarray, settings: Settings
) -> Row:
    """The row of one setting: the mean over seeds of the artifact's drop."""
    case, floats = CASES[name], classes(model, x) == y
    recipe = dataclasses.replace(case.recipe, epochs=1) if settings.quick else case.recipe
    runs = []
    for seed in range(1 if settings.quick else settings.seeds):
        torch.manual_seed(seed)
        teacher, times = within_unit(model, images[:CALIBRATION]) if case.unit else (model, 1.0)
        start_from = clipped(teacher, case.clip, ENDS) if case.clip else teacher
        qmodel = kquant_torch.wrap(
            start_from, case.config, example_inputs=x[:2], calibration_data=images[:CALIBRATION], target=case.target
        )
        if case.unit or case.clip:
            kquant_torch.reestimate_batch_norm(qmodel, images[:CALIBRATION])
        if not runs:
            start = 100 * (classes(qmodel, x) == y).mean()
        finetune(qmodel, teacher, images, recipe, seed, times)
        runs.append(exported_classes(qmodel, x) == y)
    gain = mean_difference(floats, np.array(runs))
    each = " ".join(f"{100 * right.mean():.2f}" for right in runs)
    detail = f"difference {gain}; runs {each}, untrained {start:.2f}, float {100 * floats.mean():.2f}"
    return Row(
        f"ResNet-20 {name} after {recipe.epochs} epochs, artifact: mean drop", -gain.points, case.drop, detail=detail
    )


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    (images, _), (test, y) = folder.cifar("train"), folder.cifar("test")
    x, samples = normalized(test), normalized(images)
    model = keep_features(pretrained(folder.find("resnet20_jpgft_float.pt")))
    yield from calibrated(model, samples[:CALIBRATION], x, y)
    for name in CASES:
        yield trained(name, model, samples, x, y, settings)
