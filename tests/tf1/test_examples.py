"""The example for TensorFlow 1 graphs, run as the README says."""

import re

import pytest
from digits_demo import python


@pytest.mark.slow
def test_the_example_trains_and_writes_an_integer_file(tmp_path):
    done = python("-m", "examples.digits_tf1", "--out", str(tmp_path), "--steps", "60")
    assert done.returncode == 0, done.stderr
    found = re.search(r"fully integer: True, (\d+) bytes, accuracy ([\d.]+)%", done.stdout)
    assert found, done.stdout
    assert int(found[1]) == (tmp_path / "digits.tflite").stat().st_size
    assert float(found[2]) > 90  # the float model has about 97 after as little training
    assert "as trained: True" in done.stdout
    assert float(re.search(r"max_lsb ([\d.]+)", done.stdout)[1]) <= 0.65  # the bound of an addition
