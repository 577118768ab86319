"""A model whose control flow fx cannot trace: its layers train quantized, and the plan says what stays float."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch


class Gate(nn.Module):
    """Adds a branch only if the mean of the features is positive."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.branch, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        if x.mean() > 0:
            x = x + F.relu(self.branch(x))
        return self.head(x.mean((2, 3)))


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def line_of(text):
    """The number of the first line of this file with that text."""
    with open(__file__, encoding="utf-8") as file:
        return next(i for i, line in enumerate(file, 1) if text in line)


def test_the_plan_names_functional_calls_with_file_and_line():
    plan = kquant_torch.plan(Gate(), example_inputs=images())
    kinds = {row.layer: row.weight for row in plan.rows}
    assert kinds["conv"] == kinds["branch"] == kinds["head"] == "qat 8 bit"
    reasons = " | ".join(plan.floats.values())
    for text, function in (("if x.mean() > 0", "mean"), ("x + F.relu", "relu"), ("x + F.relu", "add")):
        assert f"{function} at test_untraced.py:{line_of(text)}, in code that torch.fx cannot trace" in reasons


@pytest.mark.parametrize("kind", ["naive", "qat", "dorefa"])
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_it_is_wrapped_module_by_module(kind):
    model, x = Gate(), images()
    config = [{"q_bits": 4, "op_types": ["default"], "quantizer": kind}]
    qmodel = kquant_torch.wrap(model, config, example_inputs=x, calibration_data=x)
    assert type(model.conv) is nn.Conv2d and isinstance(qmodel, Gate)
    qmodel.eval()
    before = qmodel(x).detach()
    levels = torch.unique(qmodel.act(torch.linspace(0, 9, 500)))
    assert len(levels) == 16  # 4 bits, and the hook on the module quantizes
    qmodel.train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.1)
    qmodel(x).square().sum().backward()
    assert qmodel.branch.weight.grad.abs().sum() > 0
    optimizer.step()
    twin = copy.deepcopy(qmodel).eval()
    assert torch.equal(twin(x), qmodel.eval()(x)) and not torch.equal(twin(x), before)
    qmodel.load_state_dict(model.state_dict(), strict=True)
    twin.load_state_dict(qmodel.state_dict(), strict=True)


def test_calibrated_it_is_close_to_the_float_model():
    model, x = Gate().eval(), images()
    qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=[x[:2], x[2:]]).eval()
    with torch.no_grad():
        noise = (qmodel(x) - model(x)).square().mean() / model(x).square().mean()
    assert float(noise) < 1e-3  # 30 dB, where 8 bits give about 40


def test_it_is_not_exported_in_silence():
    from kquant_torch.read import read

    qmodel = kquant_torch.wrap(Gate(), example_inputs=images(), calibration_data=images())
    with pytest.raises(kquant_torch.UnsupportedError, match="an artifact has no control flow"):
        read(qmodel)


def test_a_model_that_reads_its_mode_is_not_traced_as_if_it_did_not():
    class Mode(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)) if self.training else self.a(x)

    qmodel = kquant_torch.wrap(Mode(), example_inputs=torch.randn(3, 4), calibration_data=torch.randn(8, 4))
    qmodel.train()(torch.randn(3, 4)).sum().backward()
    assert qmodel.b.weight.grad is not None


def test_a_module_that_acts_in_training_only_stays_one():
    class DropPath(nn.Module):
        def forward(self, x):
            if not self.training:
                return x
            return x * (torch.rand(len(x), 1) < 0.5)

    model = nn.Sequential(nn.Linear(4, 4), DropPath(), nn.Linear(4, 2))
    qmodel = kquant_torch.wrap(model, example_inputs=torch.randn(3, 4), calibration_data=torch.randn(8, 4))
    x = torch.ones(64, 4)
    hidden = []
    qmodel[1].register_forward_hook(lambda m, i, o: hidden.append(o))
    qmodel.train()(x)
    qmodel.eval()(x)
    assert (hidden[0] == 0).all(1).any() and not (hidden[1] == 0).all(1).any()


def test_writing_into_a_part_of_a_tensor_is_not_lost():
    class Writes(nn.Module):
        def __init__(self, view):
            super().__init__()
            self.a, self.b, self.view = nn.Linear(4, 4), nn.Linear(4, 2), view

        def forward(self, x):
            y = self.a(x)
            if self.view:
                part = y[:, :2]
                part.add_(5.0)
            else:
                y[:, 0] = 5.0
            return self.b(y)

    for view in (False, True):
        model, x = Writes(view).eval(), torch.randn(8, 4)
        qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=x).eval()
        with torch.no_grad():
            noise = (qmodel(x) - model(x)).square().mean() / model(x).square().mean()
        assert float(noise) < 1e-3, view


def test_without_layers_the_reason_is_named():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight) if x.sum() > 0 else x[:, :3]

    with pytest.raises(kquant_torch.UnsupportedError, match=r"layers that are modules.*depends on the values"):
        kquant_torch.wrap(Functions(), example_inputs=torch.ones(2, 4))
