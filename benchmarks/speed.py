"""A training step of the 8-bit QAT model against the float model's: ResNet8, batch 64, batch norm included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import keras
import numpy as np

import kquant
from benchmarks.data import Folder, Settings
from benchmarks.statistics import interleave, ratio
from benchmarks.table import Row

BATCH = 64
BAR = 1.15
BLOCK = 20  # steps timed together


def train_step(model: keras.Model, x: np.ndarray, y: np.ndarray, jit: bool) -> Callable[[], object]:
    """The step that `fit` runs, compiled, on one batch; returns when the step is done."""
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(), jit_compile=jit)
    images, labels = keras.ops.convert_to_tensor(x, "float32"), keras.ops.convert_to_tensor(y)
    model.make_train_function()

    def step() -> object:
        logs = model.train_function(iter([(images, labels)]))
        return float(logs["loss"])

    for _ in range(5):
        step()
    return step


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark, compiled by XLA and not."""
    images, labels = folder.cifar("train")
    x, y = images[:BATCH], labels[:BATCH]
    for jit in (False, True):
        model = folder.model("resnet8_jpgft_float.keras")
        quantized = kquant.quantize_model(model, calibration_data=images[:256])
        sides = [train_step(m, x, y, jit) for m in (model, quantized)]
        found = ratio(*interleave(sides, 5 if settings.quick else 15, BLOCK))
        detail = f"{found}; float {1e3 * found.reference:.1f} ms, QAT {1e3 * found.other:.1f} ms"
        yield Row(f"training step, QAT W8A8 / float, jit_compile={jit}", found.median, BAR, detail=detail)
