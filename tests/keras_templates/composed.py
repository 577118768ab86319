"""Operations that are read as compositions of others, and trainable arrays that meet a tensor.

What a composition computes is compared with the operation itself, in float; the whole way to a file goes through a few
models that hold many of them.
"""

import numpy as np
import pytest
from keras_generation import IS_KERAS3, keras, layers, watched

import kquant
from keras_templates.small import trained
from kquant.api import front_end
from kquant.core.errors import UnsupportedError
from kquant.core.graph import walk

if IS_KERAS3:
    from keras import ops
else:
    import tensorflow as tf


RNG = np.random.default_rng(5)
SHAPE = (5, 6)
MASK = RNG.random(SHAPE) > 0.5
MATRIX, VECTOR = RNG.normal(size=(6, 4)).astype("f4"), RNG.normal(size=6).astype("f4")
LEFT = RNG.normal(size=(3, 5)).astype("f4")
DATA = [RNG.normal(size=(32, *SHAPE)).astype("f4") for _ in range(2)]

if IS_KERAS3:
    CASES = {
        "where": lambda x, y: ops.where(MASK, x, y),
        "where_row": lambda x, y: ops.where(MASK[0], x, y),
        "where_constant": lambda x, y: ops.where(MASK, 0.5, x) + y,
        "where_zero": lambda x, y: ops.where(MASK, x, 0.0) + y,
        "tril": lambda x, y: ops.tril(x) + ops.triu(y, k=1),
        "var": lambda x, y: ops.var(x, axis=1) + ops.var(y, axis=1),
        "std": lambda x, y: ops.std(x - y, axis=(1, 2), keepdims=True),
        "moments": lambda x, y: ops.moments(x * y, axes=[1])[1],
        "logsumexp": lambda x, y: ops.logsumexp(x + y, axis=-1),
        "logsumexp_kept": lambda x, y: ops.logsumexp(x + y, axis=1, keepdims=True),
        "log_softmax": lambda x, y: ops.log_softmax(x + y, axis=1),
        "norm": lambda x, y: ops.norm(x - y, axis=-1, keepdims=True),
        "normalize": lambda x, y: ops.normalize(x + y, axis=-1),
        "average": lambda x, y: ops.average(x * y, axis=1, weights=np.arange(1.0, 6.0)) + ops.average(x, axis=1),
        "layer_norm": lambda x, y: ops.layer_normalization(x + y, axis=-1),
        "rms_norm": lambda x, y: ops.rms_normalization(x + y, axis=-1),
        "repeat": lambda x, y: ops.repeat(x, 2, axis=1) + ops.repeat(y, [1, 3, 1, 2, 3], axis=1),
        "roll": lambda x, y: ops.roll(x, (1, -2), axis=(1, 2)) + y,
        "rot90": lambda x, y: ops.rot90(x, axes=(1, 2)) + ops.rot90(y, 5, axes=(2, 1)),
        "rot270": lambda x, y: ops.rot90(x, -1, axes=(1, 2)) + ops.rot90(y, 3, axes=(1, 2)),
        "diff": lambda x, y: ops.diff(x, axis=1) + ops.diff(y, axis=-2),
        "glu": lambda x, y: ops.glu(x + y, axis=-1),
        "hstack": lambda x, y: ops.hstack([x, y]),
        "amin": lambda x, y: ops.amin(x, axis=1) + ops.amin(y, axis=1),
        "matmul": lambda x, y: ops.matmul(x, MATRIX) + ops.dot(y, MATRIX),
        "matmul_left": lambda x, y: ops.matmul(LEFT, x) + ops.matmul(LEFT, y),
        "matmul_vector": lambda x, y: ops.matmul(x, VECTOR) + ops.dot(y, VECTOR),
        "tensordot": lambda x, y: ops.tensordot(x, MATRIX, axes=1) + ops.tensordot(y, MATRIX, 1),
        "einsum_matrix": lambda x, y: ops.einsum("bij,jk->bki", x, MATRIX) + ops.einsum("bij,kj->bki", y, MATRIX.T),
        "einsum_middle": lambda x, y: ops.einsum("bij,il->blj", x, LEFT.T) + ops.einsum("li,bij->blj", LEFT, y),
        "einsum_vector": lambda x, y: ops.einsum("bij,j->bij", x, VECTOR) + ops.einsum("bij,ij->bij", y, MASK * 1.5),
        "einsum_one": lambda x, y: ops.einsum("bij->bji", x) + ops.expand_dims(ops.einsum("bij->bi", y), 1),
        "einsum_product": lambda x, y: ops.einsum("bij,bij->bji", x, y),
        "einsum_dots": lambda x, y: ops.einsum("bij,bij->bj", x, y),
        "einsum_outer": lambda x, y: ops.einsum("bij,bk->bikj", x, ops.mean(y, axis=1)),
        "einsum_ellipsis": lambda x, y: ops.einsum("...ij,...kj->...ik", x, y),
    }  # fmt: skip
