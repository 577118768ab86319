"""What a demanding user brings: unusual inputs, weights and calls. Each is exported as it was trained, or refused."""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras_generation import FORMATS, IS_KERAS3, apply_gradients, keras, layers, ops, policy, set_policy

import kquant
from keras_templates.bad_input import DEFAULT, refused
from kquant.core.errors import ArtifactError, CalibrationError, ConfigError, ExportError, ModelError, UnsupportedError

RNG = np.random.default_rng(5)
SHAPE = (6, 6, 4)
X = RNG.normal(size=(32, *SHAPE)).astype(np.float32)
IDS = RNG.integers(0, 20, (16, 6)).astype(np.int32)


def exported(model: keras.Model, data: Any, path: pathlib.Path, config: Any = None) -> tuple[Any, Any]:
    """The quantized model and its parity with the file that is written of it."""
    qmodel = kquant.quantize_model(model, config, calibration_data=data)
    kquant.export_tflite(qmodel, path)
    assert kquant.audit(path).fully_integer
    parity = kquant.verify(qmodel, path, data)
    assert parity.ok, parity.problems
    return qmodel, parity


def test_slices_are_the_same_after_loading(tmp_path):
    """A saved model holds the tuple of a slice as a list."""
    x = keras.Input(SHAPE, name="x")
    y = layers.Conv2D(4, 1, name="conv")(x)
    model = keras.Model(x, [y[:, 1:], y[:, :, -1], y[:, ::2, 1:3]])
    qmodel, _ = exported(model, X, tmp_path / "a.tflite")
    qmodel.save(tmp_path / "q.keras")
    kquant.export_tflite(keras.models.load_model(tmp_path / "q.keras"), tmp_path / "b.tflite")
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()


@pytest.mark.parametrize("again", [False, True], ids=["made", "loaded"])
def test_what_a_layer_adapted_to_is_kept(again, tmp_path):
    """A copied layer has the weights of the other, and computes with what it makes of them."""
    norm = layers.Normalization(name="norm")
    norm.adapt(X * 7 + 30)
    x = keras.Input(SHAPE, name="x")
    model = keras.Model(x, layers.Conv2D(3, 1, name="conv")(norm(x)))
    qmodel, _ = exported(model, X * 7 + 30, tmp_path / "a.tflite")
    if again:
        qmodel.save(tmp_path / "q.keras")
        qmodel = keras.models.load_model(tmp_path / "q.keras")
    expected, got = (m.predict(X * 7 + 30, verbose=0) for m in (model, qmodel))
    # Three roundings to 8 bits (the input's range is wider than three deviations), whose noise adds up.
    assert np.abs(got - expected).max() < 6 * np.ptp(expected) / 255


# -- ids --------------------------------------------------------------------------------------------------------------


def lookup(dtype: str, before: Any = None, both: bool = False) -> keras.Model:
    ids = keras.Input((6,), dtype=dtype, name="ids")
    y = layers.Flatten()(layers.Embedding(20, 4, name="table")(ids if before is None else before(ids)))
    y = layers.Concatenate()([y, ids]) if both else y
    return keras.Model(ids, layers.Dense(3, name="head")(y))


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "uint8"])
def test_ids_of_any_dtype_are_looked_up(dtype, tmp_path):
    """Keras takes ids as float32 unless it is told otherwise; the file's input then holds int32."""
    qmodel, _ = exported(lookup(dtype), IDS.astype(dtype), tmp_path / "m.tflite")
    y = kquant.load_artifact(tmp_path / "m.tflite")(IDS.astype("int64" if dtype == "int64" else "int32"))
    trained = qmodel.predict(IDS.astype(dtype), verbose=0)
    # Both are 8-bit codes of one range: a code apart is a flip at a rounding boundary.
    assert np.abs(y - trained).max() <= 1.01 * (trained.max() - trained.min()) / 100


def test_ids_that_are_numbers_too_are_refused():
    refused(UnsupportedError, ("'table'", "nothing else", "'ids'"), kquant.quantize_model, lookup("float32", both=True))
    moved = lookup("int32", before=lambda ids: layers.Reshape((6,))(ids))
    refused(UnsupportedError, ("'table'", "an input of the model"), kquant.quantize_model, moved)


def test_ids_that_are_no_ids(tmp_path):
    model = lookup("int32")
    refused(CalibrationError, ("'ids'", "whole"), kquant.quantize_model, model, calibration_data=IDS + 0.5)
    refused(CalibrationError, ("'table'", "must run"), kquant.quantize_model, model, calibration_data=IDS + 20)


# -- constants and weights --------------------------------------------------------------------------------------------


