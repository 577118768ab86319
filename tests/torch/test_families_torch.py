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


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_two_steps_it_is_exported_and_verified(name, tmp_path):
    model, images = built(name)
    qmodel = kquant_torch.wrap(model, example_inputs=images[:2], calibration_data=images).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 1e-3)
    for part in images.split(16):
        loss = qmodel(part).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path / "model.pt"
    report = kquant_torch.export_torchscript(qmodel, path, example_inputs=images[:2])
    parity = kquant_torch.verify(qmodel, path, images[:8])
    assert report is not None and parity.ok, str(parity)
    assert parity.max_lsb <= 0.6 and kquant_torch.audit(path).fully_integer
