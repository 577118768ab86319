"""Random models, from the same descriptions as in Keras 3, as graphs: quantize, calibrate, train, export, verify."""

import warnings

import hypothesis
import numpy as np
import tensorflow as tf
from descriptions import Description, models

import kquant

from .build import Builder, v1

VERIFIED = 48  # samples; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values


def pytest_generate_tests(metafunc):
    if "index" in metafunc.fixturenames:
        metafunc.parametrize("index", range(metafunc.config.getoption("models")))


def named(description: Description, graph) -> list[dict]:
    """The config with the names of graph ops in the place of those of layers."""
    scopes = {op.name.split("/")[0] for op in graph.get_operations()}
    entries = []
    for entry in description.config:
        names = [f"{n}*/*" for n in entry.get("op_names", ()) if n in scopes]
        entries.append({**entry, "op_names": names} if names else entry)
    return entries


def quantized(description: Description):
    """A session on the quantized graph, calibrated, and trained for one step if the description says so."""
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(description.seed)
        builder = Builder(description)
        outputs = builder.build()
        loss = tf.add_n([tf.reduce_mean(tf.square(y)) for y in outputs])
        start = v1.Session()
        start.run(v1.global_variables_initializer())
        trains = bool(graph.get_collection("trainable_variables")) and description.train
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "DoReFa clips activations")
            kquant.quantize_model(
                graph, named(description, graph), calibration_data=description.data(0), training=trains,
                session=start, inputs=[builder.x], outputs=outputs,
            )  # fmt: skip
        if trains:
            optimizer = v1.train.GradientDescentOptimizer(1e-3)
            pairs = optimizer.compute_gradients(loss)
            train = optimizer.apply_gradients([(tf.clip_by_norm(g, 1.0), v) for g, v in pairs if g is not None])
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        if trains:
            session.run(train, {builder.x: description.data(1)})
    return session


def check(description: Description, folder) -> None:
    """Assert the contract of an export on one model."""
    session = quantized(description)
    kquant.export_tflite(session, folder / "first.tflite")
    assert kquant.audit(folder / "first.tflite").fully_integer
    report = kquant.verify(session, folder / "first.tflite", description.data(2, VERIFIED))
    assert report.ok, report.problems
    kquant.export_tflite(session, folder / "second.tflite")
    assert (folder / "first.tflite").read_bytes() == (folder / "second.tflite").read_bytes()


def test_random_model_keeps_the_contract(index, tmp_path):
    @hypothesis.seed(index)
    @hypothesis.settings(
        max_examples=1,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(models(index))
    def one(description):
        check(description, tmp_path)

    one()


def test_weights_are_drawn_alike_each_time():
    """The same description gives the same graph: without that no failure could be repeated."""

    @hypothesis.seed(1)
    @hypothesis.settings(max_examples=1, deadline=None, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(models(1))
    def one(description):
        values = []
        for _ in range(2):
            with tf.Graph().as_default(), v1.Session() as session:
                Builder(description).build()
                session.run(v1.global_variables_initializer())
                values.append(session.run(v1.global_variables()))
        assert all(np.array_equal(a, b) for a, b in zip(*values, strict=True))

    one()
