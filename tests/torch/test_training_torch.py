"""The numerics of training: formulas against an independent derivation, ranges, and every control."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets_torch import Net, images, step
from torch import nn

import kquant_torch
from kquant.core.affine import Affine
from kquant.core.weights import weight_formula
from kquant_torch.fake_quantize import CHUNK, FakeQuantize, fake_quantize_range
from kquant_torch.weights import WeightQuantizer, uniform_noise


def float32(low, high):
    return st.floats(low, high, width=32).map(np.float32)


@given(float32(-50, 0), float32(0.0078125, 50), st.integers(1, 8), st.integers(0, 2**31))
def test_codes_are_those_of_the_core(low, high, bits, seed):
    low = np.float32(0) if bits == 1 else low
    affine = Affine.of_range(low, high, bits)
    x = np.random.default_rng(seed).uniform(low - 1, high + 1, 500).astype(np.float32)
    y = fake_quantize_range(torch.from_numpy(x), torch.tensor(low), torch.tensor(high), bits).numpy()
    codes = np.floor(y.astype(np.float64) / affine.scale + 0.5) + affine.zero_point
    exact = x.astype(np.float64) / np.float64(affine.scale) + 0.5
    near_tie = np.abs(exact - np.round(exact)) < 1e-4  # where float32 may round to either side
    np.testing.assert_array_equal(codes[~near_tie], affine.quantize(x)[~near_tie])
    np.testing.assert_allclose(y, (codes - affine.zero_point) * affine.scale, rtol=2e-7, atol=1e-30)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_large_tensors_in_any_layout(layout):
    x = torch.randn(2, 6, 160, 160)
    assert x.numel() > CHUNK
    x = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "strided": x[:, :, ::2]}[layout]
    low, high = torch.tensor(-1.5), torch.tensor(2.0)
    found = fake_quantize_range(x, low, high, 8)
    affine = Affine.of_range(np.float32(-1.5), np.float32(2.0), 8)
    wanted = affine.dequantize(affine.quantize(x.numpy()))
    assert np.mean(found.numpy() != wanted) < 1e-4  # ties
    if layout == "channels_last":
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_is_one_inside_the_range_and_zero_outside():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.3, 2.0, 2.001], requires_grad=True)
    fake_quantize_range(x, torch.tensor(-1.0), torch.tensor(2.0), 2).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("quantizer, bits", [("qat", 8), ("qat", 3), ("dorefa", 1), ("dorefa", 3), ("dorefa", 8)])
def test_weight_codes_are_those_of_the_core_and_gradients_pass_straight_through(quantizer, bits):
    w = torch.randn(5, 4, 3, 3)
    formula = weight_formula(quantizer, bits, (1, 2, 3))
    codes, scale = formula.quantize(formula.prepare(w.numpy()))
    found, step_size = WeightQuantizer(formula).codes(w)
    np.testing.assert_array_equal(found.numpy(), codes)
    np.testing.assert_allclose(step_size.numpy(), scale, rtol=2e-7)
    w.requires_grad_(True)
    upstream = torch.randn(5, 4, 3, 3)
    WeightQuantizer(formula)(w).backward(upstream)
    if quantizer == "qat" or bits == 1:
        assert torch.equal(w.grad, upstream)
    else:  # d/dw of tanh(w)/max|tanh w|, away from the maximum itself
        t = np.tanh(w.detach().numpy())
        inner = np.abs(t) < np.abs(t).max()
        wanted = upstream.numpy() * (1 - t**2) / np.abs(t).max()
        np.testing.assert_allclose(w.grad.numpy()[inner], wanted[inner], rtol=1e-4, atol=1e-6)


def test_ranges_follow_the_batches_as_written():
    quantizer = FakeQuantize(8).train()
    low = high = None
    for i in range(4):
        x = torch.randn(50) * (i + 1)
        quantizer(x, site=0)
        a, b = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        low, high = (a, b) if low is None else (low + (a - low) * 0.01, high + (b - high) * 0.01)
    np.testing.assert_allclose(quantizer.range(), (low, high), rtol=1e-6)
    quantizer.eval()(torch.randn(5) * 100, site=0)
    np.testing.assert_allclose(quantizer.range(), (low, high), rtol=1e-6)


@pytest.mark.parametrize(("settings", "frozen", "ends"), [
    ({}, False, [-16 / 3, 20 / 3]),  # two thirds of the batch
    ({}, True, [-1.0, 1.0]),
    ({"decay": 1.0}, False, [-1.0, 1.0]),  # Naive keeps its range
    ({"symmetric": True}, False, [-20 / 3, 20 / 3]),
])  # fmt: skip
def test_training_clips_a_batch_to_no_less_than_two_thirds_of_its_extremes(settings, frozen, ends):
    quantizer = FakeQuantize(8, **settings).train()
    quantizer.set_range(-1.0, 1.0, 0)
    quantizer.set_frozen(frozen)
    batch = torch.tensor([-8.0, -0.5, 0.5, 10.0], requires_grad=True)
    found = quantizer(batch, site=0)
    found.sum().backward()
    assert batch.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    np.testing.assert_allclose(found.detach()[[0, -1]], ends, atol=(ends[1] - ends[0]) / 250)  # a step, for nudging
    moves = 0.01 if quantizer.decay < 1.0 and not frozen else 0.0
    assert float(quantizer.eval()(batch.detach(), site=0)[-1]) == pytest.approx(1.0 + moves * 9.0, abs=0.01)


def test_fresh_batch_norms_do_not_blow_up_the_gradient():
    """Calibration sees unit statistics, training a batch's own; without a limit on clipping the gradient
    of the first kernel was a thousand times the float model's."""
    torch.manual_seed(0)
    blocks = [m for _ in range(16) for m in (nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())]
    model, x, y = nn.Sequential(*blocks, nn.Linear(16, 5)), torch.randn(64, 16), torch.randint(0, 5, (64,))
    sizes = []
    for net in (model, kquant_torch.wrap(model, example_inputs=x, calibration_data=x)):
        nn.functional.cross_entropy(net.train()(x), y).backward()
        sizes.append(float(net.get_submodule("0").weight.grad.norm()))
    assert sizes[1] < 4 * sizes[0]


