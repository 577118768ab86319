"""Where graphs come from: imported and frozen ones, Keras layers, meta graphs, layers with variables in scopes."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras.src.legacy_tf_layers import convolutional, core, normalization

import kquant

from .nets import SHAPE, X, Y, small, v1


def checked(session, path, data=X[:48], **options):
    kquant.export_tflite(session, path, **options)
    assert kquant.audit(path).fully_integer
    report = kquant.verify(session, path, data)
    assert report.ok, report.problems
    return [op.kind for op in report.ops]


def frozen_definition():
    """A graph whose weights are constants, and what it computes."""
    net = small(training=False)
    with net.graph.as_default():
        session = net.session()
        definition = tf.compat.v1.graph_util.convert_variables_to_constants(
            session, net.graph.as_graph_def(), ["probs"]
        )
    return definition, session.run(net.probs, {net.x: X})


@pytest.mark.filterwarnings("ignore:.*convert_variables_to_constants")
def test_frozen_graph_is_calibrated_and_exported(tmp_path):
    definition, expected = frozen_definition()
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="net")
        kquant.QAT_Quantizer()(graph, X, training=False)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    kinds = checked(session, tmp_path / "model.tflite", inputs=["net/x"], outputs=["net/probs"])
    assert kinds[1:3] == ["conv2d", "conv2d"]
    got = kquant.load_artifact(tmp_path / "model.tflite")(X)
    # Post-training quantization: within a few percent of a probability.
    assert np.abs(got - expected).max() < 0.05


@pytest.mark.filterwarnings("ignore:.*convert_variables_to_constants")
def test_frozen_graph_cannot_be_trained():
    definition, _ = frozen_definition()
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    with pytest.raises(kquant.ModelError, match=r"trainable.*training=False"):
        kquant.QAT_Quantizer()(graph, X)


def test_quantized_graph_survives_a_meta_graph(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    train, session = net.train_op(), net.session()
    session.run(train, net.feeds())
    with net.graph.as_default():
        v1.train.Saver().save(session, str(tmp_path / "ckpt"))
    graph = tf.Graph()
    with graph.as_default():
        other = v1.Session()
        v1.train.import_meta_graph(str(tmp_path / "ckpt.meta")).restore(other, str(tmp_path / "ckpt"))
    checked(session, tmp_path / "one.tflite")
    checked(other, tmp_path / "two.tflite")
    assert (tmp_path / "one.tflite").read_bytes() == (tmp_path / "two.tflite").read_bytes()
    with pytest.raises(kquant.ModelError, match="already quantized"):
        kquant.QAT_Quantizer()(graph)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:`tf.layers")
@pytest.mark.filterwarnings("ignore:.*_colocate_with")
def test_layers_with_variables_in_scopes(training, tmp_path):
    """The functions of `tf.layers`, which TensorFlow has under legacy Keras."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, *SHAPE], name="x")
        y = convolutional.conv2d(x, 6, 3, activation=tf.nn.relu, name="conv")
        y = convolutional.separable_conv2d(y, 6, 3, use_bias=False, name="separable")
        y = normalization.batch_normalization(y, training=training, name="norm")
        y = core.dropout(tf.nn.relu6(y), 0.3, training=training)
        logits = core.dense(core.flatten(y), 4, name="head")
        probs = tf.nn.softmax(logits, name="probs")
        labels = v1.placeholder(tf.int64, [None])
        loss = v1.losses.sparse_softmax_cross_entropy(labels, logits)
        start = v1.Session()
        start.run(v1.global_variables_initializer())
        kquant.QAT_Quantizer()(graph, X, training=training, session=start)
        session = v1.Session()
        if training:
            with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
                train = v1.train.MomentumOptimizer(0.01, 0.9).minimize(loss)
        session.run(v1.global_variables_initializer())
        for _ in range(3 if training else 0):
            session.run(train, {x: X, labels: Y})
    kinds = checked(session, tmp_path / "model.tflite", inputs=[x], outputs=[probs])
    expected = ["fake_quant by quantize", "conv2d", "depthwise_conv2d", "conv2d", "reshape", "dense", "softmax"]
    assert kinds == expected


