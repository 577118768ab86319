"""Weight quantizers against the text of the papers, in exact fractions where the formula is rational."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kquant.core.weights import DoReFa, Symmetric, quantize_gradient, storage_bits, weight_formula

F32 = np.float32
HALF = Fraction(1, 2)
ELEMENT = st.floats(-10, 10, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)
KERNEL = hnp.arrays(F32, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=ELEMENT)
NEAR = Fraction(1, 10**4)  # DESIGN.md: codes agree but where the exact value lies this near a rounding boundary


def check_code(code: float, exact: Fraction) -> None:
    """`code` is `exact` rounded half up, or `exact` lies on a boundary."""
    near = abs((exact + HALF) - round(exact + HALF)) < NEAR
    assert code == math.floor(exact + HALF) or (near and abs(code - exact) < HALF + NEAR)


@given(w=KERNEL, bits=st.integers(2, 8))
def test_symmetric_per_channel_is_jacob_et_al(w, bits):
    """Scale max|w| / (2^(b-1) - 1) for each output channel, codes round(w / scale): the lowest code is not used."""
    codes, scale = Symmetric(bits, axes=(0,)).quantize(w)
    limit = 2 ** (bits - 1) - 1
    assert scale.shape == (1, w.shape[1])
    for channel in range(w.shape[1]):
        largest = max(abs(Fraction(float(v))) for v in w[:, channel])
        if not largest:
            assert not codes[:, channel].any()
            continue
        exact = largest / limit
        assert abs(Fraction(float(scale[0, channel])) - exact) <= exact / 2**23
        for value, code in zip(w[:, channel], codes[:, channel], strict=True):
            check_code(code, Fraction(float(value)) / exact)
        assert np.abs(codes[:, channel]).max() == limit


@given(w=KERNEL, bits=st.integers(2, 8))
def test_symmetric_per_tensor_has_one_scale(w, bits):
    assume(w.any())
    codes, scale = Symmetric(bits, axes=None).quantize(w)
    assert scale.size == 1
    exact = Fraction(float(np.abs(w).max())) / (2 ** (bits - 1) - 1)
    for value, code in zip(w.ravel(), codes.ravel(), strict=True):
        check_code(code, Fraction(float(value)) / exact)


@given(
    w=KERNEL,
    bits=st.integers(2, 8),
    factor=hnp.arrays(F32, 3, elements=st.floats(0.0625, 16, width=32)),
    data=st.data(),
)
def test_codes_of_the_folded_kernel_are_those_of_the_kernel(w, bits, factor, data):
    """Jacob et al. 2018, section 3.2: w * gamma / sigma, quantized per channel, has w's codes but for gamma's sign."""
    sign = np.array(data.draw(st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3)), F32)
    channels = w.shape[1]
    factor = (factor * sign)[:channels]
    formula = Symmetric(bits, axes=(0,))
    codes, scale = formula.quantize(w.astype(np.float64))
    folded, folded_scale = formula.quantize(w.astype(np.float64) * factor)
    exact = w / np.where(scale > 0, scale, 1) * np.sign(factor)
    boundary = np.abs(exact - np.floor(exact) - 0.5) < float(NEAR)  # half up is not symmetric: -0.5 and 0.5 go up
    np.testing.assert_array_equal(np.where(boundary, 0, folded), np.where(boundary, 0, codes * np.sign(factor)))
    alive = w.any(axis=0)
    np.testing.assert_allclose(folded_scale[0, alive], (scale[0] * np.abs(factor))[alive], rtol=1e-6)


@given(w=KERNEL, bits=st.integers(2, 7))
def test_dorefa_is_equation_9_of_zhou_et_al(w, bits):
    """2 quantize_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1, with quantize_k(x) = round((2^k - 1) x) / (2^k - 1)."""
    assume(w.any())
    formula = DoReFa(bits)
    codes, scale = formula.quantize(formula.prepare(w))
    levels = 2**bits - 1
    assert abs(Fraction(float(scale)) * levels - 1) < Fraction(1, 10**6)
    squashed = [Fraction(math.tanh(float(v))) for v in w.ravel()]
    largest = max(map(abs, squashed))
    for value, code in zip(squashed, codes.ravel(), strict=True):
        assert code % 2 == 1  # codes are 2q - (2^k - 1)
        assert abs(code) <= levels
        check_code((code + levels) / 2, levels * (value / (2 * largest) + HALF))


@given(w=KERNEL)
def test_dorefa_of_one_bit_is_the_sign_times_the_mean(w):
    """Equation 7 and 8: sign(w) * E|w|, the mean over the whole layer; sign(0) = +1."""
    assume(w.any())
    formula = DoReFa(1)
    codes, scale = formula.quantize(formula.prepare(w))
    assert codes.tolist() == [[1.0 if v >= 0 else -1.0 for v in row] for row in w]
    mean = sum(abs(Fraction(float(v))) for v in w.ravel()) / w.size
    assert abs(Fraction(float(scale)) - mean) <= mean * Fraction(1, 10**5)


@given(w=KERNEL)
def test_dorefa_of_eight_bits_has_255_levels(w):
    assume(w.any())
    formula = DoReFa(8)
    codes, scale = formula.quantize(formula.prepare(w))
    assert scale == F32(1) / F32(127)
    squashed = [Fraction(math.tanh(float(v))) for v in w.ravel()]
    for value, code in zip(squashed, codes.ravel(), strict=True):
        check_code(code, 127 * value / max(map(abs, squashed)))


@pytest.mark.parametrize("formula", [Symmetric(4, (0,)), Symmetric(4, None), *map(DoReFa, range(1, 9))])
def test_all_zero_kernels_are_finite(formula):
    codes, scale = formula.quantize(formula.prepare(np.zeros((3, 2), F32)))
    assert np.isfinite(codes * scale).all()
    assert (np.abs(codes) <= formula.qmax).all()
    assert (scale > 0).all()


@pytest.mark.parametrize(
    ("name", "bits", "stored"),
    [
        ("qat", 2, 4),
        ("qat", 4, 4),
        ("qat", 5, 8),
        ("naive", 8, 8),
        ("dorefa", 1, 4),
        ("dorefa", 3, 4),
        ("dorefa", 4, 8),
    ],
)
def test_storage_holds_every_code(name, bits, stored):
    formula = weight_formula(name, bits, (0,))
    w = np.random.default_rng(0).normal(size=(2000, 1)).astype(F32)
    codes, _ = formula.quantize(formula.prepare(w))
    assert storage_bits(formula) == stored
    assert np.abs(codes).max() == formula.qmax <= 2 ** (stored - 1) - 1


# -- gradients --------------------------------------------------------------------------------------------------------

SAMPLES = hnp.arrays(np.float64, (3, 2, 2), elements=st.floats(-5, 5).filter(lambda v: v == 0 or abs(v) > 1e-3))
NOISE = hnp.arrays(np.float64, (3, 2, 2), elements=st.floats(-0.5, 0.5, exclude_max=True))


@given(gradient=SAMPLES, noise=NOISE, bits=st.integers(1, 8))
def test_gradients_are_equation_12_with_the_maximum_of_each_sample(gradient, noise, bits):
    """2 m (quantize_k(g / (2 m) + 1/2 + noise / (2^k - 1)) - 1/2); a sample that is all zero passes unchanged."""
    result = quantize_gradient(gradient, noise, bits)
    levels = 2**bits - 1
    for sample, random, got in zip(gradient, noise, result, strict=True):
        largest = Fraction(float(np.abs(sample).max()))
        if not largest:
            np.testing.assert_array_equal(got, sample)
            continue
        for g, n, value in zip(sample.flat, random.flat, got.flat, strict=True):
            exact = Fraction(float(g)) / (2 * largest) + HALF + Fraction(float(n)) / levels
            exact = levels * min(max(exact, Fraction(0)), Fraction(1))
            code = (Fraction(float(value)) / (2 * largest) + HALF) * levels
            assert abs(code - round(code)) < NEAR
            check_code(round(code), exact)
            assert abs(value) <= largest * (1 + NEAR)


def test_gradients_are_right_on_average():
    """With the paper's noise, uniform over one step, rounding has no bias (inside the clipped ends)."""
    rng = np.random.default_rng(0)
    gradient = np.tile([[1.0, 0.31, -0.57, 0.0]], (40000, 1))
    mean = quantize_gradient(gradient, rng.uniform(-0.5, 0.5, gradient.shape), 2).mean(axis=0)
    # Four standard errors: the variance of a step of 2/3 is at most (1/3)^2.
    np.testing.assert_allclose(mean[1:], gradient[0, 1:], atol=4 / 3 / math.sqrt(len(gradient)))


