"""Range observers: from the batches seen in calibration to the range [lo, hi] that a tensor is quantized on.

`minmax`, `percentile` and `mse` depend only on the set of values seen: neither their order nor their division into
batches or replicas changes a bit of the result. `ema` follows the batches in their order.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kquant.core.errors import CalibrationError, ConfigError, nearest
from kquant.core.moving import EMA_DECAY, moved

Values = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PERCENTILE = 99.99

_FLOAT_MAX = float(np.finfo(np.float32).max)
_SIDE_BITS = 13
_SIDE = 2**_SIDE_BITS  # bins on each side of zero: 128 KiB of counts per tensor, and 32 bins to an 8-bit step or more
_CHUNK = 2**18  # values binned at a time, so that the float64 copies stay in cache


class Observer(abc.ABC):
    """What all observers share; the kinds differ in what they keep of the values and in the range they choose.

    Args:
        bits: of the tensor to be quantized, 1..8 or 16.
        symmetric: the range is [-m, m], for a zero point held at 0. It wins over `nonneg`.
        nonneg: the tensor has no negative values by construction, so `lo` is 0; values below 0 would be clipped.
    """

    cuts = False  # whether the range may leave out values that were seen

    def __init__(self, bits: int, symmetric: bool = False, nonneg: bool = False):
        self.bits, self.symmetric, self.nonneg = bits, symmetric, nonneg
        self.lo, self.hi = math.inf, -math.inf

    def update(self, array: npt.ArrayLike, name: str = "tensor") -> None:
        """Take in one batch.

        Args:
            array: values of any shape, read as float32; at least one.
            name: of the tensor, for the message of an error.

        Raises:
            CalibrationError: `array` is empty or holds NaN or infinity; then nothing of it is taken in.
        """
        values = _flat(array)
        self._absorb(values, *_finite_range(values, name))

    def merge(self, other: Observer) -> None:
        """Take in all that `other`, an observer of the same kind, has seen; `other` stays as it is."""
        if type(other) is not type(self):
            raise CalibrationError(
                "observer",
                f"expected a {type(self).__name__} to merge",
                type(other).__name__,
                "Merge observers of one kind and the same settings",
            )
        self._merge(other)

    def range(self, name: str = "tensor") -> tuple[np.float32, np.float32]:
        """The chosen range as float32 (lo, hi) with lo <= 0 <= hi, because zero has to be exactly representable.

        Raises:
            CalibrationError: no batch was taken in.
        """
        if self.lo > self.hi:
            raise CalibrationError(f"tensor {name!r}", "no calibration batch reached it", fix="Pass at least one batch")
        lo, hi = self._choose()
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        if self.symmetric:
            lo, hi = -max(-lo, hi), max(-lo, hi)
        elif self.nonneg:
            lo = 0.0
        # Rounding must not carry an end beyond float32; adding zero turns -0.0 into 0.0.
        return np.float32(max(lo, -_FLOAT_MAX) + 0.0), np.float32(min(hi, _FLOAT_MAX) + 0.0)

    def _absorb(self, values: Values, lo: float, hi: float) -> None:
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)

    def _merge(self, other: Any) -> None:
        self.lo, self.hi = min(self.lo, other.lo), max(self.hi, other.hi)

    @abc.abstractmethod
    def _choose(self) -> tuple[float, float]:
        """The range before zero, `symmetric` and `nonneg` are seen to."""


class MinMaxObserver(Observer):
    """The least and the greatest value seen.

    Example:
        >>> observer = make_observer("minmax", bits=8)
        >>> observer.update([1.0, 2.5])
        >>> observer.range()
        (np.float32(0.0), np.float32(2.5))
    """

    def _choose(self) -> tuple[float, float]:
        return self.lo, self.hi


class EmaObserver(Observer):
    """Exponential moving averages of the batches' minimum and maximum, started from the first batch.

    `m <- 0.99 m + 0.01 batch`, as in training (Jacob et al. 2018, section 3.1). The averages of two replicas cannot be
    merged: reduce the `batch_range` of all replicas by minimum and maximum, then `update_range` on each of them.

    Example:
        >>> observer = EmaObserver(bits=8)
        >>> for batch in ([-1.0, 1.0], [-1.0, 3.0]):
        ...     observer.update_range(*observer.batch_range(batch))
        >>> observer.range()
        (np.float32(-1.0), np.float32(1.02))
    """

    decay = EMA_DECAY

    @staticmethod
    def batch_range(array: npt.ArrayLike, name: str = "tensor") -> tuple[float, float]:
        """Minimum and maximum of one batch; errors as in `update`."""
        return _finite_range(_flat(array), name)

    def update_range(self, lo: float, hi: float, name: str = "tensor") -> None:
        """Move the averages towards one batch's range, which may be that of the batch of all replicas."""
        if not -math.inf < lo <= hi < math.inf:
            raise CalibrationError(
                f"tensor {name!r}",
                "expected a finite range with lo <= hi",
                f"[{lo}, {hi}]",
                "Observe finite values only",
            )
        first = self.lo > self.hi
        self.lo = float(lo) if first else moved(self.lo, float(lo), self.decay)
        self.hi = float(hi) if first else moved(self.hi, float(hi), self.decay)

    def _absorb(self, values: Values, lo: float, hi: float) -> None:
        self.update_range(lo, hi)

    def _merge(self, other: Any) -> None:
        fix = "Reduce batch_range over the replicas, then call update_range on each"
        raise CalibrationError("observer", "moving averages depend on the order of batches and cannot merge", fix=fix)

    def _choose(self) -> tuple[float, float]:
        return self.lo, self.hi


