"""How the PyTorch accuracy benchmark trains: Adam, cosine decay, flips and shifts, the float model as teacher."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch


@dataclass(frozen=True)
class Recipe:
    """A training recipe.

    The float model has learned these images by heart, so their labels say little; its probabilities (Hinton et al.
    2015, distillation) say where the quantized model departs from it, and what its blocks give says where that begins
    (Romero et al. 2015, FitNets).

    Args:
        rate: the first learning rate.
        features: the weight of the blocks' relative squared errors beside the loss of the probabilities.
        freeze_ranges: keep the ranges of the calibration.
        freeze_batch_norm: from this share of the training on; the statistics stand still before the end, so that what
            is measured is what was trained.
        shift: pixels by which an image is moved at most.
        mix: up to this share of another image is mixed into each (Zhang et al. 2018, mixup): on what it has not learned
            by heart the float model's probabilities say more.
        bound: kernels stay within the largest weights that they began with, so that no grid grows from one weight.
        batch: images in a step.
        epochs: over the training images.
    """

    rate: float
    features: float = 0.0
    freeze_ranges: bool = False
    freeze_batch_norm: float = 0.5
    shift: int = 2
    mix: float = 0.0
    bound: bool = False
    batch: int = 100
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


def mixed(x: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """A batch (n, c, h, w) with up to `share` of another of its images mixed into each."""
    if not share:
        return x
    other = x[torch.randperm(len(x), generator=generator)]
    return torch.lerp(x, other, share * torch.rand(len(x), 1, 1, 1, generator=generator))


def largest_weights(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """The kernels of the convolutions, and the largest magnitude in each output channel."""
    kernels = [p for p in model.parameters() if p.ndim == 4]
    return {p: p.detach().abs().amax((1, 2, 3), keepdim=True) for p in kernels}


_GIVEN: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()


def _keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    _GIVEN[module] = output


def keep_features(model: nn.Module) -> nn.Module:
    """Let the blocks of a float `torch_resnet` network show what they give; copies and wrapped models do so too."""
    for name in blocks(model):
        model.get_submodule(name).register_forward_hook(_keep)
    return model


def blocks(model: nn.Module) -> list[str]:
    """The names of a network's residual blocks."""
    return [name for name, module in model.named_modules() if hasattr(module, "bn2")]


def _features_apart(qmodel: nn.Module, teacher: nn.Module) -> torch.Tensor:
    """The squared errors of the blocks in the last pass, each relative to its teacher's mean square, summed."""
    pairs = [(_GIVEN[qmodel.get_submodule(n)], _GIVEN[teacher.get_submodule(n)]) for n in blocks(teacher)]
    return torch.stack([F.mse_loss(mine, theirs) / theirs.square().mean() for mine, theirs in pairs]).sum()


def finetune(
    qmodel: nn.Module, teacher: nn.Module, x: torch.Tensor, recipe: Recipe, seed: int, times: float = 1.0
) -> None:
    """Train a wrapped model in place, in an ordinary loop.

    Args:
        qmodel: calibrated; its output is logits.
        teacher: the float model, in evaluation mode; with features, both went through `keep_features`.
        x: images as the models take them.
        recipe: how.
        seed: of shuffling and augmentation.
        times: what both models' outputs are multiplied by to be logits.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * math.ceil(len(x) / recipe.batch)
    optimizer = torch.optim.Adam(qmodel.parameters(), recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    limits = largest_weights(qmodel) if recipe.bound else {}
    qmodel.train()
    if recipe.freeze_ranges:
        kquant_torch.freeze_observers(qmodel)
    done = 0
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(recipe.batch):
            if done >= recipe.freeze_batch_norm * steps:
                kquant_torch.freeze_batch_norm(qmodel)
            images = mixed(varied(x[chosen], recipe.shift, generator).contiguous(), recipe.mix, generator)
            with torch.no_grad():
                wanted = (times * teacher(images)).softmax(1)
            loss = F.cross_entropy(times * qmodel(images), wanted)
            if recipe.features:
                loss = loss + recipe.features * _features_apart(qmodel, teacher)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for kernel, limit in limits.items():
                kernel.data.copy_(kernel.data.clamp(-limit, limit))
            schedule.step()
            done += 1
    qmodel.eval()


def classes(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """The predicted class of each sample, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(250)]).numpy()
