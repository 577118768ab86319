"""tf_keras: accuracy beside tfmot's own training, size, the training step, and the same numbers as Keras 3."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

import kquant
from benchmarks.accuracy import BITS, CALIBRATION, TRAINED_DROPS, calibrated
from benchmarks.data import Folder, Settings
from benchmarks.finetune import RECIPES, STATISTICS, Batches, Recipe, losses, prepare
from benchmarks.measure import classes, exported_classes, file_classes
from benchmarks.statistics import interleave, mean_difference, ratio
from benchmarks.table import Row
from kquant import keras2  # imports tfmot without changing the process

STEP_BAR, SIZE_BAR, BEHIND = 1.15, 0.40, 0.25
BATCH, BLOCK = 64, 20


def tfmot_model(model: tf_keras.Model) -> tf_keras.Model:
    """The model as tfmot quantizes it."""
    import tensorflow_model_optimization as tfmot

    assert keras2  # after it
    return tfmot.quantization.keras.quantize_model(model)


def tfmot_file(qmodel: tf_keras.Model) -> bytes:
    """What tfmot's documentation exports."""
    converter = tf.lite.TFLiteConverter.from_keras_model(qmodel)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Statistics for quantized inputs were expected")
        return converter.convert()


class Augmented(Batches, tf_keras.utils.Sequence):
    """The batches as tf_keras takes them."""


def finetune(qmodel: tf_keras.Model, data: Any, recipe: Recipe) -> None:
    """The same training for either side: Adam, cosine decay to zero, the float model's outputs as targets."""
    decay = tf_keras.optimizers.schedules.CosineDecay(recipe.rate, recipe.epochs * len(data))
    qmodel.compile(tf_keras.optimizers.Adam(decay), **losses(recipe, tf_keras))
    qmodel.fit(data, epochs=recipe.epochs, shuffle=False, verbose=0)


class Plain(tf_keras.utils.Sequence):
    """Samples that are no images, with the float model's outputs as targets, shuffled by a seed."""

    def __init__(self, x: np.ndarray, teacher: tf_keras.Model, seed: int, batch: int = 20):
        self.x, self.y, self.batch = x, teacher.predict(x, verbose=0), batch
        self.random = np.random.default_rng(seed)
        self.order = self.random.permutation(len(x))

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * self.batch : (index + 1) * self.batch]
        return self.x[chosen], self.y[chosen]

    def on_epoch_end(self) -> None:
        self.order = self.random.permutation(len(self.x))


def beside_tfmot(
    name: str,
    model: tf_keras.Model,
    held: tuple[np.ndarray, np.ndarray],
    samples: np.ndarray,
    data: Callable[[int], Any],
    recipe: Recipe,
    seeds: int,
) -> Iterator[Row]:
    """Both artifacts after the same training, over seeds: ours is at least tfmot's mean less 0.25 points."""
    x, y = held
    floats = classes(model, x) == y
    ours, theirs = [], []
    for seed in range(seeds):
        tf_keras.utils.set_random_seed(seed)
        qmodel = kquant.quantize_model(model, calibration_data=samples)
        finetune(qmodel, data(seed), recipe)
        ours.append(exported_classes(qmodel, x) == y)
        tf_keras.utils.set_random_seed(seed)
        other = tfmot_model(model)
        finetune(other, data(seed), recipe)
        theirs.append(file_classes(tfmot_file(other), x) == y)
    means = [100 * np.mean(right) for right in (ours, theirs)]
    runs = ["/".join(f"{100 * right.mean():.2f}" for right in side) for side in (ours, theirs)]
    detail = f"ours {runs[0]}, tfmot {runs[1]}, float {100 * floats.mean():.2f}, n={len(y)}"
    yield Row(f"{name} W8A8 trained: tfmot's mean less ours", means[1] - means[0], BEHIND, detail=detail)


def shortened(recipe: Recipe, settings: Settings) -> Recipe:
    """One epoch of a recipe where the run is to be quick."""
    return dataclasses.replace(recipe, epochs=1) if settings.quick else recipe