class Histogram:
    """Counts of values on a grid whose bins are `2**exponent` wide and start at 0: bin k is [k, k+1) of that width.

    The exponent follows from the largest magnitude seen. When it grows, each bin is the union of whole finer bins, so
    coarsening adds integers and the counts are those that the coarse grid would have had from the beginning.

    Attributes:
        counts: int64 of shape (2 * 8192,), for the bins -8192 .. 8191.
        exponent: of the bin width; starts where the smallest float32 still has its own bin.
    """

    def __init__(self) -> None:
        self.counts: Ints = np.zeros(2 * _SIDE, np.int64)
        self.exponent = -149 - _SIDE_BITS

    @property
    def width(self) -> float:
        """Width of a bin, in the unit of the tensor."""
        return math.ldexp(1.0, self.exponent)

    def add(self, values: Values, magnitude: float) -> None:
        """Count `values`, none of which exceeds `magnitude` on either side of zero."""
        # frexp gives magnitude < 2**e, so all bins lie in -8192 .. 8191; scaling by a power of two is exact in float64.
        self._coarsen(math.frexp(magnitude)[1] - _SIDE_BITS if magnitude else self.exponent)
        per_width = math.ldexp(1.0, -self.exponent)
        for start in range(0, values.size, _CHUNK):
            bins = np.floor(values[start : start + _CHUNK].astype(np.float64) * per_width).astype(np.int64)
            bins += _SIDE
            self.counts += np.bincount(bins, minlength=2 * _SIDE)

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`, on the coarser of the two grids."""
        self._coarsen(other.exponent)
        self.counts = self.counts + _coarsened(other.counts, self.exponent - other.exponent)

    def quantile(self, share: float) -> float:
        """The value below which `share` of the values lie, with the values of a bin spread evenly over it."""
        below = np.concatenate([[0], np.cumsum(self.counts)])
        target = share * below[-1]
        k = min(int(np.searchsorted(below[1:], target)), 2 * _SIDE - 1)
        return float(k - _SIDE + (target - below[k]) / max(int(self.counts[k]), 1)) * self.width

    def _coarsen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarsened(self.counts, exponent - self.exponent)
            self.exponent = exponent


class _HistogramObserver(Observer):
    """Base of the observers that choose their range from a histogram of all values."""

    cuts = True

    def __init__(self, bits: int, symmetric: bool = False, nonneg: bool = False):
        super().__init__(bits, symmetric, nonneg)
        self.histogram = Histogram()

    def _absorb(self, values: Values, lo: float, hi: float) -> None:
        super()._absorb(values, lo, hi)
        self.histogram.add(values, max(-lo, hi))

    def _merge(self, other: Any) -> None:
        super()._merge(other)
        self.histogram.merge(other.histogram)


class PercentileObserver(_HistogramObserver):
    """The range that leaves out the same small share of the values at each end: 0.01 % at 99.99.

    Each end is within one bin, at most 1/4096 of the largest magnitude, of the percentile of the values themselves.
    """

    percentile = PERCENTILE

    def _choose(self) -> tuple[float, float]:
        # Rounded, because 1 - 0.99 is a little more than 0.01, which would be the next value's rank.
        tail = round(1 - self.percentile / 100, 12)
        lo, hi = self.histogram.quantile(tail), self.histogram.quantile(1 - tail)
        # The ends of the outermost bins lie outside the values: a constant tensor would get a range it does not have.
        return min(max(lo, self.lo), self.hi), min(max(hi, self.lo), self.hi)


class MseObserver(_HistogramObserver):
    """The range whose quantizer has the least expected squared error on the histogram, clipping included.

    The search goes over the integer quantizers themselves, all zero points and 128 scales over 8 octaves, refined
    around the best, so the nudging that makes zero a code does not move the result; ranges are only ever shrunk from
    the one that holds all values. At 16 bits the range is minimum and maximum: a step is then finer than a bin, and
    the noise it could save is at -98 dB.

    Example:
        >>> observer = make_observer("mse", bits=2)
        >>> observer.update(np.r_[np.linspace(-1, 1, 10_000), 4.0])
        >>> observer.range()[1] < 2.0
        np.True_
    """

    def _choose(self) -> tuple[float, float]:
        if self.bits == 16 or self.lo == self.hi == 0.0:
            return self.lo, self.hi
        qmax, width = 2**self.bits - 1, self.histogram.width
        # On one side of zero every code belongs there: any other zero point has some of the same levels, none better.
        held = 0 if self.nonneg or self.lo >= 0 else qmax if self.hi <= 0 else None
        if self.symmetric:
            held = 2 ** (self.bits - 1)  # `Affine.of_range` puts the zero of [-m, m] on this code, counted from qmin
        scale, zero = _least_error(self.histogram.counts, self.lo / width, self.hi / width, qmax, held)
        scale *= width
        if self.symmetric:
            return -scale * qmax / 2, scale * qmax / 2
        return -scale * zero, scale * (qmax - zero)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "ema": EmaObserver,
}
CHOICES = ("auto", *OBSERVERS)  # what a user may name


def make_observer(name: str, bits: int, symmetric: bool = False, nonneg: bool = False) -> Observer:
    """An observer by name; "auto" is "mse" up to 4 bits, where clipping pays, and "minmax" above.

    Raises:
        ConfigError: an unknown name, bits that no integer tensor has, or one bit with `symmetric`.

    Example:
        >>> type(make_observer("auto", bits=4)).__name__, type(make_observer("auto", bits=8)).__name__
        ('MseObserver', 'MinMaxObserver')
    """
    if bits not in (*range(1, 9), 16):
        raise ConfigError("observer", "expected 1 to 8 or 16 bits", bits, "Use bits from 1 to 8, or 16")
    if symmetric and bits == 1:
        raise ConfigError(
            "observer",
            "expected at least 2 bits for a symmetric range; one bit has no positive code",
            bits,
            "Use 2 bits, or a range that is not symmetric",
        )
    kind = ("mse" if bits <= 4 else "minmax") if name == "auto" else name
    if kind not in OBSERVERS:
        fix = f"Did you mean {nearest(str(name), CHOICES)}"
        raise ConfigError("observer", f"expected one of {CHOICES}", repr(name), fix)
    return OBSERVERS[kind](bits, symmetric, nonneg)


def _flat(array: npt.ArrayLike) -> Values:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which `_finite_range` refuses by name
        return np.asarray(array).astype(np.float32, copy=False).ravel()


def _finite_range(values: Values, name: str) -> tuple[float, float]:
    if not values.size:
        raise CalibrationError(
            f"tensor {name!r}", "expected a batch with at least one value", "an empty array", "Leave empty batches out"
        )
    lo, hi = float(values.min()), float(values.max())  # NaN and infinity both show in the two extremes
    if not (math.isfinite(lo) and math.isfinite(hi)):
        bad = int(values.size - np.isfinite(values).sum())
        fix = "Look for NaN or infinity in the calibration data and in the layers before it"
        raise CalibrationError(
            f"tensor {name!r}", "expected finite values", f"{bad} of {values.size} not finite in float32", fix
        )
    return lo, hi


def _coarsened(counts: Ints, shift: int) -> Ints:
    """The same counts on bins `2**shift` times as wide: floor(floor(x) / 2**shift) = floor(x / 2**shift)."""
    merged = counts.reshape(-1, 2 ** min(shift, _SIDE_BITS)).sum(axis=1)  # two bins at the least, -1 and 0
    result = np.zeros_like(counts)
    start = _SIDE - merged.size // 2
    result[start : start + merged.size] = merged
    return result


def _least_error(counts: Ints, lo: float, hi: float, qmax: int, held: int | None) -> tuple[float, int]:
    """The (scale, zero point) in bin widths with the least `_grid_errors` for values in [lo, hi], by refinement.

    Args:
        counts: of a `Histogram`.
        lo, hi: extremes of the values, in bin widths.
        qmax: the greatest code; the smallest is 0.
        held: the only zero point to consider; None for all.
    """
    spacing = -(-(qmax + 1) // 16)
    zeros = np.arange(0, qmax + spacing, spacing).clip(max=qmax) if held is None else np.array([held])
    octaves = np.linspace(0.0, -8.0, 128)
    fine = octaves[1]
    scale, zero = 0.0, 0
    for rounds in range(8):
        # The smallest scale that holds all values, from whichever side has codes; one that has none is clipped to 0.
        below, above = -min(lo, 0.0) / np.maximum(zeros, 1) * (zeros > 0), max(hi, 0.0) / np.maximum(qmax - zeros, 1)
        cover = np.maximum(below, above * (zeros < qmax))
        scales = cover[:, None] * 2.0**octaves if rounds == 0 else np.minimum(scale * 2.0**octaves, cover[:, None])
        errors = _grid_errors(counts, scales, zeros, qmax)
        row, column = np.unravel_index(int(np.argmin(errors)), errors.shape)
        scale, zero = float(scales[row, column]), int(zeros[row])
        if rounds and (spacing == 1 or held is not None):
            break
        spacing, fine = -(-spacing // 8), fine / 8
        octaves = fine * np.arange(-8, 9)
        zeros = np.unique((zero + spacing * np.arange(-8, 9)).clip(0, qmax)) if held is None else zeros
    return scale, zero


def _grid_errors(counts: Ints, scales: Floats, zeros: Ints, qmax: int) -> Floats:
    """Summed squared error of the quantizers (scales[i, j], zeros[i]) on a histogram, all in bin widths.

    With x spread evenly over its bin, values v_q = s (q - z) and thresholds t_q half a step above v_q, summation by
    parts of sum_q E[(x - v_q)^2; t_{q-1} < x < t_q] leaves

        E[(x - v_qmax)^2] + 2 s sum_{q < qmax} G(t_q),    G(t) = sum_{x < t} (x - t) = - integral of the counts below t,

    so the cost is one look-up of G per level, whatever the number of values and of bins.
    """
    padded = np.append(counts, 0).astype(np.float64)
    edges = np.arange(-_SIDE, _SIDE + 1.0)
    below = np.concatenate([[0.0], np.cumsum(padded[:-1])])
    integral = np.concatenate([[0.0], np.cumsum(below[:-1] + padded[:-1] / 2)])

    step = scales[..., None]
    thresholds = np.maximum((np.arange(qmax) - zeros[:, None, None] + 0.5) * step, -_SIDE)
    at = np.minimum(np.floor(thresholds), _SIDE).astype(np.int64)
    part = thresholds - at
    at += _SIDE
    g = -(integral[at] + below[at] * part + padded[at] * part**2 / 2)

    top = scales * (qmax - zeros[:, None])
    centres, count = edges + 0.5, padded.sum()
    first, second = (padded * centres).sum(), (padded * (centres**2 + 1 / 12)).sum()
    errors: Floats = second - 2 * top * first + top**2 * count + 2 * scales * g.sum(axis=-1)
    return errors
