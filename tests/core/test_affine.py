"""Affine quantization against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kquant.core.affine import Affine, bias_codes, fake_quantize, round_half_up
from kquant.core.errors import RangeError

F32 = np.float32
HALF = Fraction(1, 2)
BITS = st.integers(1, 8)
VALUE = st.floats(-1e6, 1e6, width=32)
SIZE = st.floats(F32(1e-6), F32(1e6), width=32)


def half_up(value: Fraction) -> int:
    return floor(value + HALF)


@given(st.lists(st.integers(-100, 100).map(lambda n: n / 4), min_size=1, max_size=20))
def test_rounding_is_half_up(values):
    assert round_half_up(np.array(values)).tolist() == [half_up(Fraction(v)) for v in values]


@given(low=SIZE | st.just(0.0), high=SIZE | st.just(0.0), bits=BITS)
def test_of_range_is_the_nudged_range_of_jacob_et_al(low, high, bits):
    """scale = (high - low) / (2^b - 1), and zero is the code nearest to where it lies between low and high."""
    assume(low or high)
    affine = Affine.of_range(F32(-low), F32(high), bits)
    exact = (Fraction(high) + Fraction(low)) / (2**bits - 1)
    # Two float32 operations, of half an ulp each.
    assert abs(Fraction(float(affine.scale)) - exact) <= exact * Fraction(1, 2**22)
    unsigned = affine.zero_point - affine.qmin
    assert 0 <= unsigned <= 2**bits - 1
    # The rest of half a code is float32's own error in low / scale, which lies below 256.
    assert abs(unsigned - Fraction(low) / exact) <= HALF + Fraction(256, 2**22)
    assert (affine.qmin, affine.qmax) == (128 - 2**bits, 127)
    assert affine.dequantize(np.array([affine.zero_point])) == 0


@given(high=SIZE, bits=BITS)
def test_one_sided_ranges_end_at_an_end_of_the_codes(high, bits):
    assert Affine.of_range(F32(0), F32(high), bits).zero_point == 128 - 2**bits
    assert Affine.of_range(F32(-high), F32(0), bits).zero_point == 127


def test_one_bit_is_zero_and_the_upper_end():
    affine = Affine.of_range(F32(0), F32(0.75), 1)
    assert (affine.scale, affine.zero_point, affine.qmin, affine.qmax) == (F32(0.75), 126, 126, 127)
    codes = affine.quantize(np.array([-1, 0, 0.37, 0.38, 0.75, 9]))
    assert codes.tolist() == [126, 126, 126, 127, 127, 127]
    np.testing.assert_array_equal(affine.dequantize(codes), F32([0, 0, 0, 0.75, 0.75, 0.75]))


@given(low=SIZE, high=SIZE)
def test_sixteen_bits_are_symmetric(low, high):
    affine = Affine.of_range(F32(-low), F32(high), 16)
    assert (affine.zero_point, affine.qmin, affine.qmax, affine.dtype) == (0, -32768, 32767, "int16")
    assert affine.scale == F32(F32(max(low, high)) / F32(32767))


@given(low=SIZE | st.just(0.0), high=SIZE, bits=BITS, values=st.lists(VALUE, min_size=1, max_size=20))
def test_quantize_rounds_half_up_and_saturates(low, high, bits, values):
    affine = Affine.of_range(F32(-low), F32(high), bits)
    values = np.array(values, F32)
    scale = Fraction(float(affine.scale))
    for value, code in zip(values, affine.quantize(values), strict=True):
        exact = Fraction(float(value)) / scale
        want = min(max(half_up(exact) + affine.zero_point, affine.qmin), affine.qmax)
        tie = abs((exact + HALF) - round(exact + HALF)) < Fraction(1, 10**9)  # float64 decides no closer
        assert code == want or (tie and abs(code - want) == 1)


@given(low=SIZE, high=SIZE, bits=BITS)
def test_every_code_comes_back(low, high, bits):
    affine = Affine.of_range(F32(-low), F32(high), bits)
    codes = np.arange(affine.qmin, affine.qmax + 1, dtype=np.int8)
    np.testing.assert_array_equal(affine.quantize(affine.dequantize(codes)), codes)


@given(high=SIZE, bits=BITS, values=st.lists(VALUE, min_size=1, max_size=10))
def test_fake_quantize_is_quantize_and_dequantize(high, bits, values):
    affine = Affine.of_range(F32(-high / 3), F32(high), bits)
    x = np.array(values, np.float64)
    got = fake_quantize(x, np.float64(affine.scale), affine.zero_point, affine.qmin, affine.qmax)
    want = affine.dequantize(affine.quantize(x))
    np.testing.assert_allclose(got, want, rtol=1e-6)  # dequantize gives float32


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("limit", [np.inf, np.nan, 3e38, 1e-36])
def test_ranges_outside_float32s_multipliers_are_refused_by_name(bits, limit):
    with pytest.raises(RangeError, match=r"tensor 'conv'.*exclude.*Received"):
        Affine.of_range(F32(0), F32(limit), bits, "conv")


def test_a_range_that_became_nan_is_refused_by_name():
    with pytest.raises(RangeError, match=r"tensor 'conv'.*exclude.*Received"):
        Affine.of_range(F32(np.nan), F32(np.nan), 8, "conv")


@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_a_tensor_that_is_constantly_zero_is_held_exactly(bits):
    affine = Affine.of_range(F32(0), F32(0), bits)
    assert affine.scale > 0
    np.testing.assert_array_equal(affine.dequantize(affine.quantize(np.zeros(3))), np.zeros(3, F32))


@given(
    bias=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    source=st.floats(F32(1e-3), F32(10), width=32),
    weight=st.floats(F32(1e-3), F32(10), width=32),
)
def test_bias_is_within_half_a_unit_of_input_scale_times_weight_scale(bias, source, weight):
    affine = Affine(F32(source), 3, 8)
    scale = np.full(len(bias), weight, F32)
    codes, unit = bias_codes(np.array(bias), affine, scale)
    exact = Fraction(source) * Fraction(weight)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(unit, np.full(len(bias), float(exact), F32))
    for value, code in zip(bias, codes, strict=True):
        # float64's error in the quotient, which lies below 1e8, is the rest of half a unit
        assert abs(Fraction(value) / exact - int(code)) <= HALF + Fraction(1, 10**6)
