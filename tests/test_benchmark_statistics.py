"""The benchmarks' statistics, against values derived by other means."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.statistics import interleave, mean_difference, paired_difference, ratio


def right(pattern):
    return np.array([c == "1" for c in pattern])


def test_paired_difference_is_the_difference_of_accuracies():
    found = paired_difference(right("1111011110"), right("1101111111"))
    assert found.points == pytest.approx(100 * (9 - 8) / 10)
    assert found.low < found.points < found.high


def test_paired_difference_of_a_worked_table():
    # n = 100, 8 lost, 2 gained. Agresti and Min add 1/2 to each cell: 8.5 and 2.5 of 102.
    reference = np.array([True] * 88 + [False] * 2 + [False] * 10)
    other = np.array([True] * 80 + [False] * 8 + [True] * 2 + [False] * 10)
    found = paired_difference(reference, other)
    assert (found.points, found.low, found.high) == pytest.approx((-6.0, -12.1523, 0.3876), abs=1e-3)


def test_paired_difference_of_equal_models_is_not_a_point():
    found = paired_difference(np.ones(200, bool), np.ones(200, bool))
    assert found.points == 0.0
    assert found.low == -found.high < -0.5


def test_paired_difference_covers_the_truth_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        draw = random.random(300)
        found = paired_difference(draw >= 0.06, (draw < 0.02) | (draw >= 0.06))  # 2 % gained, none lost
        covered += found.low <= 2.0 <= found.high
    assert 0.93 <= covered / 2000 <= 0.99  # binomial noise of 2,000 trials is 0.005


def test_mean_difference_of_one_run_is_close_to_the_exact_interval():
    random = np.random.default_rng(1)
    reference, other = random.random(2000) < 0.83, random.random(2000) < 0.80
    one, exact = mean_difference(reference, other[None]), paired_difference(reference, other)
    assert one.points == pytest.approx(exact.points)
    # 4,000 resamples give the end of an interval to 2 % of its width.
    assert (one.low, one.high) == pytest.approx((exact.low, exact.high), abs=0.04 * (exact.high - exact.low))


def test_mean_difference_grows_with_the_spread_of_seeds():
    reference, half = np.ones(2000, bool), np.arange(2000) % 2 == 0
    alike = mean_difference(reference, np.stack([half, half]))
    apart = mean_difference(reference, np.stack([reference, ~reference]))
    assert alike.points == apart.points == -50.0
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_mean_difference_takes_a_reference_per_run():
    runs = np.random.default_rng(2).random((3, 100)) < 0.5
    found = mean_difference(runs, runs)
    assert (found.points, found.low, found.high) == (0.0, 0.0, 0.0)


def test_ratio_is_taken_within_rounds():
    found = ratio([1.0, 10.0, 2.0], [1.1, 12.0, 2.6])  # the machine was slower in the second round
    assert found.median == pytest.approx(1.2)
    assert (found.low, found.high) == pytest.approx((1.15, 1.25))
    assert found.rounds == 3


@pytest.mark.parametrize("sides", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_ratio_refuses(sides):
    with pytest.raises(ValueError, match="Received"):
        ratio(*sides)


def test_interleave_alternates_and_counts():
    calls = []
    seconds = interleave([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, repeats=2)
    assert "".join(calls) == "aabbbbaaaabb"
    assert [len(side) for side in seconds] == [3, 3]
    assert all(value > 0 for side in seconds for value in side)
