"""What is refused, and what the message says: where, what was expected, what was received and what to do."""

import numpy as np
import pytest
import torch
from nets_torch import Net, images
from torch import nn

import kquant_torch as kt

X = torch.randn(4, 6)


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def refuses(error, text, **arguments):
    call = {"model": mlp(), "config_list": None, "example_inputs": X, **arguments}
    with pytest.raises(error, match=text) as caught:
        kt.wrap(call.pop("model"), call.pop("config_list"), **call)
    message = str(caught.value)
    assert ":" in message and len(message) > 20
    return message


@pytest.mark.parametrize(
    "inputs, text",
    [
        (None, "the inputs of one call of the model"),
        (torch.randn(4, 7), r"inputs that the model can be called on.*Received: \{'input': \(4, 7\)\}"),
        (torch.tensor(1.0), "samples on axis 0"),
        (torch.randn(0, 6), "at least one"),
        (X.double(), "float32 values"),
        (X.to(torch.complex64), "real numbers"),
        ((X, X), "arguments of"),
        ({"x": X}, "arguments of"),
        (("text",), "a tensor. "),
        (torch.full((2, 6), float("nan")), "finite values"),
    ],
)
def test_example_inputs(inputs, text):
    refuses(kt.ModelError, text, example_inputs=inputs)


def test_models():
    refuses(kt.ModelError, "a torch.nn.Module", model=np.ones(3))
    refuses(kt.ModelError, "Call model.float", model=mlp().half())
    refuses(kt.ModelError, "Call model.float", model=mlp().bfloat16())
    refuses(kt.ModelError, "real numbers", model=nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)))
    refuses(kt.ModelError, "a tensor on the device", model=mlp().to("meta"))
    broken = mlp()
    broken[0].weight.data[0, 0] = float("inf")
    refuses(kt.ModelError, r"parameter '0.weight'.*finite", model=broken)
    config = [{"op_types": ["Linear"], "exclude": True}]
    refuses(kt.ConfigError, "at least one entry that quantizes", config_list=config)
    refuses(kt.ModelError, "at least one quantizable layer", model=nn.Sequential(nn.Identity(), nn.Dropout()))
    qmodel = kt.wrap(mlp(), example_inputs=X)
    refuses(kt.ModelError, "already wrapped", model=qmodel)


def test_a_parameter_with_two_settings():
    model = mlp()
    model.append(nn.Linear(3, 5))
    model.append(nn.Linear(5, 3))
    model[4].weight = model[2].weight
    config = [{"q_bits": 8, "op_types": ["default"]}, {"q_bits": {"weight": 4, "output": 8}, "op_names": ["4"]}]
    message = refuses(kt.ConfigError, "layers '2' and '4' share one parameter", model=model, config_list=config)
    assert "8" in message and "4" in message
    kt.wrap(model, example_inputs=X)  # with one setting they are quantized alike


@pytest.mark.parametrize(
    "model, text",
    [
        (nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 2, 2, padding="same"), "pads an even window more on one side"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3)), "parametrizations"),
        (torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 2, 3)), "parametrizations"),
        (nn.LocalResponseNorm(2), "LocalResponseNorm has no integer form"),
        (nn.MaxPool2d(2, return_indices=True), "indices of a max pool"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_layers_without_an_integer_form(model, text):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), model)
    message = refuses(kt.UnsupportedError, text, model=model, example_inputs=torch.randn(2, 3, 8, 8))
    assert "'exclude': True" in message
    config = [{"q_bits": 8, "op_types": ["default"]}, {"op_names": ["1"], "exclude": True}]
    plan = kt.plan(model, config, example_inputs=torch.randn(2, 3, 8, 8))
    assert plan.floats["1"] == "excluded by config_list[1]"


@pytest.mark.parametrize(
    "config, text",
    [
        ([{"q_bits": {"output": 16}, "op_types": ["default"]}], "8-bit activations at most"),
        ([{"q_bits": 8, "op_types": ["Conv2D"]}], "did you mean|Linear"),
        ([{"q_bits": 8, "op_names": ["3"]}], "names that exist in the model"),
        ([{"q_bits": 9, "op_types": ["default"]}], "weight bits among"),
        ([{"qbits": 8, "op_types": ["default"]}], "unknown key"),
    ],
)
def test_config_lists(config, text):
    refuses(kt.ConfigError, text, config_list=config)


