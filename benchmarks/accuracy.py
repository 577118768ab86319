"""Accuracy of real models on real data, calibrated only and after three epochs: of the model and of its artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import keras
import numpy as np

import kquant
from benchmarks.data import Folder, Settings
from benchmarks.finetune import RECIPES, finetune
from benchmarks.imagenet import converter_ptq
from benchmarks.measure import classes, exported_classes, file_classes
from benchmarks.statistics import mean_difference, paired_difference
from benchmarks.table import Row

CALIBRATION = 1000  # training images that ranges are calibrated on
BITS = {
    "W8A8": None,
    "W4A8": [{"q_bits": {"weight": 4, "output": 8}, "op_types": ["default"]}],
    "W4A4": [{"q_bits": 4, "op_types": ["default"]}],
}
TRAINED_DROPS = {"W8A8": 0.25, "W4A8": 0.7, "W4A4": 2.0}


def compared(name: str, floats: np.ndarray, others: np.ndarray, y: np.ndarray, bar: float | None) -> Row:
    """Agreement of two models' classes, with both accuracies and the interval of their paired difference."""
    difference = paired_difference(floats == y, others == y)
    accuracies = f"{100 * (others == y).mean():.2f} against {100 * (floats == y).mean():.2f}"
    detail = f"n={len(y)}; accuracy {accuracies}, difference {difference}"
    return Row(f"{name}: agreement with float", 100 * (floats == others).mean(), bar, False, "%", detail)


def calibrated(
    name: str,
    model: keras.Model,
    samples: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    bar: float,
    drop: float | None = None,
) -> Iterator[Row]:
    """The rows of a model that is calibrated only; `drop` is the bar of its loss of accuracy."""
    floats = classes(model, x)
    qmodel = kquant.quantize_model(model, calibration_data=samples)
    before, artifact = classes(qmodel, x), exported_classes(qmodel, x)
    yield compared(f"{name} W8A8 artifact", floats, artifact, y, bar)
    if drop is not None:
        found = paired_difference(floats == y, artifact == y)
        yield Row(f"{name} W8A8 artifact: drop", -found.points, drop, unit=" ", detail=f"difference {found}")
    found = paired_difference(before == y, artifact == y)
    turned = abs(int((before == y).sum()) - int((artifact == y).sum()))
    same = 100 * (before == artifact).mean()
    detail = f"points, {turned} of {len(y)} samples; difference {found}, same class on {same:.2f}%"
    yield Row(f"{name} step 0: model and artifact apart by", abs(found.points), 0.0, detail=detail)
    theirs = file_classes(converter_ptq(model, samples), x)
    yield compared(f"{name} converter's own PTQ", floats, theirs, y, None)


def trained(folder: Folder, settings: Settings, bits: str) -> Iterator[Row]:
    """The rows of ResNet8 after training at some bits: the mean over seeds."""
    model = folder.model("resnet8_jpgft_float.keras")
    images, _ = folder.cifar("train")
    x, y = folder.cifar("test")
    floats = classes(model, x) == y
    recipe = dataclasses.replace(RECIPES[bits], epochs=1) if settings.quick else RECIPES[bits]
    models, artifacts = [], []
    for seed in range(1 if settings.quick else settings.seeds):
        qmodel = kquant.quantize_model(model, BITS[bits], calibration_data=images[:CALIBRATION])
        if not seed:
            start = 100 * (exported_classes(qmodel, x) == y).mean()
        finetune(qmodel, model, images, recipe, seed)
        models.append(classes(qmodel, x) == y)
        artifacts.append(exported_classes(qmodel, x) == y)
    found = mean_difference(floats, np.array(artifacts))
    runs = " ".join(f"{100 * right.mean():.2f}" for right in artifacts)
    detail = f"difference {found}; runs {runs}, untrained {start:.2f}, float {100 * floats.mean():.2f}"
    yield Row(f"ResNet8 {bits} artifact after training: mean drop", -found.points, TRAINED_DROPS[bits], detail=detail)
    same = mean_difference(floats, np.array(models))
    yield Row(f"ResNet8 {bits} model after training: mean drop", -same.points, detail=f"difference {same}")


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    images, _ = folder.cifar("train")
    model = folder.model("resnet8_jpgft_float.keras")
    yield from calibrated("ResNet8", model, images[:CALIBRATION], *folder.cifar("test"), bar=97.0, drop=0.5)
    kws = folder.arrays("kws01.npz")
    x = ((kws["x_test_int8"].astype("float32") - float(kws["zero_point"])) * float(kws["scale"])).astype("float32")
    model = folder.model("mlperf_kws_dscnn_float.keras")
    yield from calibrated("DS-CNN kws01", model, x[:100], x[100:], kws["y_test"][100:], bar=98.5)
    arm = folder.arrays("arm_kws_mfcc_dev300.npz")
    model = folder.model("arm_ds_cnn_s_float.keras")
    yield from calibrated("ARM DS-CNN-S", model, arm["mfcc"][:100], arm["mfcc"][100:], arm["y"][100:], bar=97.0)
    for bits in BITS:
        yield from trained(folder, settings, bits)