def resnet8(folder: Folder, settings: Settings) -> Iterator[Row]:
    """ResNet8: calibrated, and trained beside tfmot."""
    images, _ = folder.cifar("train")
    held = folder.cifar("test")
    model = load(folder, "resnet8_jpgft_float.h5")
    yield from calibrated("ResNet8", model, images[:CALIBRATION], *held, bar=97.0, drop=0.5)
    recipe, seeds = shortened(RECIPES["W8A8"], settings), 1 if settings.quick else settings.seeds
    data = partial(Augmented, images, model, recipe)
    yield from beside_tfmot("ResNet8", model, held, images[:CALIBRATION], data, recipe, seeds)


def widths(folder: Folder, settings: Settings) -> Iterator[Row]:
    """ResNet8 trained at three widths."""
    images, _ = folder.cifar("train")
    model = load(folder, "resnet8_jpgft_float.h5")
    for bits, config in BITS.items():
        recipe = shortened(RECIPES[bits], settings)
        seeds = 1 if settings.quick else settings.seeds
        yield trained(model, images, folder.cifar("test"), bits, config, recipe, seeds)


def trained(
    model: tf_keras.Model, images: np.ndarray, held: Any, bits: str, config: Any, recipe: Recipe, seeds: int
) -> Row:
    """The mean drop of the artifact after training, as `accuracy` measures it on Keras 3."""
    x, y = held
    floats = classes(model, x) == y
    artifacts = []
    for seed in range(seeds):
        tf_keras.utils.set_random_seed(seed)
        qmodel = kquant.quantize_model(model, config, calibration_data=images[:CALIBRATION])
        student, teacher = prepare(qmodel, model, images, recipe, tf_keras)
        finetune(student, Augmented(images, teacher, recipe, seed), recipe)
        kquant.reestimate_batch_norm(qmodel, images[:STATISTICS])
        artifacts.append(exported_classes(qmodel, x) == y)
    found = mean_difference(floats, np.array(artifacts))
    name = f"ResNet8 {bits} artifact after training: mean drop"
    return Row(name, -found.points, TRAINED_DROPS[bits], detail=f"difference {found}")


