"""A graph through the whole way: rewritten in place, trained in a session, exported, verified."""

import numpy as np
import pytest

import kquant

from .nets import X, fused_norm, small, unfused_norm, v1


def quantized_and_trained(net, steps=12, config=None, **options):
    """The session of a graph that was quantized and trained, and the report of its rewriting."""
    report = kquant.QAT_Quantizer(config)(net.graph, **options)
    train = net.train_op()
    session = net.session()
    losses = [session.run([train, net.loss], net.feeds())[1] for _ in range(steps)]
    assert losses[-1] < losses[0]
    return session, report


def checked(session, path, **options):
    """Export, audit and verify; the parity report."""
    kquant.export_tflite(session, path, **options)
    assert kquant.audit(path).fully_integer
    report = kquant.verify(session, path, X[:48])
    assert report.ok, report.problems
    return report


@pytest.mark.parametrize("resource", [True, False], ids=["resource", "ref"])
@pytest.mark.parametrize("norm", [fused_norm, unfused_norm])
def test_trained_graph_keeps_the_contract(norm, resource, tmp_path):
    session, _ = quantized_and_trained(small(norm=norm, resource=resource))
    report = checked(session, tmp_path / "model.tflite", inputs=["x"], outputs=["probs"])
    # The same model as in Keras: batch norm and relu in the convolution, silu one function, the sum with its relu.
    kinds = [op.kind for op in report.ops]
    expected = ["fake_quant by quantize", "conv2d", "conv2d", "elementwise by table", "add", "mean", "dense", "softmax"]
    assert kinds == expected


def test_the_graph_really_changes():
    net = small()
    conv = net.graph.get_operation_by_name("second/conv")
    assert [t.name for t in conv.inputs] == ["first/relu:0", "second/conv/ReadVariableOp:0"]
    count = len(net.graph.get_operations())
    variables = len(net.graph.get_collection("variables"))
    report = kquant.QAT_Quantizer()(net.graph)
    assert [t.name for t in conv.inputs] == ["kquant/first/relu/quantized:0", "kquant/second/conv/kernel/quantized:0"]
    assert report.ops_added == len(net.graph.get_operations()) - count > 0
    assert report.variables_added == len(net.graph.get_collection("variables")) - variables > 0
    fakes = [op for op in net.graph.get_operations() if op.type == "FakeQuantWithMinMaxVars"]
    assert len(fakes) == report.activations == 8
    assert report.kernels == 3


def test_gradients_reach_the_weights_and_training_moves_levels():
    net = small()
    kquant.QAT_Quantizer([{"q_bits": {"weight": 4, "output": 8}, "op_types": ["default"]}])(net.graph)
    trained = net.graph.get_collection("trainable_variables")
    with net.graph.as_default():
        gradients = v1.gradients(net.loss, trained)
        train = v1.train.GradientDescentOptimizer(0.5).apply_gradients(zip(gradients, trained, strict=True))
    session = net.session()
    values = session.run(gradients, net.feeds())
    assert all(np.abs(v).max() > 0 for v in values)
    kernel = net.graph.get_tensor_by_name("kquant/second/conv/kernel/quantized:0")
    levels = session.run(kernel)
    # 4 bits: 15 levels in each output channel.
    assert all(np.unique(levels[..., c]).size <= 15 for c in range(levels.shape[-1]))
    for _ in range(5):
        session.run(train, net.feeds())
    moved = session.run(kernel)
    scale = np.abs(levels).max(axis=(0, 1, 2)) / 7
    assert (np.round(moved / scale) != np.round(levels / scale)).sum() > 5


@pytest.mark.parametrize("training", [True, False])
def test_observers_update_in_every_run_of_a_training_graph_only(training):
    net = small(training)
    kquant.QAT_Quantizer()(net.graph, X, training=training, session=net.session())
    session = net.session()
    read = net.graph.get_operation_by_name("kquant/model_input/maximum/Read/ReadVariableOp").outputs[0]
    before = session.run(read)
    assert before > 0  # calibration's range is the first value of the variable
    session.run(net.probs, {net.x: 10 * X})
    assert (session.run(read) > 1.01 * before) == training


def test_evaluation_graph_takes_a_checkpoint_of_the_training_graph(tmp_path):
    session, _ = quantized_and_trained(small())
    with session.graph.as_default():
        v1.train.Saver().save(session, str(tmp_path / "ckpt"))
    evaluation = small(training=False)
    kquant.QAT_Quantizer()(evaluation.graph, training=False)
    with evaluation.graph.as_default():
        other = v1.Session()
        v1.train.Saver().restore(other, str(tmp_path / "ckpt"))
    checked(session, tmp_path / "one.tflite")
    checked(other, tmp_path / "two.tflite")
    state, twin = kquant.export_state(session), kquant.export_state(other)
    arrays = [k for k in state if k.endswith(("codes", "scale", "zero_point"))]
    assert len(arrays) > 20
    for key in arrays:
        np.testing.assert_array_equal(state[key], twin[key])
