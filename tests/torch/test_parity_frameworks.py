"""One set of weights and ranges gives the codes of the golden file, which Keras 3 wrote."""

import golden_parity as golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody uses
from torch import nn

import kquant_torch
from kquant.core.affine import Affine
from kquant.core.weights import weight_formula
from kquant_torch.fake_quantize import FakeQuantize, fake_quantize_range
from kquant_torch.read import read
from kquant_torch.weights import WeightQuantizer


@pytest.fixture(scope="module")
def expected():
    with np.load(golden.FILE) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("quantizer, bits", golden.WEIGHTS)
def test_weight_codes(expected, quantizer, bits):
    w = torch.from_numpy(golden.kernel().transpose(3, 2, 0, 1).copy())
    codes, scale = WeightQuantizer(weight_formula(quantizer, bits, (1, 2, 3))).codes(w)
    wanted = expected[f"{quantizer}{bits}/codes"].transpose(3, 2, 0, 1)
    # tanh differs by an ulp between the frameworks, which decides codes on a rounding boundary only.
    differs = (codes.numpy() != wanted).mean()
    assert differs == 0 if quantizer != "dorefa" else differs <= 1 / wanted.size
    np.testing.assert_allclose(scale.numpy().ravel(), expected[f"{quantizer}{bits}/scale"].ravel(), rtol=2e-7)


@pytest.mark.parametrize("index", range(len(golden.RANGES)))
def test_activation_codes(expected, index):
    low, high, bits = golden.RANGES[index]
    affine = Affine.of_range(np.float32(low), np.float32(high), bits)
    found = fake_quantize_range(torch.from_numpy(golden.values()), torch.tensor(low), torch.tensor(high), bits).numpy()
    position = golden.values().astype(np.float64) / np.float64(affine.scale) + 0.5
    near = np.abs(position - np.round(position)) < 1e-4
    assert near.sum() < 60
    mine, theirs = affine.quantize(found), affine.quantize(expected[f"range{index}"])
    np.testing.assert_array_equal(mine[~near], theirs[~near])
    # TensorFlow's kernel adds the lower end to code * scale, which costs an ulp of that end.
    np.testing.assert_allclose(found[~near], expected[f"range{index}"][~near], rtol=2e-7, atol=1e-6)


class Twin(nn.Module):
    """The net of the golden file."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 5)
        p = {k: torch.from_numpy(v) for k, v in golden.net_weights().items()}
        values = {
            "stem.weight": p["stem"].permute(3, 2, 0, 1), "norm.weight": p["gamma"], "norm.bias": p["beta"],
            "norm.running_mean": p["mean"], "norm.running_var": p["variance"], "head.bias": p["head_bias"],
            "branch.weight": p["branch"].permute(3, 2, 0, 1), "branch.bias": p["branch_bias"],
            "head.weight": p["head"].T,
        }  # fmt: skip
        self.load_state_dict({**self.state_dict(), **values})

    def forward(self, x):
        y = F.relu(self.norm(self.stem(x)))
        return self.head((y + self.branch(y)).mean((2, 3)))


def test_a_net_and_its_twin_have_the_same_ranges_and_codes(expected):
    x = golden.net_input().transpose(0, 3, 1, 2)
    qmodel = kquant_torch.wrap(Twin().eval(), example_inputs=torch.from_numpy(x), calibration_data=torch.from_numpy(x))
    ranges = expected["net/ranges"]
    found, mine = golden.collected(read(qmodel), {"x": x})
    assert len(found) == len(ranges) == 6
    np.testing.assert_allclose(mine, ranges, rtol=1e-5, atol=1e-6)  # the frameworks sum convolutions in other orders
    quantizers = [m for m in qmodel.modules() if isinstance(m, FakeQuantize)]
    for quantizer, (low, high) in zip(quantizers, ranges, strict=True):
        quantizer.set_range(low, high, 0)
    found, _ = golden.collected(read(qmodel), {"x": x})
    for i, value in enumerate(found):
        affine = Affine.of_range(*ranges[i], 8)
        theirs = expected[f"net/{i}"]
        theirs = theirs.transpose(0, 3, 1, 2) if theirs.ndim == 4 else theirs
        distance = affine.quantize(value).astype(int) - affine.quantize(theirs)
        # Sums that lie on a rounding boundary: none or a few of thousands, and then by one code.
        assert np.abs(distance).max() <= 1 and (distance != 0).mean() < 1e-3