@pytest.mark.parametrize(
    "data, text",
    [
        (torch.randn(4, 7), "shape"),
        (torch.full((4, 6), float("inf")), "finite"),
        ([], "at least one batch"),
        (7, "an array of samples"),
    ],
)
def test_calibration_data(data, text):
    refuses(kt.CalibrationError, text, calibration_data=data)


def test_choices():
    refuses(kt.ConfigError, "'onednn'", target="onednm")
    refuses(kt.ConfigError, "'minmax'", observer="min")


def test_controls_refuse_what_is_not_wrapped_or_not_set():
    with pytest.raises(kt.ModelError, match="a wrapped model"):
        kt.freeze_observers(mlp())
    with pytest.raises(kt.ModelError, match="ranges set by data"):
        kt.freeze_observers(kt.wrap(mlp(), example_inputs=X))
    with pytest.raises(kt.ConfigError, match="a positive number of batches"):
        kt.reestimate_batch_norm(kt.wrap(Net(), example_inputs=images()), images(), batches=0)


def test_gradient_bits_need_a_module():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    config = [{"q_bits": {"weight": 2, "output": 4, "gradient": 6}, "op_types": ["default"], "quantizer": "dorefa"}]
    refuses(kt.UnsupportedError, "gradient bits need a layer that is a module", model=Functional(), config_list=config)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_train_on_quantized_weights_and_the_plan_says_that_they_stay_float(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = getattr(nn, kind)(6, 5, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x):
            y, _ = self.cell(x)
            return self.head(y[:, -1])

    model, x = Recurrent(), torch.randn(4, 7, 6)
    config = [{"q_bits": {"weight": 3, "output": 8}, "op_types": ["default"]}]
    plan = kt.plan(model, config, example_inputs=x)
    assert plan.floats["cell"].startswith("no integer kernel: its weights are quantized")
    assert plan.weights["cell"].bits == 3
    assert {row.layer: row.kernel for row in plan.rows}["head"] == "onednn::qlinear_pointwise"
    qmodel = kt.wrap(model, config, example_inputs=x, calibration_data=x)
    seen = qmodel.cell.weight_quantizers["weight_hh_l1_reverse"](qmodel.cell.weight_hh_l1_reverse)
    assert max(len(torch.unique(row)) for row in seen) <= 7  # codes -3 .. 3 in each row
    float_cell, exact = model.cell.eval(), qmodel.cell.eval()
    with torch.no_grad():
        torch.testing.assert_close(exact.run(x, quantized=False)[0], float_cell(x)[0])
    qmodel.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in qmodel.named_parameters() if "weight" in n and "reverse" not in n)


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4), nn.PReLU(4), nn.Linear(4, 4)])
def test_weights_that_training_made_nan_are_not_exported(layer, tmp_path):
    x = torch.arange(4).reshape(2, 2) if isinstance(layer, nn.Embedding) else torch.randn(2, 4)
    qmodel = kt.wrap(nn.Sequential(layer), example_inputs=x, calibration_data=x.numpy())
    with torch.no_grad():
        qmodel[0].weight.fill_(float("nan"))
    with pytest.raises(kt.ModelError, match="layer '0': a finite"):
        kt.export_torchscript(qmodel, tmp_path / "m.pt", example_inputs=x)
    assert list(tmp_path.iterdir()) == []


class Attending(nn.Module):
    """Attention over tokens, called as `call` says."""

    def __init__(self, call, **settings):
        super().__init__()
        self.a, self.call = nn.MultiheadAttention(8, 2, **{"batch_first": True, **settings}), call

    def forward(self, x, mask):
        return self.call(self.a, x, mask)[0]


@pytest.mark.parametrize(
    ("call", "settings", "words"),
    [
        (lambda a, x, m: a(x, x, x, key_padding_mask=m, need_weights=False), {}, "key_padding_mask"),
        (lambda a, x, m: a(x, x, x, need_weights=False), {"add_zero_attn": True}, "add_zero_attn"),
        (lambda a, x, m: a(x, x, x, need_weights=False), {"batch_first": False}, "samples on axis 1"),
    ],
)
def test_an_attention_without_an_integer_form_says_why(call, settings, words):
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 5))
    with pytest.raises(kt.UnsupportedError, match=words) as refusal:
        kt.wrap(Attending(call, **settings), example_inputs=inputs)
    assert "layer 'a' (MultiheadAttention)" in str(refusal.value)
