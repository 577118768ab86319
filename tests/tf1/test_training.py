"""Training in a session: the delay, checkpoints, monitored sessions, frozen ranges and statistics, gradients."""

import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.core.errors import ExportError

from .nets import X, fused_norm, small, unfused_norm, v1


def value(session, name):
    return session.run(session.graph.get_operation_by_name(f"{name}/Read/ReadVariableOp").outputs[0])


def test_quantization_begins_at_a_global_step(tmp_path):
    net = small()
    config = [{"q_bits": {"weight": 2, "output": 8}, "op_types": ["default"], "quant_start_step": 3}]
    kquant.QAT_Quantizer(config)(net.graph)
    train = net.train_op()
    kernel = net.graph.get_tensor_by_name("kquant/second/conv/kernel/quantized:0")
    session = net.session()
    used = []
    for step in range(5):
        if step == 2:
            with pytest.raises(ExportError, match="quant_start_step"):
                kquant.export_tflite(session, tmp_path / "model.tflite")
        used.append(np.unique(session.run([kernel, train], net.feeds())[0][..., 0]).size)
    # Two bits have three levels; before that every weight is its own value.
    assert [n > 3 for n in used] == [True, True, True, False, False]
    kquant.export_tflite(session, tmp_path / "model.tflite")
    assert kquant.verify(session, tmp_path / "model.tflite", X[:32]).ok


def test_checkpoint_goes_on_bit_equal(tmp_path):
    net = small()
    kquant.DoReFaQuantizer([{"q_bits": {"weight": 4, "output": 8, "gradient": 4}, "op_types": ["default"]}])(net.graph)
    train, session = net.train_op(), net.session()
    with net.graph.as_default():
        saver = v1.train.Saver()
    for _ in range(3):
        session.run(train, net.feeds())
    with net.graph.as_default():
        saver.save(session, str(tmp_path / "ckpt"))
    one = [session.run([train, net.loss], net.feeds())[1] for _ in range(3)]
    other = v1.Session(graph=net.graph)
    with net.graph.as_default():
        saver.restore(other, str(tmp_path / "ckpt"))
    two = [other.run([train, net.loss], net.feeds())[1] for _ in range(3)]
    assert one == two


