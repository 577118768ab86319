"""Keras 3 gives the codes of the golden file, which the tests of the other frameworks compare with."""

import golden_parity as golden
import numpy as np


def test_the_golden_file_is_what_keras_gives():
    found = golden.made_by_keras()
    with np.load(golden.FILE) as file:
        assert sorted(file.files) == sorted(found)
        for key, value in found.items():
            if key.startswith("net/"):  # convolutions may sum in another order on another CPU
                np.testing.assert_allclose(value, file[key], atol=np.ptp(file[key]) / 200)
            else:
                np.testing.assert_allclose(value, file[key], rtol=2e-7, atol=1e-30)