def test_array_constants_train_as_they_are_deployed(tmp_path):
    """Their own rounding would be up to a code beyond the kernel's, so the trained model holds them rounded."""
    x, grid = keras.Input(SHAPE, name="x"), RNG.normal(size=SHAPE).astype(np.float32)
    y = layers.Conv2D(4, 1, name="conv")(x)
    _, parity = exported(keras.Model(x, [y + grid, y - grid, y * grid, y / (2 + grid**2)]), X, tmp_path / "m.tflite")
    assert parity.max_lsb <= 0.51  # the kernels' own distance: without it 0.7


@keras.utils.register_keras_serializable(package="kquant-tests")
class Softened(layers.Layer):
    """A weight that meets the input as a value computed from it."""

    def build(self, shape):
        self.raw = self.add_weight(shape=(shape[-1],), initializer="ones", name="raw")
        super().build(shape)

    def call(self, x):
        return x * ops.softplus(self.raw)


def test_a_weight_that_would_no_longer_train_is_refused():
    x = keras.Input(SHAPE)
    model = keras.Model(x, layers.Conv2D(4, 1)(Softened(name="soft")(x)))
    refused(UnsupportedError, ("'soft'", "raw", "alone"), kquant.quantize_model, model)


def test_bias_over_kept_axes_is_refused():
    x = keras.Input((5, 6))
    y = layers.EinsumDense("abc,cd->abd", output_shape=(5, 4), bias_axes="bd", name="einsum")(x)
    refused(UnsupportedError, ("'einsum'", "bias axes 'bd'"), kquant.quantize_model, keras.Model(x, y))


# -- calls and policies -----------------------------------------------------------------------------------------------


def test_a_layer_that_always_trains_is_refused():
    x = keras.Input(SHAPE)
    model = keras.Model(x, layers.Conv2D(2, 1)(layers.Dropout(0.5, name="always")(x, training=True)))
    refused(UnsupportedError, ("'always'", "training=True"), kquant.quantize_model, model)


@pytest.mark.parametrize("name", ["float16", "float64"])
def test_variables_that_are_not_float32_are_refused(name):
    before = policy()
    set_policy(name)
    try:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")])
    finally:
        set_policy(before)
    refused(ModelError, ("'dense'", "float32", name, "mixed_float16"), kquant.quantize_model, model)


def test_activity_regularizers_add_what_they_add_to_the_float_model(tmp_path):
    """On the layer's output behind its activation, in every kind of layer; a quantized layer has none of its own."""
    x = keras.Input(SHAPE, name="x")
    y = layers.Conv2D(4, 3, activation="relu", activity_regularizer=keras.regularizers.L1(0.1), name="conv")(x)
    y = layers.SeparableConv2D(4, 1, activity_regularizer="l2", pointwise_regularizer="l2", name="parts")(y)
    y = layers.ActivityRegularization(l1=0.02)(y)
    model = keras.Model(x, layers.Dense(3, activity_regularizer=keras.regularizers.L1L2(0.1, 0.2), name="head")(y))
    qmodel, _ = exported(model, X, tmp_path / "m.tflite")
    qmodel.save(tmp_path / "q.keras")
    for each in (qmodel, keras.models.load_model(tmp_path / "q.keras")):
        model(X), each(X)
        assert len(each.losses) == len(model.losses) == 5
        # The sums of some hundred values, each rounded to 8 bits.
        np.testing.assert_allclose(sorted(map(float, each.losses)), sorted(map(float, model.losses)), rtol=0.02)


@keras.utils.register_keras_serializable("tests")
class FarFromOne(keras.regularizers.Regularizer):
    """A regularizer of one's own."""

    def __init__(self, factor: float = 0.1):
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return self.factor * tf.reduce_sum(tf.abs(x - 1.0))

    def get_config(self) -> dict:
        return {"factor": self.factor}


