"""`target="onednn_fused"`: a sum inside the convolution before it, in the plan, in training and in the file."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch
from kquant.core.errors import ArtifactError, ConfigError, ExportError
from kquant_torch.archive import Archive, decode, encode
from kquant_torch.fake_quantize import FakeQuantize

ROUNDS = 12  # batches; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values


def images(seed: int = 1, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 6, 8, 8, generator=torch.Generator().manual_seed(seed))


class Sums(nn.Module):
    """Layers of several kinds, and a function of them and an image that has the sums of one case."""

    def __init__(self, function):
        super().__init__()
        self.a = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.b = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.strided = nn.Conv2d(6, 8, 3, 2, 1)
        self.shortcut = nn.Conv2d(6, 8, 1, 2)
        self.up = nn.ConvTranspose2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


# name: (function, sums that a convolution computes, sums that stay apart)
CASES = {
    "conv + x": (lambda m, x: m.a(x) + x, 1, 0),
    "x + conv": (lambda m, x: x + m.a(x), 1, 0),
    "norm and relu": (lambda m, x: F.relu(m.norm(m.a(x)) + x), 1, 0),
    "relu6": (lambda m, x: F.relu6(m.norm(m.a(x)) + x), 1, 0),
    "dropout between": (lambda m, x: F.relu(m.drop(m.norm(m.a(x))) + x), 1, 0),
    "depthwise": (lambda m, x: F.relu(m.depth(x) + x), 1, 0),
    "two convolutions, one of them": (lambda m, x: F.relu(m.norm(m.a(x)) + m.b(x)), 1, 0),
    "strided shortcut": (lambda m, x: F.relu(m.strided(x) + m.shortcut(x)), 1, 0),
    "blocks after each other": (lambda m, x: F.relu(m.b(F.relu(m.norm(m.a(x)) + x)) + x), 2, 0),
    "one convolution twice": (lambda m, x: m.a(m.a(x) + x) + x, 2, 0),
    "a sum of three": (lambda m, x: m.a(x) + x + m.b(x), 2, 0),
    "an operand made later": (lambda m, x: (lambda y: y + F.max_pool2d(x, 3, 1, 1))(m.a(x)), 1, 0),
    "an operand with other readers": (lambda m, x: (lambda y: (m.b(x) + y) * y)(F.relu(m.a(x))), 1, 0),
    "concatenated operand": (lambda m, x: m.a(x) + torch.cat([x[:, :3], F.relu(m.b(x))[:, 3:]], 1), 1, 0),
    "not a transposed convolution": (lambda m, x: m.up(x) + x, 0, 1),
    "not over relu": (lambda m, x: F.relu(m.a(x)) + x, 0, 1),
    "not a convolution read twice": (lambda m, x: (lambda y: (y + x) * y)(m.a(x)), 0, 1),
    "not a difference": (lambda m, x: m.a(x) - x, 0, 1),
    "not by broadcasting": (lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), 0, 1),
    "not a constant": (lambda m, x: m.a(x) + 1.5, 0, 1),
    "not with itself": (lambda m, x: (lambda y: y + y)(m.a(x)), 0, 1),
    "norm behind the sum": (lambda m, x: m.norm(m.a(x) + x), 1, 0),
}  # fmt: skip
CONFIGS = {
    "W8A8": None,
    "W4A4": [{"q_bits": 4, "op_types": ["default"]}],
    "DoReFa W2A3": [{"q_bits": {"weight": 2, "output": 3}, "op_types": ["default"], "quantizer": "dorefa"}],
}


def wrapped(case="norm and relu", config=None, target="onednn_fused", **options) -> nn.Module:
    torch.manual_seed(3)
    model = Sums(CASES[case][0])
    with torch.no_grad():
        model.train()(images(0, 16))
        model.norm.weight.copy_(torch.linspace(-1.5, 1.5, 6))
    data = [images(s) for s in range(2, 5)]
    return kquant_torch.wrap(
        model.eval(), config, example_inputs=images(), calibration_data=data, target=target, **options
    ).eval()


def exported(qmodel, path, **options) -> bytes:
    kquant_torch.export_torchscript(qmodel, path, example_inputs=images(), **options)
    return path.read_bytes()


def counted(report) -> tuple[int, int]:
    """How many ops of a parity report are a convolution with a sum, and how many a sum or difference alone."""
    kinds = [op.kind for op in report.ops]
    return kinds.count("conv2d + add"), kinds.count("add") + kinds.count("sub")


# Every case at 8 bits, every third at fewer.
HELD = [(c, "W8A8") for c in CASES] + [(c, k) for k in ("W4A4", "DoReFa W2A3") for c in list(CASES)[::3]]


@pytest.mark.parametrize(("case", "config"), HELD)
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_a_file_holds_and_computes_what_was_trained(case, config, tmp_path):
    qmodel = wrapped(case, CONFIGS[config]).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 1e-2)
    qmodel(images()).square().mean().backward()
    optimizer.step()
    data = exported(qmodel.eval(), tmp_path / "model.pt")
    assert data == exported(qmodel, tmp_path / "again.pt")
    parity = kquant_torch.verify(qmodel, tmp_path / "model.pt", [images(s) for s in range(20, 20 + ROUNDS)])
    assert parity.ok and parity.max_lsb <= 0.6, parity.problems
    assert counted(parity) == CASES[case][1:]
    audit = kquant_torch.audit(tmp_path / "model.pt")
    assert audit.fully_integer and audit.integer_mac_fraction == 1.0
    usual = wrapped(case, CONFIGS[config], "onednn")
    exported(usual, tmp_path / "usual.pt")
    assert audit.macs == kquant_torch.audit(tmp_path / "usual.pt").macs
    assert counted(kquant_torch.verify(usual, tmp_path / "usual.pt", images()))[0] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_sum_that_a_convolution_computes_has_one_range_less(case):
    quantizers = [
        sum(isinstance(m, FakeQuantize) for m in wrapped(case, target=target).modules())
        for target in ("onednn", "onednn_fused")
    ]
    assert quantizers[0] - quantizers[1] == CASES[case][1]


def test_the_plan_shows_it_and_the_usual_target_stays_as_it_is():
    def rows(target):
        plan = kquant_torch.plan(Sums(CASES["norm and relu"][0]), example_inputs=images(), target=target)
        return [(row.layer, row.note) for row in plan.rows], plan.to_dict()["target"]

    assert rows("onednn_fused") == (
        [("a", "fused: norm + add + relu; not quantized before the sum")],
        "onednn_fused",
    )
    assert rows("onednn") == ([("a", "fused: norm"), ("add", "fused: relu")], "onednn")


def test_training_computes_what_the_kernel_does():
    """relu(conv(x) + x), and no rounding between convolution and sum, from the ranges and codes alone."""
    qmodel = wrapped("norm and relu")
    quantizers = [m for m in qmodel.modules() if isinstance(m, FakeQuantize)]
    assert len(quantizers) == 2

    def on_grid(x, quantizer):
        low, high = (np.float32(v) for v in quantizer.range())
        scale = (high - low) / np.float32(255)
        zero_point = int(np.rint(-low / scale))
        return torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, 0, 255)

    with torch.no_grad():
        x = on_grid(images(9), quantizers[0])
        weight = qmodel.a.weight
        scale = weight.abs().amax((1, 2, 3)) / 127
        kernel = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(6, dtype=torch.int32), 0, -127, 127)
        expected = on_grid(F.relu(qmodel.norm(F.conv2d(x, kernel, padding=1)) + x), quantizers[1])
        step = float(quantizers[1].range()[1]) / 255
        apart = (qmodel(images(9)) - expected).abs()
    # Only a value halfway between two codes, within float32, may fall the other way.
    assert apart.max() < 1.01 * step and (apart > 0.01 * step).float().mean() < 1e-3


def test_the_values_are_not_those_of_the_usual_target():
    with torch.no_grad():
        fused, usual = (wrapped(target=t)(images(9)) for t in ("onednn_fused", "onednn"))
    assert not torch.equal(fused, usual)


@pytest.mark.parametrize(
    ("entry", "fused"),
    [
        ({"op_names": ["add"], "exclude": True}, 0),
        ({"op_names": ["add"], "q_bits": {"weight": 8, "output": 32}}, 0),
        ({"op_names": ["a"], "exclude": True}, 0),
        ({"op_names": ["add"], "q_bits": 6}, 1),
    ],
)
def test_entries_decide_over_each_op_of_the_sum(entry, fused, tmp_path):
    config = [{"q_bits": 8, "op_types": ["default"]}, entry]
    qmodel = wrapped("conv + x", config)
    report = kquant_torch.export_torchscript(qmodel, tmp_path / "m.pt", example_inputs=images(), allow_float=True)
    assert report.fully_integer == bool(fused)
    parity = kquant_torch.verify(qmodel, tmp_path / "m.pt", [images(s) for s in range(20, 20 + ROUNDS)])
    assert parity.ok, parity.problems
    assert counted(parity)[0] == fused
    if fused:  # the output of the fused op is that of the sum; a model output keeps the bits of an entry with names
        assert [op.bits for op in parity.ops if op.kind == "conv2d + add"] == [6]


def test_a_sum_without_an_entry_stays_apart():
    plan = kquant_torch.plan(
        Sums(CASES["conv + x"][0]), [{"q_bits": 8, "op_types": ["Conv2d"]}], example_inputs=images(),
        target="onednn_fused",
    )  # fmt: skip
    assert [(r.layer, r.kernel) for r in plan.rows] == [("a", "onednn::qconv_pointwise"), ("add", "float")]


def test_contradictory_bits_name_both_entries():
    config = [{"q_bits": 8, "op_names": ["a"]}, {"q_bits": 4, "op_names": ["add"]}]
    with pytest.raises(ConfigError, match=r"config_list\[0\] and config_list\[1\].*fused ops \(a, norm, add, relu\)"):
        wrapped("norm and relu", config)


@pytest.mark.parametrize(
    ("export", "name"),
    [
        (lambda m, p: kquant_torch.export_torchscript(m, p, example_inputs=images(), backend="quantized"), "quantized"),
        (lambda m, p: kquant_torch.export_onnx(m, p, example_inputs=images()), "onnx"),
        (lambda m, p: kquant_torch.export_program(m, p, example_inputs=images()), "onednn"),
    ],
)
def test_other_artifacts_are_refused_by_the_names_of_the_layers(export, name, tmp_path):
    with pytest.raises(ExportError, match=r"layers 'a', 'b': .* was trained for 'onednn_fused'.*target=.onednn") as e:
        export(wrapped("blocks after each other"), tmp_path / "m")
    assert f"an artifact for {name!r}, which has none for 2 sums" in str(e.value)
    assert not list(tmp_path.iterdir())
    without = wrapped("not over relu")  # nothing in it is fused, so every artifact can hold it
    export(without, tmp_path / "m")
    assert kquant_torch.verify(without, tmp_path / "m", [images(s) for s in range(ROUNDS)]).ok


def test_a_file_for_one_target_is_not_taken_for_the_other(tmp_path):
    exported(wrapped(), tmp_path / "fused.pt")
    exported(wrapped(target="onednn"), tmp_path / "usual.pt")
    targets = [decode((tmp_path / f).read_bytes()).extra["kquant.json"] for f in ("fused.pt", "usual.pt")]
    assert ['"target": "onednn_fused"' in t for t in targets] == [True, False]
    with pytest.raises((ArtifactError, ExportError)):
        kquant_torch.verify(wrapped(target="onednn"), tmp_path / "fused.pt", images())
    with pytest.raises((ArtifactError, ExportError)):
        kquant_torch.verify(wrapped(), tmp_path / "usual.pt", images())


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("kernel", "op 'relu': the kernel of channel"),
        ("bias", "op 'relu': the bias of channel"),
        ("scale", "op 'relu': the kernel of channel"),
        ("accumulator", "tensor 'x/quantized': scale and zero point"),
        ("addend", "op 'relu' (conv2d + add): max_lsb"),
    ],
)
def test_one_change_in_the_file_is_caught(what, problem, tmp_path):
    qmodel = block().eval()
    archive = decode(exported(qmodel, tmp_path / "m.pt"))
    code, tensors = archive.code, dict(archive.tensors)
    if what in ("kernel", "bias", "scale"):
        changed = tensors[f"relu_{what}"].copy()
        changed.flat[0] += {"kernel": 1, "bias": np.float32(0.01), "scale": changed.flat[0] / 1000}[what]
        tensors[f"relu_{what}"] = changed
    elif what == "accumulator":
        code = re.sub(r'(\d+), "sum"', lambda m: f'{int(m[1]) + 1}, "sum"', code)
    else:
        code = re.sub(r"torch.clone\([^)]*\)", lambda m: f"torch.clamp({m[0]}, 0, 200)", code)
    (tmp_path / "m.pt").write_bytes(encode(Archive(code, tensors, archive.extra)))
    report = kquant_torch.verify(qmodel, tmp_path / "m.pt", images(6))
    assert not report.ok and any(problem in p for p in report.problems), report.problems


class Block(nn.Module):
    """A residual block that can be pickled: no function in it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


