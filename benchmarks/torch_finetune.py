"""How the PyTorch accuracy benchmark trains: Adam, cosine decay, flips and shifts, the float model as teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch

BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """A training recipe.

    The float model has learned these images by heart, so their labels say little; its probabilities (Hinton et al.
    2015, distillation) say where the quantized model departs from it.

    Args:
        rate: the first learning rate.
        freeze_batch_norm: from this share of the training on; the statistics stand still before the end, so that what
            is measured is what was trained.
        shift: pixels by which an image is moved at most.
        epochs: over the training images.
    """

    rate: float
    freeze_batch_norm: float = 0.5
    shift: int = 2
    epochs: int = 4


def varied(x: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """A batch (n, c, h, w) with each image flipped with probability 1/2 and moved."""
    n, _, h, w = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if not shift:
        return x
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * shift + 1, (2, n), generator=generator)
    rows, columns = top[:, None] + torch.arange(h), left[:, None] + torch.arange(w)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def finetune(qmodel: nn.Module, teacher: nn.Module, x: torch.Tensor, recipe: Recipe, seed: int) -> None:
    """Train a wrapped model in place, in an ordinary loop.

    Args:
        qmodel: calibrated; its output is logits.
        teacher: the float model, in evaluation mode.
        x: images as the models take them.
        recipe: how.
        seed: of shuffling and augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * math.ceil(len(x) / BATCH)
    optimizer = torch.optim.Adam(qmodel.parameters(), recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    qmodel.train()
    done = 0
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            if done >= recipe.freeze_batch_norm * steps:
                kquant_torch.freeze_batch_norm(qmodel)
            images = varied(x[chosen], recipe.shift, generator).contiguous()
            with torch.no_grad():
                wanted = teacher(images).softmax(1)
            loss = F.cross_entropy(qmodel(images), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    qmodel.eval()


def classes(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The predicted class of each sample, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(250)]).numpy()