@pytest.mark.parametrize("training", [True, False])
def test_keras_layers_called_inside_a_graph(training, tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 6, 5], name="x")
        y = tf_keras.layers.Dense(7, name="wide")(x)  # over the last of three axes: a tensordot
        norm = tf_keras.layers.BatchNormalization(name="norm")
        y = tf_keras.layers.ReLU()(norm(y, training=training))
        y = tf_keras.layers.Conv1D(4, 3, activation="swish", name="conv")(y)
        y = tf_keras.layers.GlobalAveragePooling1D()(y)
        out = tf_keras.layers.Dense(3, name="head")(y)
        start = v1.Session()
        start.run(v1.global_variables_initializer())
        data = np.random.default_rng(0).normal(size=(64, 6, 5)).astype(np.float32)
        kquant.QAT_Quantizer()(graph, data, training=training, session=start)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    kinds = checked(session, tmp_path / "model.tflite", data, inputs=[x], outputs=[out])
    assert [k for k in kinds if k != "reshape"][1:] == ["dense", "conv2d", "elementwise by table", "mean", "dense"]


@pytest.mark.parametrize("resource", [True, False], ids=["resource", "ref"])
def test_embedding_looks_up_in_the_quantized_table(resource, tmp_path):
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(1)  # the table starts alike in both sessions
        ids = v1.placeholder(tf.int32, [None, 6], name="ids")
        table = v1.get_variable("table", [11, 5], use_resource=resource)
        y = tf.nn.embedding_lookup(table, ids)
        kernel = v1.get_variable("kernel", [30, 3])
        out = tf.matmul(tf.reshape(y, [-1, 30]), kernel, name="out")
        start = v1.Session()
        start.run(v1.global_variables_initializer())
        data = np.random.default_rng(0).integers(0, 11, (64, 6)).astype(np.int32)
        kquant.QAT_Quantizer([{"q_bits": {"weight": 4, "output": 8}, "op_types": "default"}])(
            graph, data, session=start
        )
        gradient = tf.convert_to_tensor(v1.gradients(tf.reduce_sum(out**2), table)[0])
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        quantized = next(op for op in graph.get_operations() if op.name.endswith("embedding_lookup/kernel/quantized"))
        levels = session.run(quantized.outputs[0])
        looked_up = session.run(graph.get_operation_by_name("Reshape").inputs[0], {ids: data})
        assert np.unique(levels).size <= 15
        # Read through an 8-bit range of its own, half a step of which is the largest difference.
        assert np.abs(looked_up - levels[data]).max() <= 0.51 * np.ptp(levels) / 255
        assert np.abs(session.run(gradient, {ids: data})).max() > 0
    assert checked(session, tmp_path / "model.tflite", data) == ["embedding", "reshape", "dense"]


def test_allowed_float_ops_are_spliced_in(tmp_path):
    net = small(training=False)
    config = [{"q_bits": 8, "op_types": "default"}, {"op_names": ["second/conv"], "exclude": True}]
    kquant.QAT_Quantizer(config)(net.graph, X, training=False, session=net.session())
    session = net.session()
    with pytest.raises(kquant.ExportError, match="second/"):
        kquant.export_tflite(session, tmp_path / "model.tflite")
    kquant.export_tflite(session, tmp_path / "model.tflite", allow_float=True)
    assert not kquant.audit(tmp_path / "model.tflite").fully_integer
    report = kquant.verify(session, tmp_path / "model.tflite", X[:32])
    assert report.ok, report.problems


def test_weights_only(tmp_path):
    net = small(training=False)
    kquant.NaiveQuantizer()(net.graph, training=False)
    session = net.session()
    with pytest.raises(kquant.ExportError, match="calibration_data"):
        kquant.export_tflite(session, tmp_path / "model.tflite")
    kquant.export_tflite(session, tmp_path / "model.tflite", weights_only=True)
    assert kquant.verify(session, tmp_path / "model.tflite", X[:32]).ok


