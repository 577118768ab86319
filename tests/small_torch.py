"""A small quantized network and its file, for the tests of the artifact."""

import pathlib

import torch
from torch import nn

import kquant_torch


class Net(nn.Module):
    """Convolutions, a batch norm, a bypass, a pool and a linear layer; any height and width."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(y + self.depth(y))
        y = nn.functional.max_pool2d(nn.functional.silu(self.up(y)), 2)
        return self.head(y.mean((2, 3)))


def images(batch: int = 4, size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trained(config: list | None = None, **options) -> nn.Module:
    """The network, calibrated, with statistics that are not trivial."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.train()(images(16))
        model.norm.weight.copy_(torch.linspace(-1.5, 1.5, 8))
    data = [images(8, seed=s) for s in range(2, 5)]
    return kquant_torch.wrap(model.eval(), config, example_inputs=images(), calibration_data=data, **options).eval()


def exported(folder: pathlib.Path, config: list | None = None, **options) -> tuple[nn.Module, pathlib.Path]:
    """The trained network and its file."""
    portable = {k: options.pop(k) for k in ("portable", "target") if k in options}
    qmodel, path = trained(config, **portable), folder / "model.pt"
    kquant_torch.export_torchscript(qmodel, path, example_inputs=images(), **options)
    return qmodel, path
