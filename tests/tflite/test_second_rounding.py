"""Transposed convolutions to a size found at run time run on kernels that round twice."""

import keras
import numpy as np
import pytest

import kquant

# The sum of the first two products cancels, so outputs are small beside the unit of the sum: a multiplier near 0.26.
KERNEL = np.float32([[1.0, 0.97], [-1.0, -0.97], [0.03, 0.03]])


def report_of(batch, tmp_path):
    random = np.random.default_rng(0)
    shared, own = random.uniform(-1, 1, (2, 64, 4, 4, 1)).astype("float32")
    x = np.concatenate([shared, shared, own], -1)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3), batch_size=batch),
            keras.layers.Conv2DTranspose(2, 1, strides=2, use_bias=False, name="up"),
        ]
    )
    model.layers[0].set_weights([KERNEL.T.reshape(1, 1, 2, 3)])
    qmodel = kquant.quantize_model(model, calibration_data=x)
    kquant.export_tflite(qmodel, tmp_path / "up.tflite")
    report = kquant.verify(qmodel, tmp_path / "up.tflite", x)
    assert report.ok, report.problems
    (row,) = [row for row in report.ops if row.name == "up"]
    return row


@pytest.mark.parametrize("batch", [None, 64])
def test_the_bound_of_two_roundings_is_stated_where_there_are_two(batch, tmp_path):
    row = report_of(batch, tmp_path)
    if batch is None:  # a shift by one bit after the first rounding: a quarter of a code more
        assert row.bound == 0.76 and 0.6 < row.max_lsb
    else:
        assert row.bound == 0.6 and row.max_lsb < 0.51
