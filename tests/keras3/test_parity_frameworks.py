"""Keras 3 gives the codes of the golden files, which the tests of the other frameworks compare with."""

import golden_parity as golden
import golden_twins
import numpy as np
import pytest
import twins


def test_the_golden_file_is_what_keras_gives():
    found = golden.made_by_keras()
    with np.load(golden.FILE) as file:
        assert sorted(file.files) == sorted(found)
        for key, value in found.items():
            if key.startswith("net/"):  # convolutions may sum in another order on another CPU
                np.testing.assert_allclose(value, file[key], atol=np.ptp(file[key]) / 200)
            else:
                np.testing.assert_allclose(value, file[key], rtol=2e-7, atol=1e-30)


@pytest.mark.filterwarnings("ignore:DoReFa clips activations")
@pytest.mark.parametrize("index", range(twins.COUNT))
def test_the_golden_twins_are_what_keras_gives(index):
    found = golden_twins.made_by_keras(index)
    with np.load(golden_twins.FILE) as file:
        theirs = {key: file[key] for key in file.files if key.startswith(f"{index}/")}
    assert sorted(found) == sorted(theirs)
    ranges = theirs.pop(f"{index}/ranges")
    np.testing.assert_allclose(found[f"{index}/ranges"], ranges, rtol=1e-5, atol=1e-5 * np.abs(ranges).max())
    np.testing.assert_array_equal(found[f"{index}/steps"], theirs.pop(f"{index}/steps"))
    for key, codes in theirs.items():
        # On another CPU convolutions may sum in another order: a toss-up then falls otherwise, and travels on.
        apart = np.abs(found[key].astype(int) - codes)
        assert apart.max() <= 2 and (apart > 0).mean() < 0.01, key
