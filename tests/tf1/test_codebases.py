"""Graphs as TensorFlow 1 code bases write them, each trained, exported and verified."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.training import moving_averages

import kquant

from .nets import v1
from .trained import IMAGES, WORDS, checked, head, trained, vector, weight

# -- batch norm by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", [True, False], ids=["resource", "ref"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_moving_averages_that_start_at_zero_and_are_debiased(fused, resource, tmp_path):
    """The default of `assign_moving_average`: the average itself is assigned from a helper that is updated."""

    def build(x):
        y = tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 6), 1, "SAME")
        gamma, beta = vector("gamma", 6, 1.0), vector("beta", 6)
        mean, variance = (vector(n, 6, 1.0, trainable=False, use_resource=resource) for n in ("mean", "variance"))
        if fused:
            y, *batch = v1.nn.fused_batch_norm(y, gamma, beta, epsilon=1e-3, is_training=True)
        else:
            batch = tf.nn.moments(y, [0, 1, 2])
            y = tf.nn.batch_normalization(y, *batch, beta, gamma, 1e-3)
        for average, statistic in zip((mean, variance), batch[:2], strict=True):
            v1.add_to_collection(
                v1.GraphKeys.UPDATE_OPS, moving_averages.assign_moving_average(average, statistic, 0.9)
            )
        return head(tf.nn.relu(y))

    session = trained(build, IMAGES)
    assert checked(session, tmp_path / "model.tflite", IMAGES)[1:] == ["conv2d", "mean", "dense"]

    # The next step goes on from averages that were estimated anew: of the same data they stay where they are.
    averages = [v for v in session.graph.get_collection("variables") if v.op.name in ("mean", "variance")]
    assert kquant.reestimate_batch_norm(session, [IMAGES / 3]) == 1
    before = session.run(averages)
    update = session.graph.get_collection(v1.GraphKeys.UPDATE_OPS)
    session.run(update, {session.graph.get_tensor_by_name("x:0"): IMAGES / 3})
    for average, old in zip(session.run(averages), before, strict=True):
        np.testing.assert_allclose(average, old, rtol=0.05, atol=0.01)


# -- ops that are written out in others -------------------------------------------------------------------------------


def biased(x, name, size):
    return tf.nn.bias_add(tf.nn.conv2d(x, weight(name, size, size, x.shape[-1], 6), 1, "SAME"), vector(f"{name}_b", 6))


def sum_of_many(x):
    return tf.nn.relu(tf.add_n([biased(x, "a", 1), biased(x, "b", 3), biased(x, "c", 5)]))


def stacked(x):
    return tf.reshape(tf.stack([biased(x, "a", 1), biased(x, "b", 3)], axis=3), [-1, 8, 8, 12])


def squared_difference(x):
    return tf.math.squared_difference(biased(x, "a", 1), biased(x, "b", 3))


def explicitly_padded(x):
    pads = [[0, 0], [1, 2], [0, 1], [0, 0]]
    y = tf.nn.relu(tf.nn.conv2d(x, weight("a", 3, 3, 3, 6), [1, 2, 2, 1], pads) + vector("a_b", 6))
    return tf.nn.depthwise_conv2d(y, weight("b", 3, 3, 6, 1), [1, 1, 1, 1], pads) + vector("b_b", 6)


def pixels_to_channels(x):
    return tf.nn.depth_to_space(tf.nn.space_to_depth(biased(x, "a", 3), 4), 2)


def instance_norm(x):
    y = biased(x, "a", 3)
    mean, variance = tf.nn.moments(y, [1, 2], keepdims=True)
    return (y - mean) / tf.sqrt(variance + 1e-3) * vector("gamma", 6, 1.0) + vector("beta", 6)


def leaky_by_selection(x):
    y = biased(x, "a", 3)
    return tf.where(y > 0.0, y, 0.2 * y)


def resized_like_the_input(x):
    y = tf.nn.relu(tf.nn.max_pool2d(biased(x, "a", 3), 2, 2, "VALID"))
    return tf.image.resize(y, tf.shape(x)[1:3], method="nearest")


def channels_turned_round(x):
    """Pixels as they come, for weights that know them in the other order."""
    return tf.nn.relu(biased(tf.reverse(x, [-1]) - tf.constant([0.1, 0.2, 0.3]), "a", 3))


def local_response(x):
    """What stands behind the first convolutions of many a network before batch norm."""
    return tf.nn.lrn(tf.nn.relu(biased(x, "a", 3)), 2, bias=1.0, alpha=0.2, beta=0.75)


def sized_like_the_input(x):
    """A decoder whose sizes are those of what it restores, several ops before it."""
    y = tf.nn.relu(tf.nn.conv2d(x, weight("a", 3, 3, 3, 6), 2, "SAME") + vector("a_b", 6))
    y = tf.nn.relu(tf.nn.conv2d(y, weight("b", 3, 3, 6, 6), 2, "SAME") + vector("b_b", 6))
    y = tf.nn.conv2d_transpose(y, weight("c", 3, 3, 6, 6), tf.stack([tf.shape(x)[0], 4, 4, 6]), 2)
    return tf.nn.conv2d_transpose(tf.nn.relu(y), weight("d", 3, 3, 3, 6), tf.shape(x), 2)


def layer_norm(x):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-3) * vector("gamma", 8, 1.0) + vector("beta", 8)


def layer_norm_as_batch_norm(x):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, vector("beta", 8), vector("gamma", 8, 1.0), 1e-3)


def product_by_letters(x):
    y = tf.nn.relu(tf.einsum("abc,cd->abd", x, weight("a", 8, 12)) + vector("a_b", 12))
    y = tf.einsum("abc,cde->abde", y, weight("b", 12, 2, 4)) + weight("b_b", 2, 4)
    return tf.einsum("abde,def->afb", y, weight("c", 2, 4, 8))


def attention_by_letters(x):
    """What `MultiHeadAttention` of tf.keras puts into a graph."""
    query, key, value = (
        tf.einsum("abc,cde->abde", x, weight(n, 8, 2, 4)) + weight(f"{n}_b", 2, 4) for n in ("query", "key", "value")
    )
    scores = tf.nn.softmax(tf.einsum("aecd,abcd->acbe", key, query * 0.5))
    return tf.einsum("abcd,cde->abe", tf.einsum("acbe,aecd->abcd", scores, value), weight("out", 2, 4, 8))


def attention_with_a_vector(x):
    """Attention over words as it is written with a context vector (Yang et al. 2016)."""
    y = tf.tanh(tf.tensordot(x, weight("a", 8, 8), 1) + vector("a_b", 8))
    shares = tf.nn.softmax(tf.tensordot(y, vector("context", 8), 1))
    return x * tf.expand_dims(shares, -1)


def dilated_over_words(x):
    y = tf.nn.relu(tf.nn.convolution(x, weight("a", 3, 8, 6), padding="SAME", dilations=[2]) + vector("a_b", 6))
    return tf.nn.convolution(y, weight("b", 2, 6, 8), padding="VALID", dilations=[3])


def trained_positions(x):
    return x + v1.get_variable("positions", [1, 6, 8], initializer=v1.random_normal_initializer(0, 0.3, seed=1))


OF_IMAGES = (
    sum_of_many, stacked, resized_like_the_input, squared_difference, explicitly_padded, pixels_to_channels,
    instance_norm, leaky_by_selection, local_response, sized_like_the_input, channels_turned_round,
)  # fmt: skip
OF_WORDS = (
    layer_norm, layer_norm_as_batch_norm, product_by_letters, attention_by_letters, trained_positions,
    attention_with_a_vector, dilated_over_words,
)  # fmt: skip


FEW_BITS = (sum_of_many, instance_norm, attention_by_letters)
CASES = [(f, 8) for f in (*OF_IMAGES, *OF_WORDS)] + [(f, 4) for f in FEW_BITS]


@pytest.mark.parametrize(("build", "bits"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_is_written_out(build, bits, tmp_path):
    data = IMAGES if build in OF_IMAGES else WORDS
    config = [{"q_bits": bits, "op_types": ["default"]}]
    session = trained(lambda x: head(build(x)), data, config)
    assert "opaque" not in checked(session, tmp_path / "model.tflite", data)


def test_logarithms_of_probabilities_are_an_output(tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8], name="x")
        logarithms = tf.nn.log_softmax(3.0 * tf.matmul(x, weight("a", 8, 10)))
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        data = WORDS.reshape(-1, 8)
        expected = session.run(logarithms, {x: data})
        assert kquant.QAT_Quantizer()(graph, data, training=False, session=session).outputs == ("LogSoftmax",)
    path = tmp_path / "model.tflite"
    assert "opaque" not in checked(session, path, data)
    got = kquant.load_artifact(path)(data)
    # Half a step from each of five tensors in turn, of which most are finer than the result, and from the weights.
    assert np.abs(got - expected).max() < 4 * np.ptp(expected) / 255
    assert np.abs(got - expected).mean() < 0.8 * np.ptp(expected) / 255


def test_what_is_written_out_keeps_its_name_and_is_only_done_when_it_is_quantized():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8], name="x")
        parts = [tf.matmul(x, weight(n, 8, 4)) for n in "abc"]
        tf.add_n(parts, name="total")
    count = len(graph.get_operations())
    kquant.plan(graph, [{"q_bits": 8, "op_types": ["default"]}, {"q_bits": 7, "op_names": ["total"]}])
    with pytest.raises(kquant.ConfigError, match=r"totals.*'total'"):
        kquant.QAT_Quantizer([{"q_bits": 7, "op_names": ["totals"]}])(graph)
    assert len(graph.get_operations()) == count
    report = kquant.QAT_Quantizer([{"q_bits": 8, "op_types": ["MatMul", "AddN"]}])(graph)
    assert report.outputs == ("total",)
    assert report.activations == 6  # the input, three products and two sums


# -- constants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["add", "subtract", "multiply", "divide"])
def test_a_constant_is_trained_with_the_values_that_the_file_has(how, tmp_path):
    array = np.random.default_rng(1).uniform(0.4, 2.0, (6, 8)).astype(np.float32)
    function = getattr(tf, how)
    session = trained(lambda x: head(function(x, tf.constant(array), name="op")), WORDS)
    assert checked(session, tmp_path / "model.tflite", WORDS)[1:] == [how[:3], "mean", "dense"] or how == "divide"
    used = session.run(session.graph.get_operation_by_name("op").inputs[1])
    state = kquant.export_state(session)
    name = next(k for k in state if k.startswith("op/constant") and k.endswith("/codes")).removesuffix("/codes")
    codes, scale, zero_point = (state[f"{name}/{part}"] for part in ("codes", "scale", "zero_point"))
    held = (codes.astype(np.float32) - zero_point) * scale
    np.testing.assert_allclose(used, 1 / held if how == "divide" else held, rtol=1e-6)
    assert (
        0 < np.abs(used - array).max() < 0.02
    )  # about half a step of 1.6 / 255, in its reciprocal up to six times that


@pytest.mark.parametrize("array", ["constant", "trained"])
def test_an_array_beside_an_op_that_stays_float(array, tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 6, 8], name="x")
        other = tf.constant(WORDS[0]) if array == "constant" else weight("array", 6, 8)
        head(tf.add(x, other, name="plus"))
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        config = [{"q_bits": 8, "op_types": "default"}, {"op_names": ["plus"], "exclude": True}]
        kquant.QAT_Quantizer(config)(graph, WORDS, training=False, session=session)
    path = tmp_path / "model.tflite"
    with pytest.raises(kquant.ExportError, match="plus: the config leaves it in float"):
        kquant.export_tflite(session, path)
    kquant.export_tflite(session, path, allow_float=True)
    assert kquant.verify(session, path, WORDS).ok
    kquant.export_tflite(session, path, weights_only=True)
    assert kquant.verify(session, path, WORDS).ok


def test_a_trained_array_that_was_changed_in_the_file_is_found(tmp_path):
    session = trained(lambda x: head(trained_positions(x)), WORDS)
    path = tmp_path / "model.tflite"
    assert checked(session, path, WORDS)[1] == "parameter"
    content = bytearray(path.read_bytes())
    state = kquant.export_state(session)
    codes = next(v for k, v in state.items() if "add" in k and k.endswith("ReadVariableOp/codes"))
    where = bytes(content).index(codes.astype(np.int8).tobytes())
    content[where] ^= 1
    path.write_bytes(bytes(content))
    report = kquant.verify(session, path, WORDS)
    assert not report.ok
    assert any("its codes in the file are not the trained ones" in p for p in report.problems)
