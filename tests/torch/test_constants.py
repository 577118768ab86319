"""Constant operands: on one 8-bit grid in training, in what is read, and in every file."""

import numpy as np
import pytest
import torch
from constant_arrays import each_array
from torch import nn

import kquant_torch
from kquant.core.constants import on_grid
from kquant_torch.constants import ConstantQuantizer
from kquant_torch.export import integer_model, quantized_graph
from kquant_torch.fake_quantize import grid


class Plus(nn.Module):
    """A layer and a learned or fixed array in an operation."""

    def __init__(self, operation, learned=True):
        super().__init__()
        self.layer, self.operation = nn.Linear(6, 6), operation
        array = torch.linspace(-0.31, 0.93, 30).reshape(1, 5, 6) ** 3 + 0.017
        if learned:
            self.array = nn.Parameter(array)
        else:
            self.register_buffer("array", array)

    def forward(self, x):
        return self.operation(self.layer(x), self.array)


OPERATIONS = {
    "add": lambda x, c: x + c,
    "sub": lambda x, c: x - c,
    "rsub": lambda x, c: c - x,
    "mul": lambda x, c: c * x,
    "div": lambda x, c: x / (c + 2.0),
    "maximum": lambda x, c: torch.maximum(x, c),
    "minimum": lambda x, c: torch.minimum(c, x.tanh()),
    "token": lambda x, c: torch.cat([x, c.expand(x.shape[0], -1, -1)], 1),
}


@each_array
def test_the_grid_is_that_of_core_to_the_bit(v):
    np.testing.assert_array_equal(ConstantQuantizer()(torch.from_numpy(v)).numpy(), on_grid(v))


@pytest.mark.parametrize("compiling", [False, True])
def test_zero_just_below_half_a_step_is_rounded_exactly(compiling, monkeypatch):
    """As in core: 0.49999997 + 0.5 is 1 in float32."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert grid(torch.tensor(-0.49999997), torch.tensor(254.5), 8) == (1.0, 0.0, 255.0)
    assert grid(torch.tensor(-0.5), torch.tensor(254.5), 8) == (1.0, -1.0, 254.0)


def values_used(qmodel, x):
    """The constant operand as the wrapped model computes with it: what its quantizer gave."""
    seen: list[np.ndarray] = []

    def note(module, given, made):
        if given[0] is not x and given[0].shape[0] == 1:
            seen.append(made.detach().numpy())

    handles = [m.register_forward_hook(note) for m in qmodel.quantizers.children()]
    qmodel(x)
    for handle in handles:
        handle.remove()
    (found,) = seen
    return found


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_constant_trains_on_the_codes_that_are_exported(name, learned, tmp_path):
    model, x = Plus(OPERATIONS[name], learned).eval(), torch.randn(8, 5, 6)
    qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=x)
    qmodel.load_state_dict(model.state_dict(), strict=True)
    assert set(model.state_dict()) <= set(qmodel.state_dict())
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.05)
    for _ in range(2):
        loss = qmodel.train()(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if learned and name not in ("maximum", "minimum"):
        assert (qmodel.array.grad != 0).float().mean() > 0.9
    graph = quantized_graph(qmodel.eval())
    model_in_integers = integer_model(graph)
    (op,) = [o for o in graph.ops if o.kind in ("add", "sub", "mul", "maximum", "minimum")]
    (tensor,) = [t for t in op.inputs if graph.tensors[t].constant is not None]
    held, trained = model_in_integers.tensors[tensor], values_used(qmodel, x)
    assert 10 < len(np.unique(held.constant)) and held.constant.size == trained.size
    np.testing.assert_array_equal(held.affine.quantize(trained), held.constant)
    np.testing.assert_allclose(trained, held.affine.dequantize(held.constant), rtol=2e-6, atol=1e-7)
    for export, file in ((kquant_torch.export_torchscript, "m.pt"), (kquant_torch.export_program, "m.pt2")):
        export(qmodel, tmp_path / file, example_inputs=x)
        report = kquant_torch.verify(qmodel, tmp_path / file, [torch.randn(64, 5, 6)])
        assert report.ok, report.problems


def test_a_buffer_that_is_loaded_is_followed():
    model, x = Plus(OPERATIONS["add"], learned=False).eval(), torch.randn(4, 5, 6)
    qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=x).eval()
    with torch.no_grad():
        before = qmodel(x)
        model.array += 0.25
        qmodel.load_state_dict(model.state_dict(), strict=True)
        assert (qmodel(x) - before).mean() > 0.1


def test_padding_with_a_value_is_a_sum_that_has_a_range(tmp_path):
    class Padded(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.conv, self.value = nn.Conv2d(2, 3, 3), value

        def forward(self, x):
            return self.conv(torch.nn.functional.pad(x, (1, 1, 2, 0), value=self.value))

    x = torch.rand(4, 2, 6, 6)
    for value in (-5.37, 9.0):  # outside of what the input reaches
        model = Padded(value).eval()
        qmodel = kquant_torch.wrap(model, example_inputs=x, calibration_data=x).eval()
        kquant_torch.export_torchscript(qmodel, tmp_path / "m.pt", example_inputs=x)
        report = kquant_torch.verify(qmodel, tmp_path / "m.pt", [torch.rand(16, 2, 6, 6)])
        assert report.ok, report.problems
        with torch.no_grad():
            noise = (qmodel(x) - model(x)).square().mean() / model(x).square().mean()
        assert float(noise) < 1e-3
