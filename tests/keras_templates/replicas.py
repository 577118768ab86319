"""The program of the test of distributed training: trains one model on one replica, and on two that share each batch.

`main(path)` saves the ranges after each step, every replica's own, as `case/replicas/replica/step/quantizer/end`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from keras_generation import apply_gradients, keras

import kquant
from keras_templates.small import CROSS_ENTROPY, of_type, own, small_cnn
from kquant.tf_numerics import with_quantized_gradient

STEPS, BATCH = 3, 16
RNG = np.random.default_rng(11)
# The halves of a batch reach differently far, so each half's own range is not that of the batch; batches grow.
SIZES = np.tile(np.linspace(0.3, 2.0, BATCH), STEPS) * np.repeat(np.arange(1, STEPS + 1), BATCH)
IMAGES = (RNG.normal(size=(STEPS * BATCH, 8, 8, 2)) * SIZES[:, None, None, None]).astype("float32")
CLASSES = RNG.integers(0, 5, STEPS * BATCH)

W4A4 = {"q_bits": 4, "op_types": ["default"]}
CASES: dict[str, tuple[dict, bool]] = {  # of the config, and whether it is calibrated
    "ema": ({"q_bits": 8, "op_types": ["default"]}, False),
    "mse": (W4A4, True),
    "naive": ({**W4A4, "quantizer": "naive"}, False),
    "delayed": ({**W4A4, "quant_start_step": 2}, False),
}


def wrapped(case: str, weights: list) -> Any:
    """The quantized model of a case, its batch norm frozen: a replica's own statistics are those of half a batch."""
    entry, calibrated = CASES[case]
    model = small_cnn()
    model.set_weights(weights)
    qmodel = kquant.quantize_model(model, [entry], calibration_data=IMAGES[:BATCH] if calibrated else None)
    kquant.freeze_batch_norm(qmodel)
    return qmodel


def of_replicas(qmodel: Any, strategy: Any) -> dict[str, np.ndarray]:
    """Each end of each range, from every replica."""
    found = {}
    for layer in of_type(qmodel, own.FakeQuantize):
        for end in ("minimum", "maximum"):
            variable = getattr(layer, end)
            locals_ = strategy.experimental_local_results(getattr(variable, "_value", variable))
            for replica, value in enumerate(locals_):
                # The names of layers count up from model to model.
                found[f"{replica}/{len(found)}/{end}"] = np.asarray(value)
    return found


def fitted(case: str, weights: list, strategy: Any, found: dict) -> None:
    """Train by `fit`, a step at a time."""
    with strategy.scope():
        qmodel = wrapped(case, weights)
        qmodel.compile(keras.optimizers.SGD(1e-3), CROSS_ENTROPY)
    for step in range(STEPS):
        part = slice(step * BATCH, (step + 1) * BATCH)
        qmodel.fit(IMAGES[part], CLASSES[part], batch_size=BATCH, shuffle=False, verbose=0)
        found |= {
            f"{case}/{strategy.num_replicas_in_sync}/{step}/{k}": v for k, v in of_replicas(qmodel, strategy).items()
        }


def looped(weights: list, strategy: Any, found: dict) -> None:
    """Train in a loop of one's own; the last batch has three samples, two for one replica and one for the other."""
    with strategy.scope():
        qmodel = wrapped("ema", weights)
        optimizer = keras.optimizers.SGD(1e-3)
        if hasattr(optimizer, "build"):
            optimizer.build(qmodel.trainable_variables)

    @tf.function
    def step(images: Any, classes: Any) -> None:
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(classes, qmodel(images, training=True), True)
            loss = tf.reduce_sum(losses) / BATCH
        gradients = tape.gradient(loss, qmodel.trainable_variables)
        apply_gradients(optimizer, gradients, qmodel.trainable_variables)

    data = tf.data.Dataset.from_tensor_slices((IMAGES, CLASSES)).take(BATCH + 3).batch(BATCH)
    for images, classes in strategy.experimental_distribute_dataset(data):
        strategy.run(step, args=(images, classes))
    found |= {f"loop/{strategy.num_replicas_in_sync}/last/{k}": v for k, v in of_replicas(qmodel, strategy).items()}


def noisy(strategy: Any, found: dict) -> None:
    """The quantized gradient of equal values on every replica."""

    def gradient() -> Any:
        x = tf.zeros((1, 64))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(with_quantized_gradient(x, 2, ("layer", tf.constant(5))) * tf.linspace(0.0, 1.0, 64))
        return tape.gradient(y, x)

    values = strategy.experimental_local_results(strategy.run(gradient))
    found |= {f"noise/{len(values)}/{replica}": value.numpy() for replica, value in enumerate(values)}


def main(path: str) -> None:
    """Train every case on one and on two virtual devices, and save what came of it."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    keras.utils.set_random_seed(3)
    weights = small_cnn().get_weights()
    found: dict[str, np.ndarray] = {}
    for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
        for case in CASES:
            fitted(case, weights, strategy, found)
        looped(weights, strategy, found)
        noisy(strategy, found)
    np.savez(path, **found)
