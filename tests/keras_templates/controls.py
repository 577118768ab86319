"""What a user controls in training: when quantization starts, DoReFa's gradients, what stands still, and when."""

import zlib

import numpy as np
import pytest
import tensorflow as tf
from keras_generation import TRACES, keras, layers, ops, path, watched

import kquant
from keras_templates.small import (
    CLASSES,
    CROSS_ENTROPY,
    DOREFA,
    IMAGES,
    RNG,
    BatchNormalization,
    FakeQuantize,
    QuantizedLayer,
    assert_same_weights,
    of_type,
    ranges,
    small_cnn,
    trained,
)
from kquant import controls

# -- delay ----------------------------------------------------------------------------------------------------------


def shared_twice():
    """A convolution called twice, and a pool in the range of its input: several calls of a quantizer in a step."""
    image = keras.Input((8, 8, 2), name="image")
    conv = layers.Conv2D(2, 3, padding="same", name="conv")
    x = layers.AveragePooling2D(2, name="pool")(conv(conv(image)))
    return keras.Model(image, layers.Dense(5, name="logits")(layers.Flatten(name="flat")(x)))


@pytest.mark.parametrize("make", [small_cnn, shared_twice])
def test_quantization_starts_at_its_step(make):
    model = make()
    for layer in model.layers:
        layer.trainable = False  # batch norm then has nothing to move, and its outputs stay comparable
    qmodel = kquant.quantize_model(model, [{"q_bits": 4, "op_types": ["default"], "quant_start_step": 3}])
    reference = model(IMAGES).numpy()
    for layer in of_type(qmodel, BatchNormalization):
        layer.trainable = False
    for _ in range(3):
        np.testing.assert_array_equal(qmodel(IMAGES).numpy(), reference)
        np.testing.assert_array_equal(qmodel(IMAGES, training=True).numpy(), reference)
    assert len(ranges(qmodel)) >= 3
    assert all((high > low).all() for low, high in ranges(qmodel).values())
    direct = kquant.quantize_model(model, [{"q_bits": 4, "op_types": ["default"]}])
    own = {layer.name: layer for layer in of_type(direct, FakeQuantize)}
    for layer in of_type(qmodel, FakeQuantize):
        for site in range(layer.sites):
            own[layer.name].set_range(np.asarray(layer.minimum)[site], np.asarray(layer.maximum)[site], site)
    np.testing.assert_array_equal(qmodel(IMAGES).numpy(), direct(IMAGES).numpy())
    assert not np.array_equal(qmodel(IMAGES, training=True).numpy(), reference)


def test_gradients_are_float_before_the_start_step():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3, name="dense")(inputs))
    entry = {**DOREFA[0], "quant_start_step": 1}
    qmodel = kquant.DoReFaQuantizer([entry])(model)
    x, upstream = RNG.normal(size=(8, 6)).astype("float32"), RNG.normal(size=(8, 3)).astype("float32")
    exact = x.T @ upstream
    assert weight_gradient(qmodel, x, upstream)[0] == pytest.approx(exact, rel=1e-5, abs=1e-5)
    assert np.abs(weight_gradient(qmodel, x, upstream)[0] - exact).max() > 1e-2


# -- DoReFa's gradients ---------------------------------------------------------------------------------------------


