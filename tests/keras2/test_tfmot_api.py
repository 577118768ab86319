"""kquant's configs and scheme in tfmot's own API: annotated by hand, mixed with tfmot's, and placed by our scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import kquant
from kquant import keras2
from kquant.core.errors import ConfigError

tfmot = pytest.importorskip("tensorflow_model_optimization").quantization.keras
X = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("f4")
CONFIGS = {
    "naive": keras2.NaiveQuantizeConfig(4, 8),
    "qat": keras2.QATQuantizeConfig(4, 6),
    "dorefa": keras2.DoReFaQuantizeConfig(2, 3),
}


def net() -> tf_keras.Model:
    """conv -> norm -> relu -> conv -> dense."""
    x = tf_keras.Input((8, 8, 3), name="x")
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, use_bias=False, name="first")(x))
    y = layers.Conv2D(6, 3, activation="relu", name="second")(layers.ReLU(name="relu")(y))
    return tf_keras.Model(x, layers.Dense(5, name="head")(layers.Flatten(name="flat")(y)), name="net")


def annotated(model: tf_keras.Model, configs: dict[str, Any]) -> tf_keras.Model:
    """The model with some of its layers annotated; None is tfmot's own config."""

    def wrap(layer: Any) -> Any:
        return tfmot.quantize_annotate_layer(layer, configs[layer.name]) if layer.name in configs else layer

    return tf_keras.models.clone_model(model, clone_function=wrap)


def wrapper(qmodel: tf_keras.Model, name: str) -> Any:
    """tfmot's wrapper of a layer."""
    return qmodel.get_layer(f"quant_{name}")


@pytest.mark.parametrize("recipe", CONFIGS)
def test_a_config_by_hand_quantizes_kernel_and_output(recipe):
    """In tfmot's own wrapper and scheme, beside layers that tfmot quantizes itself."""
    config = CONFIGS[recipe]
    qmodel = tfmot.quantize_apply(annotated(net(), {"second": config, "head": None}))
    qmodel.compile(tf_keras.optimizers.SGD(0.01), "mse")
    before = {v.name: v.numpy() for v in wrapper(qmodel, "second").weights}
    qmodel.fit(X, np.zeros((64, 5)), batch_size=16, verbose=0)
    second = wrapper(qmodel, "second")
    variables = {v.name.split("/")[-1].removesuffix(":0"): v for v in second.weights}
    kernel = variables["kernel"].numpy()
    assert not np.array_equal(kernel, before["second/kernel:0"])
    output = tf_keras.Model(qmodel.input, second.output)(X).numpy()
    # Independent: the formula of the recipe, and the number of levels.
    given = tf_keras.Model(qmodel.input, second.input)(X).numpy()
    quantized = by_hand(recipe, kernel)
    levels = {"naive": 15, "qat": 15, "dorefa": 4}[recipe]
    assert len(np.unique(np.round(quantized / np.abs(quantized).max((0, 1, 2)), 5))) <= levels
    real = np.maximum(tf.nn.conv2d(given, quantized, 1, "VALID").numpy() + variables["bias"].numpy(), 0)
    if recipe == "dorefa":
        low, high, bits = 0.0, 1.0, 3
    else:
        low, high, bits = 0.0, float(variables["output_maximum"][0]), config.output_bits
        assert float(variables["output_minimum"][0]) == 0
    step = (high - low) / (2**bits - 1)
    assert len(np.unique(output)) <= 2**bits
    distance = np.abs(output - np.clip(real, 0, high)) / step
    assert distance.max() <= 0.5 + 1e-3  # to the nearest level; float32's rounding of the convolution


def by_hand(recipe: str, w: np.ndarray) -> np.ndarray:
    """The quantized kernel, from the papers' formulas."""
    if recipe == "dorefa":
        u = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
        return (2 * np.floor(3 * u + 0.5) / 3 - 1).astype("f4")
    scale = np.abs(w).max((0, 1, 2)) / 7
    return (np.floor(w / scale + 0.5) * scale).astype("f4")


def test_a_config_before_batch_norm_is_refused_by_tfmots_own_scheme():
    with pytest.raises(ConfigError, match=r"'first'.*followed_by_bn.*QuantizeScheme.*'norm'"):
        tfmot.quantize_apply(annotated(net(), {"first": keras2.QATQuantizeConfig()}))


