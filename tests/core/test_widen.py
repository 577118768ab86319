"""Spreading codes over their storage: the same weights, and a bias that its finer unit holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kquant.core.affine import Affine
from kquant.core.integer import IntWeight
from kquant.core.parity import TIE
from kquant.core.target import Accumulator
from kquant.core.widen import gain_for_bias, most_gain

SOURCE, TARGET = Affine(np.float32(0.03), 5, 8), Affine(np.float32(0.002), -9, 8)


def weight(seed: int, largest: int, channels: int = 3) -> IntWeight:
    random = np.random.default_rng(seed)
    codes = random.integers(-largest, largest + 1, (4, channels)).astype(np.int8)
    codes[0, 0] = largest
    scale = random.uniform(0.1, 1.0, channels).astype(np.float32)
    return IntWeight(codes, scale, 8, random.normal(size=channels))


def shift(w: IntWeight, gain: int) -> float:
    """How far the biases lie from their nearest multiples of the unit, in output codes."""
    unit = np.float64(SOURCE.scale) * w.scale / gain
    return float((np.abs(w.bias / unit - np.rint(w.bias / unit)) * unit / np.float64(TARGET.scale)).max())


@given(seed=st.integers(0, 99), largest=st.sampled_from([1, 3, 7, 15, 31, 63, 127]))
def test_it_is_the_least_power_of_two_with_which_no_code_shows_it(seed, largest):
    w = weight(seed, largest)
    gain = gain_for_bias(w, SOURCE, TARGET, Accumulator(widest=64))
    room = 2 ** int(np.log2(64 // largest)) if largest <= 64 else 1
    wanted = [g for g in (1, 2, 4, 8, 16, 32, 64) if g <= room and shift(w, g) <= TIE]
    assert gain == (wanted[0] if wanted else room)
    wide, scale = w.codes * np.int8(gain), w.scale / np.float32(gain)
    np.testing.assert_array_equal(wide * scale.astype(np.float64), w.codes * w.scale.astype(np.float64))
    assert np.abs(wide.astype(int)).max() <= max(largest, 64)


def test_a_bias_that_fits_leaves_the_codes_as_they_are():
    w = replace(weight(0, 1), bias=np.zeros(3))
    assert gain_for_bias(w, SOURCE, TARGET, Accumulator(widest=64)) == 1


@pytest.mark.parametrize(("bias", "gain"), [(0.0, 42), (0.03 * 0.9e8, 11), (0.03 * 0.9e9, 1), (0.03 * 3e9, 0)])
def test_the_most_is_what_codes_and_biases_hold(bias, gain):
    codes = np.array([[3], [-2]], np.int8)
    w = IntWeight(codes, np.float32([1.0]), 8, np.array([bias]))
    assert most_gain(w, SOURCE, 127, 1e9) == gain