def weight_gradient(qmodel, x, upstream):
    """Gradients of the kernel and the bias for a given gradient of the output."""
    (dense,) = of_type(qmodel, QuantizedLayer)
    with tf.GradientTape() as tape:
        y = dense(x, training=True)
    return [g.numpy() for g in tape.gradient(y, [watched(dense.kernel), watched(dense.layer.bias)], upstream)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_gradients_are_quantized_as_the_paper_says(bits):
    inputs = keras.Input((6,))
    config = [{"q_bits": {"weight": 1, "output": 8, "gradient": bits}, "op_types": ["default"]}]
    qmodel = kquant.DoReFaQuantizer(config)(keras.Model(inputs, layers.Dense(3, name="dense")(inputs)))
    (dense,) = of_type(qmodel, QuantizedLayer)
    x, upstream = RNG.normal(size=(8, 6)).astype("float32"), RNG.normal(size=(8, 3)).astype("float32")
    upstream[5] = 0.0  # a sample without a gradient stays without one
    dense.draws.assign(4)
    seed = [zlib.crc32(b"dense") % 2**31, 5]
    noise = tf.random.stateless_uniform((8, 3), seed, -0.5, 0.5).numpy().astype(np.float64)
    # Zhou et al. 2016, equation 12, sample by sample.
    expected = np.zeros_like(upstream, np.float64)
    levels = 2**bits - 1
    for i, g in enumerate(upstream.astype(np.float64)):
        largest = 2 * np.abs(g).max()
        if largest:
            inside = np.clip(g / largest + 0.5 + noise[i] / levels, 0, 1)
            expected[i] = largest * (np.floor(levels * inside + 0.5) / levels - 0.5)
    kernel, bias = weight_gradient(qmodel, x, upstream)
    # One bit is sign(w) E|w|, passed straight through, so the kernel's gradient is that of a plain product.
    np.testing.assert_allclose(kernel, x.T.astype(np.float64) @ expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bias, upstream.sum(0), rtol=1e-5, atol=1e-6)
    assert int(dense.draws.numpy()) == 5
    assert np.abs(expected - upstream).max() > 1e-3 * np.abs(upstream).max()


# -- controls -------------------------------------------------------------------------------------------------------


def test_frozen_observers_stand_still_and_move_again():
    qmodel = kquant.quantize_model(small_cnn(), calibration_data=IMAGES)
    before = ranges(qmodel)
    assert kquant.freeze_observers(qmodel) == len(before) == 3
    trained(qmodel)
    for name, value in ranges(qmodel).items():
        np.testing.assert_array_equal(value, before[name])
    assert kquant.unfreeze_observers(qmodel) == 3
    qmodel(3 * IMAGES, training=True)
    assert all(not np.array_equal(value, before[name]) for name, value in ranges(qmodel).items())


def test_frozen_batch_norm_trains_as_in_inference():
    qmodel = kquant.quantize_model(small_cnn(), calibration_data=IMAGES)
    (norm,) = of_type(qmodel, BatchNormalization)
    norm.moving_mean.assign(RNG.normal(size=6))
    norm.moving_variance.assign(RNG.uniform(0.5, 2, size=6))
    kquant.freeze_observers(qmodel)
    state, expected = [np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)], qmodel(IMAGES).numpy()
    assert not np.allclose(norm(IMAGES[..., :1].repeat(6, -1), training=True), norm(IMAGES[..., :1].repeat(6, -1)))
    norm.moving_mean.assign(state[0])
    norm.moving_variance.assign(state[1])
    assert kquant.freeze_batch_norm(qmodel) == 1
    np.testing.assert_allclose(qmodel(IMAGES, training=True), expected, rtol=1e-6)
    gamma = np.asarray(norm.gamma)
    trained(qmodel)
    np.testing.assert_array_equal([norm.moving_mean, norm.moving_variance], state)
    assert not np.array_equal(norm.gamma, gamma)
    assert kquant.unfreeze_batch_norm(qmodel) == 1
    qmodel(IMAGES, training=True)
    assert not np.array_equal(norm.moving_mean, state[0])


def test_masked_batch_norm_freezes_too():
    norm = BatchNormalization(momentum=0.5)
    x, mask = RNG.normal(size=(4, 5, 3)).astype("float32"), np.arange(20).reshape(4, 5) % 3 > 0
    plain = layers.BatchNormalization(momentum=0.5)
    np.testing.assert_allclose(norm(x, training=True, mask=mask), plain(x, training=True, mask=mask), rtol=1e-5)
    np.testing.assert_allclose(norm.moving_mean, 0.5 * x[mask].mean(0), rtol=1e-5)
    norm.frozen.assign(1.0)
    np.testing.assert_allclose(norm(x, training=True, mask=mask), norm(x, mask=mask), rtol=1e-6)
    np.testing.assert_allclose(norm.moving_mean, 0.5 * x[mask].mean(0), rtol=1e-5)


