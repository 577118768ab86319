"""Training flags that are fed: what is read, what observers and the controls do while the flag is on and off."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from tf_keras.src.legacy_tf_layers import core, normalization

import kquant

from .nets import v1
from .trained import IMAGES, checked, head, trained, vector, weight


def by_hand(y, flag):
    """Batch norm as it stood in many an answer: `tf.cond` between the batch's statistics and their averages."""
    mean, variance = tf.nn.moments(y, [0, 1, 2])
    average = tf.train.ExponentialMovingAverage(0.9)

    def update():
        with tf.control_dependencies([average.apply([mean, variance])]):
            return tf.identity(mean), tf.identity(variance)

    mean, variance = tf.cond(flag, update, lambda: (average.average(mean), average.average(variance)))
    return tf.nn.batch_normalization(y, mean, variance, vector("beta", 6), vector("gamma", 6, 1.0), 1e-3)


def by_layers(y, flag):
    return normalization.batch_normalization(y, training=flag)


def by_keras(y, flag):
    layer = tf_keras.layers.BatchNormalization()
    y = layer(y, training=flag)
    for update in layer.updates:
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
    return y


@pytest.fixture(params=["switch and merge", "functions"])
def control_flow(request):
    """The two forms of conditionals: those of TensorFlow 1, and those that `enable_control_flow_v2` gives."""
    on = v1.control_flow_v2_enabled()
    (v1.disable_control_flow_v2 if request.param == "switch and merge" else v1.enable_control_flow_v2)()
    yield
    (v1.enable_control_flow_v2 if on else v1.disable_control_flow_v2)()


@pytest.mark.parametrize(("norm", "given"), [(by_hand, "default"), (by_layers, "placeholder"), (by_keras, "default")])
@pytest.mark.filterwarnings("ignore:`tf.layers")
@pytest.mark.filterwarnings("ignore:.*_colocate_with")
def test_a_flag_that_is_fed_decides_on_batch_norm_and_dropout(norm, given, control_flow, tmp_path):
    def build(x):
        flag = v1.placeholder(tf.bool, name="flag")
        if given == "default":
            flag = v1.placeholder_with_default(False, [], name="flag_by_default")
        y = tf.nn.relu(norm(tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 6), 1, "SAME"), flag))
        return head(core.dropout(y, 0.2, training=flag))

    flag = "flag:0" if given == "placeholder" else "flag_by_default:0"
    session = trained(build, IMAGES, flags={flag: True})
    assert checked(session, tmp_path / "model.tflite", IMAGES)[1:] == ["conv2d", "mean", "dense"]
    # The file is the graph with the flag off: the moving averages, and no dropout.
    graph = session.graph
    feeds = {graph.get_tensor_by_name("x:0"): IMAGES, graph.get_tensor_by_name(flag): False}
    kquant.freeze_observers(session)
    wanted = session.run(graph.get_tensor_by_name("kquant/out/quantized:0"), feeds)
    got = kquant.load_artifact(tmp_path / "model.tflite")(IMAGES)
    assert np.abs(got - wanted).max() <= 0.02 * np.ptp(wanted)  # a few steps of the output


def test_a_flag_that_decides_on_more_is_refused(control_flow):
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8])
        flag = v1.placeholder_with_default(False, [], name="training")
        w = weight("a", 8, 8)
        y = tf.cond(flag, lambda: tf.matmul(x, w), lambda: tf.matmul(x, w) * 0.5)
        tf.matmul(y, weight("b", 8, 3))
    with pytest.raises(kquant.ModelError, match=r"batch norm and dropout only.*training=True.*a flag decides"):
        kquant.QAT_Quantizer()(graph)


def test_a_value_that_is_chosen_by_a_flag_is_refused():
    graph = tf.Graph()
    with graph.as_default():
        flag = v1.placeholder(tf.bool, [], name="training")
        y = tf.matmul(v1.placeholder(tf.float32, [None, 8]), weight("a", 8, 8)) * tf.where(flag, 2.0, 1.0)
        tf.matmul(y, weight("b", 8, 3))
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    with pytest.raises(
        kquant.ModelError, match=r"batch norm and dropout only.*training=True.*'mul:0', on which a flag"
    ):
        kquant.QAT_Quantizer()(graph, np.ones((4, 8), np.float32), session=session)


