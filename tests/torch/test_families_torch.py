"""Every architecture: wrap, train two steps, export, compare op by op; and how much of the signal 8 bits keep."""

import pytest
import torch
from families_torch import FAMILIES, built

import kquant_torch


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_keep_the_signal(name):
    model, images = built(name)
    qmodel = kquant_torch.wrap(model, example_inputs=images[:2], calibration_data=images).eval()
    with torch.no_grad():
        real, found = model(images), qmodel(images)
    snr = 10 * float(torch.log10(real.square().sum() / (real - found).square().sum()))
    print(f"{name}: {snr:.1f} dB")
    assert snr >= 15


RESIDUAL = ("resnet basic", "resnet bottleneck", "mobilenet v2", "efficientnet", "regnet")
# Target of the training, backend of the file; and those of which every family takes minutes more, with one in three.
USUAL = [(name, "onednn", "onednn") for name in FAMILIES]
OTHERS = [(name, "onednn", "quantized") for name in FAMILIES] + [(name, "onednn_fused", "onednn") for name in RESIDUAL]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        few = metafunc.config.getoption("families") == "few"
        metafunc.parametrize(("name", "target", "backend"), USUAL + (OTHERS[1::3] if few else OTHERS))


def test_trained_two_steps_it_is_exported_and_verified(name, target, backend, tmp_path):
    model, images = built(name)
    qmodel = kquant_torch.wrap(model, example_inputs=images[:2], calibration_data=images, target=target).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 1e-3)
    for part in images.split(16):
        loss = qmodel(part).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path / "model.pt"
    report = kquant_torch.export_torchscript(qmodel, path, example_inputs=images[:2], backend=backend)
    parity = kquant_torch.verify(qmodel, path, images[:8])
    assert report is not None and parity.ok, str(parity)
    assert parity.max_lsb <= 0.6 and kquant_torch.audit(path).fully_integer
    assert any(op.kind == "conv2d + add" for op in parity.ops) == (target == "onednn_fused")
