"""Every layer, function and way of writing: what it is read as, that it trains quantized, and reads as it computes."""

import collections
import copy

import numpy as np
import pytest
import torch
from arguments_torch import ARGUMENTS
from functions_torch import FUNCTIONS
from snippets_torch import ACTIVATIONS, LAYERS, activation, example

import kquant_torch
from kquant.core.graph import walk
from kquant_torch.read import read

CONFIGS = {
    "W8A8": None,
    "naive": [{"q_bits": 8, "op_types": ["default"], "quantizer": "naive"}],
    "W4A4": [{"q_bits": 4, "op_types": ["default"]}],
    "DoReFa W2A3": [{"q_bits": {"weight": 2, "output": 3}, "op_types": ["default"], "quantizer": "dorefa"}],
}
ALL = {**LAYERS, **FUNCTIONS, **ARGUMENTS, **{f"activation {n}": activation(n) for n in ACTIVATIONS}}


def built(name):
    """The module of a snippet with statistics that are not trivial, and its inputs."""
    torch.manual_seed(len(name))
    make, _, kinds = ALL[name]
    model, inputs = make(), example(ALL[name])
    model.train()
    with torch.no_grad():
        model(*inputs)
    return model.eval(), inputs, kinds


def outputs_of(graph, inputs):
    """The outputs of a graph run op by op."""
    kept = {}
    feeds = {n: x.numpy() for n, x in zip(graph.inputs, inputs, strict=True)}

    def visit(op, ins, outs):
        kept.update(zip(op.outputs, outs, strict=True))

    walk(graph, feeds, visit)
    return [kept[t] for t in graph.outputs]


@pytest.mark.parametrize("name", ALL)
def test_a_float_model_is_read_as_these_kinds_and_computes_the_same(name):
    model, inputs, kinds = built(name)
    graph = read(copy.deepcopy(model), inputs)
    found = collections.Counter(op.kind for op in graph.ops)
    missing = collections.Counter(kinds) - found
    assert not missing, f"missing {missing}, found {found}"
    assert "opaque" not in found
    with torch.no_grad():
        expected = model(*inputs).numpy()
    # A composite is computed in another order of operations, in float32.
    np.testing.assert_allclose(outputs_of(graph, inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
def test_it_trains_quantized_and_is_read_as_it_computes(name, config):
    model, inputs, _ = built(name)
    qmodel = kquant_torch.wrap(model, CONFIGS[config], example_inputs=inputs, calibration_data=[inputs])
    if config == "W8A8":
        with torch.no_grad():
            real, quantized = model(*inputs), qmodel.eval()(*inputs)
        noise = float(((real - quantized) ** 2).mean() / (real**2).mean())
        assert noise < 10 ** (-1.5), f"{-10 * np.log10(noise):.1f} dB"  # 15 dB: a normalization of few values is rough
    qmodel.train()
    optimizer = torch.optim.SGD(qmodel.parameters(), 1e-3) if any(True for _ in qmodel.parameters()) else None
    before = [p.detach().clone() for p in qmodel.parameters()]
    for _ in range(2):
        loss = qmodel(*inputs).square().mean()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(torch.isfinite(p).all() for p in qmodel.parameters())
    if before and not config.startswith("DoReFa"):  # whose weights are so large that a hardtanh saturates
        assert any(not torch.equal(a, b) for a, b in zip(before, qmodel.parameters(), strict=True))
    qmodel.eval()
    with torch.no_grad():
        expected = qmodel(*inputs).numpy()
    # The same functions on the same values; only the memory layout of a batch may differ.
    np.testing.assert_allclose(outputs_of(read(qmodel), inputs)[0], expected, rtol=1e-5, atol=1e-6)
