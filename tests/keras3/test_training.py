"""Training a quantized Keras model: it is an ordinary model, its state is complete, its controls do what they say."""

import copy
import os
import pathlib
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kquant
from kquant import controls
from kquant.keras3.layers import FakeQuantize, QuantizedLayer
from kquant.keras3.norms import BatchNormalization

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(7)
IMAGES = RNG.normal(size=(64, 8, 8, 2)).astype("float32")
CLASSES = RNG.integers(0, 5, 64)
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DOREFA = [{"q_bits": {"weight": 3, "output": 4, "gradient": 4}, "op_types": ["default"]}]


def small_cnn():
    image = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(6, 3, use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(image, layers.Dense(5, name="logits")(x), name="small")


def trained(qmodel, steps=2, **compiled):
    qmodel.compile(compiled.pop("optimizer", "adam"), compiled.pop("loss", CROSS_ENTROPY), **compiled)
    qmodel.fit(IMAGES[: 16 * steps], CLASSES[: 16 * steps], batch_size=16, shuffle=False, verbose=0)
    return qmodel


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def ranges(model):
    """Every range of the model, by name."""
    moving = [layer for layer in of_type(model, FakeQuantize) if layer.fixed is None]
    return {layer.name: np.asarray([layer.minimum, layer.maximum]) for layer in moving}


def assert_same_weights(model, other):
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def run_python(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- an ordinary model ----------------------------------------------------------------------------------------------


def test_float_model_is_not_changed(tmp_path):
    base = small_cnn()
    model = keras.Model(base.input, keras.ops.abs(base.output) + base.output)  # layers, and operations without any
    config, weights, outputs = copy.deepcopy(model.get_config()), model.get_weights(), model(IMAGES).numpy()
    nodes = [(len(part._inbound_nodes), len(part._outbound_nodes)) for part in model.operations]
    qmodel = trained(kquant.quantize_model(model, calibration_data=IMAGES))
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert model.get_config() == config
    assert [(len(part._inbound_nodes), len(part._outbound_nodes)) for part in model.operations] == nodes
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)
    np.testing.assert_array_equal(model(IMAGES).numpy(), outputs)


def test_custom_loop_trains_like_fit():
    model = small_cnn()
    fitted = trained(kquant.quantize_model(model), optimizer=keras.optimizers.SGD(0.1))
    qmodel = kquant.quantize_model(model)
    optimizer = keras.optimizers.SGD(0.1)
    for start in (0, 16):
        batch = slice(start, start + 16)
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(CLASSES[batch], qmodel(IMAGES[batch], training=True))
        optimizer.apply(tape.gradient(loss, qmodel.trainable_variables), qmodel.trainable_variables)
    for variable, start in zip(qmodel.weights, kquant.quantize_model(model).get_weights(), strict=True):
        # Flags, what calibration would set, and the lower end of what ReLU gives stay as they are.
        if not variable.path.endswith(("frozen", "covered_low", "covered_high", "relu_quantizer/minimum")):
            assert not np.array_equal(variable, start), f"{variable.path} did not move"
    for mine, theirs in zip(qmodel.get_weights(), fitted.get_weights(), strict=True):
        # Two steps in float32 in another order of summation: a few units in the last place of the largest values.
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_ranges_are_moving_averages_of_the_batches():
    qmodel = kquant.quantize_model(small_cnn())
    first, second = IMAGES[:16], 2 * IMAGES[16:32]
    for batch in (first, second):
        qmodel(batch, training=True)
    low, high = (f(first) + 0.01 * (f(second) - f(first)) for f in (np.min, np.max))
    np.testing.assert_allclose(ranges(qmodel)["image_quantizer"].ravel(), [low, high], rtol=1e-6)
    before = ranges(qmodel)
    qmodel(10 * IMAGES, training=False)
    for name, value in ranges(qmodel).items():
        np.testing.assert_array_equal(value, before[name])


def test_jit_compile_trains_the_same():
    model = small_cnn()
    start = kquant.quantize_model(model, calibration_data=IMAGES)
    one, other = (
        trained(kquant.quantize_model(model, calibration_data=IMAGES), 4, jit_compile=jit, optimizer="sgd")
        for jit in (False, True)
    )
    for variable, before, mine, theirs in zip(
        one.weights, start.get_weights(), one.get_weights(), other.get_weights(), strict=True
    ):
        # XLA sums in another order, so a few activations fall on the neighbouring code: a hundredth of what is learnt.
        moved = np.abs(mine - before).max()
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=0.01 * moved, err_msg=variable.path)
    assert not np.array_equal(one.get_weights()[0], start.get_weights()[0])


