"""The outputs of a graph whose outputs are not named: the same whether it was built with its loss or without."""

import pytest
import tensorflow as tf

import kquant

from .nets import v1


def one_hot(labels):
    return tf.one_hot(labels, 4)


LOSSES = {
    "sparse": lambda labels, logits, probs: v1.losses.sparse_softmax_cross_entropy(labels, logits),
    "one_hot": lambda labels, logits, probs: v1.losses.softmax_cross_entropy(one_hot(labels), logits),
    "by_hand": lambda labels, logits, probs: (
        -tf.reduce_mean(tf.reduce_sum(one_hot(labels) * tf.math.log(probs + 1e-8), 1))
    ),
    "of_logarithms": lambda labels, logits, probs: (
        -tf.reduce_mean(tf.reduce_sum(one_hot(labels) * tf.nn.log_softmax(logits), 1))
    ),
    "sigmoid": lambda labels, logits, probs: tf.reduce_mean(
        tf.nn.sigmoid_cross_entropy_with_logits(labels=one_hot(labels), logits=logits)
    ),
    "hinge": lambda labels, logits, probs: tf.reduce_mean(tf.nn.relu(1.0 - (2 * one_hot(labels) - 1) * logits)),
    "squares": lambda labels, logits, probs: v1.losses.mean_squared_error(one_hot(labels), logits),
}
ENDINGS = {
    "logits": lambda logits: None,
    "classes": lambda logits: tf.argmax(logits, 1, name="classes"),
    "probabilities": lambda logits: tf.nn.softmax(logits, name="probabilities"),
    "logarithms": lambda logits: (tf.argmax(log := tf.nn.log_softmax(logits, name="logarithms"), 1), tf.exp(log)),
    "both": lambda logits: (tf.argmax(logits, 1, name="classes"), tf.nn.softmax(logits, name="probabilities")),
    "best": lambda logits: tf.nn.top_k(tf.nn.softmax(logits, name="probabilities"), 2, name="best"),
}


def outputs(ending, loss=None):
    """The outputs that are found in a graph with a loss, summaries and an accuracy, or in one for evaluation."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8], name="x")
        y = tf.nn.relu(tf.matmul(x, v1.get_variable("a", [8, 6])))
        logits = tf.matmul(y, v1.get_variable("b", [6, 4]), name="logits")
        ENDINGS[ending](logits)
        if loss is not None:
            labels = v1.placeholder(tf.int64, [None], name="labels")
            found = [op.outputs[0] for op in graph.get_operations() if op.name == "probabilities"]
            total = LOSSES[loss](labels, logits, *(found or [None]))
            total += 1e-4 * sum(tf.nn.l2_loss(v) for v in v1.trainable_variables())
            v1.summary.scalar("accuracy", tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1), labels), tf.float32)))
            v1.summary.scalar("loss", total)
            v1.summary.histogram("activations", y)
    return kquant.QAT_Quantizer()(graph, training=loss is not None).outputs


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_loss_changes_nothing_about_the_outputs(ending):
    expected = outputs(ending)
    losses = [loss for loss in LOSSES if loss != "by_hand" or ending in ("probabilities", "both", "best")]
    assert {loss: outputs(ending, loss) for loss in losses} == dict.fromkeys(losses, expected)


def test_labels_that_are_made_of_the_logits_are_no_part_of_the_model():
    """As in the loss of a generator, whose images are all to be taken for real ones."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, [None, 8])
        logits = tf.matmul(
            tf.nn.relu(tf.matmul(x, v1.get_variable("a", [8, 6]))), v1.get_variable("b", [6, 1]), name="o"
        )
        tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.ones_like(logits), logits=logits))
    assert kquant.QAT_Quantizer()(graph).outputs == ("o",)