def block() -> nn.Module:
    torch.manual_seed(4)
    return kquant_torch.wrap(Block(), example_inputs=images(), calibration_data=images(2), target="onednn_fused")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_know_what_they_were_made_for(copied, tmp_path):
    qmodel = block().eval()
    assert exported(copied(qmodel), tmp_path / "copy.pt") == exported(qmodel, tmp_path / "model.pt")


def test_a_state_dict_and_the_compiler_do_not_change_it(tmp_path):
    qmodel, other = block().train(), block().train()
    qmodel(images()).square().mean().backward()
    torch.optim.SGD(qmodel.parameters(), 0.1).step()
    other.load_state_dict(qmodel.state_dict(), strict=True)
    assert exported(other.eval(), tmp_path / "a.pt") == exported(qmodel.eval(), tmp_path / "b.pt")
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(images(5)), qmodel(images(5)))


def test_the_quantizers_take_it_too():
    plain = copy.deepcopy(Block())
    made = kquant_torch.QAT_Quantizer()(plain, calibration_data=images(2), target="onednn_fused")
    assert sum(isinstance(m, FakeQuantize) for m in made.modules()) == 2


class Chain(nn.Module):
    """Random convolutions, norms and activations; every second gives its result to a sum with an earlier tensor."""

    def __init__(self, random: np.random.Generator):
        super().__init__()
        self.steps, shapes = [], [(6, 8)]
        for i in range(5):
            source = int(random.integers(len(shapes)))
            inside, size = shapes[source]
            groups = int(random.choice([1, 1, 2, inside]))
            window, dilation = int(random.choice([1, 3])), int(random.integers(1, 3))
            stride = int(random.choice([1, 1, 2])) if size > 4 else 1
            outside = int(random.choice([inside, 6, 12]))
            outside = outside if outside % groups == 0 else inside
            reach = dilation * (window - 1) // 2
            conv = nn.Conv2d(
                inside, outside, window, stride, reach, dilation, groups, bias=bool(random.integers(2))
            )  # fmt: skip
            self.add_module(f"conv{i}", conv)
            shape = (outside, (size + stride - 1) // stride)
            if random.integers(2):
                self.add_module(f"norm{i}", nn.BatchNorm2d(outside))
            alike = [t for t, other in enumerate(shapes) if other == shape]
            addend = int(random.choice(alike)) if alike else None
            act = (None, F.relu, F.relu6, F.silu, torch.tanh)[int(random.integers(5))]
            self.steps.append((source, addend, act, bool(random.integers(2))))
            shapes.append(shape)

    def forward(self, x):
        tensors = [x]
        for i, (source, addend, act, first) in enumerate(self.steps):
            y = self._modules[f"conv{i}"](tensors[source])
            y = self._modules[f"norm{i}"](y) if f"norm{i}" in self._modules else y
            if addend is not None:
                y = tensors[addend] + y if first else y + tensors[addend]
            tensors.append(y if act is None else act(y))
        return tuple(tensors[1:])


def conv_sums(chain: Chain) -> int:
    return sum(addend is not None for _, addend, _, _ in chain.steps)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_random_chains_keep_the_contract(seed, tmp_path):
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    chain = Chain(random)
    with torch.no_grad():
        chain.train()(images(0, 16))
    config = [{
        "q_bits": {"weight": int(random.integers(2, 9)), "output": int(random.integers(2, 9))},
        "op_types": ["default"], "quantizer": str(random.choice(["qat", "naive", "dorefa"])),
    }]  # fmt: skip
    data = [images(s) for s in range(2, 5)]
    qmodel = kquant_torch.wrap(
        chain.eval(), config, example_inputs=images(), calibration_data=data, target="onednn_fused"
    ).eval()
    exported(qmodel, tmp_path / "m.pt")
    parity = kquant_torch.verify(qmodel, tmp_path / "m.pt", [images(s) for s in range(20, 20 + ROUNDS)])
    assert parity.ok and kquant_torch.audit(tmp_path / "m.pt").fully_integer, parity.problems
    assert counted(parity) == (conv_sums(chain), 0)
