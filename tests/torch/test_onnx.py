"""The ONNX file: every layer and function held against the model, and against the TorchScript file, in onnxruntime."""

import collections

import numpy as np
import pytest
import torch
from small_torch import exported, images
from snippets_torch import ACTIVATIONS, FUNCTIONS, LAYERS, activation, example

import kquant_torch
from kquant.core.errors import ArtifactError, ExportError, UnsupportedError
from kquant_torch.export import integer_model, quantized_graph
from kquant_torch.onnx_emit import ONNX
from kquant_torch.onnx_export import OnnxFile
from kquant_torch.run import run_all

onnx = pytest.importorskip("onnx", reason="onnx is an extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")

CONFIGS = {"W8A8": None, "W4A4": [{"q_bits": 4, "op_types": ["default"]}]}
ALL = {**LAYERS, **FUNCTIONS, **{f"activation {n}": activation(n) for n in ACTIVATIONS}}
REFUSED = {"grouped transposed conv", "transposed conv + norm"}
ROUNDS = 12  # batches; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ALL)
def test_a_file_holds_and_computes_what_was_trained(name, config, tmp_path):
    torch.manual_seed(len(name))
    model = ALL[name][0]()
    batches = [example(ALL[name]) for _ in range(ROUNDS)]
    model.train()
    with torch.no_grad():
        model(*batches[0])
    qmodel = kquant_torch.wrap(model.eval(), CONFIGS[config], example_inputs=batches[0], calibration_data=batches[:3])
    path = tmp_path / "model.onnx"
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match="groups"):
            kquant_torch.export_onnx(qmodel.eval(), path, example_inputs=batches[0])
        assert not path.exists()
        return
    kquant_torch.export_onnx(qmodel.eval(), path, example_inputs=batches[0])
    parity = kquant_torch.verify(qmodel, path, batches)
    assert parity.ok, parity.problems
