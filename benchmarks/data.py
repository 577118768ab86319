"""The real models and data sets, from a folder that is not part of the project."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np


class MissingDataError(Exception):
    """A benchmark's input is not there; says which and how to give it."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        seeds: training runs that a mean is taken over.
        quick: fewer rounds, epochs and samples: to see that everything runs. Its numbers decide nothing.
    """

    seeds: int = 3
    quick: bool = False


class Folder:
    """A folder of models and data sets, by their names in it."""

    def __init__(self, path: str | None):
        self.path = None if path is None else pathlib.Path(path)

    def find(self, name: str) -> pathlib.Path:
        """The path of a file.

        Raises:
            MissingDataError: no folder was given, or it has no such file.
        """
        if self.path is None:
            raise MissingDataError(f"needs {name}: no folder given (--data or KQUANT_DATA)")
        if not (self.path / name).is_file():
            raise MissingDataError(f"needs {name}: not in the folder {self.path}")
        return self.path / name

    def model(self, name: str) -> Any:
        """A float Keras model."""
        import keras  # here, since the benchmarks of PyTorch run where it is not

        return keras.models.load_model(self.find(name))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an `.npz` file."""
        with np.load(self.find(name)) as file:
            return {key: file[key] for key in file.files}

    def cifar(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """JPEG CIFAR-10, `"train"` or `"test"`: images float32 0..255 (n, 32, 32, 3), labels int64."""
        file = self.arrays("cifar10_jpg_dev.npz")
        return file[f"x_{part}"].astype("float32"), file[f"y_{part}"].astype("int64")
