"""Predicted classes, of a Keras model and of the file that it exports to."""

from __future__ import annotations

import pathlib
import tempfile

import keras
import numpy as np

import kquant
from kquant.tflite.run import Artifact

BATCH = 250


def classes(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """The predicted class of each sample, shape (n,), in inference mode and without XLA."""
    parts = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
    return np.concatenate([np.asarray(model(part, training=False)).argmax(-1) for part in parts])


def exported_classes(qmodel: keras.Model, x: np.ndarray) -> np.ndarray:
    """The predicted class of each sample by the exported file, which must be fully integer."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.tflite"
        kquant.export_tflite(qmodel, path)
        return kquant.load_artifact(path)(x).argmax(-1)


def file_classes(data: bytes, x: np.ndarray) -> np.ndarray:
    """The predicted class of each sample by the bytes of a file."""
    return Artifact(data)(x).argmax(-1)
