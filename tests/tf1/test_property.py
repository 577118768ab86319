"""Random models, from the same descriptions as in Keras 3, as graphs: quantize, calibrate, train, export, verify."""

import warnings
from collections import Counter

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from descriptions import Description, models
from occurred import FULL, check_occurred

import kquant
from kquant.core.int8_spec import ROWS
from kquant.tf1 import marks
from kquant.tflite.export import integer_model

from .build import Builder, v1

VERIFIED = 48  # samples; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values
SEEN: Counter = Counter()
# Rows that a graph of single ops does not hold, and why.
CANNOT_OCCUR = {
    "recurrent": "a loop has no row in a graph",
    "prelu": "it is written in other ops",
    "parameter": "the descriptions have no arrays beside layers",
}


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


def occurrences(session) -> set[tuple[str, str | int]]:
    """What a quantized graph holds: table rows, bits of weights and activations, quantizers."""
    integer = integer_model(session)
    ops = [op for op in integer.ops if op.parts]
    found: set = {("row", part.kind) for op in ops for part in op.parts} - {("row", "fake_quant")}
    found |= {("row", "identity") for op in session.graph.get_operations() if op.name.startswith(("dropout", "noise"))}
    found |= {("activation bits", integer.tensors[op.outputs[0]].affine.bits) for op in ops}
    kernels = [marks.of(op, marks.WEIGHT) for op in session.graph.get_operations() if op.type == "Identity"]
    found |= {("weight bits", mark["bits"]) for mark in kernels if mark}
    return found | {("quantizer", mark["quantizer"]) for mark in kernels if mark}


def check(description: Description, folder) -> set[tuple[str, str | int]]:
    """Assert the contract of an export on one model; returns what occurred in it."""
    session = quantized(description)
    try:
        kquant.export_tflite(session, folder / "first.tflite")
    except kquant.RangeError as refusal:
        assert refusal.where.startswith("tensor ") and not (folder / "first.tflite").exists()
        return {("refused", "by the name of the tensor")}
    assert kquant.audit(folder / "first.tflite").fully_integer
    report = kquant.verify(session, folder / "first.tflite", description.data(2, VERIFIED))
    assert report.ok, report.problems
    kquant.export_tflite(session, folder / "second.tflite")
    assert (folder / "first.tflite").read_bytes() == (folder / "second.tflite").read_bytes()
    return occurrences(session)


def test_random_model_keeps_the_contract(index, tmp_path, record_property):
    kept: list[set] = []

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
        kept.append(check(description, tmp_path))

    one()
    SEEN.update(["models", *kept[-1]])
    record_property("occurred", sorted(kept[-1], key=str))


def test_everything_occurred(pytestconfig):
    """In the full run each row, bit width and quantizer occurred at least five times, or a reason is given."""
    if SEEN["models"] < FULL:
        pytest.skip(f"asked of at least {FULL} models in one process; {SEEN['models']} passed here")
    check_occurred(SEEN, [kind for kind in ROWS if kind not in CANNOT_OCCUR])


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