def nudged(x, low, high):
    """8-bit fake quantization on a range moved so that zero is a level, as TensorFlow documents its fake-quant ops."""
    scale = (high - low) / 255
    zero = np.floor(-low / scale + 0.5)
    return (np.clip(np.floor(x / scale + 0.5) + zero, 0, 255) - zero) * scale


def per_column(w):
    scale = np.abs(w).max(0) / 127
    return np.floor(w / scale + 0.5) * scale


def two_norms():
    inputs = keras.Input((4,), name="x")
    x = layers.Dense(3, use_bias=False, name="first")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm1")(x))
    x = layers.Dropout(0.5, name="drop")(x)
    return keras.Model(inputs, layers.BatchNormalization(name="norm2", scale=False)(layers.Dense(2, name="second")(x)))


def test_reestimated_batch_norm_is_the_average_of_the_batches():
    data = RNG.normal(1.0, 2.0, size=(56, 4)).astype("float32")
    qmodel = kquant.quantize_model(two_norms(), calibration_data=data)
    traces = []

    def loss(target, output):
        traces.append(1)
        return ops.mean(ops.square(target - output))

    qmodel.compile(keras.optimizers.SGD(0.05), loss)
    qmodel.fit(data, np.ones((56, 2)), batch_size=14, verbose=0)
    layer = {made.name: made for made in qmodel.layers}
    before = {path(v): np.asarray(v) for v in qmodel.weights}
    traced = len(traces)

    weights = {name: np.asarray(layer[name].kernel, np.float64) for name in ("first", "second")}
    limits = {name: value.ravel() for name, value in ranges(qmodel).items()}
    means, variances, shares = [[], []], [[], []], []
    for batch in (data[:32], data[32:48]):
        shares.append(len(batch) / 48)
        x = nudged(batch, *limits["x_quantizer"]) @ per_column(weights["first"])
        means[0].append(x.mean(0))
        variances[0].append(x.var(0))
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) * np.asarray(layer["norm1"].gamma) + layer["norm1"].beta.numpy()
        x = nudged(np.maximum(x, 0), *limits["relu_quantizer"]) @ per_column(weights["second"])
        x = x + np.asarray(layer["second"].layer.bias)
        means[1].append(x.mean(0))
        variances[1].append(x.var(0))

    assert kquant.reestimate_batch_norm(qmodel, [data[:32], data[32:48], data[48:]], batches=2) == 2
    for index, name in enumerate(("norm1", "norm2")):
        # float32 against float64: a value beside a rounding boundary may fall on the other side, 1/255 of a range.
        np.testing.assert_allclose(layer[name].moving_mean, np.average(means[index], 0, shares), atol=5e-4)
        np.testing.assert_allclose(layer[name].moving_variance, np.average(variances[index], 0, shares), rtol=1e-3)
    for variable in qmodel.weights:
        if "moving" not in path(variable):
            np.testing.assert_array_equal(variable, before[path(variable)], err_msg=path(variable))
    qmodel.fit(data, np.ones((56, 2)), batch_size=14, verbose=0)
    assert len(traces) == traced
    with pytest.raises(kquant.CalibrationError):
        kquant.reestimate_batch_norm(qmodel, [data[:8], np.full((8, 4), np.nan, "float32")])


