"""Small TensorFlow 1 graphs that the tests quantize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
SHAPE, CLASSES = (8, 8, 3), 4
X = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, CLASSES, 64)


@dataclass(frozen=True)
class Net:
    """A graph with a model, and with its loss and labels where it is for training."""

    graph: tf.Graph
    x: Any
    logits: Any
    probs: Any
    labels: Any = None
    loss: Any = None

    def feeds(self, count: int = len(X)) -> dict:
        return {self.x: X[:count], self.labels: Y[:count]}

    def session(self) -> Any:
        """A session with initialized variables."""
        with self.graph.as_default():
            session = v1.Session()
            session.run(v1.global_variables_initializer())
        return session

    def train_op(self, optimizer: Any = None) -> Any:
        with self.graph.as_default():
            step = v1.train.get_or_create_global_step()
            with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
                return (optimizer or v1.train.AdamOptimizer(1e-3)).minimize(self.loss, global_step=step)


def variable(
    name: str, shape: list[int], seed: int, scale: float = 0.0, resource: bool = True, mean: float = 0.0
) -> Any:
    """A trainable variable; normal values around `mean`, or glorot's where no scale is given."""
    start = v1.random_normal_initializer(mean, scale, seed=seed) if scale else v1.glorot_normal_initializer(seed)
    return v1.get_variable(name, shape, initializer=start, use_resource=resource)


def moving(name: str, size: int, value: float, resource: bool) -> Any:
    start = v1.constant_initializer(value)
    return v1.get_variable(name, [size], initializer=start, trainable=False, use_resource=resource)


def update(variable: Any, statistic: Any, keep: float = 0.9) -> None:
    op = v1.assign_sub(variable, (variable - statistic) * (1.0 - keep))
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, op)


def fused_norm(y: Any, training: bool, resource: bool = True) -> Any:
    size = int(y.shape[-1])
    gamma, beta = variable("gamma", [size], 5, 0.4, resource, 1.0), variable("beta", [size], 6, 0.3, resource)
    mean, variance = moving("mean", size, 0.1, resource), moving("variance", size, 0.5, resource)
    if not training:
        return v1.nn.fused_batch_norm(y, gamma, beta, mean, variance, epsilon=1e-3, is_training=False)[0]
    y, m, v = v1.nn.fused_batch_norm(y, gamma, beta, epsilon=1e-3, is_training=True)
    update(mean, m)
    update(variance, v)
    return y


def unfused_norm(y: Any, training: bool, resource: bool = True) -> Any:
    size = int(y.shape[-1])
    gamma, beta = variable("gamma", [size], 5, 0.4, resource, 1.0), variable("beta", [size], 6, 0.3, resource)
    mean, variance = moving("mean", size, 0.1, resource), moving("variance", size, 0.5, resource)
    if not training:
        return tf.nn.batch_normalization(y, mean, variance, beta, gamma, 1e-3)
    m, v = tf.nn.moments(y, list(range(y.shape.rank - 1)))
    update(mean, m)
    update(variance, v)
    return tf.nn.batch_normalization(y, m, v, beta, gamma, 1e-3)


def small(training: bool = True, norm: Callable = fused_norm, resource: bool = True) -> Net:
    """conv, batch norm, relu; conv, bias, silu; add, relu; mean; dense; softmax."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, *SHAPE], name="x")
        with v1.variable_scope("first"):
            kernel = variable("kernel", [3, 3, 3, 8], 1, resource=resource)
            y = tf.nn.relu(norm(tf.nn.conv2d(x, kernel, 1, "SAME", name="conv"), training, resource), name="relu")
        with v1.variable_scope("second"):
            kernel = variable("kernel", [3, 3, 8, 8], 2, resource=resource)
            z = tf.nn.conv2d(y, kernel, 1, "SAME", name="conv")
            z = tf.nn.silu(tf.nn.bias_add(z, variable("bias", [8], 3, 0.2, resource), name="biased"))
        y = tf.reduce_mean(tf.nn.relu(y + z), [1, 2])
        with v1.variable_scope("head"):
            logits = tf.matmul(y, variable("kernel", [8, CLASSES], 4, resource=resource), name="product")
            logits = logits + variable("bias", [CLASSES], 7, 0.2, resource)
        probs = tf.nn.softmax(logits, name="probs")
        if not training:
            return Net(graph, x, logits, probs)
        labels = v1.placeholder(tf.int64, [None], name="labels")
        loss = v1.losses.sparse_softmax_cross_entropy(labels, logits)
        v1.summary.scalar("accuracy", tf.reduce_mean(tf.cast(tf.equal(tf.argmax(probs, 1), labels), tf.float32)))
    return Net(graph, x, logits, probs, labels, loss)
