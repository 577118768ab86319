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


def test_attention_with_a_causal_mask_says_so():
    x = keras.Input((LENGTH, 8))
    model = keras.Model(x, layers.Attention(name="att")([x, x], use_causal_mask=True))
    refused(UnsupportedError, ("'att'", "use_causal_mask"), kquant.quantize_model, model)
