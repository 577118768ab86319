"""Graphs as TensorFlow 1 code bases write them, each trained, exported and verified."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.training import moving_averages

import kquant

from .nets import v1

RNG = np.random.default_rng(3)
IMAGES = RNG.normal(size=(32, 8, 8, 3)).astype(np.float32)
ROWS = RNG.normal(size=(32, 6, 8)).astype(np.float32)


def weight(name, *shape):
    return v1.get_variable(name, shape, initializer=v1.glorot_uniform_initializer(seed=sum(map(ord, name))))


def vector(name, size, mean=0.0, **options):
    start = v1.random_normal_initializer(mean, 0.2, seed=sum(map(ord, name)))
    return v1.get_variable(name, [size], initializer=start, **options)


def head(y):
    y = tf.reduce_mean(y, list(range(1, y.shape.rank - 1)))
    return tf.matmul(y, weight("head", y.shape[-1], 4), name="out")


def trained(build, data, config=None, flags=()):
    """The session of a graph that was quantized and trained for a few steps."""
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(1)
        x = v1.placeholder(data.dtype, [None, *data.shape[1:]], name="x")
        y = build(x)
        loss = tf.reduce_mean(tf.square(y - 1.0))
        start = v1.Session()
        start.run(v1.global_variables_initializer())
        report = kquant.QAT_Quantizer(config)(graph, data, session=start)
        assert report.inputs == ("x",)
        with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
            train = v1.train.AdamOptimizer(1e-2).minimize(loss)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        feeds = {x: data, **{graph.get_tensor_by_name(f): True for f in flags}}
        losses = [session.run([loss, train], feeds)[0] for _ in range(15)]
        assert losses[-1] < losses[0]
    return session


def checked(session, path, data):
    """The kinds of ops of the exported file, which is fully integer and keeps the contract."""
    kquant.export_tflite(session, path)
    assert kquant.audit(path).fully_integer
    report = kquant.verify(session, path, data)
    assert report.ok, report.problems
    return [op.kind for op in report.ops]


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
