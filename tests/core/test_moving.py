"""The ranges of training: how they follow batches, and what a batch is quantized on."""

import numpy as np
import pytest

from kquant.core.moving import EMA_DECAY, KEPT, kept, moved


def test_a_range_reaches_a_new_batch_by_the_share_that_is_not_kept():
    end = 1.0
    for _ in range(100):
        end = moved(end, 5.0)
    assert end == pytest.approx(5.0 - 4.0 * EMA_DECAY**100)
    assert moved(1.0, 5.0, decay=1.0) == 1.0


@pytest.mark.parametrize(("batch", "expected"), [
    ((-1.25, 1.4), (-1.0, 1.0)),  # a batch within 1.5 times the range is quantized on the range
    ((-8.0, 1.0), (-8.0 * KEPT, 1.0)),
    ((0.0, 3.0), (-1.0, 3.0 * KEPT)),
    ((0.0, 0.0), (-1.0, 1.0)),
])  # fmt: skip
def test_no_batch_is_clipped_below_two_thirds_of_its_extremes(batch, expected):
    assert kept(np.float32(-1.0), np.float32(1.0), *map(np.float32, batch)) == expected