def test_a_rate_of_dropout_that_is_chosen_by_a_flag():
    graph = tf.Graph()
    with graph.as_default():
        flag = v1.placeholder(tf.bool, [], name="training")
        y = tf.matmul(v1.placeholder(tf.float32, [None, 8], name="x"), weight("a", 8, 8))
        tf.matmul(tf.nn.dropout(y, rate=tf.where(flag, 0.5, 0.0)), weight("b", 8, 3), name="out")
    report = kquant.QAT_Quantizer()(graph)
    assert (report.inputs, report.outputs, report.activations) == (("x",), ("out",), 3)


# -- batch norms that a flag decides on -------------------------------------------------------------------------------


def averages(size, resource=True):
    options = {"trainable": False, "use_resource": resource}
    return vector("mean", size, **options), v1.get_variable("variance", initializer=tf.ones([size]), **options)


def always_updated(y, flag):
    """The averages are updated whatever the flag is, as with updates that only the training op depends on."""
    moving = averages(6, resource=False)
    batch = tf.nn.moments(y, [0, 1, 2])
    for average, statistic in zip(moving, batch, strict=True):
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, v1.assign(average, 0.9 * average + 0.1 * statistic))
    mean, variance = tf.cond(flag, lambda: batch, lambda: tuple(tf.identity(m) for m in moving))
    return tf.nn.batch_normalization(y, mean, variance, vector("beta", 6), vector("gamma", 6, 1.0), 1e-3)


def fused_in_branches(y, flag):
    """Both forms of the fused kernel in the branches, the updates in that of training."""
    moving = averages(6)
    gamma, beta = vector("gamma", 6, 1.0), vector("beta", 6)

    def training():
        out, *batch = v1.nn.fused_batch_norm(y, gamma, beta, epsilon=1e-3)
        updates = [a.assign_sub(0.1 * (a - s)) for a, s in zip(moving, batch, strict=True)]
        with tf.control_dependencies(updates):
            return tf.identity(out)

    return tf.cond(flag, training, lambda: v1.nn.fused_batch_norm(y, gamma, beta, *moving, 1e-3, is_training=False)[0])


def updated_in_another_conditional(y, flag):
    """One conditional decides on the statistics, another one on the updates."""
    moving = averages(6)
    batch = tf.nn.moments(y, [0, 1, 2])
    mean, variance = tf.cond(flag, lambda: batch, lambda: tuple(tf.identity(m) for m in moving))

    def update():
        with tf.control_dependencies([a.assign_sub(0.1 * (a - s)) for a, s in zip(moving, batch, strict=True)]):
            return tf.constant(1)

    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, tf.cond(flag, update, lambda: tf.constant(0)))
    return tf.nn.batch_normalization(y, mean, variance, vector("beta", 6), vector("gamma", 6, 1.0), 1e-3)


def negated(y, flag):
    """The conditional asks whether the graph evaluates."""
    moving, batch = averages(6), tf.nn.moments(y, [0, 1, 2])
    for average, statistic in zip(moving, batch, strict=True):
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, average.assign_sub(0.1 * (average - statistic)))
    mean, variance = tf.cond(tf.logical_not(flag), lambda: tuple(tf.identity(m) for m in moving), lambda: batch)
    return tf.nn.batch_normalization(y, mean, variance, vector("beta", 6), vector("gamma", 6, 1.0), 1e-3)


def of_a_test_flag(y, flag):
    """The flag says that the graph evaluates, and the file is what it computes with the flag off: training."""
    average = tf.train.ExponentialMovingAverage(0.9)
    batch = tf.nn.moments(y, [0, 1, 2])
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, average.apply(batch))
    mean, variance = tf.cond(flag, lambda: tuple(average.average(s) for s in batch), lambda: batch)
    return tf.nn.batch_normalization(y, mean, variance, vector("beta", 6), vector("gamma", 6, 1.0), 1e-3)


