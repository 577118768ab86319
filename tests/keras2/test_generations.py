"""Both generations of Keras beside each other: nobody's environment changes, and a mixture is refused by name."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(program: str, **environment: str) -> str:
    """Run a program in a new process with this environment; gives what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        env={**env, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


NET = """
import numpy as np
def net(keras):
    layers = keras.layers
    x = keras.Input((6, 6, 2), name="x")
    y = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(x)))
    return keras.Model(x, layers.Dense(3, name="head")(layers.Flatten(name="flat")(y)), name="net")
data = np.random.default_rng(0).normal(size=(32, 6, 6, 2)).astype("f4")
"""
STATE = "import os; print(os.environ.get('TF_USE_LEGACY_KERAS'), tf.keras.layers.__name__.startswith('tf_keras'))"


@pytest.mark.parametrize("order", ["import kquant, keras", "import keras, kquant", "import kquant, keras, tf_keras"])
def test_a_process_with_a_keras_3_model_keeps_its_environment(order):
    program = f"""{NET}
{order}
import tensorflow as tf
model = net(keras)
qmodel = kquant.quantize_model(model, calibration_data=data)
{STATE}
"""
    assert run(program) == "None False"


def test_quantizing_a_tf_keras_model_leaves_tf_keras_choice_alone():
    """tf.keras is still Keras 3 afterwards, and Keras 3 models still work in the same process."""
    program = f"""{NET}
import kquant, tf_keras, keras
import tensorflow as tf
for generation in (tf_keras, keras):
    qmodel = kquant.quantize_model(net(generation), calibration_data=data)
    assert isinstance(qmodel, generation.Model)
{STATE}
"""
    assert run(program) == "None False"


@pytest.mark.parametrize("order", ["import kquant\nimport tensorflow as tf", "import tensorflow as tf\nimport kquant"])
def test_legacy_keras_under_its_name_in_tensorflow(order, tmp_path):
    program = f"""{NET}
{order}
qmodel = kquant.quantize_model(net(tf.keras), calibration_data=data)
qmodel.compile("sgd", "mse")
qmodel.fit(data, np.zeros((32, 3)), verbose=0, callbacks=[kquant.QuantizationSchedule()])
kquant.export_tflite(qmodel, r"{tmp_path}/m.tflite")
assert kquant.verify(qmodel, r"{tmp_path}/m.tflite", data).ok
qmodel.save(r"{tmp_path}/m.keras")
loaded = tf.keras.models.load_model(r"{tmp_path}/m.keras")
assert np.array_equal(loaded(data), qmodel(data))
{STATE}
"""
    assert run(program, TF_USE_LEGACY_KERAS="1") == "1 True"


@pytest.mark.parametrize("module", ["kquant.keras2", "kquant.keras2.layers", "kquant.keras2.scheme"])
def test_the_front_end_can_be_the_first_import(module):
    program = f"""
import warnings
warnings.simplefilter("error", RuntimeWarning)
import {module}
import tf_keras
print([n for n in tf_keras.saving.get_custom_objects() if n.startswith("kquant>QuantizedLayer")])
"""
    assert run(program) == "['kquant>QuantizedLayer']"


def test_a_model_of_the_other_generation_is_named():
    program = f"""{NET}
import keras, tf_keras
from kquant import keras2, keras3
for front, generation in ((keras2, keras), (keras3, tf_keras)):
    for call in (front.read, front.controlled):
        try:
            call(net(generation))
        except Exception as error:
            print(type(error).__name__, error)
"""
    lines = run(program).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("ModelError") for line in lines)
    assert all("tf_keras.Model" in line and "of Keras 3" in line for line in lines[:2])
    assert all("keras.Model" in line and "of tf_keras (Keras 2)" in line for line in lines[2:])


@pytest.mark.parametrize(("outer", "inner"), [("keras", "tf_keras"), ("tf_keras", "keras")])
def test_a_model_with_layers_of_both_is_refused(outer, inner):
    program = f"""{NET}
import {outer} as outer, {inner} as inner, kquant
class Holder(outer.layers.Layer):
    def __init__(self):
        super().__init__(name="holder")
        self.part = inner.layers.Dense(3, name="part")
    def call(self, x):
        return self.part(x)
x = outer.Input((4,))
try:
    kquant.quantize_model(outer.Model(x, Holder()(x)))
except kquant.ModelError as error:
    print(error)
"""
    message = run(program)
    names = {"keras": "Keras 3", "tf_keras": "tf_keras (Keras 2)"}
    assert "'holder'" in message
    assert f"layers of {names[outer]} only" in message
    assert f"'part', a Dense of {names[inner]}" in message
