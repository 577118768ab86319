"""Folding a weighted stage: codes, scales and biases against the batch norm's own formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kquant.core.affine import Affine, bias_codes
from kquant.core.errors import ModelError, RangeError
from kquant.core.fold import fold
from kquant.core.graph import Graph, Op, Tensor, Weight
from kquant.core.integer import IntWeight
from kquant.core.stages import Stage, stages
from kquant.core.target import TFLITE, Accumulator
from kquant.core.weights import Symmetric

F32 = np.float32
SOURCE = Affine.of_range(F32(-1), F32(2), 8)
TARGET = Affine.of_range(F32(-4), F32(4), 8)
CHANNELS = 4


def weight(values: np.ndarray) -> Weight:
    return Weight(values.shape, lambda: np.asarray(values, F32))


def dense(
    kernel: np.ndarray, bias: np.ndarray, factor: np.ndarray | None = None, offset: np.ndarray | None = None
) -> Stage:
    """The stage of a dense layer, with `y * factor + offset` behind it if they are given."""
    formula = Symmetric(8, (0,))
    attrs = {"kernel_axes": (0,), "formula": formula, "codes": lambda: formula.quantize(np.asarray(kernel, F32))}
    ops = [Op("d", "dense", ("x",), ("d",), attrs, {"kernel": weight(kernel), "bias": weight(bias)}, "d", "Dense")]
    if factor is not None:
        ops.append(
            Op("n", "channel_affine", ("d",), ("n",), {}, {"scale": weight(factor), "offset": weight(offset)}, "n")
        )
    tensors = {t: Tensor(t, (None, 3)) for t in ("x", *(op.id for op in ops))}
    (stage,) = stages(Graph(tuple(ops), tensors, ("x",), (ops[-1].id,)))
    assert [op.id for op in stage.ops] == [op.id for op in ops]
    return stage


def folded(stage: Stage, source: Affine, target: Affine) -> IntWeight:
    return fold(stage, source, target, TFLITE.accumulator)


def kernel(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(6, CHANNELS)).astype(F32)


@given(
    seed=st.integers(0, 99),
    factor=st.lists(st.floats(-3, 3, width=32).filter(lambda v: abs(v) > 0.01), min_size=CHANNELS, max_size=CHANNELS),
)
def test_batch_norm_goes_into_scale_and_bias_and_leaves_the_codes(seed, factor):
    rng = np.random.default_rng(seed)
    w, bias, offset = kernel(seed), rng.normal(size=CHANNELS), rng.normal(size=CHANNELS)
    factor = np.array(factor, F32)
    plain, normed = folded(dense(w, bias), SOURCE, TARGET), folded(dense(w, bias, factor, offset), SOURCE, TARGET)
    np.testing.assert_array_equal(normed.codes, plain.codes * np.sign(factor).astype(np.int8))
    np.testing.assert_allclose(normed.scale, plain.scale * np.abs(factor), rtol=1e-6)
    np.testing.assert_allclose(normed.bias, bias * factor + offset, rtol=1e-5, atol=1e-6)
    # What the artifact computes is (x w + b) * factor + offset on the fake-quantized kernel.
    x = rng.normal(size=(5, 6))
    ours = x @ (normed.codes * normed.scale.astype(np.float64)) + normed.bias
    theirs = (x @ (plain.codes * plain.scale.astype(np.float64)) + bias) * factor + offset
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, -0.0, 1e-30])
def test_gamma_of_zero_leaves_the_offset_alone(gamma):
    offset = np.array([0.5, -1.0, 0.0, 3.0])
    made = folded(dense(kernel(), np.ones(CHANNELS), np.full(CHANNELS, gamma), offset), SOURCE, TARGET)
    assert not made.codes.any()
    assert (made.scale > 0).all()
    assert_bias_exact(made.bias, made.scale, offset)


def assert_bias_exact(bias: np.ndarray, scale: np.ndarray, want: np.ndarray) -> None:
    """The int32 bias fits, and stands for the wanted value to a hundredth of an output code."""
    codes, unit = bias_codes(bias, SOURCE, scale)
    exact = np.floor(bias / (np.float64(SOURCE.scale) * scale.astype(np.float64)) + 0.5)
    np.testing.assert_array_equal(codes.astype(np.float64), exact)  # nothing wrapped around
    assert np.abs(exact).max() <= 2**31 - 1
    np.testing.assert_allclose(codes * unit.astype(np.float64), want, atol=0.01 * float(TARGET.scale), rtol=1e-6)


@given(
    magnitude=st.lists(st.sampled_from([0.0, 1e-38, 1e-20, 1e-9, 1e-3, 1.0]), min_size=CHANNELS, max_size=CHANNELS),
    bias=st.lists(st.floats(-1000, 1000, width=32), min_size=CHANNELS, max_size=CHANNELS),
)
def test_dead_channels_with_large_biases_fit_int32(magnitude, bias):
    w = kernel() * np.array(magnitude, F32)
    made = folded(dense(w, np.array(bias)), SOURCE, TARGET)
    codes, _ = bias_codes(made.bias, SOURCE, made.scale)
    exact = made.bias / (np.float64(SOURCE.scale) * made.scale.astype(np.float64))
    assert np.abs(codes - exact).max() <= 0.5 + 1e-6
    # The reference is the trained kernel; where a scale was raised, it is held to half a step of the coarser one.
    trained, scale = (np.asarray(a, np.float64) for a in Symmetric(8, (0,)).quantize(w))
    error = np.abs(made.codes * made.scale.astype(np.float64) - trained * scale)
    raised = made.scale > scale[0] * 1.0001
    assert (error <= np.where(raised, 0.5001 * made.scale, 1e-6 * np.abs(trained * scale)) + 1e-30).all()


def test_ordinary_channels_keep_their_scale_beside_dead_ones():
    w = kernel()
    alone = folded(dense(w, np.zeros(CHANNELS)), SOURCE, TARGET)
    w[:, 0] = 0
    beside = folded(dense(w, np.array([1e6, 0, 0, 0])), SOURCE, TARGET)
    np.testing.assert_array_equal(beside.codes[:, 1:], alone.codes[:, 1:])
    np.testing.assert_array_equal(beside.scale[1:], alone.scale[1:])


def test_weights_that_are_not_finite_are_refused_by_layer():
    with pytest.raises(ModelError, match=r"layer 'd'.*bias.*NaN"):
        folded(dense(kernel(), np.array([0, np.nan, 0, 0])), SOURCE, TARGET)


def test_a_multiplier_that_the_kernel_cannot_hold_is_refused_by_tensor():
    tiny = Affine.of_range(F32(-1e-6), F32(1e-6), 8)
    with pytest.raises(RangeError, match=r"tensor 'd'.*ratio.*Received"):
        folded(dense(1000 * kernel(), np.zeros(CHANNELS)), SOURCE, tiny)


def test_a_float_bias_leaves_the_scale_of_a_channel_alone():
    w = kernel()
    w[:, 0] *= 1e-9  # with an int32 bias of 3 this channel would be coded anew
    made = fold(dense(w, np.full(CHANNELS, 3.0)), SOURCE, TARGET, Accumulator())
    np.testing.assert_allclose(made.scale, np.abs(w).max(axis=0) / 127, rtol=1e-6)
    assert folded(dense(w, np.full(CHANNELS, 3.0)), SOURCE, TARGET).scale[0] > 1e3 * made.scale[0]


@pytest.mark.parametrize("factor", [[1.0, -0.5, 2.0, 0.0], [1e-3, 1.0, 1.0, 1e-9]])
@pytest.mark.parametrize("bias", [[0.0, 1.0, -1.0, 0.5], [0.0, 1e9, 0.0, 0.0]])
def test_a_kernel_that_holds_its_norm_has_one_scale(factor, bias):
    """Also where the bias of one channel needs a larger one."""
    w, factor = kernel(), np.array(factor, F32)
    formula = Symmetric(8, None)
    made = formula.fold(w, np.abs(factor).reshape(1, -1))
    attrs = {"kernel_axes": (0,), "formula": formula, "codes": lambda: made, "folds_norm": True}
    stage = dense(w, np.zeros(CHANNELS), factor, np.array(bias))
    stage = replace(stage, anchor=replace(stage.anchor, attrs=attrs))
    weight = folded(stage, SOURCE, TARGET)
    assert weight.per_tensor
    one = weight.scale[0].astype(np.float64)
    assert (weight.scale == weight.scale[0]).all()
    assert (np.abs(weight.bias) / (SOURCE.scale * one) < 2**31).all()
    assert (np.abs(weight.codes * one - w * factor) <= one * (0.5 + 1e-4)).all()
    assert one == pytest.approx(np.abs(w * factor).max() / 127, rel=1e-6) or max(bias) == 1e9
