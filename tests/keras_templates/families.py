"""Every image architecture family of `keras.applications`: quantize, two training steps, export, verify."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from keras_generation import keras

import kquant

zoo = keras.applications

FAMILIES = {  # name: (constructor, image size)
    "MobileNetV3Small": (zoo.MobileNetV3Small, 64),
    "DenseNet121": (zoo.DenseNet121, 64),
    "ConvNeXtTiny": (zoo.ConvNeXtTiny, 64),
    "MobileNet": (zoo.MobileNet, 64),
    "MobileNetV2": (zoo.MobileNetV2, 64),
    "MobileNetV3Large": (zoo.MobileNetV3Large, 64),
    "ResNet50": (zoo.ResNet50, 64),
    "ResNet50V2": (zoo.ResNet50V2, 64),
    "EfficientNetB0": (zoo.EfficientNetB0, 64),
    "EfficientNetV2B0": (zoo.EfficientNetV2B0, 64),
    "NASNetMobile": (zoo.NASNetMobile, 64),
    "Xception": (zoo.Xception, 96),
    "InceptionV3": (zoo.InceptionV3, 96),
    "InceptionResNetV2": (zoo.InceptionResNetV2, 96),
    "VGG16": (zoo.VGG16, 64),
}
FEW = ("MobileNetV3Small", "ConvNeXtTiny")  # of different kinds: gated depthwise convolutions, and normalized blocks
LEAST_SNR = 15.0  # dB at the logits
# Two quantizations of one net of random weights were -1.1 to +3.1 dB apart (30 nets; 8 images of noise).
SCATTER = 1.5
LEAST_USED = 0.9  # share of 8-bit tensors with at least 32 codes in use


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        chosen = FAMILIES if metafunc.config.getoption("--families") == "all" else FEW
        metafunc.parametrize("family", list(chosen))


def with_batch_statistics(model: keras.Model, images: np.ndarray) -> None:
    """Set every batch norm's statistics by one training-mode pass."""
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model(images, training=True)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def snr_db(value: np.ndarray, reference: np.ndarray) -> float:
    """Signal-to-noise ratio in decibels."""
    return float(10 * np.log10((reference**2).sum() / ((value - reference) ** 2).sum()))


def converter_snr_db(model: keras.Model, images: np.ndarray, path) -> float:
    """The same of the TensorFlow converter's own full-integer post-training quantization of the float model."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images[:16])
    path.write_bytes(converter.convert())
    reference = model.predict(images[16:], verbose=0)
    return snr_db(np.concatenate([kquant.load_artifact(path)(x[None]) for x in images[16:]]), reference)


@pytest.mark.filterwarnings("ignore:The `keras.initializers.serialize:UserWarning")  # tf_keras' own EfficientNetV2
@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs:UserWarning")  # of the converter, about its default
def test_family_is_fully_integer_and_as_trained(family: str, tmp_path) -> None:
    """Random weights; batch norm statistics from one training-mode pass over random images."""
    constructor, size = FAMILIES[family]
    keras.utils.set_random_seed(0)
    model = constructor(weights=None, input_shape=(size, size, 3), classes=20, classifier_activation=None)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (24, size, size, 3)).astype("float32")
    with_batch_statistics(model, images)

    qmodel = kquant.quantize_model(model, calibration_data=images[:16])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    qmodel.compile(keras.optimizers.SGD(1e-5), loss, jit_compile=False)
    for _ in range(2):
        qmodel.train_on_batch(images[:8], rng.integers(0, 20, 8))
    path = tmp_path / "model.tflite"
    report = kquant.export_tflite(qmodel, path)
    parity = kquant.verify(qmodel, path, images[16:])

    eight_bit = [op for op in parity.ops if op.bits == 8]
    low = [(op.name, op.codes_used) for op in eight_bit if op.codes_used < 32]
    used = 1 - len(low) / len(eight_bit)
    line = f"{family}: max_lsb {parity.max_lsb:.3f}, logits {parity.snr_db:.1f} dB (bar {LEAST_SNR:.0f})"
    if parity.snr_db < LEAST_SNR:
        # A deep net of random weights amplifies what any 8-bit quantizer adds; then the converter's own is the measure.
        theirs = converter_snr_db(model, images, tmp_path / "converter.tflite")
        line += f", the converter's own quantization {theirs:.1f} dB"
        assert parity.snr_db >= theirs - SCATTER
    print(f"{line}, {used:.1%} of 8-bit tensors use 32 codes or more; below: {low}")
    assert report.fully_integer
    assert kquant.audit(path).fully_integer
    assert parity.ok, parity.problems
    assert used >= LEAST_USED
