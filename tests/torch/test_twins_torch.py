"""Random nets built once from neutral descriptions: torch has the ranges and the codes of Keras, which a file holds."""

import golden_twins as golden
import numpy as np
import pytest
import torch
import twins

import kquant_torch
from kquant.core.graph import walk
from kquant_torch.read import read

# Steps: float32 sums of up to 200 products in another order differ by some 1e-6 of their range, so by 3e-4 steps.
NEAR = 1e-3


@pytest.fixture(scope="module")
def expected():
    with np.load(golden.FILE) as file:
        return {key: file[key] for key in file.files}


def in_torch_layout(x):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def wrapped(index):
    """The twin, calibrated on its images."""
    x = torch.from_numpy(in_torch_layout(twins.images(index)))
    config = twins.CONFIGS[index % len(twins.CONFIGS)]
    return kquant_torch.wrap(twins.in_torch(index), config, example_inputs=x, calibration_data=x).eval(), x.numpy()


def matched(graph, index, expected):
    """For each fake quantization of the graph, its place in the golden file: that of the same step's tensor.

    The frameworks run steps that do not depend on each other in orders of their own.
    """
    steps, found = expected[f"{index}/steps"].tolist(), []
    for op in golden.markers(graph):
        name = op.inputs[0].split(".")[0].split("#")[0]
        step = int(name.removeprefix("step")) if name.startswith("step") else 0 if name == "x" else -1
        found.append(next(i for i, s in enumerate(steps) if s == step and i not in found))
    assert sorted(found) == list(range(len(steps)))
    return found


@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
@pytest.mark.parametrize("index", range(twins.COUNT))
def test_a_twin_has_the_ranges_and_codes_of_keras(index, expected):
    """Each op runs on the codes that Keras had for its inputs; codes differ only where rounding was a toss-up."""
    qmodel, x = wrapped(index)
    graph = read(qmodel)
    places, markers = matched(graph, index, expected), golden.markers(graph)
    ranges = expected[f"{index}/ranges"][places]
    mine = np.array([op.attrs["quantizer"].range() for op in markers], np.float32)
    np.testing.assert_allclose(mine, ranges, rtol=1e-5, atol=1e-5 * np.abs(ranges).max())
    for op, (low, high) in zip(markers, ranges, strict=True):
        if op.attrs["quantizer"].fixed is None and op.attrs["site"] is not None:
            op.attrs["quantizer"].set_range(low, high, op.attrs["site"])
    seen, clear = iter(places), []

    def visit(op, inputs, outputs):
        if op.kind != "fake_quant":
            return None
        affine = golden.affine(op)
        theirs = in_torch_layout(expected[f"{index}/{next(seen)}"])
        position = np.asarray(inputs[0], np.float64) / np.float64(affine.scale) + affine.zero_point
        sure = np.abs(position - 0.5 - np.round(position - 0.5)) > NEAR
        codes = affine.quantize(inputs[0])
        np.testing.assert_array_equal(codes[sure], theirs[sure], op.inputs[0])
        assert np.abs(codes.astype(int) - theirs).max() <= 1
        clear.append(sure.mean())
        return [affine.dequantize(theirs)]

    walk(graph, {"x": x}, visit)
    # Averages of four codes and halves of codes lie on a boundary in one case of four or two.
    assert len(clear) == len(markers) and np.mean(clear) > 0.75 and max(clear) > 0.98


def test_the_twins_hold_every_kind_of_step_and_every_quantizer():
    found = {step.kind for i in range(twins.COUNT) for step in twins.steps(i)}
    assert found == {
        "conv", "depthwise", "norm", "activation", "scale", "shift", "add", "mul", "concat", "max_pool", "average_pool"
    }  # fmt: skip
    activations = {s.args[0] for i in range(twins.COUNT) for s in twins.steps(i) if s.kind == "activation"}
    assert activations == set(twins.ACTIVATIONS) and twins.COUNT >= 5 * len(twins.CONFIGS)


def test_one_changed_weight_is_seen(expected):
    with pytest.raises(AssertionError, match=r"step1|step2"):
        changed(expected)


def changed(expected):
    original = twins.array

    def array(index, step, role, shape):
        return original(index, step, role, shape) + np.float32(0.1 * (step == 0 and role == "bias"))

    twins.array = array
    try:
        qmodel, x = wrapped(0)
    finally:
        twins.array = original
    graph = read(qmodel)
    for op, place in zip(golden.markers(graph), matched(graph, 0, expected), strict=True):
        op.attrs["quantizer"].set_range(*expected["0/ranges"][place], op.attrs["site"])
    places = iter(matched(graph, 0, expected))

    def visit(op, inputs, outputs):
        if op.kind == "fake_quant":
            theirs = in_torch_layout(expected[f"0/{next(places)}"])
            np.testing.assert_array_equal(golden.affine(op).quantize(inputs[0]), theirs, op.inputs[0])

    walk(graph, {"x": x}, visit)
