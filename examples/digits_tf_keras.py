"""A tf_keras model that tfmot leaves half in float, in integers: the same code with another scheme.

    python -m examples.digits_tf_keras [--out FOLDER] [--epochs N]

A dense network with batch norm on the 1,797 handwritten digits of scikit-learn (nothing is downloaded) is trained in
float, then fine-tuned three times: quantized by tfmot, by `kquant.quantize_model`, and by tfmot's own API with kquant's
scheme and a config of its own for one layer. `float ops` counts the ops of the file that compute in float32.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import warnings
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is imported

SEED = 0


@dataclass(frozen=True)
class Row:
    """A line of the table: accuracy of the file on the test images, its bytes, and the ops that stayed float."""

    label: str
    accuracy: float
    size: int
    float_ops: int


def digits() -> tuple[Any, Any, Any, Any]:
    """Images (n, 64) in 0..1 and their labels: 1,347 to train with and 450 to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=450, stratify=labels, random_state=SEED)
    return (x / 16).astype("float32"), y, (x_test / 16).astype("float32"), y_test


def dense_net() -> Any:
    """Dense, batch norm and ReLU, three times."""
    from tf_keras import Input, Model, layers

    image = x = Input((64,), name="image")
    for i, units in enumerate((128, 64, 32)):
        x = layers.Dense(units, use_bias=False, name=f"dense{i}")(x)
        x = layers.BatchNormalization(name=f"norm{i}", momentum=0.9)(x)
        x = layers.ReLU(name=f"relu{i}")(x)
    return Model(image, layers.Dense(10, name="logits")(x), name="digits")


def fit(model: Any, x: Any, y: Any, epochs: int, rate: float) -> Any:
    """Ordinary tf_keras training; a quantized model gets the same."""
    import tf_keras

    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.Adam(rate), loss)
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0)
    return model


def by_tfmot(model: Any, path: pathlib.Path, train: Any) -> None:
    """Quantized, trained and exported as tfmot's documentation says."""
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot

    qmodel = train(tfmot.quantization.keras.quantize_model(model))
    converter = tf.lite.TFLiteConverter.from_keras_model(qmodel)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Statistics for quantized inputs were expected")
        path.write_bytes(converter.convert())


def by_kquant(model: Any, path: pathlib.Path, train: Any, samples: Any) -> Any:
    """The same in kquant; returns the trained model, which the file can be verified against."""
    import kquant

    qmodel = train(kquant.quantize_model(model, calibration_data=samples))
    kquant.export_tflite(qmodel, path)
    return qmodel


def by_tfmots_api(model: Any, path: pathlib.Path, train: Any, samples: Any) -> Any:
    """tfmot's annotations with our scheme: four-bit weights in one layer, eight in the others."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    import kquant
    from kquant import keras2

    own = {"dense1": keras2.QATQuantizeConfig(weight_bits=4)}
    api = tfmot.quantization.keras
    annotated = tf_keras.models.clone_model(
        model, clone_function=lambda layer: api.quantize_annotate_layer(layer, own.get(layer.name))
    )
    annotated.set_weights(model.get_weights())
    qmodel = train(api.quantize_apply(annotated, scheme=keras2.QuantizeScheme(calibration_data=samples)))
    kquant.export_tflite(qmodel, path)
    return qmodel


def row(label: str, path: pathlib.Path, x: Any, y: Any) -> Row:
    """What a file is worth."""
    import kquant

    predicted = kquant.load_artifact(path)(x).argmax(-1)
    return Row(label, float((predicted == y).mean()), path.stat().st_size, len(kquant.audit(path).float_ops))


def run(out: pathlib.Path, epochs: int) -> list[Row]:
    """Trains the float model, quantizes it in three ways, and prints the table."""
    import tf_keras

    import kquant
    from kquant import keras2  # noqa: F401  imports tfmot, and leaves the environment and tf.keras as they are

    tf_keras.utils.set_random_seed(SEED)
    x, y, x_test, y_test = digits()
    model = fit(dense_net(), x, y, 4 * epochs, 1e-3)
    accuracy = float((model.predict(x_test, verbose=0).argmax(-1) == y_test).mean())
    print(f"float model: {accuracy:.1%} of {len(y_test)} test images")

    def train(qmodel: Any) -> Any:
        return fit(qmodel, x, y, epochs, 1e-4)

    paths = [out / name for name in ("tfmot.tflite", "kquant.tflite", "kquant_by_tfmots_api.tflite")]
    by_tfmot(model, paths[0], train)
    verified = [by_kquant(model, paths[1], train, x[:200]), by_tfmots_api(model, paths[2], train, x[:200])]
    labels = ("tfmot", "kquant", "kquant, tfmot's API")
    rows = [row(label, path, x_test, y_test) for label, path in zip(labels, paths, strict=True)]
    print(f"{'quantized by':<20} {'accuracy':>8} {'bytes':>7} {'float ops':>9}")
    for line in rows:
        print(f"{line.label:<20} {line.accuracy:>8.1%} {line.size:>7} {line.float_ops:>9}")
    for qmodel, path in zip(verified, paths[1:], strict=True):
        parity = kquant.verify(qmodel, path, x_test)
        print(f"{path.name}: max_lsb {parity.max_lsb:.3f}, as trained: {parity.ok}")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits_tf_keras", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("artifacts/tf_keras"))
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning; the float model gets four times as many")
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs: expected 1 or more. Received: {args.epochs}")
    args.out.mkdir(parents=True, exist_ok=True)
    run(args.out, args.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