else:
    CASES = {
        "where": lambda x, y: tf.where(MASK, x, y),
        "var": lambda x, y: tf.math.reduce_variance(x, axis=1) + tf.math.reduce_variance(y, axis=1),
        "std": lambda x, y: tf.math.reduce_std(x - y, axis=[1, 2], keepdims=True),
        "logsumexp": lambda x, y: tf.reduce_logsumexp(x + y, axis=-1),
        "repeat": lambda x, y: tf.repeat(x, 2, axis=1) + tf.repeat(y, 2, axis=1),
        "reverse": lambda x, y: tf.reverse(x, axis=[1]) + y,
        "roll": lambda x, y: tf.roll(x, shift=[1, -2], axis=[1, 2]) + y,
        "unstack": lambda x, y: tf.unstack(x, axis=1)[2] + tf.unstack(y, axis=1)[1],
        "matmul": lambda x, y: tf.matmul(x, MATRIX) + tf.tensordot(y, MATRIX, axes=1),
        "einsum_matrix": lambda x, y: tf.einsum("bij,jk->bki", x, MATRIX) + tf.einsum("bij,kj->bki", y, MATRIX.T),
        "einsum_product": lambda x, y: tf.einsum("bij,bij->bji", x, y),
        "einsum_vector": lambda x, y: tf.einsum("bij,j->bij", x, VECTOR) + tf.einsum("...j,j->...j", y, VECTOR),
    }


def model_of(function):
    keras.utils.set_random_seed(0)
    x, y = keras.Input(SHAPE, name="x"), keras.Input(SHAPE, name="y")
    result = function(layers.Dense(6, name="a")(x), layers.Dense(6, name="b")(y))
    return keras.Model([x, y], result)


def computed(model, data=DATA):
    """What the graph that is read computes in float."""
    graph, kept = front_end(model).read(model), {}
    assert [op.attrs.get("reason") for op in graph.ops if op.kind == "opaque"] == []
    walk(
        graph,
        dict(zip(graph.inputs, data, strict=True)),
        lambda op, _, out: kept.update(zip(op.outputs, out, strict=True)),
    )
    return np.asarray(kept[graph.outputs[0]])


@pytest.mark.parametrize("name", CASES)
def test_the_composition_computes_the_operation(name):
    model = model_of(CASES[name])
    expected = model.predict(DATA, verbose=0)
    found = computed(model)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 in another order


TOGETHER = {
    "statistics": ["where", "var", "logsumexp", "roll"],
    "products": ["matmul", "einsum_matrix", "einsum_product", "einsum_vector"],
}


@pytest.mark.parametrize("group", TOGETHER)
def test_they_go_all_the_way(group, tmp_path):
    def function(x, y):
        flat = [layers.Flatten()(CASES[name](x, y)) for name in TOGETHER[group]]
        return layers.Dense(3, name="head")(layers.Concatenate()(flat))

    qmodel = kquant.quantize_model(model_of(function), calibration_data={"x": DATA[0], "y": DATA[1]})
    path = tmp_path / "model.tflite"
    kquant.export_tflite(qmodel, path)
    assert kquant.audit(path).fully_integer
    parity = kquant.verify(qmodel, path, {"x": DATA[0], "y": DATA[1]})
    assert parity.ok, parity.problems


