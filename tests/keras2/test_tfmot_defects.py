"""What tfmot's quantization-aware training does wrong, measured beside ours on the same model.

Each test asserts tfmot's own result too: if a later tfmot is right, the test says so.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras import layers

import kquant
from kquant import keras2  # noqa: F401  imports tfmot without changing the process
from kquant.tflite.flatbuffer import decode

tfmot = pytest.importorskip("tensorflow_model_optimization").quantization.keras
RNG = np.random.default_rng(3)
X = RNG.normal(size=(64, 8, 8, 3)).astype("f4")


def theirs(model: tf_keras.Model) -> tf_keras.Model:
    """tfmot's own quantized model."""
    return tfmot.quantize_model(model)


def their_file(qmodel: tf_keras.Model) -> Any:
    """What tfmot's documentation says to export with."""
    converter = tf.lite.TFLiteConverter.from_keras_model(qmodel)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Statistics for quantized inputs were expected")
        return decode(converter.convert())


def our_file(qmodel: tf_keras.Model, folder: Any) -> Any:
    """Our export, verified."""
    path = folder / "model.tflite"
    kquant.export_tflite(qmodel, path)
    assert kquant.audit(path).fully_integer
    assert kquant.verify(qmodel, path, _data(qmodel)).ok
    return decode(path.read_bytes())


def _data(model: tf_keras.Model) -> np.ndarray:
    return RNG.normal(size=(32, *model.input_shape[1:])).astype("f4")


def float_ops(file: Any) -> list[str]:
    """Ops with a float result that are no boundary."""
    kinds = [op.opcode for op in file.ops if any(file.tensors[t].dtype == "float32" for t in op.outputs)]
    return [kind for kind in kinds if kind != "DEQUANTIZE"]


def kernels(file: Any, opcode: str) -> list[Any]:
    """The weight tensors of the ops of a kind."""
    return [file.tensors[op.inputs[1]] for op in file.ops if op.opcode == opcode]


def chain(*parts: Any, shape: tuple[int, ...] = (8, 8, 3)) -> tf_keras.Model:
    """A model of layers in a row."""
    x = y = tf_keras.Input(shape)
    for part in parts:
        y = part(y)
    return tf_keras.Model(x, y)


def test_t1_an_untrained_model_computes_what_the_float_one_does():
    model = chain(layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(5))
    wanted = model.predict(X, verbose=0)
    other = theirs(model).predict(X, verbose=0)
    mine = kquant.quantize_model(model, calibration_data=X).predict(X, verbose=0)
    assert np.abs(other).max() < 1e-6  # the range of its input is 0..0
    assert np.abs(mine - wanted).max() < 0.03 * np.abs(wanted).max()


def test_t2_ranges_converge_to_the_data():
    """From no range at all, 200 steps on data in [0, 3.4]."""
    model = chain(layers.ReLU(), shape=(16,))
    data = RNG.uniform(0, 3.4, (32 * 200, 16)).astype("f4")
    both = {"ours": kquant.quantize_model(model), "tfmot": theirs(model)}
    for qmodel in both.values():
        qmodel.compile("sgd", "mse")
        qmodel.fit(data, np.zeros((len(data), 16)), batch_size=32, verbose=0)
    low, high = (float(v) for v in _quantizers(both["ours"])[0].range())
    assert low == 0 or abs(low) < 0.01
    assert high == pytest.approx(3.4, rel=0.01)
    (theirs_max,) = [v for v in both["tfmot"].weights if v.name.endswith("output_max:0")]
    assert float(theirs_max) > 5  # it began at 6 and moves by a thousandth of the way


def _quantizers(qmodel: tf_keras.Model) -> list[Any]:
    return [layer for layer in qmodel.layers if type(layer).__name__ == "FakeQuantize"]


def test_t3_depthwise_is_quantized_per_channel(tmp_path):
    depthwise = layers.DepthwiseConv2D(3, use_bias=False)
    model = chain(depthwise)
    kernel = RNG.normal(size=(3, 3, 3, 1)) * np.array([1.0, 0.1, 0.01]).reshape(1, 1, 3, 1)
    depthwise.set_weights([kernel])
    (mine,) = kernels(our_file(kquant.quantize_model(model, calibration_data=X), tmp_path), "DEPTHWISE_CONV_2D")
    (other,) = kernels(their_file(trained(theirs(model))), "DEPTHWISE_CONV_2D")
    assert (len(set(mine.scale)), len(set(other.scale))) == (3, 1)
    worst = [worst_channel_snr(kernel, tensor) for tensor in (mine, other)]
    assert worst[0] > worst[1] + 20  # dB


def worst_channel_snr(kernel: np.ndarray, tensor: Any) -> float:
    """The least signal-to-noise ratio of the channels of a depthwise kernel in a file, dB."""
    values = (tensor.data.astype(np.float64) * np.asarray(tensor.scale)).reshape(3, 3, 3)
    wanted = kernel.reshape(3, 3, 3)
    noise = ((values - wanted) ** 2).sum((0, 1))
    return float((10 * np.log10((wanted**2).sum((0, 1)) / noise)).min())