def test_an_activity_regularizer_of_ones_own_adds_what_it_adds_to_the_float_model(tmp_path):
    x = keras.Input(SHAPE, name="x")
    y = layers.Conv2D(4, 1, name="conv", activity_regularizer=FarFromOne(0.3), activation="relu")(x)
    model = keras.Model(x, layers.GlobalAveragePooling2D(name="mean", activity_regularizer=FarFromOne())(y))
    qmodel, _ = exported(model, X, tmp_path / "m.tflite")
    qmodel.save(tmp_path / "q.keras")
    for each in (qmodel, keras.models.load_model(tmp_path / "q.keras")):
        model(X), each(X)
        # The sums of some hundred values, each rounded to 8 bits.
        np.testing.assert_allclose(sorted(map(float, each.losses)), sorted(map(float, model.losses)), rtol=0.02)
    assert len(model.losses) == 2
    kquant.export_tflite(each, tmp_path / "b.tflite")
    assert (tmp_path / "m.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()


# -- data and settings ------------------------------------------------------------------------------------------------


def two_inputs() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((6,), name="b")
    return keras.Model({"a": a, "b": b}, layers.Dense(3, name="head")(layers.Concatenate()([a, b])))


def test_batches_of_several_inputs_and_labels():
    """(x, y) with as many parts as the model has inputs."""
    model, a, b = two_inputs(), X[:, 0, 0], X.reshape(32, -1)[:, :6]
    for batch in (({"a": a, "b": b}, np.zeros(32)), ((a, b), np.zeros(32)), {"a": a, "b": b}, [a, b]):
        qmodel = kquant.quantize_model(model, calibration_data=[batch])
        high = {layer.name: np.max(layer.maximum) for layer in qmodel.layers if layer.name.endswith("_quantizer")}
        assert high["concatenate_quantizer" if "concatenate_quantizer" in high else "a_quantizer"] > 0
    uneven = {"a": a, "b": b[:5]}
    refused(CalibrationError, ("same number", "5"), kquant.quantize_model, model, calibration_data=uneven)


@pytest.mark.parametrize("data", [X.astype("complex64"), X.astype(str), X.astype(object), [[None]]])
def test_data_that_are_no_real_numbers(data):
    x = keras.Input(SHAPE, name="x")
    model = keras.Model(x, layers.Conv2D(2, 1)(x))
    refused(CalibrationError, ("numbers", "Received"), kquant.quantize_model, model, calibration_data=data)


def test_samples_run_at_the_fixed_batch_of_the_model(tmp_path):
    x = keras.Input(batch_shape=(5, *SHAPE), name="x")
    exported(keras.Model(x, layers.Conv2D(2, 1)(x)), X[:30], tmp_path / "five.tflite")
    big = keras.Input(batch_shape=(48, 4), name="x")
    exported(keras.Model(big, layers.Dense(2)(big)), RNG.normal(size=(96, 4)), tmp_path / "many.tflite")


def test_an_input_that_is_read_in_integers_cannot_stay_float():
    x = keras.Input(SHAPE, name="x")
    model = keras.Model(x, layers.Conv2D(2, 1, name="conv")(x))
    for entry in ({"exclude": True}, {"q_bits": 32}):
        config = [DEFAULT, {"op_names": ["x"], **entry}]
        refused(ConfigError, ("config_list[1]", "'x'", "'conv'"), kquant.quantize_model, model, config)


def test_arguments_of_export(tmp_path):
    x = keras.Input(SHAPE, name="x")
    qmodel = kquant.quantize_model(keras.Model(x, layers.Conv2D(2, 1)(x)), calibration_data=X)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (None, 5, ["m.tflite"], "a\0b", pipe):
        refused(ExportError, ("path",), kquant.export_tflite, qmodel, path)
        if path is not pipe and path != "a\0b":
            refused(ArtifactError, ("path",), kquant.audit, path)
    for name in ("allow_float", "weights_only"):
        refused(ExportError, (name, "'no'"), kquant.export_tflite, qmodel, tmp_path / "m.tflite", **{name: "no"})
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    kquant.export_tflite(qmodel, os.fsencode(tmp_path / "bytes.tflite"))
    assert kquant.audit(tmp_path / "bytes.tflite").fully_integer


def test_a_narrow_input_of_a_wide_layer_saturates_as_the_kernel_does(tmp_path):
    """The lowest 8-bit code lies below the data, so beyond the lowest code of 16 bits, where kernels go to -32768."""
    x = keras.Input(SHAPE, name="x")
    y = layers.Dense(3)(layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(x)))
    config = [{"op_types": ["default"], "q_bits": {"weight": 8, "output": 16}}]
    data = np.clip(X, -3.9, 3.06)
    data[0, 0, 0, :2] = -3.9, 3.06
    exported(keras.Model(x, y), data, tmp_path / "wide.tflite", config)


# -- layers and operations that are made of others --------------------------------------------------------------------

CLIPS = RNG.normal(size=(16, 3, 6, 6, 4)).astype(np.float32)

