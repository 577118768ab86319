"""TensorFlow 1 graphs: the time of a training step, the same numbers as through Keras 3, and accuracy."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kquant
from benchmarks.accuracy import CALIBRATION, TRAINED_DROPS, compared
from benchmarks.data import Folder, Settings
from benchmarks.finetune import RECIPES, STATISTICS, Batches
from benchmarks.measure import BATCH as MEASURED
from benchmarks.measure import classes
from benchmarks.statistics import interleave, mean_difference, paired_difference, ratio
from benchmarks.table import Row
from benchmarks.tf1_graph import Net, v1, written_in_tf
from kquant import keras3, tf1

BATCH = 64
STEP_BAR = 1.25
BLOCK = 20  # steps timed together
MODELS = ("resnet8_jpgft_float.keras", "mlperf_kws_dscnn_float.keras", "arm_ds_cnn_s_float.keras")
PARTS = ("/kernel/codes", "/kernel/scale", "/bias/codes", "/bias/scale", "/scale", "/zero_point", "/bits")


def session_on(net: Net) -> Any:
    """A session with initialized variables."""
    with net.graph.as_default():
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    return session


def predicted(session: Any, net: Net, x: np.ndarray) -> np.ndarray:
    """The predicted class of each sample by a graph."""
    parts = [session.run(net.outputs, {net.x: x[i : i + MEASURED]}) for i in range(0, len(x), MEASURED)]
    return np.concatenate(parts).argmax(-1)


def exported(session: Any, x: np.ndarray) -> np.ndarray:
    """The predicted class of each sample by the exported file, which must be fully integer."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.tflite"
        kquant.export_tflite(session, path)
        return kquant.load_artifact(path)(x).argmax(-1)


# -- the training step ------------------------------------------------------------------------------------------------