def trained(qmodel: tf_keras.Model, steps: int = 2) -> tf_keras.Model:
    """Two steps: tfmot's ranges are unusable before any."""
    qmodel.compile(tf_keras.optimizers.SGD(0.0), "mse")
    x = _data(qmodel)
    for _ in range(steps):
        qmodel.train_on_batch(x, np.zeros((len(x), *qmodel.output_shape[1:]), "f4"))
    return qmodel


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_t4_the_number_of_bits_is_respected(bits):
    """tfmot's fixed-range quantizer of 2 bits has 256 levels; ours has 4, in every quantizer."""
    from tensorflow_model_optimization.python.core.quantization.keras import quantizers

    fixed = quantizers.FixedQuantizer(num_bits=bits, init_min=0.0, init_max=1.0, narrow_range=False)
    layer = layers.Layer()
    x = tf.linspace(0.0, 1.0, 4097)
    levels = np.unique(fixed(x, False, fixed.build((4097,), "x", layer)))
    assert len(levels) == 256
    model = chain(layers.Dense(16, name="d"), layers.ReLU(name="relu"), layers.Dense(2), shape=(16,))
    config = [{"q_bits": 8, "op_types": ["default"]}, {"q_bits": bits, "op_names": ["d", "relu"]}]
    qmodel = kquant.quantize_model(model, config, calibration_data=_data(model))
    part = tf_keras.Model(qmodel.input, qmodel.get_layer("relu_quantizer").output)
    assert len(np.unique(part.predict(_data(model), verbose=0))) <= 2**bits


def autoencoder(width: int = 32) -> tf_keras.Model:
    """Dense, batch norm and ReLU in a row."""
    parts: list[Any] = []
    for units in (16, 8, 16):
        parts += [layers.Dense(units), layers.BatchNormalization(), layers.ReLU()]
    return chain(*parts, layers.Dense(width), shape=(width,))


def test_t5_dense_and_batch_norm_run_in_integers(tmp_path):
    model = autoencoder()
    mine = our_file(kquant.quantize_model(model, calibration_data=_data(model)), tmp_path)
    other = their_file(trained(theirs(model)))
    assert float_ops(mine) == []
    assert float_ops(other).count("FULLY_CONNECTED") == 3


@pytest.mark.parametrize("kind", ["conv_swish", "transpose_relu"])
def test_t6_an_activation_behind_a_kernel_runs_in_integers(kind, tmp_path):
    made = {
        "conv_swish": lambda: layers.Conv2D(4, 3, activation="swish"),
        "transpose_relu": lambda: layers.Conv2DTranspose(4, 3, activation="relu"),
    }[kind]
    model = chain(made())
    mine = our_file(kquant.quantize_model(model, calibration_data=X), tmp_path)
    other = their_file(trained(theirs(model)))
    assert float_ops(mine) == []
    assert float_ops(other) != []


@pytest.mark.parametrize(
    ("opcode", "make"),
    [
        ("FULLY_CONNECTED", lambda: [layers.Flatten(), layers.Dense(6)]),
        ("TRANSPOSE_CONV", lambda: [layers.Conv2DTranspose(6, 3)]),
    ],
)
def test_t7_dense_and_transposed_kernels_have_a_scale_per_channel(opcode, make, tmp_path):
    model = chain(*make())
    (mine,) = kernels(our_file(kquant.quantize_model(model, calibration_data=X), tmp_path), opcode)
    (other,) = kernels(their_file(trained(theirs(model))), opcode)
    assert (len(mine.scale), len(other.scale)) == (6, 1)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_t8_low_bit_activations_are_exact_in_the_file(bits, tmp_path):
    """Our codes of a k-bit tensor take at most 2**k values, and they are those of the trained model."""
    from tensorflow_model_optimization.python.core.quantization.keras import quantizers

    class Low(tfmot.QuantizeConfig):
        def get_weights_and_quantizers(self, layer):
            return [(layer.kernel, quantizers.LastValueQuantizer(8, True, True, True))]

        def get_activations_and_quantizers(self, layer):
            return [(layer.activation, quantizers.MovingAverageQuantizer(bits, False, False, False))]

        def set_quantize_weights(self, layer, values):
            layer.kernel = values[0]

        def set_quantize_activations(self, layer, values):
            layer.activation = values[0]

        def get_output_quantizers(self, layer):
            return []

        def get_config(self):
            return {}

    def net(wrap: Any = lambda layer: layer) -> tf_keras.Model:
        return chain(wrap(layers.Conv2D(4, 3, activation="relu", name="c")), layers.Conv2D(2, 1, name="out"))

    model = net()
    with tfmot.quantize_scope({"Low": Low}):
        annotated = tfmot.quantize_annotate_model(net(lambda layer: tfmot.quantize_annotate_layer(layer, Low())))
        other = trained(tfmot.quantize_apply(annotated))
    if bits <= 4:
        with pytest.raises(Exception, match=r"quant|Quant"):  # of a class that the converter does not document
            their_file(other)
    else:
        kept = [t for t in their_file(other).tensors if t.dtype == "int8" and tuple(t.shape[1:]) == (6, 6, 4)]
        low, high = (
            next(float(v) for v in other.weights if v.name.endswith(f"quant_c/post_activation_{end}:0"))
            for end in ("min", "max")
        )
        # 256 levels in the file where 2**bits were trained.
        assert [float(t.scale[0]) for t in kept] == pytest.approx([(high - low) / 255], rel=0.01)
    config = [{"q_bits": 8, "op_types": ["default"]}, {"q_bits": {"weight": 8, "output": bits}, "op_names": ["c"]}]
    qmodel = kquant.quantize_model(model, config, calibration_data=X)
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    report = kquant.verify(qmodel, tmp_path / "m.tflite", X)
    assert report.ok, report.problems
    tensors = {t.name: t for t in decode((tmp_path / "m.tflite").read_bytes()).tensors}
    low, high = (float(v) for v in qmodel.get_layer("c_activation_quantizer").range())
    assert low == 0
    assert float(tensors["c_activation"].scale[0]) == pytest.approx(high / (2**bits - 1), rel=1e-6)
