"""Affine quantization: `real = (code - zero_point) * scale`, and the one rounding used everywhere.

Formulas take an array namespace `xp` (numpy, `keras.ops`, or a shim with the same few functions), so each stands once.
Every rounding in kquant is **half up**, `floor(x + 0.5)`, which is what TensorFlow's fake-quantization kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.core.errors import RangeError

SMALLEST_SCALE = np.float32(1e-30)
LARGEST_SCALE = np.float32(1e30)
INT8_MAX = 127
INT16_MAX = 32767


def round_half_up(x: Any, xp: Any = np) -> Any:
    """`floor(x + 0.5)`, elementwise; ties go towards plus infinity.

    Example:
        >>> round_half_up(np.array([-1.5, -0.5, 0.5, 1.5]))
        array([-1.,  0.,  1.,  2.])
    """
    return xp.floor(x + 0.5)


def nudged(low: Any, high: Any, bits: int, xp: Any = np) -> tuple[Any, Any]:
    """Scale of a float range and the number of steps below zero, so that zero is one of its `2**bits` codes.

    The scale is `(high - low) / (2**bits - 1)`, and zero is the code nearest to where it lies in the range.

    Source: Jacob et al. 2018, section 3.1; computed as TensorFlow's `FakeQuantWithMinMaxVars` does
    (tensorflow/core/kernels/fake_quant_ops_functor.h).

    Args:
        low, high: the range, `low <= 0 <= high` and not both zero, float32 scalars of `xp`.
        bits: 1..8.
        xp: the array namespace.

    Example:
        >>> nudged(np.float32(-0.26), np.float32(1.24), 4)
        (np.float32(0.1), np.float32(3.0))
    """
    scale = (high - low) / (2**bits - 1)
    return scale, steps_below(low, scale, xp)


def steps_below(low: Any, scale: Any, xp: Any = np) -> Any:
    """`-low / scale` of a range's lower end, not above 0, rounded half up.

    No rounding is off: a fraction of just under one half stays below it, where adding one half in float32 would carry
    it over.
    """
    exact = -low / scale
    whole = xp.floor(exact)
    return whole + xp.floor((exact - whole) * 2)


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of an activation tensor as it lies in an integer tensor of the artifact.

    `bits` of 2..8 occupy the top of int8, codes `128 - 2**bits .. 127` (saturation placement: the kernel's own
    saturation is then the upper clamp); 16 bits are int16, with zero point 0 and all
    of its codes, because the kernels saturate at -32768.

    Example:
        >>> Affine.of_range(np.float32(0.0), np.float32(1.5), 4)
        Affine(scale=np.float32(0.1), zero_point=112, bits=4)
    """

    scale: np.float32
    zero_point: int
    bits: int

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return -INT16_MAX - 1 if self.bits == 16 else 128 - 2**self.bits

    @property
    def qmax(self) -> int:
        """The highest code."""
        return INT16_MAX if self.bits == 16 else INT8_MAX

    @property
    def dtype(self) -> str:
        """The integer dtype of the artifact's tensor."""
        return "int16" if self.bits == 16 else "int8"

    @classmethod
    def of_range(cls, low: np.float32, high: np.float32, bits: int, name: str = "tensor") -> Affine:
        """The parameters for a float range that holds zero, nudged so that zero is a code.

        Args:
            low, high: the range, `low <= 0 <= high`, float32.
            bits: 1..8, or 16 for a symmetric int16 tensor.
            name: the tensor, for the error.

        Returns:
            The parameters, those of `nudged`.

        Raises:
            RangeError: a range that is not finite, or whose scale leaves what a float32 multiplier can hold.
        """
        low, high = np.float32(low), np.float32(high)
        if low == high:  # a tensor that is constantly zero: any scale holds it exactly
            high = np.float32(1.0)
        with np.errstate(all="ignore"):  # what overflows is refused below, by name
            wide = bits == 16
            scale, below = (max(-low, high) / np.float32(INT16_MAX), 0) if wide else nudged(low, high, bits)
        if not np.isfinite(scale) or not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            raise RangeError(
                f"tensor {name!r}",
                f"its range must give a scale between {SMALLEST_SCALE:.0e} and {LARGEST_SCALE:.0e}",
                f"range [{low}, {high}] at {bits} bits",
                "Scale the values of this tensor, or leave its layer in float with `exclude`",
            )
        return cls(scale, 0 if wide else int(below) + 128 - 2**bits, bits)

    def narrowed(self, bits: int) -> Affine:
        """The same range in fewer bits: the scale grows by powers of two, and the codes keep to the top of int8."""
        factor = 2 ** (8 - bits)
        unsigned = (self.zero_point - self.qmin) // factor
        return Affine(np.float32(self.scale * factor), unsigned + 128 - 2**bits, bits)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Codes of `x` (any shape, float) in the integer dtype, rounded half up and saturated."""
        codes = round_half_up(np.asarray(x, np.float64) / np.float64(self.scale)) + self.zero_point
        clipped: np.ndarray = np.clip(codes, self.qmin, self.qmax).astype(self.dtype)
        return clipped

    def dequantize(self, codes: np.ndarray) -> np.ndarray:
        """Float32 values of integer `codes`."""
        return ((codes.astype(np.int32) - self.zero_point) * self.scale).astype(np.float32)

    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value that have a code."""
        low, high = self.dequantize(np.array([self.qmin, self.qmax], np.int32)).tolist()
        return low, high

    def beyond(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Which real values (any shape) lie over half a step below the lowest code, and which above the highest."""
        real = np.asarray(x, np.float64) / self.scale + self.zero_point
        return real < self.qmin - 0.5, real > self.qmax + 0.5


def fake_quantize(x: Any, scale: Any, zero_point: Any, qmin: float, qmax: float, xp: Any = np) -> Any:
    """Quantize and dequantize: `(clip(floor(x/scale + 0.5) + zero_point, qmin, qmax) - zero_point) * scale`.

    Source: Jacob et al. 2018, equation 12, with half-up rounding.
    """
    codes = xp.clip(round_half_up(x / scale, xp) + zero_point, qmin, qmax)
    return (codes - zero_point) * scale


def bias_unit(source: Affine, scale: np.ndarray) -> np.ndarray:
    """`s_in * s_w`, of which an integer bias is a multiple; one per output channel, float64."""
    unit: np.ndarray = np.float64(source.scale) * scale.astype(np.float64)
    return unit


def bias_codes(bias: np.ndarray, source: Affine, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 codes of a bias and their scale `s_in * s_w`, float32.

    Source: TensorFlow Lite 8-bit quantization specification, bias of CONV_2D and others.
    """
    unit = bias_unit(source, scale)
    codes = round_half_up(bias / unit)
    return codes.astype(np.int32), unit.astype(np.float32)


def bias_error(bias: np.ndarray, unit: np.ndarray, target: Affine) -> float:
    """The largest error that rounding a bias to its unit `s_in * s_w` makes, in codes of the output."""
    exact = bias / unit.astype(np.float64)
    off = np.abs(round_half_up(exact) - exact) * unit / np.float64(target.scale)
    return float(off.max(initial=0.0))
