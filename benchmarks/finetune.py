"""How the accuracy benchmark trains: a recipe per bit width, chosen on held-out training images (`tune`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import kquant

BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """A training recipe: Adam, cosine decay to zero, random flips and shifts, the float model's outputs as targets.

    The float model has learned these images by heart, so their labels say little; its probabilities (Hinton et al.
    2015, distillation at temperature 1) say where the quantized model departs from it. Batch norm statistics are
    estimated anew for the quantized weights, before and after.

    Args:
        rate: the first learning rate.
        shift: pixels by which an image is moved at most.
        freeze_batch_norm: keep the float model's statistics.
        epochs: over the training images.
    """

    rate: float
    shift: int = 0
    freeze_batch_norm: bool = False
    epochs: int = 3


STATISTICS = 2000  # training images for batch norm statistics
# The best agreement with the float model on held-out training images of those tried; `tune` tries them again.
RECIPES = {"W8A8": Recipe(1e-4), "W4A8": Recipe(3e-4), "W4A4": Recipe(6e-4, shift=2)}


class Batches:
    """Shuffled batches of images, each flipped with probability 1/2 and shifted; the same for the same seed.

    The targets are the probabilities that `teacher` gives them.
    """

    def __init__(self, x: np.ndarray, teacher: Any, shift: int, seed: int):
        self.x, self.teacher, self.shift = x, teacher, shift
        self.random = np.random.default_rng(seed)
        self.order = self.random.permutation(len(x))

    def __len__(self) -> int:
        return math.ceil(len(self.x) / BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        images = np.stack([self._vary(image) for image in self.x[chosen]])
        return images, self.teacher.predict_on_batch(images)

    def on_epoch_end(self) -> None:
        self.order = self.random.permutation(len(self.x))

    def _vary(self, image: np.ndarray) -> np.ndarray:
        if self.random.random() < 0.5:
            image = image[:, ::-1]
        if not self.shift:
            return image
        reach = self.shift
        padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        top, left = self.random.integers(0, 2 * reach + 1, 2)
        return padded[top : top + image.shape[0], left : left + image.shape[1]]


class Augmented(Batches, keras.utils.PyDataset):
    """The batches as Keras 3 takes them."""

    def __init__(self, *args: Any):
        keras.utils.PyDataset.__init__(self)
        Batches.__init__(self, *args)


def finetune(qmodel: keras.Model, teacher: keras.Model, x: np.ndarray, recipe: Recipe, seed: int) -> None:
    """Trains a quantized model in place, by the user's ordinary means: `compile` and `fit`.

    Args:
        qmodel: calibrated; its output is probabilities.
        teacher: the float model.
        x: images.
        recipe: how.
        seed: of shuffling and augmentation.
    """
    keras.utils.set_random_seed(seed)
    data = Augmented(x, teacher, recipe.shift, seed)
    kquant.reestimate_batch_norm(qmodel, x[:STATISTICS])
    if recipe.freeze_batch_norm:
        kquant.freeze_batch_norm(qmodel)
    decay = keras.optimizers.schedules.CosineDecay(recipe.rate, recipe.epochs * len(data))
    loss = keras.losses.KLDivergence()
    # Without XLA: on two cores its convolutions train slower.
    qmodel.compile(keras.optimizers.Adam(decay), loss, jit_compile=False)
    qmodel.fit(data, epochs=recipe.epochs, shuffle=False, verbose=0)
    if not recipe.freeze_batch_norm:
        kquant.reestimate_batch_norm(qmodel, x[:STATISTICS])
