"""Calibration hands ranges to the quantizers, with the share of a batch's extremes that training is to keep to."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.core.calibration import batches, calibrate
from kquant.core.errors import CalibrationError
from kquant.core.graph import Graph, Op, Tensor


class Quantizer:
    """Records what it is given."""

    def __init__(self, bits: int):
        self.bits, self.symmetric, self.nonneg = bits, False, False

    def set_range(self, low, high, site, covered=(1.0, 1.0), held=False):
        self.low, self.high, self.covered = float(low), float(high), covered


def calibrated(bits: int, batches: list[np.ndarray], observer: str) -> Quantizer:
    quantizer = Quantizer(bits)
    double = Op("a", "elementwise", ("x",), ("a",), call=lambda v, float_weights=False: [np.asarray(v[0]) * 2])
    attrs = {"quantizer": quantizer, "site": 0, "spec": "a"}
    marker = Op("q", "fake_quant", ("a",), ("q",), attrs, call=lambda v, float_weights=False: v)
    tensors = {t: Tensor(t, (None, 1000)) for t in "xaq"}
    calibrate(Graph((double, marker), tensors, ("x",), ("q",), input_names=("x",)), batches, observer)
    return quantizer


# Small values and a lone one of 5 or 1, which the op doubles: batch maxima of 10 and 2, 6 on average.
BATCHES = [np.append(np.linspace(0, 0.5, 999), top).astype(np.float32)[None] for top in (5.0, 1.0)]


def test_a_cut_is_kept_relative_to_what_a_batch_reaches():
    found = calibrated(2, BATCHES, "mse")
    assert 0 < found.high < 2
    assert found.covered == (1.0, pytest.approx(found.high / 6))


def test_training_starts_where_calibration_ended():
    """Batches of a kind: moving averages of their extremes, times the share, give the calibrated range again."""
    alike = [np.roll(BATCHES[0], k) for k in range(4)]
    found = calibrated(2, alike, "mse")
    assert found.high < 9
    assert found.covered[1] * 10 == pytest.approx(found.high)


class Rounding(Quantizer):
    """Clips to the range that it was given."""

    low, high = -np.inf, np.inf

    def call(self, values, float_weights=False):
        return [np.clip(np.asarray(values[0]), self.low, self.high)]


def test_a_cut_is_kept_relative_to_what_earlier_cuts_let_through():
    """Two roundings in a row: the second never meets what the first one cut off, so its own share is whole."""
    first, second = Rounding(2), Rounding(2)
    ops = tuple(
        Op(o, "fake_quant", (i,), (o,), {"quantizer": q, "site": 0, "spec": o}, call=q.call)
        for i, o, q in (("x", "a", first), ("a", "b", second))
    )
    tensors = {t: Tensor(t, (None, 1000)) for t in "xab"}
    calibrate(Graph(ops, tensors, ("x",), ("b",), input_names=("x",)), BATCHES, "mse")
    assert first.covered[1] == pytest.approx(first.high / 3)  # 5 and 1, 3 on average
    assert second.high == first.high
    assert second.covered[1] == pytest.approx(second.high / np.mean([min(first.high, top) for top in (5.0, 1.0)]))


def test_ranges_over_all_values_follow_the_batches():
    assert calibrated(8, BATCHES, "minmax").covered == (1.0, 1.0)


def test_a_mean_that_is_rounding_noise_gets_a_range_of_its_own_steps():
    """Centred values of up to 1.5 in 2 bits: steps of 1, of which the mean of four moves by quarters."""
    first, second = Quantizer(2), Quantizer(8)
    first.range = lambda: (first.low, first.high)
    first.low, first.high = -1.5, 1.5
    noise = np.full((1, 1), 1e-9, np.float32)
    ops = (
        Op("q", "fake_quant", ("x",), ("q",), {"quantizer": first, "site": 0, "spec": "x"}, call=lambda v, _=False: v),
        Op("m", "mean", ("q",), ("m",), call=lambda v, _=False: [noise]),
        Op("r", "fake_quant", ("m",), ("r",), {"quantizer": second, "site": 0, "spec": "m"}, call=lambda v, _=False: v),
    )
    sizes = {"x": 4, "q": 4, "m": 1, "r": 1}
    graph = Graph(ops, {t: Tensor(t, (None, n)) for t, n in sizes.items()}, ("x",), ("r",), input_names=("x",))
    calibrate(graph, [np.array([[-1.5, 1.5, 0.5, -0.5]], np.float32)], "minmax")
    assert (second.low, second.high) == (-0.25, 0.25)


# -- what is handed over ----------------------------------------------------------------------------------------------


def two_inputs() -> Graph:
    total = Op("c", "add", ("a", "b"), ("c",), call=lambda v, float_weights=False: [v[0] + v[1]])
    return Graph((total,), {t: Tensor(t, (None, 3)) for t in "abc"}, ("a", "b"), ("c",), input_names=("a", "b"))


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_array_for_each_of_several_inputs_are_samples(kind):
    a, b = np.arange(120, dtype=np.float32).reshape(40, 3), np.zeros((40, 3), np.float32)
    feeds = list(batches(kind([a, b]), two_inputs()))
    np.testing.assert_array_equal(np.concatenate([f["a"] for f in feeds]), a)
    assert {f["b"].sum() for f in feeds} == {0}
    # Two batches of two inputs stay two batches.
    assert len(list(batches([[a, b], (a, b)], two_inputs()))) == 2


def test_a_batch_of_too_few_inputs_says_what_a_batch_is():
    with pytest.raises(CalibrationError, match="list of one array each"):
        list(batches(np.zeros((4, 3), np.float32), two_inputs()))
