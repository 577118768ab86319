"""Codes of few bits spread over the storage that holds them: multiplied by a whole number, their scale divided by it.

The weights stay as they are, and a kernel's sum, in whose unit `s_in * s_w` its integer bias lies, becomes finer.
"""

from __future__ import annotations

import numpy as np

from kquant.core.affine import Affine, bias_error, bias_unit
from kquant.core.integer import IntWeight
from kquant.core.parity import TIE
from kquant.core.target import Accumulator

BIAS_LIMIT = 2.0**31 - 2.0**20  # the largest int32 bias code that leaves room for rounding


def room(weight: IntWeight, largest: int) -> int:
    """The greatest whole factor with which the codes are at most `largest`; 0 if they are larger already."""
    return largest // max(int(np.abs(weight.codes.astype(np.int16)).max(initial=0)), 1)


def most_gain(weight: IntWeight, source: Affine, largest: int, bias_limit: float = BIAS_LIMIT) -> int:
    """The greatest factor with which the codes are at most `largest` and the biases at most `bias_limit` units.

    0 if the codes alone are larger.

    Args:
        weight: of an op.
        source: of the op's input.
        largest: code that the storage or the kernel holds.
        bias_limit: in units `s_in * s_w`.

    Example:
        >>> weight = IntWeight(np.array([[3], [-1]], np.int8), np.float32([0.5]), 8, np.array([1.0]))
        >>> most_gain(weight, Affine(np.float32(0.5), 0, 8), 127), most_gain(weight, Affine(np.float32(0.5), 0, 8), 2)
        (42, 0)
    """
    bias = max(float((np.abs(weight.bias) / bias_unit(source, weight.scale)).max(initial=0.0)), 1.0)
    return min(room(weight, largest), int(bias_limit / bias))


def gain_for_bias(weight: IntWeight, source: Affine, target: Affine, holds: Accumulator) -> int:
    """The least power of two with which rounding the biases to their unit shows in no output code, or shows least.

    Doubling only ever adds grid points between the old ones, so the error never grows; and a scale divided by a power
    of two gives the very same weights.

    Args:
        weight: of an op.
        source, target: of the op's input and output.
        holds: what the target's kernels hold.

    Example:
        >>> weight = IntWeight(np.array([[1]], np.int8), np.float32([1.0]), 8, np.array([0.375]))
        >>> grid = Affine(np.float32(0.5), 0, 8)
        >>> gain_for_bias(weight, grid, grid, Accumulator(widest=64)), gain_for_bias(weight, grid, grid, Accumulator())
        (4, 1)
    """
    most, unit, gain = most_gain(weight, source, holds.widest), bias_unit(source, weight.scale), 1
    while 2 * gain <= most and bias_error(weight.bias, unit / gain, target) > TIE:
        gain *= 2
    return gain
