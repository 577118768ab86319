"""The grid of constant operands against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kquant.core.affine import Affine, nudged
from kquant.core.constants import check_limits, constant_affine, constant_codes, held_constant, on_grid
from kquant.core.errors import RangeError

F32 = np.float32
VALUES = st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda v: not v or abs(v) > 1e-6), min_size=1, max_size=30)


@given(VALUES)
def test_values_lie_on_the_grid_of_their_range_and_zero(values):
    v = np.array(values, F32)
    low, high = min(0.0, *values), max(0.0, *values)
    held = on_grid(v)
    assert held.dtype == F32
    if len({abs(x) for x in values}) == 1:
        np.testing.assert_array_equal(held, v)
        return
    even = abs(low + high) <= max(-low, high) / 512
    scale = Fraction(max(-low, high)) / 127 if even else (Fraction(high) - Fraction(low)) / 255
    below = 128 if even else floor(-Fraction(low) / scale + Fraction(1, 2))
    for value, got in zip(values, held, strict=True):
        exact = Fraction(value) / scale
        code = min(max(floor(exact + Fraction(1, 2)), -below), 255 - below)
        # float32's own error in a quotient that lies below 256, where a rounding boundary is closer than that
        off = abs(Fraction(float(got)) / scale - code)
        near = abs(exact + Fraction(1, 2) - round(exact + Fraction(1, 2))) < Fraction(1, 10**4)
        assert off < Fraction(1, 10**3) or (near and off < 1 + Fraction(1, 10**3))


@given(VALUES)
def test_the_codes_of_the_artifact_are_those_of_training(values):
    v = np.array(values, F32)
    affine, codes = constant_codes(v, "v")
    held = on_grid(v)
    assert (affine, codes.dtype) == (constant_affine(v, "v"), np.int8)
    # One magnitude is the value itself, which scale * 127 gives to two roundings.
    np.testing.assert_allclose(affine.dequantize(codes), held, rtol=2.5e-7, atol=0)
    np.testing.assert_array_equal(affine.quantize(held), codes)
    again = held_constant(v, "v")
    assert held_constant(again, "v") is again


def test_ends_of_one_magnitude_are_held_and_found_again():
    """Zero between two codes of the grid from -1 to 1 would be half a step off, and the ends with it, each time."""
    v = np.array([-1.0, 0.0, 0.25, 1.0], F32)
    affine, codes = constant_codes(v, "v")
    assert codes.tolist() == [-127, 0, 32, 127] and affine.zero_point == 0
    np.testing.assert_allclose(on_grid(v), [-1, 0, 32 / 127, 1], rtol=2e-7)
    again = constant_codes(on_grid(v), "v")
    assert again[1].tolist() == codes.tolist() and abs(again[0].scale * 127 - 1) < 3e-7


def test_sixteen_bits_are_the_symmetric_grid_of_the_greatest_magnitude():
    affine, codes = constant_codes(np.array([-0.5, 0.25, 0.1], F32), "v", 16)
    assert affine == Affine(F32(0.5) / F32(32767), 0, 16)
    assert codes.tolist() == [-32767, 16384, 6553]  # 16383.5 rounds half up


def test_zero_just_below_half_a_step_is_rounded_exactly():
    """0.49999997 + 0.5 is 1 in float32, and the code of zero would be one off."""
    low, high = F32(-0.49999997), F32(254.5)
    assert nudged(low, high, 8) == (1.0, 0.0)
    assert Affine.of_range(low, high, 8).zero_point == -128
    assert nudged(F32(-0.5), F32(254.5), 8) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "limit", "held"),
    [
        ("minimum", -2.0, False),
        ("minimum", 2.0, True),
        ("maximum", 2.0, False),
        ("maximum", -2.0, True),
        ("minimum", -1.0, True),
        ("maximum", 1.0, True),
        ("concat", 2.0, True),
    ],
)
def test_a_limit_that_the_grid_cannot_hold_is_refused_where_it_limits(kind, limit, held):
    affine = Affine.of_range(-1.0, 1.0, 8, "x")
    values = np.array([0.0, limit], np.float32)
    if held:
        check_limits(kind, values, affine, "limit")
        return
    with pytest.raises(RangeError, match=f"'limit'.*{kind}"):
        check_limits(kind, values, affine, "limit")
