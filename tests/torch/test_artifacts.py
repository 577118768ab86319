"""Every layer, function and way of writing through a file: written, audited, loaded, each op held against the model."""

import pytest
import torch
from snippets_torch import ACTIVATIONS, FUNCTIONS, LAYERS, activation, example

import kquant_torch

CONFIGS = {
    "W8A8": None,
    "W4A4": [{"q_bits": 4, "op_types": ["default"]}],
    "DoReFa W2A3": [{"q_bits": {"weight": 2, "output": 3}, "op_types": ["default"], "quantizer": "dorefa"}],
}
ALL = {**LAYERS, **FUNCTIONS, **{f"activation {n}": activation(n) for n in ACTIVATIONS}}
ROUNDS = 12  # batches; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_a_file_holds_and_computes_what_was_trained(name, config, tmp_path):
    torch.manual_seed(len(name))
    model = ALL[name][0]()
    batches = [example(ALL[name]) for _ in range(ROUNDS)]
    model.train()
    with torch.no_grad():
        model(*batches[0])  # statistics that are not trivial
    qmodel = kquant_torch.wrap(model.eval(), CONFIGS[config], example_inputs=batches[0], calibration_data=batches[:3])
    qmodel.eval()
    path = tmp_path / "model.pt"
    report = kquant_torch.export_torchscript(qmodel, path, example_inputs=batches[0])
    assert report.fully_integer and kquant_torch.audit(path).fully_integer
    parity = kquant_torch.verify(qmodel, path, batches)
    assert parity.ok, parity.problems
    again = tmp_path / "again.pt"
    kquant_torch.export_torchscript(qmodel, again, example_inputs=batches[0])
    assert path.read_bytes() == again.read_bytes()
    made = kquant_torch.load_artifact(path)(list(batches[0]))
    with torch.no_grad():
        assert made.shape == qmodel(*batches[0]).shape
