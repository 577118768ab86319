"""Weight quantizers: from float weights to integer codes and scales, one formula each.

A formula has two steps. `prepare` is differentiated as it stands; `quantize` maps what it returns to codes and scale
and is passed straight through by the gradient, so that d(code * scale)/d(prepared) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.core.affine import INT8_MAX, SMALLEST_SCALE, round_half_up


@dataclass(frozen=True)
class Symmetric:
    """Symmetric uniform weights, `[-(2^(b-1)-1), 2^(b-1)-1]`, scale `max|w| / (2^(b-1)-1)`.

    Source: Jacob et al. 2018, section 3; per output channel as in the TensorFlow Lite 8-bit quantization specification.

    Args:
        bits: 2..8.
        axes: the axes that share a scale (all but the output channel's); None for one scale per tensor.
    """

    bits: int
    axes: tuple[int, ...] | None

    @property
    def qmax(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def prepare(self, w: Any, xp: Any = np) -> Any:
        """The weights themselves."""
        return w

    def quantize(self, w: Any, xp: Any = np) -> tuple[Any, Any]:
        """Integer-valued float codes (shape of `w`) and a scale that broadcasts against them.

        Example:
            >>> codes, scale = Symmetric(4, axes=(0,)).quantize(np.array([[0.7, 0.0], [-0.35, 0.0]], np.float32))
            >>> codes.tolist()
            [[7.0, 0.0], [-3.0, 0.0]]
        """
        return self.codes(w, xp.max(xp.abs(w), axis=self.axes, keepdims=True), xp)

    def codes(self, w: Any, limit: Any, xp: Any = np) -> tuple[Any, Any]:
        """Codes and scale for the range `[-limit, limit]`."""
        scale = xp.maximum(limit / self.qmax, SMALLEST_SCALE)
        return xp.clip(round_half_up(w / scale, xp), -self.qmax, self.qmax), scale

    def fold(self, w: Any, gain: Any, revive: bool = False, xp: Any = np) -> tuple[Any, Any]:
        """The codes of `w * gain` on one scale, and for each channel that scale over its gain: `codes * scale` is ~`w`.

        The gain is the batch norm's `|gamma / sigma|` with its moving statistics, and the norm stays behind the op: the
        op that scales its kernel, quantizes it and unscales its result is what is trained, and the kernel with the
        norm's factor in it, on one scale, is what is deployed.

        A channel whose gain is so small that all of its codes are zero deploys as its offset alone. In training
        (`revive`) its gain is floored: where it would use all codes, which is its own range. So the norm behind it has
        something to normalize, and a gamma that begins at zero something to learn from.

        No gradient reaches the gain: passed straight through the rounding it would be the rounding error's, since
        scaling and unscaling cancel. Gamma has its own through the norm.

        Source: Jacob et al. 2018, section 3.2; with moving statistics as in Krishnamoorthi 2018 (arXiv:1806.08342),
        section 3.2.2.

        Args:
            w: the kernel.
            gain: not negative, one per output channel; its shape broadcasts against `w`.
            revive: floor the gain.
            xp: the array namespace.

        Example:
            >>> w, gain = np.array([[0.5, 0.5], [0.25, -1.0]], np.float32), np.array([[2.0, 0.5]], np.float32)
            >>> codes, scale = Symmetric(3, axes=None).fold(w, gain)
            >>> codes.tolist(), (scale * gain).tolist()
            ([[3.0, 1.0], [2.0, -1.0]], [[0.3333333432674408, 0.3333333432674408]])
        """
        axes = tuple(i for i, size in enumerate(gain.shape) if size == 1)
        limit = xp.max(xp.abs(w), axis=axes, keepdims=True)
        one = xp.maximum(xp.max(limit * gain) / self.qmax, SMALLEST_SCALE)
        dead = limit * gain < one / 2
        codes = xp.clip(round_half_up(w * gain / one, xp), -self.qmax, self.qmax)
        scale = one / xp.where(dead, xp.ones_like(gain), gain)
        floored, own = self.codes(w, limit, xp) if revive else (0.0 * codes, 0.0 * scale)
        return xp.where(dead, floored, codes), xp.where(dead, own, scale)


def gain_shape(size: int, kernel: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """The shape in which a batch norm's values broadcast against a kernel.

    Args:
        size: how many channels the norm has: all that the kernel makes, or those of its last axis.
        kernel: the kernel's shape.
        axes: those of its axes that are not output channels.

    Example:
        >>> gain_shape(8, (3, 3, 4, 2), (0, 1)), gain_shape(2, (3, 4, 2), (0,))
        ((1, 1, 4, 2), (1, 1, 2))
    """
    kept = [i for i in range(len(kernel)) if i not in axes]
    own = kept if math.prod(kernel[i] for i in kept) == size else kept[-1:]
    return tuple(n if i in own else 1 for i, n in enumerate(kernel))


@dataclass(frozen=True)
class DoReFa:
    """DoReFa-Net weights of k bits: `2 * quantize_k(tanh(w) / (2 max|tanh w|) + 1/2) - 1`, the maximum over the layer.

    As integers these are the odd codes `2q - (2^k - 1)` with scale `1/(2^k - 1)`. At 8 bits the 256 levels do not fit
    int8 symmetrically, so training and artifact use the 255-level grid `round(127 u)/127` instead; likewise wherever
    the odd codes would exceed `largest`. One bit is `sign(w) * E|w|` with the mean over the layer and sign(0) = +1.

    Source: Zhou et al. 2016 (arXiv:1606.06160), equations 7 to 9.

    Args:
        bits: 1..8.
        largest: the greatest code that the kernel may hold.
    """

    bits: int
    largest: int = INT8_MAX

    def prepare(self, w: Any, xp: Any = np) -> Any:
        """`tanh(w) / max|tanh w|`; at one bit the weights themselves."""
        if self.bits == 1:
            return w
        squashed = xp.tanh(w)
        return squashed / xp.maximum(xp.max(xp.abs(squashed)), SMALLEST_SCALE)

    def quantize(self, u: Any, xp: Any = np) -> tuple[Any, Any]:
        """Integer-valued float codes and their scale.

        Example:
            >>> codes, scale = DoReFa(2).quantize(np.array([-1.0, -0.2, 0.2, 1.0], np.float32))
            >>> codes.tolist()
            [-3.0, -1.0, 1.0, 3.0]
        """
        if self.bits == 1:
            scale = xp.maximum(xp.mean(xp.abs(u)), SMALLEST_SCALE)
            return xp.where(u >= 0, xp.ones_like(u), -xp.ones_like(u)), scale
        if 2**self.bits - 1 > self.largest:
            return round_half_up(u * self.largest, xp), xp.ones_like(xp.max(u)) / self.largest
        levels = 2**self.bits - 1
        codes = 2 * round_half_up(levels * (u / 2 + 0.5), xp) - levels
        return codes, xp.ones_like(xp.max(u)) / levels

    @property
    def qmax(self) -> int:
        """The largest code."""
        return min(int(2**self.bits - 1), self.largest)


def weight_formula(
    quantizer: str, bits: int, axes: tuple[int, ...] | None, largest: int = INT8_MAX
) -> Symmetric | DoReFa:
    """The formula of a recipe's weights: `"naive"` and `"qat"` are symmetric, `"dorefa"` is DoReFa's.

    Args:
        quantizer: the recipe.
        bits: of the weights.
        axes: that share a scale; None for one scale.
        largest: the greatest code that the kernel may hold; a symmetric grid then has as many bits as fit.

    Example:
        >>> weight_formula("dorefa", 2, None), weight_formula("qat", 8, None, largest=63).qmax
        (DoReFa(bits=2, largest=127), 63)
    """
    if quantizer == "dorefa":
        return DoReFa(bits, largest)
    return Symmetric(min(bits, largest.bit_length() + 1), axes)


def storage_bits(formula: Symmetric | DoReFa) -> int:
    """4 if all codes of the formula fit int4, else 8.

    Example:
        >>> storage_bits(DoReFa(3)), storage_bits(Symmetric(5, None))
        (4, 8)
    """
    return 4 if formula.qmax <= 7 else 8


def quantize_gradient(gradient: Any, noise: Any, bits: int, xp: Any = np) -> Any:
    """DoReFa-Net gradient quantization with the maximum taken per sample (axis 0).

    `2 m (quantize_k(g / (2 m) + 1/2 + noise / (2^k - 1)) - 1/2)`, m = max|g| of the sample, clipped to the k-bit levels
    before rounding. A sample whose maximum is zero passes unchanged.

    Source: Zhou et al. 2016, equation 12.

    Args:
        gradient: float array, samples on axis 0.
        noise: uniform in [-0.5, 0.5), the shape of `gradient`.
        bits: 1..8.
    """
    axes = tuple(range(1, len(gradient.shape)))
    limit = xp.max(xp.abs(gradient), axis=axes, keepdims=True)
    safe = xp.where(limit > 0, limit, xp.ones_like(limit))
    levels = 2**bits - 1
    unit = xp.clip(gradient / (2 * safe) + 0.5 + noise / levels, 0.0, 1.0)
    quantized = 2 * safe * (round_half_up(levels * unit, xp) / levels - 0.5)
    return xp.where(limit > 0, quantized, gradient)
