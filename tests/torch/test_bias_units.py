"""Biases in int32: where weights of few bits make their unit coarse, codes are spread so that it becomes finer."""

import numpy as np
import pytest
import torch
from torch import nn

import kquant_torch
from kquant.core.errors import RangeError
from kquant_torch.archive import decode
from kquant_torch.onnx_export import OnnxFile


def cancelling(bits: int, apart: float = 0.03):
    """A layer of large inputs and small outputs (about `apart`): one step of its bias is many output codes."""
    random = np.random.default_rng(0)
    x = random.uniform(-4, 4, (256, 1))
    x = torch.from_numpy(np.concatenate([x, x + random.normal(0, apart, x.shape)], 1).astype(np.float32))
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))
        model[0].bias.copy_(torch.tensor([0.015, 0.0031]))
    config = [{"q_bits": {"weight": bits, "output": 8}, "op_types": ["default"]}]
    return kquant_torch.wrap(model, config, example_inputs=x[:2], calibration_data=[x]).eval(), x


def held(path, kind):
    """The kernel's codes and scales in the file."""
    if kind == "onnx":
        arrays = OnnxFile(path.read_bytes(), "file", None).arrays
        return arrays["0/kernel"], arrays["0/kernel/scale"]
    tensors = decode(path.read_bytes(), "file").tensors
    return [next(v for k, v in tensors.items() if k.endswith(end)) for end in ("_kernel", "_scale")]


def export(qmodel, kind, path, x):
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
        kquant_torch.export_onnx(qmodel, path, example_inputs=x[:2])
    else:
        kquant_torch.export_torchscript(qmodel, path, example_inputs=x[:2], backend="quantized")


@pytest.mark.parametrize("kind", ["quantized", "onnx"])
@pytest.mark.parametrize(("bits", "gain"), [(2, 64), (3, 16), (5, 4)])
def test_low_bit_codes_are_spread_until_the_bias_fits(kind, bits, gain, tmp_path):
    qmodel, x = cancelling(bits)
    export(qmodel, kind, tmp_path / "m", x)
    parity = kquant_torch.verify(qmodel, tmp_path / "m", [x])
    assert parity.ok, parity.problems
    codes, scale = held(tmp_path / "m", kind)
    qmax = 2 ** (bits - 1) - 1
    assert np.abs(codes).max() == gain * qmax <= 64  # no pair of products leaves int16 without VNNI
    np.testing.assert_array_equal(codes, gain * qmax * np.array([[1, -1], [-1, 1]]))
    np.testing.assert_array_equal(scale, np.float32([1.0, 0.5]) / np.float32(qmax) / np.float32(gain))


@pytest.mark.parametrize("kind", ["quantized", "onnx"])
def test_where_no_code_is_left_to_spread_the_tensor_is_named(kind, tmp_path):
    qmodel, x = cancelling(7, apart=0.001)
    with pytest.raises(RangeError, match=r"tensor '0'.*bias of its layer must be exact to 0.4 output codes"):
        export(qmodel, kind, tmp_path / "m", x)
    assert not (tmp_path / "m").exists()
