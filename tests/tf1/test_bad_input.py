"""What is refused: each with an error that says where, what was expected, what was received and what to do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant

from .nets import X, small, v1


def refused(match, function, *args, error=kquant.ModelError, **options):
    with pytest.raises(error, match=match):
        function(*args, **options)


def test_training_ops_first():
    net = small()
    net.train_op()
    count = len(net.graph.get_operations())
    refused("without training ops.*minimize", kquant.QAT_Quantizer(), net.graph)
    assert len(net.graph.get_operations()) == count


def test_gradients_first():
    net = small()
    with net.graph.as_default():
        v1.gradients(net.loss, net.graph.get_collection("trainable_variables"))
    refused("without training ops", kquant.QAT_Quantizer(), net.graph)


def test_quantized_twice():
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    refused("kquant already quantized", kquant.QAT_Quantizer(), net.graph)


def test_finalized_graph():
    net = small()
    net.graph.finalize()
    refused("finalized graph", kquant.QAT_Quantizer(), net.graph)


def test_no_op_of_that_name():
    net = small()
    config = [{"q_bits": 8, "op_names": ["second/conf"]}]
    refused("second/conf.*second/conv", kquant.QAT_Quantizer(config), net.graph, error=kquant.ConfigError)
    refused("outputs.*'probs'.*'prob'", kquant.QAT_Quantizer(), net.graph, outputs=["prob"])


def test_no_op_of_that_type():
    net = small()
    config = [{"q_bits": 8, "op_types": ["Conv2d"]}]
    refused("Conv2d.*'Conv2D'", kquant.QAT_Quantizer(config), net.graph, error=kquant.ConfigError)


def test_no_trainable_weight():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 4, 4, 2])
        tf.nn.relu(tf.nn.max_pool2d(x, 2, 2, "SAME"))
    refused("trainable weight.*none", kquant.QAT_Quantizer(), graph)


def test_weights_that_are_not_trained():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 4])
        tf.matmul(x, v1.get_variable("w", [4, 2], trainable=False))
    refused("trainable weight.*training=False", kquant.QAT_Quantizer(), graph)


def test_empty_graph():
    refused("trainable weight.*none", kquant.QAT_Quantizer(), tf.Graph())


def test_a_closed_session(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    with v1.Session(graph=net.graph) as session:
        pass
    refused("variables .*an open session.*before the session is closed", kquant.export_tflite, session, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_uninitialized_variables_at_export(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    with net.graph.as_default():
        session = v1.Session()
    refused("variables .*initializers", kquant.export_tflite, session, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_ranges_never_set_at_export(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    session = net.session()
    path = tmp_path / "model.tflite"
    refused("range must be set.*calibration_data", kquant.export_tflite, session, path, error=kquant.ExportError)


def test_export_of_a_float_graph(tmp_path):
    session = small().session()
    refused("a quantized model.*float", kquant.export_tflite, session, tmp_path / "model.tflite")


def test_export_of_a_graph_without_a_session(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    refused("a session that holds the values", kquant.export_tflite, net.graph, tmp_path / "model.tflite")


def test_input_of_unknown_rank():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, name="x")
        y = tf.matmul(x, v1.get_variable("w", [4, 2]), name="y")
    refused("'x:0'.*a shape.*unknown rank", kquant.QAT_Quantizer(), graph, inputs=[x], outputs=[y])


def test_missing_input(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    path = tmp_path / "model.tflite"
    refused("inputs.*no 'x:0'", kquant.export_tflite, net.session(), path, inputs=["labels"], outputs=["probs"])


def test_calibration_without_values():
    net = small()
    count = len(net.graph.get_operations())
    refused(r"session that holds the values.*session=", kquant.QAT_Quantizer(), net.graph, X)
    empty = v1.Session(graph=net.graph)
    refused("initialized variables.*checkpoint", kquant.QAT_Quantizer(), net.graph, X, session=empty)
    assert len(net.graph.get_operations()) == count


def test_session_on_another_graph():
    net, other = small(), small()
    refused("session on another graph", kquant.QAT_Quantizer(), net.graph, X, session=other.session())


def test_calibration_data_of_the_wrong_shape():
    net = small()
    data = np.zeros((8, 3, 3, 3), np.float32)
    session = net.session()
    count = len(net.graph.get_operations())
    for bad in (data, [data], iter([data]), iter([X[:32], data]), []):
        refused("shape|batch", kquant.QAT_Quantizer(), net.graph, bad, session=session, error=kquant.CalibrationError)
    assert len(net.graph.get_operations()) == count  # so that it can be tried again
    kquant.QAT_Quantizer()(net.graph, iter([X[:32], X[32:]]), session=session)


def test_op_without_an_integer_form():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 5, 5, 5, 2])
        w = v1.get_variable("w", [3, 3, 3, 2, 4])
        y = tf.nn.conv3d(x, w, [1] * 5, "SAME", name="volume")
        tf.matmul(tf.reduce_mean(y, [1, 2, 3]), v1.get_variable("v", [4, 2]))
    refused("'volume'.*Conv3D.*exclude", kquant.QAT_Quantizer(), graph, error=kquant.UnsupportedError)


def test_a_refused_graph_is_not_changed():
    net = small()
    count = len(net.graph.get_operations())
    config = [{"q_bits": 1, "op_types": ["default"], "quantizer": "dorefa"}]
    refused("1-bit activations", kquant.quantize_model, net.graph, config, error=kquant.ConfigError)
    assert len(net.graph.get_operations()) == count


def test_what_is_no_graph():
    refused("tf.Graph.*Session", kquant.QAT_Quantizer(), tf.constant(1.0))
    refused("a session on one", kquant.QAT_Quantizer(), object())


def test_arguments_for_graphs_only():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    refused("training=.*graphs only", kquant.QAT_Quantizer(), model, training=False, error=kquant.ConfigError)


def test_half_precision():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float16, [None, 4], name="x")
        tf.matmul(x, v1.get_variable("w", [4, 2], tf.float16))
    refused("'x:0'.*float32.*float16", kquant.QAT_Quantizer(), graph)


@pytest.mark.parametrize("control", [kquant.freeze_observers, kquant.freeze_batch_norm])
def test_controls_of_a_float_graph(control):
    refused("a quantized model.*quantize_model", control, small().session())


def test_kernels_that_the_target_does_not_have_are_named():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 3, 8, 8])
        tf.nn.conv2d(x, v1.get_variable("kernel", [3, 3, 3, 4]), 1, "SAME", data_format="NCHW", name="first")
    with pytest.raises(kquant.UnsupportedError, match=r"op 'first' \(Conv2D\): .*channels-last.*'NCHW'. Build it"):
        kquant.QAT_Quantizer()(graph)


def test_a_loop_is_refused_by_its_own_name():
    """And not by that of the sizes and counters around it."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8])
        kernel = v1.get_variable("kernel", [8, 8])
        limit = tf.shape(x)[0]
        _, y = tf.while_loop(
            lambda i, h: i < limit, lambda i, h: (i + 1, tf.matmul(h, kernel)), [tf.constant(0), x], name="loop"
        )
        out = tf.matmul(y, v1.get_variable("last", [8, 2]), name="out")
    with pytest.raises(kquant.UnsupportedError, match=r"layer 'loop' \(\w*While\)"):
        kquant.QAT_Quantizer()(graph, outputs=[out], inputs=[x])


@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_a_tensor_given_twice(role):
    net = small()
    tensor = net.x if role == "inputs" else net.probs
    refused(f"{role}.*{tensor.name}.*twice", kquant.QAT_Quantizer(), net.graph, **{role: [tensor, tensor.name]})


@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_no_tensor_given(role):
    net = small()
    before = net.graph.as_graph_def()
    refused(f"{role}: at least one", kquant.QAT_Quantizer(), net.graph, **{role: []})
    assert net.graph.as_graph_def() == before


@pytest.mark.parametrize("training", ["no", 0], ids=repr)
def test_a_form_that_is_neither_for_training_nor_for_evaluation(training):
    refused("training: True or False", kquant.QAT_Quantizer(), small().graph, training=training)
