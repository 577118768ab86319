"""PyTorch: a training step of the wrapped ResNet-20 against the float one, batch 128, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch
from benchmarks.data import Folder, Settings
from benchmarks.statistics import interleave, ratio
from benchmarks.table import Row
from benchmarks.torch_resnet import ResNet20

BATCH = 128


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One step of SGD with momentum, as a function without arguments."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def run(folder: Folder, settings: Settings) -> Iterator[Row]:
    """The rows of this benchmark."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    model = ResNet20()
    sides = {"float": model}
    configs = {
        "QAT W8A8": None,
        "DoReFa W4A4G8": [
            {"q_bits": {"weight": 4, "output": 4, "gradient": 8}, "op_types": ["default"], "quantizer": "dorefa"}
        ],
    }
    for name, config in configs.items():
        sides[name] = kquant_torch.wrap(model, config, example_inputs=x[:2], calibration_data=x.mul(0.2))
    steps = [step(side, x, y) for side in sides.values()]
    for one in steps:
        one()
    seconds = interleave(steps, 2 if settings.quick else 7, 1 if settings.quick else 2)
    threads = f"{torch.get_num_threads()} threads"
    for name, times in list(zip(sides, seconds, strict=True))[1:]:
        found = ratio(seconds[0], times)
        detail = f"{found}; float {1000 * found.reference:.0f} ms, {threads}"
        bar = 1.35 if "QAT" in name else None
        yield Row(f"ResNet-20 training step, {name} / float", found.median, bar, detail=detail)
