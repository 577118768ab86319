"""Fashion-MNIST from scratch: DoReFa at low bits against float, same epochs and optimizer, mean over seeds."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
from keras import layers

import kquant
from benchmarks.data import Folder, Settings
from benchmarks.measure import classes, exported_classes
from benchmarks.statistics import mean_difference
from benchmarks.table import Row

EPOCHS, BATCH, RATE = 3, 128, 1e-3
ENDS = {"q_bits": 8, "op_names": ["first", "last"]}


def low(weight: int, output: int, gradient: int) -> list[dict]:
    """A config of these bits, with the first and last layer at 8."""
    bits = {"weight": weight, "output": output, "gradient": gradient}
    return [{"q_bits": bits, "op_types": ["default"]}, ENDS]


CONFIGS = {"W1A2G6": (low(1, 2, 6), 2.5), "W4A4G8": (low(4, 4, 8), 0.7)}  # with the points that each may lose


def small_cnn() -> keras.Model:
    """Two convolutions and two dense layers with batch norm: 106,202 parameters."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="first"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(10, name="last"),
            layers.Softmax(),
        ]
    )


def train(model: keras.Model, x: np.ndarray, y: np.ndarray, seed: int, epochs: int) -> None:
    """The one recipe of float and quantized models."""
    keras.utils.set_random_seed(seed)
    decay = keras.optimizers.schedules.CosineDecay(RATE, epochs * -(-len(x) // BATCH))
    model.compile(keras.optimizers.Adam(decay), keras.losses.SparseCategoricalCrossentropy(), jit_compile=False)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    file = folder.arrays("fashion_mnist_tm.npz")
    x, held = (file[f"x_{part}"][..., None].astype("float32") / 255 for part in ("train", "test"))
    y, wanted = (file[f"y_{part}"].astype("int64") for part in ("train", "test"))
    epochs, seeds = (1, 1) if settings.quick else (EPOCHS, settings.seeds)
    floats: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in CONFIGS}
    models: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        start = small_cnn()
        twins = {
            name: kquant.DoReFaQuantizer(config)(start, calibration_data=x[:500])
            for name, (config, _) in CONFIGS.items()
        }
        train(start, x, y, seed, epochs)
        floats.append(classes(start, held) == wanted)
        for name, twin in twins.items():
            train(twin, x, y, seed, epochs)
            found[name].append(exported_classes(twin, held) == wanted)
            models[name].append(100 * (classes(twin, held) == wanted).mean())
    for name, (_, bar) in CONFIGS.items():
        difference = mean_difference(np.array(floats), np.array(found[name]))
        runs = " ".join(f"{100 * right.mean():.2f}" for right in found[name])
        against = " ".join(f"{100 * right.mean():.2f}" for right in floats)
        inside = " ".join(f"{figure:.2f}" for figure in models[name])
        detail = f"difference {difference}; artifacts {runs}, models {inside}, float {against}"
        yield Row(f"Fashion-MNIST DoReFa {name} artifact: mean drop", -difference.points, bar, detail=detail)
