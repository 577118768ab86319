"""A weight range per tensor in front of a batch norm: the kernel is quantized with the norm's factor in it.

Jacob et al. 2018, section 3.2: `w * gamma / sigma` is what is quantized and what the artifact holds, on one scale.
"""

import warnings

import numpy as np
import pytest
from keras_generation import FORMATS, keras, layers, own

import kquant
from keras_templates.small import CLASSES, IMAGES, trained
from kquant.api import front_end
from kquant.core.lower import lower

PER_TENSOR = {"op_types": ["default"], "quant_scheme": {"weight": "tensor_symmetric"}}
LAYERS = {  # each with the kernel's axes that are no output channels
    "conv": (lambda: layers.Conv2D(6, 3, name="layer"), (8, 8, 2), (0, 1, 2)),
    "grouped": (lambda: layers.Conv2D(6, 3, groups=2, use_bias=False, name="layer"), (8, 8, 2), (0, 1, 2)),
    "conv1d": (lambda: layers.Conv1D(5, 3, padding="causal", name="layer"), (9, 4), (0, 1)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="layer"), (8, 8, 3), (0, 1)),
    "transposed": (lambda: layers.Conv2DTranspose(4, 3, strides=2, name="layer"), (5, 5, 2), (0, 1, 3)),
    "dense": (lambda: layers.Dense(7, name="layer"), (6,), (0,)),
    "einsum": (lambda: layers.EinsumDense("abc,cd->abd", (5, 7), bias_axes="d", name="layer"), (5, 6), (0,)),
}
SIZES = {"conv": 6, "grouped": 6, "conv1d": 5, "depthwise": 6, "transposed": 4, "dense": 7, "einsum": 7}


def normed(kind, gamma=None, variance=None, epsilon=1e-3):
    """A layer and a batch norm, with statistics and a gamma of both signs or as given."""
    make, shape, _ = LAYERS[kind]
    rng, size = np.random.default_rng(3), SIZES[kind]
    layer, norm = make(), layers.BatchNormalization(name="norm", epsilon=epsilon)
    x = keras.Input(shape, name="x")
    y = norm(layer(x))
    model = keras.Model(x, layers.ReLU(name="relu")(y), name="normed")
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    values = rng.normal(size=(3, size))
    own_variance = rng.uniform(0.2, 3.0, size)
    norm.set_weights(
        [
            values[0] if gamma is None else np.resize(gamma, size),
            np.abs(values[1]),  # so that no ReLU is always zero
            values[2],
            own_variance if variance is None else np.resize(variance, size),
        ]
    )
    return model, rng.normal(size=(32, *shape)).astype(np.float32)


def quantized(model, data, bits=8, **entry):
    return kquant.quantize_model(model, [{"q_bits": bits, **PER_TENSOR, **entry}], calibration_data=data)


def papers_codes(qmodel, kind, qmax):
    """The paper's folded kernel on its own scale before rounding, the output channels last, and that scale; float64."""
    axes = LAYERS[kind][2]
    inner = qmodel.get_layer("layer").layer
    kernel = np.asarray(inner.get_weights()[0], np.float64)
    gamma, _, _, variance = (np.asarray(v, np.float64) for v in norm_values(qmodel))
    kept = [i for i in range(kernel.ndim) if i not in axes]
    flat = kernel.transpose(*axes, *kept).reshape(-1, gamma.size)
    folded = flat * (gamma / np.sqrt(variance + qmodel.get_layer("norm").epsilon))
    scale = np.abs(folded).max() / qmax
    return folded / scale, scale


def norm_values(qmodel):
    norm = qmodel.get_layer("norm")
    return [np.asarray(v) for v in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)]


