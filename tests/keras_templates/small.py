"""What the templates of training share: a small model, a short training, and looks at its state."""

import os
import pathlib
import subprocess
import sys

import numpy as np
from keras_generation import keras, layers, own

FakeQuantize, QuantizedLayer, BatchNormalization = own.FakeQuantize, own.QuantizedLayer, own.BatchNormalization
ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(7)
IMAGES = RNG.normal(size=(64, 8, 8, 2)).astype("float32")
CLASSES = RNG.integers(0, 5, 64)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DOREFA = [{"q_bits": {"weight": 3, "output": 4, "gradient": 4}, "op_types": ["default"]}]


def small_cnn():
    image = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(image, layers.Dense(5, name="logits")(x), name="small")


def trained(qmodel, steps=2, **compiled):
    qmodel.compile(compiled.pop("optimizer", "adam"), compiled.pop("loss", CROSS_ENTROPY), **compiled)
    qmodel.fit(IMAGES[: 16 * steps], CLASSES[: 16 * steps], batch_size=16, shuffle=False, verbose=0)
    return qmodel


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def ranges(model):
    """Every range of the model, by name."""
    moving = [layer for layer in of_type(model, FakeQuantize) if layer.fixed is None]
    return {layer.name: np.asarray([layer.minimum, layer.maximum]) for layer in moving}


def assert_same_weights(model, other):
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def run_python(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