def test_portable_weights_stay_within_63():
    x = images()
    for config in (None, [{"q_bits": 8, "op_types": ["default"], "quantizer": "dorefa"}]):
        qmodel = kquant_torch.wrap(Net(), config, example_inputs=x, portable=True)
        for m in qmodel.modules():
            if hasattr(m, "weight_quantizer"):
                codes, _ = m.weight_quantizer.codes(m.weight)
                assert float(codes.abs().max()) == 63
    assert "within ±63" in str(kquant_torch.plan(Net(), example_inputs=x, portable=True))


def test_a_delay_observes_first():
    config = [{"q_bits": 2, "op_types": ["default"], "quant_start_step": 2}]
    net = Net(norms=False, dropout=0.0)
    qmodel = kquant_torch.wrap(net, config, example_inputs=images()).train()
    apart = [float((qmodel(images()) - net(images())).detach().abs().max()) for _ in range(4)]
    assert apart[0] < 1e-5 and apart[1] < 1e-5 and apart[2] > 1e-3 and apart[3] > 1e-3


def test_frozen_ranges_stand_still_and_frozen_norms_normalize_as_in_evaluation():
    qmodel = kquant_torch.wrap(Net(dropout=0.0), example_inputs=images(), calibration_data=images()).train()
    assert kquant_torch.freeze_observers(qmodel) == sum(
        m.fixed is None for m in qmodel.modules() if isinstance(m, FakeQuantize)
    )
    assert kquant_torch.freeze_batch_norm(qmodel) == 2
    before = copy.deepcopy(qmodel.state_dict())
    trained, evaluated = qmodel(images() * 3), copy.deepcopy(qmodel).eval()(images() * 3)
    assert torch.equal(trained, evaluated)
    assert all(torch.equal(before[k], v) for k, v in qmodel.state_dict().items())
    kquant_torch.unfreeze_observers(qmodel)
    kquant_torch.unfreeze_batch_norm(qmodel)
    qmodel(images() * 3)
    moved = {k for k, v in qmodel.state_dict().items() if not torch.equal(before[k], v)}
    assert "bn.running_mean" in moved and any(k.endswith("maximum") for k in moved)


