"""How the accuracy benchmark trains: a recipe per bit width, chosen on held-out training images (`tune`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import kquant


@dataclass(frozen=True)
class Recipe:
    """A training recipe: Adam, cosine decay to zero, random flips and shifts, the float model's outputs as targets.

    The float model has learned these images by heart, so their labels say little; its probabilities (Hinton et al.
    2015, distillation at temperature 1) say where the quantized model departs from it, and what its residual sums give
    says where that begins (Romero et al. 2015, FitNets). Batch norm statistics are estimated anew for the quantized
    weights, before and after.

    Args:
        rate: the first learning rate.
        features: the weight of the sums' relative squared errors beside the loss of the probabilities.
        freeze_ranges: keep the ranges of the calibration.
        shift: pixels by which an image is moved at most.
        freeze_batch_norm: keep the float model's statistics.
        batch: images in a step.
        epochs: over the training images.
    """

    rate: float
    features: float = 0.0
    freeze_ranges: bool = False
    shift: int = 0
    freeze_batch_norm: bool = False
    batch: int = 64
    epochs: int = 3


STATISTICS = 2000  # training images for batch norm statistics
# Nearest to the float model on held-out training images of those tried; `tune` tries most of them again.
RECIPES = {
    "W8A8": Recipe(1e-4),
    "W4A8": Recipe(7e-4, features=3.0, batch=32),
    "W4A4": Recipe(1e-3, features=3.0, freeze_ranges=True, shift=2),
}
SUMS = ("activation_2", "activation_4", "activation_6")  # the ReLUs behind ResNet8's residual sums


class Batches:
    """Shuffled batches of images, each flipped with probability 1/2 and shifted; the same for the same seed.

    The targets are what `teacher` gives for them: one array, or a tuple of them.
    """

    def __init__(self, x: np.ndarray, teacher: Any, recipe: Recipe, seed: int):
        self.x, self.teacher, self.shift, self.batch = x, teacher, recipe.shift, recipe.batch
        self.random = np.random.default_rng(seed)
        self.order = self.random.permutation(len(x))

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        chosen = self.order[index * self.batch : (index + 1) * self.batch]
        images = np.stack([self._vary(image) for image in self.x[chosen]])
        targets = self.teacher.predict_on_batch(images)
        return images, tuple(targets) if isinstance(targets, list) else targets

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


def with_features(qmodel: Any, teacher: Any, framework: Any) -> tuple[Any, Any]:
    """ResNet8, quantized and float, each with its residual sums as further outputs, on the same layers.

    Args:
        qmodel, teacher: the models.
        framework: `keras` or `tf_keras`.
    """
    pairs = ((qmodel, "_quantizer"), (teacher, ""))
    outputs = [[m.outputs[0], *(m.get_layer(name + end).output for name in SUMS)] for m, end in pairs]
    return framework.Model(qmodel.inputs, outputs[0]), framework.Model(teacher.inputs, outputs[1])


def relative_error(wanted: Any, given: Any) -> Any:
    """The squared error as a share of the mean square of what is wanted."""
    return tf.reduce_mean(tf.square(given - wanted)) / tf.reduce_mean(tf.square(wanted))


def losses(recipe: Recipe, framework: Any) -> dict[str, Any]:
    """What `compile` takes for a recipe: the divergence from the teacher's probabilities, and of the features."""
    divergence = framework.losses.KLDivergence()
    if not recipe.features:
        return {"loss": divergence}
    weights = [1.0] + [recipe.features] * len(SUMS)
    return {"loss": [divergence] + [relative_error] * len(SUMS), "loss_weights": weights}


def prepare(qmodel: Any, teacher: Any, x: np.ndarray, recipe: Recipe, framework: Any) -> tuple[Any, Any]:
    """What is to be trained and what gives its targets, with the statistics and controls of the recipe set."""
    kquant.reestimate_batch_norm(qmodel, x[:STATISTICS])
    if recipe.freeze_ranges:
        kquant.freeze_observers(qmodel)
    if recipe.freeze_batch_norm:
        kquant.freeze_batch_norm(qmodel)
    return with_features(qmodel, teacher, framework) if recipe.features else (qmodel, teacher)


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
    student, teacher = prepare(qmodel, teacher, x, recipe, keras)
    data = Augmented(x, teacher, recipe, seed)
    decay = keras.optimizers.schedules.CosineDecay(recipe.rate, recipe.epochs * len(data))
    # Without XLA: on two cores its convolutions train slower.
    student.compile(keras.optimizers.Adam(decay), **losses(recipe, keras), jit_compile=False)
    student.fit(data, epochs=recipe.epochs, shuffle=False, verbose=0)
    if not recipe.freeze_batch_norm:
        kquant.reestimate_batch_norm(qmodel, x[:STATISTICS])