def test_gradients_of_one_sample_do_not_see_another():
    gradient = np.random.default_rng(0).normal(size=(2, 8))
    noise = np.zeros((2, 8))
    louder = gradient * [[1.0], [1000.0]]
    np.testing.assert_array_equal(quantize_gradient(louder, noise, 4)[0], quantize_gradient(gradient, noise, 4)[0])


# -- one scale for a kernel and its batch norm ------------------------------------------------------------------------


@given(seed=st.integers(0, 199), bits=st.integers(2, 8), zero=st.booleans())
def test_the_folded_kernel_is_jacob_et_als(seed, bits, zero):
    """Section 3.2: what is rounded is `w * gamma / sigma`, on one scale; and undone it is a kernel near `w`."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    gain = rng.lognormal(0.0, 1.0, size=(1, 1, 1, 5)).astype(np.float32) * ([0, 1, 1, 1, 1] if zero else 1)
    gain = gain.astype(np.float32)
    formula = Symmetric(bits, axes=None)
    codes, scale = formula.fold(w, gain)
    folded = w.astype(np.float64) * gain
    one = np.abs(folded).max() / (2 ** (bits - 1) - 1)
    exact = folded / one
    clear = np.abs(np.abs(exact - np.floor(exact)) - 0.5) > 1e-4  # where float32 finds the same nearest code
    np.testing.assert_array_equal(codes[clear], np.floor(exact + 0.5)[clear])
    alive = codes.reshape(-1, 5).any(axis=0)
    np.testing.assert_allclose((scale * gain).reshape(-1)[alive], one, rtol=1e-6)
    np.testing.assert_array_equal(scale.reshape(-1)[~alive], 0.0)
    assert (np.abs(codes * scale * gain - folded) <= one * (0.5 + 1e-4)).all()


@given(seed=st.integers(0, 199))
def test_in_training_a_channel_without_codes_has_all_of_them(seed):
    """The others are as they are deployed."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(6, 4)).astype(np.float32)
    gain = np.array([[1.0, 0.0, 1e-30, 0.5]], np.float32)
    formula = Symmetric(8, axes=None)
    (codes, scale), (deployed, own) = formula.fold(w, gain, revive=True), formula.fold(w, gain)
    np.testing.assert_array_equal(codes[:, [0, 3]], deployed[:, [0, 3]])
    np.testing.assert_array_equal(scale[:, [0, 3]], own[:, [0, 3]])
    assert not deployed[:, [1, 2]].any()
    assert (np.abs(codes[:, [1, 2]]).max(axis=0) == 127).all()
    assert (np.abs(codes * scale - w) <= np.abs(w).max(axis=0) / 254 * (1 + 1e-4))[:, [1, 2]].all()


@pytest.mark.parametrize("w", [np.zeros((2, 3)), np.full((2, 3), 1e-38), np.full((2, 3), 1e30)])
@pytest.mark.parametrize("gain", [0.0, 1e-38, 1.0, 1e6])
@pytest.mark.parametrize("revive", [False, True])
def test_a_folded_kernel_is_finite(w, gain, revive):
    codes, scale = Symmetric(8, None).fold(w.astype(np.float32), np.full((1, 3), gain, np.float32), revive)
    assert np.isfinite(codes).all()
    assert np.isfinite(scale).all()
    assert np.isfinite(codes * scale).all()
