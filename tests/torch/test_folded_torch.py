"""A weight range per tensor in front of a batch norm: the kernel is quantized with the norm's factor in it.

Jacob et al. 2018, section 3.2: `w * gamma / sigma` is what is quantized and what the artifact holds, on one scale.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import kquant_torch
from kquant_torch.export import integer_model, quantized_graph

CONFIG = [{"q_bits": 8, "op_types": ["default"], "quant_scheme": {"weight": "tensor_symmetric"}}]
LAYERS = {  # the layer, its norm, its input, and the order of the kernel's axes with its output channels first
    "conv": (lambda: nn.Conv2d(3, 6, 3), nn.BatchNorm2d, (3, 8, 8), (0, 1, 2, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d, (4, 8, 8), (0, 1, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), nn.BatchNorm1d, (3, 9), (0, 1, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 2, 2), nn.BatchNorm2d, (3, 5, 5), (1, 0, 2, 3)),
    "linear": (lambda: nn.Linear(5, 6), nn.BatchNorm1d, (5,), (0, 1)),
}


class Normed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        make, norm, *_ = LAYERS[kind]
        self.layer, self.norm = make(), norm(6)

    def forward(self, x):
        return torch.relu(self.norm(self.layer(x)))


def normed(kind, gamma=None, variance=None):
    """A layer and a batch norm, with statistics and a gamma of both signs or as given, and data."""
    torch.manual_seed(0)
    model, rng = Normed(kind), np.random.default_rng(3)
    with torch.no_grad():
        model.norm.weight.copy_(torch.as_tensor(np.resize(rng.normal(size=6) if gamma is None else gamma, 6)))
        model.norm.bias.copy_(torch.as_tensor(np.abs(rng.normal(size=6))))  # so that no ReLU is always zero
        model.norm.running_mean.copy_(torch.as_tensor(rng.normal(0.0, 0.1, size=6)))
        spread = rng.uniform(0.2, 3.0, 6) if variance is None else variance
        model.norm.running_var.copy_(torch.as_tensor(np.resize(spread, 6)))
    return model.eval(), torch.randn(32, *LAYERS[kind][2])


def wrapped(model, data, config=CONFIG):
    return kquant_torch.wrap(model, config, example_inputs=data[:2], calibration_data=data).eval()


def kernel_of(qmodel, kind):
    """The integer kernel that is written, the output channels first, and the channels' scales."""
    op = next(op for op in integer_model(quantized_graph(qmodel)).ops if op.weight is not None)
    return op.weight.codes.transpose(LAYERS[kind][3]).reshape(6, -1), op.weight.scale


def papers_codes(qmodel, kind, qmax=127):
    """The paper's folded kernel on its own scale before rounding, and that scale; float64."""
    norm = qmodel.norm
    kernel = qmodel.layer.weight.detach().double().numpy().transpose(LAYERS[kind][3]).reshape(6, -1)
    gamma, variance = (v.detach().double().numpy() for v in (norm.weight, norm.running_var))
    folded = kernel * (gamma / np.sqrt(variance + norm.eps))[:, None]
    scale = np.abs(folded).max() / qmax
    return folded / scale, scale


