"""Small PyTorch models to export in Q/DQ form: the same cases for ONNX and for `.pt2`."""

import torch
from functions_torch import FUNCTIONS
from snippets_torch import ACTIVATIONS, LAYERS, activation, example

import kquant_torch

CONFIGS = {"W8A8": None, "W4A4": [{"q_bits": 4, "op_types": ["default"]}]}
ALL = {**LAYERS, **FUNCTIONS, **{f"activation {n}": activation(n) for n in ACTIVATIONS}}
ROUNDS = 12  # batches; an op's mean error, whose limit is 0.02 codes, means nothing on a handful of values


def cases(chosen):
    """All of the names at 8 bits, every fifth at 4."""
    return [(name, "W8A8") for name in chosen] + [(name, "W4A4") for name in chosen[::5]]


def calibrated(name, config):
    """The wrapped model of a case and its batches."""
    torch.manual_seed(len(name))
    model = ALL[name][0]()
    batches = [example(ALL[name]) for _ in range(ROUNDS)]
    model.train()
    with torch.no_grad():
        model(*batches[0])
    qmodel = kquant_torch.wrap(model.eval(), CONFIGS[config], example_inputs=batches[0], calibration_data=batches[:3])
    return qmodel.eval(), batches
