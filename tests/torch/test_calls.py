"""What surrounds a call of the library: wrappers of torch's, autocast, inference mode; and arguments of odd kinds."""

import copy

import pytest
import torch
from parts_torch import rows
from torch import nn
from torch.optim.swa_utils import AveragedModel

import kquant_torch as kt

QUANTIZERS = ["naive", "qat", "dorefa"]
AROUND = {
    "DataParallel": (nn.DataParallel, "Hand in model.module"),
    "AveragedModel": (AveragedModel, "Hand in model.module"),
    "compiled": (lambda m: torch.compile(m, backend="eager"), "Hand in model._orig_mod"),
    "traced": (lambda m: torch.jit.trace(m, rows()), "the Python module that it was made of"),
}


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()


def wrapped(quantizer="qat"):
    config = [{"q_bits": 8, "op_types": ["default"], "quantizer": quantizer}]
    torch.manual_seed(1)
    return kt.wrap(net(), config, example_inputs=rows(), calibration_data=rows(6, 16))


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_module_inside_another_is_asked_for(name, tmp_path):
    around, text = AROUND[name]
    with pytest.raises(kt.ModelError, match=text):
        kt.wrap(around(net()), example_inputs=rows())
    with pytest.raises(kt.ModelError, match=text):
        kt.QAT_Quantizer()(around(net()), example_inputs=rows())
    if name == "traced":
        return
    inside = around(wrapped())
    for call in (
        lambda: kt.export_torchscript(inside, tmp_path / "model.pt", example_inputs=rows()),
        lambda: kt.export_onnx(inside, tmp_path / "model.pt", example_inputs=rows()),
        lambda: kt.export_program(inside, tmp_path / "model.pt", example_inputs=rows()),
        lambda: kt.verify(inside, tmp_path / "model.pt", rows()),
        lambda: kt.freeze_observers(inside),
        lambda: kt.reestimate_batch_norm(inside, rows()),
    ):
        with pytest.raises(kt.ModelError, match=text):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_autocast_and_inference_mode_change_nothing(quantizer, tmp_path):
    plain = wrapped(quantizer)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = wrapped(quantizer)
    with torch.inference_mode():
        inferred = wrapped(quantizer)
    for other in (mixed, inferred):
        states = zip(plain.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)
        loss = other.train()(rows()).square().mean()
        loss.backward()
    path, again, data = tmp_path / "model.pt", tmp_path / "again.pt", rows(6, 64)
    kt.export_torchscript(plain.eval(), path, example_inputs=rows())
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        kt.export_torchscript(plain, again, example_inputs=rows())
        assert kt.verify(plain, again, data).ok
    assert path.read_bytes() == again.read_bytes()


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, *xs):
        return self.inner(xs[0])


def test_arguments_of_odd_kinds(tmp_path):
    with pytest.raises(kt.UnsupportedError, match=r"names the arguments.*forward\(self, x, ...\)"):
        kt.wrap(Many(), example_inputs=rows())
    with pytest.raises(kt.ModelError, match="a dense tensor"):
        kt.wrap(net(), example_inputs=rows().to_sparse())
    broken = net()
    broken[1].running_var.fill_(float("nan"))
    with pytest.raises(kt.ModelError, match=r"buffer '1.running_var'"):
        kt.wrap(broken, example_inputs=rows())
    qmodel = wrapped()
    for wrong in (rows() * float("nan"), rows()[:0]):
        with pytest.raises(kt.ModelError, match="finite values of at least one sample"):
            kt.export_torchscript(qmodel, tmp_path / "model.pt", example_inputs=wrong)
    assert not list(tmp_path.iterdir())


def test_an_artifact_says_what_it_cannot_run(tmp_path):
    path = tmp_path / "model.pt"
    kt.export_torchscript(wrapped().eval(), path, example_inputs=rows())
    run = kt.load_artifact(path)
    with pytest.raises(kt.ArtifactError, match=r"sizes that its kernels take.*\(4, 7\)"):
        run(rows(7))
    for wrong in ("text", None):
        with pytest.raises(kt.ArtifactError, match="tensors or arrays"):
            run(wrong)


def test_a_mask_may_be_infinite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.register_buffer("mask", torch.full((6,), float("-inf")).where(torch.arange(6) > 3, torch.zeros(6)))

        def forward(self, x):
            return torch.softmax(self.inner(x) + self.mask, -1)

    qmodel = kt.wrap(Masked(), example_inputs=rows(), calibration_data=rows())
    assert (copy.deepcopy(qmodel).eval()(rows())[:, 4:] == 0).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_nobody_can_look_into_still_trains():
    swish = torch.jit.script(_swish)

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            return swish(self.a(x))

    qmodel = kt.wrap(Scripted(), example_inputs=rows(), calibration_data=rows()).train()
    qmodel(rows()).square().mean().backward()
    assert qmodel.a.weight.grad.abs().sum() > 0
    assert type(qmodel.a).__name__ == "QuantizedLinear"


def _swish(x):
    return x * torch.sigmoid(x)