def test_re_estimated_statistics_are_the_averages_over_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    qmodel = kquant_torch.wrap(model, example_inputs=images(), calibration_data=images())
    batches = [images(4), images(8)]
    assert kquant_torch.reestimate_batch_norm(qmodel, batches) == 1
    with torch.no_grad():
        found = [qmodel.eval()[0](qmodel.quantizers.input(x)) for x in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in found])
    variances = torch.stack([y.var((0, 2, 3), correction=0) for y in found])
    weights = torch.tensor([4 / 12, 8 / 12])[:, None]
    torch.testing.assert_close(qmodel[1].running_mean, (means * weights).sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(qmodel[1].running_var, (variances * weights).sum(0), rtol=1e-5, atol=1e-6)


def test_dorefa_gradients_have_few_levels_and_are_right_on_average():
    bits = {"weight": 8, "output": 8, "gradient": 2}
    model = nn.Sequential(nn.Linear(6, 400))
    config = [{"q_bits": bits, "op_types": ["default"], "quantizer": "dorefa"}]
    qmodel = kquant_torch.wrap(model, config, example_inputs=torch.randn(2, 6), calibration_data=torch.randn(20, 6))
    layer = qmodel.train()[0]
    x, upstream = torch.randn(2, 6), torch.linspace(-1, 1, 400).expand(2, 400).contiguous()
    inputs = []
    for _ in range(400):
        qmodel.zero_grad()
        layer.weight_quantizer.on_gradient(y := torch.zeros(2, 400, requires_grad=True)).backward(upstream.clone())
        inputs.append(y.grad)
    seen = torch.stack(inputs)
    np.testing.assert_allclose(torch.unique(seen), [-1, -1 / 3, 1 / 3, 1], rtol=1e-6)  # 2 bits of the sample's largest
    assert layer.weight_quantizer.draws == 400
    # A step is 2/3 wide, so one draw has a variance of at most 1/9 and the mean of 800 a deviation of 0.012.
    np.testing.assert_allclose(seen.mean((0, 1))[5:-5], upstream[0, 5:-5], atol=5 * 0.012)
    layer(x).backward(upstream.clone())
    per_weight = layer.weight.grad.abs().sum()
    layer.eval()
    qmodel.zero_grad()
    layer(x).backward(upstream.clone())
    assert per_weight != layer.weight.grad.abs().sum()  # the weight's gradient sees it, and evaluation does not


def test_noise_is_uniform_and_repeatable():
    like = torch.empty(100_000)
    a, b = (uniform_noise(like, 7, torch.tensor(i)) for i in (1, 2))
    assert torch.equal(a, uniform_noise(like, 7, torch.tensor(1))) and not torch.equal(a, b)
    assert float(a.min()) >= -0.5 and float(a.max()) < 0.5
    counts = torch.histc(a, 20, -0.5, 0.5)
    # 5,000 expected in each of 20 bins: the chi-square of 19 degrees exceeds 43.8 once in a thousand.
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8
    assert abs(float((a * b).mean()) * 12) < 0.02  # uncorrelated: standard deviation 0.003


def test_training_lowers_the_loss_of_every_quantizer():
    for quantizer in ("naive", "qat", "dorefa"):
        config = [{"q_bits": 8, "op_types": ["default"], "quantizer": quantizer}]
        torch.manual_seed(0)
        qmodel = kquant_torch.wrap(Net(dropout=0.0), config, example_inputs=images()).train()
        optimizer = torch.optim.Adam(qmodel.parameters(), 1e-2)
        losses = [float(step(qmodel, optimizer, images())) for _ in range(25)]
        assert losses[-1] < 0.8 * losses[0], quantizer


class Pair(nn.Module):
    """Two inputs, an argument left at its default, a layer called twice, and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, a, b, scale=None, as_dict=True):
        hidden = torch.relu(self.shared(a)) + torch.relu(self.shared(b))
        if scale is not None:
            hidden = hidden * scale
        out = self.head(hidden)
        return {"logits": out, "hidden": (hidden,)} if as_dict else out


@pytest.mark.parametrize("named", [False, True])
def test_inputs_by_name_or_place_and_a_layer_called_twice(named):
    a, b = torch.randn(8, 6), torch.randn(8, 6) * 3
    inputs = {"b": b, "a": a} if named else (a, b)
    qmodel = kquant_torch.wrap(Pair(), example_inputs=inputs, calibration_data=[inputs])
    found = qmodel(b=b, a=a)
    assert set(found) == {"logits", "hidden"} and found["hidden"][0].shape == (8, 6)
    ranges = {name: m.range()[1] for name, m in qmodel.quantizers.named_children()}
    # One weight spec, and a range for each call: the second input is three times the first.
    assert isinstance(qmodel.shared.weight_quantizer, WeightQuantizer) and qmodel.shared.weight_quantizer.calls == 2
    assert ranges["relu_2"] > 1.5 * ranges["relu"]
    assert ranges["a"] == a.max() and ranges["b"] == b.max()


@pytest.mark.parametrize("kind", ["array", "tensor", "loader", "list", "pairs", "generator"])
def test_calibration_data_in_any_form(kind):
    x = torch.randn(20, 6)
    pairs = torch.utils.data.TensorDataset(x, torch.zeros(20))
    data = {
        "array": x.numpy(), "tensor": x, "list": list(x.split(8)), "generator": (p for p in x.split(8)),
        "loader": torch.utils.data.DataLoader(pairs, 8), "pairs": [(p, torch.zeros(len(p))) for p in x.split(8)],
    }[kind]  # fmt: skip
    qmodel = kquant_torch.wrap(nn.Sequential(nn.Linear(6, 3)), example_inputs=x[:2], calibration_data=data)
    assert qmodel.quantizers.input.range() == (float(x.min()), float(x.max()))