if IS_KERAS3:
    REFUSED = {
        "comparison": (lambda x, y: ops.where(x > 0, x, y), "Greater|mask"),
        "cumsum": (lambda x, y: ops.cumsum(x, axis=1) + y, "Cumsum"),
        "over_the_batch": (lambda x, y: ops.var(x, axis=0) + y, "over the batch"),
        "two_powers": (lambda x, y: ops.power(x, y), "Power"),
        "contracted_batch": (lambda x, y: ops.einsum("bij,bjk", x, ops.transpose(y, (0, 2, 1))), "batch as first axis"),
        "order": (lambda x, y: ops.norm(x, ord=3, axis=-1) + ops.mean(y, axis=-1), "order 3"),
    }

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_has_no_exact_composition_is_refused_by_name(name):
        function, words = REFUSED[name]
        with pytest.raises(UnsupportedError, match=words):
            kquant.plan(model_of(function))


# -- trainable arrays -------------------------------------------------------------------------------------------------


@keras.utils.register_keras_serializable("kquant_tests")
class Positions(layers.Layer):
    """A positional embedding added, an array of one's own subtracted, and a scale for each position."""

    def build(self, shape):
        start = keras.initializers.RandomNormal(0.0, 0.5, seed=3)
        self.position = self.add_weight(name="position", shape=(1, *shape[1:]), initializer=start)
        self.scale = self.add_weight(name="scale", shape=(shape[1], 1), initializer=start)
        self.shift = self.add_weight(name="shift", shape=shape[1:], initializer=start)
        self.built = True

    def call(self, x):
        return self.shift - (x + self.position) * self.scale


def with_positions(twice=False):
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2), name="x")
    y = layers.Reshape((16, 8))(x)
    layer = Positions(name="positions")
    y = layers.Dense(8, name="inner")(layer(y))
    y = layer(layers.ReLU()(y)) if twice else y
    return keras.Model(x, layers.Dense(5, name="logits")(layers.Flatten()(y)), name="with_positions")


IMAGES = np.random.default_rng(7).normal(size=(64, 8, 8, 2)).astype("f4")


def operands(qmodel):
    from keras_generation import own

    return {layer.kind: layer for layer in qmodel.layers if isinstance(layer, own.TrainedOperand)}


@pytest.mark.parametrize("twice", [False, True])
def test_a_trainable_array_is_trained_on_the_grid_of_the_file(twice, tmp_path):
    model = with_positions(twice)
    qmodel = kquant.quantize_model(model, calibration_data=IMAGES)
    found = operands(qmodel)
    assert set(found) == {"add", "mul", "sub"}  # one layer for each, however often it is called
    own = {w.name.split("/")[-1].removesuffix(":0"): np.asarray(w) for w in model.get_layer("positions").weights}
    np.testing.assert_array_equal(np.asarray(found["add"].array), own["position"])
    np.testing.assert_array_equal(np.asarray(found["mul"].array), own["scale"])
    np.testing.assert_array_equal(np.asarray(found["sub"].array), own["shift"])
    before = {kind: np.asarray(layer.array).copy() for kind, layer in found.items()}
    trained(qmodel)
    for kind, layer in found.items():
        assert np.abs(np.asarray(layer.array) - before[kind]).max() > 1e-4
    path = tmp_path / "model.tflite"
    kquant.export_tflite(qmodel, path)
    assert kquant.audit(path).fully_integer
    parity = kquant.verify(qmodel, path, IMAGES)
    assert parity.ok, parity.problems
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    kquant.export_tflite(loaded, tmp_path / "again.tflite")
    assert (tmp_path / "again.tflite").read_bytes() == path.read_bytes()


@keras.utils.register_keras_serializable("kquant_tests")
class Gated(layers.Layer):
    """A residual branch behind one trained value (Bachlechner et al. 2020, ReZero)."""

    def build(self, shape):
        self.alpha = self.add_weight(name="alpha", shape=(), initializer=keras.initializers.Constant(0.25))
        self.built = True

    def call(self, x):
        return x * self.alpha


def test_a_single_trained_value_stays_one(tmp_path):
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 2), name="x")
    y = layers.Conv2D(4, 3, padding="same")(x)
    y = layers.Add()([y, Gated(name="gated")(layers.Conv2D(4, 3, padding="same", activation="relu")(y))])
    model = keras.Model(x, layers.Dense(5, name="logits")(layers.Flatten()(y)), name="rezero")
    qmodel = kquant.quantize_model(model, calibration_data=IMAGES)
    assert sum(v.shape == () for v in qmodel.trainable_weights) == 1  # not one for each channel
    assert len(qmodel.trainable_weights) == len(model.trainable_weights)
    trained(qmodel)
    assert float(np.asarray(operands(qmodel)["mul"].array)) != 0.25
    path = tmp_path / "model.tflite"
    kquant.export_tflite(qmodel, path)
    assert kquant.audit(path).fully_integer
    parity = kquant.verify(qmodel, path, IMAGES)
    assert parity.ok, parity.problems


