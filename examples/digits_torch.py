"""The PyTorch part of the digits example (`python -m examples.digits --framework torch`): TorchScript files."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

SUFFIX = ".pt"


def load(seed: int) -> ModuleType:
    """Import the framework and start it from a seed; returns kquant's module for it."""
    import torch

    import kquant_torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # these images are too small to share out
    return kquant_torch


def arranged(x: Any, y: Any, x_test: Any, y_test: Any) -> tuple[Any, ...]:
    """Images as tensors (n, 1, 8, 8), labels as they are."""
    import torch

    return (*(torch.from_numpy(v.transpose(0, 3, 1, 2).copy()) if v.ndim == 4 else v for v in (x, y, x_test, y_test)),)


def small_cnn() -> Any:
    """A residual block between a stem and a wider convolution: about 55,000 weights."""
    import torch
    from torch import nn

    def conv(inputs: int, filters: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, filters, 3, padding=1, bias=False)

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stem_norm = conv(1, 32), nn.BatchNorm2d(32)
            self.block1, self.block1_norm = conv(32, 32), nn.BatchNorm2d(32)
            self.block2, self.block2_norm = conv(32, 32), nn.BatchNorm2d(32)
            self.wide, self.wide_norm = conv(32, 64), nn.BatchNorm2d(64)
            self.halve, self.pool = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
            self.logits = nn.Linear(64, 10)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            stem = torch.relu(self.stem_norm(self.stem(image)))
            x = torch.relu(self.block1_norm(self.block1(stem)))
            x = torch.relu(stem + self.block2_norm(self.block2(x)))
            x = torch.relu(self.wide_norm(self.wide(self.halve(x))))
            return self.logits(self.pool(x).flatten(1))

    return Digits()


def fit(
    model: Any, x: Any, y: Any, epochs: int, learning_rate: float, tick: Callable, controlled: bool = False
) -> None:
    """An ordinary training loop; the quantized model gets the same, and the usual schedule of its controls."""
    import torch

    import kquant_torch

    labels = torch.from_numpy(y)
    batches = -(-len(x) // 32)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    model.train()
    for epoch in range(epochs):
        if controlled and 2 * epoch >= epochs:
            kquant_torch.freeze_batch_norm(model)
        if controlled and 4 * epoch >= 3 * epochs:
            kquant_torch.freeze_observers(model)
        for chosen in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
            optimizer.step()
            decay.step()
        tick()
    model.eval()


def quantized(quantizer: Any, model: Any, samples: Any) -> Any:
    """The quantized model, calibrated. A quantizer changes the model that it is given, so it gets a copy."""
    import copy

    return quantizer(copy.deepcopy(model), calibration_data=samples)


def logits(model: Any, x: Any) -> Any:
    """What a module or an artifact gives for images, as an array."""
    import torch

    with torch.no_grad():
        return model(x).numpy()


def write_float(model: Any, path: pathlib.Path, image: Any) -> None:
    """The float model as TorchScript, to compare size and time with."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        torch.jit.trace(model, image).save(str(path))


def exported(qmodel: Any, path: pathlib.Path, x: Any) -> Any:
    """Write the integer file; returns the report of its comparison with the model."""
    import kquant_torch

    kquant_torch.export_torchscript(qmodel, path, example_inputs=x[:2])
    return kquant_torch.verify(qmodel, path, x)


def artifact(path: pathlib.Path) -> Callable:
    """The file as a function: torch alone runs it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        return torch.jit.freeze(torch.jit.load(str(path)).eval())


def fully_integer(path: pathlib.Path) -> bool:
    """What the file alone says; a file that kquant did not write is float here."""
    import kquant_torch

    try:
        return kquant_torch.audit(path).fully_integer
    except kquant_torch.ArtifactError:
        return False


def runner(path: pathlib.Path, image: Any) -> Callable[[], Any]:
    """Runs the file on one image, on one thread."""
    import torch

    function = artifact(path)
    with torch.no_grad():
        for _ in range(5):  # the first runs compile
            function(image)

    def once() -> None:
        with torch.no_grad():
            function(image)

    return once
