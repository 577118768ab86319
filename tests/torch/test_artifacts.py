"""Every layer, function and way of writing through a file: written, audited, loaded, each op held against the model."""

import pytest
import torch
from arguments_torch import ARGUMENTS
from functions_torch import FUNCTIONS
from snippets_torch import ACTIVATIONS, LAYERS, activation, example

import kquant_torch

CONFIGS = {
    "W8A8": None,
    "W4A4": [{"q_bits": 4, "op_types": ["default"]}],
    "DoReFa W2A3": [{"q_bits": {"weight": 2, "output": 3}, "op_types": ["default"], "quantizer": "dorefa"}],
}
ALL = {**LAYERS, **FUNCTIONS, **ARGUMENTS, **{f"activation {n}": activation(n) for n in ACTIVATIONS}}
# Backends and the engines that run them. qnnpack's int32 biases, sums and products are its own; x86 and onednn choose
# between the kernels of the others.
ENGINES = {"onednn": ("x86",), "quantized": ("fbgemm", "qnnpack")}
ROUNDS = 12  # batches; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values


def chosen(name: str, config: str) -> dict:
    """Backends and engines of a case: all of them at 8 bits, and for every sixth case at fewer."""
    return ENGINES if config == "W8A8" or list(ALL).index(name) % 6 == 0 else {"onednn": ENGINES["onednn"]}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_a_file_holds_and_computes_what_was_trained(name, config, tmp_path, quantized_engine):
    torch.manual_seed(len(name))
    model = ALL[name][0]()
    batches = [example(ALL[name]) for _ in range(ROUNDS)]
    model.train()
    with torch.no_grad():
        model(*batches[0])  # statistics that are not trivial
    qmodel = kquant_torch.wrap(model.eval(), CONFIGS[config], example_inputs=batches[0], calibration_data=batches[:3])
    qmodel.eval()
    for backend, engines in chosen(name, config).items():
        path, again = tmp_path / f"{backend}.pt", tmp_path / "again.pt"
        report = kquant_torch.export_torchscript(qmodel, path, example_inputs=batches[0], backend=backend)
        assert report.fully_integer and kquant_torch.audit(path).fully_integer
        for engine in engines:
            quantized_engine(engine)
            parity = kquant_torch.verify(qmodel, path, batches)
            assert parity.ok, (engine, parity.problems)
        kquant_torch.export_torchscript(qmodel, again, example_inputs=batches[0], backend=backend)
        assert path.read_bytes() == again.read_bytes()
        made = kquant_torch.load_artifact(path)(list(batches[0]))
        with torch.no_grad():
            assert made.shape == qmodel(*batches[0]).shape
