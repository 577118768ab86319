"""What tests of whole TensorFlow 1 programs share: weights, data, and the way from a graph to a checked file."""

import numpy as np
import tensorflow as tf

import kquant

from .nets import v1

RNG = np.random.default_rng(3)
IMAGES = RNG.normal(size=(32, 8, 8, 3)).astype(np.float32)
WORDS = RNG.normal(size=(32, 6, 8)).astype(np.float32)


def weight(name, *shape):
    return v1.get_variable(name, shape, initializer=v1.glorot_uniform_initializer(seed=sum(map(ord, name))))


def vector(name, size, mean=0.0, **options):
    start = v1.random_normal_initializer(mean, 0.2, seed=sum(map(ord, name)))
    return v1.get_variable(name, [size], initializer=start, **options)


def head(y):
    y = tf.reduce_mean(y, list(range(1, y.shape.rank - 1)))
    return tf.matmul(y, weight("head", y.shape[-1], 4), name="out")


def trained(build, data, config=None, flags=None):
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
        feeds = {x: data, **(flags or {})}
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