def found(build):
    """The names of the inputs and outputs that are found in a graph."""
    graph = tf.Graph()
    with graph.as_default():
        build(v1.placeholder(tf.float32, [None, 12], name="x"))
    report = kquant.QAT_Quantizer()(graph)
    return report.inputs, report.outputs


def hidden(x):
    return tf.nn.relu(tf.matmul(x, v1.get_variable("w", [12, 5])) + v1.get_variable("b", [5]))


def test_the_model_is_found_beside_labels_losses_metrics_and_summaries():
    def build(x):
        y = hidden(x)
        v1.summary.histogram("hidden", y)
        y = tf.matmul(y, v1.get_variable("v", [5, 3]), name="out")
        labels = v1.placeholder(tf.float32, [None, 3], name="labels")
        v1.summary.scalar("loss", tf.reduce_mean(tf.square(y - labels)) + 1e-4 * tf.nn.l2_loss(y.op.inputs[1]))
        v1.summary.scalar("largest", tf.reduce_max(tf.cast(tf.argmax(y, 1), tf.float32)))

    assert found(build) == (("x",), ("out",))


def test_an_autoencoders_output_is_before_its_loss():
    def build(x):
        y = tf.nn.sigmoid(tf.matmul(hidden(x), v1.get_variable("v", [5, 12])), name="out")
        v1.summary.scalar("loss", tf.reduce_mean(tf.square(y - x)))

    assert found(build) == (("x",), ("out",))


def test_dropout_with_a_rate_that_is_fed():
    def build(x):
        keep = v1.placeholder(tf.float32, name="keep")
        tf.matmul(tf.nn.dropout(hidden(x), 1 - keep), v1.get_variable("v", [5, 3]), name="out")

    assert found(build) == (("x",), ("out",))


def test_several_heads_are_all_found():
    def build(x):
        y = hidden(x)
        tf.nn.softmax(tf.matmul(y, v1.get_variable("one", [5, 3])), name="class")
        tf.nn.tanh(tf.matmul(y, v1.get_variable("two", [5, 2])), name="place")

    assert found(build) == (("x",), ("class", "place"))


def test_a_flag_that_is_fed_is_refused():
    def build(x):
        flag = v1.placeholder_with_default(False, [], name="training")
        tf.matmul(tf.cond(flag, lambda: hidden(x), lambda: x[:, :5]), v1.get_variable("v", [5, 3]))

    with pytest.raises(kquant.ModelError, match=r"training=True.*training=False.*flag"):
        found(build)


def test_what_an_iterator_trained_is_restored_where_a_placeholder_feeds(tmp_path):
    def graph(x, training):
        with x.graph.as_default():
            y = tf.nn.relu(tf.matmul(x, v1.get_variable("a", [12, 6])))
            tf.matmul(y, v1.get_variable("b", [6, 3]), name="out")
            kquant.QAT_Quantizer()(x.graph, training=training)
            session = v1.Session()
            session.run(v1.global_variables_initializer())
        return session

    data = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
    with tf.Graph().as_default():
        batch = v1.data.make_one_shot_iterator(tf.data.Dataset.from_tensor_slices(data).batch(16)).get_next()
        session = graph(batch, True)
        for _ in range(4):
            session.run("kquant/out/quantized:0")
        v1.train.Saver().save(session, str(tmp_path / "ckpt"))
        checked(session, tmp_path / "trained.tflite", data)
    with tf.Graph().as_default():
        session = graph(v1.placeholder(tf.float32, [None, 12], name="fed"), False)
        v1.train.Saver().restore(session, str(tmp_path / "ckpt"))
        checked(session, tmp_path / "restored.tflite", data)
    one, two = (kquant.load_artifact(tmp_path / f"{name}.tflite")(data) for name in ("trained", "restored"))
    np.testing.assert_array_equal(one, two)
