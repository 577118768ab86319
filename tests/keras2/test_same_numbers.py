"""The same weights and ranges through Keras 3 and through tf_keras: the same artifact, byte by byte."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {
    "qat": "None",
    "qat_w4a4": "[{'q_bits': 4, 'op_types': ['default']}]",
    "naive": "[{'q_bits': 8, 'op_types': ['default'], 'quantizer': 'naive'}]",
    "dorefa": "[{'q_bits': {'weight': 3, 'output': 4}, 'op_types': ['default'], 'quantizer': 'dorefa'}]",
}
PROGRAM = """
import sys, numpy as np, kquant, {package} as keras
L = keras.layers
rng = np.random.default_rng(5)
x = keras.Input((12, 12, 3), name="x")
y = L.ReLU(name="r1")(L.BatchNormalization(name="n1")(L.Conv2D(8, 3, use_bias=False, name="c1")(x)))
z = L.DepthwiseConv2D(3, padding="same", activation="relu", name="d1")(y)
y = L.Add(name="sum")([y, L.Conv2D(8, 1, name="c2")(z)])
y = L.Concatenate(name="both")([y, L.Activation("tanh", name="t")(L.Conv2D(4, 1, name="c3")(y))])
y = L.GlobalAveragePooling2D(name="pool")(L.Conv2DTranspose(6, 2, strides=2, name="up")(y))
model = keras.Model(x, L.Dense(5, activation="softmax", name="head")(y), name="net")
for name in ("c1", "n1", "d1", "c2", "c3", "up", "head"):
    layer = model.get_layer(name)
    layer.set_weights([rng.uniform(0.2, 1.5, w.shape) if i == 3 else rng.normal(0, 0.4, w.shape)
                       for i, w in enumerate(layer.get_weights())])
qmodel = kquant.quantize_model(model, {config})
for layer in qmodel.layers:
    if type(layer).__name__ == "FakeQuantize" and layer.fixed is None:
        for site in range(layer.sites):
            layer.set_range(0.0 if layer.nonneg else -rng.uniform(0.5, 2), rng.uniform(0.5, 3), site)
kquant.export_tflite(qmodel, sys.argv[1] + ".tflite")
np.savez(sys.argv[1] + ".npz", **kquant.export_state(qmodel))
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_both_generations_give_the_same_artifact(name, tmp_path):
    for package in ("keras", "tf_keras"):
        program = PROGRAM.format(package=package, config=CONFIGS[name])
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / package)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "keras.npz") as one, np.load(tmp_path / "tf_keras.npz") as other:
        assert one.files == other.files
        assert len(one.files) > 40
        for key in one.files:
            assert one[key].dtype == other[key].dtype
            assert one[key].tobytes() == other[key].tobytes(), key
    assert (tmp_path / "keras.tflite").read_bytes() == (tmp_path / "tf_keras.tflite").read_bytes()
