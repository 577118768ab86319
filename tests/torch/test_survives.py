"""What a wrapped model must survive, with every quantizer: copies, checkpoints, compilers, mixed precision, layouts."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from nets_torch import QUANTIZERS, Net, images, step

import kquant_torch
from kquant.core.errors import ModelError
from kquant_torch.fake_quantize import FakeQuantize

pytestmark = pytest.mark.filterwarnings("ignore:DoReFa clips activations")
each = pytest.mark.parametrize("quantizer", QUANTIZERS)


def wrapped(quantizer, net=None, x=None):
    x = images() if x is None else x
    return kquant_torch.wrap(net or Net(), QUANTIZERS[quantizer], example_inputs=x, calibration_data=x)


def trained(quantizer, steps=3):
    qmodel = wrapped(quantizer).train()
    optimizer = torch.optim.Adam(qmodel.parameters(), 1e-2)
    for i in range(steps):
        step(qmodel, optimizer, images(8 + i))
    return qmodel, optimizer


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch_saved])
def test_copies_compute_the_same_and_go_on_the_same(quantizer, copied):
    qmodel, _ = trained(quantizer)
    twin = copied(qmodel)
    assert twin.describe() == "QuantizedNet by a user" and isinstance(twin, Net)
    assert torch.equal(outputs(qmodel, images()), outputs(twin, images()))
    for model in (qmodel, twin):
        model.train()
        torch.manual_seed(1)  # dropout
        step(model, torch.optim.SGD(model.parameters(), 1e-2), images())
    states = qmodel.state_dict(), twin.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


@each
def test_a_state_dict_restores_everything(quantizer):
    qmodel, _ = trained(quantizer)
    kquant_torch.freeze_observers(qmodel)
    kquant_torch.freeze_batch_norm(qmodel)
    other = wrapped(quantizer, Net())
    assert not torch.equal(outputs(qmodel, images()), outputs(other, images()))
    assert str(other.load_state_dict(qmodel.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(outputs(qmodel, images()), outputs(other, images()))
    assert other.bn.frozen and all(m.frozen for m in other.modules() if isinstance(m, FakeQuantize) and m.fixed is None)


@each
def test_a_float_checkpoint_loads_strictly(quantizer):
    float_model = Net()
    checkpoint = {k: v + 0.125 if v.is_floating_point() else v for k, v in float_model.state_dict().items()}
    qmodel = wrapped(quantizer, float_model)
    before = {k: v.clone() for k, v in qmodel.state_dict().items() if k not in checkpoint}
    assert str(qmodel.load_state_dict(checkpoint, strict=True)) == "<All keys matched successfully>"
    after = qmodel.state_dict()
    assert all(torch.equal(after[k], v) for k, v in checkpoint.items())
    assert before and all(torch.equal(after[k], v) for k, v in before.items())


def test_half_of_the_quantization_state_is_missing_state():
    qmodel = wrapped("qat")
    state = qmodel.state_dict()
    key = next(k for k in state if k.endswith(".maximum"))
    del state[key]
    with pytest.raises(RuntimeError, match=r"Missing key.*maximum"):
        qmodel.load_state_dict(state)
    state = {**Net().state_dict(), "other": torch.zeros(())}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        qmodel.load_state_dict(state)


@each
def test_a_resumed_training_goes_on_to_the_last_bit(quantizer):
    qmodel, optimizer = trained(quantizer)
    file = io.BytesIO()
    torch.save(
        {"model": qmodel.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, file
    )
    expected = [step(qmodel, optimizer, images(8 + i)) for i in range(3)]
    resumed = wrapped(quantizer, Net()).train()
    optimizer = torch.optim.Adam(resumed.parameters(), 1e-2)
    file.seek(0)
    saved = torch.load(file)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    found = [step(resumed, optimizer, images(8 + i)) for i in range(3)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    pairs = zip(qmodel.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@each
def test_compiles_without_a_graph_break(quantizer):
    qmodel = wrapped(quantizer, Net(dropout=0.0)).train()
    twin = copy.deepcopy(qmodel)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for model, called in ((qmodel, qmodel), (twin, compiled)):
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for _ in range(3):
            step(called, optimizer, images(8))
    # Values on a rounding boundary may fall to the other side (eager mode multiplies and adds in one operation), and so
    # may gradients of six bits, whose step is 1/63 of the largest.
    near = 5e-2 if "G6" in quantizer else 2e-2
    pairs = zip(qmodel.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-2, atol=near) for a, b in pairs)
    torch._dynamo.reset()


@each
def test_is_exported_by_torch_export(quantizer):
    qmodel, _ = trained(quantizer)
    expected = outputs(qmodel, images())
    program = torch.export.export(qmodel, (images(),))
    found = program.module()(images()).detach()
    # One code of the output at most, for a value on a rounding boundary.
    scale = (expected.max() - expected.min()) / 15
    assert float((found - expected).abs().max()) <= float(scale) + 1e-6


@each
def test_trains_in_bfloat16_autocast_with_float32_ranges(quantizer):
    qmodel = wrapped(quantizer).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert qmodel(images()).dtype == torch.bfloat16
        step(qmodel, optimizer, images())
    ranges = [b for m in qmodel.modules() if isinstance(m, FakeQuantize) for b in m.buffers()]
    assert all(b.dtype == torch.float32 for b in ranges if b.is_floating_point())
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in qmodel.parameters())


@each
def test_functional_call_uses_what_it_is_given(quantizer):
    qmodel, _ = trained(quantizer)
    qmodel.eval()
    names = dict(qmodel.named_parameters())
    given = {k: p.detach() * 0.5 for k, p in names.items()}
    found = torch.func.functional_call(qmodel, given, (images(),))
    twin = copy.deepcopy(qmodel)
    with torch.no_grad():
        for k, p in twin.named_parameters():
            p.copy_(given[k])
    assert torch.equal(found, twin(images()))
    gradients = torch.func.grad(lambda p: torch.func.functional_call(qmodel, p, (images(),)).square().sum())(given)
    twin(images()).square().sum().backward()
    assert all(torch.allclose(gradients[k], p.grad, atol=1e-5) for k, p in twin.named_parameters())


@each
def test_channels_last_gives_the_same(quantizer):
    qmodel, _ = trained(quantizer)
    expected = outputs(qmodel, images())
    last = copy.deepcopy(qmodel).to(memory_format=torch.channels_last)
    found = outputs(last, images().to(memory_format=torch.channels_last))
    # Convolutions sum in another order, so a value on a rounding boundary may take the code beside it.
    np.testing.assert_allclose(found, expected, atol=float((expected.max() - expected.min()) / 15) + 1e-6)


@each
def test_accumulated_gradients_are_the_sum(quantizer):
    qmodel = wrapped(quantizer, Net(norms=False, dropout=0.0)).train()
    kquant_torch.freeze_observers(qmodel)
    for _ in range(3):  # beyond the delay
        qmodel(images())
    x = images(8)
    for part in (x[:4], x[4:]):
        qmodel(part).square().sum().backward()
    summed = [p.grad.clone() for p in qmodel.parameters()]
    qmodel.zero_grad()
    qmodel(x).square().sum().backward()
    for a, b in zip(summed, qmodel.parameters(), strict=True):
        if "G6" in quantizer:  # the noise of the gradients differs, by one step of 1/63 of a sample's largest
            assert torch.isfinite(a).all()
        else:
            torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)


@each
def test_averaged_models_work(quantizer):
    qmodel, optimizer = trained(quantizer)
    averaged = torch.optim.swa_utils.AveragedModel(qmodel, use_buffers=False)
    averaged.update_parameters(qmodel)
    step(qmodel, optimizer, images())
    averaged.update_parameters(qmodel)
    assert torch.isfinite(outputs(averaged, images())).all()


def test_modules_hooks_modes_and_attributes_survive():
    net, seen = Net(), []
    net.block[0].register_forward_hook(lambda m, i, o: seen.append("conv"))
    net.block.register_forward_pre_hook(lambda m, i: seen.append("block before"))
    net.block.register_forward_hook(lambda m, i, o: seen.append("block"))
    net.register_forward_hook(lambda m, i, o: seen.append("net"))
    net.stem.eval()
    qmodel = wrapped("qat", net)
    names = dict(qmodel.named_modules())
    assert [n for n, _ in net.named_modules()] == [n for n in names if n in dict(net.named_modules())]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in qmodel.named_parameters()]
    assert qmodel.describe() == "QuantizedNet by a user" and qmodel.note is not net.note
    assert qmodel.training and not qmodel.stem.training and qmodel.block[0].training
    seen.clear()
    qmodel(images())
    assert seen == ["block before", "conv", "block", "net"]
    qmodel.eval()
    assert not any(m.training for m in qmodel.modules())


def test_a_later_hook_on_a_container_is_an_error():
    qmodel = wrapped("qat", Net())
    qmodel.block[0].register_forward_hook(lambda m, i, o: None)
    qmodel(images())
    handle = qmodel.block.register_forward_hook(lambda m, i, o: None)
    with pytest.raises(ModelError, match=r"'block'.*before wrapping"):
        qmodel(images())
    handle.remove()
    qmodel(images())


def test_wrap_copies_and_a_quantizer_changes_in_place():
    net = Net()
    qmodel = wrapped("qat", net)
    assert qmodel is not net and type(net.stem) is torch.nn.Conv2d
    found = kquant_torch.QAT_Quantizer()(net, images(), calibration_data=images())
    assert found is net and net.stem.weight_quantizer is not None and isinstance(net, Net)
    alone = kquant_torch.NaiveQuantizer()(torch.nn.Linear(4, 3), torch.randn(2, 4))
    assert isinstance(alone, torch.nn.Linear) and alone(torch.randn(2, 4)).shape == (2, 3)


def test_a_sequential_keeps_its_length_and_items():
    qmodel = kquant_torch.wrap(
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), example_inputs=torch.ones(2, 4)
    )
    assert len(qmodel) == 2 and [type(m).__name__ for m in qmodel] == ["QuantizedLinear", "ReLU"]
    assert isinstance(qmodel[-1], torch.nn.ReLU) and len(qmodel[:1]) == 1