def fused_of_a_test_flag(y, flag):
    return by_layers(y, tf.logical_not(flag))


NORMS = (
    by_hand, by_layers, by_keras, always_updated, fused_in_branches, updated_in_another_conditional, negated,
    of_a_test_flag, fused_of_a_test_flag,
)  # fmt: skip
OF_TESTS = (of_a_test_flag, fused_of_a_test_flag)


class Trained:
    """A convolution, a norm that a flag decides on, and a head, quantized and trained."""

    def __init__(self, norm):
        def build(x):
            flag = v1.placeholder(tf.bool, [], name="flag")
            return head(tf.nn.relu(norm(tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 6), 1, "SAME", name="conv"), flag)))

        self.on = norm not in OF_TESTS
        self.session = trained(build, IMAGES, flags={"flag:0": self.on})
        self.graph = self.session.graph
        self.train = self.graph.get_operation_by_name("Adam")
        self.out = self.graph.get_tensor_by_name("out:0")
        self.moving = [v for v in self.graph.get_collection("variables") if self.is_average(v)]

    @staticmethod
    def is_average(variable):
        name = variable.op.name.lower()
        return ("mean" in name or "variance" in name or "moments" in name) and not name.startswith(("kquant", "beta"))

    def run(self, fetches, x=IMAGES, trains=True):
        return self.session.run(fetches, {"x:0": x, "flag:0": trains == self.on})

    def step(self):
        """The averages after one step of training."""
        self.run(self.train)
        return self.session.run(self.moving)

    def influence(self):
        """How much the outputs of some samples depend on the others of their batch, as a share of their range."""
        one, two = (self.run(self.out, x)[:8] for x in (np.r_[IMAGES[:8], 3 * IMAGES[8:16]], IMAGES[:8]))
        return np.abs(one - two).max() / np.ptp(two)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:`tf.layers")
@pytest.mark.filterwarnings("ignore:.*_colocate_with")
def test_a_frozen_batch_norm_takes_its_averages_though_the_flag_is_on(norm, control_flow, tmp_path):
    net = Trained(norm)
    assert len(net.moving) == 2
    before = net.session.run(net.moving)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, net.step(), strict=True))
    kquant.freeze_observers(net.session)
    assert net.influence() > 0.01
    assert kquant.freeze_batch_norm(net.session) == 1
    moved = net.session.run(net.moving)
    assert net.influence() < 1e-5  # the order of sums in a product may depend on the batch
    still = net.step()
    for a, b in zip(moved, still, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # 0.9 a + 0.1 a is a but for its last bit
    kernel = next(v for v in net.graph.get_collection("variables") if v.op.name == "kernel")
    old = net.session.run(kernel)
    net.step()
    assert np.abs(net.session.run(kernel) - old).max() > 0
    assert checked(net.session, tmp_path / "model.tflite", IMAGES)[1:] == ["conv2d", "mean", "dense"]
    assert kquant.unfreeze_batch_norm(net.session) == 1
    assert net.influence() > 0.01
    assert all(np.abs(a - b).max() > 0 for a, b in zip(still, net.step(), strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:`tf.layers")
@pytest.mark.filterwarnings("ignore:.*_colocate_with")
def test_reestimated_averages_of_a_flag_are_those_of_the_data(norm):
    net = Trained(norm)
    assert kquant.reestimate_batch_norm(net.session, [IMAGES]) == 1
    x, kernel = (net.graph.get_tensor_by_name(f"kquant/{n}/quantized:0") for n in ("x", "conv/kernel"))
    with net.graph.as_default():
        exact = net.run(tf.nn.conv2d(x, kernel, 1, "SAME"), trains=False).astype(np.float64)
    found = net.session.run(net.moving)
    np.testing.assert_allclose(found[0], exact.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found[1], exact.var((0, 1, 2)), rtol=1e-4)


