"""Range observers: merge laws by hypothesis, chosen ranges against searches on the values themselves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kquant.core.errors import CalibrationError, ConfigError
from kquant.core.observers import EmaObserver, Histogram, PercentileObserver, _grid_errors, make_observer

ORDERLESS = ("minmax", "percentile", "mse")
F32 = np.float32

# From the smallest denormal to the largest float32, so that grids are far apart and have to be coarsened a long way.
BATCH = hnp.arrays(F32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
NARROW = hnp.arrays(F32, st.integers(1, 20), elements=st.floats(-8, 8, width=32))


def observed(name, *batches, **kwargs):
    observer = make_observer(name, **{"bits": 4, **kwargs})
    for batch in batches:
        observer.update(batch)
    return observer


def merged(one, *others):
    for other in others:
        one.merge(other)
    return one


def assert_same(one, two):
    assert (one.lo, one.hi) == (two.lo, two.hi)
    if hasattr(one, "histogram"):
        assert one.histogram.exponent == two.histogram.exponent
        np.testing.assert_array_equal(one.histogram.counts, two.histogram.counts)
    assert one.range() == two.range()


@pytest.mark.parametrize("name", ORDERLESS)
@given(a=BATCH | NARROW, b=BATCH | NARROW, c=BATCH | NARROW)
def test_merging_is_exact_commutative_and_associative(name, a, b, c):
    whole = observed(name, np.concatenate([a, b, c]))
    assert_same(observed(name, c, a, b), whole)
    assert_same(merged(observed(name, a), observed(name, b), observed(name, c)), whole)
    assert_same(merged(observed(name, c), merged(observed(name, b), observed(name, a))), whole)


@pytest.mark.parametrize("name", ORDERLESS)
def test_merging_leaves_the_other_alone_and_takes_an_empty_one(name):
    one, other = observed(name, [100.0]), observed(name, [1.0, -1.0])
    merged(one, other, make_observer(name, 4))
    assert_same(other, observed(name, [1.0, -1.0]))
    assert_same(one, observed(name, [100.0, 1.0, -1.0]))
    assert_same(merged(make_observer(name, 4), other), other)


@given(BATCH | NARROW)
def test_a_histogram_counts_by_its_documented_bins(values):
    histogram = Histogram()
    histogram.add(values, float(np.abs(values).max()))
    counts = dict.fromkeys(range(-8192, 8192), 0)
    for value in values.tolist():  # exact: python floats, a power-of-two division and floor
        counts[int(np.floor(value / 2.0**histogram.exponent))] += 1
    assert histogram.counts.tolist() == list(counts.values())
    if np.abs(values).max() > 0:
        assert 4096 <= np.abs(values.astype(float)).max() / histogram.width <= 8192


@given(st.lists(BATCH, min_size=1, max_size=4), st.booleans(), st.booleans(), st.sampled_from([2, 8, 16]))
def test_minmax(batches, symmetric, nonneg, bits):
    lo = min(0.0, *(float(b.min()) for b in batches))
    hi = max(0.0, *(float(b.max()) for b in batches))
    expected = (-max(-lo, hi), max(-lo, hi)) if symmetric else (0.0, hi) if nonneg else (lo, hi)
    assert observed("minmax", *batches, bits=bits, symmetric=symmetric, nonneg=nonneg).range() == expected


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "ema"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@given(batch=BATCH | NARROW, form=st.sampled_from(["plain", "symmetric", "nonneg"]))
def test_every_range_is_float32_and_holds_zero(name, bits, batch, form):
    if form == "symmetric" and bits == 1:
        return
    lo, hi = observed(name, batch, bits=bits, symmetric=form == "symmetric", nonneg=form == "nonneg").range()
    assert lo.dtype == hi.dtype == F32 and np.isfinite([lo, hi]).all()
    assert lo <= 0 <= hi
    assert not np.signbit(hi) and np.signbit(lo) == (lo < 0)  # no -0.0
    assert form != "symmetric" or lo == -hi
    assert form != "nonneg" or lo == 0


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "ema"])
@pytest.mark.parametrize("bits", [1, 3, 8, 16])
@pytest.mark.parametrize(("value", "expected"), [(0.0, (0, 0)), (6.0, (0, 6)), (0.3, (0, 0.3)), (-0.7, (-0.7, 0))])
def test_constant_tensors_keep_their_value(name, bits, value, expected):
    observer = observed(name, np.full((2, 5), value, F32), bits=bits)
    # The histogram spreads the value over its bin, so the least error may lie a bin away; that is a 32nd of the 8-bit
    # step at most. Where the range is taken as it is, it is exact.
    tolerance = observer.histogram.width if name == "mse" and bits < 16 else 0
    np.testing.assert_allclose(observer.range(), np.array(expected, F32), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "ema"])
def test_what_cannot_be_observed_is_refused_by_name(name):
    observer = make_observer(name, 8)
    with pytest.raises(CalibrationError, match=r"'conv1'.*no calibration batch"):
        observer.range(name="conv1")
    observer.update([1.0, 2.0])
    before = observer.range()
    # 1e39 is finite in float64, but not in float32.
    for batch, text in [([3, np.nan], "1 of 2"), ([3, np.inf, -np.inf], "2 of 3"), ([1e39], "1 of 1"), ([], "empty")]:
        with pytest.raises(CalibrationError, match=f"'conv1'.*{text}"):
            observer.update(np.array(batch, np.float64), name="conv1")
    assert observer.range() == before
    others = [n for n in ("minmax", "mse") if n != name]
    with pytest.raises(CalibrationError, match=r"expected a \w+Observer to merge"):
        observer.merge(make_observer(others[0], 8))


def test_names():
    kinds = {n: type(make_observer(n, 8)).__name__ for n in ("minmax", "percentile", "mse", "ema", "auto")}
    assert list(kinds.values()) == [
        "MinMaxObserver",
        "PercentileObserver",
        "MseObserver",
        "EmaObserver",
        kinds["minmax"],
    ]
    assert [type(make_observer("auto", b)).__name__ == "MseObserver" for b in (1, 4, 5, 16)] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ConfigError, match=r"'min_max'.*'minmax'|Did you mean 'minmax'.*'min_max'"):
        make_observer("min_max", 8)
    for bits in (0, 9, 32):
        with pytest.raises(ConfigError, match=str(bits)):
            make_observer("minmax", bits)
    with pytest.raises(ConfigError, match="symmetric"):
        make_observer("minmax", 1, symmetric=True)


def test_ema_follows_its_formula():
    batches = [np.array(b, F32) for b in ([-1, 2], [-3, 1], [0.5, 5])]
    lo, hi = -1.0, 2.0  # the first batch starts the averages
    for batch in batches[1:]:
        lo, hi = lo + 0.01 * (float(batch.min()) - lo), hi + 0.01 * (float(batch.max()) - hi)
    np.testing.assert_array_max_ulp(np.array(observed("ema", *batches).range()), np.array([lo, hi], F32), maxulp=1)


def test_ema_of_replicas_is_that_of_the_whole_batch():
    batches = np.random.default_rng(0).normal(size=(5, 2, 30)).astype(F32)  # step, replica, values
    replicas = [EmaObserver(8), EmaObserver(8)]
    for batch in batches:
        los, his = zip(*(EmaObserver.batch_range(part) for part in batch), strict=True)
        for replica in replicas:
            replica.update_range(min(los), max(his))
    assert_same(replicas[0], observed("ema", *batches))
    assert_same(replicas[1], replicas[0])
    with pytest.raises(CalibrationError, match="batch_range"):
        replicas[0].merge(replicas[1])
    with pytest.raises(CalibrationError, match="'conv1'"):
        replicas[0].update_range(1.0, -1.0, name="conv1")


def samples(kind, size=20_000):
    rng = np.random.default_rng(1)
    normal = rng.normal(size=size)
    values = {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "skewed": np.exp(normal) - 0.3,
        "heavy": rng.standard_t(2.5, size=size),
        "outlier": np.r_[normal, 40.0],
        "negative": -np.abs(normal),
    }[kind]
    return (values * 0.37).astype(F32)


KINDS = ("normal", "relu", "skewed", "heavy", "outlier", "negative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [99.99, 99.0, 75.0])
def test_percentile_is_within_a_bin_of_the_sorted_values(kind, percentile):
    values = samples(kind)
    observer = PercentileObserver(8)
    observer.percentile = percentile
    for batch in np.array_split(values, 7):
        observer.update(batch)
    ends = [round(100 - percentile, 10), percentile]
    expected = np.percentile(values, ends, method="inverted_cdf").clip([-np.inf, 0], [0, np.inf])
    # The interpolated quantile lies in the bin in which the counts pass the share, and so does the sorted value.
    np.testing.assert_allclose(observer.range(), expected, rtol=0, atol=observer.histogram.width)
    assert observer.histogram.width <= float(np.abs(values).max()) / 4096


def test_percentile_interpolates_within_a_bin():
    # Evenly spaced values: the percentile is known, and is met much closer than the bin width (about 120 values).
    observer = observed("percentile", np.linspace(-1, 1, 2_000_001, dtype=F32)[:-1], bits=8)
    np.testing.assert_allclose(observer.range(), [-0.9998, 0.9998], atol=observer.histogram.width / 20)


def squared_error(values, scale, zero, qmax):
    """Mean squared error of codes 0..qmax on the values themselves, in float64."""
    if scale == 0:
        return float(np.mean(values.astype(np.float64) ** 2))
    codes = np.clip(np.rint(values / np.float64(scale)) + zero, 0, qmax)
    return float(np.mean(((codes - zero) * scale - values.astype(np.float64)) ** 2))


def brute_force(values, bits, zeros):
    """The least error over all given zero points and 280 scales over 9 octaves, the greatest of which clips nothing."""
    qmax = 2**bits - 1
    scales = 2 * float(np.abs(values).max()) / max(qmax - 1, 1) * 2.0 ** np.linspace(0, -9, 280)
    return min(squared_error(values, s, z, qmax) for s, z in itertools.product(scales, zeros))


def test_expected_error_of_a_histogram_is_that_of_evenly_spread_values():
    counts, qmax = np.zeros(16384, np.int64), 7
    counts[8192 - 9 : 8192 + 12] = np.random.default_rng(2).integers(0, 50, 21)
    scales, zeros = np.array([[0.4, 1.3, 2.9], [0.7, 1.0, 9000.0]]), np.array([2, 5])
    within = (np.arange(4000) + 0.5) / 4000
    values = (np.flatnonzero(counts)[:, None] - 8192 + within).ravel()
    weights = np.repeat(counts[counts > 0], 4000) / 4000
    codes = np.clip(np.floor(values / scales[..., None] + 0.5) + zeros[:, None, None], 0, qmax)
    errors = ((codes - zeros[:, None, None]) * scales[..., None] - values) ** 2 @ weights
    # The midpoint rule with 4000 points is off by (1/4000)^2 per bin. The sums take differences of numbers of the order
    # of count * 8192 * scale, which costs six digits at a scale of 9000 bins and none at the others.
    np.testing.assert_allclose(_grid_errors(counts, scales, zeros, qmax), errors, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_mse_is_as_good_as_a_brute_force_search(kind, bits):
    values, qmax = samples(kind, 3000), 2**bits - 1
    lo, hi = map(float, observed("mse", values, bits=bits).range())
    scale = (hi - lo) / qmax
    zero = np.rint(-lo / scale)
    zeros = range(qmax + 1) if bits < 8 else {int(zero), 0, 32, 64, 128, 192, 255}
    best = brute_force(values, bits, zeros)
    # Both searches step through scales, by 2.2 % here and at most 0.5 % there, near a minimum where the error grows
    # with the square of the distance; bins are 1/4096 of the range and less. At 8 bits, on 3000 values, the error as a
    # function of the scale is ragged (each value's rounding error is a sample), which a histogram does not follow.
    assert squared_error(values, scale, zero, qmax) <= best * (1.005 if bits < 8 else 1.02)
    assert abs(zero * scale + lo) < 1e-6 * (hi - lo)  # zero is a code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["symmetric", "nonneg"])
def test_mse_with_a_held_zero_point(kind, bits, form):
    values, qmax = samples(kind, 3000), 2**bits - 1
    lo, hi = map(float, observed("mse", values, bits=bits, **{form: True}).range())
    # [-m, m] has its zero on code 2**(bits-1), as TensorFlow's nudging puts it there (127.5 rounds up at 8 bits).
    zero = 2 ** (bits - 1) if form == "symmetric" else 0
    best = brute_force(values, bits, [zero])
    assert squared_error(values, (hi - lo) / qmax, zero, qmax) <= best * (1.005 if bits < 8 else 1.02)


@pytest.mark.parametrize(("bits", "codes"), [(2, range(4)), (2, range(-2, 2)), (4, range(-3, 13)), (3, range(-7, 1))])
def test_mse_finds_a_grid_that_holds_all_values(bits, codes):
    values = np.array(codes, F32) * F32(0.25)
    np.testing.assert_allclose(observed("mse", values, bits=bits).range(), [values.min(), values.max()], rtol=1e-3)


def test_mse_of_a_uniform_distribution_is_the_textbook_step():
    values = ((np.arange(100_000) + 0.5) / 100_000).astype(F32)
    lo, hi = observed("mse", values, bits=2, nonneg=True).range()
    assert lo == 0
    # Levels 0, s, 2s, 3s: six half cells of s/2 and the rest 1 - 3s above the last level give the error
    # 6 (s/2)^3 / 3 + (1 - 3s)^3 / 3, which is least where (1 - 3s)^2 = s^2 / 4, that is s = 2/7.
    # Tolerance: the last grid of scales is 0.5 % fine.
    np.testing.assert_allclose(hi, 6 / 7, rtol=5e-3)