def assert_verifies(qmodel, data, path):
    kquant_torch.export_torchscript(qmodel, path, example_inputs=data[:2])
    parity = kquant_torch.verify(qmodel, path, [data])
    assert parity.ok, parity.problems
    assert parity.max_lsb <= 0.6


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("export", ["export_onnx", "export_program"])
def test_the_other_files_hold_the_same_kernel_on_one_scale(kind, export, tmp_path):
    """A gamma of zero among them; where each changes its layout is its own business, so `verify` compares the codes."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
    model, data = normed(kind, gamma=[1.0, 0.0, -2.0, 0.5, -0.25, 3.0])
    qmodel = wrapped(model, data, [{**CONFIG[0], "q_bits": {"weight": 4, "output": 8}}])
    path = tmp_path / "model"
    getattr(kquant_torch, export)(qmodel, path, example_inputs=data[:2])
    parity = kquant_torch.verify(qmodel, path, [data])
    assert parity.ok, parity.problems
    codes, scales = kernel_of(qmodel, kind)
    dead = (model.norm.weight == 0).numpy()
    assert not codes[dead].any() and np.unique(scales).size == 1
    with torch.no_grad():
        qmodel.norm.weight[2] *= 1.5  # the largest gain, or nearly: other codes, other scales
    parity = kquant_torch.verify(qmodel, path, [data])
    assert any("the kernel of channel" in problem for problem in parity.problems)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_codes_are_those_of_the_folded_kernel_on_one_scale(kind, bits, tmp_path):
    """The codes are the paper's, but where float32 cannot tell which is nearer."""
    model, data = normed(kind)
    qmodel = wrapped(model, data, [{**CONFIG[0], "q_bits": bits}])
    exact, scale = papers_codes(qmodel, kind, 2 ** (bits - 1) - 1)
    codes, scales = kernel_of(qmodel, kind)
    sign = np.where(qmodel.norm.weight.detach().numpy() < 0, -1.0, 1.0)[:, None]
    near = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    np.testing.assert_array_equal(codes[~near], (np.floor(exact * sign + 0.5) * sign)[~near])
    np.testing.assert_allclose(scales, scale, rtol=1e-6)
    assert np.unique(scales).size == 1
    assert_verifies(qmodel, data, tmp_path / "m.pt")
    (row,) = [op for op in kquant_torch.audit(tmp_path / "m.pt").ops if op.weight_bits]
    assert row.granularity == "per-tensor"


def test_a_gamma_of_zero_is_harmless_and_learns(tmp_path):
    """Such a channel deploys as its offset; in training it is normalized all the same, so its gamma learns."""
    model, data = normed("conv", gamma=[1.0, 0.0, -2.0])
    qmodel = wrapped(copy.deepcopy(model), data)
    dead = (model.norm.weight == 0).numpy()
    codes, _ = kernel_of(qmodel, "conv")
    assert not codes[dead].any()
    assert codes[~dead].any(axis=1).all()
    gradients = []
    for trainee in (qmodel.train(), model.train()):
        (trainee(data) * torch.linspace(0, 1, data.shape[0]).reshape(-1, 1, 1, 1)).sum().backward()
        gradients.append(trainee.norm.weight.grad.numpy()[dead])
        torch.optim.SGD(trainee.parameters(), 1e-3).step()
    assert np.abs(gradients[1]).max() > 1  # without the floor rounding alone would be left
    np.testing.assert_allclose(*gradients, atol=0.1 * np.abs(gradients[1]).max())  # what 8 bits leave of it
    assert all(torch.isfinite(v).all() for v in qmodel.state_dict().values())
    assert_verifies(qmodel.eval(), data, tmp_path / "m.pt")


@pytest.mark.parametrize(("gamma", "variance"), [([0.0], None), (None, [1.0, 0.0, 2.0])])
def test_no_gamma_at_all_and_a_sigma_of_almost_nothing_are_harmless(gamma, variance, tmp_path):
    model, data = normed("conv", gamma, variance)
    qmodel = wrapped(model, data)
    assert torch.isfinite(qmodel(data)).all()
    assert_verifies(qmodel, data, tmp_path / "m.pt")


def test_copies_and_pickles_hold_their_own_norm():
    model, data = normed("linear")
    qmodel = wrapped(model, data)
    for twin in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert twin.layer.weight_quantizer.norm[0] is twin.norm
        assert list(twin.state_dict()) == list(qmodel.state_dict())
        with torch.no_grad():
            twin.norm.weight.mul_(torch.linspace(0.1, 2.0, 6))
        assert (kernel_of(twin, "linear")[0] != kernel_of(qmodel, "linear")[0]).any()


def test_a_layer_called_before_two_norms_keeps_its_scales_per_channel(tmp_path):
    """One quantizer cannot hold two gains; the export is exact all the same."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.one, self.two = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.two(self.layer(torch.relu(self.one(self.layer(x)))))

    torch.manual_seed(0)
    model, data = Twice(), torch.randn(32, 6)
    with torch.no_grad():
        model.one.weight.copy_(torch.linspace(0.5, 2.0, 6))
    plan = kquant_torch.plan(model.eval(), CONFIG, example_inputs=data[:2])
    assert "one scale with" not in str(plan)  # what is trained
    assert "one scale with norm" in str(kquant_torch.plan(normed("linear")[0], CONFIG, example_inputs=data[:2, :5]))
    qmodel = wrapped(model, data)
    assert qmodel.layer.weight_quantizer.norm is None
    assert_verifies(qmodel, data, tmp_path / "m.pt")
