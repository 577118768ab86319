"""The Keras 3 part of the digits example (`python -m examples.digits`): training, and `.tflite` files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

# Read once, when TensorFlow is imported: its errors come as exceptions too, and its log would cut the progress bar up.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

SUFFIX = ".tflite"


def load(seed: int) -> ModuleType:
    """Import the framework and start it from a seed; returns kquant's module for it."""
    with quiet():
        import keras
        import tensorflow as tf
    import kquant

    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    return kquant


def arranged(*data: Any) -> tuple[Any, ...]:
    """Images (n, 8, 8, 1) and labels, as they are."""
    return data


def small_cnn() -> Any:
    """A residual block between a stem and a wider convolution: about 55,000 weights."""
    from keras import Input, Model, layers

    def conv(x: Any, filters: int, name: str, relu: bool = True) -> Any:
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
        x = layers.BatchNormalization(name=f"{name}_norm", momentum=0.9)(x)
        return layers.ReLU(name=f"{name}_relu")(x) if relu else x

    image = Input((8, 8, 1), name="image")
    stem = conv(image, 32, "stem")
    block = conv(conv(stem, 32, "block1"), 32, "block2", relu=False)
    x = layers.ReLU(name="block_relu")(layers.Add(name="bypass")([stem, block]))
    x = layers.MaxPooling2D(name="halve")(x)
    x = conv(x, 64, "wide")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return Model(image, layers.Dense(10, name="logits")(x), name="digits")


def fit(
    model: Any, x: Any, y: Any, epochs: int, learning_rate: float, tick: Callable, controlled: bool = False
) -> None:
    """Ordinary Keras training; the quantized model gets the same, and the usual schedule of its controls."""
    import keras

    import kquant

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: tick())]
    if controlled:
        callbacks.append(kquant.QuantizationSchedule())
    steps = epochs * -(-len(x) // 32)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0, callbacks=callbacks)


def quantized(quantizer: Any, model: Any, samples: Any) -> Any:
    """The quantized model, calibrated."""
    return quantizer(model, calibration_data=samples)


def logits(model: Any, x: Any) -> Any:
    """What a Keras model or an artifact gives for images, as an array."""
    return model.predict(x, verbose=0) if hasattr(model, "predict") else model(x)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the libraries below Python write to standard error; an exception is still shown."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def write_float(model: Any, path: pathlib.Path, image: Any) -> None:
    """The float model as a `.tflite`, to compare size and time with."""
    import tensorflow as tf

    with quiet():
        path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def exported(qmodel: Any, path: pathlib.Path, x: Any) -> Any:
    """Write the integer file; returns the report of its comparison with the model."""
    import kquant

    with quiet():
        kquant.export_tflite(qmodel, path)
        return kquant.verify(qmodel, path, x)


def artifact(path: pathlib.Path) -> Callable:
    """The file as a function."""
    import kquant

    return kquant.load_artifact(path)


def fully_integer(path: pathlib.Path) -> bool:
    """What the file alone says."""
    import kquant

    return kquant.audit(path).fully_integer


def runner(path: pathlib.Path, image: Any) -> Callable[[], Any]:
    """Runs the file on one image, on one thread."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
    return interpreter.invoke