def test_followed_by_bn_quantizes_the_kernel_only():
    configs = {"first": keras2.QATQuantizeConfig(followed_by_bn=True), "relu": keras2.QATQuantizeConfig(8, 4)}
    qmodel = tfmot.quantize_apply(annotated(net(), configs))
    assert not [v.name for v in wrapper(qmodel, "first").weights if "minimum" in v.name]
    assert [v.name for v in wrapper(qmodel, "relu").weights if "output_minimum" in v.name]
    qmodel(X, training=True)
    output = tf_keras.Model(qmodel.input, wrapper(qmodel, "relu").output)(X).numpy()
    assert 2 < len(np.unique(output)) <= 16


def test_gradients_are_refused_in_tfmots_wrapper():
    config = keras2.DoReFaQuantizeConfig(2, 8, gradient_bits=4)
    with pytest.raises(ConfigError, match=r"'second'.*gradient_bits.*QuantizeScheme"):
        tfmot.quantize_apply(annotated(net(), {"second": config}))


def test_our_scheme_gives_what_quantize_model_gives(tmp_path):
    model = net()
    one = kquant.quantize_model(model, calibration_data=X)
    scheme = keras2.QuantizeScheme(calibration_data=X)
    other = tfmot.quantize_apply(tfmot.quantize_annotate_model(model), scheme=scheme)
    np.testing.assert_array_equal(one(X), other(X))
    for name, qmodel in (("one", one), ("other", other)):
        kquant.export_tflite(qmodel, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_our_scheme_takes_configs_per_layer_and_leaves_the_rest_float(tmp_path):
    configs = dict.fromkeys(("first", "norm", "relu", "second"))
    configs |= {"second": keras2.DoReFaQuantizeConfig(2, 8, gradient_bits=4)}
    data = 0.1 * X  # nothing above DoReFa's 1
    qmodel = tfmot.quantize_apply(annotated(net(), configs), scheme=keras2.QuantizeScheme(calibration_data=data))
    wrapped = {layer.name: layer for layer in qmodel.layers if hasattr(layer, "quantize_config")}
    assert {n: (w.quantizer, w.bits, w.gradient_bits) for n, w in wrapped.items()} == {
        "first": ("qat", 8, None), "second": ("dorefa", 2, 4),
    }  # fmt: skip
    with pytest.raises(kquant.ExportError, match="head"):
        kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    report = kquant.export_tflite(qmodel, tmp_path / "m.tflite", allow_float=True)
    assert [name for name in report.floats if "head" in name or "flat" in name]
    assert kquant.verify(qmodel, tmp_path / "m.tflite", data).ok


def test_our_scheme_waits_for_the_start_step():
    """`quantize_apply` clones what the scheme returns, and a clone of a model calls its layers once more."""
    model = net()
    for layer in model.layers:
        layer.trainable = False  # batch norm then has nothing to move, and the outputs stay comparable
    qmodel, direct = (
        tfmot.quantize_apply(
            tfmot.quantize_annotate_model(model),
            scheme=keras2.QuantizeScheme(keras2.QATQuantizeConfig(4, 4, start_step=start), calibration_data=X),
        )
        for start in (2, 0)
    )
    qmodel.get_layer("norm").trainable = False
    for _ in range(2):
        np.testing.assert_array_equal(qmodel(X, training=True), model(X))
    for mine, theirs in zip(of_ranges(qmodel), of_ranges(direct), strict=True):
        theirs.set_range(float(mine.minimum[0]), float(mine.maximum[0]), 0)
    np.testing.assert_array_equal(qmodel(X), direct(X))
    assert not np.array_equal(qmodel(X, training=True), model(X))


def of_ranges(qmodel: tf_keras.Model) -> list[Any]:
    """The quantizers of activations."""
    return [layer for layer in qmodel.layers if hasattr(layer, "set_range")]


def test_our_scheme_refuses_a_config_of_tfmot():
    from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import default_8bit_quantize_registry

    own = default_8bit_quantize_registry.Default8BitQuantizeConfig(["kernel"], ["activation"], False)
    with tfmot.quantize_scope(), pytest.raises(ConfigError, match=r"'head'.*kquant's configs"):
        tfmot.quantize_apply(annotated(net(), {"head": own}), scheme=keras2.QuantizeScheme())


def test_a_model_that_tfmot_placed_is_refused_by_name(tmp_path):
    qmodel = tfmot.quantize_apply(annotated(net(), {"second": keras2.QATQuantizeConfig()}))
    for call in (kquant.quantize_model, lambda model: kquant.export_tflite(model, tmp_path / "m.tflite")):
        with pytest.raises(kquant.ModelError, match=r"layer '\w+'.*QuantizeScheme.*tfmot placed"):
            call(qmodel)
    assert list(tmp_path.iterdir()) == []


def test_bad_bits_of_a_config_are_refused():
    with pytest.raises(ConfigError, match="q_bits"):
        keras2.QATQuantizeConfig(9)
    with pytest.raises(ConfigError, match="q_bits"):
        keras2.NaiveQuantizeConfig(1)


def test_quantize_model_uses_tfmots_wrapper_and_our_configs():
    qmodel = kquant.quantize_model(net(), [{"q_bits": {"weight": 4, "output": 8}, "op_types": ["default"]}])
    wrappers = [layer for layer in qmodel.layers if type(layer).__name__ == "QuantizedLayer"]
    assert [w.name for w in wrappers] == ["first", "second", "head"]
    from tensorflow_model_optimization.python.core.quantization.keras import quantize_wrapper

    for w in wrappers:
        assert isinstance(w, quantize_wrapper.QuantizeWrapperV2)
        assert isinstance(w.quantize_config, keras2.QATQuantizeConfig)
        assert w.quantize_config.weight_bits == 4


def test_a_frozen_layer_stays_frozen():
    """tfmot's own wrapper trains the kernel of a layer whose `trainable` is False."""
    model = net()
    model.get_layer("second").trainable = False
    qmodel = kquant.quantize_model(model, calibration_data=X)
    names = [v.name for v in qmodel.trainable_weights]
    assert not [n for n in names if n.startswith("second")]
    assert [n for n in names if n.startswith("first")]
    other = tfmot.quantize_apply(annotated(model, {"second": None}))
    assert [v.name for v in other.trainable_weights if "second" in v.name]


def test_layers_that_only_move_values_need_no_annotation_in_our_scheme(tmp_path):
    x = tf_keras.Input((8, 8, 3))
    y = tf_keras.layers.ReLU()(tf_keras.layers.BatchNormalization()(tf_keras.layers.Conv2D(4, 3, name="conv")(x)))
    y = tf_keras.layers.Flatten()(tf_keras.layers.MaxPooling2D()(y))
    model = tf_keras.Model(x, tf_keras.layers.Dense(3, name="logits")(y))
    data = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
    scheme = keras2.QuantizeScheme(calibration_data=data)
    qmodel = tfmot.quantize_apply(
        annotated(model, {"conv": None, "logits": keras2.QATQuantizeConfig(4)}), scheme=scheme
    )
    kquant.export_tflite(qmodel, tmp_path / "model.tflite")
    assert kquant.audit(tmp_path / "model.tflite").fully_integer
    partly = tfmot.quantize_apply(annotated(model, {"logits": keras2.QATQuantizeConfig()}), scheme=scheme)
    with pytest.raises(kquant.ExportError, match="Received: conv: its input is not quantized"):
        kquant.export_tflite(partly, tmp_path / "partly.tflite")


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_model_annotated_by_hand_is_saved_and_loaded(tmp_path):
    """tfmot's wrappers need its scope, as always; our configs and quantizers need none."""
    qmodel = tfmot.quantize_apply(annotated(net(), {"second": keras2.QATQuantizeConfig(4)}))
    qmodel(X, training=True)
    qmodel.save(tmp_path / "m.h5")
    with tfmot.quantize_scope():
        loaded = tf_keras.models.load_model(tmp_path / "m.h5")
    np.testing.assert_array_equal(loaded(X), qmodel(X))
    # In the newer format tfmot's wrapper does not find its own variables again, with its own config either.
    other = tfmot.quantize_apply(annotated(net(), {"second": None}))
    other.save(tmp_path / "m.keras")
    with tfmot.quantize_scope(), pytest.raises(ValueError, match=r"expected \d+ variables"):
        tf_keras.models.load_model(tmp_path / "m.keras")
