"""Constant operands of sums and products: the grid of their own values, in training and in the artifact.

The grid has 8 bits over the values and zero. Where they reach equally far below zero and above it is the symmetric one,
which holds both ends. On the other, zero lies between two codes: the ends would be half a step off, and the values that
are found on it would give a narrower grid again. Values of one magnitude are held exactly, at code 127 or -127.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.core.affine import Affine, fake_quantize, steps_below
from kquant.core.errors import RangeError

STEPS, HALF_STEPS = np.float32(1 / 255), np.float32(1 / 127)
EVEN = np.float32(1 / 512)  # a quarter of a step, so that both ends are rounded to codes of one magnitude
ON_GRID = 1e-3  # steps: a constant on its grid, whose ends are found again only to a few units in the last place
ARITHMETIC = ("add", "sub", "mul")  # ops whose constant operand lies on a grid of its own
BITS = 8


def constant_range(v: Any, xp: Any = np) -> tuple[Any, Any, Any]:
    """The range of an array's values and zero, `(low, high)`, and whether its values have one magnitude.

    Args:
        v: float32, any shape, at least one value.
        xp: the array namespace.
    """
    magnitude = xp.abs(v)
    return xp.minimum(xp.min(v), 0.0), xp.maximum(xp.max(v), 0.0), xp.max(magnitude) <= xp.min(magnitude)


def on_grid(v: Any, xp: Any = np) -> Any:
    """The array on the grid in which an artifact holds it as a constant operand.

    It is equal to the bit in every namespace, and gives the codes of `constant_codes`.

    Args:
        v: float32, any shape, at least one value.
        xp: the array namespace.

    Example:
        >>> on_grid(np.array([0.0, 0.31, 1.0], np.float32)).round(4)
        array([0.    , 0.3098, 1.    ], dtype=float32)
        >>> on_grid(np.array([-0.3, 0.3], np.float32))
        array([-0.3,  0.3], dtype=float32)
    """
    scale, below, is_one = _grid(v, xp)
    return xp.where(is_one, v, fake_quantize(v, scale, below, 0, 2**BITS - 1, xp))


def _grid(v: Any, xp: Any = np) -> tuple[Any, Any, Any]:
    """Scale, the number of steps below zero, and whether the values have one magnitude."""
    low, high, is_one = constant_range(v, xp)
    high = xp.where(high <= low, xp.ones_like(high), high)
    reach = xp.maximum(-low, high)
    is_even = xp.abs(low + high) <= reach * EVEN
    # TensorFlow turns a division by a constant into these products where it optimizes a graph, and only there.
    scale = xp.where(is_even, reach * HALF_STEPS, (high - low) * STEPS)
    return scale, xp.where(is_even, 128 * xp.ones_like(scale), steps_below(low, scale, xp)), is_one


def constant_affine(value: np.ndarray, name: str, bits: int = BITS) -> Affine:
    """Parameters of a constant operand: 8 or 16 bits over its own values and zero.

    Args:
        value: float32, any shape, at least one value.
        name: the tensor, for the error.
        bits: 8, or 16.

    Raises:
        RangeError: values whose scale leaves what a kernel can hold.
    """
    low, high, _ = constant_range(np.asarray(value, np.float32))
    checked = Affine.of_range(low, high, bits, name)
    if bits != BITS:
        return checked
    scale, below, is_one = _grid(np.asarray(value, np.float32))
    if is_one and low < high:
        return Affine(np.float32(max(-low, high) / 127), 0, BITS)
    return Affine(np.float32(scale), int(below) - 2 ** (BITS - 1), BITS)


def constant_codes(value: np.ndarray, name: str, bits: int = BITS) -> tuple[Affine, np.ndarray]:
    """Parameters and codes of a constant operand, those that training uses; arguments and errors as `constant_affine`.

    Example:
        >>> affine, codes = constant_codes(np.array([-0.3, 0.3, -0.3], np.float32), "sign")
        >>> codes.tolist(), affine.zero_point
        ([-127, 127, -127], 0)
    """
    affine = constant_affine(value, name, bits)
    held = on_grid(np.asarray(value, np.float32)) if bits == BITS else value
    return affine, affine.quantize(held)


def check_limits(kind: str, value: np.ndarray, affine: Affine, name: str) -> None:
    """Refuse a limit (of `maximum` or `minimum`) that the grid of what it limits cannot hold, where that matters.

    A maximum's limit below the grid limits nothing, nor does a minimum's above it, and they may be cut off.

    Args:
        kind: of the op that has the constant operand.
        value: float32, any shape.
        affine: the grid.
        name: the tensor, for the error.

    Raises:
        RangeError: a limit that would be another one in the artifact.
    """
    below, above = affine.beyond(value)
    beyond = {"maximum": above, "minimum": below}.get(kind)
    if beyond is None or not beyond.any():
        return
    low, high = affine.limits()
    raise RangeError(
        f"tensor {name!r}",
        f"limits of the {kind} within the range of what it limits, [{low:.6g}, {high:.6g}]",
        f"{float(np.asarray(value)[beyond].flat[0]):.6g}",
        "Where the limit is for some elements only, multiply those by 0 and add it",
    )


def held_constant(value: np.ndarray, name: str) -> np.ndarray:
    """A constant operand on the 8-bit grid that an artifact holds it in; itself where it lies there already.

    The trained model has to use it, or it would be trained on other values than are deployed.
    """
    scale, held = constant_affine(value, name).scale, on_grid(np.asarray(value, np.float32))
    return value if np.abs(held - value).max(initial=0.0) <= ON_GRID * scale else held
