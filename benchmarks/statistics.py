"""What turns measurements into a statement: paired 95 % intervals, and ratios from interleaved timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile at 0.975
RESAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """A difference in percentage points with its 95 % interval."""

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_difference(reference: np.ndarray, other: np.ndarray) -> Difference:
    """The gain in accuracy of `other` over `reference` on the same samples, with its adjusted Wald interval.

    Half a sample is added to each cell of the 2×2 table, so that the interval keeps its coverage, and does not shrink
    to a point, where few or no samples differ. Source: Agresti and Min, Statistics in Medicine 24 (2005), 729-740.

    Args:
        reference, other: booleans, shape (samples,): which samples each model has right.
    """
    reference, other = np.asarray(reference, bool), np.asarray(other, bool)
    if reference.shape != other.shape or reference.ndim != 1 or not reference.size:
        raise ValueError(f"two equally long vectors expected. Received: {reference.shape} and {other.shape}")
    count = reference.size
    gained, lost = int((other & ~reference).sum()), int((reference & ~other).sum())
    total = count + 2.0
    centre = (gained - lost) / total
    spread = Z95 * np.sqrt((gained + lost + 1.0) / total - centre**2) / np.sqrt(total)
    return Difference(100 * (gained - lost) / count, 100 * (centre - spread), 100 * (centre + spread))


def mean_difference(reference: np.ndarray, runs: np.ndarray, seed: int = 0) -> Difference:
    """The gain in accuracy of several runs, on average, over one reference; percentile bootstrap over samples and runs.

    Both are drawn with replacement: the samples, because other images would give another accuracy, and the runs,
    because other seeds would. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Args:
        reference: booleans, shape (samples,); or (runs, samples) where each run has a reference of its own.
        runs: booleans, shape (runs, samples).
    """
    difference = np.asarray(runs, np.float64) - np.asarray(reference, np.float64)
    if difference.ndim != 2:
        raise ValueError(f"runs of shape (runs, samples) expected. Received: {np.shape(runs)}")
    count, size = difference.shape
    random = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        of_run = difference[random.integers(count, size=count)].mean(axis=0)
        means[i] = of_run[random.integers(size, size=size)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(100 * difference.mean(), 100 * float(low), 100 * float(high))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two interleaved measurements over rounds: median, quartiles, and the medians of both sides."""

    median: float
    low: float
    high: float
    reference: float
    other: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f}, {self.rounds} rounds)"


def ratio(reference: Sequence[float], other: Sequence[float]) -> Ratio:
    """`other / reference`, round by round.

    Args:
        reference, other: one positive measurement per round, in the same order.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size or (a <= 0).any():
        raise ValueError(f"two equally long vectors of positive numbers expected. Received: {reference}, {other}")
    low, median, high = np.quantile(b / a, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high), float(np.median(a)), float(np.median(b)), a.size)


def interleave(sides: Sequence[Callable[[], object]], rounds: int, repeats: int = 1) -> list[list[float]]:
    """Seconds per call of each side, one per round; every round times all sides, in turn forwards and backwards.

    Load from outside then falls on all sides alike, and none always goes first.

    Args:
        sides: what to time; each must have been warmed up and must wait for its result.
        rounds: blocks of each side.
        repeats: calls in a block.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for index in range(rounds):
        order = range(len(sides)) if index % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            start = time.perf_counter()
            for _ in range(repeats):
                sides[side]()
            seconds[side].append((time.perf_counter() - start) / repeats)
    return seconds
