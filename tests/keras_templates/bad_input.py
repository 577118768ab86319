"""Bad input: each is an error of the project that says where, what was expected, what was received and what to do.

Nothing is half done: a failed export leaves no file and an old one as it was, and the float model is never changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras_generation import keras, layers, ops

import kquant
from kquant.core.errors import (
    ArtifactError,
    CalibrationError,
    ConfigError,
    ExportError,
    KQuantError,
    ModelError,
    RangeError,
    UnsupportedError,
)

DEFAULT = {"q_bits": 8, "op_types": ["default"]}
SHAPE = (8, 8, 3)
X = np.random.default_rng(0).normal(size=(32, *SHAPE)).astype(np.float32)


@pytest.fixture
def model() -> keras.Model:
    """conv -> relu -> dense."""
    x = keras.Input(SHAPE, name="x")
    y = layers.Flatten(name="flat")(layers.Conv2D(4, 3, activation="relu", name="body")(x))
    return keras.Model(x, layers.Dense(5, name="head")(y), name="net")


@pytest.fixture
def qmodel(model: keras.Model) -> keras.Model:
    return kquant.quantize_model(model, calibration_data=X)


def refused(kind: type[KQuantError], words: tuple[str, ...], call: Any, *args: Any, **kwargs: Any) -> KQuantError:
    """Assert that a call raises exactly this error, whose message holds the words and what was received."""
    with pytest.raises(KQuantError) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert type(error) is kind, error
    for word in words:
        assert word in str(error), f"{word!r} is not in: {error}"
    return error


# -- config_list ------------------------------------------------------------------------------------------------------

# config_list: words that name where, what is expected, what was received and what to do
CONFIGS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "unknown key": ([{"qbits": 8, "op_types": ["default"]}], ("config_list[0]['qbits']", "'q_bits'", "Received")),
    "layer name": ([DEFAULT, {"q_bits": 8, "op_names": ["heda"]}], ("config_list[1]['op_names']", "heda", "'head'")),
    "type name": (
        [DEFAULT, {"q_bits": 8, "op_types": ["Conv2d"]}],
        ("config_list[1]['op_types']", "Conv2d", "'Conv2D'"),
    ),
    "matches nothing": (
        [DEFAULT, {"q_bits": 4, "op_types": ["Dense"], "op_names": ["body"]}],
        ("config_list[1]['op_types']", "both", "'body' (Conv2D)", "Received"),
    ),
    "contradictory bits": (
        [{"q_bits": 8, "quant_bits": 4, "op_types": ["default"]}],
        ("config_list[0]['quant_bits']", "8 and 4", "Keep one", "Received"),
    ),
    "excluded and quantized": (
        [{**DEFAULT, "exclude": True}],
        ("config_list[0]['exclude']", "contradicts 'q_bits'", "Keep one", "Received"),
    ),
    "9 bits": (
        [{"q_bits": 9, "op_types": ["default"]}],
        ("config_list[0]['q_bits']", "8", "32 (float)", "Received: 9"),
    ),
    "0 bits": ([{"q_bits": 0, "op_types": ["default"]}], ("config_list[0]['q_bits']", "Received: 0")),
    "1-bit QAT weight": (
        [{"q_bits": 1, "op_types": ["default"]}],
        ("config_list[0]['q_bits']", "dorefa", "Received: 1"),
    ),
    "1-bit signed output": (
        [DEFAULT, {"q_bits": {"weight": 8, "output": 1}, "op_names": ["head"]}],
        ("config_list[1]['q_bits']", "non-negative", "'head'", "2 bits", "Received: 1"),
    ),
    "QAT gradients": (
        [{"q_bits": {"weight": 8, "gradient": 8}, "op_types": ["default"]}],
        ("config_list[0]['q_bits']['gradient']", "dorefa", "Received: 8"),
    ),
    "not dicts": (["default"], ("config_list[0]", "dict", "Received: 'default'")),
    "no selector": ([{"q_bits": 8}], ("config_list[0]", "'op_types' or 'op_names'", "default", "Received")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case, model):
    config, words = CONFIGS[case]
    before = model.get_weights()
    refused(ConfigError, words, kquant.quantize_model, model, config, calibration_data=X)
    refused(ConfigError, words, kquant.plan, model, config)
    assert_unchanged(model, before)


def test_a_config_that_quantizes_nothing(model):
    words = ("config_list", "at least one entry that quantizes", '"default"', "leave every op in float")
    config = [{"op_names": ["head"], "exclude": True}]
    refused(ConfigError, words, kquant.quantize_model, model, config, calibration_data=X)
    assert {row.output for row in kquant.plan(model, config).rows} == {"float"}


def assert_unchanged(model: keras.Model, before: list[np.ndarray]) -> None:
    assert [layer.name for layer in model.layers] == ["x", "body", "flat", "head"]
    assert model.get_layer("body").activation is keras.activations.relu
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_quantizer_class_refuses_another_quantizer():
    config = [{**DEFAULT, "quantizer": "qat"}]
    refused(ConfigError, ("config_list[0]['quantizer']", "'qat'", "'naive'", "Drop"), kquant.NaiveQuantizer, config)


@pytest.mark.parametrize(
    ("name", "value", "nearest"), [("observer", "minmx", "'minmax'"), ("target", "tflit", "'tflite'")]
)
def test_choices(name, value, nearest, model):
    refused(ConfigError, (name, nearest, f"Received: '{value}'"), kquant.quantize_model, model, **{name: value})


# -- models -----------------------------------------------------------------------------------------------------------


class Undecided(keras.Model):
    """Python control flow on values, which no graph holds."""

    def __init__(self):
        super().__init__(name="undecided")
        self.dense = layers.Dense(3)

    def call(self, x):
        y = self.dense(x)
        return y if float(ops.sum(y)) > 0 else -y


def _called(model: keras.Model) -> keras.Model:
    model(np.zeros((2, 4), np.float32))
    return model


def _empty() -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, x, name="nothing")


MODELS = {
    "empty": (_empty, ("'nothing'", "at least one layer", "empty")),
    "empty Sequential": (lambda: keras.Sequential(name="none"), ("'none'", "at least one layer", "an empty model")),
    "not built": (lambda: keras.Sequential([layers.Dense(3)], name="raw"), ("'raw'", "built", "keras.Input")),
    "subclass not called": (Undecided, ("'undecided'", "built", "Call the model")),
    "value-dependent call": (lambda: _called(Undecided()), ("'undecided'", "symbolic")),
    "no model": (lambda: 5, ("model", "Keras 3", "Received: int")),
}


@pytest.mark.parametrize("case", MODELS)
def test_model(case):
    make, words = MODELS[case]
    refused(ModelError, words, kquant.quantize_model, make())


def test_quantizing_twice(qmodel):
    refused(ModelError, ("'net'", "float model", "already"), kquant.quantize_model, qmodel)


UNSUPPORTED = {
    "LSTM": ((6, 4), lambda: layers.LSTM(3, name="deep")),
    "GRU": ((6, 4), lambda: layers.GRU(3, name="deep")),
    "Conv3D": ((4, 6, 6, 2), lambda: layers.Conv3D(3, 2, name="deep")),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_layer_names_the_entry_that_leaves_it_in_float(kind, tmp_path):
    shape, make = UNSUPPORTED[kind]
    x = keras.Input(shape)
    model = keras.Model(x, make()(x))
    error = refused(UnsupportedError, ("'deep'", kind, "exclude"), kquant.quantize_model, model)
    assert len(error.expected) > 20  # the reason
    entry = {"op_names": ["deep"], "exclude": True}
    assert str(entry) in str(error)
    if kind != "GRU":  # the entry does what the message says; a recurrent loop cannot be written at all
        kquant.plan(model, [DEFAULT, entry])


def test_weight_that_is_nan(model):
    weights = model.get_weights()
    weights[0][0, 0, 0, 0] = np.nan
    model.set_weights(weights)
    refused(ModelError, ("'body'", "finite", "NaN", "Repair"), kquant.quantize_model, model)


# -- calibration data -------------------------------------------------------------------------------------------------

CALIBRATION = {
    "wrong shape": (X[:, :5], ("calibration batch 0", "(None, 8, 8, 3)", "(32, 5, 8, 3)")),
    "wrong rank": ([X[0]], ("calibration batch 0", "(None, 8, 8, 3)", "(8, 8, 3)")),
    "NaN": (np.where(X > 2, np.nan, X), ("calibration batch 0", "finite", "'x'", "NaN")),
    "infinity": ([X[:8], X[8:] * np.inf], ("calibration batch 1", "finite", "'x'")),
    "no samples": (X[:0], ("at least one", "Received")),
    "no batch": (iter([]), ("at least one batch", "none", "used up")),
    "not data": (5, ("calibration data", "array", "int")),
    "text": ([["a"]], ("calibration batch 0", "numbers", "'x'")),
    "wrong name": ({"y": X}, ("calibration batch 0", "'x'", "'y'")),
}


@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration_data(case, model):
    data, words = CALIBRATION[case]
    before = model.get_weights()
    refused(CalibrationError, words, kquant.quantize_model, model, calibration_data=data)
    assert_unchanged(model, before)


# -- exports ----------------------------------------------------------------------------------------------------------


def test_failed_export_leaves_no_file_and_the_old_one_as_it_was(model, tmp_path):
    unset = kquant.quantize_model(model)
    partly = kquant.quantize_model(model, [DEFAULT, {"op_names": ["body"], "exclude": True}], calibration_data=X)
    new, old = tmp_path / "new.tflite", tmp_path / "old.tflite"
    old.write_bytes(b"older")
    for path in (new, old):
        refused(ModelError, ("'net'", "quantized model", "kquant.quantize_model"), kquant.export_tflite, model, path)
        refused(ExportError, ("range", "calibration_data=", "'x'"), kquant.export_tflite, unset, path)
        refused(
            ExportError,
            ("every op", "body", "the config leaves it in float", "allow_float"),
            kquant.export_tflite,
            partly,
            path,
        )
        refused(
            ExportError, ("input_type", "uint8", "'int4'"), kquant.export_tflite,
            kquant.quantize_model(model, calibration_data=X), path, input_type="int4",
        )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["old.tflite"]
    assert old.read_bytes() == b"older"


@pytest.mark.parametrize("where", ["missing/model.tflite", "."])
def test_path_that_cannot_be_written(where, qmodel, tmp_path):
    refused(ExportError, (str(tmp_path), "written", "existing folder"), kquant.export_tflite, qmodel, tmp_path / where)
    assert list(tmp_path.iterdir()) == []


def test_range_that_the_kernels_cannot_hold(model, tmp_path):
    weights = model.get_weights()
    weights[0] *= 1e30
    model.set_weights(weights)

    def quantize_and_export():
        kquant.export_tflite(kquant.quantize_model(model, calibration_data=X * 1e7), tmp_path / "model.tflite")

    refused(RangeError, ("tensor 'body", "scale", "exclude", "Received"), quantize_and_export)
    assert list(tmp_path.iterdir()) == []


def test_bias_that_the_kernel_would_shift(tmp_path):
    """Weights that cancel: the output is the bias alone, a few steps of what the kernel adds it in."""
    x = keras.Input((2,), name="x")
    head = layers.Dense(1, name="head")
    model = keras.Model(x, head(x))
    head.set_weights([np.array([[1.0], [-1.0]], np.float32), np.array([0.1], np.float32)])
    qmodel = kquant.quantize_model(model, calibration_data=np.full((4, 2), 1000.0, np.float32))
    # one step is 1000/255/127 = 0.03088 and the bias 3.2385 of it: 0.2385 steps are 18.78 output codes of 0.1/255
    refused(RangeError, ("tensor 'head'", "bias", "18.78", "exclude"), kquant.export_tflite, qmodel, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# -- artifacts --------------------------------------------------------------------------------------------------------

BROKEN = {
    "truncated": lambda data: data[: len(data) // 2],
    "random bytes": lambda data: np.random.default_rng(0).bytes(5000),
    "empty": lambda data: b"",
    "another format": lambda data: b"PK\3\4" + data,
}


@pytest.mark.parametrize("case", [*BROKEN, "missing"])
def test_artifact_that_is_none(case, qmodel, tmp_path):
    path = tmp_path / "model.tflite"
    if case != "missing":
        kquant.export_tflite(qmodel, path)
        path.write_bytes(BROKEN[case](path.read_bytes()))
    for call in (kquant.audit, kquant.load_artifact, lambda p: kquant.verify(qmodel, p, X[:4])):
        refused(ArtifactError, (str(path),), call, path)


def test_verifying_with_another_model(qmodel, tmp_path):
    path = tmp_path / "model.tflite"
    kquant.export_tflite(qmodel, path)
    x = keras.Input(SHAPE, name="x")
    float_model = keras.Model(x, layers.Dense(4, name="other")(x))
    other = kquant.quantize_model(float_model, calibration_data=X)
    refused(ArtifactError, (str(path), "other"), kquant.verify, other, path, X[:4])
    refused(ModelError, ("quantized model", "float"), kquant.verify, float_model, path, X[:4])
    refused(CalibrationError, ("shape",), kquant.verify, qmodel, path, X[:4, :3])
    refused(CalibrationError, ("at least one batch",), kquant.verify, qmodel, path, [])


def test_verifying_with_other_weights_of_the_same_model(model, qmodel, tmp_path):
    """The architecture fits, so that is a report and no error; it names the layers."""
    path = tmp_path / "model.tflite"
    kquant.export_tflite(qmodel, path)
    model.get_layer("head").kernel.assign_add(np.full((144, 5), 0.1))
    report = kquant.verify(kquant.quantize_model(model, calibration_data=X), path, X[:4])
    assert not report.ok
    assert any("'head'" in p and "kernel" in p for p in report.problems)
    assert not any("'body_activation'" in p and "kernel" in p for p in report.problems)
