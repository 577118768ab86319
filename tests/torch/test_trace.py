"""Forwards as people write them, which fx traces: constants made in them, sizes asked for, loops over splits."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch
from kquant_torch.trace import Inputs, trace
from kquant_torch.untraced import is_untraced


def exported(model, x, tmp_path, batch=6):
    """The model wrapped, trained for a step, exported and verified; the float model in its mode stays usable."""
    qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=x)
    assert not is_untraced(qmodel)
    qmodel.train()(x).square().mean().backward()
    path = tmp_path / "model.pt"
    kquant_torch.export_torchscript(qmodel.eval(), path, example_inputs=x)
    data = torch.randn(batch, *x.shape[1:])
    report = kquant_torch.verify(qmodel, path, [data])
    assert report.ok, report.problems
    return qmodel


class Constants(nn.Module):
    """Normalizes by numbers that stand in its code, and adds more of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.1]).view(1, 3, 1, 1)
        x = self.conv(x) * torch.tensor(0.7) + torch.arange(8).float() / 8
        return x + torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1) + torch.full((1, 4, 1, 1), 0.25)


def test_constants_of_the_code_are_part_of_the_graph(tmp_path):
    model, x = Constants().eval(), torch.randn(4, 3, 8, 8)
    qmodel = exported(model, x, tmp_path)
    assert set(qmodel.state_dict()) >= set(model.state_dict())
    assert not [k for k in qmodel.state_dict() if "constant_" in k]  # a float checkpoint needs none of them
    qmodel.load_state_dict(model.state_dict(), strict=True)
    for twin in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(twin(x), qmodel(x))
    with torch.no_grad():
        noise = (qmodel(x) - model(x)).square().mean() / model(x).square().mean()
    assert float(noise) < 1e-3  # 30 dB, where 8 bits give about 40


def test_the_float_model_is_left_as_it_was():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + torch.randn(3) * torch.ones(3)

    model, x = Noise(), torch.randn(4, 3)
    keep = x.clone()
    for _ in range(2):
        qmodel = kquant_torch.wrap(model, example_inputs=x)
        assert is_untraced(qmodel) and not list(model.buffers())
        assert not [name for name, _ in qmodel.named_buffers() if "constant_" in name]
    with pytest.raises(kquant_torch.UnsupportedError, match="other values at each call"):
        from kquant_torch.read import read

        read(model, x)
    assert torch.equal(x, keep)


class Sizes(nn.Module):
    """Decides by sizes, counts with them, and loops over what a split gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        torch._assert(x.shape[1] == 3, "three channels")
        assert x.dim() == 4 and len(x.shape) == 4 and x.dtype == torch.float32
        height, width = x.size()[-2:]
        rows = max((math.ceil(height / 2) - 1) * 2 + 3 - height, 0)
        if rows > 0:
            x = F.pad(x, [0, max(1 - width % 2, 0), 0, rows])
        parts = [self.mix(part) for part in self.conv(x).split(2, dim=1)]
        for i in range(x.ndim - 2):
            parts[i] = parts[i] * float(x.size(1))
        return torch.cat(parts, 1)


def test_control_flow_by_sizes(tmp_path):
    model, x = Sizes().eval(), torch.randn(4, 3, 8, 8)
    qmodel = exported(model, x, tmp_path)
    assert qmodel(x).shape == model(x).shape == (4, 6, 4, 4)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x if x.mean() > 0 else -x, "values of a tensor"),
        (lambda x: x * float(x.max()), "values of a tensor"),
        (lambda x: x if x.shape[0] > 4 else x + 1, "size of the batch"),
        (lambda x: torch.stack([row * 2 for row in x]), "samples of a batch"),
        (lambda x: x * range(x.shape[0])[-1], "size of the batch"),
    ],
)
def test_what_would_bake_values_or_the_batch_in_is_not_traced(function, reason):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    model, x = Model(), torch.randn(4, 3)
    from kquant_torch.tracer import NotTraceable

    with pytest.raises(NotTraceable, match=reason):
        trace(model, Inputs(model, x))


def test_tracing_changes_neither_inputs_nor_statistics():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            x += 1
            if x.shape[1] == 3:
                x = self.norm(x)
            return x

    model, x = InPlace(), torch.randn(4, 3)
    keep, mean = x.clone(), model.norm.running_mean.clone()
    trace(model, Inputs(model, x))
    assert torch.equal(x, keep) and torch.equal(model.norm.running_mean, mean) and model.training