def test_quantized_gradients_train_in_a_compiled_step():
    qmodel = kquant.DoReFaQuantizer(DOREFA)(small_cnn())
    kernel = np.asarray(of_type(qmodel, QuantizedLayer)[0].kernel)
    trained(qmodel, 3, jit_compile=True)
    assert [int(layer.draws.numpy()) for layer in of_type(qmodel, QuantizedLayer)] == [3, 3]
    assert not np.array_equal(of_type(qmodel, QuantizedLayer)[0].kernel, kernel)


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def mixed(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def test_mixed_precision_trains_and_exports(mixed, tmp_path):
    model = small_cnn()
    qmodel = kquant.quantize_model(model, calibration_data=IMAGES)
    kernel = of_type(qmodel, QuantizedLayer)[0]
    assert kernel.compute_dtype == mixed.removeprefix("mixed_")
    keras.config.set_dtype_policy("float32")
    exact = small_cnn()
    exact.set_weights(model.get_weights())
    for name, value in ranges(kquant.quantize_model(exact, calibration_data=IMAGES)).items():
        np.testing.assert_array_equal(ranges(qmodel)[name], value)  # calibration runs in float32
    keras.config.set_dtype_policy(mixed)
    dense = of_type(qmodel, QuantizedLayer)[1]
    x = RNG.normal(size=(4, 216)).astype("float32")
    codes, scale = dense.codes()  # from the float32 kernel, also while the layer computes in 16 bits
    narrow = keras.ops.matmul(*(keras.ops.cast(v, dense.compute_dtype) for v in (x, codes * scale)))
    np.testing.assert_array_equal(dense(x), narrow + keras.ops.cast(dense.layer.bias, dense.compute_dtype))
    start = np.asarray(kernel.kernel)
    trained(qmodel)
    assert not np.array_equal(np.asarray(kernel.kernel), start)
    assert {keras.backend.standardize_dtype(v.dtype) for v in qmodel.variables} <= {"float32", "uint32", "int64"}
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    parity = kquant.verify(qmodel, tmp_path / "m.tflite", IMAGES)
    assert parity.ok, parity.problems
    assert parity.max_lsb <= 0.6


# -- its state ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a trained model, its inputs and its outputs."""
    folder = tmp_path_factory.mktemp("saved")
    qmodel = trained(kquant.DoReFaQuantizer(DOREFA)(small_cnn()))
    qmodel.save(folder / "q.keras")
    np.save(folder / "x.npy", IMAGES)
    np.save(folder / "y.npy", qmodel(IMAGES).numpy())
    kquant.export_tflite(qmodel, folder / "q.tflite")
    return folder


@pytest.mark.parametrize("imports", ["import kquant, keras", "import keras, kquant"])
def test_saved_model_loads_in_either_import_order(imports, saved):
    run_python(f"""
{imports}
import numpy as np
model = keras.models.load_model({str(saved / "q.keras")!r})
x, y = (np.load({str(saved)!r} + name) for name in ("/x.npy", "/y.npy"))
assert np.array_equal(model(x).numpy(), y), abs(model(x).numpy() - y).max()
""")


def test_same_model_gives_the_same_bytes(saved, tmp_path):
    loaded = keras.models.load_model(saved / "q.keras")
    for _ in range(2):
        kquant.export_tflite(loaded, tmp_path / "again.tflite")
        assert (tmp_path / "again.tflite").read_bytes() == (saved / "q.tflite").read_bytes()


def test_weights_carry_the_whole_state():
    model = small_cnn()
    qmodel = trained(kquant.DoReFaQuantizer(DOREFA)(model))
    kquant.freeze_observers(qmodel)
    other = kquant.DoReFaQuantizer(DOREFA)(model)
    assert not np.array_equal(other(IMAGES), qmodel(IMAGES))
    other.set_weights(qmodel.get_weights())
    np.testing.assert_array_equal(other(IMAGES), qmodel(IMAGES))
    assert all(float(layer.frozen) == 1.0 for layer in of_type(other, FakeQuantize) if layer.fixed is None)


def test_training_resumes_bit_equal(tmp_path):
    """Gradient noise, ranges, batch norm, delay counters and optimizer all go on where they were."""
    out = run_python(f"""
import keras, numpy as np, tensorflow as tf, kquant
keras.utils.set_random_seed(3)
tf.config.experimental.enable_op_determinism()
L = keras.layers
model = keras.Sequential([keras.Input((6, 6, 2)), L.Conv2D(4, 3, name="conv"), L.BatchNormalization(), L.ReLU(),
                          L.Flatten(), L.Dense(3)])
x = np.random.default_rng(0).normal(size=(32, 6, 6, 2)).astype("float32")
y = np.arange(32) % 3
config = [{{"q_bits": {{"weight": 3, "output": 4, "gradient": 3}}, "op_types": ["default"], "quant_start_step": 3}}]
def fresh():
    qmodel = kquant.DoReFaQuantizer(config)(model)
    qmodel.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return qmodel
def train(qmodel, steps):
    for _ in range(steps):
        qmodel.train_on_batch(x, y)
def kernel(qmodel):
    return np.asarray([layer.kernel for layer in qmodel.layers if layer.name == "conv"][0])
def state(qmodel):
    return [np.asarray(v) for v in (*qmodel.variables, *qmodel.optimizer.variables)]
def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))
whole, part = fresh(), fresh()
train(whole, 5)
train(part, 2)
part.save({str(tmp_path / "part.keras")!r})
resumed = keras.models.load_model({str(tmp_path / "part.keras")!r})
train(resumed, 3)
print("resumed", same(state(whole), state(resumed)), np.array_equal(whole(x), resumed(x)))
control = keras.models.load_model({str(tmp_path / "part.keras")!r})
for layer in control.layers:
    if getattr(layer, "gradient_bits", None):
        layer.draws.assign(layer.draws + 1)
train(control, 3)
print("noise matters", not np.array_equal(kernel(whole), kernel(control)))
""")
    assert "resumed True True" in out
    assert "noise matters True" in out


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
    return [g.numpy() for g in tape.gradient(y, [dense.kernel.value, dense.layer.bias.value], upstream)]


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
        return keras.ops.mean(keras.ops.square(target - output))

    qmodel.compile(keras.optimizers.SGD(0.05), loss)
    qmodel.fit(data, np.ones((56, 2)), batch_size=14, verbose=0)
    layer = {made.name: made for made in qmodel.layers}
    before = {v.path: np.asarray(v) for v in qmodel.weights}
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
        if "moving" not in variable.path:
            np.testing.assert_array_equal(variable, before[variable.path], err_msg=variable.path)
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
        return keras.ops.mean(output)

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
        assert len(traces) == 1
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


# -- step 0 ---------------------------------------------------------------------------------------------------------


def test_untrained_quantized_model_is_post_training_quantization(tmp_path):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    model.compile("adam", CROSS_ENTROPY)
    model.fit(images[:1200], labels[:1200], epochs=4, verbose=0)
    held = images[1200:]

    def accuracy(logits):
        return float((np.asarray(logits).argmax(-1) == labels[1200:]).mean())

    qmodel = kquant.quantize_model(model, calibration_data=images[:200])
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    mine, its = qmodel.predict(held, verbose=0), kquant.load_artifact(tmp_path / "m.tflite")(held)
    assert accuracy(its) == accuracy(mine)
    assert accuracy(model.predict(held, verbose=0)) > 0.8
    assert abs(accuracy(mine) - accuracy(model.predict(held, verbose=0))) < 0.01