def test_monitored_session_trains_and_exports(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    train = net.train_op()
    with (
        net.graph.as_default(),
        v1.train.MonitoredTrainingSession(checkpoint_dir=str(tmp_path / "run"), save_summaries_steps=None) as session,
    ):
        for _ in range(4):
            session.run(train, net.feeds())
        assert kquant.freeze_batch_norm(session) == 1
        assert kquant.freeze_observers(session) > 3
        session.run(train, net.feeds())
        steps = session.run(v1.train.get_global_step())
        kquant.export_tflite(session, tmp_path / "model.tflite", inputs=["x"], outputs=["probs"])
        report = kquant.verify(session, tmp_path / "model.tflite", X[:32])
        assert session.run(v1.train.get_global_step()) == steps
    assert report.ok, report.problems


def test_export_runs_nothing_but_reads_of_variables(tmp_path):
    net = small()
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    session, fetched = net.session(), []
    run = session.run

    def watched(fetches, feed_dict=None, **options):
        fetched.extend(fetches.values() if isinstance(fetches, dict) else [fetches])
        return run(fetches, feed_dict, **options)

    session.run = watched
    kquant.export_tflite(session, tmp_path / "model.tflite")
    assert fetched
    assert {t.op.type for t in fetched} <= {"ReadVariableOp", "VariableV2"}


@pytest.mark.parametrize("norm", [fused_norm, unfused_norm])
def test_frozen_statistics_stand_still_and_are_used(norm):
    net = small(norm=norm)
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    train, session = net.train_op(), net.session()
    names = ["first/mean", "first/variance"]

    def statistics():
        return [session.run(v) for n in names for v in net.graph.get_collection("variables") if v.op.name == n]

    def influence():
        """How much the outputs of some samples depend on the others of their batch, as a share of their range."""
        batches = np.r_[X[:8], 3 * X[8:16]], X[:8]
        one, two = (session.run(net.logits, {net.x: batch})[:8] for batch in batches)
        return np.abs(one - two).max() / np.ptp(two)

    first = statistics()
    session.run(train, net.feeds())
    moved = statistics()
    assert all(np.abs(a - b).max() > 0 for a, b in zip(first, moved, strict=True))
    assert kquant.freeze_observers(session) > 3
    assert influence() > 0.01
    assert kquant.freeze_batch_norm(session) == 1
    assert influence() < 1e-5  # the order of sums in a product may depend on the batch
    session.run(train, net.feeds())
    assert all(np.array_equal(a, b) for a, b in zip(moved, statistics(), strict=True))
    assert kquant.unfreeze_batch_norm(session) == 1
    session.run(train, net.feeds())
    assert all(np.abs(a - b).max() > 0 for a, b in zip(moved, statistics(), strict=True))


@pytest.mark.parametrize("norm", [fused_norm, unfused_norm])
def test_reestimated_statistics_are_those_of_the_data(norm):
    net = small(norm=norm)
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    session = net.session()
    assert kquant.reestimate_batch_norm(session, [X]) == 1
    x, kernel = (net.graph.get_tensor_by_name(f"kquant/{n}/quantized:0") for n in ("x", "first/conv/kernel"))
    with net.graph.as_default():
        exact = session.run(tf.nn.conv2d(x, kernel, 1, "SAME"), {net.x: X}).astype(np.float64)
    found = {v.op.name: session.run(v) for v in net.graph.get_collection("variables") if v.op.name.startswith("first/")}
    # The ranges of a training graph move in the run above, by a hundredth of nothing: the data is calibration's.
    np.testing.assert_allclose(found["first/mean"], exact.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["first/variance"], exact.var((0, 1, 2)), rtol=1e-4)


def test_frozen_ranges_stand_still():
    net = small()
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    train, session = net.train_op(), net.session()
    kquant.freeze_observers(session)
    before = value(session, "kquant/model_input/maximum")
    session.run(train, {net.x: 5 * X, net.labels: np.zeros(len(X))})
    assert value(session, "kquant/model_input/maximum") == before
    kquant.unfreeze_observers(session)
    session.run(train, {net.x: 5 * X, net.labels: np.zeros(len(X))})
    assert value(session, "kquant/model_input/maximum") > before


def test_training_clips_a_batch_to_no_less_than_two_thirds_of_its_extremes():
    net = small()
    kquant.QAT_Quantizer()(net.graph, X, session=net.session())
    session = net.session()
    quantized = net.graph.get_tensor_by_name("kquant/x/quantized:0")
    tops = [float(session.run(quantized, {net.x: 5 * X}).max()) / float(X.max())]
    kquant.freeze_observers(session)
    tops.append(float(session.run(quantized, {net.x: 5 * X}).max()) / float(X.max()))
    # Two thirds of the batch; then the range, which has moved once.
    np.testing.assert_allclose(tops, [10 / 3, 1.04], rtol=0.01)


def test_range_moves_as_stated():
    """The first batch sets the range, then 1 % of the way to each further one (Jacob et al. 2018, section 3.1)."""
    net = small()
    kquant.QAT_Quantizer()(net.graph)
    session = net.session()
    for factor in (1, 2, 3):
        session.run(net.probs, {net.x: factor * X})
    top = float(X.max())
    expected = top
    for factor in (2, 3):
        expected += 0.01 * (factor * top - expected)
    np.testing.assert_allclose(value(session, "kquant/model_input/maximum"), expected, rtol=1e-6)


def test_quantized_gradients_lie_on_their_levels():
    net = small()
    config = [{"q_bits": {"weight": 8, "output": 8, "gradient": 2}, "op_types": ["default"]}]
    kquant.DoReFaQuantizer(config)(net.graph)
    product = net.graph.get_tensor_by_name("head/product:0")
    with net.graph.as_default():
        (gradient,) = v1.gradients(net.loss, product)
    session = net.session()
    one, two = (session.run(gradient, net.feeds()) for _ in range(2))
    levels = np.abs(one) / np.abs(one).max(axis=1, keepdims=True)
    # Two bits: 2 m (q / 3 - 1/2), so a third of the largest or the largest.
    np.testing.assert_allclose(np.minimum(np.abs(levels - 1), np.abs(levels - 1 / 3)), 0, atol=1e-6)
    assert (one != two).any()  # fresh noise in each run
    assert value(session, "kquant/head/product/gradient/draws") == 2


def test_the_given_session_goes_on_with_the_rewritten_graph():
    net = small(training=False)
    session = net.session()
    before = session.run(net.logits, {net.x: X})
    kquant.QAT_Quantizer([{"q_bits": 4, "op_types": ["default"]}])(net.graph, X, training=False, session=session)
    after = session.run(net.logits, {net.x: X})
    distance = np.abs(after - before).max() / np.ptp(before)
    assert 0.005 < distance < 0.5  # four bits show, and the weights are still the same


def test_training_goes_on_in_the_given_session():
    """Gradients are built after the session has run the rewritten graph."""
    net = small()
    session = net.session()
    kquant.QAT_Quantizer()(net.graph, X, session=session)
    with net.graph.as_default():
        known = set(v1.global_variables())
        train = net.train_op()
        session.run(v1.variables_initializer([v for v in v1.global_variables() if v not in known]))
    losses = [session.run([train, net.loss], net.feeds())[1] for _ in range(8)]
    assert losses[-1] < losses[0]
    kernel = net.graph.get_tensor_by_name("kquant/second/conv/kernel/quantized:0")
    assert net.graph.get_operation_by_name("second/conv").inputs[1] is kernel
    assert value(session, "kquant/model_input/seen") == 1


def test_a_loss_takes_no_logarithm_of_a_probability_that_was_rounded_to_zero():
    """The first tutorial: `-sum(labels * log(softmax(logits)))`."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 4])
        kernel = v1.get_variable("kernel", initializer=8 * tf.eye(4))
        probs = tf.nn.softmax(tf.matmul(x, kernel), name="probs")
        labels = v1.placeholder(tf.float32, [None, 4])
        loss = -tf.reduce_mean(tf.reduce_sum(labels * tf.math.log(probs), 1))
        kquant.QAT_Quantizer()(graph)
        train = v1.train.GradientDescentOptimizer(0.1).minimize(loss)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    rounded, found, _ = session.run(["kquant/probs/quantized:0", loss, train], {x: np.eye(4), labels: np.eye(4)})
    assert rounded.min() == 0
    np.testing.assert_allclose(found, np.log(1 + 3 * np.exp(-8)), rtol=0.2)  # the logits are on 8 bits
    assert np.isfinite(session.run(kernel)).all()