def keywords(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The two keyword models; there is no training set, so both sides train on the calibration samples."""
    kws = folder.arrays("kws01.npz")
    x = ((kws["x_test_int8"].astype("float32") - float(kws["zero_point"])) * float(kws["scale"])).astype("float32")
    arm = folder.arrays("arm_kws_mfcc_dev300.npz")
    nets = (
        ("DS-CNN kws01", "mlperf_kws_dscnn_float.h5", x, kws["y_test"], 98.5),
        ("ARM DS-CNN-S", "arm_ds_cnn_s_float.h5", arm["mfcc"], arm["y"], 97.0),
    )
    recipe, seeds = shortened(Recipe(1e-4, epochs=20), settings), 1 if settings.quick else settings.seeds
    for name, file, inputs, labels, bar in nets:
        model = load(folder, file)
        samples, held = inputs[:100], (inputs[100:], labels[100:])
        yield from calibrated(name, model, samples, *held, bar=bar)
        data = partial(Plain, samples, model)
        yield from beside_tfmot(name, model, held, samples, data, recipe, seeds)


def load(folder: Folder, name: str) -> tf_keras.Model:
    """A float tf_keras model."""
    return tf_keras.models.load_model(folder.find(name), compile=False)


def autoencoder() -> tf_keras.Model:
    """Dense, batch norm and ReLU five times each way, 640 wide at both ends."""
    x = y = tf_keras.Input((640,))
    for units in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        y = tf_keras.layers.ReLU()(tf_keras.layers.BatchNormalization()(tf_keras.layers.Dense(units)(y)))
    return tf_keras.Model(x, tf_keras.layers.Dense(640)(y))


def size() -> Iterator[Row]:
    """The autoencoder's file against tfmot's."""
    model = autoencoder()
    data = np.random.default_rng(0).normal(size=(256, 640)).astype("float32")
    other = tfmot_model(model)
    other.compile(tf_keras.optimizers.SGD(0.0), "mse")
    other.fit(data, data, verbose=0)
    theirs = len(tfmot_file(other))
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.tflite"
        kquant.export_tflite(kquant.quantize_model(model, calibration_data=data), path)
        ours, integer = path.stat().st_size, kquant.audit(path).fully_integer
    detail = f"{ours} B against {theirs} B; ours fully integer: {integer}"
    yield Row("Dense+BN autoencoder: size / tfmot's", ours / theirs, SIZE_BAR if integer else -1.0, detail=detail)


def train_step(model: tf_keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    """The step that `fit` runs, compiled, on one batch; returns when the step is done."""
    model.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy())
    batches = iter(tf.data.Dataset.from_tensors((tf.constant(x), tf.constant(y))).repeat())
    model.make_train_function()

    def step() -> object:
        return float(model.train_function(batches)["loss"])

    for _ in range(5):
        step()
    return step


def speed(folder: Folder, settings: Settings) -> Iterator[Row]:
    """A training step of the 8-bit QAT model against the float model's, and tfmot's beside it."""
    images, labels = folder.cifar("train")
    x, y = images[:BATCH], labels[:BATCH]
    model = load(folder, "resnet8_jpgft_float.h5")
    sides = {"QAT W8A8": (kquant.quantize_model(model, calibration_data=images[:256]), STEP_BAR)}
    sides["tfmot"] = (tfmot_model(model), None)
    for name, (quantized, bar) in sides.items():
        pair = [train_step(m, x, y) for m in (load(folder, "resnet8_jpgft_float.h5"), quantized)]
        found = ratio(*interleave(pair, 5 if settings.quick else 15, BLOCK))
        detail = f"{found}; float {1e3 * found.reference:.1f} ms, {name} {1e3 * found.other:.1f} ms"
        yield Row(f"tf_keras training step, {name} / float", found.median, bar, detail=detail)


SAME = """
import sys, numpy as np, kquant, {package} as keras
model = keras.models.load_model(sys.argv[1], compile=False)
samples = np.load(sys.argv[2])["x"]
qmodel = kquant.quantize_model(model, calibration_data=samples)
ranges = np.load(sys.argv[3]) if len(sys.argv) > 4 else {{}}
found = {{}}
for layer in qmodel.layers:
    if type(layer).__name__ != "FakeQuantize" or layer.fixed is not None:
        continue
    for site in range(layer.sites):
        key = layer.name + "/" + str(site)
        if len(sys.argv) > 4:
            layer.set_range(*ranges[key], site)
        found[key] = [np.asarray(v)[site] for v in (layer.minimum, layer.maximum)]
if len(sys.argv) == 4:
    np.savez(sys.argv[3], **found)
np.savez(sys.argv[-1] if len(sys.argv) > 4 else sys.argv[3] + ".state.npz", **kquant.export_state(qmodel))
"""


def same_numbers(folder: Folder) -> Iterator[Row]:
    """The same weights and ranges through Keras 3 and tf_keras, each in a process of its own."""
    names = ("resnet8_jpgft_float", "mlperf_kws_dscnn_float", "arm_ds_cnn_s_float")
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            base = pathlib.Path(scratch)
            model = load(folder, f"{name}.h5")
            samples = np.random.default_rng(0).normal(size=(64, *model.input_shape[1:])).astype("float32")
            np.savez(base / "x.npz", x=samples)
            one = [folder.find(f"{name}.keras"), base / "x.npz", base / "ranges.npz"]
            two = [folder.find(f"{name}.h5"), base / "x.npz", base / "ranges.npz", base / "two.npz"]
            for package, paths in (("keras", one), ("tf_keras", two)):
                program = SAME.format(package=package)
                subprocess.run([sys.executable, "-c", program, *map(str, paths)], check=True)
            with np.load(base / "ranges.npz.state.npz") as first, np.load(base / "two.npz") as second:
                differ = sorted(set(first.files) ^ set(second.files))
                shared = [k for k in first.files if k in second.files]
                differ += [k for k in shared if first[k].tobytes() != second[k].tobytes()]
                count = len(first.files)
        detail = f"of {count} arrays of codes, scales, zero points and biases {' '.join(differ[:4])}"
        yield Row(f"{name}: arrays that differ from Keras 3", len(differ), 0.0, detail=detail)


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    yield from size()
    yield from same_numbers(folder)
    yield from speed(folder, settings)
    yield from keywords(folder, settings)
    yield from resnet8(folder, settings)
    yield from widths(folder, settings)
