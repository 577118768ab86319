"""Float models at 224 with random weights, and what the TensorFlow converter's own quantizer makes of a float model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

SIZE = 224
ARCHITECTURES: dict[str, Callable[..., keras.Model]] = {
    "MobileNetV2": keras.applications.MobileNetV2,
    "ResNet50": keras.applications.ResNet50,
}


def images(count: int, seed: int = 0) -> np.ndarray:
    """Smooth random images, float32 -1..1, (count, 224, 224, 3)."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (count, SIZE // 16, SIZE // 16, 3)).astype("float32")
    return np.asarray(tf.image.resize(coarse, (SIZE, SIZE)))


def random_model(name: str) -> keras.Model:
    """An architecture with random weights; its batch-norm statistics are those of one training-mode pass."""
    keras.utils.set_random_seed(0)
    model = ARCHITECTURES[name](weights=None, input_shape=(SIZE, SIZE, 3))
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    kept = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0  # the moving statistics become those of this one batch
    model(images(16), training=True)
    for layer, momentum in zip(norms, kept, strict=True):
        layer.momentum = momentum
    return model


def converter_ptq(model: keras.Model, samples: np.ndarray) -> bytes:
    """The TensorFlow converter's full-integer post-training quantization, float32 at the boundary.

    Args:
        model: a float model.
        samples: for its calibration, (n, ...).
    """
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the signature
        return converter.convert()