def test_a_norm_that_the_controls_do_not_reach_is_named():
    """With a scale that is not trained either, nothing tells the average of the means from it."""

    def build(x):
        flag = v1.placeholder(tf.bool, [], name="flag")
        y = tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 6), 1, "SAME")
        moving, batch = averages(6), tf.nn.moments(y, [0, 1, 2])
        mean, variance = tf.cond(flag, lambda: batch, lambda: tuple(tf.identity(m) for m in moving))
        gamma = vector("gamma", 6, 1.0, trainable=False)
        return head(tf.nn.batch_normalization(y, mean, variance, vector("beta", 6), gamma, 1e-3))

    session = trained(build, IMAGES, flags={"flag:0": True})
    for control in (kquant.freeze_batch_norm, kquant.unfreeze_batch_norm):
        with pytest.warns(UserWarning, match=r"do not reach 1 batch norms: 'batchnorm/mul"):
            assert control(session) == 0
    with pytest.warns(UserWarning, match="do not reach 1"):
        assert kquant.reestimate_batch_norm(session, [IMAGES]) == 0


def test_the_evaluation_form_has_no_statistics_to_freeze():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8, 8, 3])
        flag = v1.placeholder(tf.bool, [], name="flag")
        head(by_hand(tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 6), 1, "SAME"), flag))
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        kquant.QAT_Quantizer()(graph, IMAGES, training=False, session=session)
    with pytest.raises(kquant.ModelError, match="evaluation form"):
        kquant.freeze_batch_norm(session)


# -- ranges -----------------------------------------------------------------------------------------------------------


def dropped(y, flag):
    return core.dropout(y, 0.2, training=flag)


def dropped_unless_tested(y, flag):
    return tf.cond(flag, lambda: tf.identity(y), lambda: tf.nn.dropout(y, rate=0.2))


def dropped_by_either(y, flag):
    return core.dropout(y, 0.2, training=tf.logical_or(flag, v1.placeholder_with_default(False, [])))


@pytest.mark.parametrize(
    ("part", "on"),
    [(by_hand, True), (by_layers, True), (negated, True), (of_a_test_flag, False), (fused_of_a_test_flag, False),
     (dropped, True), (dropped_unless_tested, False), (dropped_by_either, True)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`tf.layers")
@pytest.mark.filterwarnings("ignore:.*_colocate_with")
def test_ranges_move_in_runs_that_train(part, on, control_flow):
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(1)
        x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        flag = v1.placeholder(tf.bool, [], name="flag")
        y = part(tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 6), 1, "SAME", name="conv"), flag)
        out = head(tf.nn.relu(y))
        kquant.QAT_Quantizer()(graph)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        quantized = graph.get_tensor_by_name("kquant/x/quantized:0")
        top = next(v for v in v1.global_variables() if v.op.name == "kquant/model_input/maximum")

    def run(scale, flag):
        return session.run([out, quantized, top], {"x:0": scale * IMAGES, "flag:0": flag})[1:]

    # Where no batch has set a range yet, nothing is quantized.
    np.testing.assert_array_equal(run(1, not on)[0], IMAGES)
    run(1, on)
    np.testing.assert_allclose(session.run(top), IMAGES.max(), rtol=1e-6)
    # A run that evaluates is clipped to the range, and leaves it where it is.
    np.testing.assert_allclose(run(5, not on)[0].max(), IMAGES.max(), rtol=0.01)
    np.testing.assert_allclose(session.run(top), IMAGES.max(), rtol=1e-6)
    run(5, on)
    np.testing.assert_allclose(session.run(top), 1.04 * IMAGES.max(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`tf.layers")
def test_ranges_move_in_every_run_where_an_output_needs_no_flag():
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8])
        flag = v1.placeholder(tf.bool, [], name="flag")
        y = tf.nn.relu(tf.matmul(x, weight("a", 8, 8)))
        one, two = tf.matmul(y, weight("b", 8, 2)), tf.matmul(dropped(y, flag), weight("c", 8, 2))
        kquant.QAT_Quantizer()(graph, outputs=[one, two])
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        top = next(v for v in v1.global_variables() if v.op.name == "kquant/model_input/maximum")
    session.run(one, {x: np.full((4, 8), 2.0)})
    assert session.run(top) == 2.0
