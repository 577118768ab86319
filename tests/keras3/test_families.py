"""Every image architecture family of `keras.applications`: quantize, two training steps, export, verify."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import applications as zoo

import kquant

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
FEW = ("MobileNetV3Small", "DenseNet121")  # of different kinds: gated depthwise nets, and concatenations
LEAST_SNR = 15.0  # dB at the logits
LEAST_USED = 0.9  # share of 8-bit tensors with at least 32 codes in use


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        chosen = FAMILIES if metafunc.config.getoption("--families") == "all" else FEW
        metafunc.parametrize("family", list(chosen))


def test_family_is_fully_integer_and_as_trained(family: str, tmp_path, record_property) -> None:
    """Random weights; batch norm statistics from one training-mode pass over random images."""
    constructor, size = FAMILIES[family]
    keras.utils.set_random_seed(0)
    model = constructor(weights=None, input_shape=(size, size, 3), classes=20)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (24, size, size, 3)).astype("float32")
    model(images, training=True)

    qmodel = kquant.quantize_model(model, calibration_data=images[:16])
    qmodel.compile(keras.optimizers.SGD(1e-4), "sparse_categorical_crossentropy", jit_compile=False)
    for _ in range(2):
        qmodel.train_on_batch(images[:8], rng.integers(0, 20, 8))
    path = tmp_path / "model.tflite"
    report = kquant.export_tflite(qmodel, path)
    parity = kquant.verify(qmodel, path, images[16:])

    eight_bit = [op for op in parity.ops if op.bits == 8]
    low = [(op.name, op.codes_used) for op in eight_bit if op.codes_used < 32]
    used = 1 - len(low) / len(eight_bit)
    logits = parity.ops[-2]  # the softmax is last
    line = f"{family}: max_lsb {parity.max_lsb:.3f}, logits {logits.snr_db:.1f} dB, {used:.1%} use 32 codes; below: {low}"
    record_property("family", line)
    print(line)
    assert report.fully_integer
    assert kquant.audit(path).fully_integer
    assert parity.ok, parity.problems
    assert logits.snr_db >= LEAST_SNR
    assert used >= LEAST_USED