def train_step(net: Net, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    """A training step with Adam and the updates of the batch norms, on one batch."""
    with net.graph.as_default():
        updates = net.graph.get_collection(v1.GraphKeys.UPDATE_OPS)
        train = v1.group(v1.train.AdamOptimizer().minimize(net.loss), *updates)
    session = session_on(net)
    run = session.make_callable([net.loss, train], feed_list=[net.x, net.labels])

    def step() -> object:
        return run(x, y)[0]

    for _ in range(5):
        step()
    return step


def speed(folder: Folder, settings: Settings) -> Iterator[Row]:
    """A training step of ResNet8 against the float graph's."""
    images, labels = folder.cifar("train")
    x, y = images[:BATCH], labels[:BATCH]
    floats, quantized = (written_in_tf(folder.model(MODELS[0]), training=True) for _ in range(2))
    report = kquant.QAT_Quantizer()(quantized.graph)
    found = ratio(*interleave([train_step(n, x, y) for n in (floats, quantized)], 5 if settings.quick else 15, BLOCK))
    added = f"{report.ops_added} ops and {report.variables_added} variables added"
    detail = f"{found}; float {1e3 * found.reference:.1f} ms, QAT {1e3 * found.other:.1f} ms; {added}"
    yield Row("training step of a graph, QAT W8A8 / float", found.median, STEP_BAR, detail=detail)


# -- the same numbers -------------------------------------------------------------------------------------------------


def layer_of(name: str, model: keras.Model) -> str:
    """The name in Keras of a tensor of the graph that `written_in_tf` made of a model."""
    if name.split("/")[0] == "x":
        return "/".join([model.inputs[0].name, *name.split("/")[1:]])
    layer = name.split("/")[0]
    return f"{layer}_activation" if name.endswith("/Softmax") and layer == "dense" else layer


def by_layer(state: dict[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The arrays of a state under the names of layers."""
    found = {}
    for key, value in state.items():
        part = next(p for p in PARTS if key.endswith(p))
        found[rename(key.removesuffix(part)) + part] = value
    return found


def same_numbers(folder: Folder) -> Iterator[Row]:
    """The same weights and ranges through Keras 3 and a graph: codes, scales, zero points and biases."""
    for name in MODELS:
        model = folder.model(name)
        samples = np.random.default_rng(0).normal(size=(64, *model.input_shape[1:])).astype("float32")
        qmodel = kquant.quantize_model(model, calibration_data=samples)
        net = written_in_tf(model, training=False)
        session = session_on(net)
        kquant.QAT_Quantizer()(net.graph, samples, training=False, session=session)
        ranges = {op.inputs[0]: op.attrs["quantizer"] for op in keras3.read(qmodel).ops if op.kind == "fake_quant"}
        for op in tf1.read(session).ops:
            if op.kind == "fake_quant" and op.attrs["site"] is not None:
                quantizer = op.attrs["quantizer"]
                low, high = ranges[layer_of(op.inputs[0], model)].range()
                quantizer.set_range(float(low), float(high), op.attrs["site"])
                quantizer.values.commit()
        theirs = by_layer(kquant.export_state(qmodel), str)
        ours = by_layer(kquant.export_state(session), lambda key, model=model: layer_of(key, model))
        differ = sorted(set(ours) ^ set(theirs))
        differ += [k for k in ours if k in theirs and ours[k].tobytes() != theirs[k].tobytes()]
        detail = f"of {len(theirs)} arrays of codes, scales, zero points and biases {' '.join(differ[:4])}"
        yield Row(f"{name.split('.')[0]}: arrays of a graph that differ from Keras 3", len(differ), 0.0, detail=detail)


# -- accuracy ---------------------------------------------------------------------------------------------------------


def calibrated(
    name: str, model: keras.Model, samples: np.ndarray, x: np.ndarray, y: np.ndarray, bar: float
) -> Iterator[Row]:
    """A calibrated evaluation graph's file against the float model."""
    net = written_in_tf(model, training=False)
    session = session_on(net)
    kquant.QAT_Quantizer()(net.graph, samples, training=False, session=session)
    yield compared(f"{name} W8A8 artifact of a graph", classes(model, x), exported(session, x), y, bar)


def trained(folder: Folder, settings: Settings) -> Iterator[Row]:
    """ResNet8 after three epochs in a session, as `accuracy` trains it on Keras 3: the mean over seeds."""
    model = folder.model(MODELS[0])
    images, _ = folder.cifar("train")
    x, y = folder.cifar("test")
    floats = classes(model, x) == y
    found = np.array([_one_training(model, images, x, seed, settings.quick) == y for seed in range(settings.seeds)])
    difference = mean_difference(floats, found)
    runs = " ".join(f"{100 * right.mean():.2f}" for right in found)
    detail = f"difference {difference}; runs {runs}, float {100 * floats.mean():.2f}"
    name = "ResNet8 W8A8 artifact of a graph after training: mean drop"
    yield Row(name, -difference.points, TRAINED_DROPS["W8A8"], detail=detail)


def _one_training(model: keras.Model, images: np.ndarray, x: np.ndarray, seed: int, quick: bool) -> np.ndarray:
    """The classes that a file has after training: Adam, cosine decay to zero, the float model's outputs as targets."""
    recipe, net = RECIPES["W8A8"], written_in_tf(model, training=True)
    data = Batches(images, model, recipe, seed)
    epochs = 1 if quick else recipe.epochs
    with net.graph.as_default():  # the loss reads what the quantizer then quantizes
        targets = v1.placeholder(tf.float32, net.outputs.shape)
        loss = -tf.reduce_mean(tf.reduce_sum(targets * tf.math.log(tf.maximum(net.outputs, 1e-7)), -1))
    session = session_on(net)
    kquant.QAT_Quantizer()(net.graph, images[:CALIBRATION], session=session, outputs=[net.outputs])
    with net.graph.as_default():
        known = set(v1.global_variables())
        step = v1.train.get_or_create_global_step()
        rate = v1.train.cosine_decay(recipe.rate, step, epochs * len(data))
        with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
            train = v1.train.AdamOptimizer(rate).minimize(loss, global_step=step)
        session.run(v1.variables_initializer([v for v in v1.global_variables() if v not in known]))
    kquant.reestimate_batch_norm(session, images[:STATISTICS])
    for _ in range(epochs):
        for index in range(len(data)):
            batch, wanted = data[index]
            session.run(train, {net.x: batch, targets: wanted})
        data.on_epoch_end()
    kquant.reestimate_batch_norm(session, images[:STATISTICS])
    return exported(session, x)


def accuracy(folder: Folder) -> Iterator[Row]:
    """The three models, calibrated."""
    images, _ = folder.cifar("train")
    held = folder.cifar("test")
    model = folder.model(MODELS[0])
    yield from calibrated("ResNet8", model, images[:CALIBRATION], *held, bar=97.0)
    net = written_in_tf(model, training=False)
    session = session_on(net)
    kquant.QAT_Quantizer()(net.graph, images[:CALIBRATION], training=False, session=session)
    right = [f(session, *args) == held[1] for f, args in ((predicted, (net, held[0])), (exported, held[:1]))]
    found = paired_difference(*right)
    yield Row("ResNet8 graph and its artifact, accuracy apart by", abs(found.points), detail=str(found))
    kws = folder.arrays("kws01.npz")
    x = ((kws["x_test_int8"].astype("float32") - float(kws["zero_point"])) * float(kws["scale"])).astype("float32")
    yield from calibrated("DS-CNN kws01", folder.model(MODELS[1]), x[:100], x[100:], kws["y_test"][100:], bar=98.5)
    arm = folder.arrays("arm_kws_mfcc_dev300.npz")
    x, y = arm["mfcc"], arm["y"]
    yield from calibrated("ARM DS-CNN-S", folder.model(MODELS[2]), x[:100], x[100:], y[100:], bar=97.0)


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    yield from same_numbers(folder)
    yield from speed(folder, settings)
    yield from accuracy(folder)
    yield from trained(folder, settings)
