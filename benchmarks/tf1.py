"""TensorFlow 1 graphs: the time of a training step, and the same codes and scales as through Keras 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

import kquant
from benchmarks.data import Folder, Settings
from benchmarks.statistics import interleave, ratio
from benchmarks.table import Row
from benchmarks.tf1_graph import Net, v1, written_in_tf

BATCH = 64
BAR = 1.25
BLOCK = 20  # steps timed together


def train_step(net: Net, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    """A training step with Adam and the updates of the batch norms, on one batch."""
    with net.graph.as_default():
        updates = net.graph.get_collection(v1.GraphKeys.UPDATE_OPS)
        train = v1.group(v1.train.AdamOptimizer().minimize(net.loss), *updates)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    run = session.make_callable([net.loss, train], feed_list=[net.x, net.labels])

    def step() -> object:
        return run(x, y)[0]

    for _ in range(5):
        step()
    return step


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    images, labels = folder.cifar("train")
    x, y = images[:BATCH], labels[:BATCH]
    model = folder.model("resnet8_jpgft_float.keras")
    floats, quantized = (written_in_tf(model, training=True) for _ in range(2))
    report = kquant.QAT_Quantizer()(quantized.graph)
    found = ratio(*interleave([train_step(n, x, y) for n in (floats, quantized)], 5 if settings.quick else 15, BLOCK))
    detail = f"{found}; float {1e3 * found.reference:.1f} ms, QAT {1e3 * found.other:.1f} ms; {report.ops_added} ops"
    yield Row("training step of a graph, QAT W8A8 / float", found.median, BAR, detail=detail)