COMPOSED: dict[str, tuple[np.ndarray, Any]] = {
    "new axes": (X, lambda x: [x[:, None, 1:], x[..., None, 0], x[:, 0, :, None]]),
    "crop": (X, lambda x: layers.CenterCrop(3, 4)(x)),
    "time": (
        CLIPS,
        lambda x: [
            layers.TimeDistributed(layers.Conv2D(3, 3, activation="relu"))(x),
            layers.TimeDistributed(layers.BatchNormalization())(x),
            layers.TimeDistributed(layers.Flatten())(x),
        ],
    ),
}
if IS_KERAS3:
    COMPOSED |= {
        "flip": (X, lambda x: [ops.flip(x, axis=1), ops.flip(x, axis=(1, -1))]),
        "roll": (X, lambda x: [ops.roll(x, 2, axis=1), ops.roll(x, -1, axis=-1), ops.roll(x, 6, axis=2)]),
        "unstack": (X, lambda x: ops.unstack(x, axis=2)),
        "pools": (X, lambda x: [ops.max_pool(x, 2, padding="same"), ops.average_pool(x, 3, strides=1)]),
    }


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_operations_give_what_the_float_model_gives(name, tmp_path):
    data, function = COMPOSED[name]
    x = keras.Input(data.shape[1:], name="x")
    model = keras.Model(x, function(x))
    qmodel, _ = exported(model, data, tmp_path / "m.tflite")
    for mine, theirs in zip(_flat(qmodel(data)), _flat(model(data)), strict=True):
        # Two or three roundings to 8 bits of a range of about 8 standard deviations.
        assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() <= 3 / 255 * np.ptp(theirs)


def _flat(values: Any) -> list:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def test_sequences_of_any_length(tmp_path):
    x = keras.Input((None, 3), name="x")
    y = layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu")(x)
    y = layers.MaxPooling1D()(layers.DepthwiseConv1D(3, padding="same")(y))
    model = keras.Model(x, layers.Conv1D(2, 1)(y))
    qmodel, _ = exported(model, RNG.normal(size=(64, 9, 3)), tmp_path / "m.tflite")
    longer = RNG.normal(size=(48, 14, 3)).astype(np.float32)
    assert kquant.verify(qmodel, tmp_path / "m.tflite", longer).ok
    assert kquant.load_artifact(tmp_path / "m.tflite")(longer).shape == (48, 7, 2)


def test_an_ellipsis_whose_shape_keras_misstates_is_refused(tmp_path):
    x = keras.Input((5, 4, 6), name="x")
    y = layers.EinsumDense("...d,de->...e", output_shape=7, name="einsum")(x)
    if not IS_KERAS3:  # which states it right
        exported(keras.Model(x, y), RNG.normal(size=(16, 5, 4, 6)), tmp_path / "m.tflite")
        return
    refused(UnsupportedError, ("'einsum'", "letters"), kquant.quantize_model, keras.Model(x, y))


@pytest.mark.parametrize("ending", [None, *FORMATS])
def test_losses_by_the_output_names_of_the_float_model(ending, tmp_path):
    x = keras.Input((4,), name="x")
    probs, size = layers.Dense(3, activation="softmax", name="probs")(x), layers.Dense(1, name="size")(x)
    qmodel = kquant.quantize_model(keras.Model(x, [probs, size]), calibration_data=X[:, 0, 0])
    if ending is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
            qmodel.save(tmp_path / f"q{ending}")
        qmodel = keras.models.load_model(tmp_path / f"q{ending}")
    losses = {"probs": "sparse_categorical_crossentropy", "size": "mse"}
    qmodel.compile("sgd", loss=losses, metrics={"probs": ["accuracy"]})
    before = qmodel.get_weights()
    history = qmodel.fit(X[:, 0, 0], {"probs": np.zeros(32), "size": np.ones((32, 1))}, verbose=0).history
    assert {"probs_loss", "size_loss", "probs_accuracy"} <= set(history)
    assert any(not np.array_equal(a, b) for a, b in zip(before, qmodel.get_weights(), strict=True))
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    interpreter = Interpreter(str(tmp_path / "m.tflite"))
    assert set(interpreter.get_signature_list()["serving_default"]["outputs"]) == {"probs", "size"}


class OwnStep:
    """A training step of one's own, as the guides of Keras write it."""

    def train_step(self, data: Any) -> dict:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        apply_gradients(self.optimizer, tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"own": loss}


class OwnFunctional(OwnStep, keras.Model):
    """Made as `OwnFunctional(inputs, outputs)`."""


class OwnSubclass(OwnStep, keras.Model):
    """Made of layers."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def test_a_functional_model_of_ones_own_class_keeps_its_training_step(tmp_path):
    x = keras.Input((4,), name="x")
    qmodel, _ = exported(OwnFunctional(x, layers.Dense(3)(x)), X[:, 0, 0], tmp_path / "m.tflite")
    qmodel.compile("sgd")
    assert list(qmodel.fit(X[:, 0, 0], np.ones((32, 3)), verbose=0).history) == ["own"]


def test_a_training_step_that_the_quantized_model_lacks_is_warned_of():
    model = OwnSubclass()
    model(X[:1, 0, 0])
    with pytest.warns(UserWarning, match=r"without 'train_step' of OwnSubclass"):
        kquant.quantize_model(model)
