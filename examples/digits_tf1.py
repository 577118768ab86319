"""A TensorFlow 1 graph, trained quantized in a session and shipped in integers.

    python -m examples.digits_tf1 [--out FOLDER] [--steps N]

A small convolutional network in `tf.nn` on the 1,797 handwritten digits of scikit-learn (nothing is downloaded): a
float checkpoint is trained as such code always was; the same graph is then built anew, quantized by one call before the
optimizer, trained on from that checkpoint, and exported from its session.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is imported

import numpy as np
import tensorflow.compat.v1 as tf

SEED, BATCH = 0, 64


def digits() -> tuple[Any, Any, Any, Any]:
    """Images (n, 8, 8, 1) in 0..1 and their labels: 1,347 to train with and 450 to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=450, stratify=labels, random_state=SEED)
    return *((a.reshape(-1, 8, 8, 1) / 16).astype("float32") for a in (x, x_test)), y, y_test


def convolution(x: Any, filters: int, name: str) -> Any:
    """Convolution, batch norm and ReLU; the moving averages are updated by ops of the collection UPDATE_OPS."""
    with tf.variable_scope(name):
        kernel = tf.get_variable("kernel", [3, 3, x.shape[-1], filters], initializer=tf.glorot_normal_initializer(SEED))
        gamma = tf.get_variable("gamma", initializer=np.ones(filters, "f4"))
        beta = tf.get_variable("beta", initializer=np.zeros(filters, "f4"))
        y, *batch = tf.nn.fused_batch_norm(tf.nn.conv2d(x, kernel, 1, "SAME"), gamma, beta)
        for statistic, start, now in zip(("mean", "variance"), (0, 1), batch, strict=True):
            first = np.full(filters, start, "f4")
            moving = tf.get_variable(statistic, initializer=first, trainable=False)
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign_sub(moving, 0.1 * (moving - now)))
        return tf.nn.relu(y)


def network() -> dict[str, Any]:
    """The model and its loss, in the default graph."""
    tf.set_random_seed(SEED)
    image = tf.placeholder(tf.float32, [None, 8, 8, 1], name="image")
    label = tf.placeholder(tf.int64, [None], name="label")
    y = tf.nn.max_pool2d(convolution(image, 16, "first"), 2, 2, "SAME")
    y = y + convolution(y, 16, "second")
    y = tf.reduce_mean(convolution(y, 32, "third"), [1, 2])
    kernel = tf.get_variable("logits/kernel", [32, 10], initializer=tf.glorot_normal_initializer(SEED))
    logits = tf.matmul(y, kernel) + tf.get_variable("logits/bias", initializer=np.zeros(10, "f4"))
    probabilities = tf.nn.softmax(logits, name="probabilities")
    loss = tf.losses.sparse_softmax_cross_entropy(label, logits)
    return {"image": image, "label": label, "probabilities": probabilities, "loss": loss}


def train(net: dict[str, Any], session: Any, op: Any, x: Any, y: Any, steps: int) -> float:
    """Runs training steps; returns the last loss."""
    random = np.random.default_rng(SEED)
    loss = float("nan")
    for _ in range(steps):
        chosen = random.integers(0, len(x), BATCH)
        loss, _ = session.run([net["loss"], op], {net["image"]: x[chosen], net["label"]: y[chosen]})
    return float(loss)


def train_op(net: dict[str, Any], rate: float) -> Any:
    """An optimizer's step, with the updates of the moving averages."""
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        return tf.train.AdamOptimizer(rate).minimize(net["loss"], global_step=tf.train.get_or_create_global_step())


def train_float(folder: pathlib.Path, x: Any, y: Any, steps: int) -> str:
    """The float model's checkpoint."""
    with tf.Graph().as_default(), tf.Session() as session:
        net = network()
        op = train_op(net, 3e-3)
        session.run(tf.global_variables_initializer())
        train(net, session, op, x, y, 4 * steps)
        saver = tf.train.Saver(tf.trainable_variables() + statistics())
        return str(saver.save(session, str(folder / "float.ckpt")))


def statistics() -> list[Any]:
    """The variables that hold moving averages."""
    return [v for v in tf.global_variables() if v.op.name.endswith(("/mean", "/variance"))]


def run(out: pathlib.Path, steps: int) -> float:
    """Trains, quantizes, trains on, exports and verifies; returns the accuracy of the file."""
    import kquant

    x, x_test, y, y_test = digits()
    checkpoint = train_float(out, x, y, steps)
    with tf.Graph().as_default() as graph, tf.Session() as session:
        net = network()
        restored = tf.train.Saver(tf.trainable_variables() + statistics())
        restored.restore(session, checkpoint)
        # One call, before the optimizer. The session has the weights that calibration needs, and goes on from here.
        print(kquant.QAT_Quantizer()(graph, calibration_data=x[:200], session=session))
        known = set(tf.global_variables())
        op = train_op(net, 3e-4)
        session.run(tf.variables_initializer([v for v in tf.global_variables() if v not in known]))
        print(f"loss after {steps} steps: {train(net, session, op, x, y, steps):.4f}")
        report = kquant.export_tflite(session, out / "digits.tflite", inputs=["image"], outputs=["probabilities"])
        parity = kquant.verify(session, out / "digits.tflite", x_test)
    accuracy = float((kquant.load_artifact(out / "digits.tflite")(x_test).argmax(-1) == y_test).mean())
    print(f"fully integer: {report.fully_integer}, {report.file_bytes} bytes, accuracy {accuracy:.1%}")
    print(f"max_lsb {parity.max_lsb:.3f}, as trained: {parity.ok}")
    return accuracy


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits_tf1", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("artifacts/tf1"))
    parser.add_argument("--steps", type=int, default=150, help="of quantized training; the float model gets four times")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps: expected 1 or more. Received: {args.steps}")
    args.out.mkdir(parents=True, exist_ok=True)
    run(args.out, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