def kernel_of(qmodel):
    """The integer kernel that is written, the output channels last, and the scales of the channels."""
    op = next(op for op in lower(front_end(qmodel).read(qmodel)).ops if op.weight is not None)
    axes = op.attrs["kernel_axes"]
    kept = [i for i in range(op.weight.codes.ndim) if i not in axes]
    return op.weight.codes.transpose(*axes, *kept).reshape(-1, op.weight.scale.size), op.weight.scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_codes_are_those_of_the_folded_kernel_on_one_scale(kind, bits, tmp_path):
    """In the file there is one scale; the codes are the paper's, but where float32 cannot tell which is nearer."""
    model, data = normed(kind)
    qmodel = quantized(model, data, bits)
    path = str(tmp_path / "m.tflite")
    kquant.export_tflite(qmodel, path)
    exact, scale = papers_codes(qmodel, kind, 2 ** (bits - 1) - 1)
    codes, scales = kernel_of(qmodel)
    # Half up in magnitude and sign apart: the file holds round(w |gamma / sigma|) times the sign of gamma.
    sign = np.where(norm_values(qmodel)[0] < 0, -1.0, 1.0)
    near = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    np.testing.assert_array_equal(codes[~near], (np.floor(exact * sign + 0.5) * sign)[~near])
    np.testing.assert_allclose(scales, scale, rtol=1e-6)
    assert np.unique(scales).size == 1
    (row,) = [op for op in kquant.audit(path).ops if op.weight_bits]
    assert row.granularity == "per-tensor"
    parity = kquant.verify(qmodel, path, data)
    assert parity.ok, parity.problems
    assert parity.max_lsb <= 0.6


def test_the_gain_makes_the_difference():
    """Where the factors of the norm differ, the kernel quantized without them has other codes."""
    model, data = normed("conv", gamma=[4.0, 1.0, 0.25])
    codes, _ = kernel_of(quantized(model, data))
    kernel = np.asarray(model.get_layer("layer").get_weights()[0]).reshape(-1, 6)
    plain = np.floor(kernel / (np.abs(kernel).max() / 127) + 0.5)
    assert (codes != plain).mean() > 0.5


def test_the_trained_model_computes_the_folded_kernel():
    """Convolved and unscaled, then normalized: the same as the folded kernel and bias, up to float32."""
    model, data = normed("dense")
    qmodel = quantized(model, data)
    exact, scale = papers_codes(qmodel, "dense", 127)
    gamma, beta, mean, variance = norm_values(qmodel)
    factor = gamma / np.sqrt(variance + 1e-3)
    sign = np.where(gamma < 0, -1.0, 1.0)
    kernel = np.floor(exact * sign + 0.5) * sign * scale
    bias = np.asarray(qmodel.get_layer("layer").layer.bias)
    layer, norm = qmodel.get_layer("layer"), qmodel.get_layer("norm")
    ours = np.asarray(norm(layer(data, gain=norm(data, gain=True))))
    np.testing.assert_allclose(ours, data @ kernel + (bias - mean) * factor + beta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "dense"])
def test_a_gamma_of_zero_is_harmless_and_learns(kind, tmp_path):
    """Such a channel deploys as its offset; in training it is normalized all the same, so its gamma moves."""
    model, data = normed(kind, gamma=[1.0, 0.0, -2.0])
    qmodel = quantized(model, data)
    dead = norm_values(qmodel)[0] == 0
    codes, _ = kernel_of(qmodel)
    assert not codes[:, dead].any()
    assert codes[:, ~dead].any(axis=0).all()
    ours, floats = (m.predict(data, verbose=0) for m in (qmodel, model))
    assert np.abs(ours - floats).max() < 0.03 * floats.max()  # 8 steps of an output in 8 bits
    target = np.random.default_rng(0).normal(0.0, 20.0, size=ours.shape)
    learned = []
    for trainee in (qmodel, model):
        trainee.compile(keras.optimizers.SGD(0.5), "mse")
        trainee.fit(data, target, batch_size=32, verbose=0)
        learned.append(norm_values(trainee)[0][dead])
    assert np.abs(learned[1]).max() > 0.01  # without the floor 1e-5 is all that rounding leaves
    np.testing.assert_allclose(*learned, atol=0.1 * np.abs(learned[1]).max())  # what 8 bits leave of the gradient
    assert all(np.isfinite(w).all() for w in qmodel.get_weights())
    path = str(tmp_path / "m.tflite")
    kquant.export_tflite(qmodel, path)
    parity = kquant.verify(qmodel, path, data)
    assert parity.ok, parity.problems
    assert parity.max_lsb <= 0.6


@pytest.mark.parametrize(("gamma", "variance", "epsilon"), [([0.0], None, 1e-3), (None, [1.0, 0.0, 2.0], 1e-5)])
def test_no_gamma_at_all_and_a_sigma_of_almost_nothing_are_harmless(gamma, variance, epsilon, tmp_path):
    model, data = normed("conv", gamma, variance, epsilon)
    qmodel = quantized(model, data)
    path = str(tmp_path / "m.tflite")
    kquant.export_tflite(qmodel, path)
    assert np.isfinite(qmodel.predict(data, verbose=0)).all()
    parity = kquant.verify(qmodel, path, data)
    assert parity.ok, parity.problems
    assert parity.max_lsb <= 0.6


