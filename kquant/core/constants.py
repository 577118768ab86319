"""Constant operands of sums and products: the grid of their own values, in training and in the artifact."""

from __future__ import annotations

import numpy as np

from kquant.core.affine import Affine

ON_GRID = 1e-3  # steps: a constant on its grid, whose ends are found again only to a few units in the last place
ARITHMETIC = ("add", "sub", "mul")  # ops whose constant operand lies on a grid of its own


def constant_affine(value: np.ndarray, name: str, bits: int = 8) -> Affine:
    """Parameters of a constant operand: 8 or 16 bits over its own values and zero.

    A constant of one magnitude is held exactly, at code 127 or -127.
    """
    low, high = np.float32(min(value.min(), 0.0)), np.float32(max(value.max(), 0.0))
    magnitudes = np.unique(np.abs(value))
    if magnitudes.size == 1 and magnitudes[0] > 0 and bits == 8:
        return Affine(np.float32(magnitudes[0] / 127), 0, 8)
    return Affine.of_range(low, high, bits, name)


def held_constant(value: np.ndarray, name: str) -> np.ndarray:
    """A constant operand on the 8-bit grid that an artifact holds it in; itself where it lies there already.

    The trained model has to use it, or it would be trained on other values than are deployed.
    """
    affine = constant_affine(value, name)
    held = affine.dequantize(affine.quantize(value))
    return value if np.abs(held - value).max(initial=0.0) <= ON_GRID * affine.scale else held