class Recorder(keras.callbacks.Callback):
    """Keeps, after each step, whether batch norm and observers are frozen."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        (norm,) = of_type(self.model, BatchNormalization)
        frozen = [float(layer.frozen) for layer in of_type(self.model, FakeQuantize) if layer.fixed is None]
        assert len(set(frozen)) == 1
        self.seen.append((int(norm.frozen.numpy()), int(frozen[0])))


@pytest.mark.parametrize(
    ("arguments", "norm_at", "observers_at"),
    [
        ({}, 6, 9),
        ({"freeze_batch_norm_after": 1, "freeze_observers_after": 3}, 3, 9),
        ({"freeze_batch_norm_after": None, "freeze_observers_after": 5, "unit": "steps"}, 12, 5),
        ({"freeze_batch_norm_after": 0, "freeze_observers_after": 0.1}, 0, 2),
    ],
)
def test_schedule_freezes_in_time(arguments, norm_at, observers_at, monkeypatch):
    """Four epochs of three steps: in one `fit`, in two, and in the second of two; nothing is traced again."""
    estimated = []
    monkeypatch.setattr(controls, "reestimate_batch_norm", lambda model, data, batches: estimated.append(data))
    expected = [(int(step >= norm_at), int(step >= observers_at)) for step in range(12)]
    traces = []

    def loss(target, output):
        traces.append(1)
        return ops.mean(output)

    for parts in ([(0, 4)], [(0, 2), (2, 4)], [(2, 4)]):
        if len(parts) == 2 and any(isinstance(time, float) for time in (arguments or {"default": 0.5}).values()):
            continue  # a share of a training that `fit` is not told the length of
        qmodel = kquant.quantize_model(small_cnn(), calibration_data=IMAGES)
        qmodel.compile("sgd", loss)
        traces.clear()
        seen = []
        for first, last in parts:
            schedule = kquant.QuantizationSchedule(reestimate_batch_norm_with="data", **arguments)
            recorder = Recorder()
            qmodel.fit(
                IMAGES[:48], CLASSES[:48], batch_size=16, verbose=0, initial_epoch=first, epochs=last,
                callbacks=[schedule, recorder],
            )  # fmt: skip
            seen += recorder.seen
        assert seen == expected[3 * parts[0][0] :]
        assert len(traces) == TRACES
        assert estimated
        estimated.clear()


def test_schedule_reestimates_at_the_end_where_nothing_freezes():
    one, other = (kquant.quantize_model(small_cnn(), calibration_data=IMAGES) for _ in range(2))
    schedule = kquant.QuantizationSchedule(None, None, [IMAGES[:32], IMAGES[32:]], reestimate_batches=1)
    one.compile("sgd", CROSS_ENTROPY)
    one.fit(IMAGES, CLASSES, batch_size=32, verbose=0, callbacks=[schedule])
    other.set_weights(one.get_weights())
    kquant.reestimate_batch_norm(other, IMAGES[:32])
    assert_same_weights(one, other)


@pytest.mark.parametrize(
    "control",
    [
        kquant.freeze_observers,
        kquant.unfreeze_observers,
        kquant.freeze_batch_norm,
        kquant.unfreeze_batch_norm,
        lambda model: kquant.reestimate_batch_norm(model, IMAGES),
        lambda model: (
            trained(model) and model.fit(IMAGES, CLASSES, verbose=0, callbacks=[kquant.QuantizationSchedule()])
        ),
    ],
)
def test_controls_refuse_a_float_model(control):
    with pytest.raises(kquant.ModelError, match="without quantizers"):
        control(small_cnn())


def test_unset_ranges_are_not_frozen():
    with pytest.raises(kquant.ModelError, match="image_quantizer"):
        kquant.freeze_observers(kquant.quantize_model(small_cnn()))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"freeze_observers_after": 1.5}, "freeze_observers_after"),
        ({"freeze_batch_norm_after": -1}, "freeze_batch_norm_after"),
        ({"freeze_batch_norm_after": True}, "freeze_batch_norm_after"),
        ({"unit": "epoch"}, "unit"),
    ],
)
def test_schedule_refuses_bad_times(arguments, name):
    with pytest.raises(kquant.ConfigError, match=name):
        kquant.QuantizationSchedule(**arguments)