def test_no_gradient_reaches_gamma_through_the_kernel():
    """Scaling and unscaling cancel, so what gamma is told is what the norm behind the layer tells it."""
    import tensorflow as tf

    model, data = normed("dense")
    qmodel = quantized(model, data)
    layer, norm = qmodel.get_layer("layer"), qmodel.get_layer("norm")
    with tf.GradientTape(persistent=True) as tape:
        y = layer(data, gain=norm(data, gain=True))
        loss = tf.reduce_sum(tf.convert_to_tensor(y) ** 2)
    variable = norm.gamma.value if hasattr(norm.gamma, "path") else norm.gamma
    kernel = layer.kernel.value if hasattr(norm.gamma, "path") else layer.kernel
    assert tape.gradient(loss, variable) is None
    np.testing.assert_allclose(
        np.asarray(tape.gradient(loss, kernel)), data.T @ (2 * np.asarray(y)), rtol=1e-4, atol=1e-3
    )


def cnn():
    x = keras.Input((8, 8, 2), name="image")
    y = layers.Conv2D(6, 3, use_bias=False, name="conv")(x)
    y = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(y))
    return keras.Model(x, layers.Dense(5, name="logits")(layers.Flatten(name="flat")(y)), name="cnn")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_trained_model_is_saved_whole_and_exports_the_same_file(suffix, tmp_path):
    qmodel = trained(quantized(cnn(), IMAGES), steps=4)
    again = tmp_path / f"model{suffix}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
        qmodel.save(str(again))
    loaded = keras.models.load_model(str(again))
    files = [tmp_path / name for name in ("a.tflite", "b.tflite")]
    for made, path in zip((qmodel, loaded), files, strict=True):
        kquant.export_tflite(made, str(path))
        assert kquant.verify(made, str(path), IMAGES).ok
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = {op.name: op.granularity for op in kquant.audit(str(files[0])).ops if op.weight_bits}
    assert set(rows.values()) == {"per-tensor"}  # the logits too, which have no norm


def test_what_is_planned_is_said_and_other_quantizers_do_not_fold():
    config = [{"q_bits": 8, **PER_TENSOR}]
    rows = {r.layer: r.note for r in kquant.plan(cnn(), config).rows}
    assert "one scale with norm" in rows["conv"]
    assert "one scale" not in rows["logits"]
    for quantizer in ("qat", "dorefa"):
        entry = {"q_bits": 4, "op_types": ["default"], "quantizer": quantizer}
        assert not any("one scale" in r.note for r in kquant.plan(cnn(), [entry]).rows)


def test_a_layer_used_twice_has_the_gain_of_each_norm():
    x = keras.Input((6,), name="x")
    shared = layers.Dense(6, name="shared")
    y = layers.BatchNormalization(name="one")(shared(x))
    y = layers.BatchNormalization(name="two")(shared(layers.ReLU()(y)))
    model = keras.Model(x, y)
    for name, gamma in (("one", 3.0), ("two", 0.2)):
        norm = model.get_layer(name)
        norm.set_weights([np.full(6, gamma) * np.arange(1, 7), *norm.get_weights()[1:]])
    data = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    qmodel = quantized(model, data)
    weights = [op.weight for op in lower(front_end(qmodel).read(qmodel)).ops if op.weight is not None]
    assert len(weights) == 2
    np.testing.assert_allclose(weights[0].scale / weights[1].scale, 15.0, rtol=1e-5)
    np.testing.assert_array_equal(weights[0].codes, weights[1].codes)


def test_frozen_norms_and_a_late_start_work_with_it():
    qmodel = quantized(cnn(), IMAGES, quant_start_step=2)
    layer = qmodel.get_layer("conv")
    assert isinstance(layer, own.QuantizedLayer)
    assert layer.is_waiting()
    kquant.freeze_batch_norm(qmodel)
    before = norm_values(qmodel)[3]
    qmodel.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    qmodel.fit(IMAGES, CLASSES, batch_size=16, verbose=0)
    assert not layer.is_waiting()
    np.testing.assert_array_equal(norm_values(qmodel)[3], before)
