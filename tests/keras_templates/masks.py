"""Masks of sequences: kept as far as the loss, refused where a layer computes with one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from keras_generation import keras, layers

import kquant
from keras_templates.bad_input import refused
from kquant.core.errors import UnsupportedError

LENGTH = 7
IDS = np.random.default_rng(2).integers(1, 20, (16, LENGTH)).astype(np.int32)
IDS[:, 4:] = 0
ENDS = "ignore:.*does not support masking"  # Keras, of the float model: what the layer behind ends

Layers = Callable[[object], object]


def masked(then: Layers) -> keras.Model:
    """A model of an embedding whose id 0 is masked, and the layers that `then` applies."""
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    return keras.Model(ids, then(layers.Embedding(20, 8, mask_zero=True, name="table")(ids)))


def convolved(x):
    return layers.Dense(3)(layers.GlobalMaxPooling1D()(layers.Conv1D(8, 3, activation="relu")(x)))


def nested(x):
    inner = keras.Input((LENGTH, 8))
    return keras.Model(inner, layers.Dense(4, activation="relu")(inner), name="inner")(x)


@pytest.mark.filterwarnings(ENDS)
@pytest.mark.parametrize("then", [convolved, nested])
def test_an_embedding_whose_mask_nobody_reads_goes_all_the_way(then, tmp_path):
    qmodel = kquant.quantize_model(masked(then), calibration_data=IDS)
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert kquant.audit(tmp_path / "m.tflite").fully_integer
    parity = kquant.verify(qmodel, tmp_path / "m.tflite", IDS)
    assert parity.ok, parity.problems


def test_the_loss_leaves_out_what_it_leaves_out_of_the_float_model():
    model = masked(lambda x: layers.Dense(3)(layers.Dense(8, activation="relu")(x)))
    qmodel = kquant.quantize_model(model, calibration_data=IDS)
    labels = np.random.default_rng(3).normal(size=(16, LENGTH, 3)).astype(np.float32)
    others = np.where(IDS[..., None] == 0, np.float32(50), labels)
    for each in (model, qmodel):
        each.compile("sgd", "mse")
        # The masked labels, and nothing else, differ; exactly the same sums are made of the rest.
        assert each.evaluate(IDS, labels, verbose=0) == each.evaluate(IDS, others, verbose=0)


def test_a_mask_that_the_quantized_model_loses_is_warned_of():
    with pytest.warns(UserWarning, match="carries a mask that the loss leaves samples out by"):
        kquant.quantize_model(masked(lambda x: layers.LayerNormalization()(layers.Dense(8)(x))))


@pytest.mark.parametrize(
    "then",
    [
        lambda x: layers.GlobalAveragePooling1D(name="reader")(x),
        lambda x: layers.GlobalAveragePooling1D(name="reader")(layers.Dense(8, activation="relu")(x)),
        lambda x: layers.MultiHeadAttention(2, 4, name="reader")(x, x),
        lambda x: layers.Attention(name="reader")([x, x]),
        lambda x: layers.LSTM(4, name="reader")(x),
    ],
    ids=["average", "behind_dense", "multi_head", "attention", "lstm"],
)
def test_a_layer_that_computes_with_a_mask_is_refused(then):
    refused(UnsupportedError, ("'reader'", "'table'", "mask_zero=False"), kquant.quantize_model, masked(then))


# -- constant masks of attention ---------------------------------------------------------------------------------------

X = np.random.default_rng(4).normal(size=(32, LENGTH, 8)).astype(np.float32)
BAND = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))) < 3
ATTENTION = {
    "causal": lambda q, v: layers.MultiHeadAttention(2, 8)(q, v, use_causal_mask=True),
    "band": lambda q, v: layers.MultiHeadAttention(2, 8)(q, v, attention_mask=BAND[None]),
    "both": lambda q, v: layers.MultiHeadAttention(2, 8)(q, v, attention_mask=BAND[None], use_causal_mask=True),
    "dot": lambda q, v: layers.Attention()([q, v], use_causal_mask=True),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_a_constant_mask_of_attention_goes_all_the_way(name, tmp_path):
    keras.utils.set_random_seed(2)
    x = keras.Input((LENGTH, 8), name="x")
    model = keras.Model(x, ATTENTION[name](layers.Dense(8)(x), layers.Dense(8)(x)))
    qmodel = kquant.quantize_model(model, calibration_data=X)
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert kquant.audit(tmp_path / "m.tflite").fully_integer
    parity = kquant.verify(qmodel, tmp_path / "m.tflite", X)
    assert parity.ok, parity.problems
    expected, got = (m.predict(X, verbose=0) for m in (model, qmodel))
    # Scores of 8 bits over 16 and more are off by up to 1/30, and so are the logarithms of the weights.
    assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)
    # A flipped code of the scores moves a weight by up to 1/16 of itself, and the values that it weighs by less.
    artifact = kquant.load_artifact(tmp_path / "m.tflite")(X)
    assert np.abs(artifact - got).max() < 0.02 * np.ptp(expected)
    # What comes later is left out: of another last value only the last result knows.
    if name != "band":
        other = X.copy()
        other[:, -1] += 3
        np.testing.assert_array_equal(qmodel.predict(other, verbose=0)[:, :-1], got[:, :-1])


def test_a_mask_that_leaves_nothing_of_a_row_is_refused():
    x = keras.Input((LENGTH, 8))
    nothing = np.eye(LENGTH, k=-1, dtype=bool)[None]
    model = keras.Model(x, layers.MultiHeadAttention(2, 8, name="att")(x, x, attention_mask=nothing))
    refused(UnsupportedError, ("'att'", "leaves nothing"), kquant.quantize_model, model)


def test_a_mask_that_is_an_input_is_refused():
    x, mask = keras.Input((LENGTH, 8)), keras.Input((LENGTH, LENGTH), dtype="bool")
    model = keras.Model([x, mask], layers.MultiHeadAttention(2, 8, name="att")(x, x, attention_mask=mask))
    refused(UnsupportedError, ("'att'", "follows the model's inputs"), kquant.quantize_model, model)
