"""Training a quantized Keras model: it is an ordinary model, and its state is complete."""

import copy
import warnings

import numpy as np
import pytest
import tensorflow as tf
from keras_generation import (
    FORMATS,
    IMPORT,
    apply_gradients,
    dtype_name,
    keras,
    layers,
    operations,
    ops,
    path,
    policy,
    set_policy,
)

import kquant
from keras_templates.small import (
    CLASSES,
    CROSS_ENTROPY,
    DOREFA,
    IMAGES,
    RNG,
    FakeQuantize,
    QuantizedLayer,
    of_type,
    ranges,
    run_python,
    small_cnn,
    trained,
)

# -- an ordinary model ----------------------------------------------------------------------------------------------


def test_float_model_is_not_changed(tmp_path):
    base = small_cnn()
    model = keras.Model(base.input, ops.abs(base.output) + base.output)  # layers, and operations without any
    config, weights, outputs = copy.deepcopy(model.get_config()), model.get_weights(), model(IMAGES).numpy()
    nodes = [(len(part._inbound_nodes), len(part._outbound_nodes)) for part in operations(model)]
    qmodel = trained(kquant.quantize_model(model, calibration_data=IMAGES))
    kquant.export_tflite(qmodel, tmp_path / "m.tflite")
    assert model.get_config() == config
    assert [(len(part._inbound_nodes), len(part._outbound_nodes)) for part in operations(model)] == nodes
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
        apply_gradients(optimizer, tape.gradient(loss, qmodel.trainable_variables), qmodel.trainable_variables)
    for variable, start in zip(qmodel.weights, kquant.quantize_model(model).get_weights(), strict=True):
        # Flags, what calibration would set, and the lower end of what ReLU gives stay as they are.
        if not path(variable).endswith(("frozen", "covered_low", "covered_high", "relu_quantizer/minimum")):
            assert not np.array_equal(variable, start), f"{path(variable)} did not move"
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


@pytest.mark.parametrize(("settings", "frozen", "ends"), [
    ({}, 0.0, [-16 / 3, 20 / 3]),  # two thirds of the batch
    ({}, 1.0, [-1.0, 1.0]),
    ({"decay": 1.0}, 0.0, [-1.0, 1.0]),  # Naive keeps its range
    ({"symmetric": True}, 0.0, [-20 / 3, 20 / 3]),
])  # fmt: skip
def test_training_clips_a_batch_to_no_less_than_two_thirds_of_its_extremes(settings, frozen, ends):
    layer = FakeQuantize(bits=8, **settings)
    layer.build(None)
    layer.set_range(-1.0, 1.0, 0)
    layer.set_frozen(frozen)
    batch = tf.constant([-8.0, -0.5, 0.5, 10.0])
    with tf.GradientTape() as tape:
        tape.watch(batch)
        found = layer(batch, site=0, training=True)
    assert tape.gradient(found, batch).numpy().tolist() == [0.0, 1.0, 1.0, 0.0]
    found = np.asarray(found)
    np.testing.assert_allclose(found[[0, -1]], ends, atol=(ends[1] - ends[0]) / 250)  # a step, for nudging
    moves = 0.01 * (1.0 - frozen) if layer.decay < 1.0 else 0.0
    # Evaluation is on the moving range.
    found = np.asarray(layer(batch, site=0, training=False))
    assert found[-1] == pytest.approx(1.0 + moves * 9.0, abs=0.01)


def test_fresh_batch_norms_do_not_blow_up_the_gradient():
    """Calibration sees unit statistics, training a batch's own; without a limit on clipping the gradient
    of the first kernel was a thousand times the float model's."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((16,))
    for i in range(16):
        x = layers.Dense(16, use_bias=False, name=f"hidden_{i}")(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.999)(x))
    model = keras.Model(image, layers.Dense(5)(x))
    data = RNG.normal(size=(64, 16)).astype("float32")
    sizes = []
    for net in (model, kquant.quantize_model(model, calibration_data=data)):
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(CLASSES, net(data, training=True))
        sizes.append(float(tf.norm(tape.gradient(loss, net.trainable_variables)[0])))
    assert sizes[1] < 4 * sizes[0]


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
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=0.01 * moved, err_msg=path(variable))
    assert not np.array_equal(one.get_weights()[0], start.get_weights()[0])


def test_quantized_gradients_train_in_a_compiled_step():
    qmodel = kquant.DoReFaQuantizer(DOREFA)(small_cnn())
    kernel = np.asarray(of_type(qmodel, QuantizedLayer)[0].kernel)
    trained(qmodel, 3, jit_compile=True)
    assert [int(layer.draws.numpy()) for layer in of_type(qmodel, QuantizedLayer)] == [3, 3]
    assert not np.array_equal(of_type(qmodel, QuantizedLayer)[0].kernel, kernel)


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def mixed(request):
    before = policy()
    set_policy(request.param)
    yield request.param
    set_policy(before)


def test_mixed_precision_trains_and_exports(mixed, tmp_path):
    model = small_cnn()
    qmodel = kquant.quantize_model(model, calibration_data=IMAGES)
    kernel = of_type(qmodel, QuantizedLayer)[0]
    assert kernel.compute_dtype == mixed.removeprefix("mixed_")
    set_policy("float32")
    exact = small_cnn()
    exact.set_weights(model.get_weights())
    for name, value in ranges(kquant.quantize_model(exact, calibration_data=IMAGES)).items():
        np.testing.assert_array_equal(ranges(qmodel)[name], value)  # calibration runs in float32
    set_policy(mixed)
    dense = of_type(qmodel, QuantizedLayer)[1]
    x = RNG.normal(size=(4, 216)).astype("float32")
    codes, scale = dense.codes()  # from the float32 kernel, also while the layer computes in 16 bits
    narrow = ops.matmul(*(ops.cast(v, dense.compute_dtype) for v in (x, codes * scale)))
    np.testing.assert_array_equal(dense(x), narrow + ops.cast(dense.layer.bias, dense.compute_dtype))
    start = np.asarray(kernel.kernel)
    trained(qmodel)
    assert not np.array_equal(np.asarray(kernel.kernel), start)
    assert {dtype_name(v) for v in qmodel.variables} <= {"float32", "uint32", "int64"}
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
    for form in FORMATS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
            qmodel.save(folder / f"q{form}")
    np.save(folder / "x.npy", IMAGES)
    np.save(folder / "y.npy", qmodel(IMAGES).numpy())
    kquant.export_tflite(qmodel, folder / "q.tflite")
    return folder


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("imports", [f"import kquant, {IMPORT}", f"import {IMPORT}, kquant"])
def test_saved_model_loads_in_either_import_order(imports, form, saved):
    run_python(f"""
{imports}
import numpy as np
model = keras.models.load_model({str(saved / f"q{form}")!r})
x, y = (np.load({str(saved)!r} + name) for name in ("/x.npy", "/y.npy"))
assert np.array_equal(model(x).numpy(), y), abs(model(x).numpy() - y).max()
""")


@pytest.mark.parametrize("form", FORMATS)
def test_same_model_gives_the_same_bytes(form, saved, tmp_path):
    loaded = keras.models.load_model(saved / f"q{form}")
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
import numpy as np, tensorflow as tf, kquant
import {IMPORT}
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