def test_the_array_lies_on_the_grid_of_its_own_range_and_passes_gradients():
    """256 levels over the values and zero, as of a constant operand (`core.constants.on_grid`)."""
    import tensorflow as tf

    from kquant.core.constants import on_grid

    layer = operands(kquant.quantize_model(with_positions(), calibration_data=IMAGES))["add"]
    zeros = np.zeros((2, 16, 8), "f4")
    with tf.GradientTape() as tape:
        y = tf.convert_to_tensor(layer(zeros))
    held = on_grid(np.asarray(layer.array))
    assert np.abs(held - np.asarray(layer.array)).max() > 1e-4
    np.testing.assert_array_equal(np.asarray(y)[:1], held)
    np.testing.assert_array_equal(np.asarray(tape.gradient(y, watched(layer.array))), 2.0)
    layer.array.assign(np.full(layer.array.shape, -0.3, "f4"))  # one magnitude is exact
    np.testing.assert_array_equal(np.asarray(layer(zeros)), np.float32(-0.3))
    layer.array.assign(np.zeros(layer.array.shape, "f4"))
    np.testing.assert_array_equal(np.asarray(layer(zeros)), 0.0)


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (-0.5, 1.0)])
def test_a_constant_is_deployed_on_the_codes_that_were_trained(ends, tmp_path):
    """Sums are in the contract only if file and model hold one constant; a symmetric one lost half a step each time."""
    constant = np.clip(np.sin(np.arange(40, dtype="f4")).reshape(5, 8), *ends)
    constant[0, :2] = ends
    x = keras.Input((5, 8))
    model = keras.Model(x, layers.Dense(8)(x) * 0.2 + constant)
    data = RNG.normal(size=(64, 5, 8)).astype("f4")
    path = tmp_path / "model.tflite"
    qmodel = kquant.quantize_model(model, calibration_data=data)
    kquant.export_tflite(qmodel, path)
    parity = kquant.verify(qmodel, path, data)
    assert parity.ok and parity.max_lsb < 0.51, parity


# -- what is refused says what to do ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_a_recurrent_layer_is_refused_with_its_exclusion_and_unrolling(kind, wrap):
    x = keras.Input((4, 3))
    layer = getattr(layers, kind)(2, name="loop")
    model = keras.Model(x, layers.Bidirectional(layer, name="loop")(x) if wrap else layer(x))
    with pytest.raises(UnsupportedError, match=r"unroll=True.*'op_names': \['loop'\], 'exclude': True"):
        kquant.plan(model)
    unrolled = getattr(layers, kind)(2, unroll=True, name="loop")
    model = keras.Model(x, layers.Bidirectional(unrolled, name="loop")(x) if wrap else unrolled(x))
    with pytest.raises(UnsupportedError) as error:
        kquant.plan(model)
    assert "unroll" not in str(error.value)


GROWING = {
    "UpSampling2D": "RESIZE_NEAREST_NEIGHBOR",
    "UpSampling1D": "RESIZE_NEAREST_NEIGHBOR",
    "Conv2DTranspose": "TRANSPOSE_CONV",
    "Conv1DTranspose": "TRANSPOSE_CONV",
}


@pytest.mark.parametrize("kind", GROWING)
def test_an_output_of_unknown_size_is_refused_by_the_plan(kind):
    def make():
        sizes = (3, 2) if "Conv" in kind else (2,)
        return getattr(layers, kind)(*sizes, name="up")

    shape = (None, None, 3) if "2D" in kind else (None, 3)
    x = keras.Input(shape)
    with pytest.raises(UnsupportedError, match=r"layer 'up'.*known output size.*fixed input size"):
        kquant.plan(keras.Model(x, make()(x)))
    fixed = keras.Input([4 if n is None else n for n in shape])
    assert [r.kernel for r in kquant.plan(keras.Model(fixed, make()(fixed))).rows] == [GROWING[kind]]
