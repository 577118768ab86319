"""Random models through the whole way: quantize, calibrate, perhaps a training step, export, audit, verify.

Each index is a test of its own with its own seed, so that any of them runs alone; a failing model is shrunk, and the
description that hypothesis prints is the smallest one that fails. the conftest prints what occurred.
"""

import warnings
from collections import Counter

import hypothesis
import numpy as np
import pytest
from descriptions import Description, models
from hypothesis.internal.conjecture import engine
from keras_generation import keras, own
from occurred import FULL, check_occurred

import kquant
from keras_templates.build import build
from kquant.core.int8_spec import ROWS
from kquant.tflite.export import integer_model

VERIFIED = 48  # samples; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values
SHRINKING = 60  # seconds for one failing model
SEEN: Counter = Counter()

# A row that no export can hold, and why.
CANNOT_OCCUR = {
    "parameter": "a Keras layer's weights are part of what it computes",
    "recurrent": "Keras' recurrent layers are left in float whole, weights and all",
}


def pytest_generate_tests(metafunc):
    if "index" in metafunc.fixturenames:
        metafunc.parametrize("index", range(metafunc.config.getoption("models")))


def quantized(description: Description) -> keras.Model:
    """The quantized model of a description, calibrated, and trained for one step if it says so."""
    keras.utils.set_random_seed(description.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DoReFa clips activations")
        model = kquant.quantize_model(
            build(description), list(description.config), calibration_data=description.data(0)
        )
    if description.train and model.trainable_weights:
        model.compile(keras.optimizers.SGD(1e-3, clipnorm=1.0), "mse", run_eagerly=True)
        x = description.data(1)
        targets = [np.zeros((len(x), *y.shape[1:]), np.float32) for y in model.outputs]
        model.train_on_batch(x, targets if len(targets) > 1 else targets[0])
    return model


def occurrences(model: keras.Model) -> set[tuple[str, str | int]]:
    """What a quantized model holds: table rows, bits of weights and activations, quantizers."""
    integer = integer_model(model)
    ops = [op for op in integer.ops if op.parts]
    anchors = {part.kind for op in ops for part in op.parts[:1]} - {"fake_quant"}
    found: set = {("row", kind) for kind in anchors}
    found |= {("row", "relu") for op in ops if any(part.kind == "relu" for part in op.parts)}
    found |= {("row", "identity") for layer in model.layers if "dropout" in layer.name or "noise" in layer.name}
    found |= {("requantize", op.kind) for op in ops if op.parts[0].kind == "fake_quant" and op.kind != "quantize"}
    found |= {("activation bits", integer.tensors[op.outputs[0]].affine.bits) for op in ops}
    wrapped = [layer for layer in model.layers if isinstance(layer, own.QuantizedLayer)]
    found |= {("weight bits", layer.bits) for layer in wrapped}
    return found | {("quantizer", layer.quantizer) for layer in wrapped}


def check(description: Description, folder) -> set[tuple[str, str | int]]:
    """Assert the contract of an export on one model; returns what occurred in it."""
    model = quantized(description)
    first, second = folder / "first.tflite", folder / "second.tflite"
    try:
        kquant.export_tflite(model, first)
    except kquant.RangeError as refusal:
        assert refusal.where.startswith("tensor ") and not first.exists()
        return {("refused", "by the name of the tensor")}
    assert kquant.audit(first).fully_integer
    report = kquant.verify(model, first, description.data(2, VERIFIED))
    assert report.ok, report.problems
    kquant.export_tflite(model, second)
    assert first.read_bytes() == second.read_bytes()
    return occurrences(model)


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis:UserWarning")  # random shapes have size 1
def test_random_model_keeps_the_contract(index, tmp_path, record_property, monkeypatch):
    monkeypatch.setattr(engine, "MAX_SHRINKING_SECONDS", SHRINKING)
    kept: list[set] = []

    @hypothesis.seed(index)
    @hypothesis.settings(
        max_examples=1,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(models(index))
    def one(description):
        try:
            kept.append(check(description, tmp_path))
        finally:
            keras.backend.clear_session()

    one()
    SEEN.update(["models", *kept[-1]])
    record_property("occurred", sorted(kept[-1], key=str))


def test_everything_occurred(pytestconfig):
    """In the full run each row, bit width and quantizer occurred at least five times, or a reason is given."""
    if SEEN["models"] < FULL:
        pytest.skip(f"asked of at least {FULL} models in one process; {SEEN['models']} passed here")
    check_occurred(SEEN, [kind for kind in ROWS if kind not in CANNOT_OCCUR])
