"""The tally of one op: what its distances from exact rounding say about its kernel."""

import numpy as np
import pytest

from kquant.core.affine import Affine
from kquant.core.parity import OpTally


def tallied(count: int, wrong: int) -> OpTally:
    """The tally of `count` codes of which `wrong` lie one above exact rounding, from just below a tie."""
    real = np.full(count, 3.0)
    real[:wrong] = 3.48
    tally = OpTally("op", "dense", 0.6, Affine(np.float32(1.0), 0, 8))
    tally.compare(np.where(real == 3.0, 3, 4), real)
    return tally


@pytest.mark.parametrize(("count", "wrong", "ok"), [
    (10, 1, True),  # one code of ten may be misrounded by a kernel of 1 %
    (10, 2, False),
    (10, 9, False),
    (144, 6, True),
    (144, 40, False),
    (10_000, 200, True),
    (10_000, 300, False),  # of many codes 3 % is a bias
])  # fmt: skip
def test_a_mean_error_counts_by_how_many_codes_show_it(count, wrong, ok):
    row = tallied(count, wrong).row()
    assert row.max_lsb == pytest.approx(0.52)
    assert row.mean_error == pytest.approx(wrong / count)
    assert row.ok is ok
